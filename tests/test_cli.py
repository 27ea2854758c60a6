"""The command line: three modes end to end, and every bad input in one line with exit code 2."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONTENT_DIR, ROOT, STYLE_DIR, refusal, words
from PIL import Image

import main as command_line
from data import find_pictures, split_holdout
from main import main
from network import NetworkConfig, StyleTransferNetwork
from painting.stylizer import DEMO_CONTENT, DEMO_STYLE
from utils import UserError, save_checkpoint
from weights import COMPACT_MODEL, load_network, model_checkpoint

CONTENT, STYLE = CONTENT_DIR / "dog.jpg", STYLE_DIR / "great_wave.jpg"
TRAIN = f"""--mode train --gpu_no -1 --vgg_weights random --imsize 40 --cropsize 32 --batch_size 2 --num_workers 0
    --content_dir {CONTENT_DIR} --style_dir {STYLE_DIR} --wb_mode disabled""".split()


def run_main(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A short ch_xor run, by the command line, with settings that switch channels off at once."""
    folder = tmp_path_factory.mktemp("trained") / "ch_xor"
    run_main(*TRAIN, "--channel_loss_weight", 10000, "--xor_loss_weight", 500, "--encoder_lr", "2e-4",
             "--uncorrelation_loss_weight", 0, "--max_iter", 30, "--check_iter", 15, "--save_path", folder)
    return folder


@pytest.fixture(scope="session")
def pruned(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    result = run_main("--mode", "prune", "--gpu_no", -1, "--load_path", trained, "--content_dir", CONTENT_DIR,
                      "--style_dir", STYLE_DIR, "--imsize", 64, "--cropsize", 64, "--latency_runs", 1,
                      "--report_size", 64, "--prune_nums", 0, 300, "--content", CONTENT, "--style", STYLE,
                      "--save_path", folder)
    assert "parameters" in result.stdout and "multiply-adds" in result.stdout
    return folder


# ------------------------------------------------------------------------------------------- the three modes


def test_prune_cuts_what_is_zero_everywhere(pruned):
    report = json.loads((pruned / "report.json").read_text())
    responses = np.load(pruned / "responses.npz", allow_pickle=False)
    zero = int((responses["l2"] == 0).all(axis=0).sum())
    assert responses["l2"].shape == (16, 512) and zero > 5
    assert report["channels_before"] == 512 and report["channels_after"] == 512 - zero
    assert report["parameters_before"] == 7010947
    # One bottleneck channel holds 256 * 9 + 1 encoder and 256 * 9 decoder parameters.
    assert report["parameters_after"] == 7010947 - zero * (2 * 256 * 9 + 1)
    assert report["macs_after"] < report["macs_before"]
    assert report["file_bytes_after"] < report["file_bytes_before"]
    assert report["latency_ms_before"] > 0 and report["latency_ms_after"] > 0
    assert report["max_pixel_difference"] <= 1.0
    for name in ("l0_map.png", "l2_curve.png", "prune_grid.png"):
        with Image.open(pruned / name) as picture:
            assert min(picture.size) > 300 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 2


def test_full_and_pruned_network_make_the_same_picture(trained, pruned, tmp_path):
    pictures = []
    for model in (trained, pruned / "pruned.pth"):
        out = tmp_path / f"{model.name}.png"
        run_main("--mode", "test", "--gpu_no", -1, "--load_path", model, "--content", CONTENT, "--style", STYLE,
                 "--imsize", 75, "--save_path", out)
        pictures.append(np.asarray(Image.open(out), dtype=int))
    assert pictures[0].shape == (75, 75, 3)
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_prune_again_with_kept_responses_and_other_names(trained, pruned, tmp_path):
    """The other mode names work, `--responses` spares the measurement, and N cuts the N weakest."""
    run_main("--mode", "prune_eval", "--gpu_no", -1, "--load_path", trained, "--content_dir", CONTENT_DIR,
             "--style_dir", STYLE_DIR, "--imsize", 64, "--cropsize", 64, "--latency_runs", 1,
             "--report_size", 64, "--prune_nums", 0,
             "--prune_num", 300, "--responses", pruned / "responses.npz", "--half", "--save_path", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    l2 = np.load(pruned / "responses.npz")["l2"]
    assert report["parameters_after"] == 5628247
    assert set(report["cut_channels"]) == set(np.argsort(l2.sum(axis=0, dtype=np.float64), kind="stable")[:300])
    state = torch.load(tmp_path / "out" / "pruned.pth", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    run_main("--mode", "eval", "--gpu_no", -1, "--load_path", tmp_path / "out", "--content", CONTENT, "--style", STYLE,
             "--imsize", 40, "--save_path", tmp_path / "picture.jpg")
    assert Image.open(tmp_path / "picture.jpg").size == (40, 40)


def test_pruned_network_is_pruned_and_trained_again(pruned, tmp_path):
    run_main("--mode", "prune", "--gpu_no", -1, "--load_path", pruned, "--content_dir", CONTENT_DIR, "--style_dir",
             STYLE_DIR, "--prune_images", 2, "--imsize", 40, "--cropsize", 32, "--latency_runs", 1, "--report_size", 64,
             "--prune_num", 10, "--prune_nums", 0, "--save_path", tmp_path / "again")
    before = json.loads((pruned / "report.json").read_text())["channels_after"]
    assert json.loads((tmp_path / "again" / "report.json").read_text())["channels_after"] == before - 10
    run_main(*TRAIN, "--load_path", tmp_path / "again", "--max_iter", 1, "--save_path", tmp_path / "on")
    assert (tmp_path / "on" / "check_point.pth").exists()


def test_folders_give_every_pair_and_a_contact_sheet(trained, tmp_path, capsys):
    contents, styles = tmp_path / "contents", tmp_path / "styles"
    (contents / "deep").mkdir(parents=True)
    styles.mkdir()
    Image.open(CONTENT).resize((37, 50)).save(contents / "a.jpg")
    Image.open(CONTENT).resize((50, 37)).save(contents / "a.PNG")
    Image.open(CONTENT).resize((40, 40)).save(contents / "deep" / "b.webp")
    Image.open(STYLE).resize((61, 33)).save(styles / "s.jpg")
    Image.open(STYLE).resize((33, 61)).save(styles / "t.jpg")
    out = tmp_path / "out"
    assert main(["--mode", "test", "--gpu_no", "-1", "--load_path", str(trained), "--content", str(contents),
                 "--style", str(styles), "--save_path", str(out)]) == 0
    sizes = {path.name: Image.open(path).size for path in out.iterdir()}
    sheet = sizes.pop("contact_sheet.png")
    desired = {}
    for name, size in (("a-jpg", (37, 50)), ("a-PNG", (50, 37)), ("deep-b", (40, 40))):
        desired |= {f"{name}_s.png": size, f"{name}_t.png": size}
    assert sizes == desired
    assert sheet == (3 * 256, 4 * 256)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (97, 41), (64, 48)])
def test_output_has_the_size_of_the_content(trained, tmp_path, size):
    Image.open(CONTENT).resize(size).save(tmp_path / "content.png")
    Image.open(STYLE).resize((9, 3)).save(tmp_path / "style.png")
    out = tmp_path / "out.png"
    assert main(["--mode", "test", "--gpu_no", "-1", "--load_path", str(trained), "--content",
                 str(tmp_path / "content.png"), "--style", str(tmp_path / "style.png"), "--save_path", str(out)]) == 0
    assert Image.open(out).size == size


def test_test_mode_without_paths_stylises_a_bundled_pair_with_the_compact_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--mode", "test", "--gpu_no", "-1"]) == 0
    model = ["--load_path", str(COMPACT_MODEL), "--content", str(DEMO_CONTENT), "--style", str(DEMO_STYLE)]
    assert main(["--mode", "test", "--gpu_no", "-1", *model, "--save_path", "named.png"]) == 0
    actual, desired = (np.asarray(Image.open(name)) for name in ("stylised.png", "named.png"))
    np.testing.assert_array_equal(actual, desired)
    assert actual.shape[:2] == Image.open(DEMO_CONTENT).size[::-1]


def test_holdout_takes_what_training_left_out(trained, tmp_path):
    """In test and prune mode: 3 of the 16 bundled pictures at 0.3, those that the split by name gives."""
    desired = {}
    for flag, folder in (("content", CONTENT_DIR), ("style", STYLE_DIR)):
        desired[flag] = split_holdout(find_pictures(folder, ""), 0.3)[1]
        assert 0 < len(desired[flag]) < 8
    common = ["--gpu_no", "-1", "--load_path", str(trained), "--imsize", "64", "--cropsize", "64", "--holdout", "0.3"]
    assert main(["--mode", "test", *common, "--content", str(CONTENT_DIR), "--style", str(STYLE_DIR),
                 "--save_path", str(tmp_path / "test")]) == 0
    written = {path.name for path in (tmp_path / "test").iterdir()} - {"contact_sheet.png"}
    assert written == {f"{content.stem}_{style.stem}.png"
                       for content in desired["content"] for style in desired["style"]}
    assert main(["--mode", "prune", *common, "--content_dir", str(CONTENT_DIR), "--style_dir", str(STYLE_DIR),
                 "--latency_runs", "1", "--prune_nums", "0", "--save_path", str(tmp_path / "prune")]) == 0
    measured = np.load(tmp_path / "prune" / "responses.npz")["paths"].tolist()
    assert measured == [str(path) for path in (*desired["content"], *desired["style"])]


def test_holdout_that_leaves_nothing_to_measure_is_refused(test_flags, tmp_path, capsys):
    line = refusal(capsys, *words(test_flags | {"--content": CONTENT_DIR, "--holdout": 1e-9, "--save_path": tmp_path}))
    assert "--holdout 1e-09 holds none of its 8 pictures out" in line


def test_original_model_files_work(trained, tmp_path):
    """A file that holds only `state_dict` gives the picture of the checkpoint it was taken from."""
    state = torch.load(trained / "check_point.pth", weights_only=True)["state_dict"]
    torch.save({"state_dict": state}, tmp_path / "original.pth")
    pictures = []
    for model in (trained, tmp_path / "original.pth"):
        out = tmp_path / "out.png"
        assert main(["--mode", "test", "--gpu_no", "-1", "--load_path", str(model), "--content", str(CONTENT),
                     "--style", str(STYLE), "--imsize", "40", "--cropsize", "32", "--save_path", str(out)]) == 0
        pictures.append(np.asarray(Image.open(out)))
    assert pictures[0].shape == (32, 32, 3)
    np.testing.assert_array_equal(pictures[0], pictures[1])


# --------------------------------------------------------------------------------------------------- refusals


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_checkpoint(model_checkpoint(StyleTransferNetwork(NetworkConfig.full())), path)
    return path


@pytest.fixture
def test_flags(small_model, tmp_path) -> dict:
    return {"--mode": "test", "--gpu_no": -1, "--load_path": small_model, "--content": CONTENT, "--style": STYLE,
            "--save_path": tmp_path / "out.png"}


def test_pickle_with_code_is_refused_and_not_run(test_flags, tmp_path, capsys):
    for name, write in (("torch", torch.save), ("pickle", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        bad, made = tmp_path / f"{name}.pth", tmp_path / f"made_by_{name}"
        write({"state_dict": Malice(made)}, bad)
        line = refusal(capsys, *words(test_flags | {"--load_path": bad}))
        assert str(bad) in line and not made.exists()


def test_unusable_models_are_refused(test_flags, small_model, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("not a model")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(small_model.read_bytes()[:100_000])
    torch.save({"weights": 1}, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "folder").mkdir()
    for name in ("text.pth", "empty.pth", "cut.pth", "other.pth", "tensor.pth", "folder", "missing.pth"):
        line = refusal(capsys, *words(test_flags | {"--load_path": tmp_path / name}))
        assert "--load_path" in line and name in line


def test_unusable_pictures_are_refused(test_flags, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(CONTENT.read_bytes()[:3000])
    for name in ("text.jpg", "empty.jpg", "cut.jpg", "missing.jpg"):
        for flag in ("--content", "--style"):
            line = refusal(capsys, *words(test_flags | {flag: tmp_path / name}))
            assert flag in line and name in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("change, needed", [
    ({"--style_strength": 1.5}, "--style_strength"),
    ({"--style_strength": -0.1}, "--style_strength"),
    ({"--style_strength": "nan"}, "--style_strength"),
    ({"--imsize": 0}, "--imsize"),
    ({"--cropsize": "large"}, "--cropsize"),
    ({"--gpu_no": 99}, "--gpu_no 99"),
    ({"--gpu_no": -2}, "--gpu_no -2"),
    ({"--backbone": "vgg16"}, "512 bottleneck channels"),
    ({"--max_pixels": 1000}, "--max_pixels 1000"),
    ({"--load_pat": "x"}, "--load_pat"),
    ({"--mode": "paint"}, "--mode"),
    ({"--content": CONTENT_DIR}, "one file cannot hold"),
    ({"--swap_max_pool": ""}, "unrecognized"),
])
def test_bad_flags_of_test_mode(test_flags, capsys, change, needed):
    assert needed in refusal(capsys, *words(test_flags | change))


def test_missing_flags_are_named(capsys, small_model):
    assert "--style is empty" in refusal(capsys, "--mode", "test", "--load_path", small_model, "--style", "")
    assert "--content_dir is needed" in refusal(capsys, "--mode", "train")
    assert "--save_path is needed" in refusal(capsys, "--mode", "prune", "--load_path", small_model)


def test_save_path_in_the_way_is_refused(test_flags, tmp_path, capsys):
    (tmp_path / "file").write_text("here already")
    line = refusal(capsys, *words(test_flags | {"--content": CONTENT_DIR, "--save_path": tmp_path / "file"}))
    assert "a folder is needed" in line
    assert (tmp_path / "file").read_text() == "here already"


@pytest.mark.parametrize("change, needed", [
    (["--cropsize", 100], "--cropsize 100"),
    (["--encoder_lr", 0, "--decoder_lr", 0], "nothing would be learned"),
    (["--batch_size", 0], "--batch_size"),
    (["--lr", "inf"], "--lr"),
    (["--content_dir", "/no/such/folder"], "--content_dir /no/such/folder: no such folder"),
    (["--vgg_weights", "/no/such/file.pth"], "--vgg_weights /no/such/file.pth: no such file"),
    (["--vgg_weights", "bundled", "--backbone", "vgg16"], "not for vgg16"),
    (["--l0_eps", 0], "--l0_eps"),
    (["--style_loss", "histogram"], "--style_loss"),
])
def test_bad_flags_of_train_mode(tmp_path, capsys, change, needed):
    assert needed in refusal(capsys, *TRAIN, "--save_path", tmp_path / "run", "--max_iter", 1, *change)


def test_folders_without_usable_pictures_are_refused(tmp_path, capsys):
    empty, broken, some = (tmp_path / name for name in ("empty", "broken", "some"))
    for folder in (empty, broken, some):
        folder.mkdir()
    (empty / "notes.txt").write_text("no picture")
    (broken / "a.jpg").write_text("no picture")
    for number in range(8):
        (some / f"{number}.jpg").write_bytes(CONTENT.read_bytes())
    (some / "bad.jpg").write_bytes(CONTENT.read_bytes()[:3000])
    for folder, needed in ((empty, "no picture in it"), (broken, "1 of 1 pictures"), (some, "1 of 9 pictures")):
        line = refusal(capsys, *TRAIN, "--content_dir", folder, "--save_path", tmp_path / "run", "--max_iter", 1)
        assert f"--content_dir {folder}" in line and needed in line


@pytest.mark.parametrize("change, needed", [
    (["--prune_num", 512], "512 bottleneck channels, at most 511"),
    (["--prune_num", -1], "--prune_num"),
    (["--prune_channels", 3, 512], "channel 512"),
    (["--prune_channels", 3, 3], "more than once"),
    (["--prune_num", 3, "--prune_channels", 3], "one of the two"),
    (["--prune_nums", 0, 600], "--prune_nums 600"),
    (["--backbone", "vgg16"], "--backbone vgg16"),
    (["--content", "/no/such.jpg"], "/no/such.jpg"),
    (["--content_dir", "/no/such/folder"], "/no/such/folder"),
    (["--responses", "/no/such.npz"], "/no/such.npz"),
])
def test_bad_flags_of_prune_mode(small_model, tmp_path, capsys, change, needed):
    flags = ["--mode", "prune", "--gpu_no", -1, "--load_path", small_model, "--content_dir", CONTENT_DIR,
             "--style_dir", STYLE_DIR, "--imsize", 32, "--cropsize", 32, "--save_path", tmp_path / "out"]
    assert needed in refusal(capsys, *flags, *change)


def test_responses_of_another_width_are_refused(small_model, pruned, tmp_path, capsys):
    line = refusal(capsys, "--mode", "prune", "--gpu_no", -1, "--load_path", pruned, "--content_dir", CONTENT_DIR,
                   "--style_dir", STYLE_DIR, "--prune_nums", 0, "--responses", pruned / "responses.npz",
                   "--save_path", tmp_path / "out")
    assert "measured on 512 channels" in line


def test_refusal_is_one_line_without_traceback_in_a_real_process(tmp_path):
    result = run_main("--mode", "test", "--load_path", tmp_path / "none.pth", "--content", CONTENT, "--style", STYLE,
                      "--save_path", tmp_path / "out.png", code=2)
    assert result.stderr == f"error: --load_path {tmp_path / 'none.pth'}: no such file\n"


def test_upsampling_of_test_mode(test_flags, tmp_path):
    model = COMPACT_MODEL.with_name("tiny.pth")
    pictures = {}
    for upsampling in (None, "nearest", "bilinear"):
        flags = test_flags | {"--load_path": model, "--imsize": 64}
        flags |= {"--upsampling": upsampling} if upsampling else {}
        assert main(words(flags)) == 0
        pictures[upsampling] = np.asarray(Image.open(tmp_path / "out.png"), dtype=float)
    assert np.array_equal(pictures[None], pictures[load_network(model)[0].config.upsampling])
    assert np.abs(pictures["nearest"] - pictures["bilinear"]).max() > 5


def test_flags_without_effect_are_said(test_flags, capsys):
    assert main(words(test_flags | {"--imsize": 32, "--batch_size": 3})) == 0
    assert "--batch_size has no effect in test mode" in capsys.readouterr().err


def test_unknown_flags_point_to_the_help_of_the_mode(capsys):
    line = refusal(capsys, "--mode", "prune_eval", "--view_strength", 1)
    assert line == "error: unrecognized arguments: --view_strength 1 (see python main.py --mode prune --help)"


# ---------------------------------------------------------------------------------- memory and processes


TORCH_ON_THE_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
MACHINE, GPU = "this machine's memory", "the GPU's memory"


def raising(error: Exception):
    def mode(_given: dict):
        raise error

    return mode


@pytest.mark.parametrize("error, whose", [
    (MemoryError("Unable to allocate 1.2 GiB"), MACHINE), (TORCH_ON_THE_CPU, MACHINE),
    (torch.OutOfMemoryError("CUDA out of memory"), GPU),
], ids=["numpy", "torch", "cuda"])
@pytest.mark.parametrize("mode, flags", [
    ("train", "--imsize, --cropsize or --batch_size"), ("test", "--imsize or --cropsize"),
    ("prune", "--imsize or --cropsize"), ("distill", "--imsize, --cropsize or --batch_size"),
])
def test_too_little_memory_is_one_line_with_the_flags_that_help(monkeypatch, capsys, error, whose, mode, flags):
    monkeypatch.setitem(command_line.MODES, mode, command_line.MODES[mode]._replace(run=raising(error)))
    assert main(["--mode", mode]) == 2
    assert capsys.readouterr().err == f"error: {whose} is too small for this; a smaller {flags} helps\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    failing = command_line.MODES["test"]._replace(run=raising(RuntimeError("a bug")))
    monkeypatch.setitem(command_line.MODES, "test", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["--mode", "test"])


@pytest.mark.parametrize("error, said", [
    (MemoryError(), "this machine's memory is too small"),
    (UserError("--imsize 7: too small"), "--imsize 7: too small"),
])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_says_its_error_with_its_rank(monkeypatch, capsys, error, said, rank):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(command_line.MODES, "train", command_line.MODES["train"]._replace(run=raising(error)))
    assert refusal(capsys, "--mode", "train").startswith(f"error: rank {rank} of 2: {said}")


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch, capsys):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert refusal(capsys, "--mode", "test") == (
        "error: the environment has WORLD_SIZE=2 and RANK=1, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT, which "
        "torchrun sets, too; for one process: unset WORLD_SIZE RANK; for several: start with torchrun")

"""Training runs: resume, faults, signals, wandb, metrics. Small crops, random VGG, CPU."""

import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CPU,
    REPORTING_MAIN,
    ROOT,
    SMALL_TRAINING,
    read_metrics,
    refusal,
    small_network,
    stop_after,
    user_error,
    words,
    write_model,
    write_picture,
)
from torch.testing import assert_close

from evaluate import test as stylise
from main import main
from network import NetworkConfig, StyleTransferNetwork
from pruning.surgery import cut_bottleneck
from train import TrainConfig, build_trainer, train
from training import step as step_module
from training.loop import MetricSums
from training.run_folder import LOCK_NAME, CheckpointFolder
from training.step import METRICS
from utils import save_checkpoint
from weights import BUNDLED_VGG19, load_network, same_vgg


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "check_point.pth", weights_only=True)


def assert_same_runs(actual: Path, desired: Path) -> None:
    for name, tensor in checkpoint_of(desired)["state_dict"].items():
        assert_close(checkpoint_of(actual)["state_dict"][name], tensor, rtol=0, atol=0, msg=name)
    assert read_metrics(actual) == read_metrics(desired)


# ------------------------------------------------------------------------------------------------ resume


def test_stopped_and_resumed_run_equals_uninterrupted_run(small, tmp_path, monkeypatch):
    """Stopped inside a check interval, and the rest with a worker process: weights and means are the whole run's."""
    settings = small | {"check_iter": 4, "max_iter": 6, "shift_loss_weight": 30.0}
    train(settings | {"save_path": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert train(settings | {"save_path": str(tmp_path / "halves")}) == 143
    assert checkpoint_of(tmp_path / "halves")["iteration"] == 3
    assert train({"save_path": str(tmp_path / "halves"), "resume": True, "num_workers": 1}) == 0
    assert_same_runs(tmp_path / "halves", tmp_path / "whole")
    assert [row["iteration"] for row in read_metrics(tmp_path / "halves")] == [4, 6]


def test_resume_drops_metrics_past_the_checkpoint(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 3, "content": 99.0}) + "\n" + '{"iteration": 4, "con')
    train({"save_path": str(tmp_path), "resume": True, "max_iter": 3})
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[2]["content"] != 99.0


def test_what_cannot_be_resumed_is_refused(small, tmp_path):
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 2}
    assert "check_point.pth is not there" in user_error(train, again)
    settings = small | {"save_path": str(tmp_path), "max_iter": 1}
    train(settings)
    before = (tmp_path / "check_point.pth").read_bytes()
    assert "--backbone vgg19, not vgg16" in user_error(train, again | {"backbone": "vgg16"})
    assert "holds a run already" in user_error(train, settings)
    assert (tmp_path / "check_point.pth").read_bytes() == before


def test_another_number_of_processes_is_refused_unless_the_batches_stay(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    save_checkpoint(checkpoint_of(tmp_path) | {"processes": 3}, tmp_path / "check_point.pth")
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 2}
    assert "3 processes of --batch_size 2 trained this run, now there are 1 of 2" in user_error(train, again)
    assert train(again | {"batch_size": 6}) == 0 and checkpoint_of(tmp_path)["processes"] == 1


@pytest.mark.parametrize("before, after", [
    ({"encoder_lr": 0.0}, {"encoder_lr": 1e-5, "decoder_lr": 0.0}),
    ({"encoder_lr": 0.0}, {"encoder_lr": 1e-5}),
    ({}, {"encoder_lr": 0.0}),
])
def test_other_parts_are_not_resumed(small, tmp_path, before, after):
    train(small | before | {"save_path": str(tmp_path), "max_iter": 1})
    good = (tmp_path / "check_point.pth").read_bytes()
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 2}
    assert "freezes or thaws a part" in user_error(train, again | after)
    assert (tmp_path / "check_point.pth").read_bytes() == good
    assert train(again) == 0


def test_a_run_is_resumed_from_another_folder(small, tmp_path, monkeypatch):
    for kind in ("content", "style"):
        shutil.copytree(small[f"{kind}_dir"], tmp_path / kind)
    shutil.copy(BUNDLED_VGG19, tmp_path / "vgg.pth")
    monkeypatch.chdir(tmp_path)
    settings = small | {"content_dir": "content", "style_dir": "style", "vgg_weights": "vgg.pth", "save_path": "run"}
    train(settings | {"max_iter": 1})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train({"save_path": "../run", "resume": True, "max_iter": 2, "content_dir": "../content"}) == 0


def test_vgg_weights_are_known_by_what_is_in_the_file(small, tmp_path, capsys):
    shutil.copy(BUNDLED_VGG19, tmp_path / "copy.pth")
    settings = small | {"save_path": str(tmp_path / "run"), "vgg_weights": "bundled"}
    train(settings | {"max_iter": 1})
    again = {"save_path": str(tmp_path / "run"), "resume": True}
    assert train(again | {"max_iter": 2, "vgg_weights": str(tmp_path / "copy.pth")}) == 0
    assert "VGG weights" in user_error(train, again | {"max_iter": 3, "vgg_weights": "random"})


@pytest.mark.parametrize("first, second, desired", [
    ("bundled (sha256 00aa)", "/a/b.pth (sha256 00aa)", True),
    ("bundled (sha256 00aa)", "bundled (sha256 00ab)", False),
    ("imagenet (torchvision X)", "imagenet (torchvision X, sha256 00aa)", True),
    ("imagenet (torchvision X)", "imagenet (torchvision Y, sha256 00aa)", False),
    ("random (He initialisation, seed 0)", "random (He initialisation, seed 0)", True),
    ("random (He initialisation, seed 0)", "random (He initialisation, seed 1)", False),
    (None, None, True),
    (None, "bundled (sha256 00aa)", False),
])
def test_origins_of_the_same_weights(first, second, desired):
    assert same_vgg(first, second) == same_vgg(second, first) == desired


def test_the_gpu_of_a_run_does_not_bind_its_resumption(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    checkpoint = checkpoint_of(tmp_path)
    checkpoint["train_config"]["gpu_no"] = 7
    torch.save(checkpoint, tmp_path / "check_point.pth")
    assert train({"save_path": str(tmp_path), "resume": True, "max_iter": 2}) == 0


def test_resume_auto_starts_and_goes_on(small, tmp_path, capsys):
    settings = small | {"save_path": str(tmp_path / "run"), "resume": "auto", "check_iter": 2}
    assert train(settings | {"max_iter": 2}) == 0
    assert train(settings | {"max_iter": 4}) == 0
    assert [row["iteration"] for row in read_metrics(tmp_path / "run")] == [2, 4]
    assert train(settings | {"max_iter": 4}) == 0 and "has done its 4 iterations" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ where a run starts


def test_pruned_network_trains_on(small, tmp_path):
    """A pruned file is a start like any other; its widths stay."""
    pruned = write_model(tmp_path / "pruned.pth", cut_bottleneck(small_network(width=8), range(3)))
    train(small | {"load_path": str(pruned), "save_path": str(tmp_path / "on"), "max_iter": 2})
    assert load_network(tmp_path / "on")[0].config.encoder_widths == (*(8,) * 8, 5)


@pytest.mark.parametrize("name, value, other", [("upsampling", "bilinear", "nearest"), ("pooling", "blur", "max")])
def test_the_file_says_how_to_sample_unless_another_way_is_asked_for(small, tmp_path, name, value, other):
    train(small | {"save_path": str(tmp_path / "a"), "max_iter": 1, name: value})
    again = {"save_path": str(tmp_path / "a"), "resume": True, "max_iter": 2}
    train(again)
    for folder, more, desired in (("b", {}, value), ("c", {name: other}, other)):
        train(small | {"load_path": str(tmp_path / "a"), "save_path": str(tmp_path / folder), "max_iter": 1} | more)
        assert getattr(load_network(tmp_path / folder)[0].config, name) == desired
    assert getattr(cut_bottleneck(load_network(tmp_path / "a")[0], range(3)).config, name) == value
    assert f"--{name}" in user_error(train, again | {name: other, "max_iter": 3})


def test_new_weights_keep_the_widths_alone(tmp_path):
    """He initialisation: every conv anew, of the variance that keeps the signal's size; the seed decides."""
    full = NetworkConfig.full()
    narrow = StyleTransferNetwork(replace(full, encoder_widths=(*full.encoder_widths[:-1], 200)))
    start = str(write_model(tmp_path / "narrow.pth", narrow))
    config = TrainConfig(**SMALL_TRAINING | {"load_path": start, "new_weights": True, "save_path": "x"})
    networks = [build_trainer(config, CPU, None).network for _ in range(2)]
    assert networks[0].config == narrow.config
    for name, actual in networks[0].state_dict().items():
        assert torch.equal(actual, networks[1].state_dict()[name])
        if name.endswith("bias"):
            assert not actual.any()
            continue
        assert not torch.equal(actual, narrow.state_dict()[name])
        gain = 1.0 if actual.shape[0] == 3 else 2.0
        assert actual.std().item() == pytest.approx((gain / actual[0].numel()) ** 0.5, rel=0.1)


def test_vgg16_and_average_pooling_train(tmp_path):
    settings = {"backbone": "vgg16", "swap_max_pool": True, "style_loss": "gram", "max_iter": 2}
    train(SMALL_TRAINING | settings | {"save_path": str(tmp_path)})
    network, _ = load_network(tmp_path)
    assert (network.config.backbone, network.config.pooling) == ("vgg16", "avg")


# --------------------------------------------------------------------------------- signals, kill, bad losses


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_resume(small, tmp_path, monkeypatch, capsys, number, code):
    folder = tmp_path / "run"
    settings = small | {"save_path": folder, "max_iter": 9, "check_iter": 9, "num_workers": 1}
    with monkeypatch.context() as patch:
        stop_after(2, patch, number)
        assert main(["--mode", "train", *words(settings)]) == code
    errors = capsys.readouterr().err
    assert f"python main.py --mode train --resume --save_path {folder}" in errors and "Traceback" not in errors
    assert checkpoint_of(folder)["iteration"] == 2
    assert train({"save_path": str(folder), "resume": True, "max_iter": 3}) == 0


def test_kill_leaves_a_good_checkpoint(small, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(REPORTING_MAIN), "--mode", "train"]
    command += words(small | {"save_path": folder, "max_iter": 5000})
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for iteration in process.stdout:
            if int(iteration) == 3:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    _, checkpoint = load_network(folder)
    assert checkpoint["iteration"] >= 2
    assert train({"save_path": str(folder), "resume": True, "max_iter": checkpoint["iteration"] + 1}) == 0


def test_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    good = (tmp_path / "check_point.pth").read_bytes()
    # A rate this large makes iteration 2's weights, and so iteration 3's losses, overflow.
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 9, "check_iter": 9, "decoder_lr": 1e30}
    message = user_error(train, again)
    assert "iteration " in message and "is not finite" in message
    assert (tmp_path / "check_point.pth").read_bytes() == good


def test_compile_without_a_compiler_is_one_line(small, tmp_path, monkeypatch, capsys):
    """The step is cut short to its first loss: what is compiled does not matter where nothing can be."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(step_module.ForwardPass, "forward",
                        lambda self, content, style, all_terms, move: ({"content": content.sin().sum()}, {}))
    with inductor.patch({"cpp.cxx": ("/no/compiler",)}):
        line = refusal(capsys, "--mode", "train",
                       *words(small | {"save_path": tmp_path, "max_iter": 1, "compile": True}))
    assert "error: --compile: torch.compile failed" in line and "/no/compiler" in line


def test_first_term_that_is_not_finite_is_named():
    sums = MetricSums(CPU, METRICS)
    good = {name: torch.tensor(1.0) for name in METRICS}
    sums.add(good, 6)
    sums.raise_if_bad()
    sums.add(good | {"style": torch.tensor(float("nan")), "total": torch.tensor(float("nan"))}, 7)
    sums.add({name: torch.tensor(float("inf")) for name in METRICS}, 8)
    assert "iteration 7: the style loss is not finite" in user_error(sums.raise_if_bad)


def test_a_second_run_in_the_folder_is_refused(small, tmp_path):
    with CheckpointFolder.of_run(str(tmp_path), 0, is_resumed=False):
        for more in ({}, {"resume": "auto"}):
            assert "another run is writing to it" in user_error(train, small | {"save_path": str(tmp_path)} | more)
    assert train(small | {"save_path": str(tmp_path), "max_iter": 1}) == 0


def test_a_kill_releases_the_folder(small, tmp_path):
    script = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from training.run_folder import CheckpointFolder\n"
              f"with CheckpointFolder.of_run({str(tmp_path)!r}, 0, False): print('held', flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n" and (tmp_path / LOCK_NAME).exists()
    assert "another run is writing to it" in user_error(train, small | {"save_path": str(tmp_path)})
    holder.kill()
    holder.wait()
    assert train(small | {"save_path": str(tmp_path), "max_iter": 1}) == 0


def test_only_convolutions_of_a_training_may_use_tf32(small, tmp_path):
    train(small | {"save_path": str(tmp_path / "run"), "max_iter": 1})
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32  # products are the losses'
    picture = str(next(Path(small["content_dir"]).iterdir()))
    stylise({"load_path": (small["load_path"],), "content": (picture,), "style": (picture,), "gpu_no": -1,
             "save_path": str(tmp_path / "out.png")})
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# ------------------------------------------------------------------------------------------- what is written


def test_every_check_writes_metrics_grid_and_checkpoint(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 5, "check_iter": 2, "keep_checkpoints": 2})
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert set(METRICS) <= row.keys() and row["dead_units"] == sum(row["dead_units_by_layer"])
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["iteration_0000002.png", "iteration_0000004.png", "iteration_0000005.png"]
    models = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert models == ["check_point.pth", "check_point_0000004.pth", "check_point_0000005.pth"]


def read_wandb_records(path: Path) -> list:
    """Records of a .wandb file: a 7-byte header, then a LevelDB log of 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_wandb_offline_holds_the_logged_values(small, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests: auto is offline
    train(small | {"save_path": str(tmp_path / "run"), "max_iter": 2, "wb_mode": "auto", "wb_name": "trial",
                   "wb_tags": ("channel loss", "xor loss"), "wb_notes": "a note"})
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records, deadline = [], time.monotonic() + 60.0
    while not any(record.WhichOneof("record_type") == "exit" for record in records):  # wandb's own process writes
        assert time.monotonic() < deadline
        time.sleep(0.1)
        records = read_wandb_records(file)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert run.display_name == "trial" and list(run.tags) == ["channel loss", "xor loss"] and run.notes == "a note"
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    rows = read_metrics(tmp_path / "run")
    assert [row["_step"] for row in history] == [1, 2]
    for actual, desired in zip(history, rows):
        for name in METRICS:
            assert actual[name] == pytest.approx(desired[name]), name
        assert actual["pictures._type"] == "image-file"


def test_wandb_that_fails_midway_ends_no_training(small, tmp_path, monkeypatch, capsys):
    def log(*_, **__):
        raise ConnectionResetError("Connection lost")

    run = SimpleNamespace(id="a", dir=".", offline=True, log=log, finish=lambda: None)
    wandb = SimpleNamespace(init=lambda **_: run, Settings=lambda **_: None, Image=str)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train(small | {"save_path": str(tmp_path), "max_iter": 2, "wb_mode": "offline"}) == 0
    assert capsys.readouterr().err.count("wandb failed (Connection lost)") == 1


class NoWandb:
    """Finds no package wandb, wherever it lies."""

    @staticmethod
    def find_spec(name, *_):
        if name == "wandb":
            raise ModuleNotFoundError(name)


def test_training_without_wandb_says_so_once(small, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoWandb, *sys.meta_path])
    assert train(small | {"save_path": str(tmp_path), "max_iter": 2, "wb_mode": "auto"}) == 0
    assert capsys.readouterr().err.count("wandb is not installed") == 1
    message = user_error(train, small | {"save_path": str(tmp_path / "other"), "max_iter": 2, "wb_mode": "offline"})
    assert "--wb_mode offline: wandb is not installed" in message


def test_cached_run_equals_run_without_a_cache(small, tmp_path):
    settings = small | {"max_iter": 3}
    train(settings | {"save_path": str(tmp_path / "plain")})
    for name in ("first", "second"):  # fills the cache, then uses it
        train(settings | {"save_path": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), "num_workers": 1})
        assert read_metrics(tmp_path / name) == read_metrics(tmp_path / "plain")
    assert list((tmp_path / "cache").glob("??/*.npy"))


def test_broken_pictures_are_skipped_logged_once_and_counted(small, tmp_path, capsys):
    folder = tmp_path / "content"
    for number in range(11):
        write_picture(folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    train(small | {"content_dir": str(folder), "save_path": str(tmp_path / "run"), "max_iter": 8})
    errors = capsys.readouterr().err
    assert errors.count("broken.jpg") == 1
    assert f"--content_dir {folder}: 12 pictures, 1 skipped" in errors

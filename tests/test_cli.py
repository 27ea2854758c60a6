"""The command line from end to end: train, prune, stylise; too little memory, several processes, errors.

Refusals of bad input are in test_refusals.py, the flags' help in test_flags.py."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import CONTENT_DIR, ROOT, STYLE_DIR, read_pixels, refusal, small_network, words, write_model, write_noise
from PIL import Image

import main as command_line
from folders import find_pictures, split_holdout
from main import main
from network import bottleneck_conv
from painting.stylizer import DEMO_CONTENT, DEMO_STYLE
from utils import UserError
from weights import COMPACT_MODEL, load_network

CONTENT, STYLE = CONTENT_DIR / "dog.jpg", STYLE_DIR / "great_wave.jpg"
FOLDERS = {"content_dir": CONTENT_DIR, "style_dir": STYLE_DIR, "gpu_no": -1}
PRUNE = FOLDERS | {"mode": "prune", "imsize": 40, "cropsize": 40, "latency_runs": 1, "report_size": 40}
DEAD = (1, 4)  # bottleneck channels


def run(**flags) -> None:
    assert main(words(flags)) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two iterations from a narrow network on, two of whose bottleneck channels are off."""
    folder = tmp_path_factory.mktemp("trained")
    network = small_network(width=8)
    with torch.no_grad():
        network.get_submodule(bottleneck_conv(network.config)).bias[list(DEAD)] = -1000.0
    run(**FOLDERS, mode="train", load_path=write_model(folder / "narrow.pth", network), vgg_weights="random", imsize=40,
        cropsize=32, batch_size=2, num_workers=0, encoder_lr=1e-5, wb_mode="disabled", max_iter=2, check_iter=1,
        save_path=folder / "run")
    return folder / "run"


def test_pruned_networks_paint_the_same_and_are_pruned_again(trained, tmp_path):
    """What is off for all pictures is cut."""
    pruned, again = tmp_path / "pruned", tmp_path / "again"
    run(**PRUNE, load_path=trained, prune_nums=(0, 3), content=CONTENT, style=STYLE, save_path=pruned)
    run(**PRUNE | {"mode": "prune_eval", "prune_nums": 0}, load_path=pruned, prune_num=1, prune_images=2,
        save_path=again)
    report, after = (json.loads((folder / "report.json").read_text()) for folder in (pruned, again))
    assert set(DEAD) <= set(report["cut_channels"]) and report["channels_after"] == 8 - len(report["cut_channels"])
    assert load_network(pruned)[0].config.bottleneck_width == report["channels_after"]
    assert load_network(again)[0].config.bottleneck_width == after["channels_after"] == report["channels_after"] - 1
    pictures = []
    for model in (trained, pruned / "pruned.pth"):
        run(mode="eval", gpu_no=-1, load_path=model, content=CONTENT, style=STYLE, imsize=75,
            save_path=tmp_path / "out.png")
        pictures.append(read_pixels(tmp_path / "out.png"))
    assert pictures[0].shape == (75, 75, 3) and abs(pictures[0] - pictures[1]).max() <= 1


def test_test_mode_without_paths_stylises_a_bundled_pair_with_the_compact_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"mode": "test", "gpu_no": -1, "load_path": COMPACT_MODEL, "content": DEMO_CONTENT, "style": DEMO_STYLE}
    run(mode="test", gpu_no=-1)
    run(**given, save_path="named.png")
    run(**given, upsampling="nearest", save_path="blocky.png")
    actual, desired, blocky = (read_pixels(Path(f"{name}.png")) for name in ("stylised", "named", "blocky"))
    assert abs(actual - desired).max() <= 1 and actual.shape[:2] == Image.open(DEMO_CONTENT).size[::-1]
    assert abs(blocky - desired).max() > 5


def test_holdout_takes_what_training_left_out(trained, tmp_path):
    """In test and prune mode: of the 16 bundled pictures at 0.3, those that the split by name gives."""
    contents, styles = (split_holdout(find_pictures(folder, ""), 0.3, "")[1] for folder in (CONTENT_DIR, STYLE_DIR))
    assert 0 < len(contents) < 8 and 0 < len(styles) < 8
    run(mode="test", gpu_no=-1, load_path=trained, imsize=40, holdout=0.3, content=CONTENT_DIR, style=STYLE_DIR,
        save_path=tmp_path / "test")
    written = {path.name for path in (tmp_path / "test").iterdir()} - {"contact_sheet.png"}
    assert written == {f"{content.stem}_{style.stem}.png" for content in contents for style in styles}
    run(**PRUNE, load_path=trained, holdout=0.3, prune_nums=0, save_path=tmp_path / "prune")
    kept = np.load(tmp_path / "prune" / "responses.npz")
    measured, aside = set(kept["paths"].tolist()), set(kept["pairs"].flatten().tolist())
    assert measured | aside == set(map(str, (*contents, *styles))) and not measured & aside


def test_a_real_process_refuses_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), "--mode", "test", "--load_path", str(tmp_path / "none.pth")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: --load_path {tmp_path / 'none.pth'}: no such file\n"


MACHINE, GPU = "this machine's memory", "the GPU's memory"


@pytest.fixture
def failing(monkeypatch):
    """Let a mode fail with an error."""
    def fail(mode: str, error: Exception) -> None:
        def run_mode(_given: dict):
            raise error

        monkeypatch.setitem(command_line.MODES, mode, command_line.MODES[mode]._replace(run=run_mode))

    return fail


@pytest.mark.parametrize("error, whose, mode, flags", [
    (MemoryError("Unable to allocate 1.2 GiB"), MACHINE, "train", "--imsize, --cropsize or --batch_size"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), MACHINE, "test",
     "--tile, --imsize or --cropsize"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), MACHINE, "prune", "--imsize or --cropsize"),
    (torch.OutOfMemoryError("CUDA out of memory"), GPU, "distill", "--imsize, --cropsize or --batch_size"),
    (torch.OutOfMemoryError("CUDA out of memory"), GPU, "prune", "--imsize or --cropsize"),
], ids=["numpy", "torch", "system", "cuda", "cuda in prune"])
def test_too_little_memory_is_one_line_with_the_flags_that_help(failing, capsys, error, whose, mode, flags):
    failing(mode, error)
    assert refusal(capsys, "--mode", mode) == f"error: {whose} is too small for this; a smaller {flags} helps"
    failing(mode, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):  # keeps its traceback
        main(["--mode", mode])


@pytest.mark.parametrize("error, said", [
    (MemoryError(), "this machine's memory is too small"),
    (UserError("--imsize 7: too small"), "--imsize 7: too small"),
    (OSError(28, "No space left on device", "a.png"), "a.png: cannot be read or written (No space left on device)"),
])
def test_every_process_says_its_error_with_its_rank(failing, monkeypatch, capsys, error, said):
    failing("train", error)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert refusal(capsys, "--mode", "train").startswith(f"error: rank 1 of 2: {said}")


def log(error: type | None = None) -> Mock:
    """A host program's stream: `write` alone, which may fail."""
    return Mock(spec=["write"], **{"write.side_effect": error})


@pytest.mark.parametrize("stream, said", [
    (None, None), (log(), "caf\\udce9"), (log(BrokenPipeError), ""), (log(RuntimeError), ""),
    (io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True), "caf\\udce9"), (open(os.devnull), None),
], ids=["none", "write alone", "its reader has ended", "gone with its window", "ascii", "to read"])
def test_no_console_costs_no_picture(stream, said, tmp_path, monkeypatch):
    """Nor one that lacks the ± of the table and signs of a file's name."""
    content = write_noise(tmp_path / "caf\udce9.png", (32, 32), 0)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    run(mode="test", gpu_no=-1, content=content, metrics="ssim", save_path=tmp_path / "out")
    assert main(words({"mode": "test", "content": tmp_path / "none.png"})) == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == 1 and (tmp_path / "out" / "metrics.json").exists()
    if said is not None:
        text = (stream.buffer.getvalue().decode() if hasattr(stream, "buffer") else
                "".join(call.args[0] for call in stream.write.mock_calls))
        assert said in text and "SSIM" in text and "none.png: no such file" in text

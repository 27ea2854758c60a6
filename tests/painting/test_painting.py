"""Many pairs: lists of pictures, several strengths, one decoding each, what is there already, several processes."""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CONTENT_DIR,
    ROOT,
    STYLE_DIR,
    picture_network,
    read_pixels,
    refusal,
    words,
    write_map,
    write_model,
    write_noise,
)
from PIL import Image

import network
from data import read_written, save_picture
from main import main
from painting import many
from painting import stylizer as stylize
from painting.stylizer import Stylizer


@pytest.fixture
def flags(tmp_path) -> dict:
    """Two contents and two styles in folders, painted by a narrow network whose pictures are not black and white."""
    network = picture_network()
    for kind in ("content", "style"):
        for number in range(2):
            write_noise(tmp_path / f"{kind}s" / f"{kind[0]}{number}.png", (24, 32), 2 * number + (kind == "style"))
    return {"mode": "test", "gpu_no": -1, "load_path": write_model(tmp_path / "model.pth", network),
            "content": tmp_path / "contents", "style": tmp_path / "styles", "save_path": tmp_path / "out"}


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pairs_of(contents: str, styles: str) -> set[str]:
    return {f"{content}_{style}.png" for content in contents.split() for style in styles.split()}


# -------------------------------------------------------------------------------------------------- lists


def test_several_paths_are_a_list_each_with_each(flags, tmp_path):
    """Files and folders mixed; a picture that is named twice counts once, and is painted as alone."""
    single = write_noise(tmp_path / "more" / "photo.png", (17, 50), 9)
    flags |= {"content": [single, tmp_path / "contents", tmp_path / "contents" / "c1.png"],
              "style": [tmp_path / "styles" / "s1.png", tmp_path / "styles" / "s0.png"]}
    assert main(words(flags)) == 0
    assert written(tmp_path / "out") == pairs_of("photo c0 c1", "s0 s1") | {"contact_sheet.png"}
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (3 * 256, 4 * 256)
    flags |= {"content": single, "style": tmp_path / "styles" / "s1.png", "save_path": tmp_path / "one.png"}
    assert main(words(flags)) == 0
    assert np.array_equal(read_pixels(tmp_path / "one.png"), read_pixels(tmp_path / "out" / "photo_s1.png"))


def test_outputs_among_a_list_are_refused(flags, tmp_path, capsys):
    contents = [tmp_path / "contents" / f"c{number}.png" for number in range(2)]
    flags |= {"style": tmp_path / "styles" / "s0.png"}
    assert "would overwrite" in refusal(capsys, *words(flags | {
        "content": [*contents, write_noise(tmp_path / "out" / "c0_s0.png", (8, 8), 0)]}))
    # Beside single pictures a folder may be written to.
    assert main(words(flags | {"content": contents, "save_path": tmp_path / "contents"})) == 0


# ---------------------------------------------------------------------------------------------- strengths


def test_a_list_of_strengths_equals_single_calls(flags, tmp_path):
    flags |= {"content": tmp_path / "contents" / "c0.png", "style": tmp_path / "styles" / "s0.png"}
    strengths = ["0", "0.25", "1"]
    assert main(words(flags | {"style_strength": strengths})) == 0
    assert written(tmp_path / "out") == {*(f"c0_s0_{strength}.png" for strength in strengths), "comparison.png"}
    pictures = []
    for strength in strengths:
        assert main(words(flags | {"style_strength": strength, "save_path": tmp_path / "one.png"})) == 0
        pictures.append(read_pixels(tmp_path / "one.png"))
        assert np.array_equal(pictures[-1], read_pixels(tmp_path / "out" / f"c0_s0_{strength}.png"))
    assert all(np.abs(first - second).max() > 1 for first, second in zip(pictures, pictures[1:]))
    sheet = Image.open(tmp_path / "out" / "comparison.png")
    assert sheet.size == (5 * 256, 32 + 256)  # content, style, and the strengths in order
    middles = [sheet.getpixel((column * 256 + 128, 32 + 128)) for column in range(2, 5)]
    assert middles == [tuple(picture[12, 16]) for picture in pictures]


def test_metrics_have_a_row_for_each_strength(flags, tmp_path, capsys):
    flags |= {"metrics": "ssim"}
    assert main(words(flags | {"style_strength": [0, 1]})) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in rows[1:4]] == ["model at 0", "model at 1", "model at 1 - model at 0"]
    several = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert several["settings"]["style_strength"] == [0.0, 1.0]
    assert main(words(flags | {"style_strength": 0.0, "save_path": tmp_path / "single"})) == 0
    single = json.loads((tmp_path / "single" / "metrics.json").read_text())
    assert single["settings"]["style_strength"] == 0.0 == several["models"][0]["style_strength"]
    assert several["models"][0]["metrics"] == single["models"][0]["metrics"]


# ----------------------------------------------------------------------------------------- once, and at once


@pytest.mark.parametrize("metrics", [None, ("content", "style")])
def test_each_picture_is_decoded_and_encoded_once(flags, tmp_path, monkeypatch, metrics):
    """By the model, and where losses are measured by the loss network, too."""
    (tmp_path / "contents" / "z.jpg").write_text("no picture")
    decoded, encoded, measured = Counter(), Counter(), Counter()
    prepare, encode = stylize.prepare_picture, network.StyleTransferNetwork.encode
    features = network.LossNetwork.forward

    def count_decoding(path, *more):
        decoded[path.name] += 1
        return prepare(path, *more)

    def count(calls, forward):
        def counting(self, image):
            calls[tuple(image.flatten()[:9].tolist())] += 1
            return forward(self, image)
        return counting

    monkeypatch.setattr(stylize, "prepare_picture", count_decoding)
    monkeypatch.setattr(network.StyleTransferNetwork, "encode", count(encoded, encode))
    monkeypatch.setattr(network.LossNetwork, "forward", count(measured, features))
    given = {"metrics": metrics, "vgg_weights": "random"} if metrics else {}
    assert main(words(flags | given)) == 1
    assert decoded == {"c0.png": 1, "c1.png": 1, "s0.png": 1, "s1.png": 1, "z.jpg": 1}
    assert sorted(encoded.values()) == [1] * 4
    assert sorted(measured.values()) == ([1] * (4 + 4) if metrics else [])  # inputs and outputs


def test_reading_painting_and_writing_overlap(flags, tmp_path, monkeypatch):
    """A picture is written only once the network is at the next, and the third content is read by then."""
    write_noise(tmp_path / "contents" / "c2.png", (24, 32), 7)
    monkeypatch.setattr(many, "usable_cores", lambda: 2)
    met, read = threading.Barrier(2, timeout=60), threading.Event()
    save, load, paint, painted = many.save_picture, many.load_input, Stylizer.paint_picture, []

    def wait_and_save(picture, path, alpha):
        if path.name == "c0_s0.png":
            met.wait()
        save(picture, path, alpha)

    def load_and_say(path, *more):
        picture = load(path, *more)
        if path.name == "c2.png":
            read.set()
        return picture

    def wait_and_paint(self, *arguments, **settings):
        painted.append(None)
        if len(painted) == 2:
            met.wait()
            assert read.wait(timeout=60)
        return paint(self, *arguments, **settings)

    monkeypatch.setattr(many, "save_picture", wait_and_save)
    monkeypatch.setattr(many, "load_input", load_and_say)
    monkeypatch.setattr(Stylizer, "paint_picture", wait_and_paint)
    assert main(words(flags | {"style": tmp_path / "styles" / "s0.png"})) == 0


def test_contents_are_not_held_in_memory(flags, tmp_path, monkeypatch):
    """Of 30 contents at most a few are at hand at a time."""
    for number in range(30):
        write_noise(tmp_path / "contents" / f"m{number}.png", (8, 8), number)
    monkeypatch.setattr(many, "usable_cores", lambda: 2)
    alive, most, load = weakref.WeakSet(), [], many.load_input

    def count(path, *more):
        picture = load(path, *more)
        alive.add(picture)
        most.append(len(alive))
        return picture

    monkeypatch.setattr(many, "load_input", count)
    assert main(words(flags)) == 0
    assert not alive and 2 <= max(most) <= 6


# ---------------------------------------------------------------------------------------- what is there already


def test_what_is_there_and_whole_is_not_painted_again(flags, tmp_path, capsys, monkeypatch):
    assert main(words(flags)) == 0
    out = tmp_path / "out"
    desired = {path.name: path.read_bytes() for path in out.iterdir()}
    marked = write_map(out / "c0_s0.png", (32, 24)).read_bytes()
    (out / "c0_s1.png").write_bytes(desired["c0_s1.png"][:-30])
    (out / "c1_s0.png").unlink()
    (out / "contact_sheet.png").unlink()
    capsys.readouterr()
    assert main(words(flags | {"skip_existing": True})) == 0
    assert "wrote 2 pictures (2 were there already), contact_sheet.png" in capsys.readouterr().err
    assert (out / "c0_s0.png").read_bytes() == marked
    for name in ("c0_s1.png", "c1_s0.png", "c1_s1.png"):
        assert (out / name).read_bytes() == desired[name]
    sheet = Image.open(out / "contact_sheet.png")  # shows what is there, whoever painted it
    assert sheet.size == (3 * 256, 3 * 256)
    assert sheet.getpixel((256 + 128, 256 + 128)) == Image.open(out / "c0_s0.png").getpixel((16, 12))
    monkeypatch.setattr(Stylizer, "paint_picture", None)  # nothing more is painted
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(words(flags | {"skip_existing": True})) == 0
    assert "wrote 0 pictures (4 were there already), contact_sheet.png" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_picture_is_not_whole(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert read_written(path) is None
    save_picture(Image.open(write_noise(tmp_path / "n.png", (40, 50), 0)), path)
    assert read_written(path).size == (50, 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_written(path) is None


# ------------------------------------------------------------------------------------------ half precision


def test_amp_auto_decodes_in_float16_where_pictures_stay_what_they_are(tmp_path, monkeypatch, capsys):
    """As on a GPU; the encoder's features and all statistics stay in float32. In bfloat16 pictures change."""
    flags = {"mode": "test", "gpu_no": -1, "load_path": ROOT / "model-store" / "tiny.pth", "imsize": 96,
             "content": CONTENT_DIR / "dog.jpg", "style": STYLE_DIR / "great_wave.jpg"}
    for amp in ("off", "auto"):
        assert main(words(flags | {"amp": amp, "save_path": tmp_path / f"{amp}.png"})) == 0
    for dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(stylize, "half_dtype", lambda device, dtype=dtype: dtype)
        assert main(words(flags | {"amp": "auto", "save_path": tmp_path / f"{dtype}.png"})) == 0
    assert "--amp auto: tiny stays in float32: in bfloat16 a picture changes by " in capsys.readouterr().err
    off, auto, half, brain = (read_pixels(tmp_path / f"{name}.png")
                              for name in ("off", "auto", "torch.float16", "torch.bfloat16"))
    assert np.array_equal(off, auto) and np.array_equal(off, brain)
    assert 1 <= np.abs(off - half).max() <= 3



# ---------------------------------------------------------------------------------------------- processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_two(flags: dict, code: int) -> subprocess.CompletedProcess:
    result = subprocess.run([*TORCHRUN, str(ROOT / "main.py"), *words(flags)], capture_output=True, text=True,
                            timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (result.returncode == 0) == (code == 0), result.stderr
    return result


def test_processes_share_the_pairs_and_write_one_summary(flags, tmp_path):
    for number in range(3):
        write_noise(tmp_path / "contents" / f"d{number}.png", (24, 32), 20 + number)
    bad = tmp_path / "contents" / "z.jpg"  # in the second one's share
    bad.write_text("no picture")
    flags |= {"metrics": "ssim"}
    two = run_two(flags, 1)
    assert main(words(flags | {"save_path": tmp_path / "alone"})) == 1
    alone, shared = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("alone", "out"))
    assert alone.keys() == shared.keys() >= pairs_of("c0 c1 d0 d1 d2", "s0 s1") | {"contact_sheet.png", "metrics.json"}
    for name in alone.keys() - {"metrics.json"}:
        assert np.abs(read_pixels(alone[name]) - read_pixels(shared[name])).max() <= 1, name
    desired, actual = (json.loads(folder["metrics.json"].read_text()) for folder in (alone, shared))
    assert actual["skipped"] == desired["skipped"] and actual["pairs_left_out"] == desired["pairs_left_out"] == 2
    assert [pair["content"] for pair in actual["pairs"]] == [pair["content"] for pair in desired["pairs"]]
    for pair, other in zip(actual["pairs"], desired["pairs"]):
        assert pair["metrics"]["model"]["ssim"] == pytest.approx(other["metrics"]["model"]["ssim"], abs=1e-3)
    assert f"rank 1: skipped --content {bad}: " in two.stderr
    for text in ("wrote 10 pictures", "could not be used: 1 picture(s); left out: 2 pair(s)"):
        assert two.stderr.count(text) == 1, text
    assert two.stdout.count("SSIM") == 1


def test_the_error_of_any_process_ends_all_in_a_line(flags, tmp_path):
    """Of two pairs the second, which is the second process's, cannot be written."""
    (tmp_path / "out" / "c1_s0.png").mkdir(parents=True)
    result = run_two(flags | {"style": tmp_path / "styles" / "s0.png"}, 1)
    assert f"error: rank 1 of 2: {tmp_path / 'out' / 'c1_s0.png'}: the picture (32 x 24) cannot be" in result.stderr
    assert "RuntimeError" not in result.stderr

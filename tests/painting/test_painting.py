"""Test mode: where it may write, under which names, with which alpha, what it does when it cannot; many pairs."""

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
    random_picture,
    read_pixels,
    refusal,
    small_network,
    user_error,
    words,
    write_map,
    write_model,
    write_noise,
    write_picture,
)
from PIL import Image

import network
from data import OUTPUT_FORMATS
from evaluate import TestConfig
from folders import is_held_out
from main import main
from painting import many
from painting import stylizer as stylize
from painting.pairs import distinct, find_inputs, output_names
from painting.stylizer import Stylizer


@pytest.fixture
def flags(tmp_path) -> dict:
    """One content with one style by a narrow network, in a folder of their own."""
    return {"mode": "test", "gpu_no": -1, "load_path": write_model(tmp_path / "model.pth", small_network()),
            "content": write_noise(tmp_path / "photo.png", (24, 32), 1),
            "style": write_noise(tmp_path / "paint.png", (24, 32), 2), "save_path": tmp_path / "out.png"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(capsys, flags: dict, folder: Path) -> str:
    """The refusal, which must leave every file as it was."""
    def snapshot() -> dict:
        return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    before = snapshot()
    line = refusal(capsys, *words(flags))
    assert snapshot() == before
    return line


# ------------------------------------------------------------------------------------ save_path, and names


@pytest.mark.parametrize("name, kind", [
    *((name, "a folder") for name in ("out", "runs/v1.0", "out.2024", "out.png/", "my.photographs", "a.2x/b",
                                      "run.old")),
    *((f"out{suffix}", "a file") for suffix in (*OUTPUT_FORMATS, ".PNG", ".Jpg")),
    *((name, "refused") for name in ("out.pgn", "out.gif", "out.JPGE", "a.b.heic", "new/out.svg", "out.jpg2")),
])
def test_the_suffix_says_what_is_written(tmp_path, name, kind):
    """Folders have none, or end with a slash, or are there."""
    (tmp_path / "run.old").mkdir()
    config = TestConfig(save_path=f"{tmp_path}/{name}")
    if kind == "refused":
        message = user_error(config.check)
        assert message.startswith(f"save_path {tmp_path / name}")
        assert all(suffix in message for suffix in OUTPUT_FORMATS)
    else:
        config.check()
        assert config.writes_a_file == (kind == "a file")


@pytest.mark.parametrize("flag, output", [
    ("content", "photo.png"), ("style", "link.png"), ("content", "here/photo.png"), ("style", "../{}/paint.png")])
def test_output_that_is_an_input_is_refused(flags, tmp_path, capsys, monkeypatch, flag, output):
    """By a relative path, and through links to the picture and to its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to(flags["style"])
    (tmp_path / "here").symlink_to(tmp_path, target_is_directory=True)
    line = refused(capsys, flags | {"save_path": output.format(tmp_path.name)}, tmp_path)
    assert "would overwrite" in line and f"--{flag} {flags[flag]}" in line


def test_model_file_default_output_and_pictures_of_a_folder_are_not_overwritten(flags, tmp_path, capsys, monkeypatch):
    model = flags["load_path"].rename(tmp_path / "model.png")  # whatever it is called
    flags |= {"load_path": model}
    assert "--load_path" in refused(capsys, flags | {"save_path": model}, tmp_path)
    monkeypatch.chdir(tmp_path)
    del flags["save_path"]
    write_noise(tmp_path / "stylised.png", (16, 16), 3)
    assert "--content" in refused(capsys, flags | {"content": "stylised.png"}, tmp_path)
    work = tmp_path / "work"  # of pictures that are named as outputs will be
    style = write_noise(work / "photo_style.png", (16, 16), 3)
    style.with_name("photo_photo_style.png").symlink_to(style)
    contents = [flags["content"], write_noise(work / "photo_paint.png", (16, 16), 3)]
    for kind, given in (("style", style), ("content", contents)):
        assert f"--{kind}" in refused(capsys, flags | {kind: given, "save_path": work}, tmp_path)


@pytest.mark.parametrize("mode, kind, where", [
    ("test", "content", ""), ("test", "style", "deep/er/out"), ("test", "content", "link to it"),
    ("test", "style", "in what a link leads to"), ("train", "content", ""),
    ("train", "style", "in what a link leads to"), ("distill", "style", "deep/er/run"),
    ("prune", "content", "link to it"), ("prune", "style", "deep/er/run")])
def test_no_mode_writes_into_a_folder_that_it_searches(flags, tmp_path, capsys, mode, kind, where):
    folder, other = tmp_path / "pictures", tmp_path / "others"
    for number in range(2):
        write_noise(folder / f"{number}.png", (16, 16), number)
        write_noise(other / f"{number}.png", (16, 16), number)
    output = folder / where
    if where == "link to it":
        output = tmp_path / "link"
        output.symlink_to(folder, target_is_directory=True)
    if where == "in what a link leads to":
        write_noise(tmp_path / "elsewhere" / "old.png", (16, 16), 0)
        (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        output = tmp_path / "elsewhere" / "run"
    directories = {"content_dir": other, "style_dir": other} | {f"{kind}_dir": folder}
    given = {"mode": mode, "gpu_no": -1, "load_path": flags["load_path"], "save_path": output} | directories
    line = refused(capsys, given | ({"teacher": flags["load_path"]} if mode == "distill" else {}), tmp_path)
    assert line.startswith(f"error: --save_path {output}: belongs to --{kind}_dir {folder}, which is searched")


def test_output_folder_beside_or_around_the_pictures_is_fine(flags, tmp_path):
    write_noise(tmp_path / "work" / "photos" / "a.png", (16, 16), 0)
    for output in (tmp_path / "work", tmp_path / "work" / "photos2"):
        for _ in range(2):
            assert main(words(flags | {"content": tmp_path / "work" / "photos", "save_path": output})) == 0
            assert {path.name for path in output.glob("*.png")} == {"a_paint.png", "contact_sheet.png"}
    (tmp_path / "work" / "one.png").write_bytes(flags["content"].read_bytes())  # one picture is no searched folder
    assert main(words(flags | {"content": tmp_path / "work" / "one.png", "save_path": tmp_path / "work"})) == 0


@pytest.mark.parametrize("contents, styles", [
    (["a/b.png", "a-b.png"], ["s.png"]),
    (["a_b.png", "a.png"], ["c.png", "b_c.png"]),  # a_b + c, a + b_c
    (["A.png", "a.png", "a.jpg"], ["S.png", "s.png"]),
    (["contact.png", "b.png"], ["sheet.png"]),  # the name of the contact sheet
    (["a.png", "a-1.png", "A.png"], ["s.png"]),
    ([f"{'x' * 120}{number}.png" for number in range(2)], [f"{'y' * 120}{number}.png" for number in range(2)]),
])
def test_outputs_of_different_inputs_never_collide(tmp_path, contents, styles):
    for kind, names in (("content", contents), ("style", styles)):
        for name in names:
            write_picture(tmp_path / kind / name)
    inputs = [find_inputs([str(tmp_path / kind)], kind, 0.0) for kind in ("content", "style")]
    pairs = [(content, style) for content in range(len(contents)) for style in range(len(styles))]
    names = output_names(pairs, *inputs, ["_0.5", "_1"], ["contact_sheet"])
    given = [name for each in names.values() for name in each]
    assert len({name.casefold() for name in given} - {"contact_sheet"}) == len(given) == 2 * len(pairs)
    assert max(map(len, given)) < 200
    assert distinct(["a", "A", "a-1"], taken=["B"]) == ["a", "A-1", "a-1-1"]  # only where they must


# ------------------------------------------------------------------------------------------- what is in them


@pytest.mark.parametrize("several, value", [(False, 3e38), (True, -3e38)])
def test_a_picture_that_is_not_finite_is_never_written(flags, tmp_path, capsys, several, value):
    network = small_network()
    with torch.no_grad():
        network.decoder.layers[0][-1].weight.fill_(value)
    write_model(flags["load_path"], network)
    if several:
        write_noise(tmp_path / "photos" / "photo.png", (24, 32), 1)
        flags |= {"content": tmp_path / "photos", "save_path": tmp_path / "out", "metrics": "ssim"}
    line = refusal(capsys, *words(flags))
    assert "not finite" in line and f"--load_path {flags['load_path']}" in line
    assert not list(tmp_path.glob("out*/*")) and not (tmp_path / "out.png").exists()
    if not several:  # the grid of prune mode is a picture, too
        line = refusal(capsys, "--mode", "prune", "--gpu_no", -1, "--load_path", flags["load_path"], "--content_dir",
                       CONTENT_DIR, "--style_dir", STYLE_DIR, "--imsize", 16, "--cropsize", 16, "--report_size", 16,
                       "--latency_runs", 1, "--prune_nums", 0, "--save_path", tmp_path / "out")
        assert "not finite" in line and not {"prune_grid.png", "pruned.pth"} & names_in(tmp_path / "out")


def cut_out(path: Path, size: tuple[int, int]) -> Path:
    """Transparent on its left half, half transparent in the last row; size is (width, height)."""
    picture = Image.fromarray(random_picture(1, size[::-1])[0].permute(1, 2, 0).numpy()).convert("RGBA")
    alpha = np.full(size[::-1], 255, np.uint8)
    alpha[:, : size[0] // 2] = 0
    alpha[-1] = 128
    picture.putalpha(Image.fromarray(alpha))
    path.parent.mkdir(exist_ok=True)
    picture.save(path, lossless=True)
    return path


@pytest.mark.parametrize("source, name, mode", [
    ("cut.png", "o.png", "RGBA"), ("cut.webp", "o.webp", "RGBA"), ("cut.png", "o.tif", "RGBA"),
    ("cut.webp", "o.jpg", "RGB"), ("cut.png", "o.bmp", "RGB")])
def test_alpha_of_the_content_is_put_back(flags, tmp_path, name, mode, source):
    content = cut_out(tmp_path / source, (32, 24))
    assert main(words(flags | {"content": content, "save_path": tmp_path / name})) == 0
    with Image.open(tmp_path / name) as picture:
        assert picture.mode == mode and picture.size == (32, 24)
        if mode == "RGBA":
            assert np.array_equal(np.asarray(picture.getchannel("A")), np.asarray(Image.open(content).getchannel("A")))


def test_alpha_goes_with_the_geometry_and_into_folders(flags, tmp_path):
    """That of the style changes nothing."""
    cut_out(tmp_path / "photos" / "cut.png", (64, 32))
    write_noise(tmp_path / "photos" / "plain.png", (24, 32), 1)
    style = cut_out(tmp_path / "paint.png", (32, 24))
    assert main(words(flags | {"content": tmp_path / "photos", "style": style, "imsize": 16, "cropsize": 16,
                               "save_path": tmp_path / "out"})) == 0
    with Image.open(tmp_path / "out" / "cut_paint.png") as picture:
        alpha = np.asarray(picture.getchannel("A"))
        assert picture.size == (16, 16) and (alpha[:14, :6] == 0).all() and (alpha[:14, 10:] == 255).all()
    assert Image.open(tmp_path / "out" / "plain_paint.png").mode == "RGB"


def test_amp_auto_decodes_in_float16_where_pictures_stay_what_they_are(tmp_path, monkeypatch, capsys):
    """As on a GPU; the encoder's features and all statistics stay in float32. In bfloat16 pictures change."""
    pairs = {"mode": "test", "gpu_no": -1, "load_path": ROOT / "model-store" / "tiny.pth", "imsize": 96,
             "content": CONTENT_DIR / "dog.jpg", "style": STYLE_DIR / "great_wave.jpg"}
    for amp in ("off", "auto"):
        assert main(words(pairs | {"amp": amp, "save_path": tmp_path / f"{amp}.png"})) == 0
    for dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(stylize, "half_dtype", lambda device, dtype=dtype: dtype)
        monkeypatch.setattr(stylize, "MOST_CHANGE", 3 if dtype is torch.float16 else 0)  # whatever the model
        assert main(words(pairs | {"amp": "auto", "save_path": tmp_path / f"{dtype}.png"})) == 0
    assert "--amp auto: tiny stays in float32: in bfloat16 a picture changes by " in capsys.readouterr().err
    off, auto, half, brain = (read_pixels(tmp_path / f"{name}.png")
                              for name in ("off", "auto", "torch.float16", "torch.bfloat16"))
    assert np.array_equal(off, auto) and np.array_equal(off, brain)
    assert 1 <= np.abs(off - half).max() <= 3


def test_model_that_overflows_float16_stays_in_float32(monkeypatch, capsys):
    network = picture_network()
    first, second = [layer for layer in network.decoder.layers[0] if isinstance(layer, torch.nn.Conv2d)][:2]
    with torch.no_grad():
        first.weight *= 1e6
        first.bias *= 1e6
        second.weight /= 1e6
    stylizer = Stylizer(network, device="cpu")
    in_float32 = stylizer.network.decoder.forward
    monkeypatch.setattr(stylize, "half_dtype", lambda device: torch.float16)
    stylize.decode_in_half(stylizer, "steep")
    assert "--amp auto: steep stays in float32: in float16 a picture changes by 255" in capsys.readouterr().err
    assert stylizer.network.decoder.forward == in_float32


# ----------------------------------------------------- bad files in folders, full disks, too little memory


@pytest.mark.parametrize("kind, content", [("content", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("style", b""),
                                           ("content", b"no picture")], ids=["cut", "empty", "text"])
def test_a_bad_file_of_a_folder_is_skipped_and_named_again_at_the_end(flags, tmp_path, capsys, kind, content):
    for number in range(3):
        write_noise(tmp_path / "many" / f"p{number}.png", (24, 32), number)
    bad = tmp_path / "many" / "p1.jpg"
    bad.write_bytes(content)
    flags |= {kind: tmp_path / "many", "save_path": tmp_path / "out"}
    assert main(words(flags)) == 1
    names = {f"{name}_paint.png" if kind == "content" else f"photo_{name}.png" for name in ("p0", "p1-1", "p2")}
    assert names_in(tmp_path / "out") == names | {"contact_sheet.png"}
    size = Image.open(tmp_path / "out" / "contact_sheet.png").size  # no empty row or column
    assert size == ((512, 1024) if kind == "content" else (1024, 512))
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"skipped --{kind} {bad}: ") for line in lines)
    assert lines[-2] == "could not be used: 1 picture(s); left out: 1 pair(s)"
    assert lines[-1].startswith(f"  --{kind} {bad}: ")
    assert str(bad) in refusal(capsys, *words(flags | {kind: bad, "save_path": tmp_path / "single"}))
    assert not (tmp_path / "single").exists()


@pytest.mark.parametrize("drawn", [None, 4])
def test_metrics_leave_the_pairs_of_a_skipped_picture_out_and_count_them(flags, tmp_path, drawn):
    for kind, count in (("content", 4), ("style", 2)):
        for number in range(count):
            write_noise(tmp_path / kind / f"{kind[0]}{number}.png", (24, 32), number)
    (tmp_path / "content" / "c1.png").write_bytes(b"no picture")
    write_picture(tmp_path / "content" / "c3.png", (20, 20))  # too small for --metrics
    flags |= {"content": tmp_path / "content", "style": tmp_path / "style", "save_path": tmp_path / "out",
              "metrics": "ssim"} | ({"pairs": drawn} if drawn else {})
    assert main(words(flags)) == 1
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pairs = [(Path(pair["content"]).stem, Path(pair["style"]).stem) for pair in report["pairs"]]
    assert {content for content, _ in pairs} == {"c0", "c2"} and len(pairs) == (2 if drawn else 4)
    assert report["pairs_left_out"] == (2 if drawn else 4) and len(report["skipped"]) == 2
    assert "c1.png" in report["skipped"][0] and "20 x 20" in report["skipped"][1]
    for content, style in pairs:
        assert (tmp_path / "out" / f"{content}_{style}.png").exists()


def test_metrics_that_cannot_be_written_are_one_line_and_shown_all_the_same(flags, tmp_path, capsys):
    (tmp_path / "out" / "metrics.json").mkdir(parents=True)
    code = main(words(flags | {"metrics": "ssim", "save_path": tmp_path / "out"}))
    captured = capsys.readouterr()
    assert code == 2 and "SSIM" in captured.out
    assert f"error: {tmp_path / 'out' / 'metrics.json'}: cannot be" in captured.err


@pytest.mark.parametrize("kind, module, name, error", [
    ("content", many, "load_alpha", MemoryError()),
    ("content", Stylizer, "paint_picture", torch.OutOfMemoryError("CUDA out of memory")),
    ("style", Stylizer, "encode_style", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
])
def test_too_little_memory_for_one_of_many_skips_it(flags, tmp_path, capsys, monkeypatch, kind, module, name, error):
    """Its line names the picture, its size, and what helps; alone it ends the run."""
    folder = tmp_path / "many"
    for each, side in (("a", 16), ("big", 64), ("c", 16)):
        write_noise(folder / f"{each}.png", (side, side), 0)
    original = getattr(module, name)

    def fail_for_large(*arguments, **settings):
        for each in arguments:
            if str(each).endswith("big.png") or getattr(getattr(each, "pixels", each), "shape", (0,))[-1] == 64:
                raise error
        return original(*arguments, **settings)

    monkeypatch.setattr(module, name, fail_for_large)
    assert main(words(flags | {kind: folder, "save_path": tmp_path / "out"})) == 1
    pictures = {f"{each}_paint.png" if kind == "content" else f"photo_{each}.png" for each in "ac"}
    assert names_in(tmp_path / "out") == pictures | {"contact_sheet.png"}
    said = f"--{kind} {folder / 'big.png'}: 64 x 64 pixels are too much for the memory; a smaller imsize or cropsize"
    assert said in capsys.readouterr().err
    assert said in refusal(capsys, *words(flags | {kind: folder / "big.png"}))


# --------------------------------------------------------------------------------------------- many pairs


@pytest.fixture
def pairs(tmp_path) -> dict:
    """Two contents and two styles in folders, painted by a narrow network whose pictures are not black and white."""
    network = picture_network()
    for kind in ("content", "style"):
        for number in range(2):
            write_noise(tmp_path / f"{kind}s" / f"{kind[0]}{number}.png", (24, 32), 2 * number + (kind == "style"))
    return {"mode": "test", "gpu_no": -1, "load_path": write_model(tmp_path / "model.pth", network),
            "content": tmp_path / "contents", "style": tmp_path / "styles", "save_path": tmp_path / "out"}


def test_several_paths_are_a_list_each_with_each(pairs, tmp_path):
    """Files and folders mixed; a picture that is named twice counts once, and is painted as alone, in its size."""
    single = write_noise(tmp_path / "more" / "photo.PNG", (17, 50), 9)
    write_noise(tmp_path / "contents" / "deep" / "b.webp", (40, 33), 8)
    pairs |= {"content": [single, tmp_path / "contents", tmp_path / "contents" / "c1.png"],
              "style": [tmp_path / "styles" / "s1.png", tmp_path / "styles" / "s0.png"]}
    assert main(words(pairs)) == 0
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert sizes.pop("contact_sheet.png") == (3 * 256, 5 * 256)
    assert sizes == {f"{name}_s{style}.png": size for style in range(2) for name, size in (
        ("photo", (50, 17)), ("c0", (32, 24)), ("c1", (32, 24)), ("deep-b", (33, 40)))}
    pairs |= {"content": single, "style": tmp_path / "styles" / "s1.png", "save_path": tmp_path / "one.png"}
    assert main(words(pairs)) == 0
    assert np.array_equal(read_pixels(tmp_path / "one.png"), read_pixels(tmp_path / "out" / "photo_s1.png"))


def test_a_list_of_strengths_equals_single_calls(pairs, tmp_path, capsys):
    """The metrics have a row for each."""
    pairs |= {"metrics": "ssim"}
    strengths, out, pictures = ["0", "0.25", "1"], tmp_path / "out", []
    assert main(words(pairs | {"style_strength": strengths})) == 0
    assert names_in(out) == {f"c{content}_s{style}_{strength}.png" for content in range(2) for style in range(2)
                             for strength in strengths} | {"comparison.png", "contact_sheet.png", "metrics.json"}
    shown = [row.split("  ")[0] for row in capsys.readouterr().out.splitlines()[1:6]]
    assert shown == [*(f"model at {each}" for each in strengths),
                     *(f"model at {each} - model at 0" for each in strengths[1:])]
    several = json.loads((out / "metrics.json").read_text())
    assert several["settings"]["style_strength"] == [0.0, 0.25, 1.0]
    for strength, row in zip(strengths, several["models"], strict=True):
        assert main(words(pairs | {"style_strength": strength, "save_path": tmp_path / "one"})) == 0
        single = json.loads((tmp_path / "one" / "metrics.json").read_text())
        assert single["settings"]["style_strength"] == float(strength) == row["style_strength"]
        assert single["models"][0]["metrics"] == row["metrics"]
        pictures.append(read_pixels(tmp_path / "one" / "c0_s0.png"))
        assert np.array_equal(pictures[-1], read_pixels(out / f"c0_s0_{strength}.png"))
    assert all(np.abs(first - second).max() > 1 for first, second in zip(pictures, pictures[1:]))
    assert np.array_equal(pictures[0], read_pixels(out / "c0_s1_0.png"))  # whatever the style
    sheet = Image.open(out / "comparison.png")
    assert sheet.size == (5 * 256, 32 + 4 * 256)  # content, style, and the strengths in order
    middles = [sheet.getpixel((column * 256 + 128, 32 + 128)) for column in range(2, 5)]
    assert middles == [tuple(picture[12, 16]) for picture in pictures]


# ----------------------------------------------------------------------------------------- once, and at once


@pytest.mark.parametrize("metrics", [None, ("content", "style")])
def test_each_picture_is_decoded_and_encoded_once(pairs, tmp_path, monkeypatch, metrics):
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
    assert main(words(pairs | given)) == 1
    assert decoded == {"c0.png": 1, "c1.png": 1, "s0.png": 1, "s1.png": 1, "z.jpg": 1}
    assert sorted(encoded.values()) == [1] * 4
    assert sorted(measured.values()) == ([1] * (4 + 4) if metrics else [])  # inputs and outputs


def test_styles_that_each_content_colours_are_decoded_again_where_they_would_take_much_memory(
    pairs, tmp_path, monkeypatch
):
    """The pictures are the same, and those of one content alone."""
    decoded, prepare = Counter(), stylize.prepare_picture

    def count_decoding(path, *more):
        decoded[path.name] += 1
        return prepare(path, *more)

    def paint(name: str, **more) -> dict[str, bytes]:
        decoded.clear()
        assert main(words(pairs | {"preserve_color": "histogram", "save_path": tmp_path / name} | more)) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("c[01]_*.png")}

    monkeypatch.setattr(stylize, "prepare_picture", count_decoding)
    kept = paint("kept")
    assert len(kept) == 4 and decoded == {"c0.png": 1, "c1.png": 1, "s0.png": 1, "s1.png": 1}
    assert kept.items() >= paint("alone", content=tmp_path / "contents" / "c1.png").items()
    monkeypatch.setattr(many, "KEPT_STYLES", 24 * 32 * 3)  # one of them
    assert paint("again") == kept and decoded == {"c0.png": 1, "c1.png": 1, "s0.png": 1, "s1.png": 3}
    assert paint("again", skip_existing=True) == kept and max(decoded.values()) == 1  # nothing is to be painted


def test_reading_painting_and_writing_overlap(pairs, tmp_path, monkeypatch):
    """The first picture is written, and the third content is read, while the second is painted."""
    write_noise(tmp_path / "contents" / "c2.png", (24, 32), 7)
    monkeypatch.setattr(many, "usable_cores", lambda: 2)
    together = threading.Barrier(3, timeout=300)

    def meet_at(number, function):
        calls = []

        def call(*arguments, **settings):
            calls.append(None)
            if len(calls) == number:
                together.wait()
            return function(*arguments, **settings)
        return call

    monkeypatch.setattr(many, "save_picture", meet_at(1, many.save_picture))
    monkeypatch.setattr(many, "load_input", meet_at(4, many.load_input))  # the first is the style
    monkeypatch.setattr(Stylizer, "paint_picture", meet_at(2, Stylizer.paint_picture))
    assert main(words(pairs | {"style": tmp_path / "styles" / "s0.png"})) == 0


def test_contents_are_not_held_in_memory(pairs, tmp_path, monkeypatch):
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
    assert main(words(pairs)) == 0
    assert not alive and 2 <= max(most) <= 6


def test_what_is_there_and_whole_is_not_painted_again(pairs, tmp_path, capsys, monkeypatch):
    assert main(words(pairs)) == 0
    out = tmp_path / "out"
    desired = {path.name: path.read_bytes() for path in out.iterdir()}
    marked = write_map(out / "c0_s0.png", (32, 24)).read_bytes()
    (out / "c0_s1.png").write_bytes(desired["c0_s1.png"][:-30])
    (out / "c1_s0.png").unlink()
    (out / "contact_sheet.png").unlink()
    capsys.readouterr()
    pairs |= {"content_dir": pairs.pop("content"), "style_dir": pairs.pop("style")}  # which mean the same
    assert main(words(pairs | {"skip_existing": True})) == 0
    assert "wrote 2 pictures (2 were there already), contact_sheet.png" in capsys.readouterr().err
    assert (out / "c0_s0.png").read_bytes() == marked
    for name in ("c0_s1.png", "c1_s0.png", "c1_s1.png"):
        assert (out / name).read_bytes() == desired[name]
    sheet = Image.open(out / "contact_sheet.png")  # shows what is there, whoever painted it
    assert sheet.size == (3 * 256, 3 * 256)
    assert sheet.getpixel((256 + 128, 256 + 128)) == Image.open(out / "c0_s0.png").getpixel((16, 12))
    monkeypatch.setattr(Stylizer, "paint_picture", None)  # nothing more is painted
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(words(pairs | {"skip_existing": True})) == 0
    assert "wrote 0 pictures (4 were there already), contact_sheet.png" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_is_written_is_said_of_it_alone(pairs, tmp_path, capsys):
    """The one picture of several that was not there by its own name; one pair, named twice, is one picture."""
    assert main(words(pairs)) == 0
    (tmp_path / "out" / "c1_s0.png").unlink()
    capsys.readouterr()
    assert main(words(pairs | {"skip_existing": True})) == 0
    assert "wrote c1_s0.png (3 were there already), contact_sheet.png" in capsys.readouterr().err
    named = {kind: [tmp_path / f"{kind}s" / f"{kind[0]}0.png"] * 2 for kind in ("content", "style")}
    assert main(words(pairs | named | {"save_path": tmp_path / "one.png"})) == 0
    assert "wrote one.png to" in capsys.readouterr().err


def test_a_folder_of_held_out_pictures_alone_is_measured(pairs, tmp_path, capsys):
    assert all(is_held_out(path, 0.9) for path in (tmp_path / "contents").iterdir())
    assert main(words(pairs | {"style": tmp_path / "styles" / "s0.png", "holdout": 0.9})) == 0


# ---------------------------------------------------------------------------------------------- processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_two(pairs: dict, code: int) -> subprocess.CompletedProcess:
    result = subprocess.run([*TORCHRUN, str(ROOT / "main.py"), *words(pairs)], capture_output=True, text=True,
                            timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (result.returncode == 0) == (code == 0), result.stderr
    return result


def test_processes_share_the_pairs_and_write_one_summary(pairs, tmp_path):
    for number in range(3):
        write_noise(tmp_path / "contents" / f"d{number}.png", (24, 32), 20 + number)
    bad = tmp_path / "contents" / "z.jpg"  # in the second one's share
    bad.write_text("no picture")
    pairs |= {"metrics": "ssim"}
    two = run_two(pairs, 1)
    assert main(words(pairs | {"save_path": tmp_path / "alone"})) == 1
    alone, shared = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("alone", "out"))
    painted = {f"{content}_s{style}.png" for content in ("c0", "c1", "d0", "d1", "d2") for style in range(2)}
    assert alone.keys() == shared.keys() >= painted | {"contact_sheet.png", "metrics.json"}
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


def test_the_error_of_any_process_ends_all_in_a_line(pairs, tmp_path):
    """Of two pairs the second, which is the second process's, cannot be written."""
    (tmp_path / "out" / "c1_s0.png").mkdir(parents=True)
    result = run_two(pairs | {"style": tmp_path / "styles" / "s0.png"}, 1)
    assert f"error: rank 1 of 2: {tmp_path / 'out' / 'c1_s0.png'}: the picture (32 x 24) cannot be" in result.stderr
    assert "RuntimeError" not in result.stderr

"""What test mode writes: where it may, under which names, with which alpha, and what it does when it cannot."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CONTENT_DIR,
    STYLE_DIR,
    random_picture,
    read_pixels,
    refusal,
    small_network,
    user_error,
    words,
    write_model,
    write_noise,
    write_picture,
)
from PIL import Image

from data import OUTPUT_FORMATS, save_picture
from evaluate import TestConfig
from main import main
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


# --------------------------------------------------------------------------------------------- save_path


@pytest.mark.parametrize("name", ["out.pgn", "out.gif", "out.JPGE", "a.b.heic", "new/out.svg", "out.jpg2"])
def test_suffixes_that_are_not_written_are_refused(tmp_path, name):
    message = user_error(TestConfig(save_path=str(tmp_path / name)).check)
    assert message.startswith(f"save_path {tmp_path / name}") and all(suffix in message for suffix in OUTPUT_FORMATS)


@pytest.mark.parametrize("name, is_file", [
    *((name, False) for name in ("out", "runs/v1.0", "out.2024", "out.png/", "my.photographs", "a.2x/b", "run.old")),
    *((f"out{suffix}", True) for suffix in (*OUTPUT_FORMATS, ".PNG", ".Jpg")),
])
def test_folders_are_named_by_no_suffix_or_by_a_slash_or_are_there(tmp_path, name, is_file):
    (tmp_path / "run.old").mkdir()
    config = TestConfig(save_path=f"{tmp_path}/{name}")
    config.check()
    assert config.writes_a_file == is_file


def test_a_folder_named_as_a_picture_is_written_to(flags, tmp_path):
    (tmp_path / "out.png").mkdir()
    for name in ("out.png", "new.png/"):
        assert main(words(flags | {"save_path": f"{tmp_path}/{name}"})) == 0
        assert os.listdir(tmp_path / name) == ["photo_paint.png"]


@pytest.mark.parametrize("flag, output", [
    ("content", "photo.png"), ("style", "link.png"), ("content", "here/photo.png"), ("style", "../{}/paint.png")])
def test_output_that_is_an_input_is_refused(flags, tmp_path, capsys, monkeypatch, flag, output):
    """By a relative path, and through links to the picture and to its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to(flags["style"])
    (tmp_path / "here").symlink_to(tmp_path, target_is_directory=True)
    line = refusal(capsys, *words(flags | {"save_path": output.format(tmp_path.name)}))
    assert "would overwrite" in line and f"--{flag} {flags[flag]}" in line
    assert np.array_equal(read_pixels(flags[flag]), random_picture({"content": 1, "style": 2}[flag], (24, 32))[0]
                          .permute(1, 2, 0).numpy())


def test_model_file_default_output_and_pictures_of_a_folder_are_not_overwritten(flags, tmp_path, capsys, monkeypatch):
    model = flags["load_path"].rename(tmp_path / "model.png")  # whatever it is called
    flags |= {"load_path": model}
    assert "--load_path" in refused(capsys, flags | {"save_path": model}, tmp_path)
    monkeypatch.chdir(tmp_path)
    del flags["save_path"]
    write_noise(tmp_path / "stylised.png", (16, 16), 3)
    assert "--content" in refused(capsys, flags | {"content": "stylised.png"}, tmp_path)
    style = write_noise(tmp_path / "work" / "photo_style.png", (16, 16), 3)  # named as the output will be
    style.with_name("photo_photo_style.png").symlink_to(style)
    assert "--style" in refused(capsys, flags | {"style": style, "save_path": tmp_path / "work"}, tmp_path)


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


# ------------------------------------------------------------------------------------------------- names


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


def test_distinct_names_change_only_where_they_must():
    assert distinct(["a", "b"]) == ["a", "b"]
    assert distinct(["a", "A", "a-1"], taken=["B"]) == ["a", "A-1", "a-1-1"]
    assert distinct(["a", "b"], taken=["B"]) == ["a", "b-1"]


def test_content_dir_and_style_dir_mean_content_and_style(flags, tmp_path):
    for kind in ("photos", "paintings"):
        for number in range(2):
            write_noise(tmp_path / kind / f"{kind[1]}{number}.png", (16, 24), number)
    flags |= {"content_dir": tmp_path / "photos", "style_dir": tmp_path / "paintings", "save_path": tmp_path / "out"}
    del flags["content"], flags["style"]
    assert main(words(flags)) == 0
    assert names_in(tmp_path / "out") == {
        "contact_sheet.png", *(f"h{content}_a{style}.png" for content in range(2) for style in range(2))}


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


def test_strength_zero_is_the_decoders_copy_of_the_content(flags, tmp_path):
    pictures = []
    for style in (flags["style"], flags["content"]):
        assert main(words(flags | {"style": style, "style_strength": 0})) == 0
        pictures.append(read_pixels(flags["save_path"]))
    assert np.array_equal(*pictures)  # whatever the style
    assert np.abs(pictures[0] - read_pixels(flags["content"])).mean() > 5  # a copy through the network


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


# ------------------------------------------------------------------------------------ bad files in folders


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


# ----------------------------------------------------------------------------- full disks, and too little memory


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch, name):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full_disk)
    message = user_error(save_picture, Image.new("RGB", (12, 8)), tmp_path / name)
    assert message == f"{tmp_path / name}: the picture (12 x 8) cannot be written (No space left on device)"
    assert os.listdir(tmp_path) == []


def test_a_file_that_the_disk_does_not_take_is_one_line(flags, tmp_path, capsys):
    """A true failing write: this process may write files of 40 bytes for a moment."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, most[1]))
    try:
        code = main(words(flags))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    line = f"error: {flags['save_path']}: the picture (32 x 24) cannot be written (File too large)"
    assert code == 2 and capsys.readouterr().err.splitlines()[-1] == line
    assert not list(tmp_path.glob("*out*"))


def test_metrics_that_cannot_be_written_are_one_line_and_shown_all_the_same(flags, tmp_path, capsys):
    (tmp_path / "out" / "metrics.json").mkdir(parents=True)
    code = main(words(flags | {"metrics": "ssim", "save_path": tmp_path / "out"}))
    captured = capsys.readouterr()
    assert code == 2 and "SSIM" in captured.out
    assert f"error: {tmp_path / 'out' / 'metrics.json'}: cannot be" in captured.err


@pytest.mark.parametrize("module, name, kind, error", [
    (stylize, "prepare_picture", "style", MemoryError()),  # styles are read first
    (Stylizer, "paint_picture", "content", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
    (Stylizer, "paint_picture", "content", torch.OutOfMemoryError("CUDA out of memory")),
], ids=["numpy", "torch", "GPU"])
def test_too_little_memory_names_the_picture_its_size_and_what_helps(flags, capsys, monkeypatch, module, name, kind,
                                                                     error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, name, fail)
    line = refusal(capsys, *words(flags))
    assert f"--{kind} {flags[kind]}: 32 x 24 pixels" in line and "imsize" in line and "cropsize" in line


@pytest.mark.parametrize("kind, method", [("content", "paint_picture"), ("style", "encode_style")])
def test_too_little_memory_for_one_of_a_folder_skips_it(flags, tmp_path, capsys, monkeypatch, kind, method):
    for name, size in (("a", (16, 16)), ("big", (64, 64)), ("c", (16, 16))):
        write_noise(tmp_path / "many" / f"{name}.png", size, 0)
    original = getattr(Stylizer, method)

    def fail_for_large(self, picture, *more, **settings):
        if getattr(picture, "pixels", picture).shape[2] > 32:
            raise MemoryError
        return original(self, picture, *more, **settings)

    monkeypatch.setattr(Stylizer, method, fail_for_large)
    assert main(words(flags | {kind: tmp_path / "many", "save_path": tmp_path / "out"})) == 1
    pictures = {f"{name}_paint.png" if kind == "content" else f"photo_{name}.png" for name in "ac"}
    assert names_in(tmp_path / "out") == pictures | {"contact_sheet.png"}
    assert "big.png: 64 x 64 pixels are too much" in capsys.readouterr().err

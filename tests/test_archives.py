"""Pictures in .zip archives: the same as in a folder, whatever the archive, the process and the mode."""

import io
import json
import multiprocessing
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_metrics, refused, small_network, user_error, words, write_model, write_noise
from PIL import Image

import archives
from data import load_picture
from folders import find_pictures, is_searched, open_folder
from main import main
from train import train
from training.sampling import PictureCache
from weights import BUNDLED_VGG19, load_network

MANY = 10**8


@pytest.fixture
def photos(tmp_path) -> Path:
    """Pictures of several kinds, some in sub-folders, one without a suffix, and a file that is none."""
    folder = tmp_path / "photos"
    for number in range(6):
        write_noise(folder / ("", "deep/er", "x.zip")[number % 3] / f"{number}.{('png', 'bmp')[number % 2]}",
                    (24, 30), number)
    shutil.copy(write_noise(folder / "extra.png", (24, 30), 99), folder / "no_suffix")
    (folder / "notes.txt").write_text("of the photographs")
    return folder


def pack(folder: Path, archive: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """Everything below `folder`, folders too; names begin there."""
    with zipfile.ZipFile(archive, "w", method) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return archive


def picture_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_archive(path: Path, **contents: bytes) -> Path:
    """Stored members; NAME.png by keyword NAME."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            file.writestr(f"{name}.png", content)
    return path


def below(paths: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in paths]


# ------------------------------------------------------------------------------------ like the same folder


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_holds_what_its_folder_holds(photos, tmp_path, method, capsys):
    """Also a large TIFF, whose directory of tags is at its end."""
    write_noise(photos / "large.tif", (300, 200), 5)
    archive = pack(photos, tmp_path / "PHOTOS.Zip", method)
    paths, desired = find_pictures(archive, "--content_dir"), find_pictures(photos, "--content_dir")
    assert below(paths, archive) == below(desired, photos) and len(paths) == 9
    for path, unpacked in zip(paths, desired):
        assert load_picture(path).tobytes() == load_picture(unpacked).tobytes()
    assert f"--content_dir {archive}: left out: other files: 1 (notes.txt)" in capsys.readouterr().err


def test_test_mode_paints_and_names_the_same(photos, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model.pth", small_network())
    pack(photos, tmp_path / "photos.zip")
    monkeypatch.chdir(tmp_path)
    flags = {"mode": "test", "gpu_no": -1, "load_path": model, "metrics": "ssim", "pairs": 5, "holdout": 0.7}
    for source, name in (("photos", "a"), ("photos.zip", "b")):
        assert main(words(flags | {"content": source, "style": f"{source}/x.zip/2.png", "save_path": name})) == 0
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in "ab")
    assert first == second and len(first) == 6
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text())["pairs"] for name in "ab")
    assert [pair["content"].replace("photos/", "photos.zip/", 1) for pair in first] == [
        pair["content"] for pair in second]
    assert [pair["metrics"] for pair in first] == [pair["metrics"] for pair in second]


def test_a_folder_may_be_called_as_an_archive(photos, tmp_path):
    folder = photos.rename(tmp_path / "photos.zip")
    assert is_searched(folder) and "x.zip/2.png" in below(find_pictures(folder, ""), folder)
    for around in (folder, pack(folder, tmp_path / "inner.zip")):
        load_picture(around / "x.zip" / "2.png")
    assert "no such file" in refused(tmp_path / "inner.zip" / "x.zip" / "3.png")


# ---------------------------------------------------------------------------------------------- the modes


def test_training_goes_on_from_another_folder_as_it_would_unpacked(small, tmp_path, monkeypatch):
    """From photographs in an archive, paintings in a folder, a file of VGG weights, through a cache."""
    pack(Path(small["content_dir"]), tmp_path / "content.zip", zipfile.ZIP_DEFLATED)
    shutil.copytree(small["style_dir"], tmp_path / "style")
    shutil.copy(BUNDLED_VGG19, tmp_path / "vgg.pth")
    sources = {"content_dir": "content.zip", "style_dir": "style", "vgg_weights": "vgg.pth", "cache_dir": "cache"}
    whole, halves, more = tmp_path / "whole", tmp_path / "halves", {"max_iter": 3, "holdout": 0.2}
    train(small | more | {"vgg_weights": "bundled", "save_path": str(whole)})
    monkeypatch.chdir(tmp_path)
    train(small | more | sources | {"max_iter": 1, "save_path": "halves"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = {"resume": True, "save_path": "../halves", "content_dir": "../content.zip"}
    assert train(again | {"max_iter": 3, "num_workers": 1}) == 0 and list((tmp_path / "cache").glob("??/*.npy"))
    for actual, desired in zip(load_network(halves)[0].parameters(), load_network(whole)[0].parameters()):
        assert torch.equal(actual, desired)
    assert read_metrics(halves) == read_metrics(whole)
    stored = torch.load(halves / "check_point.pth", weights_only=True)["train_config"]
    assert stored["content_dir"] == str(tmp_path / "content.zip")


def test_pruning_reads_archives(photos, tmp_path):
    """Kept responses name the members, which are read again."""
    archive = pack(photos, tmp_path / "photos.zip")
    flags = {"mode": "prune", "gpu_no": -1, "load_path": write_model(tmp_path / "model.pth", small_network()),
             "content_dir": archive, "style_dir": photos, "imsize": 32, "cropsize": 32, "prune_num": 1, "prune_nums": 0,
             "latency_runs": 1, "report_size": 32}
    assert main(words(flags | {"save_path": tmp_path / "cut"})) == 0
    kept = {"responses": tmp_path / "cut" / "responses.npz", "save_path": tmp_path / "again"}
    assert main(words(flags | kept)) == 0
    report, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("cut", "again"))
    assert report["content_pictures"] == report["style_pictures"] == 6 and report["compared_pairs"] == 4
    assert all(content.startswith(str(archive)) for content, _ in report["pairs_set_aside"])
    assert again["changes"] == report["changes"] and again["max_pixel_difference"] is not None


# ------------------------------------------------------------------------------------ processes and threads


def test_threads_and_processes_read_at_once(photos, tmp_path):
    """A process opens an archive once for all its threads; one that was forked does so anew."""
    archive = pack(photos, tmp_path / "photos.zip", zipfile.ZIP_DEFLATED)
    paths = find_pictures(archive, "")
    desired = [load_picture(photos / path.relative_to(archive)).tobytes() for path in paths]

    def is_same(_turn: int) -> bool:
        return [load_picture(path).tobytes() for path in paths] == desired

    children = [multiprocessing.get_context("fork").Process(target=lambda: os._exit(not all(map(is_same, range(20)))))
                for _ in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_same, range(40)))
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert archives.members(archive) is archives.members(archive)


# ------------------------------------------------------------------------------------------------- names


def test_what_is_hidden_or_added_by_macos_or_a_link_is_left_out(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for name in ("a.png", "café.png", "/b.png", "./c.png", "in//d.png", ".hidden.png", ".git/e.png", "in/.f/g.png",
                     "../h.png", "__MACOSX/._a.png", "in/__MACOSX/i.png", "j.png/"):
            file.writestr(name, picture_bytes())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "a.png")
    paths = find_pictures(tmp_path / "photos.zip", "--content_dir")
    assert below(paths, tmp_path / "photos.zip") == ["a.png", "b.png", "c.png", "café.png", "in/d.png"]
    assert all(load_picture(path).size == (20, 16) for path in paths)
    assert "left out: hidden or of other programs: 6 (" in capsys.readouterr().err


@pytest.mark.parametrize("raw, desired", [
    ("Bär/été.png".encode(), "Bär/été.png"), ("写真/表.png".encode(), "写真/表.png"),  # UTF-8 that does not say so
    ("Bär/été.png".encode("cp437"), "Bär/été.png"), ("Bär\\été.png".encode("cp437"), "Bär/été.png"),
    ("写真/表.png".encode("cp932"), "写真/表.png"), ("写真\\表.png".encode("cp932"), "写真/表.png"),
    ("фото.png".encode("cp1251"), "⌠ε≥ε.png"),  # told from cp437 by nobody
])
def test_names_in_other_encodings(tmp_path, raw, desired):
    archive = write_archive(tmp_path / "photos.zip", **{"x" * (len(raw) - 4): picture_bytes()})
    archive.write_bytes(archive.read_bytes().replace(b"x" * (len(raw) - 4) + b".png", raw))
    (path,) = find_pictures(archive, "")
    assert str(path.relative_to(archive)) == desired and load_picture(path).size == (20, 16)


def test_name_that_zipfile_took_from_a_field_of_its_own(tmp_path):
    """Info-ZIP's Unicode path, by newer versions of Python: the entry's own bytes differ, no flag is set."""
    entry = zipfile.ZipInfo("x.png")
    entry.filename = "写真.png"
    assert archives._name(entry) == "写真.png"


# ----------------------------------------------------------------------------------------------- damage


def test_a_bad_member_is_skipped_as_a_bad_picture_is(tmp_path, capsys, monkeypatch):
    contents = {f"p{number}": picture_bytes(number) for number in range(12)}
    archive = write_archive(tmp_path / "photos.zip", **contents)
    raw = bytearray(archive.read_bytes())
    raw[raw.index(contents["p4"]) + 200] ^= 1
    archive.write_bytes(raw)
    message = refused(archive / "p4.png")
    assert message.startswith(f"{archive}/p4.png: ") and "Bad CRC-32" in message
    paths, failed = open_folder(archive, "--content_dir", MANY)
    assert len(paths) == 11 and archive / "p4.png" not in paths and failed.total == 12
    assert f"skipped {message}" in capsys.readouterr().err
    monkeypatch.setattr(archives, "LARGEST", 100)
    assert "too many" in refused(archive / "p0.png")


def test_empty_and_broken_members_are_bad_pictures(tmp_path):
    archive = write_archive(tmp_path / "photos.zip", empty=b"", text=b"no picture", half=picture_bytes()[:200])
    for name, said in (("empty", "empty"), ("text", "not a readable"), ("half", "not a readable"), ("none", "no such")):
        assert said in refused(archive / f"{name}.png")
    assert "3 of 3 pictures" in user_error(open_folder, archive, "--style_dir", MANY)
    raw, archive = archive.read_bytes().replace(b"text.png", b"text.tif"), tmp_path / "locked.zip"
    archive.write_bytes(raw.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"))  # encrypted, this says
    assert "password required" in refused(archive / "half.png")
    assert archive / "text.tif" not in find_pictures(archive, "--style_dir")


# ------------------------------------------------------------------------------------------------- cache


def test_cache_knows_a_member_by_its_place_and_content(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "photos.zip", a=picture_bytes(1), b=picture_bytes(2))
    cache = PictureCache(tmp_path / "cache")
    cache.folder.mkdir()
    first = {name: cache.open(archive / f"{name}.png", 16).tobytes() for name in "ab"}
    write_archive(archive, a=picture_bytes(3), b=picture_bytes(2), c=picture_bytes(4))
    (tmp_path / "link.zip").symlink_to("photos.zip")
    with monkeypatch.context() as patch:
        patch.setattr("training.sampling.load_picture", None)  # nothing is decoded again
        for path in (archive, tmp_path / "link.zip"):
            assert cache.open(path / "b.png", 16).tobytes() == first["b"]
    assert cache.open(archive / "a.png", 16).tobytes() not in first.values()
    assert len(list(cache.folder.glob("??/*.npy"))) == 2  # the old one is dropped

"""Which files of a folder are pictures, what is said of the others, and when too many cannot be used."""

import os
import zipfile
from pathlib import Path

from helpers import user_error, write_map, write_picture
from PIL import Image, features

import folders
from data import load_picture
from folders import find_pictures, open_folder

MANY = 10**9
KINDS = {"a.tif": "TIFF", "b.bmp": "BMP", "c.gif": "GIF", "d.jfif": "JPEG", "e.ppm": "PPM", "f.tga": "TGA",
         "g.jp2": "JPEG2000", "h.webp": "WEBP", "nosuffix": "JPEG", "no_tga": "TGA", "wrong.txt": "PNG", "i.ico": "ICO",
         "j.dib": "DIB", "k.pcx": "PCX", "l.sgi": "SGI", "m.TIFF": "TIFF", "n.j2k": "JPEG2000", "wrong.json": "BMP",
         "o.pdf": "JPEG", "p.avif": "AVIF", "q.dds": "DDS", "t.msp": "MSP", "u.mpo": "MPO"}
NO_PICTURES = {
    "notes.txt": b"a photo of a cat\n", "a.json": b'{"a": 1}\n', "weights.npy": b"\x93NUMPY\x01\x00v\0" + b" " * 100,
    "a.zip": b"PK\3\4" + b"\0" * 90, "a.pdf": b"%PDF-1.7\n%\xe2\xe3\n", "zeros": b"\0" * 500,
    "a.h5": b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "utf8.txt": "Frühling, Sommer\n".encode(), "P5.txt": b"P5 is a node\n",
    "a.svg": b"<svg/>", "a.mp3": b"ID3\4" + b"\0" * 90, "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "a.mpg": b"\0\0\1\xb3\x16\0\xf0\xc4" + b"\0" * 50,
}


HIDDEN = [".hidden.jpg", "deep/.also.png", ".AppleDouble/f.png", "z/@eaDir/e.PNG/THUMB.jpg", "#recycle/a.png",
          "#recycle/b.png", "$RECYCLE.BIN/S-1-5/$RABC.png", ".Trash-1000/files/a.png", ".thumbnails/a.png",
          "__MACOSX/._a.png", "lost+found/a.png", "deep/@Recycle/a.png"]


def test_folders_are_read_by_content(tmp_path, capsys):
    for name, kind in KINDS.items():
        if kind != "AVIF" or features.check("avif"):
            Image.new("1" if kind == "MSP" else "RGB", (20, 16), 1).save(tmp_path / name, kind)
            load_picture(tmp_path / name)
    pictures = sorted(tmp_path.iterdir())
    for name, content in NO_PICTURES.items():
        (tmp_path / name).write_bytes(content)
    assert find_pictures(tmp_path, "--content_dir") == pictures and len(pictures) >= len(KINDS) - 1
    assert f"--content_dir {tmp_path}: left out: other files: {len(NO_PICTURES)} (" in capsys.readouterr().err


def test_pictures_are_found_in_all_subfolders_by_their_names_unopened(tmp_path, monkeypatch, capsys):
    """What is hidden or of another program is left out and counted, a folder as one."""
    names = ["b.JPG", "a.png", "deep/er/c.JpEg", "deep/d.webp", "z/e.PNG"]
    for name in [*names, *HIDDEN]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    monkeypatch.setattr(folders, "is_picture", None)  # what cannot be called
    assert find_pictures(tmp_path, "--content_dir") == sorted(tmp_path / name for name in names)
    said = "left out: hidden or of other programs: 11 (#recycle, $RECYCLE.BIN, .AppleDouble, ...)"
    assert capsys.readouterr().err == f"--content_dir {tmp_path}: {said}\n"
    with zipfile.ZipFile(tmp_path / ".all.zip", "w") as file:  # by a Windows program
        for name in [*names, *HIDDEN]:
            file.writestr(name.replace("/", "\\"), b"")
    found = find_pictures(tmp_path / ".all.zip", "--content_dir")
    assert found == sorted(tmp_path / ".all.zip" / name for name in names) and said in capsys.readouterr().err


def test_links_are_followed_but_not_in_circles(tmp_path, capsys):
    """What is found twice goes by its own path. Opening the pipe would wait for ever."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    write_picture(folder / "sub" / "a.png")
    write_picture(other / "b.png")
    for link, target in {"sub/up": folder, "itself": folder / "itself", "also": folder / "sub", "zero": "/dev/zero",
                         "other": other, "other/back": other, "link.png": other / "b.png"}.items():
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe")
    (folder / "empty").touch()
    assert find_pictures(folder, "--content_dir") == [
        folder / "link.png", folder / "other" / "b.png", folder / "sub" / "a.png"]
    assert "other files: 4 (" in capsys.readouterr().err


def test_a_folder_without_pictures_says_what_it_holds(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    assert "it is empty" in user_error(find_pictures, tmp_path, "--style_dir")
    (tmp_path / "notes.txt").write_text("a photo of a cat")
    assert "no picture in it; other files: 1 (notes.txt)" in user_error(find_pictures, tmp_path, "--content_dir")
    for path in (tmp_path / "none", write_picture(tmp_path / "file.png")):
        assert f"--style_dir {path}: no such folder" in user_error(find_pictures, path, "--style_dir")


def test_unreadable_subfolder_is_said(tmp_path, capsys, monkeypatch):
    write_map(tmp_path / "a.png")
    write_map(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read all
    assert find_pictures(tmp_path, "--content_dir") == [tmp_path / "a.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "locked") in line and "Permission denied" in line and "--content_dir" in line
    assert "locked: Permission denied" in user_error(find_pictures, tmp_path / "locked", "--content_dir")


# ---------------------------------------------------------------------------------- what cannot be used


def make_folder(folder: Path, good: int, broken: int) -> Path:
    for number in range(good):
        write_map(folder / f"good_{number:02}.png", number=number)
    for number in range(broken):
        (folder / f"broken_{number:02}.jpg").write_text("no picture")
    return folder


def test_broken_pictures_are_skipped_and_said_once_until_they_are_more_than_a_tenth(tmp_path, capsys):
    paths, failed = open_folder(make_folder(tmp_path, 19, 1), "--content_dir", MANY)
    assert paths == [tmp_path / f"good_{number:02}.png" for number in range(19)]
    broken = tmp_path / "broken_00.jpg"
    failed.add(broken, f"{broken}: again")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped {broken}: ")
    failed.add(paths[0], "gone")
    assert failed.summary() == f"--content_dir {tmp_path}: 20 pictures, 2 skipped"
    assert f"--content_dir {tmp_path}: 3 of 20" in user_error(failed.add, paths[1], "gone")


def test_large_pictures_broken_links_and_pipes_count_as_failed(tmp_path, capsys):
    make_folder(tmp_path, 30, 0)
    write_picture(tmp_path / "large.png", (100, 100))
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    paths, failed = open_folder(tmp_path, "--style_dir", max_pixels=5000)
    assert len(paths) == 30
    assert failed.paths == {str(tmp_path / name) for name in ("large.png", "link.jpg", "pipe.jpg")}
    said = capsys.readouterr().err
    assert "large.png: 100 x 100" in said and "link.jpg: no such file" in said and "pipe, socket or device" in said

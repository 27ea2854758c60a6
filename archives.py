"""Files, also those in .zip archives, read in place: `photos.zip/summer/beach.jpg` is summer/beach.jpg of photos.zip.

Such a path is an ordinary `Path`: only what opens pictures need know of archives. Each process opens an archive once.
"""

import os
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

LARGEST = 3 * 2**30  # bytes: more is no picture, and reading it would take all memory


def is_archive(path: Path) -> bool:
    return Path(path).suffix.lower() == ".zip" and os.path.isfile(path)


def members(archive: Path) -> dict[str, tuple[ZipFile, ZipInfo]]:
    """The files in an archive by name, without links.

    Raises ValueError when it is not a whole archive, OSError when it cannot be read.
    """
    status = os.stat(archive)
    return _members(os.fspath(archive), status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=8)  # by process: threads may share an open archive, processes may not
def _members(archive: str, _size: int, _changed: int, _process: int) -> dict[str, tuple[ZipFile, ZipInfo]]:
    try:
        opened = ZipFile(archive)
    except OSError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"the names in it are not the {error.encoding} that it says; pack it anew") from error
    except Exception as error:  # zipfile's own errors, struct's
        raise ValueError(f"not a whole .zip archive ({error}); did its download or copy break off?") from error
    return {str(PurePosixPath(name.lstrip("/"))): (opened, entry) for entry in opened.infolist()
            if not (name := _name(entry)).endswith("/") and not stat.S_ISLNK(entry.external_attr >> 16)}


def _name(entry: ZipInfo) -> str:
    """A member's name with / between folders, also where a Windows program wrote \\, and as it was meant, where its
    bytes are UTF-8 or Shift-JIS and the archive does not say so."""
    name = entry.filename
    if not entry.flag_bits & 0x800 and name == entry.orig_filename:  # else it is UTF-8 and says so, or has that besides
        raw = name.encode("cp437")
        # In Shift-JIS the second byte of a letter may be that of \; otherwise no other encoding is told from cp437.
        for encoding in ("utf-8", *["cp932"] * (b"\\" in raw)):
            with suppress(UnicodeDecodeError):
                name = raw.decode(encoding)
                break
    return name.replace("\\", "/")


def find(path: Path) -> tuple[ZipFile, ZipInfo] | None:
    """The archive that `path` leads into and the member that it names there; None when it leads into no archive.

    Raises FileNotFoundError for a member that is not there; others as `members`.
    """
    for archive in filter(is_archive, Path(path).parents):  # a folder may be called so, too
        member = members(archive).get(Path(path).relative_to(archive).as_posix())
        if member is None:
            raise FileNotFoundError(path)
        return member
    return None


def open_file(path: Path) -> BinaryIO:
    """A file, or an archive's member, to read. Raises ValueError for what is no file, empty, or too large for a
    picture, OSError for what is not there or cannot be read; others as `find`."""
    member = find(path)
    status = None if member else os.stat(path)
    if status and not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        raise ValueError(f"not a file, but a {'folder' if os.path.isdir(path) else 'pipe, socket or device'}")
    size = status.st_size if status else member[1].file_size
    if not 0 < size <= LARGEST:
        raise ValueError(f"{size} bytes are too many for a picture" if size else "the file is empty")
    return member[0].open(member[1]) if member else open(path, "rb")


def identity(path: Path) -> tuple[str, tuple[int, int]]:
    """Where a picture really is, and two numbers of which one changes when its content does; errors as in `find`."""
    if (member := find(path)) is None:
        return os.path.realpath(path), (os.stat(path).st_size, os.stat(path).st_mtime_ns)
    return os.path.join(os.path.realpath(member[0].filename), member[1].filename), (member[1].file_size, member[1].CRC)

"""Pictures in .zip archives, read in place: `photos.zip/summer/beach.jpg` is summer/beach.jpg of photos.zip.

Such a path is an ordinary `Path`, so whatever names, sorts, stores or sends pictures need not know of archives; only
what opens them does. An archive's directory is read once a process, or before it forks, and each reading of a member
opens the archive anew: processes and threads share no file and no place in one. (`zipfile.Path` has its archive open
all the time, shares the place in it with forked processes, and reads the directory again for every copy.)
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SUFFIX = ".zip"
OTHER_SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LEADS_IN = re.compile(re.escape(SUFFIX + os.sep), re.IGNORECASE)
LARGEST = 2**31  # bytes of a member: more is no picture, and unpacking it would take all memory
OVERHEAD = 2**10  # bytes: packing makes a member's beginning longer by less than this


class ArchiveError(Exception):
    """What is wrong with an archive or a member of it; the message does not name it."""


class Member(NamedTuple):
    """A file in an archive, as the archive's directory describes it."""

    archive: str
    name: str
    header: int  # where in the archive it begins
    packed: int  # bytes
    size: int  # bytes
    crc: int
    method: int
    is_encrypted: bool

    def read(self) -> bytes:
        """Its content. Raises ArchiveError when that is damaged, encrypted or packed in an unusual way, OSError when
        the archive cannot be read."""
        content = self._unpack(self.packed, self.size)
        if len(content) != self.size or zlib.crc32(content) != self.crc:
            raise ArchiveError("damaged: its content does not have the checksum that the archive states")
        return content

    def head(self, count: int) -> bytes:
        """Its first bytes, `count` or fewer; errors as in `read`, but the checksum is not looked at."""
        return self._unpack(min(self.packed, count + OVERHEAD), count)[:count]

    def _unpack(self, packed: int, size: int) -> bytes:
        if self.is_encrypted:
            raise ArchiveError("encrypted; unpack the archive with its password")
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"packed by a method other than deflate ({self.method}); unpack the archive")
        if max(packed, size) > LARGEST:
            raise ArchiveError(f"{self.size} bytes are too many for a picture")
        with open(self.archive, "rb") as file:
            file.seek(self.header)
            header = file.read(30)
            if len(header) < 30 or not header.startswith(b"PK\3\4"):
                raise ArchiveError("damaged: it is not where the archive's directory says")
            file.seek(sum(struct.unpack_from("<HH", header, 26)), os.SEEK_CUR)  # its name again, and extra fields
            content = file.read(packed)
        if self.method == zipfile.ZIP_STORED:
            return content
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(1, size))
        except zlib.error as error:
            raise ArchiveError(f"damaged ({error})") from error


def is_archive(path: Path) -> bool:
    """Whether `path` is a file that is named as archives are, also those that are not read."""
    return os.fspath(path).lower().endswith((SUFFIX, *OTHER_SUFFIXES)) and os.path.isfile(path)


def members(archive: Path) -> list[Path]:
    """The files in an archive, without folders, links, and what is hidden or macOS added.

    Raises ArchiveError when it is not a whole .zip archive, OSError when it cannot be read.
    """
    if not os.fspath(archive).lower().endswith(SUFFIX):
        raise ArchiveError(f"only {SUFFIX} archives are read in place; unpack it")
    return [Path(archive, name) for name in _directory_of(os.fspath(archive))]


def find(path: Path) -> Member | None:
    """The member of an archive that `path` names; None for a path that does not lead into one.

    Raises FileNotFoundError when the archive has no such member; other errors as `members`.
    """
    archive, name = _split(os.fspath(path))
    if archive is None:
        return None
    member = _directory_of(archive).get(name)
    if member is None:
        raise FileNotFoundError(path)
    return member


def identity(path: Path) -> tuple[str, tuple[int, int]]:
    """Where a picture really is, and two numbers of which one changes when its content does; errors as in `find`."""
    member = find(path)
    if member is None:
        status = os.stat(path)
        return os.path.realpath(path), (status.st_size, status.st_mtime_ns)
    return os.path.join(os.path.realpath(member.archive), member.name), (member.size, member.crc)


def _split(path: str) -> tuple[str | None, str]:
    """The archive that a path leads into, if one, and the name in it."""
    for found in LEADS_IN.finditer(path):
        archive, name = path[: found.end() - 1], path[found.end() :]
        if os.path.isfile(archive):  # not a folder of such a name
            return archive, name.replace(os.sep, "/")
    return None, path


def _directory_of(archive: str) -> dict[str, Member]:
    status = os.stat(archive)
    return _read_directory(archive, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_directory(archive: str, _size: int, _changed: int) -> dict[str, Member]:
    """The files of `members` by name; read anew when the archive has changed."""
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
    except OSError:
        raise
    except Exception as error:  # zipfile passes on what it met: its own errors, struct's, those of text codecs
        with open(archive, "rb") as file:
            is_cut = file.read(4) == b"PK\3\4" and "not a zip file" in str(error)
        reason = ("not a whole .zip archive: its end, with the list of what it holds, is missing (a download or copy "
                  "that broke off?)" if is_cut else f"not a readable .zip archive ({error})")
        raise ArchiveError(reason) from error
    found = {}
    for entry in entries:
        name = str(PurePosixPath(_name(entry).lstrip("/")))
        is_left_out = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
        if is_left_out or entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16):
            continue
        found[name] = Member(archive, name, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC,
                             entry.compress_type, bool(entry.flag_bits & 0x1))
    return found


def _name(entry: zipfile.ZipInfo) -> str:
    """As the archive has it: UTF-8, also where that is not said, or else the code page of DOS."""
    if entry.flag_bits & 0x800 or entry.filename.isascii():
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode()
    except UnicodeError:
        return entry.filename

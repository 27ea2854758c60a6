"""Folders and .zip archives of pictures: what they hold, which of it is held out, and how much of it cannot be used."""

import hashlib
import os
import random
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import archives
from data import PictureError, is_picture, load_picture
from utils import UserError, gather, missing, note, note_of_process, usable_cores

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # taken for pictures unseen; others are looked at
# What system and other programs keep in a folder of pictures: small copies, and what was deleted. So is what is hidden.
OTHERS_FOLDERS = ("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
                  "__macosx", "lost+found", "system volume information")
LOOKING_THREADS = 16
STARTUP_CHECK = 256  # pictures a folder that are decoded before a run starts
MAX_FAILED = 0.10  # of a folder's pictures


def is_searched(path: Path) -> bool:
    """Whether `path` holds pictures, and is none itself: a folder, or an archive."""
    return Path(path).is_dir() or archives.is_archive(path)


def find_pictures(folder: Path, flag: str, output: Path | None = None) -> list[Path]:
    """The pictures of a folder and all its subfolders, or of a .zip archive, sorted; links are followed. What is hidden
    or another program's is left out. That and what else is in it is said in a line.

    A file named as pictures are is taken for one; any other is looked at. Raises UserError, naming `flag`, when there
    is no such folder or archive, or no picture in it; and as `refuse_within` for an `output`.
    """
    folder, hidden = Path(folder), set()
    try:
        if archives.is_archive(folder):
            files = [folder / name for name in archives.members(folder) if not _is_hidden(name, hidden)]
        elif folder.is_dir():
            files = _files_below(folder, flag, hidden)
        else:
            raise ValueError(missing(folder) if folder.is_symlink() else "no such folder or .zip archive")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {folder}: {getattr(error, 'strerror', None) or error}") from error
    unknown = [path for path in files if path.suffix.lower() not in PICTURE_SUFFIXES]
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:  # a file server answers many questions at once
        others = [path for path, is_one in zip(unknown, pool.map(is_picture, unknown)) if not is_one]
    pictures = sorted({*files} - {*others})
    named = {"other files": [path.name for path in others], "hidden or of other programs": sorted(hidden)}
    left_out = "; ".join(f"{kind}: {len(names)} ({', '.join([*names[:3], '...'][: len(names)])})"
                         for kind, names in named.items() if names)
    if not pictures:
        raise UserError(f"{flag} {folder}: no picture in it; {left_out or 'it is empty'}")
    if output is not None:
        refuse_within(output, folder, flag, pictures)
    if left_out:
        note(f"{flag} {folder}: left out: {left_out}")
    return pictures


def _is_hidden(name: str, hidden: set[str]) -> bool:
    """Whether a file of that path is hidden or in a folder of OTHERS_FOLDERS; then `hidden` gets what is, file or
    folder."""
    for depth, part in enumerate(parts := name.split("/"), start=1):
        if part.startswith(".") or part.lower() in OTHERS_FOLDERS:
            hidden.add("/".join(parts[:depth]))
            return True
    return False


def _files_below(folder: Path, flag: str, hidden: set[str]) -> list[Path]:
    """All but folders and what is hidden, which `hidden` gets; each folder once, also where links lead to it again."""
    def leave_out(error: OSError) -> None:
        if error.filename == str(folder):
            raise error
        note(f"{flag} {folder}: the folder {error.filename} in it is left out: it cannot be read ({error.strerror})")

    files, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=leave_out, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        within = "" if here == str(folder) else f"{os.path.relpath(here, folder)}/"
        # Those that are linked last: what is found twice goes by its own path.
        folders[:] = [name for _, name in sorted((os.path.islink(os.path.join(here, name)), name) for name in folders
                                                 if not _is_hidden(within + name, hidden))]
        files += [Path(here, name) for name in names if not _is_hidden(within + name, hidden)]
    return files


def refuse_within(output: Path, folder: Path, flag: str, pictures: Iterable[Path]) -> None:
    """Raises UserError where `output`, a folder to write to, belongs to one that is searched for pictures.

    pictures: what was found there; through links it may lie elsewhere.
    """
    searched = {os.path.realpath(each) for each in {Path(folder), *(path.parent for path in pictures)}}
    real = Path(os.path.realpath(output))
    if not searched.isdisjoint(map(str, (real, *real.parents))):
        raise UserError(f"--save_path {output}: belongs to {flag} {folder}, which is searched with all its subfolders: "
                        "the next call would find there what this one writes; name a folder outside it")


# ----------------------------------------------------------------------------------------------- held out


def is_held_out(path: Path, share: float) -> bool:
    """Whether the picture is among the about `share` of all that are not learned from.

    Its name decides, so that a split stays what it is when pictures come or go. A name's ending `_a` to `_d` does not
    count: such files are crops of one picture and stay together.
    """
    stem = re.sub(r"_[a-d]$", "", path.stem)
    place = int.from_bytes(hashlib.sha256(os.fsencode(stem)).digest()[:8], "big") / 2**64  # 0..1, evenly spread
    return place < share


def split_holdout(paths: list[Path], share: float, where: str) -> tuple[list[Path], list[Path]]:
    """Pictures to learn from, and those held out, in the order given. where: the flag and the folder that they are
    from. Raises UserError when none is to learn from."""
    held_out = [path for path in paths if is_held_out(path, share)]
    if not (learned := [path for path in paths if not is_held_out(path, share)]):
        raise UserError(f"{where}: --holdout {share} would hold all its {len(paths)} pictures out")
    return learned, held_out


def only_held_out(paths: list[Path], share: float, where: str) -> list[Path]:
    """The pictures that are held out; where: as in `split_holdout`. Raises UserError when there are none."""
    if not (held_out := [path for path in paths if is_held_out(path, share)]):
        raise UserError(f"{where}: --holdout {share} holds none of its {len(paths)} pictures out")
    return held_out


def find_measured(folder: Path, flag: str, holdout: float, output: Path | None = None) -> list[Path]:
    """The pictures to measure: those that training with the same `holdout` left out; all when it is 0. Raises UserError
    as `find_pictures` and `only_held_out` do."""
    paths = find_pictures(folder, flag, output)
    return only_held_out(paths, holdout, f"{flag} {folder}") if holdout else paths


# ---------------------------------------------------------------------------------- what cannot be used


class FailedPictures:
    """Counts a folder's unusable pictures, says each once, stops the run when they are too many."""

    def __init__(self, folder: Path, flag: str, total: int) -> None:
        self.where, self.total = f"{flag} {folder}", total
        self.paths: set[str] = set()

    def add(self, path: Path, reason: str) -> None:
        """Raises UserError when more than a tenth of the folder's pictures have failed."""
        if str(path) not in self.paths:
            self.paths.add(str(path))
            note_of_process(f"skipped {reason}")
            self.stop_if_many(len(self.paths), self.total, reason)

    def add_other_processes(self) -> None:
        """Count what the other processes of the run have met; each process must call this. Raises as `add` does."""
        self.paths.update(*gather(self.paths))
        self.stop_if_many(len(self.paths), self.total, "met by another process")

    def stop_if_many(self, failed: int, total: int, reason: str) -> None:
        """Raises UserError, with the `reason` of the last, when more than a tenth of `total` pictures have failed."""
        if failed > MAX_FAILED * total:
            raise UserError(f"{self.where}: {failed} of {total} pictures cannot be used (the last: {reason}); mend or "
                            "remove them, at most 10% may fail")

    def summary(self) -> str:
        return f"{self.where}: {self.total} pictures, {len(self.paths)} skipped"


def open_folder(folder: Path, flag: str, max_pixels: int,
                output: Path | None = None) -> tuple[list[Path], FailedPictures]:
    """The pictures of a folder and the tally of its failures.

    Up to STARTUP_CHECK of them are decoded now, so that a hopeless folder stops a run before it starts; the rest are
    met as they are drawn. Raises UserError as `find_pictures` does, and when over a tenth fail.
    """
    def reason_to_skip(path: Path) -> str | None:
        try:
            load_picture(path, 1, max_pixels=max_pixels)
        except PictureError as error:
            return str(error)

    paths = find_pictures(folder, flag, output)
    sample = sorted(random.Random(0).sample(paths, min(len(paths), STARTUP_CHECK)))
    with ThreadPoolExecutor(usable_cores()) as pool:
        broken = {path: text for path, text in zip(sample, pool.map(reason_to_skip, sample)) if text is not None}
    failed = FailedPictures(folder, flag, len(paths))
    for path, text in broken.items():
        failed.stop_if_many(len(broken), len(sample), text)  # over a tenth of a sample says the same of the folder
        failed.add(path, text)
    return [path for path in paths if path not in broken], failed

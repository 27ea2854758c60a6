"""Which pictures test mode stylises with which, and the names of what comes out."""

import hashlib
import math
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from data import find_measured, is_searched, refuse_within
from painting.quality import MIN_SIDE
from painting.sheets import COMPARISON, CONTACT_SHEET
from painting.stylizer import UnusablePicture, load_input
from utils import UserError

LONGEST_NAME = 180  # bytes of a picture's file name: file systems take 255, and a file in the making has a longer one

Pair = tuple[int, int]  # the numbers of a content and a style picture


# ----------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Pictures:
    """The content or the style pictures, and a file-name part for each."""

    flag: str  # that named them
    named: tuple[str, ...]  # as the command line names them
    paths: list[Path]
    names: list[str]
    folders: dict[Path, list[Path]]  # those of `named` that are folders or archives, with what was found there
    are_one: bool = False  # all of them together are one style

    @property
    def are_many(self) -> bool:
        """Whether a folder or several pictures were named: one that cannot be used does not stop the others."""
        return not self.are_one and (bool(self.folders) or len(self.paths) > 1)

    def joined(self) -> "Pictures":
        """All of them as one style, of number 0 and with all their names."""
        return replace(self, names=["+".join(self.names)], are_one=True)

    def of(self, number: int) -> list[Path]:
        """The picture of this number, or all that are together one style."""
        return self.paths if self.are_one else [self.paths[number]]


def find_inputs(named: Sequence[str], flag: str, holdout: float) -> Pictures:
    """The pictures that are named, and those of the folders and archives among what is named; each once.

    Raises UserError as `find_measured` does.
    """
    stems, folders = {}, {}
    for each in map(Path, named):
        if not is_searched(each):
            stems.setdefault(each, each.stem)
            continue
        folders[each] = find_measured(each, f"--{flag}", holdout)
        for path in folders[each]:
            stems.setdefault(path, "-".join(path.relative_to(each).with_suffix("").parts))
    return Pictures(flag, tuple(named), list(stems), _names(stems), folders)


def _names(stems: dict[Path, str]) -> list[str]:
    """A file-name part for each picture, unique among them: its stem, without the suffix unless two pictures differ in
    nothing else."""
    counts = Counter(map(_folded, stems.values()))
    return distinct([stem if counts[_folded(stem)] == 1 else f"{stem}-{path.suffix[1:]}"
                     for path, stem in stems.items()])


def _folded(name: str) -> str:
    """Equal for names that are one file on some file systems."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def distinct(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, those that are equal without regard to case, or `taken`, with a number of their own behind them."""
    counts = Counter(map(_folded, (*names, *taken)))
    used = set(counts)
    result = []
    for name in names:
        number, chosen = 1, name
        while counts[_folded(name)] > 1 and _folded(chosen) in used:
            chosen, number = f"{name}-{number}", number + 1
        used.add(_folded(chosen))
        result.append(chosen)
    return result


# -------------------------------------------------------------------------------------------------- pairs


def choose_pairs(contents: int, styles: int, number: int | None, seed: int) -> list[Pair]:
    """Content and style picture of each pair, by number, in order: all, or `number` different ones at random.

    Drawn pairs use every picture as often as any other of its kind, or once more. Raises UserError when there
    are not that many pairs.
    """
    if number is None:
        return [(content, style) for content in range(contents) for style in range(styles)]
    if number > contents * styles:
        raise UserError(f"--pairs {number}: {contents} content and {styles} style pictures make "
                        f"{contents * styles} pairs")
    generator = random.Random(seed)
    content_order, style_order = (generator.sample(range(count), count) for count in (contents, styles))
    # Both orders go round together; when they meet again where they began, one moves on by a place.
    round_length = math.lcm(contents, styles)
    return sorted((content_order[place % contents], style_order[(place + place // round_length) % styles])
                  for place in range(number))


# ------------------------------------------------------------------------------------------------ outputs


def output_names(
    pairs: Sequence[Pair], contents: Pictures, styles: Pictures, endings: Sequence[str]
) -> dict[Pair, list[str]]:
    """The file names of every pair's pictures, one with each of `endings`: no two alike, none that of a sheet, and
    short enough for a file system."""
    stems = []
    for content, style in pairs:
        for ending in endings:
            stem = f"{contents.names[content]}_{styles.names[style]}{ending}"
            if len(os.fsencode(stem)) > LONGEST_NAME:
                kept = os.fsencode(stem)[: LONGEST_NAME - 40].decode(errors="ignore")
                stem = f"{kept}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:12]}{ending}"
            stems.append(stem)
    taken = [Path(name).stem for name in (COMPARISON, CONTACT_SHEET)]
    names = iter(f"{stem}.png" for stem in distinct(stems, taken))
    return {pair: [next(names) for _ in endings] for pair in pairs}


def check_outputs(
    files: Iterable[Path], folders: Iterable[Path], pictures: Iterable[Pictures], others: Iterable[tuple[str, Path]],
    save_path: Path,
) -> None:
    """Raises UserError where a file to write is one that is read, or a folder to write to belongs to one that is
    searched for pictures: the next call would stylise what this one wrote.

    others: further files that are read, each with the flag that it is of.
    """
    pictures, folders = list(pictures), list(folders)
    inputs = [*((f"--{each.flag}", path) for each in pictures for path in each.paths), *others]
    read = {_identity(path): f"{flag} {path}" for flag, path in inputs}
    for file in files:
        identity = _identity(file)
        if identity is not None and identity in read:
            raise UserError(f"--save_path {save_path}: {file} would overwrite {read[identity]}; name another")
    for each in pictures:
        for root, found in each.folders.items():
            for folder in folders:
                refuse_within(folder, root, f"--{each.flag}", found)


def _identity(path: Path) -> tuple[int, int] | None:
    """Equal for two paths of one file, through links, too; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def load_measurable(path: Path, config, flag: str, measured_by: str) -> Tensor:
    """`load_input` of a picture that a Meter is to see. measured_by: the flag that asks for it. Raises UnusablePicture,
    also for one with a side below MIN_SIDE."""
    picture = load_input(path, config, flag)
    height, width = picture.shape[2:]
    if min(height, width) < MIN_SIDE:
        raise UnusablePicture(f"{flag} {path}: {width} x {height} pixels; {measured_by} needs {MIN_SIDE} or more on "
                              "each side")
    return picture

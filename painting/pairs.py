"""Which pictures test mode paints in which, the names of what comes out, and what others painted of them."""

import math
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, product
from pathlib import Path

from PIL import Image

from folders import find_measured, find_pictures, is_held_out, is_searched, refuse_within
from painting.control import check_styles
from painting.sheets import COMPARISON, CONTACT_SHEET, Sheet, comparison_sheet, contact_sheet
from painting.stylizer import open_mask
from utils import UserError, note
from weights import model_names

METRICS_NAME = "metrics.json"
OUTPUT_NAME = "stylised"  # in the working folder, where --save_path is not given: with .png for one picture
LONGEST_NAME = 180  # bytes of a pair's name: file systems take 255, and a file in the making has a longer one

Pair = tuple[int, int]  # the numbers of a content and a style


@dataclass(frozen=True)
class Pictures:
    """The contents or the styles, and a file-name part for each."""

    flag: str  # that named them
    groups: list[tuple[Path, ...]]  # the pictures of each: one, or all that together make one style
    names: list[str]
    folders: dict[Path, list[Path]]  # those of `named` that are folders or archives, with what was found there
    are_many: bool  # a folder or several were named: one that cannot be used does not stop the others

    @property
    def paths(self) -> list[Path]:
        return [*chain.from_iterable(self.groups)]


@dataclass(frozen=True)
class Plan:
    """What is painted in what, and where it goes."""

    contents: Pictures
    styles: Pictures
    pairs: list[Pair]
    columns: list[str]  # the names of a pair's pictures: of each model at each strength, then of `others`
    others: dict[str, dict[Pair, Path]]  # by a name: pictures of the same pairs, to be measured, too
    mask: Image.Image | None  # L
    folder: Path
    files: dict[Pair, list[Path]]  # to write, of each model at each strength
    sheets: list[Sheet]


def find_inputs(named: Sequence[str], flag: str, holdout: float) -> Pictures:
    """The pictures that are named, and those of the folders and archives among what is named; each once.

    Raises UserError as `find_measured` does.
    """
    folders = {each: find_measured(each, f"--{flag}", holdout) for each in map(Path, named) if is_searched(each)}
    stems = {}
    for each in map(Path, named):
        for path in folders.get(each, [each]):
            parts = path.relative_to(each).with_suffix("").parts if each in folders else [path.stem]
            stems.setdefault(path, "-".join(parts))
    are_many = len(stems) > 1 or bool(folders)
    return Pictures(flag, [(path,) for path in stems], distinct([*stems.values()]), folders, are_many)


def distinct(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The names; one that an earlier name or `taken` equals, whatever the case, gets a number behind it."""
    used, result = {name.casefold() for name in taken}, []
    for name in names:
        numbered = chain([name], (f"{name}-{number}" for number in count(1)))
        result.append(next(each for each in numbered if each.casefold() not in used))
        used.add(result[-1].casefold())
    return result


def note_learned_from(name: str, checkpoint: dict, paths: Sequence[Path]) -> None:
    """Say how many of the pictures to measure a model has learned from, as far as its file, the `checkpoint`, knows."""
    config = checkpoint.get("train_config") or {}
    folders = {os.path.realpath(config[flag]) for flag in ("content_dir", "style_dir") if config.get(flag)}
    within = [path for path in paths if not folders.isdisjoint(map(str, Path(os.path.realpath(path)).parents))]
    holdout = config.get("holdout") or 0.0
    learned = sum(not is_held_out(path, holdout) for path in within)
    if learned:
        note(f"{name} has learned from {learned} of the {len(paths)} pictures that it is measured with (its training "
             f"had --holdout {holdout:g}): to judge it, measure pictures that were held out")


def choose_pairs(contents: int, styles: int, number: int | None, seed: int) -> list[Pair]:
    """Content and style picture of each pair, by number, in order: all, or `number` different ones at random.

    Drawn pairs use every picture as often as any other of its kind, or once more. Raises UserError when there
    are not that many pairs.
    """
    number = contents * styles if number is None else number
    if number > contents * styles:
        raise UserError(f"pairs {number}: {contents} content and {styles} style pictures make "
                        f"{contents * styles} pairs")
    generator = random.Random(seed)
    content_order, style_order = (generator.sample(range(count), count) for count in (contents, styles))
    # Both orders go round together; when they meet again where they began, one moves on by a place.
    round_length = math.lcm(contents, styles)
    return sorted((content_order[place % contents], style_order[(place + place // round_length) % styles])
                  for place in range(number))


def output_names(pairs: Sequence[Pair], contents: Pictures, styles: Pictures, endings: Sequence[str] = ("",),
                 taken: Iterable[str] = ()) -> dict[Pair, list[str]]:
    """The file names of every pair's pictures, without suffix, one with each of `endings`: no two alike, none of
    `taken`, and short enough for a file system."""
    stems = []
    for content, style in pairs:
        stem = f"{contents.names[content]}_{styles.names[style]}"
        if len(os.fsencode(stem)) > LONGEST_NAME:
            stem = os.fsencode(stem)[:LONGEST_NAME].decode(errors="ignore")
        stems += [stem + ending for ending in endings]
    names = iter(distinct(stems, taken))
    return {pair: [next(names) for _ in endings] for pair in pairs}


def check_outputs(config, written: Sequence[Path], pictures: Sequence[Pictures] = (),
                  painted: Sequence[Path] = ()) -> None:
    """Raises UserError where a file to write is one that is read, or where its folder is searched for pictures: the
    next call would paint what this one wrote. config: a TestConfig; painted: pictures by others, which are read, too.
    """
    named = {flag: paths for paths, flag in map(config.input, ("content", "style"))} | {
        "load_path": config.load_path, "mask": [config.mask or ""], "vgg_weights": [config.vgg_weights],
        "painted": painted} | {each.flag: each.paths for each in pictures}
    read = {os.path.realpath(path): f"--{flag} {path}" for flag, paths in named.items() for path in paths}
    for file in written:
        if os.path.realpath(file) in read:
            raise UserError(f"save_path: {file} would overwrite {read[os.path.realpath(file)]}; name another")
    for folder, each in product({file.parent for file in written}, pictures):
        for root, found in each.folders.items():
            refuse_within(folder, root, f"--{each.flag}", found)


def find_painted(given: str, pairs: Sequence[Pair], contents: Pictures, styles: Pictures) -> dict[Pair, Path]:
    """The pictures that another program painted of the pairs: named as test mode names them or CONTENT__STYLE, with any
    suffix.

    given: NAME=FOLDER. Raises UserError where that is something else, or where not exactly one picture is of a pair.
    """
    name, _, folder = given.partition("=")
    if not name or not folder:
        raise UserError(f"painted {given}: NAME=FOLDER is needed")
    by_stem, files = {}, {}
    for path in find_pictures(Path(os.path.expanduser(folder)), "--painted"):
        by_stem.setdefault(path.stem, []).append(path)
    for (content, style), names in output_names(pairs, contents, styles).items():
        names.append(f"{contents.names[content]}__{styles.names[style]}")
        found = [path for each in dict.fromkeys(names) for path in by_stem.pop(each, ())]
        if len(found) != 1:
            raise UserError(f"painted {given}: {len(found)} pictures are called {' or '.join(names)}; one is needed, "
                            "with any suffix")
        files[content, style] = found[0]
    return files


def make_plan(config) -> Plan:
    """config: a TestConfig. Raises UserError for pictures that are missing or do not fit, and outputs over inputs."""
    contents, styles = (find_inputs(*config.input(kind), config.holdout) for kind in ("content", "style"))
    if config.style_weights is not None or config.mask is not None:
        check_styles(len(styles.paths), config.style_weights, config.mask)
        styles = replace(styles, groups=[tuple(styles.paths)], names=["+".join(styles.names)], are_many=False)
    pairs = choose_pairs(len(contents.groups), len(styles.groups), config.pairs, config.seed)
    others = {each.partition("=")[0]: find_painted(each, pairs, contents, styles) for each in config.painted or ()}
    names = model_names(config.load_path)
    columns = [name if len(config.style_strength) == 1 else f"{name} at {strength}"
               for name, strength in product(names, config.strengths)]
    columns += others
    if distinct(columns) != columns or len(others) < len(config.painted or ()):
        raise UserError(f"painted {' '.join(config.painted)}: another row has this name; choose another")
    sheets, are_many = [], contents.are_many or styles.are_many
    if len(columns) > 1 or are_many and config.pairs is not None:
        sheets.append(comparison_sheet(pairs, columns))
    if are_many and config.pairs is None:
        sheets.append(contact_sheet(pairs, columns))
    folder, files = _outputs(config, pairs, contents, styles, names)
    mask = None if config.mask is None else open_mask(config.mask)
    written = [*chain.from_iterable(files.values()), *(folder / sheet.name for sheet in sheets)]
    written += [folder / METRICS_NAME] * bool(config.measured)
    check_outputs(config, written, (contents, styles), [path for each in others.values() for path in each.values()])
    return Plan(contents, styles, pairs, columns, others, mask, folder, files, sheets)


def _outputs(config, pairs: list[Pair], contents: Pictures, styles: Pictures,
             names: list[str]) -> tuple[Path, dict[Pair, list[Path]]]:
    """The folder to write to, and the files of every pair: for each model, in its own folder where there are several,
    one a strength. names: of the models. Raises UserError where `--save_path` is a file and cannot hold them."""
    save_path, strengths = Path(config.save_path or OUTPUT_NAME), config.strengths
    are_several = contents.are_many or styles.are_many or len(names) * len(strengths) > 1
    if config.writes_a_file and not are_several and not config.measured:
        return config.output.parent, {pairs[0]: [config.output]}
    if config.writes_a_file and config.save_path is not None:
        raise UserError(f"save_path {save_path}: one file cannot hold the pictures of {len(pairs)} pair(s) by "
                        f"{len(names)} model(s) at {len(strengths)} strength(s), or their metrics; name a folder")
    endings = [""] if len(strengths) == 1 else [f"_{strength}" for strength in strengths]
    folders = [save_path / name for name in names] if len(names) > 1 else [save_path]
    taken = [Path(name).stem for name in (COMPARISON, CONTACT_SHEET)]
    named = output_names(pairs, contents, styles, endings, taken)
    return save_path, {pair: [folder / f"{name}.png" for folder in folders for name in named[pair]] for pair in pairs}

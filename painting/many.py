"""Many pairs painted: each picture is decoded and encoded once; while one is painted, others are read and written."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path

from PIL import Image
from torch import Tensor

from data import (
    NotFinite,
    PictureError,
    denormalize,
    normalize,
    pixels_to_pil,
    prepare_picture,
    read_written,
    save_picture,
    to_pil,
)
from painting.control import MaskedStyle, Style, check_colors, check_mask, combine, match_colors
from painting.pairs import PaintedFolder, Pair, Pictures
from painting.quality import MeasuredContent, Meter, check_measurable
from painting.sheets import Key, Sheet, side_by_side
from painting.stylizer import Stylizer, UnusablePicture, load_input, load_transparency, usable
from painting.tiling import TiledPicture
from utils import UserError, gather, make_folder, note_of_process, progress_bar, share, usable_cores

MOST_THREADS = 8  # that read, and that write; as many pictures are read ahead


@dataclass(frozen=True)
class Model:
    """A network to paint with: its name in tables and folders, its file, and what else the file says."""

    name: str
    file: Path
    stylizer: Stylizer
    checkpoint: dict


@dataclass
class Outcome:
    """What came of all pairs."""

    values: dict[Pair, Tensor | None] = field(default_factory=dict)  # measured, of the pairs that could be painted
    kept: int = 0  # pictures that were there already
    unusable: dict[tuple[str, int], str] = field(default_factory=dict)  # the reasons, by flag and number


@dataclass(frozen=True)
class _Content:
    """A content picture, decoded, and on its way through each model's network."""

    picture: Tensor  # (1, 3, H, W), uint8
    alpha: Image.Image | None  # L: how opaque it is
    opened: list[TiledPicture]


@dataclass(frozen=True)
class _Style:
    """A style, encoded."""

    pictures: list[Tensor]  # (1, 3, H, W), uint8, each; none where no content needs them any more
    codes: list[Style | MaskedStyle]  # for every model; none where each content colours the pictures first
    measured: list  # what the meter takes of it


class PairPainter:
    """Paints pairs of pictures by every model at every strength, and measures them where there is a meter."""

    def __init__(
        self, models: Sequence[Model], config, contents: Pictures, styles: Pictures, *, sheets: Sequence[Sheet] = (),
        meter: Meter | None = None, mask: Image.Image | None = None, others: Sequence[PaintedFolder] = (),
    ) -> None:
        """config: a TestConfig. sheets: where all pictures are placed. mask: of `--mask`, mode L. others: pictures of
        the same pairs, to be measured, too."""
        self.models, self.config, self.contents, self.styles = models, config, contents, styles
        self.sheets, self.meter, self.mask, self.others = sheets, meter, mask, others
        self.matches_colors = config.preserve_color == "histogram"  # of the style, to each content's
        self.variants = [*product(range(len(models)), config.style_strength)]
        self.outcome = Outcome()
        self.threads = min(usable_cores(), MOST_THREADS)

    def run(self, files: dict[Pair, list[Path]]) -> Outcome:
        """files: those to write of every pair, for each model one a strength.

        Several processes share the pairs; each returns, and has on its sheets, what came out of all. A picture of
        several that cannot be used, or that there is too little memory for, is left out with all its pairs. Raises
        UserError for an output that is not finite or cannot be written, and for a picture that was named alone and
        cannot be used.
        """
        with ThreadPoolExecutor(self.threads) as self.readers, ThreadPoolExecutor(self.threads) as self.writers:
            self.being_written = deque()
            self._paint_all(self._left_to_paint(files) if self.config.skip_existing else
                            {pair: dict(enumerate(files[pair])) for pair in share([*files])})
            self._gather()
            for pictures, kind, place in ((self.contents, "content", 0), (self.styles, "style", 1)):
                numbers = sorted({pair[place] for pair in self.outcome.values if self._lacks((kind, pair[place]))})
                for _ in self._usable(pictures, numbers, lambda number, of=pictures: self._load(of, number)):
                    pass  # it is on the sheets now
        return self.outcome

    def _left_to_paint(self, files: dict[Pair, list[Path]]) -> dict[Pair, dict[int, Path]]:
        """This process's part of the pairs of which something is not there yet, each with those files by their column;
        what is there is placed on the sheets."""
        left = {}
        is_there = {pair: all(path.exists() for path in paths) for pair, paths in files.items()}
        # They are shared out apart, so that all processes have as much to do.
        mine = [pair for there in (True, False) for pair in share([pair for pair in files if is_there[pair] == there])]
        for pair, work in self._ahead(lambda pair: [*map(read_written, files[pair])], sorted(mine)):
            pictures = work.result()
            for column, picture in enumerate(pictures):
                if picture is None:
                    left.setdefault(pair, {})[column] = files[pair][column]
                else:
                    self._show((*pair, column), picture)
                    self.outcome.kept += 1
            if pair not in left:
                self.outcome.values[pair] = None
        return left

    def _paint_all(self, files: dict[Pair, dict[int, Path]]) -> None:
        """Paint these files of every pair, by their column; values and what cannot be used go to the outcome."""
        styles = {}
        for number, pictures in self._usable(self.styles, sorted({style for _, style in files}),
                                             lambda number: self._load(self.styles, number)):
            with self._skipping(self.styles, number):
                styles[number] = self._encode_style(pictures)
        by_content = {content: [*pairs] for content, pairs in groupby(sorted(files), key=lambda pair: pair[0])}
        with progress_bar(sum(map(len, files.values())), "stylise", "picture") as bar:
            for number, content in self._usable(self.contents, [*by_content] if styles else [], self._load_content):
                with self._skipping(self.contents, number):
                    measured = self.meter.open_content(content.picture) if self.meter else None
                    for pair in by_content[number]:
                        if pair[1] in styles:
                            self.outcome.values[pair] = self._paint_pair(pair, files[pair], content, styles[pair[1]],
                                                                         measured, bar)
            bar.total = bar.n  # what was left out counts no longer
        while self.being_written:
            self.being_written.popleft().result()

    # ------------------------------------------------------------------------------------------- inputs

    def _ahead(self, read: Callable, items: Iterable) -> Iterator[tuple[object, Future]]:
        """Every item with what `read` makes of it; meanwhile it reads a few further ones."""
        begun = deque()
        for item in items:
            begun.append((item, self.readers.submit(read, item)))
            if len(begun) > self.threads:
                yield begun.popleft()
        yield from begun

    def _usable(self, pictures: Pictures, numbers: list[int], read: Callable) -> Iterator[tuple[int, object]]:
        """The numbers of these pictures with what `read` makes of each, without those that cannot be used."""
        for number, work in self._ahead(read, numbers):
            result = None
            with self._skipping(pictures, number):
                result = work.result()
            if result is not None:
                yield number, result

    @contextmanager
    def _skipping(self, pictures: Pictures, number: int):
        """Within the block, a picture that cannot be used, or that there is too little memory for, is left out; one
        that was named alone ends the run."""
        try:
            with usable(pictures.groups[number][0], pictures.flag):
                yield
        except UnusablePicture as error:
            if not pictures.are_many:
                raise
            if (pictures.flag, number) not in self.outcome.unusable:
                note_of_process(f"skipped --{error}")
                self.outcome.unusable[pictures.flag, number] = f"--{error}"

    def _load(self, pictures: Pictures, number: int) -> list[Tensor]:
        """The pictures of a content or a style, (1, 3, H, W), uint8, each; the sheets show them. Raises
        UnusablePicture, also for one that is too small to be measured."""
        config, kind = self.config, "content"
        if pictures is self.styles:
            config, kind = replace(config, imsize=config.style_size or config.imsize), "style"
        loaded = []
        for path in pictures.groups[number]:
            loaded.append(load_input(path, config, pictures.flag))
            if self.meter is not None:
                with usable(path, pictures.flag):
                    check_measurable(loaded[-1], path)
        if self._lacks((kind, number)):
            self._show((kind, number), side_by_side([pixels_to_pil(picture) for picture in loaded]))
        return loaded

    def _load_content(self, number: int) -> _Content:
        (path,), (picture,) = self.contents.groups[number], self._load(self.contents, number)
        try:
            if self.config.preserve_color is not None:
                check_colors(picture, self.config.preserve_color)
            if self.mask is not None:
                check_mask(self.mask, tuple(picture.shape[2:]))
        except UserError as error:
            raise UnusablePicture(f"{self.contents.flag} {path}: {error}") from error
        alpha = load_transparency(path, self.config, self.contents.flag)
        return _Content(picture, alpha, [model.stylizer.open(picture) for model in self.models])

    def _encode_style(self, pictures: list[Tensor]) -> _Style:
        measured = self.meter.open_style(pictures[0]) if self.meter else []
        if self.matches_colors:
            return _Style(pictures, [], measured)
        return _Style([], self._codes(pictures), measured)

    def _codes(self, pictures: list[Tensor]) -> list[Style | MaskedStyle]:
        """The style that these pictures are or make together, for every model."""
        return [combine([model.stylizer.encode_style(each) for each in pictures], self.config.style_weights, self.mask)
                for model in self.models]

    # ------------------------------------------------------------------------------------------ outputs

    def _paint_pair(
        self, pair: Pair, files: dict[int, Path], content: _Content, style: _Style, measured: MeasuredContent | None,
        bar,
    ) -> Tensor | None:
        """Paint a pair into the files, by their column. Returns what the meter measured."""
        codes = style.codes or self._codes([match_colors(each, content.picture) for each in style.pictures])
        keeps_colors = self.config.preserve_color == "luma"
        others = [self._painted_by_other(other, pair, content.picture) for other in self.others]
        outputs = []
        for column, path in files.items():
            place, strength = self.variants[column]
            model, inputs = self.models[place], (content.opened[place], codes[place], strength)
            try:
                if self.meter is None:
                    picture = model.stylizer.paint_picture(*inputs, keeps_colors=keeps_colors)
                else:
                    outputs.append(model.stylizer.paint(*inputs, keeps_colors=keeps_colors))
                    picture = to_pil(denormalize(outputs[-1]))
            except NotFinite as error:
                named = " ".join(map(str, (*self.contents.groups[pair[0]], *self.styles.groups[pair[1]])))
                raise UserError(f"load_path {model.file}: its picture of {named} has values that are not finite") \
                    from error
            self._show((*pair, column), picture)
            self._write(picture, path, content.alpha)
            bar.update()
        for column, picture in enumerate(others, len(self.variants)):
            self._show((*pair, column), pixels_to_pil(picture))
            outputs.append(normalize(picture.to(self.meter.device)))
        return None if self.meter is None else self.meter.measure(measured, style.measured, outputs).cpu()

    def _painted_by_other(self, other: PaintedFolder, pair: Pair, content: Tensor) -> Tensor:
        """The picture of a pair, (1, 3, H, W), uint8. Raises UserError where it is not of the content's size."""
        flag, path = f"painted {other.name}={other.folder}", other.files[pair]
        try:
            picture = prepare_picture(path, max_pixels=self.config.max_pixels)
        except PictureError as error:
            raise UserError(f"{flag}: {error}") from error
        (height, width), needed = picture.shape[2:], content.shape[2:]
        if (height, width) != tuple(needed):
            raise UserError(f"{flag}: {path} has {width} x {height} pixels, its content as it is painted "
                            f"{needed[1]} x {needed[0]} (--imsize, --cropsize); the same size is needed")
        return picture

    def _write(self, picture: Image.Image, path: Path, alpha: Image.Image | None) -> None:
        """Have a picture written; waits while as many others as there are threads still are. Raises UserError, also for
        one of those."""
        make_folder(path.parent, "save_path")
        self.being_written.append(self.writers.submit(save_picture, picture, path, alpha))
        if len(self.being_written) > self.threads:
            self.being_written.popleft().result()

    # ------------------------------------------------------------------------------------------- sheets

    def _lacks(self, key: Key) -> bool:
        return any(sheet.lacks(key) for sheet in self.sheets)

    def _show(self, key: Key, picture: Image.Image) -> None:
        for sheet in self.sheets:
            sheet.add(key, picture)

    def _gather(self) -> None:
        """Add what came out of the other processes to the outcome and to the sheets."""
        own = self.outcome
        self.outcome = Outcome()
        for theirs, placed in gather((own, [sheet.pictures for sheet in self.sheets])):
            self.outcome.values |= theirs.values
            self.outcome.unusable |= theirs.unusable
            self.outcome.kept += theirs.kept
            for sheet, pictures in zip(self.sheets, placed):
                sheet.pictures |= pictures

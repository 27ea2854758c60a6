"""Many pairs painted: each picture is decoded and encoded once; while one is painted, others are read and written."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path

from PIL import Image
from torch import Tensor

from data import (
    NotFinite,
    PictureError,
    denormalize,
    load_alpha,
    normalize,
    pixels_to_pil,
    read_written,
    save_picture,
    to_pil,
)
from painting.control import MaskedStyle, Style, check_colors, check_mask, combine, match_colors
from painting.pairs import PaintedFolder, Pair, Pictures
from painting.quality import MIN_SIDE, MeasuredContent, Meter
from painting.sheets import Key, Sheet, side_by_side
from painting.stylizer import Stylizer, UnusablePicture, load_input, usable
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


@dataclass(frozen=True)
class Plan:
    """What is painted in what, and where it goes."""

    contents: Pictures
    styles: Pictures
    pairs: list[Pair]
    columns: list[str]  # the names of a pair's pictures: of each model at each strength, then of `others`
    others: list[PaintedFolder]  # pictures of the same pairs, to be measured, too
    mask: Image.Image | None  # L
    folder: Path
    files: dict[Pair, list[Path]]  # to write, of each model at each strength
    sheets: list[Sheet]


@dataclass
class Outcome:
    """What came of all pairs."""

    values: dict[Pair, Tensor | None] = field(default_factory=dict)  # measured, of the pairs that could be painted
    kept: int = 0  # pictures that were there already
    unusable: dict[tuple[str, int], str] = field(default_factory=dict)  # the reasons, by flag and number
    shown: dict[Key, Image.Image] = field(default_factory=dict)  # small copies for the sheets


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
    """Paints the pairs of a plan by every model at every strength, and measures them where there is a meter."""

    def __init__(self, config, plan: Plan, models: Sequence[Model], meter: Meter | None) -> None:
        """config: a TestConfig."""
        self.config, self.plan, self.models, self.meter = config, plan, models, meter
        self.outcome = Outcome()
        self.shown = {key for sheet in plan.sheets for row in sheet.rows for key in row}
        self.cell = max((sheet.cell for sheet in plan.sheets), default=0)
        self.threads = min(usable_cores(), MOST_THREADS)

    def run(self) -> Outcome:
        """Paint what is this process's part, and return what came out of all processes.

        A picture of several that cannot be used, or that there is too little memory for, is left out with all its
        pairs. Raises UserError for an output that is not finite or cannot be written, and for a picture that was named
        alone and cannot be used.
        """
        pairs = share(self.plan.pairs)
        self.pairs = {content: [*own] for content, own in groupby(pairs, key=lambda pair: pair[0])}
        self.encoded: dict[int, _Style] = {}
        self.being_written = deque()
        pictures = len(pairs) * len(self.models) * len(self.config.style_strength)
        with ThreadPoolExecutor(self.threads) as self.pool, progress_bar(pictures, "stylise", "picture") as self.bar:
            self._each(self.plan.styles, sorted({style for _, style in pairs}), self._load_style, self._encode_style)
            contents = [*self.pairs] if self.encoded else []
            self._each(self.plan.contents, contents, self._load_content, self._paint_content)
            for each in self.being_written:
                each.result()
        outcome = Outcome()
        for own in gather(self.outcome):
            outcome.values |= own.values
            outcome.kept += own.kept
            outcome.unusable |= own.unusable
            outcome.shown |= own.shown
        return outcome

    def _each(self, pictures: Pictures, numbers: list[int], read: Callable, work: Callable) -> None:
        """Do the `work` for each number with what `read` makes of it in a thread, a few ahead, and leave out what
        cannot be used; a picture that was named alone ends the run."""
        coming = deque(self.pool.submit(read, number) for number in numbers[: self.threads])
        for place, number in enumerate(numbers):
            coming += [self.pool.submit(read, later) for later in numbers[place + self.threads :][:1]]
            try:
                with usable(pictures.groups[number][0], pictures.flag):
                    work(number, coming.popleft().result())
            except UnusablePicture as error:
                if not pictures.are_many:
                    raise
                note_of_process(f"skipped --{error}")
                self.outcome.unusable[pictures.flag, number] = f"--{error}"

    # ------------------------------------------------------------------------------------------- inputs

    def _load_style(self, number: int) -> list[Tensor]:
        """The pictures of a style, (1, 3, H, W), uint8, each. Raises UnusablePicture."""
        config = replace(self.config, imsize=self.config.style_size or self.config.imsize)
        return [self._load(path, config, self.plan.styles) for path in self.plan.styles.groups[number]]

    def _load_content(self, number: int) -> _Content:
        """Raises UnusablePicture or PictureError, also where the picture is grey or has another aspect than the mask.
        """
        config, (path,) = self.config, self.plan.contents.groups[number]
        picture = self._load(path, config, self.plan.contents)
        try:
            if config.preserve_color is not None:
                check_colors(picture, config.preserve_color)
            if self.plan.mask is not None:
                check_mask(self.plan.mask, tuple(picture.shape[2:]))
        except UserError as error:
            raise PictureError(f"{path}: {error}") from error
        alpha = load_alpha(path, config.imsize, config.cropsize, config.max_pixels)
        return _Content(picture, alpha, [model.stylizer.open(picture) for model in self.models])

    def _load(self, path: Path, config, pictures: Pictures) -> Tensor:
        return load_input(path, config, pictures.flag, MIN_SIDE if self.meter else 1)

    def _encode_style(self, number: int, pictures: list[Tensor]) -> None:
        self._show(("style", number), side_by_side([pixels_to_pil(each) for each in pictures]))
        measured = self.meter.open_style(pictures[0]) if self.meter else []
        if self.config.preserve_color == "histogram":
            self.encoded[number] = _Style(pictures, [], measured)
        else:
            self.encoded[number] = _Style([], self._codes(pictures), measured)

    def _codes(self, pictures: list[Tensor]) -> list[Style | MaskedStyle]:
        """The style that these pictures are or make together, for every model."""
        return [combine([model.stylizer.encode_style(each) for each in pictures], self.config.style_weights,
                        self.plan.mask) for model in self.models]

    # ------------------------------------------------------------------------------------------ outputs

    def _paint_content(self, number: int, content: _Content) -> None:
        """Paint all pairs of a content."""
        self._show(("content", number), pixels_to_pil(content.picture))
        measured = self.meter.open_content(content.picture) if self.meter else None
        for pair in self.pairs[number]:
            if pair[1] in self.encoded:
                self.outcome.values[pair] = self._paint_pair(pair, content, self.encoded[pair[1]], measured)

    def _paint_pair(
        self, pair: Pair, content: _Content, style: _Style, measured: MeasuredContent | None
    ) -> Tensor | None:
        """Paint the pictures of a pair that are not there yet, and have them written. Returns what the meter
        measured."""
        codes = style.codes or self._codes([match_colors(each, content.picture) for each in style.pictures])
        painters = product(range(len(self.models)), self.config.style_strength)
        outputs = []
        for column, ((model, strength), path) in enumerate(zip(painters, self.plan.files[pair])):
            picture = read_written(path) if self.config.skip_existing else None
            if picture is None:
                picture, output = self._paint(self.models[model], content.opened[model], codes[model], strength)
                outputs.append(output)
                self._write(picture, path, content.alpha)
            else:
                self.outcome.kept += 1
            self._show((*pair, column), picture)
            self.bar.update()
        for column, other in enumerate(self.plan.others, len(outputs)):
            picture = self._painted_by_other(other, pair, content.picture)
            self._show((*pair, column), pixels_to_pil(picture))
            outputs.append(normalize(picture.to(self.meter.device)))
        return self.meter.measure(measured, style.measured, outputs).cpu() if self.meter else None

    def _paint(
        self, model: Model, content: TiledPicture, style: Style | MaskedStyle, strength: float
    ) -> tuple[Image.Image, Tensor | None]:
        """The painted picture, and the output that it is of where there is a meter."""
        keeps_colors = self.config.preserve_color == "luma"
        try:
            if self.meter is None:
                return model.stylizer.paint_picture(content, style, strength, keeps_colors=keeps_colors), None
            output = model.stylizer.paint(content, style, strength, keeps_colors=keeps_colors)
            return to_pil(denormalize(output)), output
        except NotFinite as error:
            raise UserError(f"load_path {model.file}: {error}") from error

    def _painted_by_other(self, other: PaintedFolder, pair: Pair, content: Tensor) -> Tensor:
        """The picture of a pair, (1, 3, H, W), uint8. Raises UserError where it is not of the content's size."""
        flag, path = f"painted {other.name}={other.folder}", other.files[pair]
        picture = load_input(path, replace(self.config, imsize=None, cropsize=None), flag)
        if picture.shape != content.shape:
            (height, width), (rows, columns) = picture.shape[2:], content.shape[2:]
            raise UserError(f"{flag}: {path} has {width} x {height} pixels, its content as it is painted {columns} x "
                            f"{rows} (--imsize, --cropsize); the same size is needed")
        return picture

    def _write(self, picture: Image.Image, path: Path, alpha: Image.Image | None) -> None:
        """Have a picture written; waits while as many others as there are threads still are. Raises UserError, also for
        one of those."""
        make_folder(path.parent, "save_path")
        self.being_written.append(self.pool.submit(save_picture, picture, path, alpha))
        if len(self.being_written) > self.threads:
            self.being_written.popleft().result()

    def _show(self, key: Key, picture: Image.Image) -> None:
        """Keep a small copy of a picture that a sheet shows."""
        if key in self.shown:
            picture = picture.copy()
            picture.thumbnail((self.cell, self.cell))
            self.outcome.shown[key] = picture

"""Many pairs painted: each picture is decoded and encoded once; while one is painted, others are read and written."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, product
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import utils
from data import PictureError, denormalize, load_alpha, normalize, read_written, save_picture, to_pil
from painting.control import MaskedStyle, Style, check_mask
from painting.pairs import Pair, Pictures, Plan
from painting.quality import MIN_SIDE, Meter
from painting.sheets import Key
from painting.stylizer import Stylizer, UnusablePicture, load_input, usable
from painting.tiling import TiledPicture
from utils import UserError, gather, make_folder, note_of_process, progress_bar, usable_cores

MOST_THREADS = 8  # that read, and that write; as many pictures are read ahead
KEPT_STYLES = 128 * 2**20  # bytes of pictures that are not decoded again for each content that colours them


@dataclass
class Outcome:
    """What came of all pairs."""

    values: dict[Pair, Tensor | None] = field(default_factory=dict)  # measured, of the pairs that could be painted
    kept: set[Path] = field(default_factory=set)  # pictures that were there already
    unusable: dict[tuple[str, int], str] = field(default_factory=dict)  # the reasons, by flag and number
    shown: dict[Key, Image.Image] = field(default_factory=dict)  # small copies for the sheets


Content = tuple[Tensor, Image.Image | None, list[TiledPicture]]  # pixels, alpha, and its way through each network


class PairPainter:
    """Paints the pairs of a plan by every model at every strength, and measures them where there is a meter."""

    def __init__(self, config, plan: Plan, stylizers: dict[Path, Stylizer], meter: Meter | None) -> None:
        """config: a TestConfig; stylizers: by the file of the model."""
        self.config, self.plan, self.stylizers, self.meter = config, plan, stylizers, meter
        self.outcome = Outcome()
        self.shown = {key for sheet in plan.sheets for row in sheet.rows for key in row}
        self.threads, self.least_side = min(usable_cores(), MOST_THREADS), MIN_SIDE if meter else 1

    def run(self) -> Outcome:
        """Paint what is this process's part, and return what came out of all processes.

        A picture of several that cannot be used, or that there is too little memory for, is left out with all its
        pairs. Raises UserError for an output that is not finite or cannot be written, and for a picture that was named
        alone and cannot be used.
        """
        every, rank, processes = self.plan.pairs, utils.process_rank(), utils.process_count()
        pairs = every[len(every) * rank // processes : len(every) * (rank + 1) // processes]
        # Of a style by its number: its code for every model, none where each content colours its pictures first; these
        # pictures, (1, 3, H, W), uint8, each, where they are not to be decoded again; and what the meter takes of it.
        self.codes: dict[int, list[Style | MaskedStyle]] = {}
        self.kept: dict[int, list[Tensor]] = {}
        self.of_styles: dict[int, list | None] = {}
        self.being_written = deque()
        pictures = len(pairs) * len(self.stylizers) * len(self.config.style_strength)
        with ThreadPoolExecutor(self.threads) as self.pool, progress_bar(pictures, "stylise", "picture") as self.bar:
            self._each(self.plan.styles, sorted({style for _, style in pairs}), self._load_style, self._encode_style)
            self.pairs = {content: [pair for pair in own if pair[1] in self.codes]
                          for content, own in groupby(pairs, key=lambda pair: pair[0]) if self.codes}
            self._each(self.plan.contents, [*self.pairs], self._load_content, self._paint_content)
            for each in self.being_written:
                each.result()
        for outcome in gather(self.outcome):
            for name, found in vars(outcome).items():
                getattr(self.outcome, name).update(found)
        return self.outcome

    def _each(self, pictures: Pictures, numbers: list[int], read: Callable, work: Callable) -> None:
        """Do the `work` for each number with what `read` makes of it in a thread, a few ahead."""
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

    def _load_style(self, number: int) -> list[Tensor]:
        """The pictures of a style, (1, 3, H, W), uint8, each. Raises UnusablePicture."""
        config = replace(self.config, imsize=self.config.style_size or self.config.imsize)
        styles = self.plan.styles
        return [load_input(path, config, styles.flag, self.least_side) for path in styles.groups[number]]

    def _load_content(self, number: int) -> Content:
        """Raises UnusablePicture or PictureError, also where the picture has another aspect than the mask."""
        config, (path,) = self.config, self.plan.contents.groups[number]
        picture = load_input(path, config, self.plan.contents.flag, self.least_side)
        try:
            check_mask(self.plan.mask, picture)
        except UserError as error:
            raise PictureError(f"{path}: {error}") from error
        alpha = load_alpha(path, config.imsize, config.cropsize, config.max_pixels)
        return picture, alpha, [stylizer.open(picture) for stylizer in self.stylizers.values()]

    def _encode_style(self, number: int, pictures: list[Tensor]) -> None:
        self._show(("style", number), pictures[0])
        self.of_styles[number] = self.meter and self.meter.open_style(pictures[0])
        self.codes[number] = [] if self.config.preserve_color == "histogram" else self._encode(pictures)
        if not self.codes[number] and sum(each.nbytes for each in chain(pictures, *self.kept.values())) <= KEPT_STYLES:
            self.kept[number] = pictures

    def _encode(self, pictures: list[Tensor], colors_of: Tensor | None = None) -> list[Style | MaskedStyle]:
        """The style that these pictures are or make together, for every model."""
        return [stylizer.combine(pictures, self.config.style_weights, self.plan.mask, colors_of)
                for stylizer in self.stylizers.values()]

    def _paint_content(self, number: int, content: Content) -> None:
        """Paint all pairs of a content."""
        self._show(("content", number), content[0])
        measured = self.meter and self.meter.open_content(content[0])
        for pair in self.pairs[number]:
            outputs, style = self._paint_pair(pair, content), self.of_styles[pair[1]]
            self.outcome.values[pair] = self.meter and self.meter.measure(measured, style, outputs).cpu()

    def _paint_pair(self, pair: Pair, content: Content) -> list[Tensor]:
        """Paint what is not there yet of a pair, and have it written. Returns what is measured, that of others, too."""
        picture, alpha, opened = content
        codes, outputs = self.codes[pair[1]], []
        painters = product(enumerate(self.stylizers), self.config.style_strength)
        for column, (((number, model), strength), path) in enumerate(zip(painters, self.plan.files[pair])):
            painted = read_written(path) if self.config.skip_existing else None
            if painted is None:
                codes = codes or self._encode(self.kept.get(pair[1]) or self._load_style(pair[1]), picture)
                painted, output = self._paint(model, opened[number], codes[number], strength)
                outputs.append(output)
                self._write(painted, path, alpha)
            else:
                self.outcome.kept.add(path)
            self._show((*pair, column), painted)
            self.bar.update()
        for column, (name, files) in enumerate(self.plan.others.items(), len(outputs)):
            other = load_input(files[pair], replace(self.config, imsize=None, cropsize=None), "painted")
            if other.shape != picture.shape:
                raise UserError(f"painted {name}: {files[pair]} has {other.shape[3]} x {other.shape[2]} pixels, its "
                                f"content as it is painted {picture.shape[3]} x {picture.shape[2]} (--imsize, "
                                "--cropsize); the same size is needed")
            self._show((*pair, column), other)
            outputs.append(normalize(other.to(self.meter.device)))
        return outputs

    def _paint(self, model: Path, content: TiledPicture, style: Style | MaskedStyle,
               strength: float) -> tuple[Image.Image, Tensor | None]:
        """The painted picture, and the output that it is of where there is a meter."""
        stylizer, keeps_colors = self.stylizers[model], self.config.preserve_color == "luma"
        try:
            paint = stylizer.paint if self.meter else stylizer.paint_picture
            painted = paint(content, style, strength, keeps_colors=keeps_colors)
            return (to_pil(denormalize(painted)), painted) if self.meter else (painted, None)
        except UserError as error:  # not finite
            raise UserError(f"load_path {model}: {error}") from error

    def _write(self, picture: Image.Image, path: Path, alpha: Image.Image | None) -> None:
        """Have a picture written; waits where too many still are. Raises UserError, also for one of those."""
        make_folder(path.parent, "save_path")
        self.being_written.append(self.pool.submit(save_picture, picture, path, alpha))
        if len(self.being_written) > self.threads:
            self.being_written.popleft().result()

    def _show(self, key: Key, picture: Tensor | Image.Image) -> None:
        """Keep a small copy of a picture that a sheet shows."""
        if key in self.shown:
            picture = to_pil_image(picture[0]) if isinstance(picture, Tensor) else picture.copy()
            picture.thumbnail((max(sheet.cell for sheet in self.plan.sheets),) * 2)
            self.outcome.shown[key] = picture

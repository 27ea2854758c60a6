"""Many pairs painted: each picture is decoded and encoded once, while others are computed and written."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, product
from pathlib import Path
from threading import Lock, Semaphore

import torch
from PIL import Image
from torch import Tensor

from data import NotFinite, denormalize, pixels_to_pil, read_written, save_picture, to_pil
from painting.control import MaskedStyle, Style, check_colors, check_mask, combine, match_colors
from painting.pairs import Pair, Pictures, load_measurable
from painting.quality import Meter
from painting.sheets import Sheet, side_by_side
from painting.stylizer import Stylizer, UnusablePicture, load_input, load_transparency, usable
from painting.tiling import TiledPicture
from utils import UserError, gather, note_of_process, progress_bar, share, usable_cores

MOST_WORKERS = 8
PIXELS_AT_ONCE = 4_000_000  # of the pictures that a CPU computes at a time: an unpruned network takes 0.8 kB for each
PIXELS_HELD = 16_000_000  # of the contents that are at hand


@dataclass(frozen=True)
class Model:
    """A network to paint with: its name in tables and folders, its file, and what else the file says."""

    name: str
    file: Path
    stylizer: Stylizer
    checkpoint: dict


@dataclass
class Skipped:
    """What could not be used, said at once and again at the end."""

    pictures: dict[tuple[str, int], str] = field(default_factory=dict)  # the reason, by flag and number
    pairs: int = 0  # left out because of it

    @property
    def reasons(self) -> list[str]:
        return list(self.pictures.values())

    def add(self, pictures: Pictures, number: int, reason: str) -> None:
        if (pictures.flag, number) not in self.pictures:
            note_of_process(f"skipped {reason}")
            self.pictures[pictures.flag, number] = reason

    def summary(self) -> str:
        pictures, pairs = (f"{count} {name}{'s' * (count != 1)}"
                           for count, name in ((len(self.pictures), "picture"), (self.pairs, "pair")))
        return "\n".join((f"could not be used: {pictures}; left out: {pairs}",
                          *(f"  {reason}" for reason in self.reasons)))


# ------------------------------------------------------------------------------------------------ workers


class Workers:
    """Threads that decode, compute and write side by side; only so many compute at a time as the device has room for.

    On a CPU each core computes a picture of its own, which takes less time than one picture after the other by all
    cores. A large picture, and one that is alone, is computed by more of them.
    """

    def __init__(self, device: torch.device) -> None:
        cores = usable_cores()
        self.is_cpu = device.type == "cpu"
        self.threads = torch.get_num_threads()
        self.slots = min(cores, self.threads) if self.is_cpu else 1
        self.count = max(self.slots, min(cores, MOST_WORKERS))
        self.expected = 1
        self._free, self._turn = Semaphore(self.slots), Lock()
        self._pool = ThreadPoolExecutor(self.count)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)  # for threads to come

    def start(self, work: Callable, *arguments) -> Future:
        """Have `work` done; works begin in the order in which they are given."""
        return self._pool.submit(work, *arguments)

    @contextmanager
    def computing(self, pixels: int | None):
        """Within the block this thread computes a picture of so many pixels; None: and no other computes.

        Where fewer pictures are `expected` than there are cores, these share the cores.
        """
        taken = self.slots
        if pixels is not None:
            taken //= min(self.slots, self.expected)
            taken = min(self.slots, max(taken, -(-self.slots * pixels // PIXELS_AT_ONCE)))
        with self._turn:  # of several that wait, each would else hold a part of what the others need
            for _ in range(taken):
                self._free.acquire()
        try:
            if self.is_cpu:
                torch.set_num_threads(taken)  # of this thread alone
            yield
        finally:
            self._free.release(taken)


# ----------------------------------------------------------------------------------------------- painting


@dataclass(frozen=True)
class _Content:
    """A content picture on its way through each model's network; alpha: how opaque it is, mode L."""

    picture: Tensor  # (1, 3, H, W), uint8
    alpha: Image.Image | None
    opened: list[TiledPicture]

    @property
    def pixels(self) -> int:
        return _pixels(self.picture)


class Painting:
    """Paints pairs of pictures by every model at every strength."""

    def __init__(
        self, models: list[Model], config, contents: Pictures, styles: Pictures, sheets: list[Sheet],
        meter: Meter | None, skipped: Skipped, mask: Image.Image | None = None,
    ) -> None:
        """config: a TestConfig. sheets: where all pictures are placed. mask: of `--mask`, mode L.

        A picture of several that cannot be used, or that there is too little memory for, comes to `skipped`, and is
        left out with all its pairs.
        """
        self.models, self.config, self.contents, self.styles = models, config, contents, styles
        self.sheets, self.meter, self.skipped, self.mask = sheets, meter, skipped, mask
        self.matches_colors = config.preserve_color == "histogram"  # of the style, to each content's
        self.variants = list(product(range(len(models)), config.style_strength))
        self.device = models[0].stylizer.device

    def paint(
        self, files: dict[Pair, list[Path]], begin: Callable[[], object]
    ) -> tuple[dict[Pair, Tensor | None], int]:
        """files: those to write of every pair, for each model one a strength. begin: is called before the first.

        Several processes share the pairs; each returns, and has on its sheets, what came out of all. Returns by pair
        what the meter measured, (models * strengths, metrics), float64, or None without a meter; and how many pictures
        were there already. Raises UserError for an output that is not finite or cannot be written, and for a picture
        that was named alone and cannot be used.
        """
        todo = [_Todo(pair, dict(enumerate(paths))) for pair, paths in files.items()]
        values, kept = {}, 0
        with Workers(self.device) as workers:
            if self.config.skip_existing:
                is_there = [all(path.exists() for path in each.paths.values()) for each in todo]
                todo = [each for there in (True, False)  # shared out apart, so that all processes have as much to do
                        for each in share([each for each, found in zip(todo, is_there) if found == there])]
                kept = sum(future.result() for future in [workers.start(self._keep_written, each) for each in todo])
                values = {each.pair: None for each in todo if not each.paths}
                todo = sorted((each for each in todo if each.paths), key=lambda each: each.pair)
            else:
                todo = share(todo)
            values |= self._paint_all(todo, begin, workers)
            kept = self._gather(values, kept)
            self._show_inputs(values, workers)
        return values, kept

    def _paint_all(
        self, todo: list["_Todo"], begin: Callable[[], object], workers: Workers
    ) -> dict[Pair, Tensor | None]:
        """What the meter measured of those that could be painted."""
        by_content = {number: [*same] for number, same in groupby(todo, key=lambda each: each.pair[0])}
        contents = self._open_contents([*by_content], workers)
        first = next(contents, None)  # where there is none, nothing else need be tried
        workers.expected = styles = len({each.pair[1] for each in todo})
        codes = self._encode_styles({each.pair[1] for each in todo}, workers) if first else {}
        workers.expected = len(todo) if styles else 1
        running, values = deque(), {}
        with progress_bar(sum(len(each.paths) for each in todo), "stylise", "picture") as bar:
            for number, content in chain([first] if first else (), contents):
                for each in by_content[number]:
                    if each.pair[1] not in codes:
                        continue
                    if begin is not None:
                        begin()
                        begin = None
                    work = workers.start(self._paint_pair, each, content, codes[each.pair[1]], bar, workers)
                    running.append((each.pair, work))
                while running and running[0][1].done():
                    self._collect(*running.popleft(), values)
            while running:
                self._collect(*running.popleft(), values)
            bar.total = bar.n  # what was left out counts no longer
        return values

    def _collect(self, pair: Pair, work: Future, values: dict[Pair, Tensor | None]) -> None:
        try:
            values[pair] = work.result()
        except UnusablePicture as error:
            self._skip(self.contents, pair[0], error)

    def _skip(self, pictures: Pictures, number: int, error: UnusablePicture) -> None:
        if not pictures.are_many:
            raise error
        self.skipped.add(pictures, number, f"--{error}")

    # ------------------------------------------------------------------------------------------- inputs

    def _open_contents(self, numbers: list[int], workers: Workers) -> Iterator[tuple[int, _Content]]:
        """Those that can be used, in order; further ones are opened meanwhile."""
        left, begun, ahead = deque(numbers), deque(), 1
        while left or begun:
            while left and len(begun) <= ahead:
                begun.append((left[0], workers.start(self._open_content, left.popleft(), workers)))
            number, work = begun.popleft()
            content = self._result(work, self.contents, number, self._open_content, workers)
            if content is not None:
                ahead = max(1, min(workers.count, PIXELS_HELD // content.pixels))
                yield number, content

    def _encode_styles(self, numbers: set[int], workers: Workers) -> dict[int, list]:
        """Those that can be used, see `_encode_style`."""
        begun = [(number, workers.start(self._encode_style, number, workers)) for number in sorted(numbers)]
        codes = {number: self._result(work, self.styles, number, self._encode_style, workers)
                 for number, work in begun}
        return {number: code for number, code in codes.items() if code is not None}

    def _result(self, work: Future, pictures: Pictures, number: int, again: Callable, workers: Workers):
        """What has come of a picture; None where it cannot be used. One that failed beside others may have lacked the
        memory that they took, and gets another chance."""
        try:
            return work.result()
        except UnusablePicture:
            try:
                return again(number, workers, alone=True)
            except UnusablePicture as error:
                self._skip(pictures, number, error)

    def _open_content(self, number: int, workers: Workers, alone: bool = False) -> _Content:
        path, flag = self.contents.paths[number], self.contents.flag
        (picture,) = self._load(self.contents, number)
        try:
            if self.config.preserve_color is not None:
                check_colors(picture, self.config.preserve_color)
            if self.mask is not None:
                check_mask(self.mask, tuple(picture.shape[2:]))
        except UserError as error:
            raise UnusablePicture(f"{flag} {path}: {error}") from error
        alpha = load_transparency(path, self.config, flag)
        with usable(path, flag), workers.computing(None if alone else _pixels(picture)):
            opened = [model.stylizer.open(picture) for model in self.models]
            for each in opened:
                each.statistics()  # encodes it
        self._show_input([picture], ("content", number))
        return _Content(picture, alpha, opened)

    def _encode_style(self, number: int, workers: Workers, alone: bool = False) -> list:
        """For every model a Style or MaskedStyle; the pictures themselves where each content colours them first."""
        pictures = self._load(self.styles, number)
        with usable(self.styles.of(number)[0], self.styles.flag), \
                workers.computing(None if alone else max(map(_pixels, pictures))):
            codes = pictures if self.matches_colors else self._combine(pictures)
        self._show_input(pictures, ("style", number))
        return codes

    def _combine(self, pictures: list[Tensor]) -> list[Style | MaskedStyle]:
        """The style that these pictures are or make together, for every model."""
        return [combine([model.stylizer.encode_style(each) for each in pictures], self.config.style_weights, self.mask)
                for model in self.models]

    def _load(self, pictures: Pictures, number: int) -> list[Tensor]:
        """A picture, or those of a style, (1, 3, H, W), uint8, each. Raises UnusablePicture, also for one that is too
        small to be measured."""
        config = self.config
        if pictures is self.styles and config.style_size is not None:
            config = replace(config, imsize=config.style_size)
        load = load_input if self.meter is None else partial(load_measurable, measured_by="--metrics")
        return [load(path, config, pictures.flag) for path in pictures.of(number)]

    # ------------------------------------------------------------------------------------------ outputs

    def _paint_pair(self, todo: "_Todo", content: _Content, codes: list, bar, workers: Workers) -> Tensor | None:
        """Returns what the meter measured. Raises UnusablePicture when the content needs too much memory."""
        outputs = {}
        try:
            return self._paint_outputs(todo, content, codes, outputs, bar, workers, content.pixels)
        except UnusablePicture:  # for lack of the memory that others took, perhaps
            return self._paint_outputs(todo, content, codes, outputs, bar, workers, None)

    def _paint_outputs(
        self, todo: "_Todo", content: _Content, codes: list, outputs: dict[int, Tensor], bar, workers: Workers,
        pixels: int | None,
    ) -> Tensor | None:
        number, style = todo.pair
        with usable(self.contents.paths[number], self.contents.flag):
            if self.matches_colors:
                with workers.computing(pixels):
                    codes = self._combine([match_colors(each, content.picture) for each in codes])
            for column, path in list(todo.paths.items()):
                place, strength = self.variants[column]
                model = self.models[place]
                painted = content.opened[place], codes[place], strength
                keeps = self.config.preserve_color == "luma"
                try:
                    with workers.computing(pixels):
                        if self.meter is None:
                            picture = model.stylizer.paint_picture(*painted, keeps_colors=keeps)
                        else:
                            outputs[column] = model.stylizer.paint(*painted, keeps_colors=keeps)
                            picture = to_pil(denormalize(outputs[column]))
                except NotFinite as error:
                    raise UserError(f"--load_path {model.file}: its picture of {self.contents.paths[number]} and "
                                    f"{' '.join(map(str, self.styles.of(style)))} has values that are not finite") \
                        from error
                save_picture(picture, path, content.alpha)
                self._show(picture, (*todo.pair, column))
                del todo.paths[column]
                with bar.get_lock():
                    bar.update()
            if self.meter is None:
                return None
            (picture,) = self._load(self.styles, style)
            with workers.computing(pixels):
                return self.meter.measure(content.picture, picture, list(outputs.values())).cpu()

    def _keep_written(self, todo: "_Todo") -> int:
        """Take off those that are there already. Returns how many."""
        pictures = {column: read_written(path) for column, path in todo.paths.items()}
        for column, picture in pictures.items():
            if picture is not None:
                self._show(picture, (*todo.pair, column))
                del todo.paths[column]
        return sum(picture is not None for picture in pictures.values())

    # ------------------------------------------------------------------------------------------- sheets

    def _show(self, picture: Image.Image, key: tuple) -> None:
        for sheet in self.sheets:
            sheet.place(picture, key)

    def _show_input(self, pictures: list[Tensor], key: tuple) -> None:
        if self.sheets:
            self._show(side_by_side([pixels_to_pil(each) for each in pictures]), key)

    def _show_inputs(self, pairs: Iterable[Pair], workers: Workers) -> None:
        """Contents and styles of these pairs, where all their pictures were there and nothing else needed them."""
        started = []
        for pictures, kind, place in ((self.contents, "content", 0), (self.styles, "style", 1)):
            for number in sorted({pair[place] for pair in pairs}):
                if any(sheet.lacks((kind, number)) for sheet in self.sheets):
                    started.append((pictures, number, workers.start(self._open_input, pictures, kind, number)))
        for pictures, number, work in started:
            try:
                work.result()
            except UnusablePicture as error:
                self._skip(pictures, number, error)

    def _open_input(self, pictures: Pictures, kind: str, number: int) -> None:
        self._show_input(self._load(pictures, number), (kind, number))

    def _gather(self, values: dict[Pair, Tensor | None], kept: int) -> int:
        """Add what the other processes have, to `values`, on the sheets, and of pictures that they skipped. Returns the
        sum of `kept`."""
        own = values.copy(), self.skipped.pictures, [sheet.placed for sheet in self.sheets], kept
        total = 0
        for theirs, skipped, placed, count in gather(own):
            values |= theirs
            self.skipped.pictures |= skipped
            for sheet, pictures in zip(self.sheets, placed):
                sheet.placed |= pictures
            total += count
        return total


@dataclass
class _Todo:
    """The pictures of a pair that are still to be written, by their place among the variants."""

    pair: Pair
    paths: dict[int, Path]


def _pixels(picture: Tensor) -> int:
    return picture.shape[2] * picture.shape[3]

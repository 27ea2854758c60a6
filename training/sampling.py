"""Training pictures by position: what a crop shows, kept decoded on disk, drawn by workers, batch by batch."""

import hashlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import archives
from data import MAX_PIXELS, FailedPictures, PictureError, load_resized, load_triple
from utils import UserError, note, write_atomically

WAIT = 1  # seconds for a batch, between two looks whether the run is to stop
MAX_DRAWS = 50  # pictures tried for one position: more failing in a row is a folder that went away
DECODING = 3  # goes up when the same file gives other pixels than before: what is cached is then made anew


@dataclass(frozen=True)
class CropConfig:
    """How a training picture is cut: shorter side to `imsize`, then a square of `cropsize` pixels."""

    imsize: int
    cropsize: int
    centered: bool
    max_pixels: int

    @property
    def shorter_side(self) -> int:
        """What the shorter side is brought to: a picture smaller than the crop is enlarged to it."""
        return max(self.imsize, self.cropsize)


class PictureCache:
    """Resized pictures on disk, decoded once: `load_resized` of the same pixels, without the decoding.

    One uncompressed .npy file a picture and size, (H, W, 3), uint8, of which a crop reads only its rows. A
    file's name tells the picture's path, and the size and time of its last change, so that a changed
    picture is decoded anew. Files are written under another name and renamed, so any number of processes
    and runs may share a folder and be killed at any moment.
    """

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        self.folder = Path(folder)
        self.max_pixels = max_pixels
        self.is_full = False

    def open(self, path: Path, size: int) -> np.ndarray:
        """The picture at `path` with its shorter side at `size`: (H, W, 3), uint8, mapped from its file.

        Raises PictureError as `load_resized` does.
        """
        file = self.file_of(path, size)
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # not there yet; or cut short, by a crash of the machine say
            pass
        picture = np.asarray(load_resized(path, size, self.max_pixels))
        self._write(picture, file)
        return picture

    def file_of(self, path: Path, size: int) -> Path:
        """Where the cached picture belongs. Raises PictureError when `path` cannot be looked at."""
        try:
            real, version = archives.identity(path)
        except (OSError, ValueError) as error:
            raise PictureError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        # What decides the pixels: the file and how it is decoded.
        picture = _digest(real, size, self.max_pixels)
        return self.folder / picture[:2] / f"{picture}-{_digest(*version, DECODING)}.npy"

    def _write(self, picture: np.ndarray, file: Path) -> None:
        if self.is_full:
            return
        try:
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, lambda handle: np.save(handle, picture))
        except OSError as error:
            self.is_full = True
            note(f"--cache_dir {self.folder}: cannot be written to ({error.strerror}); pictures that are not in it "
                 "yet are decoded each time")
            return
        for old in file.parent.glob(f"{file.name.split('-')[0]}-*.npy"):  # of the picture before it changed
            if old != file:
                old.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Delete what killed runs left half-written, an hour ago or more: a younger one may be in the making."""
        for temporary in self.folder.glob("??/.*.tmp"):
            try:
                if time.time() - temporary.stat().st_mtime > 3600.0:
                    temporary.unlink()
            except FileNotFoundError:  # another run was quicker
                continue


def _digest(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]


class PicturesByPosition(Dataset):
    """Crops by position: what position n shows depends on seed and n alone.

    So workers share no state and repeat nothing, any number of them gives the same run, and a resumed
    run goes on by counting. Every epoch goes through each folder once, in an order of its own.
    A picture that fails is replaced by another, drawn by the same position. With a `cache` every picture is
    decoded and resized once, and shows the same pixels.
    """

    def __init__(
        self, folders: Sequence[list[Path]], crop: CropConfig, seed: int, cache: PictureCache | None = None
    ) -> None:
        self.folders = folders
        self.crop = crop
        self.seed = seed
        self.cache = cache
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def _draw(self, number: int, position: int, failures: list) -> Tensor:
        paths = self.folders[number]
        epoch, place = divmod(position, len(paths))
        generator = np.random.default_rng((self.seed, number, 1, position))
        index = self._order(number, epoch)[place]
        for _ in range(MAX_DRAWS):
            path = paths[index]
            try:
                return self._cut(path, generator)
            except PictureError as error:
                failures.append((number, str(path), str(error)))
            index = generator.integers(len(paths))
        # Never learned from: `check_failures` stops the run in the main process, where one line can be said.
        return torch.zeros(3, self.crop.cropsize, self.crop.cropsize, dtype=torch.uint8)

    def _order(self, number: int, epoch: int) -> np.ndarray:
        cached = self._orders.get(number)
        if cached is None or cached[0] != epoch:
            generator = np.random.default_rng((self.seed, number, 0, epoch))
            cached = self._orders[number] = (epoch, generator.permutation(len(self.folders[number])))
        return cached[1]

    def _cut(self, path: Path, generator: np.random.Generator) -> Tensor:
        if self.cache is None:
            return self._crop(load_resized(path, self.crop.shorter_side, self.crop.max_pixels), generator)
        return self._crop(self.cache.open(path, self.crop.shorter_side), generator)

    def _crop(self, picture: np.ndarray | Image.Image, generator: np.random.Generator) -> Tensor:
        """(H, W, C) to (C, cropsize, cropsize)."""
        picture = np.asarray(picture)
        side = self.crop.cropsize
        height, width, _ = picture.shape
        if self.crop.centered:
            left, top = (width - side) // 2, (height - side) // 2
        else:
            left, top = (int(generator.integers(free + 1)) for free in (width - side, height - side))
        crop = picture[top : top + side, left : left + side].transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(crop))


class TrainingPictures(PicturesByPosition):
    """A content and a style crop by position."""

    def __init__(
        self, content: list[Path], style: list[Path], crop: CropConfig, seed: int, cache: PictureCache | None = None
    ) -> None:
        super().__init__((content, style), crop, seed, cache)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, list[tuple[int, str, str]]]:
        """Returns content and style, each (3, cropsize, cropsize), uint8, and the failures met on the way,
        as (folder number, path, reason)."""
        failures = []
        content, style = (self._draw(number, position, failures) for number in range(2))
        return content, style, failures


class MixedPictures(PicturesByPosition):
    """One crop by position, from the folders in turn."""

    def __getitem__(self, position: int) -> tuple[Tensor, list[tuple[int, str, str]]]:
        """Returns the crop, (3, cropsize, cropsize), uint8, and failures as TrainingPictures does."""
        failures = []
        place, number = divmod(position, len(self.folders))
        return self._draw(number, place, failures), failures


class PaintedTriples(PicturesByPosition):
    """Crops of content, style and painted picture by position, content and painted cut at the same place."""

    def __init__(
        self, folders: Sequence[list[Path]], crop: CropConfig, seed: int, partners: dict[Path, tuple[Path, Path]]
    ) -> None:
        """folders: the content pictures, one list of them; partners: see `open_triples`."""
        super().__init__(folders, crop, seed)
        self.partners = partners

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, str, str]]]:
        """Returns content, style and painted, each (3, cropsize, cropsize), uint8, and failures as TrainingPictures
        does."""
        failures = []
        triple = self._draw(0, position, failures).expand(3, 3, -1, -1)  # what could not be drawn is one blank
        return *triple, failures

    def _cut(self, path: Path, generator: np.random.Generator) -> Tensor:
        content, style, painted = load_triple(
            path, *self.partners[path], self.crop.shorter_side, self.crop.max_pixels
        )
        both = self._crop(np.concatenate([content, painted], axis=2), generator)  # (6, side, side)
        return torch.stack([both[:3], self._crop(style, generator), both[3:]])


def check_failures(failures: list[tuple[int, str, str]], tallies: Sequence[FailedPictures]) -> None:
    """Log and count the failures of a batch. Raises UserError when a folder has become unusable."""
    for number, path, reason in failures:
        tallies[number].add(path, reason)
    if len(failures) >= MAX_DRAWS:
        raise UserError(f"{len(failures)} pictures in a row cannot be used (the last: {failures[-1][2]})")


def collate(samples: list) -> tuple:
    """Stack the pictures of a batch, (B, 3, H, W), uint8, as many as a sample has, and all failures in one list."""
    *pictures, failures = zip(*samples)
    return *map(torch.stack, pictures), sum(failures, [])


class _Batch:
    """A batch on its way from a worker: arrays go through the worker's pipe, tensors would go through /dev/shm, which
    is small in a container."""

    def __init__(self, samples: list) -> None:
        *pictures, self.failures = collate(samples)
        self.pictures = [picture.numpy() for picture in pictures]

    def pin_memory(self) -> "_Batch":
        self.pictures = [torch.from_numpy(picture).pin_memory() for picture in self.pictures]
        return self

    def unpack(self) -> tuple:
        """As `collate` gives it."""
        return *map(torch.as_tensor, self.pictures), self.failures


def _begin_worker(_worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process finishes its step
    # and needs its workers alive until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def shard_positions(seen: int, iterations: int, batch_size: int, rank: int, processes: int) -> list[int]:
    """The positions that process `rank` draws in the coming iterations, after `seen` samples by all processes.

    Iteration i takes the next batch_size * processes positions; each process a run of batch_size of them.
    """
    whole = batch_size * processes
    starts = range(seen + rank * batch_size, seen + rank * batch_size + iterations * whole, whole)
    return [start + offset for start in starts for offset in range(batch_size)]


def training_batches(
    pictures: PicturesByPosition, positions: Iterable[int], batch_size: int, num_workers: int, pin_memory: bool,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple]:
    """Batches of the given positions, in order, as `collate` gives them. `positions` must hold whole batches.

    Ends early when `stop` says so while a batch is waited for. Raises UserError when worker processes cannot be
    started; when one is killed, DataLoader raises a RuntimeError, wherever this process is at that moment.
    """
    loader = DataLoader(
        pictures, batch_size, sampler=positions, num_workers=num_workers, collate_fn=_Batch,
        pin_memory=pin_memory, worker_init_fn=_begin_worker, prefetch_factor=4 if num_workers else None,
        timeout=WAIT if num_workers else 0,
        # Its own generator: drawing the workers' base seed must not move the run's random state.
        generator=torch.Generator(),
    )
    try:
        batches = iter(loader)
    except OSError as error:  # too few file descriptors, processes, or places for semaphores in /dev/shm
        raise UserError(f"--num_workers {num_workers}: the processes that decode pictures cannot be started "
                        f"({error.strerror}); fewer, or 0, need less") from error
    try:
        while True:
            try:
                yield next(batches).unpack()
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                if stop():
                    return
    finally:
        _end_workers()


def _end_workers() -> None:
    """Kill what is left of the workers: they are deaf to gentler signals, and this process would wait for their end."""
    if threading.current_thread() is not threading.main_thread():
        return
    # torch's handler would take their end for an accident.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if hasattr(signal, "SIGCHLD") else None
    try:
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)

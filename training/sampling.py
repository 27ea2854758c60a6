"""Training pictures by position: what a crop shows, kept decoded on disk, drawn by workers, batch by batch."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import archives
from data import MAX_PIXELS, PictureError, load_picture
from folders import FailedPictures
from utils import STOP_SIGNALS, UserError, note, write_atomically

MAX_DRAWS = 50  # pictures tried for one position: more failing in a row is a folder that went away
DECODING = 3  # goes up when the same file gives other pixels than before: what is cached is then made anew

Failure = tuple[int, str, str]  # number of the folder, path, reason


class PictureCache:
    """Resized pictures on disk, decoded once: one uncompressed .npy file a picture and size, (H, W, 3), uint8, of which
    a crop reads only its rows. Its name tells the picture's path, and the size and time of its last change. Any number
    of processes and runs may share a folder and be killed at any moment."""

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        self.folder, self.max_pixels, self.is_full = Path(folder), max_pixels, False

    def open(self, path: Path, size: int) -> np.ndarray:
        """The picture with its shorter side at `size`: (H, W, 3), uint8. Raises PictureError as `load_picture` does."""
        file = self.file_of(path, size)
        with suppress(OSError, ValueError, EOFError):  # not there yet; or cut short, by a crash of the machine say
            return np.load(file, mmap_mode="r", allow_pickle=False)
        picture = np.asarray(load_picture(path, size, max_pixels=self.max_pixels))
        if not self.is_full:
            self._write(picture, file)
        return picture

    def file_of(self, path: Path, size: int) -> Path:
        """Where the cached picture belongs. Raises PictureError when `path` cannot be looked at."""
        try:
            real, version = archives.identity(path)
        except (OSError, ValueError) as error:
            raise PictureError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        picture = _digest(real, size, self.max_pixels)
        return self.folder / picture[:2] / f"{picture}-{_digest(*version, DECODING)}.npy"

    def _write(self, picture: np.ndarray, file: Path) -> None:
        try:
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, lambda handle: np.save(handle, picture))
        except OSError as error:
            self.is_full = True
            note(f"--cache_dir {self.folder}: cannot be written to ({error.strerror}); new pictures are left out")
            return
        for old in file.parent.glob(f"{file.name.split('-')[0]}-*.npy"):  # of the picture before it changed
            if old != file:
                with suppress(OSError):  # another process may have just that open
                    old.unlink()


def _digest(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]


class TrainingPictures(Dataset):
    """A crop from each folder by position: what position n shows depends on seed and n alone.

    So any number of workers gives the same run, and a resumed run goes on by counting. Every epoch goes through each
    folder once, in an order of its own. A picture that fails is replaced by another, drawn by the same position.
    """

    def __init__(self, folders: Sequence[list[Path]], config, cache: PictureCache | None = None) -> None:
        """folders: the pictures of each. config: of a mode. Its `imsize` is that of the shorter side, which is enlarged
        where the square of `cropsize` would not fit."""
        self.folders, self.config, self.seed = folders, config, config.seed
        self.load = cache.open if cache else partial(load_picture, max_pixels=config.max_pixels)

    def __getitem__(self, position: int) -> tuple[Tensor | list[Failure], ...]:
        """Returns the crops, each (3, cropsize, cropsize), uint8, and last the failures met on the way."""
        failures = []
        return *(self._draw(number, position, failures) for number in range(len(self.folders))), failures

    def _draw(self, number: int, position: int, failures: list[Failure]) -> Tensor:
        """A crop from folder `number`; what cannot be used joins `failures`."""
        paths = self.folders[number]
        epoch, place = divmod(position, len(paths))
        generator = np.random.default_rng((self.seed, number, 1, position))
        index = _order(self.seed, number, epoch, len(paths))[place]
        for _ in range(MAX_DRAWS):
            path = paths[index]
            try:
                return self._cut(path, generator)
            except PictureError as error:
                failures.append((number, str(path), str(error)))
            index = generator.integers(len(paths))
        # Never learned from: `count_failures` stops the run in the main process, where one line can be said.
        return torch.zeros(3, self.config.cropsize, self.config.cropsize, dtype=torch.uint8)

    def _cut(self, path: Path, generator: np.random.Generator) -> Tensor:
        side = self.config.cropsize
        picture = np.asarray(self.load(path, max(self.config.imsize, side)))  # (H, W, 3)
        free = [length - side for length in picture.shape[1::-1]]  # to the right, below
        left, top = (each // 2 if self.config.cencrop else int(generator.integers(each + 1)) for each in free)
        crop = picture[top : top + side, left : left + side].transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(crop))


class MixedPictures(TrainingPictures):
    """One crop by position, from the folders in turn."""

    def __getitem__(self, position: int) -> tuple[Tensor | list[Failure], ...]:
        failures = []
        place, number = divmod(position, len(self.folders))
        return self._draw(number, place, failures), failures


@lru_cache(maxsize=4)
def _order(seed: int, number: int, epoch: int, pictures: int) -> np.ndarray:
    """In which order an epoch goes through the pictures of folder `number`."""
    return np.random.default_rng((seed, number, 0, epoch)).permutation(pictures)


def count_failures(failures: list[Failure], tallies: Sequence[FailedPictures]) -> None:
    """Log and count the failures of a batch. Raises UserError when a folder has become unusable."""
    for number, path, reason in failures:
        tallies[number].add(path, reason)
    if len(failures) >= MAX_DRAWS:
        raise UserError(f"{len(failures)} pictures in a row cannot be used (the last: {failures[-1][2]})")


def training_batches(pictures: TrainingPictures, positions: Iterable[int], batch_size: int, num_workers: int,
                     pin_memory: bool) -> Iterator[tuple]:
    """Batches of the given positions, in order: the pictures of a sample stacked, (B, 3, H, W), uint8, each, and all
    failures in one list. When a worker process is killed, DataLoader raises a RuntimeError wherever this one is."""
    ending = (torch.multiprocessing if num_workers else threading).Event()
    batches = iter(DataLoader(  # a name keeps the workers until `ending` is set
        pictures, batch_size, sampler=positions, num_workers=num_workers, collate_fn=_as_arrays,
        worker_init_fn=partial(_begin_worker, ending), prefetch_factor=4 if num_workers else None,
        # Its own generator: drawing the workers' base seed must not move the run's random state.
        generator=torch.Generator(),
    ))
    try:
        for *arrays, failures in batches:
            tensors = map(torch.from_numpy, arrays)
            yield *(tensor.pin_memory() if pin_memory else tensor for tensor in tensors), failures
    finally:
        ending.set()


def _as_arrays(samples: list) -> tuple:
    """Stack a batch. Arrays go through the worker's pipe; tensors would go through /dev/shm, small in a container."""
    *pictures, failures = zip(*samples)
    return *(torch.stack(each).numpy() for each in pictures), sum(failures, [])


def _begin_worker(ending, _worker: int) -> None:
    """Let stop signals pass: they reach every process, and the main one needs its workers until it has saved. Once
    `ending` is set, SIGTERM, by which DataLoader ends a worker that hangs, does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: ending.is_set() and os._exit(0))


def first_pictures(pictures: TrainingPictures, count: int, tallies: Sequence[FailedPictures]) -> list[Tensor]:
    """The pictures of the first `count` positions, (count, 3, H, W), uint8, each; failures are counted."""
    *shown, failures = next(training_batches(pictures, range(count), count, 0, pin_memory=False))
    count_failures(failures, tallies)
    return shown

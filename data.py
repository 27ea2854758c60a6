"""Images in and out: finding, decoding, cropping and sampling pictures; normalisation; saving and grids."""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from utils import UserError, note, usable_cores, write_atomically

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Any suffix that names a picture file to write (reading goes by content, not by suffix).
OUTPUT_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF",
                  ".tiff": "TIFF"}
MAX_PIXELS = 500_000_000  # Painter by Numbers goes up to about 200 million
MAX_FAILED_SHARE = 0.10
MAX_DRAWS = 50  # pictures tried for one position: more failing in a row is a folder that went away
STARTUP_CHECK = 256  # pictures a folder that are decoded before a run starts
TRIPLE = ("content", "style", "painted")  # the folders of pictures painted by anyone, see `open_triples`

# Pillow's own limit (89 and 179 million pixels) is below real paintings; --max_pixels stands in for it.
Image.MAX_IMAGE_PIXELS = None


class PictureError(Exception):
    """A picture that cannot be used; the message names the file and the reason."""


# ------------------------------------------------------------------------------------------- one picture


def load_picture(path: Path, shorter_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of any common kind to upright 8-bit RGB.

    Transparent pixels are laid on white. With `shorter_side`, a JPEG may be decoded at 1/2, 1/4 or 1/8
    of its size, never below `shorter_side` (far faster; resize it afterwards).
    Raises PictureError for a missing, empty, truncated or non-image file, or one above `max_pixels`.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise PictureError(f"{path}: the file is empty")
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise PictureError(f"{path}: {width} x {height} pixels are more than --max_pixels {max_pixels}")
            if shorter_side is not None and image.format == "JPEG":
                shrink = shorter_side / min(width, height)
                image.draft(None, (-int(-width * shrink // 1), -int(-height * shrink // 1)))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"{path}: no such file") from error
    except PermissionError as error:
        raise PictureError(f"{path}: no permission to read it") from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more on damage.
    except Exception as error:
        raise PictureError(f"{path}: not a readable picture ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise PictureError(f"{path}: floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; 65535 / 257 = 255
        values = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_resized(path: Path, size: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_picture` with its shorter side brought to `size` pixels, in proportion (bicubic, antialiased)."""
    image = load_picture(path, size, max_pixels)
    width, height = image.size
    if min(width, height) == size:
        return image
    scale = size / min(width, height)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    if target[0] * target[1] > max_pixels:
        raise PictureError(
            f"{path}: with its shorter side at {size} it would have {target[0]} x {target[1]} pixels, "
            f"more than --max_pixels {max_pixels}"
        )
    return image.resize(target, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def prepare_picture(
    path: Path, imsize: int | None = None, cropsize: int | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A picture for inference: shorter side to `imsize`, centre crop of `cropsize`, each only when given.

    A picture smaller than the crop is enlarged to it. Returns (1, 3, H, W), uint8, 0..255.
    """
    if imsize is not None:
        image = load_resized(path, max(imsize, cropsize or 0), max_pixels)
    else:
        image = load_picture(path, max_pixels=max_pixels)
        if cropsize is not None and min(image.size) < cropsize:
            image = load_resized(path, cropsize, max_pixels)
    if cropsize is not None:
        image = center_crop(image, cropsize)
    return pil_to_tensor(image)[None]


@lru_cache
def _imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std, (3, 1, 1) each, kept on the device: copying them there at every step would make it wait."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def normalize(image: Tensor) -> Tensor:
    """(B, 3, H, W), uint8, 0..255, to float32, ImageNet-normalised, on the same device."""
    mean, std = _imagenet_statistics(image.device)
    return (image.float() / 255.0 - mean) / std


def denormalize(image: Tensor) -> Tensor:
    """(B, 3, H, W), ImageNet-normalised, to float32 clipped to 0..1."""
    mean, std = _imagenet_statistics(image.device)
    return (image.float() * std + mean).clamp(0.0, 1.0)


def to_pil(image: Tensor) -> Image.Image:
    """One picture, (3, H, W) or (1, 3, H, W), 0..1, to a Pillow image."""
    image = image.reshape(image.shape[-3:])
    return Image.fromarray((image * 255.0).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture in the format of `path`'s suffix, atomically. Raises UserError when it does not fit."""
    options = {"quality": 95, "subsampling": 0} if OUTPUT_FORMATS[path.suffix.lower()] == "JPEG" else {}
    try:
        write_atomically(path, lambda file: image.save(file, OUTPUT_FORMATS[path.suffix.lower()], **options))
    except (OSError, ValueError) as error:  # a full disk, or a side that the format cannot hold
        raise UserError(f"{path}: the picture ({image.width} x {image.height}) cannot be written ({error})") from error


def picture_grid(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures, each row (n, 3, H, W), ImageNet-normalised, all of one size, to one picture."""
    return to_pil(make_grid(denormalize(torch.cat(rows)), nrow=len(rows[0]), padding=4, pad_value=1.0))


# ---------------------------------------------------------------------------------------------- folders


def find_pictures(folder: Path, flag: str) -> list[Path]:
    """Every picture file below `folder`, sorted; links are followed, what is hidden is left out.

    Raises UserError, naming `flag`, when there is no such folder or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files
                  if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")]
    if not found:
        raise UserError(f"{flag} {folder}: no picture in it ({', '.join(PICTURE_SUFFIXES)}, in any case)")
    return sorted(found)


def split_holdout(paths: list[Path], share: float, flag: str = "--holdout") -> tuple[list[Path], list[Path]]:
    """Pictures to learn from, and about `share` of them held out, each in the order given.

    A picture's name decides, so that a split stays what it is when pictures come or go. A name's ending
    `_a` to `_d` does not count: such files are crops of one picture and stay together.
    Raises UserError, naming `flag`, when nothing is left to learn from.
    """

    def place(path: Path) -> float:
        stem = re.sub(r"_[a-d]$", "", path.stem)
        return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") / 2**64  # 0..1, evenly spread

    held_out = [path for path in paths if place(path) < share]
    if len(held_out) == len(paths):
        raise UserError(f"{flag} {share}: all {len(paths)} pictures of {paths[0].parent} would be held out")
    return [path for path in paths if place(path) >= share], held_out


def find_measured(folder: Path, flag: str, holdout: float) -> list[Path]:
    """The pictures to measure: those that training with the same `holdout` left out; all when it is 0.

    Raises UserError, naming `flag`, when there are none.
    """
    paths = find_pictures(folder, flag)
    if holdout == 0:
        return paths
    held_out = split_holdout(paths, holdout)[1]
    if not held_out:
        raise UserError(f"{flag} {folder}: --holdout {holdout} holds none of its {len(paths)} pictures out")
    return held_out


class FailedPictures:
    """Counts a folder's unusable pictures, logs each path once, stops the run when they are too many."""

    def __init__(self, folder: Path, flag: str, total: int) -> None:
        self.folder, self.flag, self.total = folder, flag, total
        self.paths: set[str] = set()

    def add(self, path: Path, reason: str) -> None:
        """Raises UserError when more than a tenth of the folder's pictures have failed."""
        if str(path) in self.paths:
            return
        self.paths.add(str(path))
        note(f"skipped {reason}")
        if len(self.paths) > MAX_FAILED_SHARE * self.total:
            raise UserError(
                f"{self.flag} {self.folder}: {len(self.paths)} of {self.total} pictures cannot be used "
                f"(the last: {reason}); mend or remove them, at most 10% may fail"
            )

    def summary(self) -> str:
        return f"{self.flag} {self.folder}: {self.total} pictures, {len(self.paths)} skipped"


def open_folder(folder: Path, flag: str, max_pixels: int) -> tuple[list[Path], FailedPictures]:
    """The pictures of a folder and the tally of its failures; some are decoded now, see `_usable`.

    Raises UserError as `find_pictures` and `_usable` do.
    """
    paths = find_pictures(folder, flag)
    failed = FailedPictures(folder, flag, len(paths))
    return _usable(paths, lambda path: load_picture(path, shorter_side=1, max_pixels=max_pixels), failed), failed


def _usable(paths: list[Path], load: Callable[[Path], object], failed: FailedPictures) -> list[Path]:
    """`paths` without those that `load` raises a PictureError for; these are added to `failed`.

    Up to STARTUP_CHECK of them are decoded now, so that a hopeless folder stops a run before it starts;
    the rest are met as they are drawn. Raises UserError when over a tenth fail.
    """
    sample = paths if len(paths) <= STARTUP_CHECK else random.Random(0).sample(paths, STARTUP_CHECK)

    def reason(path: Path) -> str | None:
        try:
            load(path)
        except PictureError as error:
            return str(error)

    with ThreadPoolExecutor(usable_cores()) as pool:
        reasons = dict(zip(sample, pool.map(reason, sample)))
    broken = {path: text for path, text in reasons.items() if text is not None}
    where = f"{failed.flag} {failed.folder}"
    if len(broken) == len(sample):
        raise UserError(f"{where}: none of {len(sample)} pictures can be used ({next(iter(broken.values()))})")
    # Over a tenth of a sample says the same of the folder; of a small folder the sample is all of it.
    if len(broken) > MAX_FAILED_SHARE * len(sample):
        raise UserError(
            f"{where}: {len(broken)} of {len(sample)} pictures cannot be used "
            f"(the first: {next(iter(broken.values()))}); mend or remove them, at most 10% may fail"
        )
    for path, text in broken.items():
        failed.add(path, text)
    return [path for path in paths if path not in broken]


def open_triples(
    folder: Path, flag: str, side: int, max_pixels: int
) -> tuple[dict[Path, tuple[Path, Path]], FailedPictures]:
    """Pictures painted by anyone: content/NAME, style/NAME and painted/NAME in `folder`, each of any suffix.

    Returns style and painted picture by the content picture, and the tally of the triples that cannot be used: one is
    not there, or as `load_triple` says; some are decoded now, see `_usable`. Raises UserError, naming `flag`, when a
    sub-folder is missing, when no triple is complete, and as `find_pictures` and `_usable` do.
    """
    folder = Path(folder)
    if not all((folder / part).is_dir() for part in TRIPLE):
        raise UserError(f"{flag} {folder}: neither the folder of a run nor one of painted pictures, with the "
                        f"sub-folders {', '.join(TRIPLE)}")
    parts = []
    for part in TRIPLE:
        paths = find_pictures(folder / part, flag)
        parts.append({path.relative_to(folder / part).with_suffix(""): path for path in reversed(paths)})
    names = sorted(set().union(*parts))
    complete = [name for name in names if all(name in part for part in parts)]
    if not complete:
        raise UserError(f"{flag} {folder}: no picture has the same name in {', '.join(TRIPLE)}")
    failed = FailedPictures(folder, flag, len(names))
    for name in names:
        missing = [kind for kind, part in zip(TRIPLE, parts) if name not in part]
        if missing:
            failed.add(name, f"{folder}: no {name} in {', '.join(missing)}")
    partners = {parts[0][name]: (parts[1][name], parts[2][name]) for name in complete}
    usable = _usable(list(partners), lambda path: load_triple(path, *partners[path], side, max_pixels), failed)
    return {path: partners[path] for path in usable}, failed


def load_triple(content: Path, style: Path, painted: Path, side: int, max_pixels: int) -> list[Image.Image]:
    """Content, style and painted picture, their shorter sides at `side`, content and painted of one size.

    Raises PictureError as `load_resized` does, and when those two differ in aspect by more than rounding.
    """
    pictures = [load_resized(path, side, max_pixels) for path in (content, style, painted)]
    size, other = pictures[0].size, pictures[2].size
    if abs(max(size) - max(other)) > 1 + 0.01 * max(size) or (size[0] > size[1]) != (other[0] > other[1]):
        raise PictureError(f"{painted}: {other[0]} x {other[1]} pixels with its shorter side at {side}, its content "
                           f"{size[0]} x {size[1]}; the same aspect is needed")
    pictures[2] = pictures[2].resize(size, Image.Resampling.BICUBIC)
    return pictures


# --------------------------------------------------------------------------------------------- training


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
            stat = os.stat(path)
        except OSError as error:
            raise PictureError(f"{path}: {error.strerror}") from error
        # What decides the pixels: the file and how it is decoded.
        picture = _digest(os.path.realpath(path), size, self.max_pixels)
        return self.folder / picture[:2] / f"{picture}-{_digest(stat.st_size, stat.st_mtime_ns)}.npy"

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


def _ignore_stop_signals(_worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process finishes its step
    # and needs its workers alive until then.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def shard_positions(seen: int, iterations: int, batch_size: int, rank: int, processes: int) -> list[int]:
    """The positions that process `rank` draws in the coming iterations, after `seen` samples by all processes.

    Iteration i takes the next batch_size * processes positions; each process a run of batch_size of them.
    """
    whole = batch_size * processes
    starts = range(seen + rank * batch_size, seen + rank * batch_size + iterations * whole, whole)
    return [start + offset for start in starts for offset in range(batch_size)]


def training_loader(
    pictures: PicturesByPosition, positions: Iterable[int], batch_size: int, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches of the given positions, in order. `positions` must hold whole batches."""
    return DataLoader(
        pictures, batch_size, sampler=positions, num_workers=num_workers, collate_fn=collate,
        pin_memory=pin_memory, worker_init_fn=_ignore_stop_signals, prefetch_factor=4 if num_workers else None,
        # Its own generator: drawing the workers' base seed must not move the run's random state.
        generator=torch.Generator(),
    )

"""Pictures in and out: finding, decoding, cropping; normalisation; saving and grids."""

import hashlib
import io
import os
import random
import re
import stat
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

import archives
import metadata
from utils import UserError, gather, note, note_of_process, usable_cores, write_atomically

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # taken for pictures in folders unseen; others are looked at
# Any suffix that names a picture file to write (reading goes by content, not by suffix).
OUTPUT_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF",
                  ".tiff": "TIFF"}
# Run lengths alone make a painted picture's PNG smaller than all of deflate does, in a quarter of the time.
WRITING = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_type": zlib.Z_RLE}}
ALPHA_FORMATS = ("PNG", "WEBP", "TIFF")  # what can hold transparency in full
MAX_PIXELS = 500_000_000  # Painter by Numbers goes up to about 200 million
MAX_FAILED_SHARE = 0.10
LOOKING_THREADS = 16
ENOUGH_TO_TELL = 2**16  # bytes of an archive's file that Pillow tells its kind by: it may be a video of gigabytes
STARTUP_CHECK = 256  # pictures a folder that are decoded before a run starts
# Kinds that Pillow tells apart but leaves to other programs, which are hardly ever there.
NOT_DECODED = ("BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS")
# Reasons for leaving a folder's file out, as they are counted.
NO_PICTURE, BROKEN_LINK, UNREADABLE = "other files", "broken links", "unreadable files"
PIPE = "pipes, sockets or devices"


class PictureError(Exception):
    """A picture that cannot be used; the message names the file and the reason."""


class NotFinite(UserError):
    """A painted picture with values that are infinite or no numbers."""


# ------------------------------------------------------------------------------------------- one picture


def load_picture(path: Path, shorter_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of any kind that Pillow reads to upright 8-bit RGB, in sRGB.

    Transparent pixels are laid on white; of several frames or pages the first is taken. With `shorter_side`, a JPEG
    may be decoded at 1/2, 1/4 or 1/8 of its size, never below `shorter_side` (far faster; resize it afterwards).
    Raises PictureError for a missing, empty, truncated or non-image file, or one above `max_pixels`; metadata that
    cannot be read costs no picture.
    """
    with _reading(path):
        return _on_white(_decode(Path(path), shorter_side, max_pixels))


def load_resized(path: Path, size: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_picture` with its shorter side brought to `size` pixels, in proportion (bicubic, antialiased)."""
    with _reading(path):
        return _on_white(_resized(_decode(Path(path), size, max_pixels), size, max_pixels))


def prepare_picture(
    path: Path, imsize: int | None = None, cropsize: int | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A picture for inference: shorter side to `imsize`, centre crop of `cropsize`, each only when given.

    A picture smaller than the crop is enlarged to it. Returns (1, 3, H, W), uint8, 0..255.
    """
    with _reading(path):
        return pil_to_tensor(_on_white(_prepare(path, imsize, cropsize, max_pixels)))[None]


def load_alpha(
    path: Path, imsize: int | None = None, cropsize: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image | None:
    """How opaque the pixels of `prepare_picture` are, mode L, of the same size; None when all are fully.

    Raises PictureError as that does.
    """
    with _reading(path):
        try:
            with Image.open(_source(path)) as image:  # no pixel is read
                if not image.has_transparency_data:
                    return None
        except Exception:  # it may be readable all the same, see `_decode`
            pass
        picture = _prepare(path, imsize, cropsize, max_pixels)
        return picture.getchannel("A") if picture.mode == "RGBA" else None


def from_pil(image: Image.Image) -> Tensor:
    """A picture at hand, of any mode, as (1, 3, H, W), uint8, 0..255: upright, in sRGB, transparent pixels laid on
    white, as from a file. Raises PictureError for floating-point pixels, which have no known range."""
    image.load()
    return pil_to_tensor(_on_white(_shown(image.copy())))[None]


def picture_size(path: Path) -> tuple[int, int] | None:
    """Width and height as the file's header says, None where it cannot be read."""
    try:
        with _reading(path), Image.open(_source(path)) as image:
            return image.size
    except PictureError:
        return None


def _prepare(path: Path, imsize: int | None, cropsize: int | None, max_pixels: int) -> Image.Image:
    side = None if imsize is None else max(imsize, cropsize or 0)
    picture = _decode(Path(path), side, max_pixels)
    if side is None and cropsize is not None and min(picture.size) < cropsize:
        side = cropsize
    if side is not None:
        picture = _resized(picture, side, max_pixels)
    return picture if cropsize is None else center_crop(picture, cropsize)


def _resized(picture: Image.Image, side: int, max_pixels: int) -> Image.Image:
    """With its shorter side at `side`. Raises PictureError when that makes more than `max_pixels`."""
    width, height = picture.size
    if min(width, height) == side:
        return picture
    scale = side / min(width, height)
    target = (max(side, round(width * scale)), max(side, round(height * scale)))
    if target[0] * target[1] > max_pixels:
        raise PictureError(f"with its shorter side at {side} it would have {target[0]} x {target[1]} pixels, more than "
                           f"--max_pixels {max_pixels}")
    return picture.resize(target, Image.Resampling.BICUBIC)


def _decode(path: Path, shorter_side: int | None, max_pixels: int) -> Image.Image:
    """RGB, or RGBA where not all of it is opaque; upright, in sRGB."""
    try:
        return _decode_from(_source(path), shorter_side, max_pixels)
    except (PictureError, MemoryError, PermissionError):
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more on damage.
    except Exception as error:
        attempts = metadata.mended(_content(path))
        if _is_heic(path):
            if not register_heic():
                raise PictureError("a HEIC picture; to read it: pip install pillow-heif") from error
            attempts = (_content(path), *attempts)
        for content in attempts:
            try:
                return _decode_from(io.BytesIO(content), shorter_side, max_pixels)
            except (PictureError, MemoryError):
                raise
            except Exception:
                continue
        raise  # so it was not the metadata


def _source(path: Path, most: int = -1) -> Path | io.BytesIO:
    """What Pillow is to open for the picture at `path`: the path itself, or the content, at most its first `most`
    bytes, where an archive has it.

    Raises PictureError for what is no file or empty; OSError and what `archives.find` raises when it cannot be read.
    """
    if archives.find(path) is not None:
        content = _content(path, most)
        source, size = io.BytesIO(content), len(content)
    else:
        source, status = path, os.stat(path)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise PictureError(f"not a file, but a {'folder' if os.path.isdir(path) else 'pipe, socket or device'}")
    if size == 0:
        raise PictureError("the file is empty")
    return source


def _content(path: Path, most: int = -1) -> bytes:
    """The bytes of a file or of an archive's member, at most the first `most`."""
    member = archives.find(path)
    with open(path, "rb") if member is None else member[0].open(member[1]) as file:
        return file.read(most)


def _decode_from(source: Path | io.BytesIO, shorter_side: int | None, max_pixels: int) -> Image.Image:
    with Image.open(source) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError(f"{width} x {height} pixels are more than --max_pixels {max_pixels}")
        if image.format == "TIFF" and image.tag_v2.get(254) == 1:  # the kind of its first picture: a smaller copy
            raise PictureError(f"only its preview of {width} x {height} pixels can be read (a camera's raw "
                               "file?); save it as a JPEG, PNG or plain TIFF")
        if shorter_side is not None and image.format == "JPEG":
            shrink = shorter_side / min(width, height)
            image.draft(None, (-int(-width * shrink // 1), -int(-height * shrink // 1)))
        _scale_transparent_colour(image)
        image.load()
        return _shown(image)


def _shown(image: Image.Image) -> Image.Image:
    """A loaded picture as RGB, or RGBA where not all of it is opaque; upright, in sRGB."""
    image = metadata.upright(image)
    colour, alpha = _separate(image)
    colour = metadata.in_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        colour.putalpha(alpha)
    colour.info = {}  # a profile in there would be written into what is saved of it
    return colour


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB or RGBA to RGB."""
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _separate(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours, mode RGB, L or CMYK, and how opaque they are, mode L, None for all fully."""
    if image.mode == "F":
        raise PictureError("floating-point pixels have no known range; 8 or 16 bits are needed")
    if image.mode.startswith("I"):  # 16-bit grey
        values = np.asarray(image)
        key = image.info.get("transparency")
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return Image.fromarray(_FROM_16_BITS[values.clip(0, 65535)]), alpha
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA" if is_grey else "RGBA")
        alpha = image.getchannel("A")
        return image.convert("L" if is_grey else "RGB"), alpha if alpha.getextrema()[0] < 255 else None
    return image if image.mode in ("RGB", "L", "CMYK") else image.convert("L" if is_grey else "RGB"), None


_FROM_16_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255


def _scale_transparent_colour(image: Image.Image) -> None:
    """A PNG's one transparent colour counts in the file's bits, Pillow's pixels in 8."""
    key = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "1" and key:
        image.info["transparency"] = 255
    bits = re.search(r"(?:L|RGB);(\d+)", str(image.tile[0][3])) if image.format == "PNG" and image.tile else None
    if bits and image.mode in ("L", "RGB") and key is not None:
        bits = int(bits[1])
        in_8_bits = [value >> 8 if bits == 16 else value * 255 // (2**bits - 1) for value in np.ravel(key).tolist()]
        image.info["transparency"] = tuple(in_8_bits) if isinstance(key, tuple) else in_8_bits[0]


@contextmanager
def _reading(path: Path):
    """Within the block Pillow's limits are lifted, and whatever goes wrong becomes a PictureError of one line that
    names the file."""
    try:
        with _lifted_limits():
            yield
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise PictureError(f"{path}: no such file") from error
    except PermissionError as error:
        raise PictureError(f"{path}: no permission to read it") from error
    except MemoryError as error:
        width, height = picture_size(path) or "??"
        raise PictureError(f"{path}: {width} x {height} pixels; not enough memory for it is free") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PictureError(f"{path}: not a readable picture ({reason})") from error


# Below real paintings, for which --max_pixels stands in, and below the size of real files' texts and profiles.
_LIMITS = ((Image, "MAX_IMAGE_PIXELS", None), (PngImagePlugin, "MAX_TEXT_CHUNK", 2**26),
           (PngImagePlugin, "MAX_TEXT_MEMORY", 2**28))
_lock, _lifted = threading.Lock(), []  # a list of Pillow's own limits for each block that is entered


@contextmanager
def _lifted_limits():
    """Pillow's limits are those of the whole program: they are lifted only while one of its threads reads a picture
    here."""
    with _lock:
        _lifted.append(_lifted[-1] if _lifted else [getattr(module, name) for module, name, _ in _LIMITS])
        for module, name, value in _LIMITS:
            setattr(module, name, value)
    try:
        yield
    finally:
        with _lock:
            own = _lifted.pop()
            if not _lifted:
                for (module, name, _), value in zip(_LIMITS, own):
                    setattr(module, name, value)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


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
    """(B, 3, H, W), ImageNet-normalised, to float32 clipped to 0..1. Raises NotFinite for values that are not finite,
    which would be written as black."""
    if not image.isfinite().all():
        raise NotFinite("a picture has values that are not finite: the network is damaged, or its training diverged")
    mean, std = _imagenet_statistics(image.device)
    return (image.float() * std + mean).clamp(0.0, 1.0)


def to_pil(image: Tensor) -> Image.Image:
    """One picture, (3, H, W) or (1, 3, H, W), 0..1, to a Pillow image."""
    image = image.reshape(image.shape[-3:])
    return Image.fromarray((image * 255.0).round().byte().permute(1, 2, 0).cpu().numpy())


def pixels_to_pil(pixels: Tensor) -> Image.Image:
    """One picture, (1, 3, H, W), uint8, to a Pillow image."""
    return Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy())


def save_picture(image: Image.Image, path: Path, alpha: Image.Image | None = None) -> None:
    """Write a picture in the format of `path`'s suffix, atomically; with `alpha`, mode L and of its size, where the
    format is one of ALPHA_FORMATS. Raises UserError, naming the file and the reason, when it cannot be written."""
    path = Path(path)
    kind = OUTPUT_FORMATS[path.suffix.lower()]
    options = WRITING.get(kind, {})
    if alpha is not None and kind in ALPHA_FORMATS:
        image = image.copy()
        image.putalpha(alpha)
    encoded = io.BytesIO()  # not into the file at once: Pillow's writers do not say why a disk did not take it
    try:
        image.save(encoded, kind, **options)
        write_atomically(path, lambda file: file.write(encoded.getbuffer()))
    except (OSError, ValueError, struct.error) as error:  # a full disk, or a side that the format cannot hold
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the picture ({image.width} x {image.height}) cannot be written ({reason})") from error


def read_written(path: Path) -> Image.Image | None:
    """What `save_picture` wrote there, RGB, without its alpha; None where there is no picture, or a damaged one."""
    try:
        with _lifted_limits(), Image.open(path) as image:
            return image.convert("RGB")
    except Exception:  # whatever Pillow's decoders raise
        return None


def picture_grid(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures, each row (n, 3, H, W), ImageNet-normalised, all of one size, to one picture."""
    return to_pil(make_grid(denormalize(torch.cat(rows)), nrow=len(rows[0]), padding=4, pad_value=1.0))


# ---------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class FolderContents:
    """The pictures of a folder or archive, sorted, and the other files in it by the reason for leaving them out."""

    pictures: list[Path]
    left_out: dict[str, list[Path]]

    def describe_left_out(self) -> str:
        """As in "other files: 3, broken links: 1"; empty when nothing was left out."""
        return ", ".join(f"{reason}: {len(paths)}" for reason, paths in self.left_out.items())


def is_searched(path: Path) -> bool:
    """Whether `path` holds pictures, and is none itself: a folder, or an archive."""
    return Path(path).is_dir() or archives.is_archive(path)


def look_through(folder: Path, flag: str, output: Path | None = None) -> FolderContents:
    """What a folder and all its subfolders hold, or a .zip archive; links are followed, what is hidden is left out and
    not counted. What else is in it is said in a line.

    A file named as pictures are is taken for one; any other is looked at. Raises UserError, naming `flag`, when there
    is no such folder or archive, or no picture in it; and as `refuse_within` for an `output`.
    """
    folder = Path(folder)
    if archives.is_archive(folder):
        try:
            files, left_out = [folder / name for name in archives.members(folder)], {}
        except (OSError, ValueError) as error:
            raise UserError(f"{flag} {folder}: {getattr(error, 'strerror', None) or error}") from error
    elif folder.is_dir():
        files, left_out = _files_below(folder, flag)
    else:
        raise UserError(f"{flag} {folder}: no such folder or .zip archive")
    pictures = [path for path in files if str(path).lower().endswith(PICTURE_SUFFIXES)]
    others = [path for path in files if not str(path).lower().endswith(PICTURE_SUFFIXES)]
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:  # a file server answers many questions at once
        for path, reason in zip(others, pool.map(_reason_to_leave_out, others)):
            (pictures if reason is None else left_out.setdefault(reason, [])).append(path)
    contents = FolderContents(sorted(pictures), left_out)
    names = [path.name for paths in left_out.values() for path in paths]
    found = f"{contents.describe_left_out()} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    if not pictures:
        raise UserError(f"{flag} {folder}: no picture in it; {found if names else 'it is empty'}")
    if output is not None:
        refuse_within(output, folder, flag, contents.pictures)
    if names:
        note(f"{flag} {folder}: left out: {found}")
    return contents


def _files_below(folder: Path, flag: str) -> tuple[list[Path], dict[str, list[Path]]]:
    """The files that are not hidden, and what else was met by the reason for leaving it out."""
    files, left_out = [], {}
    folders, linked, seen = [folder], deque(), set()
    while folders or linked:
        here = folders.pop() if folders else linked.popleft()  # a picture that is found twice goes by its own path
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(here) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if here == folder:
                raise UserError(f"{flag} {folder}: the folder cannot be read ({error.strerror})") from error
            note(f"{flag} {folder}: the folder {here} in it is left out: it cannot be read ({error.strerror})")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads to itself
                is_folder = is_file = False
            if is_folder:
                (linked if entry.is_symlink() else folders).append(entry.path)
            elif is_file:
                files.append(Path(entry.path))
            else:
                is_broken = entry.is_symlink() and not os.path.exists(entry.path)
                left_out.setdefault(BROKEN_LINK if is_broken else PIPE, []).append(Path(entry.path))
    return files, left_out


def refuse_within(output: Path, folder: Path, flag: str, pictures: Iterable[Path]) -> None:
    """Raises UserError where `output`, a folder to write to, belongs to one that is searched for pictures.

    pictures: what was found there; through links it may lie elsewhere.
    """
    output, folder = Path(output), Path(folder)
    searched = {os.path.realpath(path) for path in {path.parent for path in pictures}}
    real = Path(os.path.realpath(output))
    above = (real, *real.parents)
    if not searched.isdisjoint(map(str, above)) or any(each.samefile(folder) for each in above if each.exists()):
        raise UserError(f"--save_path {output}: belongs to {flag} {folder}, which is searched with all its subfolders: "
                        "the next call would find there what this one writes; name a folder outside it")


def find_pictures(folder: Path, flag: str, output: Path | None = None) -> list[Path]:
    """The pictures of `look_through`. Raises UserError as that does."""
    return look_through(folder, flag, output).pictures


def _reason_to_leave_out(path: Path) -> str | None:
    """None for a picture, told by what Pillow makes of its header, whatever its name. Text is none, but a Netpbm's."""
    try:
        source = _source(path, ENOUGH_TO_TELL)
        if re.fullmatch(rb"(?!P[1-7])[\t\n\r\f -~]+", _content(path, 64)):  # asking Pillow takes many times as long
            return NO_PICTURE
        with _lifted_limits(), Image.open(source) as image:
            return NO_PICTURE if image.format in NOT_DECODED else None
    except UnidentifiedImageError:
        return None if _is_heic(path) else NO_PICTURE
    except OSError:
        return UNREADABLE
    except Exception:
        return NO_PICTURE


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, told by its content."""
    return _reason_to_leave_out(path) is None


def _is_heic(path: Path) -> bool:
    """Whether it is a picture that pillow-heif reads, not Pillow."""
    return _content(path, 12)[4:] in (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftyphevx", b"ftypmif1", b"ftypmsf1")


@lru_cache
def register_heic() -> bool:
    """Have Pillow read HEIC pictures, by pillow-heif. False when that is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def split_holdout(paths: list[Path], share: float, flag: str = "--holdout") -> tuple[list[Path], list[Path]]:
    """Pictures to learn from, and about `share` of them held out, each in the order given.

    A picture's name decides, so that a split stays what it is when pictures come or go. A name's ending
    `_a` to `_d` does not count: such files are crops of one picture and stay together.
    Raises UserError, naming `flag`, when nothing is left to learn from.
    """
    held_out = [path for path in paths if is_held_out(path, share)]
    if len(held_out) == len(paths):
        raise UserError(f"{flag} {share}: all {len(paths)} pictures of {paths[0].parent} would be held out")
    return [path for path in paths if not is_held_out(path, share)], held_out


def is_held_out(path: Path, share: float) -> bool:
    """Whether `split_holdout` holds the picture out."""
    stem = re.sub(r"_[a-d]$", "", path.stem)
    place = int.from_bytes(hashlib.sha256(os.fsencode(stem)).digest()[:8], "big") / 2**64  # 0..1, evenly spread
    return place < share


def find_split(folder: Path, flag: str, holdout: float, output: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The pictures of `find_pictures`, split by `split_holdout`. Raises UserError as these do, and, naming `flag`, when
    none is held out."""
    paths = find_pictures(folder, flag, output)
    learned, held_out = split_holdout(paths, holdout)
    if not held_out:
        raise UserError(f"{flag} {folder}: --holdout {holdout} holds none of its {len(paths)} pictures out")
    return learned, held_out


def find_measured(folder: Path, flag: str, holdout: float, output: Path | None = None) -> list[Path]:
    """The pictures to measure: those that training with the same `holdout` left out; all when it is 0.

    Raises UserError as `find_pictures` and `find_split` do.
    """
    if holdout == 0:
        return find_pictures(folder, flag, output)
    return find_split(folder, flag, holdout, output)[1]


class FailedPictures:
    """Counts a folder's unusable pictures, logs each path once, stops the run when they are too many."""

    def __init__(self, folder: Path, flag: str, total: int, left_out: str = "") -> None:
        """left_out: what else is in the folder, see `FolderContents.describe_left_out`."""
        self.where, self.total, self.left_out = f"{flag} {folder}", total, left_out
        self.paths: set[str] = set()

    def add(self, path: Path, reason: str) -> None:
        """Raises UserError when more than a tenth of the folder's pictures have failed."""
        if str(path) not in self.paths:
            self.paths.add(str(path))
            note_of_process(f"skipped {reason}")
            self.check(len(self.paths), self.total, reason)

    def add_other_processes(self) -> None:
        """Count what the other processes of the run have met; each process must call this. Raises as `add` does."""
        self.paths.update(*gather(self.paths))
        self.check(len(self.paths), self.total, "met by another process")

    def check(self, failed: int, total: int, reason: str) -> None:
        """Raises UserError, with the `reason` of the last, when more than a tenth of `total` pictures have failed."""
        if failed > MAX_FAILED_SHARE * total:
            raise UserError(f"{self.where}: {failed} of {total} pictures cannot be used (the last: {reason}); mend or "
                            "remove them, at most 10% may fail")

    def summary(self) -> str:
        counts = [f"{self.total} pictures", f"{len(self.paths)} skipped", self.left_out]
        return f"{self.where}: {', '.join(filter(None, counts))}"


def open_folder(
    folder: Path, flag: str, max_pixels: int, output: Path | None = None
) -> tuple[list[Path], FailedPictures]:
    """The pictures of a folder and the tally of its failures.

    Up to STARTUP_CHECK of them are decoded now, so that a hopeless folder stops a run before it starts; the rest are
    met as they are drawn. Raises UserError as `find_pictures` does, and when over a tenth fail.
    """
    def reason(path: Path) -> str | None:
        try:
            load_picture(path, 1, max_pixels)
        except PictureError as error:
            return str(error)

    contents = look_through(folder, flag, output)
    paths = contents.pictures
    failed = FailedPictures(folder, flag, len(paths), contents.describe_left_out())
    sample = paths if len(paths) <= STARTUP_CHECK else random.Random(0).sample(paths, STARTUP_CHECK)
    with ThreadPoolExecutor(usable_cores()) as pool:
        broken = {path: text for path, text in zip(sample, pool.map(reason, sample)) if text is not None}
    if broken:  # over a tenth of a sample says the same of the folder
        failed.check(len(broken), len(sample), list(broken.values())[-1])
    for path, text in broken.items():
        failed.add(path, text)
    return [path for path in paths if path not in broken], failed

"""Pictures in and out: finding, decoding, cropping; normalisation; saving and grids."""

import hashlib
import io
import os
import random
import re
import stat
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.EpsImagePlugin import has_ghostscript
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

import archives
from metadata import Metadata, srgb_conversion, strip_metadata
from utils import UserError, note, note_of_process, usable_cores, write_atomically

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
TRIPLE = ("content", "style", "painted")  # the folders of pictures painted by anyone, see `open_triples`

# Pillow's own limit (89 and 179 million pixels) is below real paintings; --max_pixels stands in for it.
Image.MAX_IMAGE_PIXELS = None


# Files that begin so are pictures.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"8BPS", b"qoif",
              b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
# And those of letters alone may be only when they begin so: PBM and its kin, XPM, XBM, IM, IMT, PostScript, FITS.
TEXT_PICTURES = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"Pf", b"PF", b"Py", b"BM", b"/*", b"#define", b"*",
                 b"Image type", b"Name", b"File", b"width", b"height", b"pixel", b"%!PS", b"SIMPLE", b"DDS ", b"icns")
PRINTABLE = bytes(range(32, 127)) + b"\t\r\n\f"
# Kinds that Pillow tells apart but leaves to other programs, which are hardly ever there.
NOT_DECODED = ("BUFR", "GRIB", "HDF5", "WMF", "MPEG")
# Reasons for leaving a folder's file out.
NO_PICTURE, BROKEN_LINK, UNREADABLE, PIPE = "no picture", "broken link", "unreadable", "pipe"

# What Pillow warns of (broken tags, for one) has been dealt with or ends in a PictureError.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    with _one_line(path):
        return _decode(Path(path), shorter_side, max_pixels).in_srgb()


def load_resized(path: Path, size: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_picture` with its shorter side brought to `size` pixels, in proportion (bicubic, antialiased)."""
    with _one_line(path):
        return _decode(Path(path), size, max_pixels).resized(size, path, max_pixels).in_srgb()


def prepare_picture(
    path: Path, imsize: int | None = None, cropsize: int | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A picture for inference: shorter side to `imsize`, centre crop of `cropsize`, each only when given.

    A picture smaller than the crop is enlarged to it. Returns (1, 3, H, W), uint8, 0..255.
    """
    with _one_line(path):
        return pil_to_tensor(_prepare(path, imsize, cropsize, max_pixels).in_srgb())[None]


def from_pil(image: Image.Image) -> Tensor:
    """A picture at hand, of any mode, as (1, 3, H, W), uint8, 0..255: its pixels as they are, transparent ones laid on
    white. Raises PictureError for floating-point pixels, which have no known range."""
    if image.mode == "F":
        raise PictureError("floating-point pixels have no known range; 8 or 16 bits are needed")
    colour, alpha = _separate(image)
    colour = colour.convert("RGB")
    return pil_to_tensor(colour if alpha is None else _on_white(colour, alpha))[None]


def load_alpha(
    path: Path, imsize: int | None = None, cropsize: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image | None:
    """How opaque the pixels of `prepare_picture` are, mode L, of the same size; None when all are fully.

    Raises PictureError as that does.
    """
    with _one_line(path):
        if not _may_be_transparent(path):
            return None
        return _prepare(path, imsize, cropsize, max_pixels).alpha


@dataclass(frozen=True)
class _Picture:
    """A decoded picture, upright. What is not opaque is RGB on white already."""

    colour: Image.Image  # 8 bits: RGB, or where `to_srgb` is still to come RGB, L or CMYK
    alpha: Image.Image | None = None  # L
    to_srgb: Callable[[Image.Image], Image.Image] | None = None

    def change(self, how: Callable[[Image.Image], Image.Image]) -> "_Picture":
        return replace(self, colour=how(self.colour), alpha=None if self.alpha is None else how(self.alpha))

    def resized(self, side: int, path: Path, max_pixels: int) -> "_Picture":
        """With its shorter side at `side`. Raises PictureError when that makes more than `max_pixels`."""
        width, height = self.colour.size
        if min(width, height) == side:
            return self
        scale = side / min(width, height)
        target = (max(side, round(width * scale)), max(side, round(height * scale)))
        if target[0] * target[1] > max_pixels:
            raise PictureError(
                f"{path}: with its shorter side at {side} it would have {target[0]} x {target[1]} pixels, "
                f"more than --max_pixels {max_pixels}"
            )
        return self.change(lambda image: image.resize(target, Image.Resampling.BICUBIC))

    def in_srgb(self) -> Image.Image:
        """RGB. After resizing, where there are fewer pixels to convert."""
        image = self.colour if self.to_srgb is None else self.to_srgb(self.colour)
        image.info = {}  # a profile in there would be written into what is saved of it
        return image


def _prepare(path: Path, imsize: int | None, cropsize: int | None, max_pixels: int) -> _Picture:
    side = None if imsize is None else max(imsize, cropsize or 0)
    picture = _decode(Path(path), side, max_pixels)
    if side is None and cropsize is not None and min(picture.colour.size) < cropsize:
        side = cropsize
    if side is not None:
        picture = picture.resized(side, path, max_pixels)
    return picture if cropsize is None else picture.change(lambda image: center_crop(image, cropsize))


def _decode(path: Path, shorter_side: int | None, max_pixels: int) -> _Picture:
    source = picture_source(path)
    try:
        return _decode_from(source, path, None, shorter_side, max_pixels)
    except (PictureError, MemoryError, PermissionError):
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more on damage.
    except Exception as error:
        content = path.read_bytes() if source == path else source.getvalue()
        head = content[:64]
        attempts = [(io.BytesIO(content), None)] if is_heic(head) and register_heic() else []
        stripped = strip_metadata(content)
        if stripped is not None:
            attempts.append((io.BytesIO(stripped[0]), stripped[1]))
        for source, metadata in attempts:
            try:
                return _decode_from(source, path, metadata, shorter_side, max_pixels)
            except (PictureError, MemoryError):
                raise
            except Exception:
                continue
        if is_heic(head) and not register_heic():
            raise PictureError(f"{path}: a HEIC picture; to read it: pip install pillow-heif") from error
        raise  # so it was not the metadata


def picture_source(path: Path) -> Path | io.BytesIO:
    """What Pillow is to open for the picture at `path`: the path itself, or the content where an archive has it.

    Raises PictureError for what is no file or empty; OSError and ArchiveError when it cannot be read.
    """
    member = archives.find(path)
    if member is not None:
        source, size = io.BytesIO(member.read()), member.size
    else:
        source, status = path, path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise PictureError(f"{path}: not a file, but a {'folder' if path.is_dir() else 'pipe, socket or device'}")
    if size == 0:
        raise PictureError(f"{path}: the file is empty")
    return source


def _decode_from(
    source: Path | io.BytesIO, path: Path, metadata: Metadata | None, shorter_side: int | None, max_pixels: int
) -> _Picture:
    """metadata: where `source` no longer has it."""
    with Image.open(source) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError(f"{path}: {width} x {height} pixels are more than --max_pixels {max_pixels}")
        if image.mode == "F":
            raise PictureError(f"{path}: floating-point pixels have no known range; save it with 8 or 16 bits")
        if shorter_side is not None and image.format == "JPEG":
            shrink = shorter_side / min(width, height)
            image.draft(None, (-int(-width * shrink // 1), -int(-height * shrink // 1)))
        _scale_transparent_colour(image)
        image.load()
        metadata = metadata or Metadata.of(image)
        colour, alpha = _separate(image)
        if image.format != "TIFF":  # Pillow has turned that
            colour, alpha = metadata.upright(colour), alpha and metadata.upright(alpha)
    to_srgb = srgb_conversion(metadata.profile, colour.mode) if metadata.profile else None
    if alpha is not None:
        return _Picture(_on_white(colour.convert("RGB") if to_srgb is None else to_srgb(colour), alpha), alpha)
    return _Picture(colour if to_srgb else colour.convert("RGB"), None, to_srgb)


def _on_white(colour: Image.Image, alpha: Image.Image) -> Image.Image:
    """colour: RGB, changed; alpha: L. Returns RGB."""
    colour.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


def _scale_transparent_colour(image: Image.Image) -> None:
    """A PNG's one transparent colour counts in the file's bits, Pillow's pixels in 8."""
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("L", "RGB") or key is None or not image.tile:
        return
    rawmode = image.tile[0][3]
    bits = re.search(r";(\d+)", rawmode if isinstance(rawmode, str) else rawmode[0])
    in_8_bits = {"2": lambda value: 85 * (value & 3), "4": lambda value: 17 * (value & 15),
                 "16": lambda value: value >> 8}.get(bits and bits[1], lambda value: value & 255)
    image.info["transparency"] = tuple(map(in_8_bits, key)) if isinstance(key, tuple) else in_8_bits(key)


def _separate(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours, mode RGB, L or CMYK, and how opaque they are, mode L, None for all fully."""
    if image.mode.startswith("I"):  # 16-bit grey; 65535 / 257 = 255
        values = np.asarray(image)
        key = image.info.get("transparency")
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return Image.fromarray(_FROM_16_BITS[values.clip(0, 65535)]), alpha
    if image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La")
        try:
            image = image.convert("LA" if is_grey else "RGBA")
        except ValueError:  # a transparent colour that the picture cannot have
            del image.info["transparency"]
            return _separate(image)
        alpha = image.getchannel("A")
        return image.convert("L" if is_grey else "RGB"), alpha if alpha.getextrema()[0] < 255 else None
    if image.mode in ("RGB", "L", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


_FROM_16_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)


def _may_be_transparent(path: Path) -> bool:
    """By the file's header alone; True where that cannot be read."""
    try:
        with Image.open(picture_source(Path(path))) as image:
            return image.has_transparency_data
    except Exception:
        return True


@contextmanager
def _one_line(path: Path):
    """Within the block whatever goes wrong becomes a PictureError that names the file."""
    try:
        yield
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"{path}: no such file") from error
    except PermissionError as error:
        raise PictureError(f"{path}: no permission to read it") from error
    except archives.ArchiveError as error:
        raise PictureError(f"{path}: {error}") from error
    except MemoryError as error:
        raise PictureError(f"{path}: {_size_in_words(path)} not enough memory for it is free") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PictureError(f"{path}: not a readable picture ({reason})") from error


def _size_in_words(path: Path) -> str:
    try:
        with Image.open(picture_source(Path(path))) as image:
            return f"{image.width} x {image.height} pixels;"
    except Exception:
        return "a large picture;"


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
        with Image.open(path) as image:
            image.load()
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
        """As in "3 files are no pictures, 1 link is broken"; empty when nothing was left out."""
        one = {NO_PICTURE: "file is no picture", BROKEN_LINK: "link is broken", UNREADABLE: "file cannot be read",
               PIPE: "is a pipe, socket or device"}
        many = {NO_PICTURE: "files are no pictures", BROKEN_LINK: "links are broken", UNREADABLE:
                "files cannot be read", PIPE: "are pipes, sockets or devices"}
        return ", ".join(f"{len(paths)} {(one if len(paths) == 1 else many)[reason]}"
                         for reason, paths in self.left_out.items())


def is_searched(path: Path) -> bool:
    """Whether `path` holds pictures, and is none itself: a folder, or an archive."""
    return Path(path).is_dir() or archives.is_archive(path)


def look_through(folder: Path, flag: str) -> FolderContents:
    """What a folder and all its subfolders hold, or a .zip archive; links are followed, what is hidden is left out and
    not counted.

    A file named as pictures are is taken for one; any other is looked at. Raises UserError, naming `flag`, when there
    is no such folder or archive, or no picture in it.
    """
    folder = Path(folder)
    if archives.is_archive(folder):
        files, left_out = _members(folder, flag), {}
    elif folder.is_dir():
        files, left_out = _files_below(folder, flag)
    else:
        raise UserError(f"{flag} {folder}: no such folder or .zip archive")
    pictures, others = [], []
    for path in files:
        (pictures if str(path).lower().endswith(PICTURE_SUFFIXES) else others).append(path)
    for path, reason in zip(others, _look_at(others)):
        if reason is None:
            pictures.append(path)
        else:
            left_out.setdefault(reason, []).append(path)
    contents = FolderContents(sorted(pictures), left_out)
    if not pictures:
        found = contents.describe_left_out()
        first = next((path.name for paths in left_out.values() for path in paths), None)
        raise UserError(f"{flag} {folder}: no picture in it; " + (f"{found} ({first})" if found else "it is empty"))
    return contents


def _members(archive: Path, flag: str) -> list[Path]:
    try:
        return archives.members(archive)
    except (archives.ArchiveError, OSError) as error:
        raise UserError(f"{flag} {archive}: {getattr(error, 'strerror', None) or error}") from error


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
    """The pictures of `look_through`; what else is in the folder is said in a line. Raises UserError as that does, and
    as `refuse_within` for an `output`."""
    return _look_through(folder, flag, output).pictures


def _look_through(folder: Path, flag: str, output: Path | None) -> FolderContents:
    contents = look_through(folder, flag)
    if output is not None:
        refuse_within(output, folder, flag, contents.pictures)
    if contents.left_out:
        names = [path.name for paths in contents.left_out.values() for path in paths]
        note(f"{flag} {folder}: left out: {contents.describe_left_out()} ({', '.join(names[:3])}"
             f"{', ...' if len(names) > 3 else ''})")
    return contents


def _look_at(paths: list[Path]) -> list[str | None]:
    """The reason for leaving each file out, None for pictures."""
    if not paths:
        return []
    parts = [paths[place : place + 64] for place in range(0, len(paths), 64)]
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:  # a file server answers many questions at once
        heads = [head for part in pool.map(lambda part: [*map(_head, part)], parts) for head in part]
    reasons = []
    for path, head in zip(paths, heads):
        if head is None:
            reasons.append(UNREADABLE)
        else:
            reasons.append(None if _is_picture(path, head) else NO_PICTURE)
    return reasons


def _head(path: Path) -> bytes | None:
    try:
        member = archives.find(path)
        if member is not None:
            return member.head(64)
        with open(path, "rb", buffering=0) as file:
            return file.read(64)
    except (OSError, archives.ArchiveError):
        return None


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, told by its content."""
    head = _head(path)
    return head is not None and _is_picture(path, head)


def _is_picture(path: Path, head: bytes) -> bool:
    """By content: the first 64 bytes, and where these do not say, by what Pillow makes of the file's header."""
    if head.startswith(SIGNATURES) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        return True
    if is_avif(head) or is_heic(head):
        return True
    is_text = not head.translate(None, PRINTABLE)
    if is_text and not head.startswith(TEXT_PICTURES):
        return False
    try:
        member = archives.find(path)
        source = path if member is None else io.BytesIO(member.head(ENOUGH_TO_TELL))
        with Image.open(source) as image:
            return image.format not in NOT_DECODED and (image.format != "EPS" or has_ghostscript())
    except Exception:
        return False


def is_avif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and (head[8:12] in (b"avif", b"avis") or b"avif" in head[16:64])


def is_heic(head: bytes) -> bool:
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and head[8:12] in brands and not is_avif(head)


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

    def place(path: Path) -> float:
        stem = re.sub(r"_[a-d]$", "", path.stem)
        return int.from_bytes(hashlib.sha256(os.fsencode(stem)).digest()[:8], "big") / 2**64  # 0..1, evenly spread

    held_out = [path for path in paths if place(path) < share]
    if len(held_out) == len(paths):
        raise UserError(f"{flag} {share}: all {len(paths)} pictures of {paths[0].parent} would be held out")
    return [path for path in paths if place(path) >= share], held_out


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
        self.folder, self.flag, self.total, self.left_out = folder, flag, total, left_out
        self.paths: set[str] = set()

    def add(self, path: Path, reason: str) -> None:
        """Raises UserError when more than a tenth of the folder's pictures have failed."""
        if str(path) in self.paths:
            return
        self.paths.add(str(path))
        note_of_process(f"skipped {reason}")
        if len(self.paths) > MAX_FAILED_SHARE * self.total:
            raise UserError(
                f"{self.flag} {self.folder}: {len(self.paths)} of {self.total} pictures cannot be used "
                f"(the last: {reason}); mend or remove them, at most 10% may fail"
            )

    def summary(self) -> str:
        counts = [f"{self.total} pictures", f"{len(self.paths)} skipped", self.left_out]
        return f"{self.flag} {self.folder}: {', '.join(filter(None, counts))}"


def open_folder(
    folder: Path, flag: str, max_pixels: int, output: Path | None = None
) -> tuple[list[Path], FailedPictures]:
    """The pictures of a folder and the tally of its failures; some are decoded now, see `_usable`.

    Raises UserError as `find_pictures` and `_usable` do.
    """
    contents = _look_through(folder, flag, output)
    paths = contents.pictures
    failed = FailedPictures(folder, flag, len(paths), contents.describe_left_out())
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
    folder: Path, flag: str, side: int, max_pixels: int, output: Path | None = None
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
        paths = find_pictures(folder / part, flag, output)
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

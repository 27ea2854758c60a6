"""One picture in and out: decoded upright and in sRGB, whatever its metadata says; normalised; saved."""

import io
import math
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import archives
from utils import UserError, missing, note_of_process, write_atomically

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Any suffix that names a picture file to write (reading goes by content, not by suffix).
OUTPUT_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF",
                  ".tiff": "TIFF"}
# Run lengths alone make a painted picture's PNG smaller than all of deflate does, in a quarter of the time.
WRITING = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_type": zlib.Z_RLE}}
ALPHA_FORMATS = ("PNG", "WEBP", "TIFF")  # what can hold transparency in full
MAX_PIXELS = 500_000_000  # Painter by Numbers goes up to about 200 million
# Kinds that Pillow tells apart but leaves to other programs, which are hardly ever there.
NOT_DECODED = ("BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS")
HEIC = re.compile(rb"(?s).{4}ftyp(hei[cx]|hev[cx]|m[is]f1)")
# Primaries and transfer function, by their numbers in ITU-T H.273, of a PNG's cICP and of an AVIF's or HEIC's nclx.
CODED_COLOURS = re.compile(rb"(?s)\0\0\0\x04cICP(.)(.)|colrnclx\0(.)\0(.)")
WIDE, HDR = (9, 11, 12), (16, 18)  # BT.2020 and P3; PQ and HLG
MOST_TOLD = 10  # pictures of a folder that are named for the same reason


class PictureError(Exception):
    """A picture that cannot be used; the message names the file and the reason."""


# ------------------------------------------------------------------------------------------------ reading


Side = int | None  # in pixels; None leaves it as it is
Source = Path | Image.Image  # a file, or a picture at hand, which stays as it is and is taken as its file would be


def load_picture(path: Source, imsize: Side = None, cropsize: Side = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture of any kind that Pillow reads as upright 8-bit RGB, in sRGB, with its transparent pixels laid on white;
    of several frames or pages the first.

    imsize: of its shorter side, in proportion (bicubic, antialiased); cropsize: of a square from its centre, to which a
    smaller picture is enlarged. Raises PictureError for what is no whole picture, or has more than `max_pixels`.
    """
    with _reading(path):
        picture = _load(path, imsize, cropsize, max_pixels)
        if picture.mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        return picture


def prepare_picture(path: Source, imsize: Side = None, cropsize: Side = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """`load_picture` as (1, 3, H, W), uint8, 0..255."""
    return pil_to_tensor(load_picture(path, imsize, cropsize, max_pixels))[None]


def load_alpha(path: Source, imsize: Side = None, cropsize: Side = None,
               max_pixels: int = MAX_PIXELS) -> Image.Image | None:
    """How opaque each pixel of `load_picture` is, mode L; None where all are fully. Raises PictureError as it does."""
    if (seen := path if isinstance(path, Image.Image) else look_at(path)) and not seen.has_transparency_data:
        return None
    with _reading(path):
        picture = _load(path, imsize, cropsize, max_pixels)
        return picture.getchannel("A") if picture.mode == "RGBA" else None


def look_at(path: Path) -> Image.Image | None:
    """A picture of which only the header is read, closed; None where that cannot be, and for a raw file's preview."""
    with suppress(Exception), archives.open_file(path) as file, _lifted_limits():
        image = Image.open(file)
        return None if is_preview(image) else image


def is_picture(path: Path) -> bool:
    """Whether Pillow takes a file for a picture by its header, whatever its name; False where it cannot be read."""
    with suppress(Exception), archives.open_file(path) as file:  # of an archive, zipfile's own errors, too
        head = file.read(64)
        if HEIC.match(head):  # which Pillow tells only with pillow-heif
            return True
        if not re.fullmatch(rb"(?!P[1-7])[\t\n\r\f -~]+", head):  # text, but no Netpbm: Pillow would take far longer
            return (seen := look_at(path)) is not None and seen.format not in NOT_DECODED
    return False


def _load(path: Source, imsize: Side, cropsize: Side, max_pixels: int) -> Image.Image:
    """`load_picture` as RGB, or RGBA where not all of it is opaque."""
    picture = _decode(path, max(imsize, cropsize or 0) if imsize else None, max_pixels)
    if not (shorter := min(picture.size)):
        raise PictureError("it has no pixels")
    side = max(imsize or shorter, cropsize or 0)
    if side != shorter:
        width, height = (max(side, round(length * (side / shorter))) for length in picture.size)
        if width * height > max_pixels:
            raise PictureError(f"with its shorter side at {side} it would have {width} x {height} pixels, more "
                               f"than --max_pixels {max_pixels}")
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    if cropsize is None:
        return picture
    left, top = (picture.width - cropsize) // 2, (picture.height - cropsize) // 2
    return picture.crop((left, top, left + cropsize, top + cropsize))


def _name(source: Source) -> str:
    return str(getattr(source, "filename", None) or "the picture" if isinstance(source, Image.Image) else source)


@contextmanager
def _reading(source: Source):
    """Within the block Pillow's limits are lifted, and any error becomes a PictureError, one line naming the file."""
    try:
        with _lifted_limits():
            yield
    except Exception as error:
        reasons = {
            FileNotFoundError: missing(_name(source)), PermissionError: "no permission to read it", PictureError: error,
            MemoryError: "not enough memory for it is free",
            UnidentifiedImageError: "not a readable picture (of no kind that Pillow knows)"}
        other = f"not a readable picture ({type(error).__name__}: {' '.join(str(error).split())})"
        raise PictureError(f"{_name(source)}: {reasons.get(type(error), other)}") from error


# Below real paintings, for which --max_pixels stands in, and below the size of real files' texts and profiles.
_LIMITS = ((Image, "MAX_IMAGE_PIXELS", None), (PngImagePlugin, "MAX_TEXT_CHUNK", 2**26),
           (PngImagePlugin, "MAX_TEXT_MEMORY", 2**28))
_lock, _lifted = threading.Lock(), []  # a list of Pillow's own limits for each block that is entered


@contextmanager
def _lifted_limits():
    """Pillow's limits are the whole program's: they are lifted only while one of its threads reads a picture here."""
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


# ----------------------------------------------------------------------------------------------- decoding


def _decode(path: Source, shorter_side: int | None, max_pixels: int) -> Image.Image:
    """RGB, or RGBA where not all of it is opaque; upright, in sRGB. A JPEG may come at 1/2, 1/4 or 1/8 of its size,
    never below `shorter_side`, which is far faster."""
    if isinstance(path, Image.Image):
        return _loaded(path, _name(path), is_ours=False)
    with archives.open_file(path) as file:
        content = file.read()
    reason = None
    for attempt in _attempts(content):
        try:
            with Image.open(io.BytesIO(attempt)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise PictureError(f"{width} x {height} pixels are more than --max_pixels {max_pixels}")
                if shorter_side is not None and image.format == "JPEG":
                    shrink = shorter_side / min(width, height)
                    image.draft(None, (math.ceil(width * shrink), math.ceil(height * shrink)))
                return _loaded(image, str(path))
        except (PictureError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError and more
            reason = reason or error
    raise reason


def _loaded(image: Image.Image, name: str, is_ours: bool = True) -> Image.Image:
    """An opened picture as `_shown` has it, with what is lost said; one that is not ours stays as it is. Raises
    PictureError for a raw file's preview."""
    if is_preview(image):
        raise PictureError(f"only its preview of {image.width} x {image.height} pixels can be read (a camera's raw "
                           "file?); save it as a JPEG, PNG or plain TIFF")
    # Only of kinds that name their colours so: searching it takes milliseconds.
    head = _read_at(image, 0, 2**20) if image.format in ("PNG", "AVIF", "HEIF") else b""
    if coded := CODED_COLOURS.search(head):
        primaries, transfer = (each[0] for each in coded.groups() if each)
        if transfer in HDR or primaries in WIDE and "icc_profile" not in image.info:
            _tell(name, "its high dynamic range or wide gamut (cICP or nclx) is not converted: it is taken for sRGB, "
                        "paler than it is")
    image.load()
    with suppress(Exception):  # the frames behind may be damaged
        if is_ours and image.format in ("GIF", "PNG", "WEBP", "AVIF") and image.is_animated:
            _tell(name, "it is animated: its first frame alone is taken")
    keys = image.info.get("transparency")
    if head and image.mode in ("1", "L", "RGB") and keys is not None:
        bits = head[24]  # a PNG's one transparent colour counts in these, Pillow's pixels in 8
        scaled = [key >> 8 if bits == 16 else min(255, key * 255 // (2**bits - 1)) for key in np.ravel(keys).tolist()]
        image.info["transparency"] = tuple(scaled) if isinstance(keys, tuple) else scaled[0]
    return _shown(image if is_ours else image.copy())


def is_preview(image: Image.Image) -> bool:
    """Whether a TIFF's first picture is a smaller copy of another in it, as in cameras' raw files (NEF, CR2, ARW, DNG).
    Of one that is loaded already, the tags of the first alone are known."""
    if image.format != "TIFF":
        return False
    with suppress(Exception):  # what it says may be broken
        tags, head = image.tag_v2, _read_at(image, 0, 10)
        if tags.get(254, 0) & 1 or tags.get(255) == 2 or 50706 in tags or head[8:] == b"CR":  # a copy; DNG; CR2
            return True
        order = "<" if head.startswith(b"I") else ">"
        for place in tags.get(330, ()):  # directories of further pictures
            (count,) = struct.unpack(order + "H", _read_at(image, place, 2))
            entries = struct.iter_unpack(order + "HHII", _read_at(image, place + 2, 12 * count))
            further = {tag: value >> 16 if (kind, order) == (3, ">") else value for tag, kind, _, value in entries}
            if further[256] * further[257] > image.width * image.height:
                return True
    return False


def _read_at(image: Image.Image, place: int, size: int) -> bytes:
    """Bytes of the file of a picture that is open, which stays where it was; none where it is not open."""
    with suppress(Exception):
        before = image.fp.tell()
        image.fp.seek(place)
        content = image.fp.read(size)
        image.fp.seek(before)
        return content
    return b""


told: dict[tuple[str, str], set[str]] = {}  # pictures that were named, by what was said of them and by their folder


def _tell(name: str, what: str) -> None:
    """Say what is not done with a picture; once, and of many in a folder not each. Processes that decode for a training
    say nothing: the check at its start has."""
    named = told.setdefault((what, os.path.dirname(name)), set())
    if name not in named and len(named) <= MOST_TOLD and parent_process() is None:
        named.add(name)
        note_of_process(f"{name}: {what}" if len(named) <= MOST_TOLD else f"more pictures, not named: {what}")


def _attempts(content: bytes) -> Iterator[bytes]:
    """A picture file and, should Pillow refuse it, the file without metadata that may be why, with less and less of it.

    Raises PictureError for a HEIC picture where pillow-heif is not installed.
    """
    yield content
    if HEIC.match(content):
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise PictureError("a HEIC picture; to read it: pip install pillow-heif") from error
        register_heif_opener()
        yield content
    with suppress(struct.error, IndexError):  # the structure itself is broken
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            for kept in ((b"tRNS", b"eXIf", b"cICP", b"iCCP", b"iTXt", b"tEXt", b"zTXt"), (b"tRNS", b"eXIf", b"cICP"),
                         (b"eXIf",)):
                yield _mended_png(content, kept)
        elif content.startswith(b"\xff\xd8\xff"):
            yield _mended_jpeg(content)
        elif content[4:8] == b"ftyp":  # AVIF and HEIC: what turns and colours them stands elsewhere
            yield re.sub(rb"(?s)(infe\x02.{7}|infe\x03.{9})(?:Exif|mime)", rb"\1skip", content, count=2)


def _mended_png(content: bytes, kept: tuple[bytes, ...]) -> bytes:
    """With the chunks that every reader needs, and those `kept`, whatever their checksums say."""
    parts, place, name = [content[:8]], 8, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        if name in kept:
            chunk = chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if name in kept or name[:1].isupper():
            parts.append(chunk)
        place += len(chunk)
    return b"".join(parts)


def _mended_jpeg(content: bytes) -> bytes:
    """With those segments of applications that say how to show the pixels, where they are whole."""
    parts, place = [content[:2]], 2
    while content[place + 1] != 0xDA:  # here the pixels begin
        marker, length = struct.unpack_from(">xBH", content, place)
        segment = content[place : place + 2 + length]
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_metadata or re.match(rb"(?s).{4}(Exif\0.{3}|ICC_PROFILE\0.{3}|Adobe.{7})", segment):
            parts.append(segment)
        place += len(segment)
    return b"".join(parts) + content[place:]


# ----------------------------------------------------------------------------------------- as it is shown

FROM_16_BITS = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255
SRGB = ImageCms.createProfile("sRGB")
# 16 x 16 x 16 colours, greys among them, by which a profile is tried.
COLOURS = Image.fromarray(np.mgrid[:256:17, :256:17, :256:17].reshape(3, 64, 64).transpose(1, 2, 0).astype(np.uint8))


def _shown(image: Image.Image) -> Image.Image:
    """A loaded picture, which is turned in place, as RGB, or RGBA where not all of it is opaque; upright, in sRGB."""
    with suppress(Exception):  # its EXIF, or where that says nothing its XMP, may be broken in any way
        ImageOps.exif_transpose(image, in_place=True)
    colour, alpha = _separate(image)
    colour = _in_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        colour.putalpha(alpha)
    colour.info = {}  # a profile in there would be written into what is saved of it
    return colour


def _separate(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours, mode RGB, L or CMYK, and how opaque they are, mode L, None for all fully."""
    if image.mode == "F":
        raise PictureError("floating-point pixels have no known range; 8 or 16 bits are needed")
    if image.mode.startswith("I"):  # 16-bit grey
        values, key = np.asarray(image), image.info.get("transparency")
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return Image.fromarray(FROM_16_BITS[values.clip(0, 65535)]), alpha
    alpha, grey = None, image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("L" if grey else "RGB")
    return image, alpha if alpha and alpha.getextrema()[0] < 255 else None


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture of mode RGB, L or CMYK in the colours of an ICC profile, as RGB in sRGB."""
    for mode in (image.mode, "RGB"):  # a grey picture may have a profile of greys or of colours
        if profile and (transform := _srgb_transform(profile, mode)):
            return ImageCms.applyTransform(image.convert(mode), transform)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where nothing is to be done: the profile is sRGB by another name, of another kind of picture, or broken."""
    try:
        # Made quick for 8 bits, the conversion of greys would be too coarse in the dark.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(io.BytesIO(profile), SRGB, mode, "RGB", flags=flags)
        colours = COLOURS.convert(mode)
        changes = ImageChops.difference(ImageCms.applyTransform(colours, transform), colours.convert("RGB"))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform if max(most for _, most in changes.getextrema()) > 1 else None


# ------------------------------------------------------------------------------------------ in the network


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
    """(B, 3, H, W), ImageNet-normalised, to float32 clipped to 0..1. Raises UserError for values that are not finite,
    which would be written as black."""
    if not image.isfinite().all():
        raise UserError("a picture has values that are not finite: the network is damaged, or its training diverged")
    mean, std = _imagenet_statistics(image.device)
    return (image.float() * std + mean).clamp(0.0, 1.0)


# ------------------------------------------------------------------------------------------------ writing


def to_pil(image: Tensor) -> Image.Image:
    """One picture, (3, H, W) or (1, 3, H, W), 0..1, to a Pillow image."""
    return to_pil_image((image * 255.0).round().byte().reshape(image.shape[-3:]))


def save_picture(image: Image.Image, path: Path, alpha: Image.Image | None = None) -> None:
    """Write a picture in the format of `path`'s suffix, atomically; with `alpha`, mode L and of its size, where the
    format is one of ALPHA_FORMATS. Raises UserError, naming the file and the reason, when it cannot be written."""
    kind = OUTPUT_FORMATS[Path(path).suffix.lower()]
    if alpha is not None and kind in ALPHA_FORMATS:
        image = image.copy()
        image.putalpha(alpha)
    try:
        write_atomically(path, lambda file: image.save(file, kind, **WRITING.get(kind, {})))
    except (OSError, ValueError, struct.error) as error:  # a full disk, or a side that the format cannot hold
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the picture ({image.width} x {image.height}) cannot be written ({reason})") from error


def read_written(path: Path) -> Image.Image | None:
    """What `save_picture` wrote there, RGB, without its alpha; None where there is no picture, or a damaged one."""
    with suppress(Exception), _lifted_limits(), Image.open(path) as image:  # whatever Pillow's decoders raise
        return image.convert("RGB")

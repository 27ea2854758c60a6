"""What a picture says beside its pixels: which way up it is and in which colours. Nothing of that costs a picture: what
cannot be read is as if it were not there."""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms

TURNS = {number: Image.Transpose[name] for number, name in enumerate((
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), start=2)}
SRGB = ImageCms.createProfile("sRGB")
# 16 x 16 x 16 colours, greys among them, by which a profile is tried.
COLOURS = Image.fromarray(np.mgrid[:256:17, :256:17, :256:17].reshape(3, 64, 64).transpose(1, 2, 0).astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture turned as its EXIF or, where that says nothing, its XMP says."""
    try:
        turn = TURNS[image.getexif()[ExifTags.Base.Orientation]]
    except Exception:  # there is none, or whatever may be wrong with the block
        return image
    return image.transpose(turn)


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
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


def mended(content: bytes) -> Iterator[bytes]:
    """A picture file that Pillow refuses, without the metadata that may be why, keeping more of it at first."""
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            yield _mended_png(content, (b"tRNS", b"eXIf", b"iCCP", b"iTXt", b"tEXt", b"zTXt"))
            yield _mended_png(content, (b"tRNS", b"eXIf"))
            yield _mended_png(content, (b"eXIf",))
        elif content.startswith(b"\xff\xd8\xff"):
            yield _mended_jpeg(content)
        elif content[4:8] == b"ftyp":  # AVIF and HEIC: what turns and colours them stands elsewhere
            yield re.sub(rb"(?s)(infe\x02.{7}|infe\x03.{9})(?:Exif|mime)", rb"\1skip", content, count=2)
    except (struct.error, IndexError):  # the structure itself is broken
        return


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
    least = {b"Exif\0": 8, b"ICC_PROFILE\0": 15, b"JFIF\0": 14, b"Adobe": 12}  # bytes
    parts, place = [content[:2]], 2
    while content[place + 1] != 0xDA:  # here the pixels begin
        marker, length = struct.unpack_from(">xBH", content, place)
        segment = content[place : place + 2 + length]
        is_whole = any(segment[4:].startswith(name) and length - 2 >= most for name, most in least.items())
        if is_whole or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append(segment)
        place += len(segment)
    return b"".join(parts) + content[place:]

"""What a picture file says beside its pixels: which way up it is and in which colours; and the file without it.

Nothing here costs a picture: what cannot be read is as if it were not there.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

MAX_UNPACKED = 64 * 2**20  # bytes of one compressed profile or text: any real one is far smaller
LARGEST_SRGB_DIFFERENCE = 1  # of 255: a profile that changes no colour by more is sRGB by another name

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Metadata:
    """The raw bytes, empty where a picture has none."""

    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""

    @classmethod
    def of(cls, image: Image.Image) -> "Metadata":
        """Of a picture that Pillow has loaded: PNGs may hold some behind their pixels."""
        info = {key: value.encode() if isinstance(value, str) else value for key, value in image.info.items()
                if isinstance(value, (str, bytes))}
        exif = info.get("exif") or _unpack_hex(info.get("Raw profile type exif", b""))
        return cls(exif, info.get("xmp") or info.get("XML:com.adobe.xmp", b""), info.get("icc_profile", b""))

    def upright(self, image: Image.Image) -> Image.Image:
        """The picture turned as its EXIF says or, where that says nothing, its XMP."""
        turn = TRANSPOSITIONS.get(_exif_orientation(self.exif) or _xmp_orientation(self.xmp))
        return image if turn is None else image.transpose(turn)


def _exif_orientation(exif: bytes) -> int | None:
    """1 to 8, or None where there is none to be read. What a cut-off block still holds is read."""
    start = re.search(rb"II\*\0|MM\0\*", exif[:64])
    if start is None:
        return None
    block = exif[start.start() :]
    order = "<" if block.startswith(b"II") else ">"
    try:
        directory, = struct.unpack_from(order + "I", block, 4)
        entries, = struct.unpack_from(order + "H", block, directory)
        for place in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", block, place)
            if tag == 0x0112 and count == 1:
                code = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}.get(kind)  # the whole-numbered types
                value = struct.unpack_from(order + code, block, place + 8)[0] if code else 0
                if 1 <= value <= 8:
                    return value
    except struct.error:  # cut off
        pass
    return None


def _xmp_orientation(xmp: bytes) -> int | None:
    found = re.search(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])\s*["'<]""", xmp)
    return int(found[1]) if found else None


# --------------------------------------------------------------------------------------- colour profiles


@lru_cache(maxsize=64)
def srgb_conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """What brings pictures of `mode` (RGB, L or CMYK) from the colours of an ICC profile to sRGB, mode RGB.

    None where nothing is to be done: the profile is sRGB itself, is of another kind of picture or broken.
    """
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        takes = {("RGB", "RGB"): "RGB", ("RGB", "L"): "RGB", ("GRAY", "L"): "L", ("CMYK", "CMYK"): "CMYK"}[space, mode]
        # Made quick for 8 bits, its conversion of greys is too coarse in the dark; a table of them is quick enough.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), takes, "RGB", flags=flags)
        colours = _colours(mode)
        actual = np.asarray(ImageCms.applyTransform(Image.fromarray(colours[None]).convert(takes), transform))[0]
    except (ImageCms.PyCMSError, KeyError, OSError, ValueError, TypeError):
        return None
    if mode != "CMYK" and np.abs(actual.astype(int) - colours).max() <= LARGEST_SRGB_DIFFERENCE:
        return None
    if mode == "L":
        tables = [actual[:, channel].tolist() for channel in range(3)]
        return lambda image: Image.merge("RGB", [image.point(table) for table in tables])
    return lambda image: ImageCms.applyTransform(image, transform)


def _colours(mode: str) -> np.ndarray:
    """All greys, and but for mode L a cube of 16 x 16 x 16 colours: (N, 3), uint8."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    if mode == "L":
        return greys
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1)
    return np.concatenate([greys, cube.reshape(-1, 3)])


# ------------------------------------------------------------------------------- files without metadata


def strip_metadata(content: bytes) -> tuple[bytes, Metadata | None] | None:
    """A picture file without what is not needed for its pixels, and what of that says how to show them; None for the
    latter where that is still in the file.

    For files that Pillow refuses because of their metadata. Pixel data stays what it is: damaged, it is refused
    again. None for kinds of files of which no such trouble is known.
    """
    for matches, strip in (
        (content.startswith(b"\xff\xd8\xff"), _strip_jpeg),
        (content.startswith(b"\x89PNG\r\n\x1a\n"), _strip_png),
        (content.startswith(b"RIFF") and content[8:12] == b"WEBP", _strip_webp),
        (content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _strip_tiff),
        (content[4:8] == b"ftyp", _strip_heif),
    ):
        if matches:
            try:
                return strip(content)
            except (struct.error, IndexError, ValueError):  # its structure itself is broken
                return None
    return None


def _strip_jpeg(content: bytes) -> tuple[bytes, Metadata]:
    kept, exif, xmp, profile = [content[:2]], b"", b"", []
    place = 2
    while True:
        place = content.index(b"\xff", place)
        marker = content[place + 1]
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8:  # padding, and markers without a length
            place += 1
            continue
        end = place + 2 + struct.unpack_from(">H", content, place + 2)[0]
        body = content[place + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0"):
            exif += body[6:]
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            profile.append(body[12:])
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        # Two of them say how colours are stored.
        is_needed = (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
                     or marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12)
        if not is_metadata or is_needed:
            kept.append(content[place:end])
        place = end
        if marker == 0xDA:  # start of scan: pixel data from here on
            kept.append(content[end:])
            return b"".join(kept), Metadata(exif, xmp, b"".join(part[2:] for part in sorted(profile)))


def _strip_png(content: bytes) -> tuple[bytes, Metadata]:
    kept, exif, xmp, profile = [content[:8]], b"", b"", b""
    place = 8
    kind = content[25]
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        body = content[place + 8 : place + 8 + length]
        is_critical = not name[0] & 0x20
        if is_critical:
            kept.append(content[place : place + 12 + length])
        elif name == b"tRNS" and len(body) >= {0: 2, 2: 6, 3: 1}.get(kind, 1):
            kept.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
        elif name == b"eXIf":
            exif = exif or body
        elif name == b"iCCP":
            profile = _inflate(body.partition(b"\0")[2][1:])
        elif name == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            is_packed, (_, _, text) = body[18:19] == b"\1", body[20:].split(b"\0", 2)
            xmp = _inflate(text) if is_packed else text
        elif name in (b"zTXt", b"tEXt") and body.startswith(b"Raw profile type exif\0"):
            text = body[22:]
            exif = exif or _unpack_hex(_inflate(text[1:]) if name == b"zTXt" else text)
        place += 12 + length
        if name == b"IEND":
            break
    return b"".join(kept), Metadata(exif, xmp, profile)


def _strip_webp(content: bytes) -> tuple[bytes, Metadata]:
    kept, found = [], {}
    place = 12
    while place + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, place)
        body = content[place + 8 : place + 8 + length]
        if name == b"VP8X":
            body = bytes([body[0] & ~0x2C]) + body[1:]  # no profile, no EXIF, no XMP
        if name in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(struct.pack("<4sI", name, length) + body + b"\0" * (length % 2))
        else:
            found[name] = body
        place += 8 + length + length % 2
    chunks = b"WEBP" + b"".join(kept)
    metadata = Metadata(found.get(b"EXIF", b""), found.get(b"XMP ", b""), found.get(b"ICCP", b""))
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks, metadata


# What a TIFF's pixels depend on: sizes, compression, photometry, strips and tiles, palette, samples, JPEG and YCbCr.
TIFF_PIXEL_TAGS = {254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324,
                   325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}


def _strip_tiff(content: bytes) -> tuple[bytes, Metadata]:
    """Its first directory alone, with fewer tags, behind the file. An orientation stays in it: Pillow applies that."""
    order = "<" if content.startswith(b"II") else ">"
    is_big = content[2:4] in (b"+\0", b"\0+")
    # The formats of a directory's place, its number of entries, and an entry: tag, type, count, value or its place.
    pointer, number, entry = ("Q", "Q", "HHQQ") if is_big else ("I", "H", "HHII")
    header = 8 if is_big else 4
    directory, = struct.unpack_from(order + pointer, content, header)
    count, = struct.unpack_from(order + number, content, directory)
    size = struct.calcsize(order + entry)
    first = directory + struct.calcsize(order + number)
    kept, profile = [], b""
    for place in range(first, first + size * count, size):
        tag, kind, values, value = struct.unpack_from(order + entry, content, place)
        if tag == 34675:
            profile = content[value : value + values]
        if tag in TIFF_PIXEL_TAGS and (tag != 274 or (kind, values) == (3, 1)):
            kept.append(content[place : place + size])
    content += b"\0" * (len(content) % 2)
    new = struct.pack(order + number, len(kept)) + b"".join(kept) + struct.pack(order + pointer, 0)
    start = struct.pack(order + pointer, len(content))
    return content[:header] + start + content[header + len(start) :] + new, Metadata(profile=profile)


def _strip_heif(content: bytes) -> tuple[bytes, None]:
    """AVIF and HEIC: the items Exif and XMP under names that no reader knows. What turns and colours is no item."""
    head, rest = content[: 2**20], content[2**20 :]
    head = re.sub(rb"(infe\x02.{3}.{4}|infe\x03.{3}.{6})(?:Exif|mime)", rb"\1skip", head, flags=re.DOTALL)
    return head + rest, None


def _inflate(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MAX_UNPACKED)
    except zlib.error:
        return b""


def _unpack_hex(text: bytes) -> bytes:
    """ImageMagick's way of keeping a block in a PNG: a name, a length and hexadecimal digits, in lines."""
    digits = re.sub(rb"[^0-9A-Fa-f]", b"", b"".join(text.split(b"\n")[3:]))
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode())

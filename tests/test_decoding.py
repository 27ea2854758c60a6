"""Metadata never costs a picture, colours come as sRGB, transparency is kept, Pillow's limits stay the program's.

Files are built byte by byte where Pillow would not write them so. Colours are compared to the formulas of the
standards, not to the library that converts them.
"""

import re
import struct
import sys
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import pixels, refused, write_map, write_noise
from PIL import Image, ImageCms, PngImagePlugin, features

import data
from data import PictureError, is_picture, load_alpha, load_picture, prepare_picture

# --------------------------------------------------------------------------------------- files, by the byte


def exif_block(orientation=6, order="<", kind=3, count=1, more=b"") -> bytes:
    """A TIFF block with one directory of a Make tag and the orientation."""
    value = {1: "B3x", 3: "H2x", 4: "I", 8: "h2x", 9: "i"}.get(kind, "I")
    entries = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"abc\0")
    entries += struct.pack(order + "HHI", 0x0112, kind, count) + struct.pack(order + value, orientation)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", 2) + entries + struct.pack(order + "I", 0) + more


def png_chunk(name: bytes, body: bytes, spoil=0) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", (zlib.crc32(name + body) + spoil) % 2**32)


def with_png_chunks(path, *chunks: bytes, behind: bool = False):
    """`chunks` put into a PNG before its pixels, or behind them."""
    content = path.read_bytes()
    place = content.index(b"IEND" if behind else b"IDAT") - 4
    path.write_bytes(content[:place] + b"".join(chunks) + content[place:])
    return path


def with_jpeg_segments(path, *segments: tuple[int, bytes]):
    content = path.read_bytes()
    added = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    path.write_bytes(content[:2] + added + content[2:])
    return path


def with_exif(path, block: bytes):
    """A `write_map` of 40 x 30 with EXIF in any bytes."""
    if path.suffix == ".png":
        return with_png_chunks(write_map(path), png_chunk(b"eXIf", block))
    if path.suffix == ".jpg":
        return with_jpeg_segments(write_map(path), (0xE1, b"Exif\0\0" + block))
    with Image.open(write_map(path.with_suffix(".png"))) as image:
        image.save(path, exif=block, lossless=True)
    return path


def assert_is_map(path, orientation: int = 1, tolerance: int = 0):
    """The picture is `write_map`'s, turned."""
    actual = pixels(load_picture(path))
    desired = np.stack(np.broadcast_arrays(5 * np.arange(40)[None, :], 7 * np.arange(30)[:, None], 0), axis=-1)
    if orientation in (2, 4, 5, 7):  # mirrored, too
        desired = desired[:, ::-1]
    turned = np.rot90(desired, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation])
    assert actual.shape == turned.shape
    assert np.abs(actual - turned).mean() <= tolerance


TOLERANCE = {".png": 0, ".webp": 0, ".jpg": 4}
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


# --------------------------------------------------------------------------------------------- orientation


MALFORMED = {
    "empty": b"", "text": b"no exif at all", "header": b"II*\0", "zeros": b"\0" * 64,
    "cut": exif_block()[:16], "far": b"II*\0" + struct.pack("<I", 2**31), "itself": b"II*\0\x04\0\0\0" + b"\xff" * 90,
    "many": b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 30, "0": exif_block(0), "9": exif_block(9),
    "large": exif_block(60000), "negative": exif_block(-3, kind=8), "text_type": exif_block(0x36, kind=2),
    "fraction": exif_block(26, kind=5), "unknown_type": exif_block(6, kind=77), "no_values": exif_block(6, count=0),
    "two_values": exif_block(2**20, kind=5, count=2**31 - 1), "wrong_order": b"MM*\0" + exif_block()[4:],
}
READABLE = {
    "short": exif_block(), "big_endian": exif_block(order=">"), "long": exif_block(kind=4),
    "signed": exif_block(kind=9), "cut": exif_block()[:34], "cut_big_endian": exif_block(order=">")[:36],
    "more": exif_block(more=b"\xff" * 50),
    "too_many": b"II*\0\x08\0\0\0\xff\xff" + exif_block()[10:34], "twice": b"Exif\0\0" + exif_block(),
}


@pytest.mark.parametrize("suffix", TOLERANCE)
def test_orientation_is_read_where_it_can_be_and_costs_nothing_elsewhere(tmp_path, suffix):
    each = {number: exif_block(number) for number in range(1, 9)}
    for blocks, orientation in ((MALFORMED, 1), (READABLE, 6), (each, None)):
        for name, block in blocks.items():
            assert_is_map(with_exif(tmp_path / f"{name}{suffix}", block), orientation or name, TOLERANCE[suffix])


@needs_avif
def test_malformed_exif_in_avif(tmp_path):
    """What turns it stands elsewhere, and Pillow writes it there."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "the maker of it"
    with Image.open(write_map(tmp_path / "a.png")) as image:
        image.save(tmp_path / "a.avif", exif=exif, quality=95)
    whole = (tmp_path / "a.avif").read_bytes()
    for damage in (b"no exif!", b"\0" * 8, b"II*\0\xff\xff\xff\x7f"):
        place = re.search(rb"II\*\0|MM\0\*", whole).start()
        (tmp_path / "a.avif").write_bytes(whole[:place] + damage + whole[place + len(damage) :])
        assert_is_map(tmp_path / "a.avif", 6, 6)


def test_orientation_in_xmp_and_as_imagemagick_keeps_it(tmp_path):
    for number, xmp in enumerate((b'<x tiff:Orientation="6"/>', b"<tiff:Orientation>6</tiff:Orientation>")):
        chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        assert_is_map(with_png_chunks(write_map(tmp_path / f"{number}.png"), chunk), 6)
        path = write_map(tmp_path / f"{number}.jpg")
        assert_is_map(with_jpeg_segments(path, (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)), 6, 4)
    text = b"Raw profile type exif\0\nexif\n      38\n" + exif_block(8).hex().encode() + b"\n"
    for number, more in enumerate((b"", png_chunk(b"gAMA", b"\0"))):
        assert_is_map(with_png_chunks(write_map(tmp_path / f"magick{number}.png"), more, png_chunk(b"tEXt", text)), 8)


# ------------------------------------------------------------------------------- metadata that Pillow refuses


LARGE = 2 * PngImagePlugin.MAX_TEXT_CHUNK
BAD_CHUNKS = {
    "text": png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"A" * LARGE)),
    "profile": png_chunk(b"iCCP", b"name\0\0" + zlib.compress(b"A" * LARGE)),
    "profile_method": png_chunk(b"iCCP", b"name\0\7" + zlib.compress(b"A")),
    "profile_unended": png_chunk(b"iCCP", b"name"), "profile_no_zlib": png_chunk(b"iCCP", b"name\0\0abc"),
    "memory": png_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"A" * 2**20)) * 65,  # above Pillow's 64 MiB
    "gamma": png_chunk(b"gAMA", b"\0"), "colours": png_chunk(b"cHRM", b"\0" * 9), "srgb": png_chunk(b"sRGB", b""),
    "size": png_chunk(b"pHYs", b"\0\0"), "transparency": png_chunk(b"tRNS", b"\0"),
    "frame": png_chunk(b"acTL", b"\0\0\0\2\0\0\0\0") + png_chunk(b"fcTL", b"\0\0\0\7"),
    "checksum": png_chunk(b"tEXt", b"comment\0abc", spoil=1),
}


def test_large_chunks_are_read(tmp_path):
    """A picture editor's XMP, of which the orientation counts; a profile."""
    xmp = b'<x tiff:Orientation="3"/>' + b"A" * LARGE
    chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))
    assert_is_map(with_png_chunks(write_map(tmp_path / "a.png"), chunk), 3)
    values = colour_patches()
    for chunks in ((), (BAD_CHUNKS["gamma"],)):
        Image.fromarray(values).save(tmp_path / "b.png", icc_profile=rgb_profile(*SPACES["adobe"]) + b"\0" * LARGE)
        with_png_chunks(tmp_path / "b.png", *chunks)
        assert np.abs(pixels(load_picture(tmp_path / "b.png")) - as_srgb(values, "adobe")).max() <= 2


BAD_SEGMENTS = {
    "icc": (0xE2, b"ICC_PROFILE\0\1"), "pages": (0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\2"),
    "jfif": (0xE0, b"JFIF\0"), "adobe": (0xEE, b"Adobe"), "photoshop_cut": (0xED, b"Photoshop 3.0\x008BIM\0\0"),
    "comment": (0xFE, b"\xff" * 9),
}


@pytest.mark.parametrize("name", [*BAD_CHUNKS, *BAD_SEGMENTS])
def test_what_pillow_refuses_costs_neither_the_picture_nor_its_orientation(tmp_path, name):
    """Chunks of a PNG, before its pixels or behind them, and segments of a JPEG."""
    if name in BAD_SEGMENTS:
        path = with_jpeg_segments(write_map(tmp_path / "a.jpg"), (0xE1, b"Exif\0\0" + exif_block()), BAD_SEGMENTS[name])
        assert_is_map(path, 6, 4)
        return
    for behind in (False, True):
        path = with_png_chunks(write_map(tmp_path / "a.png"), png_chunk(b"eXIf", exif_block(), spoil=behind))
        assert_is_map(with_png_chunks(path, BAD_CHUNKS[name], behind=behind), 6)


def tiff_directory(entries: dict[int, int]) -> bytes:
    values = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return struct.pack("<H", len(entries)) + values + b"\0" * 4


@pytest.mark.parametrize("mark, tags, further, is_preview", [
    (b"", {254: 1}, None, True), (b"", {255: 2}, None, True), (b"", {50706: 1}, None, True),  # NEF, ARW; DNG
    (b"CR\2\0", {}, None, True), (b"", {330: 500}, (41, 30), True), (b"", {254: 0, 274: 6, 330: 500}, (40, 30), False),
    (b"", {255: 1, 330: 2**30}, None, False),
])
def test_preview_of_a_raw_file_is_no_picture(tmp_path, mark, tags, further, is_preview):
    """A TIFF whose first directory is a small copy of what the sensor saw; further: the size of another picture."""
    rows, path = np.asarray(Image.open(write_map(tmp_path / "a.png"))).tobytes(), tmp_path / "DSC_0001.NEF"
    tags = {256: 40, 257: 30, 258: 8, 262: 2, 273: 1000, 277: 3, 278: 30, 279: len(rows)} | tags
    content = struct.pack("<4sI8s", b"II*\0", 16, mark) + tiff_directory(tags)
    content = content.ljust(500, b"\0") + tiff_directory(dict(zip((256, 257), further or ())))
    path.write_bytes(content.ljust(1000, b"\0") + rows)
    assert is_picture(path) is not is_preview
    if is_preview:
        assert "preview of 40 x 30" in refused(path)
        with Image.open(path) as image, pytest.raises(PictureError, match="preview of 40 x 30"):
            prepare_picture(image)
    else:
        assert_is_map(path, tags.get(274, 1))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_cut_pixels_are_refused_and_damaged_metadata_excuses_them_not(tmp_path, suffix):
    path = write_noise(tmp_path / f"cut{suffix}", (64, 64), 0)
    for is_damaged in (False, True):
        if is_damaged and suffix == ".png":
            with_png_chunks(path, BAD_CHUNKS["gamma"])
        elif is_damaged and suffix == ".jpg":
            with_jpeg_segments(path, BAD_SEGMENTS["icc"])
        pixels(load_picture(path))
        whole = path.read_bytes()
        for share in (0.2, 0.5, 0.9):
            path.write_bytes(whole[: int(share * len(whole))])
            for imsize in (None, 8):
                assert "not a readable picture" in refused(path, imsize=imsize)
        path.write_bytes(whole)


# ----------------------------------------------------------------------------------------------- colours


def icc_tag(kind: bytes, body: bytes) -> bytes:
    tag = kind + b"\0\0\0\0" + body
    return tag + b"\0" * (-len(tag) % 4)


def icc_profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2."""
    white = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    tags = {b"desc": icc_tag(b"desc", struct.pack(">I", 5) + b"test\0" + b"\0" * 78), b"cprt": icc_tag(b"text", b"x\0"),
            b"wtpt": icc_tag(b"XYZ ", white), **tags}
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", place + len(body), len(tag))
        body += tag
    head = struct.pack(">I4sI4s4s4s12s4s", place + len(body), b"none", 0x02400000, kind, space, pcs,
                       bytes([7, 232, 0, 1, 0, 1]) + b"\0" * 6, b"acsp")
    return head.ljust(68, b"\0") + white + b"\0" * 48 + table + body


def gamma_curve(gamma: float) -> bytes:
    return icc_tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)))


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """primaries: (3, 3), rows red, green, blue as XYZ at D50."""
    tags = {name + b"TRC": gamma_curve(gamma) for name in (b"r", b"g", b"b")}
    for name, row in zip((b"r", b"g", b"b"), primaries):
        tags[name + b"XYZ"] = icc_tag(b"XYZ ", struct.pack(">3i", *(round(value * 65536) for value in row)))
    return icc_profile(b"RGB ", tags)


ADOBE = np.array([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])
P3 = np.array([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)])
PROPHOTO = np.array([(0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)])
SRGB = np.array([(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)])
SPACES = {"adobe": (ADOBE, 2.19921875), "p3": (P3, 2.19921875), "prophoto": (PROPHOTO, 1.80078125), "linear": (P3, 1.0)}


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def as_srgb(values: np.ndarray, space: str) -> np.ndarray:
    """By the standards' formulas: (..., 3), 0..255, of `space` to sRGB."""
    primaries, gamma = SPACES[space]
    return encode_srgb((values / 255.0) ** gamma @ primaries @ np.linalg.inv(SRGB))


def colour_patches() -> np.ndarray:
    """(32, 32, 3), uint8: 16 patches of muted colours, of 8 x 8 pixels each."""
    patches = np.random.default_rng(3).integers(60, 200, (4, 4, 3), dtype=np.uint8)
    return patches.repeat(8, axis=0).repeat(8, axis=1)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg", pytest.param(".avif", marks=needs_avif)])
def test_wide_gamut_profile_is_converted_to_srgb(tmp_path, suffix):
    path, values = tmp_path / f"wide{suffix}", colour_patches()
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}, ".avif": {"quality": 100}}
    for space in SPACES:
        Image.fromarray(values).save(path, icc_profile=rgb_profile(*SPACES[space]), **options.get(suffix, {}))
        with Image.open(path) as image:
            stored = np.asarray(image.convert("RGB"))
        desired = as_srgb(stored, space)
        assert np.abs(desired - stored).max() > 8  # it makes a difference
        assert np.abs(pixels(load_picture(path)) - desired).max() <= 2


def test_profile_of_palette_and_transparent_pictures(tmp_path):
    values, profile = colour_patches(), rgb_profile(*SPACES["adobe"])
    desired = as_srgb(values, "adobe")
    Image.fromarray(values).quantize(64).save(tmp_path / "palette.png", icc_profile=profile)
    assert np.abs(pixels(load_picture(tmp_path / "palette.png")) - desired).max() <= 2
    image = Image.fromarray(values)
    image.putalpha(102)
    image.save(tmp_path / "alpha.png", icc_profile=profile)
    assert np.abs(pixels(load_picture(tmp_path / "alpha.png")) - (0.4 * desired + 0.6 * 255)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "16"])
def test_profiles_of_grey_pictures(tmp_path, mode):
    """Of greys, linear and of a gamma; and, for all that writers do, of colours."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    desired = {icc_profile(b"GRAY", {b"kTRC": gamma_curve(gamma)}): encode_srgb((ramp / 255.0) ** gamma)[..., None]
               for gamma in (1.0, 1.80078125)}
    desired[rgb_profile(*SPACES["prophoto"])] = as_srgb(np.stack([ramp] * 3, axis=-1), "prophoto")
    image = Image.fromarray(ramp if mode != "16" else ramp.astype(np.uint16) * 257)
    for profile, colours in desired.items():
        (image.convert("LA") if mode == "LA" else image).save(tmp_path / "grey.png", icc_profile=profile)
        assert np.abs(pixels(load_picture(tmp_path / "grey.png")) - colours).max() <= 2


def cmyk_profile() -> bytes:
    """A press whose paper is L* = 100 and that prints, with any ink at all in full, L* = 0; grey at every mixture."""
    grid = [(0 if any((n >> bit) & 1 for bit in range(4)) else 255, 128, 128) for n in range(16)]
    table = struct.pack(">BBBx9i", 4, 3, 2, *[65536, 0, 0, 0, 65536, 0, 0, 0, 65536])
    table += bytes(range(256)) * 4 + bytes(value for row in grid for value in row) + bytes(range(256)) * 3
    return icc_profile(b"CMYK", {b"A2B0": icc_tag(b"mft1", table)}, pcs=b"Lab ", kind=b"prtr")


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk_profile(tmp_path, suffix):
    """Half of one ink: L* = 50 by the profile, sRGB 119; Pillow alone would make it cyan."""
    path = tmp_path / f"press{suffix}"
    image = Image.new("CMYK", (32, 16), (128, 0, 0, 0))
    image.paste((0, 0, 0, 0), (16, 0, 32, 16))
    image.save(path, icc_profile=cmyk_profile(), **{"quality": 100} if suffix == ".jpg" else {})
    actual = pixels(load_picture(path))
    assert np.abs(actual[:, :15] - 118.5).max() <= 3 and (actual[:, 17:] >= 253).all()
    assert np.abs(pixels(load_picture(path, 8))[:, :7] - 118.5).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_profiles_that_are_broken_of_another_kind_or_srgb_change_nothing(tmp_path, suffix):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    broken = [rgb_profile(ADOBE, 2.2)[:size] for size in (128, 132, 200, 400)]
    for profile in (*broken, b"no profile", cmyk_profile(), icc_profile(b"GRAY", {b"kTRC": gamma_curve(1.0)}),
                    icc_profile(b"RGB ", {}), srgb, srgb + b"\0" * 9):
        values = Image.fromarray(colour_patches())
        values.save(tmp_path / f"same{suffix}", icc_profile=profile, **{"lossless": True} if suffix == ".webp" else {})
        with Image.open(tmp_path / f"same{suffix}") as stored:
            assert (pixels(load_picture(tmp_path / f"same{suffix}")) == np.asarray(stored.convert("RGB"))).all()


def test_a_picture_at_hand_is_as_from_its_file(tmp_path):
    """An upload: turned, in colours of its own, transparent."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    image.putalpha(102)
    image.save(tmp_path / "upload.png", exif=exif_block(), icc_profile=rgb_profile(*SPACES["adobe"]))
    with Image.open(tmp_path / "upload.png") as opened:
        assert (prepare_picture(opened) == prepare_picture(tmp_path / "upload.png")).all()
        assert load_alpha(opened).tobytes() == load_alpha(tmp_path / "upload.png").tobytes() == b"\x66" * 1200
        assert opened.info["icc_profile"] and opened.size == (40, 30)  # it is the caller's, and stays as it is
    for mode, white in {"LAB": (255, 128, 128), "YCbCr": (255, 128, 128), "HSV": (0, 0, 255)}.items():
        assert (prepare_picture(Image.new(mode, (4, 4), white)) >= 252).all()
    with pytest.raises(PictureError, match="floating-point"):
        prepare_picture(Image.new("F", (4, 4)))


# ------------------------------------------------------------------------------------------- transparency


def write_ramp(path, **options):
    """Black, opaque at the left and ever less to the right."""
    image = Image.new("RGBA", (40, 30), "black")
    image.putalpha(Image.fromarray(np.broadcast_to(255 - 6 * np.arange(40, dtype=np.uint8), (30, 40)).copy()))
    image.save(path, **options)
    return path


@pytest.mark.parametrize(("imsize", "cropsize"), [(None, None), (15, None), (60, None), (15, 10), (None, 20),
                                                  (None, 64)])
def test_alpha_lies_where_the_picture_lies(tmp_path, imsize, cropsize):
    """Red of black on white is 255 - alpha, everywhere."""
    path = write_ramp(tmp_path / "a.png", exif=exif_block())  # turned by a quarter
    picture = prepare_picture(path, imsize, cropsize)[0, 0].numpy().astype(int)
    alpha = load_alpha(path, imsize, cropsize)
    assert alpha.mode == "L" and alpha.size == picture.shape[::-1]
    assert np.abs(255 - picture - np.asarray(alpha)).max() <= 2


def test_alpha_of_every_kind(tmp_path):
    for name in ("a.png", "a.webp", "a.tif"):
        path = write_ramp(tmp_path / name, **{"lossless": True} if name == "a.webp" else {})
        assert (np.asarray(load_alpha(path)) == 255 - 6 * np.arange(40)).all()
    for mode, name in (("RGB", "a.jpg"), ("RGB", "a.png"), ("RGBA", "a.png"), ("RGBA", "a.webp"), ("L", "a.png")):
        Image.new(mode, (8, 6), "black").save(tmp_path / name)
        assert load_alpha(tmp_path / name, 4, 4) is None  # all is opaque
    Image.new("LA", (4, 2), (100, 51)).save(tmp_path / "grey.png")
    assert (np.asarray(load_alpha(tmp_path / "grey.png")) == 51).all()
    image = Image.fromarray(np.array([[0, 0, 1, 1]] * 2, np.uint8))
    image.putpalette([200, 0, 0, 0, 0, 150])
    for name in ("a.gif", "a.png"):
        image.save(tmp_path / name, transparency=1)
        assert np.asarray(load_alpha(tmp_path / name)).tolist() == [[255, 255, 0, 0]] * 2


def png(path, bits: int, kind: int, rows: bytes, *chunks: bytes, size=(2, 1)):
    """A PNG by its fields."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows))
                     + png_chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("bits, kind, rows, key", [
    (1, 0, b"\0\x40", b"\0\1"), (2, 0, b"\0\x20", b"\0\2"), (4, 0, b"\0\x0c", b"\0\x0c"),
    (8, 0, b"\0\0\x80", b"\0\x80"), (16, 0, b"\0\0\0\x80\x01", b"\x80\x01"),
    (8, 2, b"\0\0\0\0\1\2\3", b"\0\1\0\2\0\3"),
    (16, 2, b"\0" + b"\0" * 6 + b"\x10\0\x20\0\x30\0", b"\x10\0\x20\0\x30\0"),
])
def test_transparent_colour_of_every_depth(tmp_path, bits, kind, rows, key):
    """Two pixels: black, and another, which is the transparent one; of an opened picture each time that it is read."""
    path = png(tmp_path / "key.png", bits, kind, rows, png_chunk(b"tRNS", key))
    assert pixels(load_picture(path)).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    with Image.open(path) as image:
        assert np.asarray(load_alpha(path)).tolist() == np.asarray(load_alpha(image)).tolist() == [[255, 0]]
        assert np.asarray(load_alpha(image)).tolist() == [[255, 0]]
        assert pixels(load_picture(image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


# ---------------------------------------------------------------------------------------- kinds of pictures


def test_16_bits(tmp_path):
    path = png(tmp_path / "deep.png", 16, 2, b"\0" + struct.pack(">6H", 0, 257 * 10, 257 * 200, 65535, 257, 0))
    assert pixels(load_picture(path)).tolist() == [[[0, 10, 200], [255, 1, 0]]]
    grey = np.array([[0, 257 * 77, 257 * 77 + 128, 257 * 77 + 129, 65535]], np.uint16)
    for name in ("deep.tif", "deep.pgm", "deep.png"):
        Image.fromarray(grey).save(tmp_path / name)
        assert pixels(load_picture(tmp_path / name))[0, :, 0].tolist() == [0, 77, 77, 78, 255]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif", pytest.param("a.avif", marks=needs_avif)])
def test_first_frame_of_several(tmp_path, capsys, name):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    for frames in ([], [second]):
        first.save(tmp_path / name, save_all=True, append_images=frames)
        for _ in range(2):
            assert np.abs(pixels(load_picture(tmp_path / name)) - (250, 0, 0)).max() <= 8
    said = f"{tmp_path / name}: it is animated: its first frame alone is taken\n"
    assert capsys.readouterr().err == ("" if name == "a.tif" else said)


@pytest.mark.parametrize("name", ["a.png", "at hand", "profile.png", pytest.param("a.avif", marks=needs_avif)])
@pytest.mark.parametrize("primaries, transfer, is_said", [(1, 13, False), (2, 2, False), (12, 13, True), (9, 14, True),
                                                          (9, 16, True), (1, 18, True)])
def test_colours_that_are_not_converted_are_said(tmp_path, capsys, name, primaries, transfer, is_said):
    """Of a PNG's cICP and an AVIF's nclx; a wide gamut is converted by a profile. Of many, some are named."""
    path = tmp_path / name.replace("at hand", "a.png")
    Image.new("RGB", (8, 8)).save(path, icc_profile=rgb_profile(P3, 2.2) if name == "profile.png" else b"")
    if name == "a.avif":
        path.write_bytes(re.sub(rb"(?s)(?<=colrnclx).{4}", struct.pack(">HH", primaries, transfer), path.read_bytes()))
    else:
        with_png_chunks(path, png_chunk(b"cICP", bytes([primaries, transfer, 0, 1])))
    load_picture(Image.open(path) if name == "at hand" else path)
    is_said = is_said and (name != "profile.png" or transfer in data.HDR)
    assert (f"{path}: its high dynamic range or wide gamut" in capsys.readouterr().err) == is_said
    for number in range(20):
        data._tell(f"{tmp_path}/{number}", "something else")
    assert capsys.readouterr().err.count("\n") == data.MOST_TOLD + 1


@pytest.mark.parametrize("load", [load_picture, prepare_picture, load_alpha])
def test_picture_too_large_for_the_memory(tmp_path, monkeypatch, load):
    def lack(image):
        raise MemoryError

    monkeypatch.setattr(data, "_shown", lack)
    with pytest.raises(PictureError, match="a.png: not enough memory"):
        load(write_ramp(tmp_path / "a.png"))


def test_the_limits_of_pillow_stay_those_of_the_program(tmp_path):
    """They are lifted while a picture is read here, and only then, however many threads do."""
    paths = [write_map(tmp_path / "a.png"), tmp_path / "none.png"] * 25
    with ThreadPoolExecutor(8) as pool, pytest.raises(PictureError):
        list(pool.map(load_picture, paths))
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert limits == (2**30 // 4 // 3, 2**20, 2**26)


# ---------------------------------------------------------------------------------------------------- HEIC


def test_heic_is_read_with_pillow_heif_alone(tmp_path, monkeypatch):
    """By a stand-in, which makes every HEIC picture one of one colour. Without it, a picture is known all the same."""
    path = tmp_path / "photo.HEIC"
    path.write_bytes(struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + b"\0" * 100)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # what import refuses
    assert is_picture(path) and "pip install pillow-heif" in refused(path)

    def register():
        Image.register_open("HEIF", lambda file, name: Image.new("RGB", (6, 4), (10, 20, 30)),
                            lambda prefix: prefix[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "OPEN", Image.OPEN.copy())
    monkeypatch.setattr(Image, "ID", Image.ID.copy())
    for _ in range(2):
        assert (pixels(load_picture(path)) == (10, 20, 30)).all()

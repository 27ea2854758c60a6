"""Pictures of every kind in, of every size; values of pixels; pictures out."""

import os

import numpy as np
import pytest
import torch
from helpers import pixels, refused, user_error, write_map, write_picture
from PIL import Image
from torch.testing import assert_close

from data import _decode, denormalize, load_picture, normalize, prepare_picture, save_picture, to_pil

# --------------------------------------------------------------------------------------- kinds of pictures


RED, BLUE, WHITE = (200, 0, 0), (0, 0, 150), (255, 255, 255)
PALETTE = Image.fromarray(np.array([[0, 0, 1, 1]] * 2, np.uint8))
PALETTE.putpalette([*RED, *BLUE])
# The picture, what it is saved with, and what its left and right half are read as.
MODES = {
    "grey": (Image.new("L", (6, 4), 77), {}, (77, 77, 77), (77, 77, 77)),
    "bits": (Image.fromarray(np.array([[False, True]])), {}, (0, 0, 0), WHITE),
    "palette": (PALETTE, {}, RED, BLUE),
    "transparent": (PALETTE, {"transparency": 0}, WHITE, BLUE),
    "alphas": (PALETTE, {"transparency": bytes([51, 255])}, (244, 204, 204), BLUE),
    "RGBA": (Image.new("RGBA", (4, 4), (200, 100, 50, 255)), {}, (200, 100, 50), (200, 100, 50)),
    "clear": (Image.new("RGBA", (4, 4), (200, 100, 50, 0)), {}, WHITE, WHITE),
    "RGBA 0.4": (Image.new("RGBA", (4, 4), (200, 100, 50, 102)), {}, (233, 193, 173), (233, 193, 173)),
    "LA 0.4": (Image.new("LA", (4, 4), (100, 102)), {}, (193, 193, 193), (193, 193, 193)),
}


@pytest.mark.parametrize("name", MODES)
def test_pictures_of_every_mode(tmp_path, name):
    """Transparent pixels are laid on white."""
    image, options, left, right = MODES[name]
    image.save(tmp_path / "picture.png", **options)
    actual = pixels(load_picture(tmp_path / "picture.png"))
    assert actual.shape == (*image.size[::-1], 3)
    assert np.abs(actual[0, 0] - left).max() <= 1 and np.abs(actual[-1, -1] - right).max() <= 1


def test_rgb_png_is_read_as_it_is(tmp_path):
    actual = pixels(load_picture(write_map(tmp_path / "a.jpg.png", (6, 4), number=9)))
    assert actual.shape == (4, 6, 3) and actual[2, 3].tolist() == [15, 14, 9]
    (tmp_path / "a.jpg.png").rename(tmp_path / "really_a_png.jpg")  # content counts, not the suffix
    assert pixels(load_picture(tmp_path / "really_a_png.jpg"))[2, 3].tolist() == [15, 14, 9]


@pytest.mark.parametrize(("ink", "desired"), [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 0), (255, 255, 255)),
                                              ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))])
def test_cmyk_jpeg(tmp_path, ink, desired):
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(pixels(load_picture(tmp_path / "cmyk.jpg")) - desired).max() <= 3


# ---------------------------------------------------------------------------------------- broken pictures


@pytest.mark.parametrize("content", [b"hello, I am text", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"\0" * 500, b""])
def test_what_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "text.jpg").write_bytes(content)
    assert ("not a readable picture" if content else "empty") in refused(tmp_path / "text.jpg")
    assert "no such file" in refused(tmp_path / "none.jpg")
    assert "folder" in refused(tmp_path)


# -------------------------------------------------------------------------------------------------- sizes


def test_max_pixels_names_the_file_and_the_flag(tmp_path):
    path = write_picture(tmp_path / "large.png", (30, 20))
    assert load_picture(path, max_pixels=600).size == (30, 20)
    message = refused(path, max_pixels=599)
    assert "--max_pixels 599" in message and "30 x 20" in message
    strip = write_picture(tmp_path / "strip.png", (200, 2))
    assert "--max_pixels 10000" in refused(strip, imsize=100, max_pixels=10_000)  # enlarged it would have more


def test_picture_above_the_limit_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write_picture(tmp_path / "huge.png", (30, 20))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert load_picture(path).size == (30, 20) and Image.MAX_IMAGE_PIXELS == 100


def test_jpeg_is_decoded_at_the_smallest_scale_that_suffices(tmp_path):
    path = write_picture(tmp_path / "large.jpg", (800, 600), (200, 100, 50))
    sizes = {None: (800, 600), 301: (800, 600), 300: (400, 300), 151: (400, 300), 150: (200, 150), 75: (100, 75),
             1: (100, 75), 900: (800, 600)}
    for shorter_side, desired in sizes.items():
        actual = _decode(path, shorter_side, 10**6)
        assert actual.size == desired and np.abs(pixels(actual) - (200, 100, 50)).max() <= 3
    for size in ((803, 605), (605, 803), (1001, 37)):
        path = write_picture(tmp_path / "odd.jpg", size)
        for shorter_side in (1, 5, 19, 37, 75, 76, 77, 151, 152, 302, 303, 304, 604, 605):
            assert min(_decode(path, shorter_side, 10**6).size) >= min(shorter_side, min(size))
    assert _decode(write_picture(tmp_path / "large.png", (80, 60)), 7, 10**6).size == (80, 60)


@pytest.mark.parametrize("imsize, cropsize, desired", [
    (None, None, (40, 60)), (20, None, (20, 30)), (80, None, (80, 120)), (None, 16, (16, 16)), (None, 50, (50, 50)),
    (20, 16, (16, 16)), (20, 20, (20, 20)), (10, 16, (16, 16)), (33, None, (33, 50)),
])
def test_prepared_sizes(tmp_path, imsize, cropsize, desired):
    actual = prepare_picture(write_picture(tmp_path / "wide.png", (60, 40), (200, 100, 50)), imsize, cropsize)
    assert actual.shape == (1, 3, *desired) and actual.dtype == torch.uint8
    assert actual.amin(dim=(0, 2, 3)).tolist() == actual.amax(dim=(0, 2, 3)).tolist() == [200, 100, 50]


def test_resizing_keeps_the_proportions_and_a_crop_is_the_centre(tmp_path):
    for size, imsize, desired in (((61, 37), 20, (33, 20)), ((1000, 3), 2, (667, 2)), ((50, 50), 7, (7, 7))):
        assert load_picture(write_picture(tmp_path / "any.png", size), imsize).size == desired
    actual = prepare_picture(write_map(tmp_path / "map.png", (40, 30), number=3), cropsize=10)
    assert actual[0, :, 0, 0].tolist() == [15 * 5, 10 * 7, 3]
    assert actual[0, :, 9, 9].tolist() == [24 * 5, 19 * 7, 3]


# ---------------------------------------------------------------------------------- values in and out


def test_normalize_by_hand_and_back():
    actual = normalize(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))
    desired = torch.tensor([[(0 - 0.485) / 0.229, (1 - 0.485) / 0.229], [(0 - 0.456) / 0.224, (1 - 0.456) / 0.224],
                            [(0 - 0.406) / 0.225, (1 - 0.406) / 0.225]]).reshape(1, 3, 1, 2)
    assert_close(actual, desired)
    assert (denormalize(100 * actual) == torch.tensor([0.0, 1.0])).all()  # clipped
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert (np.asarray(to_pil(denormalize(normalize(every)))) == every[0].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_no_picture(value):
    assert "not finite" in user_error(denormalize, torch.tensor([0.0, value]).expand(1, 3, 1, 2))


@pytest.mark.parametrize("name, kind, tolerance", [
    ("a.png", "PNG", 0), ("a.PNG", "PNG", 0), ("a.jpg", "JPEG", 3), ("a.jpeg", "JPEG", 3), ("a.webp", "WEBP", 8),
    ("a.bmp", "BMP", 0), ("a.tif", "TIFF", 0), ("a.tiff", "TIFF", 0),
])
def test_saved_in_the_format_of_the_suffix(tmp_path, name, kind, tolerance):
    save_picture(Image.new("RGB", (12, 8), (200, 100, 50)), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (kind, (12, 8))
    assert np.abs(pixels(load_picture(tmp_path / name)) - (200, 100, 50)).max() <= tolerance
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("name", "size"), [("a.webp", (16_384, 1)), ("a.jpg", (65_536, 1))])
def test_picture_that_does_not_fit_the_format(tmp_path, name, size):
    assert str(tmp_path / name) in user_error(save_picture, Image.new("RGB", size), tmp_path / name)
    assert os.listdir(tmp_path) == []

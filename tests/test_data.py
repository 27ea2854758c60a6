"""Pictures of every kind in, folders with broken files, and crops that depend on seed and position alone."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, refused, user_error, write_map, write_picture
from PIL import Image
from torch.testing import assert_close

from data import (
    FailedPictures,
    PictureError,
    denormalize,
    find_pictures,
    load_picture,
    load_resized,
    normalize,
    open_folder,
    picture_grid,
    prepare_picture,
    save_picture,
    to_pil,
)
from training import sampling
from training.sampling import CropConfig, PictureCache, TrainingPictures, check_failures, training_batches

MANY = 10**9


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# --------------------------------------------------------------------------------------- kinds of pictures


def palette_picture() -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 0, 0, 0, 0, 150])
    image.paste(1, (2, 0, 4, 2))
    return image


RED, BLUE, WHITE = (200, 0, 0), (0, 0, 150), (255, 255, 255)
# The picture, what it is saved with, and what its left and right half are read as.
MODES = {
    "grey": (Image.new("L", (6, 4), 77), {}, (77, 77, 77), (77, 77, 77)),
    "bits": (Image.linear_gradient("L").rotate(90).point(lambda value: value // 128 * 255).convert("1"), {}, (0, 0, 0),
             WHITE),
    "palette": (palette_picture(), {}, RED, BLUE),
    "transparent": (palette_picture(), {"transparency": 0}, WHITE, BLUE),
    "alphas": (palette_picture(), {"transparency": bytes([51, 255])}, (244, 204, 204), BLUE),
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


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / "float.tif")
    assert "floating-point" in refused(tmp_path / "float.tif")


# Stored pictures whose left half is red and right half blue, and where red must be when upright.
UPRIGHT = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    actual = pixels(load_picture(tmp_path / "turned.jpg"))
    side = UPRIGHT[orientation]
    assert actual.shape[:2] == ((32, 64) if side in ("left", "right") else (64, 32))
    height, width = actual.shape[:2]
    red = {"left": (height // 2, 4), "right": (height // 2, width - 5), "top": (4, width // 2),
           "bottom": (height - 5, width // 2)}[side]
    assert np.abs(actual[red] - (255, 0, 0)).max() <= 6
    assert np.abs(actual[height - 1 - red[0], width - 1 - red[1]] - (0, 0, 255)).max() <= 6


# ---------------------------------------------------------------------------------------- broken pictures


@pytest.mark.parametrize("content", [b"hello, I am text", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"\x00" * 500])
def test_what_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "text.jpg").write_bytes(content)
    assert "not a readable picture" in refused(tmp_path / "text.jpg")
    (tmp_path / "text.jpg").write_bytes(b"")
    assert "empty" in refused(tmp_path / "text.jpg")
    assert "no such file" in refused(tmp_path / "none.jpg")
    assert "folder" in refused(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_file(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        for shorter_side in (None, 8):
            refused(path, shorter_side=shorter_side)


# -------------------------------------------------------------------------------------------------- sizes


def test_max_pixels_names_the_file_and_the_flag(tmp_path):
    path = write_picture(tmp_path / "large.png", (30, 20))
    assert load_picture(path, max_pixels=600).size == (30, 20)
    message = refused(path, max_pixels=599)
    assert "--max_pixels 599" in message and "30 x 20" in message
    strip = write_picture(tmp_path / "strip.png", (200, 2))
    with pytest.raises(PictureError, match=f"{strip}: .*--max_pixels 10000"):  # enlarged it would have more
        load_resized(strip, 100, max_pixels=10_000)


def test_picture_above_the_limit_of_pillow(tmp_path):
    """182 million pixels, one byte each to write, 1/64 of them to read."""
    path = tmp_path / "huge.jpg"
    Image.new("L", (14_000, 13_000), 120).save(path)
    actual = load_picture(path, shorter_side=1000)
    assert actual.size == (1750, 1625)
    assert actual.getpixel((900, 900)) == (120, 120, 120)


def test_jpeg_is_decoded_at_the_smallest_scale_that_suffices(tmp_path):
    path = write_picture(tmp_path / "large.jpg", (800, 600), (200, 100, 50))
    sizes = {None: (800, 600), 600: (800, 600), 301: (800, 600), 300: (400, 300), 151: (400, 300), 150: (200, 150),
             76: (200, 150), 75: (100, 75), 1: (100, 75), 900: (800, 600)}
    for shorter_side, desired in sizes.items():
        actual = load_picture(path, shorter_side=shorter_side)
        assert actual.size == desired and np.abs(pixels(actual) - (200, 100, 50)).max() <= 3
    for size in ((803, 605), (605, 803), (1001, 37)):
        path = write_picture(tmp_path / "odd.jpg", size)
        for shorter_side in (1, 5, 19, 37, 75, 76, 77, 151, 152, 302, 303, 304, 604, 605):
            assert min(load_picture(path, shorter_side=shorter_side).size) >= min(shorter_side, min(size))
    assert load_picture(write_picture(tmp_path / "large.png", (80, 60)), shorter_side=7).size == (80, 60)


@pytest.mark.parametrize(
    ("imsize", "cropsize", "desired"),
    [
        (None, None, (40, 60)), (20, None, (20, 30)), (80, None, (80, 120)), (None, 16, (16, 16)),
        (None, 50, (50, 50)), (20, 16, (16, 16)), (20, 20, (20, 20)), (10, 16, (16, 16)), (33, None, (33, 50)),
    ],
)
def test_prepared_sizes(tmp_path, imsize, cropsize, desired):
    path = write_picture(tmp_path / "wide.png", (60, 40), (200, 100, 50))
    actual = prepare_picture(path, imsize, cropsize)
    assert actual.shape == (1, 3, *desired)
    assert actual.dtype == torch.uint8
    assert actual.amin(dim=(0, 2, 3)).tolist() == actual.amax(dim=(0, 2, 3)).tolist() == [200, 100, 50]


@pytest.mark.parametrize(("size", "imsize", "desired"), [((61, 37), 20, (33, 20)), ((37, 61), 20, (20, 33)),
                                                         ((1000, 3), 2, (667, 2)), ((50, 50), 7, (7, 7))])
def test_resizing_keeps_the_proportions(tmp_path, size, imsize, desired):
    assert load_resized(write_picture(tmp_path / "any.png", size), imsize).size == desired


def test_centre_crop_is_the_centre(tmp_path):
    actual = prepare_picture(write_map(tmp_path / "map.png", (40, 30), number=3), cropsize=10)
    assert actual[0, :, 0, 0].tolist() == [15 * 5, 10 * 7, 3]
    assert actual[0, :, 9, 9].tolist() == [24 * 5, 19 * 7, 3]


# ---------------------------------------------------------------------------------- values in and out


def test_normalize_by_hand():
    actual = normalize(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))
    desired = torch.tensor([[(0 - 0.485) / 0.229, (1 - 0.485) / 0.229], [(0 - 0.456) / 0.224, (1 - 0.456) / 0.224],
                            [(0 - 0.406) / 0.225, (1 - 0.406) / 0.225]]).reshape(1, 3, 1, 2)
    assert actual.dtype == torch.float32
    assert_close(actual, desired)


def test_normalize_round_trip_of_every_value():
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    back = denormalize(normalize(image))
    assert_close(back, image.float() / 255, rtol=0, atol=1e-6)
    assert_close(torch.from_numpy(np.array(to_pil(back[:1]))), image[0].permute(1, 2, 0), rtol=0, atol=0)


def test_denormalize_clips():
    actual = denormalize(torch.tensor([-100.0, 100.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert_close(actual, torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_no_picture(value):
    image = torch.zeros(1, 3, 2, 2)
    image[0, 1, 0, 1] = value
    assert "not finite" in user_error(denormalize, image)


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [("a.png", "PNG", 0), ("a.PNG", "PNG", 0), ("a.jpg", "JPEG", 3), ("a.jpeg", "JPEG", 3), ("a.webp", "WEBP", 8),
     ("a.bmp", "BMP", 0), ("a.tif", "TIFF", 0), ("a.tiff", "TIFF", 0)],
)
def test_saved_in_the_format_of_the_suffix(tmp_path, name, kind, tolerance):
    save_picture(Image.new("RGB", (12, 8), (200, 100, 50)), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (kind, (12, 8))
    assert np.abs(pixels(load_picture(tmp_path / name)) - (200, 100, 50)).max() <= tolerance
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("name", "size"), [("a.webp", (16_384, 1)), ("a.jpg", (65_536, 1))])
def test_picture_that_does_not_fit_the_format(tmp_path, name, size):
    message = user_error(save_picture, Image.new("RGB", size), tmp_path / name)
    assert str(tmp_path / name) in message
    assert os.listdir(tmp_path) == []


def test_picture_grid():
    """Two columns, three rows of 8 x 8 with 4 pixels of white around each."""
    rows = [normalize(torch.full((2, 3, 8, 8), value, dtype=torch.uint8)) for value in (10, 120, 240)]
    actual = pixels(picture_grid(rows))
    assert actual.shape == (3 * 12 + 4, 2 * 12 + 4, 3)
    assert (actual[:4] == 255).all() and (actual[:, 12:16] == 255).all()
    for row, value in enumerate((10, 120, 240)):
        for column in range(2):
            top, left = 4 + 12 * row, 4 + 12 * column
            assert (actual[top : top + 8, left : left + 8] == value).all()


# ------------------------------------------------------------------------------------------------ folders


def test_pictures_are_found_in_all_subfolders_sorted(tmp_path):
    names = ["b.JPG", "a.png", "deep/er/c.JpEg", "deep/d.webp", "z/e.PNG"]
    for name in [*names, ".hidden.jpg", "deep/.also.png", "notes.txt", "f.gif", "g.jpg.txt", "png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    actual = find_pictures(tmp_path, "--content_dir")
    assert actual == sorted(tmp_path / name for name in names)


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    write_picture(folder / "sub" / "a.png")
    write_picture(other / "b.png")
    for link, target in {folder / "sub" / "up": folder, folder / "itself": folder / "itself", folder / "other": other,
                         other / "back": other, folder / "link.png": other / "b.png"}.items():
        link.symlink_to(target)
    actual = find_pictures(folder, "--content_dir")
    assert actual == [folder / "link.png", folder / "other" / "b.png", folder / "sub" / "a.png"]


def test_missing_folders_are_refused(tmp_path):
    for path in (tmp_path / "none", write_picture(tmp_path / "file.png")):
        assert f"--style_dir {path}: no such folder" in user_error(find_pictures, path, "--style_dir")


def make_folder(folder, good: int, broken: int):
    for number in range(good):
        write_map(folder / f"good_{number:02}.png", number=number)
    for number in range(broken):
        (folder / f"broken_{number:02}.jpg").write_text("no picture")
    return folder


def test_one_broken_picture_of_20_is_skipped_and_logged_once(tmp_path, capsys):
    paths, failed = open_folder(make_folder(tmp_path, 19, 1), "--content_dir", MANY)
    assert paths == [tmp_path / f"good_{number:02}.png" for number in range(19)]
    broken = tmp_path / "broken_00.jpg"
    failed.add(broken, f"{broken}: again")
    log = capsys.readouterr().err
    assert [line for line in log.splitlines() if "skipped" in line and str(broken) in line] == log.splitlines()
    assert len(log.splitlines()) == 1
    assert "20 pictures, 1 skipped" in failed.summary()


@pytest.mark.parametrize(("good", "broken"), [(18, 2), (10, 1), (9, 1), (9, 0), (17, 3), (8, 1), (0, 5)])
def test_a_tenth_of_a_folder_may_fail(tmp_path, capsys, good, broken):
    make_folder(tmp_path, good, broken)
    if broken > 0.1 * (good + broken):
        message = user_error(open_folder, tmp_path, "--content_dir", MANY)
        assert f"--content_dir {tmp_path}: {broken} of {good + broken} pictures" in message and "broken_0" in message
        return
    paths, failed = open_folder(tmp_path, "--content_dir", MANY)
    assert len(paths) == good and len(failed.paths) == broken


def test_pictures_above_max_pixels_count_as_failed(tmp_path, capsys):
    make_folder(tmp_path, 19, 0)
    write_picture(tmp_path / "large.png", (100, 100))
    paths, failed = open_folder(tmp_path, "--style_dir", max_pixels=5000)
    assert len(paths) == 19 and failed.paths == {str(tmp_path / "large.png")}
    assert "large.png" in capsys.readouterr().err


def test_tally_stops_when_more_than_a_tenth_failed_later(tmp_path, capsys):
    failed = FailedPictures(tmp_path, "--style_dir", 20)
    failed.add(tmp_path / "a.jpg", "a.jpg: gone")
    failed.add(tmp_path / "a.jpg", "a.jpg: gone")
    failed.add(tmp_path / "b.jpg", "b.jpg: gone")
    message = user_error(failed.add, tmp_path / "c.jpg", "c.jpg: gone")
    assert "--style_dir" in message and "3 of 20" in message


# ----------------------------------------------------------------------------------------------- training


CROP = CropConfig(imsize=30, cropsize=16, centered=False, max_pixels=MANY)


def make_pictures(folder, contents: int = 5, styles: int = 3, crop: CropConfig = CROP, seed: int = 1):
    """Content pictures have blue 0, 1, ..., style pictures 100, 101, ...; 40 x 30 pixels, so that nothing is
    resized and every pixel tells its column, row and picture."""
    content = [write_map(folder / "content" / f"{number}.png", number=number) for number in range(contents)]
    style = [write_map(folder / "style" / f"{number}.png", number=100 + number) for number in range(styles)]
    return TrainingPictures(content, style, crop, seed)


def describe(crop: torch.Tensor) -> tuple[int, int, int]:
    """(picture, left, top) of a crop, which must be one window of one picture."""
    red, green, blue = crop[:, 0, 0].tolist()
    left, top = red // 5, green // 7
    assert (crop[0] == 5 * torch.arange(left, left + crop.shape[2])[None, :]).all()
    assert (crop[1] == 7 * torch.arange(top, top + crop.shape[1])[:, None]).all()
    assert (crop[2] == blue).all()
    return blue, left, top


def test_crops_are_windows_inside_the_picture(tmp_path):
    pictures = make_pictures(tmp_path)
    lefts, tops = set(), set()
    for position in range(60):
        content, style, failures = pictures[position]
        assert content.shape == style.shape == (3, 16, 16) and content.dtype == torch.uint8
        assert failures == []
        for blue, left, top in (describe(content), describe(style)):
            assert 0 <= left <= 24 and 0 <= top <= 14 and blue in (0, 1, 2, 3, 4, 100, 101, 102)
            lefts.add(left)
            tops.add(top)
    # 120 draws of 25 and 15 places: all of them nearly always, both ends among them with this seed.
    assert len(lefts) > 20 and len(tops) == 15
    assert {0, 24} <= lefts


def test_same_position_gives_the_same_crop_in_any_order(tmp_path):
    pictures = make_pictures(tmp_path)
    forward = {position: pictures[position] for position in range(20)}
    for position in (*reversed(range(20)), 7, 19, 0):
        content, style, _ = pictures[position]
        assert_close(content, forward[position][0], rtol=0, atol=0)
        assert_close(style, forward[position][1], rtol=0, atol=0)
    fresh = make_pictures(tmp_path)[13]
    assert_close(fresh[0], forward[13][0], rtol=0, atol=0)


def test_number_of_workers_changes_nothing(tmp_path):
    positions = range(6, 18)
    alone, shared = (list(training_batches(make_pictures(tmp_path), positions, 4, workers, pin_memory=False))
                     for workers in (0, 2))
    assert len(alone) == len(shared) == 3
    pictures = make_pictures(tmp_path)
    for number, (actual, desired) in enumerate(zip(shared, alone)):
        assert actual[0].shape == actual[1].shape == (4, 3, 16, 16)
        for kind in range(2):
            assert_close(actual[kind], desired[kind], rtol=0, atol=0)
            by_hand = torch.stack([pictures[position][kind] for position in positions[4 * number : 4 * number + 4]])
            assert_close(actual[kind], by_hand, rtol=0, atol=0)


def test_loader_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    list(training_batches(make_pictures(tmp_path), range(4), 2, 0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_visits_every_picture_once_in_its_own_order(tmp_path):
    pictures = make_pictures(tmp_path)
    drawn = [[describe(pictures[position][kind])[0] for position in range(30)] for kind in range(2)]
    content_epochs = [drawn[0][start : start + 5] for start in range(0, 30, 5)]
    style_epochs = [drawn[1][start : start + 3] for start in range(0, 30, 3)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in content_epochs)
    assert all(sorted(epoch) == [100, 101, 102] for epoch in style_epochs)
    assert len({tuple(epoch) for epoch in content_epochs}) > 3
    assert len({tuple(epoch) for epoch in style_epochs}) > 3


def test_seeds_differ_in_order_and_crops(tmp_path):
    first, second = (
        [describe(pictures[position][0]) for position in range(20)]
        for pictures in (make_pictures(tmp_path, seed=1), make_pictures(tmp_path, seed=2))
    )
    assert [each[0] for each in first] != [each[0] for each in second]
    assert [each[1:] for each in first] != [each[1:] for each in second]


def test_content_and_style_are_drawn_independently(tmp_path):
    pictures = make_pictures(tmp_path, contents=4, styles=4)
    drawn = [[describe(pictures[position][kind]) for position in range(24)] for kind in range(2)]
    assert [each[0] for each in drawn[0]] != [each[0] - 100 for each in drawn[1]]
    assert [each[1:] for each in drawn[0]] != [each[1:] for each in drawn[1]]


def test_picture_that_breaks_later_is_replaced_and_reported(tmp_path):
    pictures = make_pictures(tmp_path)
    before = [describe(pictures[position][0]) for position in range(5)]
    broken = pictures.folders[0][2]
    broken.write_text("overwritten during the run")
    for position in range(5):
        content, _, failures = pictures[position]
        if before[position][0] != 2:
            assert describe(content) == before[position] and failures == []
            continue
        assert describe(content)[0] in (0, 1, 3, 4)
        assert {(number, path) for number, path, _ in failures} == {(0, str(broken))}
        assert all(str(broken) in reason for _, _, reason in failures)
        again, _, _ = pictures[position]
        assert_close(again, content, rtol=0, atol=0)


def test_failures_of_a_batch_reach_the_tally(tmp_path, capsys):
    pictures = make_pictures(tmp_path, contents=12)
    broken = pictures.folders[0][2]
    broken.unlink()
    tallies = (FailedPictures(tmp_path / "content", "--content_dir", 12), FailedPictures(tmp_path, "--style_dir", 3))
    for _, _, failures in training_batches(pictures, range(24), 4, 0, pin_memory=False):
        check_failures(failures, tallies)
    assert tallies[0].paths == {str(broken)} and tallies[1].paths == set()
    assert [str(broken) in line for line in capsys.readouterr().err.splitlines()] == [True]


def test_folder_that_went_away_stops_the_run(tmp_path, capsys):
    pictures = make_pictures(tmp_path, contents=200)
    for path in pictures.folders[0]:
        path.unlink()
    _, _, failures = pictures[0]
    tallies = tuple(FailedPictures(tmp_path, flag, 10_000) for flag in ("--content_dir", "--style_dir"))
    assert len(failures) == sampling.MAX_DRAWS
    assert "cannot be used" in user_error(check_failures, failures, tallies)


@pytest.mark.parametrize("centered", [False, True])
def test_picture_smaller_than_the_crop_is_enlarged(tmp_path, centered):
    path = write_picture(tmp_path / "tiny.png", (10, 6), (200, 100, 50))
    pictures = TrainingPictures([path], [path], CropConfig(6, 16, centered, MANY), seed=0)
    for position in range(3):
        content, style, failures = pictures[position]
        assert content.shape == style.shape == (3, 16, 16) and failures == []
        assert content.amin(dim=(1, 2)).tolist() == content.amax(dim=(1, 2)).tolist() == [200, 100, 50]


def test_centered_crops(tmp_path):
    pictures = make_pictures(tmp_path, crop=CropConfig(30, 16, True, MANY))
    assert {describe(pictures[position][0])[1:] for position in range(10)} == {(12, 7)}


def test_shorter_side_is_brought_to_imsize_before_the_crop(tmp_path):
    """A 60 x 40 picture, left half black, resized to 30 x 20: of the whole height, 20 of 30 columns."""
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (30, 0, 60, 40))
    image.save(tmp_path / "halves.png")
    paths = [tmp_path / "halves.png"]
    content, _, _ = TrainingPictures(paths, paths, CropConfig(20, 20, True, MANY), seed=0)[0]
    assert content.shape == (3, 20, 20)
    assert (content[:, :, :8] < 5).all() and (content[:, :, 12:] > 250).all()


# -------------------------------------------------------------------------------------------------- cache


def cached_pictures(folder, cache) -> TrainingPictures:
    """The pictures of `make_pictures`, through a cache."""
    pictures = make_pictures(folder)
    cache.folder.mkdir(exist_ok=True)
    return TrainingPictures(*pictures.folders, pictures.crop, pictures.seed, cache)


def test_cached_crops_are_the_same_pixels(tmp_path):
    """In the run that fills the cache and in the next, at every size; JPEGs too, which are decoded reduced."""
    generator = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(90, 60), (33, 47), (400, 300), (12, 200)]):
        noise = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
        paths.append(tmp_path / f"{number}.{('jpg', 'png')[number % 2]}")
        Image.fromarray(noise).save(paths[-1])
    cache = PictureCache(tmp_path / "cache")
    cache.folder.mkdir()
    for crop in (CropConfig(24, 16, False, MANY), CropConfig(16, 40, True, MANY)):
        plain = TrainingPictures(paths, paths, crop, seed=0)
        cached = TrainingPictures(paths, paths, crop, 0, cache)
        for _ in range(2):
            for position in range(8):
                for actual, desired in zip(cached[position][:2], plain[position][:2]):
                    assert torch.equal(actual, desired)


def test_cached_picture_is_not_decoded_again(tmp_path, monkeypatch):
    pictures = cached_pictures(tmp_path, PictureCache(tmp_path / "cache"))
    desired = [pictures[position] for position in range(15)]  # every picture is in it now
    monkeypatch.setattr(sampling, "load_resized", None)  # what cannot be called
    again = TrainingPictures(*pictures.folders, pictures.crop, pictures.seed, PictureCache(tmp_path / "cache"))
    for position in range(15):
        assert all(torch.equal(*pair) for pair in zip(again[position][:2], desired[position][:2]))


@pytest.mark.parametrize("change", ["content", "time"])
def test_changed_picture_is_decoded_anew_and_the_old_one_dropped(tmp_path, change):
    path = write_picture(tmp_path / "picture.png", (20, 20), (10, 20, 30))
    cache = PictureCache(tmp_path / "cache")
    cache.folder.mkdir()
    assert cache.open(path, 16)[0, 0].tolist() == [10, 20, 30]
    other = cache.open(write_picture(tmp_path / "other.png", (20, 20), (1, 1, 1)), 16)
    before = os.stat(path)
    if change == "content":  # a longer file
        write_map(path, (20, 20), number=77)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:  # as long, at another time
        write_picture(path, (20, 20), (10, 20, 77))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert cache.open(path, 16)[0, 0, 2] == 77
    assert len(list(cache.folder.glob("*/*.npy"))) == 2 and other[0, 0].tolist() == [1, 1, 1]


def test_sizes_and_limits_do_not_mix(tmp_path):
    path = write_picture(tmp_path / "picture.png", (40, 20))
    cache = PictureCache(tmp_path / "cache")
    cache.folder.mkdir()
    assert cache.open(path, 10).shape == (10, 20, 3) and cache.open(path, 16).shape == (16, 32, 3)
    with pytest.raises(PictureError, match="--max_pixels 100"):
        PictureCache(cache.folder, max_pixels=100).open(path, 10)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_cache_file_is_made_anew(tmp_path, damage):
    path = write_map(tmp_path / "picture.png", (30, 20))
    cache = PictureCache(tmp_path / "cache")
    cache.folder.mkdir()
    desired = np.array(cache.open(path, 16))
    file = cache.file_of(path, 16)
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "empty": b"", "text": b"no array" * 100}[damage])
    assert np.array_equal(cache.open(path, 16), desired)
    assert file.read_bytes() == whole


def test_kill_while_writing_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    """As a kill before the last step does, then the next run: it decodes again, and sweeps up in an hour's time."""
    path = write_map(tmp_path / "picture.png", (30, 20))
    cache = PictureCache(tmp_path / "cache")
    cache.folder.mkdir()
    script = f"""
import sys, os
sys.path.insert(0, {str(ROOT)!r})
from training import sampling
os.replace = lambda *paths: os.kill(os.getpid(), 9)
sampling.PictureCache({str(cache.folder)!r}).open({str(path)!r}, 16)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    (leftover,) = cache.folder.glob("??/.*.tmp")
    assert not list(cache.folder.glob("??/*.npy"))
    assert np.array_equal(cache.open(path, 16), np.asarray(load_resized(path, 16)))
    cache.remove_leftovers()
    assert leftover.exists()  # for all it knows another run is writing it
    os.utime(leftover, (0, 0))
    cache.remove_leftovers()
    assert not leftover.exists() and len(list(cache.folder.glob("??/*.npy"))) == 1


def test_full_disk_is_said_once_and_training_pictures_go_on(tmp_path, monkeypatch, capsys):
    def no_space(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampling, "write_atomically", no_space)
    pictures, plain = cached_pictures(tmp_path, PictureCache(tmp_path / "cache")), make_pictures(tmp_path)
    for position in range(6):
        assert torch.equal(pictures[position][0], plain[position][0])
    assert capsys.readouterr().err.count("--cache_dir") == 1


def test_workers_share_a_cache(tmp_path):
    pictures = cached_pictures(tmp_path, PictureCache(tmp_path / "cache"))
    batches = list(training_batches(pictures, range(24), 4, 2, False))
    plain = make_pictures(tmp_path)
    for number, (content, style, failures) in enumerate(batches):
        assert not failures
        for offset in range(4):
            desired = plain[4 * number + offset]
            assert torch.equal(content[offset], desired[0]) and torch.equal(style[offset], desired[1])
    assert len(list((tmp_path / "cache").glob("??/*.npy"))) == 8


def test_picture_that_breaks_is_reported_by_a_cache_too(tmp_path):
    pictures = cached_pictures(tmp_path, PictureCache(tmp_path / "cache"))
    pictures.folders[0][0].unlink()
    failures = [failure for position in range(5) for failure in pictures[position][2]]
    assert any(str(pictures.folders[0][0]) == path for _, path, _ in failures)

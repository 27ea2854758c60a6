"""What a picture is painted in: mixed styles, masks, the content's colours, the size of the strokes."""

import numpy as np
import pytest
import torch
from helpers import picture_network, random_picture, read_pixels, user_error, words, write_model, write_noise
from PIL import Image
from torch.testing import assert_close

from data import to_pil
from main import main
from network import adain
from painting.control import LUMA, MaskedStyle, Style, keep_colors, match_colors, mix
from painting.stylizer import Stylizer

CONTENT, *STYLES = (random_picture(seed, size) for seed, size in enumerate([(56, 75), (40, 50), (33, 61)]))


CODE = Style(torch.zeros(1, 12, 1, 1), torch.ones(1, 12, 1, 1))


@pytest.fixture(scope="module")
def stylizer() -> Stylizer:
    return Stylizer(picture_network())


@pytest.fixture(scope="module")
def exact() -> Stylizer:
    """In float64."""
    return Stylizer(picture_network().double())


@pytest.fixture(scope="module")
def codes(exact) -> list[Style]:
    return [exact.encode_style(each) for each in STYLES]


def mask_of(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def smooth_picture(seed: int, low: int = 60, high: int = 190, size=(40, 48)) -> torch.Tensor:
    """Colours that are correlated, far from 0 and 255."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 3, generator=generator)
    colours = torch.einsum("ij,bjhw->bihw", matrix, torch.rand(1, 3, *size, generator=generator))
    colours = (colours - colours.amin((2, 3), keepdim=True)) / (colours.amax((2, 3), keepdim=True)
                                                                - colours.amin((2, 3), keepdim=True))
    return (low + (high - low) * colours).round().byte()


# ------------------------------------------------------------------------------------------------- mixing


@torch.inference_mode()
def test_mixed_styles_are_mixed_features(exact, codes):
    """As Huang & Belongie interpolate: the features aligned to each, in shares, decoded. Weights need not sum to 1. A
    mask that is grey everywhere is a mixture, too, but for its float32; a weight of 0 leaves the other style as it is.
    """
    content = exact.open(CONTENT)
    (statistics,) = content.statistics()
    first, second = (adain(content.kept, code.mean, code.std, 1.0, statistics) for code in codes)
    desired = exact.network.decoder(0.75 * first + 0.25 * second)[:, :, :56, :75]
    assert_close(exact.paint(CONTENT, mix(codes, (6, 2))), desired, rtol=1e-9, atol=1e-9)
    grey = MaskedStyle(*codes, mask_of(np.full((56, 75), 51)))  # a fifth of 255
    assert_close(exact.paint(CONTENT, grey), exact.paint(CONTENT, mix(codes, (51, 204))), rtol=1e-6, atol=1e-6)
    alone = mix(codes, (0, 0.2))
    assert torch.equal(alone.mean, codes[1].mean) and torch.equal(alone.std, codes[1].std)


# -------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("level, alone, size", [(255, 0, (56, 75)), (0, 1, (112, 150))])
def test_a_mask_of_one_colour_is_one_style(stylizer, level, alone, size):
    mask = np.full(size, level, np.uint8)
    assert (stylizer.stylize(CONTENT, STYLES, mask=mask).tobytes()
            == stylizer.stylize(CONTENT, STYLES[alone]).tobytes())


@torch.inference_mode()
def test_each_region_has_the_statistics_of_its_style(exact, codes):
    """A hard mask along the bottleneck's grid: each side's aligned features have its style's mean and deviation."""
    mask = np.zeros((56, 75))
    mask[:, :32] = 255
    decoded = []
    content = exact.open(CONTENT)
    masked = MaskedStyle(*codes, mask_of(mask))
    hook = exact.network.decoder.register_forward_pre_hook(lambda _, inputs: decoded.extend(inputs))
    exact.paint(content, masked)
    hook.remove()
    (aligned,) = decoded
    assert aligned.shape[2:] == (7, 10)
    for feature, own, code in zip((aligned[..., :4], aligned[..., 4:]), (content.kept[..., :4], content.kept[..., 4:]),
                                  codes):
        varied = own.std((2, 3), keepdim=True) > 1e-2  # where all is one value, there is nothing to stretch
        assert varied.sum() >= 3
        assert_close(feature.mean((2, 3), keepdim=True)[varied], code.mean[varied], rtol=1e-3, atol=1e-3)
        assert_close(feature.std((2, 3), keepdim=True)[varied], code.std[varied], rtol=1e-2, atol=1e-3)


def test_weights_on_the_grid_are_means_of_the_mask(codes):
    mask = np.zeros((20, 8), np.uint8)
    mask[:8, :2] = 204  # of 8 x 8 pixels a quarter at 0.8
    mask[16:, :] = 255  # the last position has 4 rows in the picture
    _, (white, black) = MaskedStyle(*codes, mask_of(mask)).regions((20, 8), 8)
    assert_close(white[0, 0], torch.tensor([[0.2, 0.2], [0.0, 0.0], [1.0, 1.0]]), rtol=0, atol=1e-6)
    assert_close(white + black, torch.ones(1, 1, 3, 2))


@pytest.mark.parametrize("settings, said", [
    *((dict(style_weights=weights), "style_weights") for weights in ((1,), (0, 0), (-1, 2), (float("nan"), 1), ())),
    (dict(mask=np.zeros((75, 56), np.uint8)), "mask: 56 x 75 pixels, the content picture has 75 x 56"),
    (dict(mask=CONTENT, style_weights=(1, 1)), "style_weights, too"),
    (dict(mask="missing.png"), "mask missing.png: no such file"),
    (dict(), "style: got 2;"), (dict(preserve_color="hue"), "preserve_color hue"),
    (dict(style=CODE, style_size=24), "style_size"), (dict(style=CODE, preserve_color="histogram"), "histogram"),
])
def test_what_does_not_fit_is_refused(stylizer, settings, said):
    assert said in user_error(stylizer.stylize, **{"content": CONTENT, "style": STYLES} | settings)


def test_mask_files_and_pictures_are_the_same_mask(stylizer, tmp_path):
    values = np.zeros((56, 75), np.uint8)
    values[20:, 30:] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    masks = (values, tmp_path / "mask.png", Image.open(tmp_path / "mask.png"), np.repeat(values[..., None], 3, axis=2))
    assert len({stylizer.stylize(CONTENT, STYLES, mask=mask).tobytes() for mask in masks}) == 1


# ------------------------------------------------------------------------------------------------ colours


def chroma(picture: torch.Tensor) -> torch.Tensor:
    """Cb and Cr (ITU-R BT.601, full range), (B, 2, H, W)."""
    red, green, blue = picture.unbind(1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], dim=1)


def luma(picture: torch.Tensor) -> torch.Tensor:
    return torch.einsum("c,bchw->bhw", picture.new_tensor(LUMA), picture)


def test_luma_keeps_chroma_and_takes_lightness():
    content, painted = (random_picture(seed, (50, 60)).double() / 255.0 for seed in range(2))
    result = keep_colors(content, painted)
    assert result.min() >= 0.0 and result.max() <= 1.0
    assert_close(luma(result), luma(painted), rtol=0, atol=1e-6)
    unbounded = content + (luma(painted) - luma(content))[:, None]
    fits = ((unbounded >= 0.0) & (unbounded <= 1.0)).all(1, keepdim=True)
    assert 0.2 < fits.double().mean() < 0.9
    kept, wanted = chroma(result), chroma(content)
    assert_close(kept.where(fits, wanted), wanted, rtol=0, atol=1e-6)
    # Elsewhere it is shorter, in the same direction, and one channel is at its limit.
    assert_close(kept[:, 0] * wanted[:, 1], kept[:, 1] * wanted[:, 0], rtol=0, atol=1e-6)
    assert (kept.norm(dim=1) <= wanted.norm(dim=1) + 1e-6).all()
    at_limit = torch.minimum(result.amin(1, keepdim=True), 1.0 - result.amax(1, keepdim=True)) < 1e-6
    assert (fits | at_limit).all()


def test_luma_of_a_painted_picture(stylizer):
    content = smooth_picture(0, 100, 150)
    plain, kept = (stylizer.stylize(content, STYLES[0], preserve_color=each) for each in (None, "luma"))
    plain, kept = (torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].double() for each in (plain, kept))
    assert (luma(plain) - luma(kept)).abs().max() <= 1.0
    inside = ((kept > 0) & (kept < 255)).all(1, keepdim=True)
    assert inside.double().mean() > 0.5
    difference = (chroma(kept) - chroma(content.double())).abs()
    assert (difference * inside).max() <= 1.0 < (chroma(plain) - chroma(content.double())).abs().max()


def test_histogram_gives_the_style_the_colour_statistics_of_the_content():
    style, content = smooth_picture(1), smooth_picture(2, 90, 160, (30, 70))
    matched = match_colors(style, content)
    assert matched.shape == style.shape and matched.dtype == torch.uint8
    for actual, desired in zip(*(moments(picture) for picture in (matched, content))):
        assert_close(actual, desired, rtol=0.01, atol=1.0)
    assert (moments(style)[1] - moments(content)[1]).abs().max() > 50
    # Matched to itself, nothing changes: A is the unit matrix.
    assert (match_colors(style, style).int() - style.int()).abs().max() <= 1


def moments(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    colours = picture[0].flatten(1).double()
    return colours.mean(1), torch.cov(colours, correction=0)


def test_a_grey_style_stays_without_the_variation_it_lacks():
    """Along grey it gets the content's; no noise is stretched to colours."""
    grey = random_picture(0, (30, 30))[:, :1].expand(1, 3, 30, 30)
    matched = match_colors(grey, smooth_picture(2))
    values = torch.linalg.eigvalsh(moments(matched)[1])
    assert values[2] > 50 and values[1] < 1.0


def test_histogram_paints_in_the_matched_style(stylizer):
    content = smooth_picture(0)
    desired = stylizer.stylize(content, match_colors(STYLES[0], content))
    assert stylizer.stylize(content, STYLES[0], preserve_color="histogram").tobytes() == desired.tobytes()
    assert desired.tobytes() != stylizer.stylize(content, STYLES[0]).tobytes()


# --------------------------------------------------------------------------------------------------- size


def test_style_size_resizes_the_style_alone(stylizer, tmp_path):
    path = write_noise(tmp_path / "style.png", (48, 64), 3)
    with Image.open(path) as picture:
        small = picture.resize((32, 24), Image.Resampling.BICUBIC)
        desired = stylizer.stylize(CONTENT, small)
        assert stylizer.stylize(CONTENT, picture, style_size=24).tobytes() == desired.tobytes()
    assert desired.size == (75, 56)
    assert stylizer.stylize(CONTENT, path, style_size=24).tobytes() == desired.tobytes()


# ------------------------------------------------------------------------------------ the command line


@pytest.fixture
def flags(stylizer, tmp_path) -> dict:
    """One content, two styles."""
    styles = [tmp_path / f"s{number}.png" for number in range(2)]
    for number, path in enumerate(styles):
        to_pil(smooth_picture(number, size=(30 + number, 41)) / 255.0).save(path)
    return {"mode": "test", "gpu_no": -1, "load_path": write_model(tmp_path / "model.pth", stylizer.network),
            "content": write_noise(tmp_path / "c.png", (40, 56), 7), "style": styles, "save_path": tmp_path / "out.png"}


def painted_by(flags: dict) -> np.ndarray:
    assert main(words(flags)) == 0
    return read_pixels(flags["save_path"])


@pytest.mark.parametrize("name, value", [
    ("style_weights", (0.7, 0.3)), ("mask", None), ("preserve_color", "luma"), ("preserve_color", "histogram"),
    ("style_size", 24),
])
def test_each_flag_paints_what_the_class_does(stylizer, flags, tmp_path, name, value):
    if name == "mask":
        value = tmp_path / "mask.png"
        Image.fromarray(np.linspace(0, 255, 20 * 28).reshape(20, 28).astype(np.uint8)).save(value)
    if name not in ("style_weights", "mask"):
        flags["style"] = flags["style"][0]
    desired = np.asarray(stylizer.stylize(flags["content"], flags["style"], strength=0.8, **{name: value}), int)
    actual = painted_by(flags | {name: value, "style_strength": 0.8})
    assert np.abs(actual - desired).max() <= 1  # but for rounding, which the number of threads decides
    first = flags["style"][0] if isinstance(flags["style"], list) else flags["style"]
    assert not np.array_equal(actual, painted_by(flags | {"style": first, "style_strength": 0.8}))


def test_joined_styles_are_one_for_many_contents(flags, tmp_path):
    """Their pictures are named by both, and stand in one column of the sheet."""
    contents = [flags["content"], write_noise(tmp_path / "d.png", (40, 56), 8)]
    flags |= {"content": contents, "style_weights": (1, 3), "save_path": tmp_path / "out"}
    assert main(words(flags)) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"c_s0+s1.png", "d_s0+s1.png", "contact_sheet.png"}
    single = painted_by(flags | {"content": contents[1], "save_path": tmp_path / "one.png"})
    assert np.array_equal(single, read_pixels(tmp_path / "out" / "d_s0+s1.png"))
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (2 * 256, 3 * 256)


def test_luma_is_what_is_measured(flags, tmp_path, capsys):
    flags |= {"style": flags["style"][0], "metrics": "ssim", "save_path": tmp_path / "out"}
    values = []
    for more in ({}, {"preserve_color": "luma"}):
        assert main(words(flags | more)) == 0
        values.append(capsys.readouterr().out)
    assert values[0] != values[1]


def test_contents_that_do_not_fit_are_skipped_among_others(flags, tmp_path, capsys):
    Image.new("L", (56, 40), 255).save(tmp_path / "white.png")
    other = write_noise(tmp_path / "other.png", (56, 40), 3)
    flags |= {"content": [flags["content"], other], "mask": tmp_path / "white.png", "save_path": tmp_path / "out"}
    assert main(words(flags)) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"c_s0+s1.png", "contact_sheet.png"}
    assert f"content {other}: mask: 56 x 40 pixels" in capsys.readouterr().err



"""One picture, or a few: `Stylizer` with its controls and tiles, from Python, by torch.hub, by the command line, and in
a program that has modules of our modules' names."""

import re
import subprocess
import sys
import weakref
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import ROOT, picture_network, random_picture, small_network, user_error, words, write_model, write_noise
from PIL import Image
from torch.testing import assert_close

from data import IMAGENET_STD, denormalize, normalize, prepare_picture, to_pil
from main import main
from network import adain
from painting import control, tiling
from painting import stylizer as stylizer_module
from painting.control import LUMA, MaskedStyle, Style, keep_colors, match_colors, mix
from painting.stylizer import Stylizer, open_mask
from painting.tiling import Moments, least_tile, memory_needed
from weights import load_network

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


# -------------------------------------------------------------------------------------- mixing, and masks


@torch.inference_mode()
def test_mixed_styles_are_mixed_features(exact, codes):
    """As Huang & Belongie interpolate: the features aligned to each, in shares, decoded. Weights need not sum to 1. A
    mask that is grey everywhere is a mixture, too, but for its float32; a weight of 0 leaves the other style as it is.
    """
    content = exact.open(CONTENT)
    (statistics,) = content.statistics()
    first, second = (adain(*content.kept, code.mean, code.std, 1.0, statistics) for code in codes)
    desired = exact.network.decoder(0.75 * first + 0.25 * second)[:, :, :56, :75]
    assert_close(exact.paint(CONTENT, mix(codes, (6, 2))), desired, rtol=1e-9, atol=1e-9)
    grey = MaskedStyle(*codes, mask_of(np.full((56, 75), 51)))  # a fifth of 255
    assert_close(exact.paint(CONTENT, grey), exact.paint(CONTENT, mix(codes, (51, 204))), rtol=1e-6, atol=1e-6)
    alone = mix(codes, (0, 0.2))
    assert torch.equal(alone.mean, codes[1].mean) and torch.equal(alone.std, codes[1].std)


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
    (aligned,), (kept,) = decoded, content.kept
    assert aligned.shape[2:] == (7, 10)
    for feature, own, code in zip((aligned[..., :4], aligned[..., 4:]), (kept[..., :4], kept[..., 4:]), codes):
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
    *((dict(strength=each), f"strength {each}: a number from 0") for each in (-0.1, 1.1, float("nan"), "1", None)),
    *((dict(style=STYLES[0], style_size=each), f"style_size {each}: a whole") for each in (0, -3, 2.5, "24")),
    (dict(style_weights=0.5), "style_weights 0.5: a list"), (dict(style_weights=("a", 1)), "style_weights ('a', 1): a"),
    (dict(style=CODE, style_size=24), "style_size"), (dict(style=CODE, preserve_color="histogram"), "histogram"),
])
def test_what_does_not_fit_is_refused(stylizer, settings, said):
    assert said in user_error(stylizer.stylize, **{"content": CONTENT, "style": STYLES} | settings)


# -------------------------------------------------------------------------------------- colours, and size


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


@pytest.mark.parametrize("chunk", [2**20, 700], ids=["at once", "in parts"])
def test_histogram_gives_the_style_the_colour_statistics_of_the_content(monkeypatch, chunk):
    monkeypatch.setattr(control, "CHUNK", chunk)
    style, content = smooth_picture(1), smooth_picture(2, 90, 160, (30, 70))
    matched = match_colors(style, content)
    assert matched.shape == style.shape and matched.dtype == torch.uint8
    for actual, desired in zip(*(moments(picture) for picture in (matched, content))):
        assert_close(actual, desired, rtol=0.01, atol=1.0)
    assert (moments(style)[1] - moments(content)[1]).abs().max() > 50
    # Matched to itself, nothing changes: A is the unit matrix.
    assert (match_colors(style, style).int() - style.int()).abs().max() <= 1
    # A grey one varies along grey as the content does; no noise is stretched to colours.
    grey = random_picture(0, (30, 30))[:, :1].expand(1, 3, 30, 30)
    values = torch.linalg.eigvalsh(moments(match_colors(grey, content))[1])
    assert values[2] > 50 and values[1] < 1.0


def moments(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    colours = picture[0].flatten(1).double()
    return colours.mean(1), torch.cov(colours, correction=0)


def test_ways_to_keep_the_colours_are_those_of_the_functions(stylizer):
    content = smooth_picture(0)
    plain = denormalize(stylizer.paint(content, stylizer.encode_style(STYLES[0])))
    matched = stylizer.stylize(content, match_colors(STYLES[0], content))
    for way, desired in {"luma": to_pil(keep_colors(content / 255.0, plain)), "histogram": matched}.items():
        actual = np.asarray(stylizer.stylize(content, STYLES[0], preserve_color=way), int)
        assert np.abs(actual - np.asarray(desired, int)).max() <= 1
        assert np.abs(actual - np.asarray(to_pil(plain), int)).max() > 5


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
    return np.asarray(Image.open(flags["save_path"]), int)


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


def test_joined_styles_are_one_for_many_contents(flags, tmp_path, capsys):
    """Their pictures are named by both, and stand in one column of the sheet; a content that the mask does not fit is
    skipped. One alone is the same, and in tiles, too."""
    mask, other = write_noise(tmp_path / "mask.png", (20, 28), 9), write_noise(tmp_path / "other.png", (56, 40), 3)
    large = write_noise(tmp_path / "d.png", (110, 154), 8)
    flags |= {"mask": mask, "preserve_color": "luma"}
    assert main(words(flags | {"content": [flags["content"], other, large], "save_path": tmp_path / "out"})) == 1
    assert f"content {other}: mask: 28 x 20 pixels" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"c_s0+s1.png", "d_s0+s1.png", "contact_sheet.png"}
    single, tiled = (painted_by(flags | {"content": large} | more) for more in ({}, {"tile": 96}))
    assert np.array_equal(single, np.asarray(Image.open(tmp_path / "out" / "d_s0+s1.png")))
    assert "tile" in capsys.readouterr().err and np.abs(single - tiled).max() <= 1  # there was the bar
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (2 * 256, 3 * 256)


# ---------------------------------------------------------------------------------------------------------------- tiles


STORE = ROOT / "model-store"
MODELS = ["compact", "tiny", "baseline", "uncorrelation", "ch_xor", "ch_xor_pruned"]  # of the store
TILE = 104  # pixels: 24 x 24 of them within the halo of the bilinear VGG19


# Each pair of two settings occurs; sides of a picture that are short, or no multiple of the stride.
@pytest.mark.parametrize("backbone, pooling, padding, upsampling, levels, size", [
    ("vgg19", "max", "zeros", "nearest", 1, (110, 123)), ("vgg19", "blur", "reflect", "bilinear", 4, (105, 129)),
    ("vgg16", "max", "reflect", "nearest", 3, (112, 40)), ("vgg16", "blur", "zeros", "bilinear", 1, (3, 110)),
    ("vgg19", "max", "zeros", "bilinear", 2, (121, 5)), ("vgg16", "blur", "reflect", "nearest", 2, (1, 1)),
])
def test_tiles_are_the_whole_picture(backbone, pooling, padding, upsampling, levels, size, monkeypatch):
    """In float64, two pictures at once: of the smallest tiles, whose features are kept, and of larger ones, which are
    encoded twice, in two styles divided by a mask."""
    network = small_network(backbone, pooling, adain_levels=levels).double()
    network.use(upsampling, padding)
    least = least_tile(network.config)
    assert user_error(Stylizer, network, tile=least - 1) == f"tile {least - 1}: {least} pixels or more are needed"
    codes = [Stylizer(network).encode_style(picture) for picture in STYLES]
    masked = MaskedStyle(*codes, open_mask(random_picture(3, size)))
    for tile, kept, style in ((least, 2**40, codes[0]), (least + 16, 0, masked)):
        monkeypatch.setattr(tiling, "KEPT_FEATURES", kept)
        whole, tiled = (Stylizer(network, tile=each).paint(random_picture(0, size, 2), style, 0.7)
                        for each in (None, tile))
        assert whole.shape == (2, 3, *size) and whole.dtype == torch.float64
        assert_close(tiled, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_tiles_of_every_model_of_the_store(name):
    """In float32, a photograph in a painting: 0.05 of 255 at any pixel."""
    folder, outputs = ROOT / "imgs", []
    for tile in (None, 128):
        stylizer = Stylizer(STORE / f"{name}.pth", device="cpu", tile=tile)
        style = stylizer.encode_style(prepare_picture(folder / "style" / "calla.jpg", 64))
        content = prepare_picture(folder / "content" / "brandenburg_gate.jpg", 150)[:, :, :72, :136]
        outputs.append(stylizer.paint(content, style))
    assert len(stylizer.open(content).tiles) == 3
    difference = (outputs[0] - outputs[1]).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255.0
    assert outputs[0].std() > 0.3 and difference.max() < 0.05


@pytest.mark.parametrize("weights, mean, std", [
    # Zeros are left out, as if they had not been there.
    ([[1.0, 1.0], [1.0, 0.0]], 13 / 3, (28 / 3) ** 0.5),
    # The mean is (3 * 1 + 5) / 4; the deviations are 3 * 1 + 9 = 12, over 4 - (9 + 1) / 4.
    ([[3.0, 1.0], [0.0, 0.0]], 2.0, (12 / 1.5) ** 0.5),
])
@pytest.mark.parametrize("far", [0.0, 2.0**20])
def test_weighted_statistics_by_hand(weights, mean, std, far):
    """Merged of two tiles, also far from zero, where sums of squares in float32 would leave nothing."""
    moments, weights = Moments(), torch.tensor(weights)[None, None]
    for row in range(2):
        moments.add(torch.tensor([[1.0, 5.0], [7.0, 100.0]])[None, None, [row]] + far, weights[:, :, [row]])
    assert [value.item() for value in moments.result()] == pytest.approx((far + mean, std), rel=1e-9)


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kept, most", [(2**40, TILE), (0, TILE + 2 * 4 * 8)])
def test_no_more_than_a_tile_is_in_memory(monkeypatch, kept, most):
    """Of a picture of 24 tiles: what passes through the network at once, and what is left of the tiles before."""
    monkeypatch.setattr(tiling, "KEPT_FEATURES", kept)
    stylizer = Stylizer(small_network(), tile=TILE)
    network, alive, largest = stylizer.network, weakref.WeakSet(), []

    def count(part, inputs, output):
        stride = network.config.stride if part is network.decoder else 1
        largest.append(max(side * stride for side in inputs[0].shape[2:]))
        if part is network.decoder:
            assert len(alive) <= 1  # the tile that was painted last, until the next one is there
            alive.add(output)

    for part in (network.encoder.layers[0][0], network.decoder):
        part.register_forward_hook(count)
    content = stylizer.open(random_picture(0, (120, 300)))
    stylizer.paint_picture(content, stylizer.encode_style(random_picture(1)))
    assert len(content.tiles) == 24 and len(largest) == 1 + 24 * (2 if kept else 3)
    assert max(largest) <= most


@pytest.mark.parametrize("free, tile", [(2**40, None), (2**31, 1024), (2**29, 512), (1, 256)])
def test_the_tile_is_chosen_by_the_free_memory(monkeypatch, capsys, free, tile):
    """4000 x 3000 pixels by `compact` would take about 7 GiB. It is said once."""
    monkeypatch.setattr(stylizer_module, "free_memory", lambda device: free)
    stylizer = Stylizer(STORE / "compact.pth", device="cpu")
    picture = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 3, 3000, 4000)
    assert stylizer.open(picture).tiles == stylizer.open(picture).tiles
    most = (tile or 5000) // 8 - 2 * 5  # of 500 x 375 positions
    assert len(stylizer.open(picture).tiles) == -(-500 // most) * -(-375 // most)
    said = capsys.readouterr().err
    assert said.count("4000 x 3000 pixels") == (tile is not None) and (tile is None or f"tiles of {tile}" in said)


@pytest.mark.parametrize("name, bytes_a_pixel", [("compact", 369), ("tiny", 163), ("baseline", 919)])
def test_memory_needed_is_no_less_than_what_was_measured(name, bytes_a_pixel):
    """The growth of the process while 24 (compact) or 4 megapixels are painted whole (benchmarks/stylize.py)."""
    network, _ = load_network(STORE / f"{name}.pth")
    needed = memory_needed(network.config, 10**6) / 10**6
    assert bytes_a_pixel <= needed < 2 * bytes_a_pixel


# ---------------------------------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("strength", [1.0, 0.3])
@torch.inference_mode()
def test_it_paints_what_the_network_does(strength):
    """In float64, pictures of any size, several at once; as a picture in float32."""
    content, style = random_picture(0, (33, 50), 2), random_picture(1, (40, 27))
    network = picture_network().double()
    desired = torch.cat([network(normalize(each).double(), normalize(style).double(), strength)
                         for each in content.split(1)])
    stylizer = Stylizer(network)
    assert_close(stylizer.paint(content, stylizer.encode_style(style), strength), desired, rtol=1e-9, atol=1e-9)
    painted = np.asarray(Stylizer(network.float()).stylize(content[:1], style, strength=strength), int)
    assert np.abs(painted - np.asarray(to_pil(denormalize(desired[:1])), int)).max() <= 1


def test_every_kind_of_picture_is_the_same_picture(stylizer, tmp_path):
    paths = [write_noise(tmp_path / f"{seed}.png", (30, 41), seed) for seed in range(2)]
    desired = stylizer.stylize(*paths)
    assert desired.size == (41, 30) and desired.mode == "RGB"
    for kind in (str, Image.open, lambda path: np.asarray(Image.open(path)),
                 lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]):
        assert stylizer.stylize(*map(kind, paths)).tobytes() == desired.tobytes()
        style = stylizer.encode_style(kind(paths[1]))
        assert stylizer.stylize(stylizer.open(kind(paths[0])), style).tobytes() == desired.tobytes()
    mask = np.asarray(Image.open(paths[0]))[..., 0]
    Image.fromarray(mask).save(tmp_path / "mask.png")
    masks = (mask, tmp_path / "mask.png", Image.open(tmp_path / "mask.png"), np.dstack([mask] * 3))
    assert len({stylizer.stylize(paths[0], STYLES, mask=each).tobytes() for each in masks}) == 1


@pytest.mark.parametrize("wrong", [None, 3, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)),
                                   np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8),
                                   torch.zeros(2, 3, 40, 48, dtype=torch.uint8), Image.new("F", (4, 4))])
def test_what_is_no_picture_is_refused(stylizer, wrong):
    style = random_picture(1)
    assert re.match("content(:| the picture:) ", user_error(stylizer.stylize, wrong, style))
    assert re.match("style(:| the picture:) ", user_error(stylizer.stylize, style, wrong))


def test_what_cannot_be_used_is_named_by_its_argument(stylizer, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("missing.jpg", "text.jpg"):
        assert user_error(stylizer.stylize, tmp_path / name, random_picture(0)).startswith(f"content {tmp_path / name}")
    write_noise(tmp_path / "cut.png", (40, 40), 0).write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    with Image.open(tmp_path / "cut.png") as cut:
        line = user_error(stylizer.stylize, cut, random_picture(0))
    assert line.startswith(f"content {tmp_path / 'cut.png'}: not a readable picture (OSError")
    assert user_error(Stylizer, tmp_path / "missing.pth").startswith(f"model {tmp_path / 'missing.pth'}")
    assert user_error(Stylizer, None) == "model: got a NoneType; a path or a StyleTransferNetwork is needed"
    for name, value in (("upsampling", "cubic"), ("device", "cuda:99"), ("device", "gpu"), ("tile", 88.5)):
        assert user_error(Stylizer, picture_network(), **{name: value}).startswith(f"{name} {value}: ")


def test_what_is_transparent_stays_so(stylizer, tmp_path):
    """From a path and from Pillow; what is behind it is white, as on the command line."""
    content = to_pil(CONTENT / 255.0)
    content.putalpha(Image.linear_gradient("L").resize(content.size))
    content.save(tmp_path / "content.png")
    painted = stylizer.stylize(content, STYLES[0])
    assert painted.getchannel("A").tobytes() == content.getchannel("A").tobytes()
    assert painted.tobytes() == stylizer.stylize(tmp_path / "content.png", STYLES[0]).tobytes()
    opaque = stylizer.stylize(prepare_picture(content), STYLES[0])
    assert opaque.mode == "RGB" and painted.convert("RGB").tobytes() == opaque.tobytes()


def test_settings_are_of_a_copy_of_the_callers_network():
    network = small_network().requires_grad_()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stylizer = Stylizer(network, device="cpu", upsampling="bilinear")
    assert stylizer.network.config.upsampling == "bilinear"
    with torch.no_grad():
        stylizer.network.decoder.layers[0][-1].bias.fill_(float("inf"))
    assert "not finite" in user_error(stylizer.stylize, random_picture(0), random_picture(1))
    assert network.config.upsampling == "nearest"
    assert {layer.mode for layer in network.decoder.layers[0] if isinstance(layer, torch.nn.Upsample)} == {"nearest"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# ------------------------------------------------------------------------------------- in others' programs


@pytest.mark.parametrize("name", MODELS)
def test_torch_hub_gives_the_models_of_the_store(name):
    hub = torch.hub.load(str(ROOT), name, source="local", device="cpu")
    here = Stylizer(ROOT / "model-store" / f"{name}.pth", device="cpu")
    assert asdict(hub.network.config) == asdict(here.network.config)
    content, style = random_picture(0, (24, 24)), random_picture(1, (24, 24))
    assert hub.stylize(content, style).tobytes() == here.stylize(content, style).tobytes()


OWN = """
import data, network.layers, utils
assert (utils.NAME, data.NAME, network.layers.NAME) == ("my utils", "my data", "my layers")
"""
HUB = """
import torch
stylizer = torch.hub.load({root!r}, "tiny", source="local", device="cpu")
"""
STYLIZER = """
import sys
sys.path.append({root!r})
from painting import Stylizer
stylizer = Stylizer({root!r} + "/model-store/tiny.pth", device="cpu")
"""
# What is imported late, if anything is, is imported now; and a refusal is one.
USE = """
import numpy as np
picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
settings = dict(style_weights=(1, 2), preserve_color="histogram", style_size=32)
assert stylizer.stylize(picture, [picture, picture[::-1]], **settings).size == (40, 40)
stylizer.stylize({root!r} + "/imgs/content/dog.jpg", picture).save("painted.png")
try:
    stylizer.stylize("none.jpg", picture)
except ValueError as error:
    assert str(error).startswith("content none.jpg")
"""


# What belongs to the whole program; how multiprocessing starts processes can still be said.
STATE = """
import locale, multiprocessing, os, random, signal, sys, threading, types, warnings
import torch, torchvision
from PIL import Image, PngImagePlugin
def state():
    return [*map(signal.getsignal, signal.valid_signals()), *map(str, warnings.filters), *threading.enumerate(),
            os.getcwd(), locale.setlocale(locale.LC_ALL), random.getstate(), [*torch.get_rng_state()],
            Image.ID[:], torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32,
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, sys.modules["settings"],
            multiprocessing.get_start_method(allow_none=True)]
sys.modules["settings"] = types.ModuleType("settings")  # of no file
Image.init()
before = state()
"""
UNCHANGED = """
assert state() == before and "matplotlib" not in sys.modules
"""


@pytest.mark.parametrize("program", [STATE + OWN + HUB + USE + STYLIZER + USE + OWN + UNCHANGED,
                                     STATE + HUB + USE + STYLIZER + OWN + USE + UNCHANGED],
                         ids=["own first", "own later"])
def test_a_program_keeps_its_own_modules(tmp_path, program):
    """Its utils, data and network stay its own, imported before or after ours, and both work; nothing that belongs to
    the whole program is changed."""
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "__init__.py").touch()
    for name in ("utils", "data", "network/layers"):
        (tmp_path / f"{name}.py").write_text(f"NAME = 'my {name.rpartition('/')[2]}'\n")
    command = [sys.executable, "-c", program.format(root=str(ROOT))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

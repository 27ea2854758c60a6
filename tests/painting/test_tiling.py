"""Pictures in tiles: exactly what the whole picture gives, borders and seams included, in the memory of a tile."""

import weakref

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    picture_network,
    random_picture,
    read_pixels,
    small_network,
    user_error,
    words,
    write_model,
    write_noise,
)
from torch.testing import assert_close

from data import IMAGENET_STD, prepare_picture
from main import main
from painting import stylizer as stylizer_module
from painting import tiling
from painting.control import MaskedStyle, Style
from painting.stylizer import Stylizer, open_mask
from painting.tiling import Moments, TiledPicture, decoder_halo, encoder_halo, least_tile, memory_needed
from weights import load_network

STORE = ROOT / "model-store"
TILE = 104  # pixels: 24 x 24 of them within the halo of the bilinear VGG19


def paint_whole_and_tiled(network, tile=TILE, size=(110, 123), pictures=1, style=None) -> list[torch.Tensor]:
    """The same pictures painted in one piece and in tiles. style: from a stylizer to what is painted."""
    outputs = []
    for stylizer in (Stylizer(network), Stylizer(network, tile=tile)):
        code = style(stylizer) if style else stylizer.encode_style(random_picture(1, (61, 90)))
        outputs.append(stylizer.paint(random_picture(0, size, pictures), code, 0.7))
    return outputs


# Pixels on each side of a bottleneck position's own that it depends on: of the 3 x 3 convs 1, 2, 4 or 8 each, by how
# often the picture was halved before them, and of the blur poolings 1, 2 and 4.
REACH = {("vgg19", "avg"): 30, ("vgg16", "avg"): 18, ("vgg19", "blur"): 37, ("vgg16", "blur"): 21}


@pytest.mark.parametrize("backbone, pooling, upsampling", [
    ("vgg19", "avg", "nearest"), ("vgg19", "blur", "bilinear"), ("vgg16", "avg", "bilinear"),
    ("vgg16", "blur", "nearest"),
])
def test_halos_are_the_reach_of_the_layers(backbone, pooling, upsampling):
    """By gradients, of layers that let every one through: no conv cancels, no pooling chooses, no ReLU is off."""
    network = small_network(backbone, pooling, width=1)
    network.use(upsampling)
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter.fill_(0.1)
    stride, middle = network.config.stride, 12

    image = torch.ones(1, 3, 25 * stride, 25 * stride, dtype=torch.float64, requires_grad=True)
    network.encoder(image)[0, 0, middle, middle].backward()
    seen = image.grad[0, 0].sum(0).nonzero()
    reach = middle * stride - seen.min().item()  # pixels beyond the position's own
    assert seen.max().item() - ((middle + 1) * stride - 1) == reach == REACH[backbone, pooling]
    assert encoder_halo(network.config) == -(-reach // stride)

    feature = torch.ones(1, 1, 25, 25, dtype=torch.float64, requires_grad=True)
    own = slice(middle * stride, (middle + 1) * stride)
    network.decoder(feature)[0, 0, own, own].sum().backward()
    seen = feature.grad[0, 0].sum(0).nonzero()
    reach = middle - seen.min().item()
    assert seen.max().item() - middle == reach == decoder_halo(network.config)


# Each pair of two settings occurs; sides of a picture that are short, or no multiple of the stride.
@pytest.mark.parametrize("backbone, pooling, padding, upsampling, size", [
    ("vgg19", "max", "zeros", "nearest", (110, 123)), ("vgg19", "blur", "reflect", "bilinear", (105, 129)),
    ("vgg16", "max", "reflect", "nearest", (112, 40)), ("vgg16", "blur", "zeros", "bilinear", (3, 110)),
    ("vgg19", "max", "zeros", "bilinear", (121, 5)), ("vgg16", "blur", "reflect", "nearest", (1, 1)),
])
def test_tiles_are_the_whole_picture(backbone, pooling, padding, upsampling, size):
    """In float64, at the smallest tile and at a larger one."""
    network = small_network(backbone, pooling).double()
    network.use(upsampling, padding)
    least = least_tile(network.config)
    assert user_error(Stylizer, network, tile=least - 1) == f"tile {least - 1}: {least} pixels or more are needed"
    for tile in (least, least + 16):
        whole, tiled = paint_whole_and_tiled(network, tile, size)
        assert whole.shape == (1, 3, *size) and whole.dtype == torch.float64
        assert_close(tiled, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("limit", [0, 2**40])
def test_tiles_encoded_twice_or_kept(monkeypatch, limit):
    """Several pictures at once."""
    monkeypatch.setattr(tiling, "KEPT_FEATURES", limit)
    network = small_network().double()
    picture = TiledPicture(network, random_picture(0, (110, 120)), tile=TILE)
    picture.statistics()
    assert len(picture.tiles) > 4 and (picture.kept is None) == (limit == 0)
    whole, tiled = paint_whole_and_tiled(network, pictures=2)
    assert_close(tiled, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_masked", [False, True])
def test_regions_are_the_same_in_tiles(is_masked):
    def style(stylizer: Stylizer) -> Style | MaskedStyle:
        codes = [stylizer.encode_style(random_picture(seed, (40, 50))) for seed in (1, 2)]
        if is_masked:
            return MaskedStyle(*codes, open_mask(random_picture(3, (110, 123))))
        return Style(codes[0].mean, codes[1].std)

    whole, tiled = paint_whole_and_tiled(small_network().double(), style=style)
    assert_close(tiled, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["compact", "tiny", "ch_xor_pruned", "baseline"])
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

    for part in (network.encoder, network.decoder):
        part.register_forward_hook(count)
    content = stylizer.open(random_picture(0, (120, 300)))
    stylizer.paint_picture(content, stylizer.encode_style(random_picture(1)))
    assert len(content.tiles) == 24 and len(largest) == 1 + 24 * (2 if kept else 3)
    assert max(largest) <= most


@pytest.mark.parametrize("free, tile", [(2**40, None), (2**31, 1024), (2**28, 512), (1, 256)])
def test_the_tile_is_chosen_by_the_free_memory(monkeypatch, capsys, free, tile):
    """4000 x 3000 pixels by `compact` would take about 4 GiB. It is said once."""
    monkeypatch.setattr(stylizer_module, "free_memory", lambda device: free)
    stylizer = Stylizer(STORE / "compact.pth", device="cpu")
    picture = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 3, 3000, 4000)
    assert stylizer.open(picture).tiles == stylizer.open(picture).tiles
    most = (tile or 5000) // 8 - 2 * 5  # of 500 x 375 positions
    assert len(stylizer.open(picture).tiles) == -(-500 // most) * -(-375 // most)
    said = capsys.readouterr().err
    assert said.count("4000 x 3000 pixels") == (tile is not None) and (tile is None or f"tiles of {tile}" in said)


@pytest.mark.parametrize("name, bytes_a_pixel", [("compact", 342), ("tiny", 101), ("baseline", 919)])
def test_memory_needed_is_no_less_than_what_was_measured(name, bytes_a_pixel):
    """The growth of the process while 24 (compact) or 4 megapixels are painted whole (benchmarks/stylize.py)."""
    network, _ = load_network(STORE / f"{name}.pth")
    needed = memory_needed(network.config, 10**6) / 10**6
    assert bytes_a_pixel <= needed < 2 * bytes_a_pixel


# ------------------------------------------------------------------------------------------- refused, and flags


def test_tiles_of_the_command_line(tmp_path, capsys):
    """With everything at once."""
    flags = {"mode": "test", "gpu_no": -1, "load_path": write_model(tmp_path / "model.pth", picture_network()),
             "content": write_noise(tmp_path / "content.png", (110, 123), 0), "preserve_color": "luma",
             "style": [write_noise(tmp_path / f"{seed}.png", (100, 130), seed) for seed in (1, 2)],
             "mask": write_noise(tmp_path / "mask.png", (110, 123), 3)}
    outputs = []
    for more in ({}, {"tile": 96}):
        assert main(words(flags | more | {"save_path": tmp_path / "out.png"})) == 0
        outputs.append(read_pixels(tmp_path / "out.png"))
    assert "tile" in capsys.readouterr().err  # the bar
    assert np.abs(outputs[0] - outputs[1]).max() <= 1

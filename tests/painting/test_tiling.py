"""Pictures in tiles: exactly what the whole picture gives, borders and seams included."""


import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    picture_network,
    random_picture,
    read_pixels,
    refusal,
    small_network,
    user_error,
    words,
    write_model,
    write_noise,
)
from torch.testing import assert_close

from data import IMAGENET_STD, prepare_picture
from main import main
from painting import stylizer as stylize
from painting import tiling
from painting.stylizer import Stylizer
from painting.tiling import TiledPicture, decoder_halo, encoder_halo, least_tile, memory_needed
from weights import load_network

STORE = ROOT / "model-store"
TILE = 104  # pixels: 24 x 24 of them within the halo of the bilinear VGG19


def whole_and_tiled(network, tile=TILE, size=(110, 123), strength=1.0):
    """The same picture painted in one piece and in tiles, and the largest difference, of 255."""
    content, style = random_picture(0, size), random_picture(1, (61, 90))
    outputs = []
    for each in (None, tile):
        stylizer = Stylizer(network, tile=each)
        outputs.append(stylizer.paint(content, stylizer.encode_style(style), strength))
    return *outputs, difference(*outputs)


def difference(first, second) -> float:
    """The largest between two painted pictures, of 255."""
    return ((first - second).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255.0).max().item()


# Pixels on each side of a bottleneck position's own that it depends on: of the 3 x 3 convs 1, 2, 4 or 8 each, by how
# often the picture was halved before them, and of the blur poolings 1, 2 and 4.
REACH = {("vgg19", "avg"): 30, ("vgg16", "avg"): 18, ("vgg19", "blur"): 37, ("vgg16", "blur"): 21}


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
@pytest.mark.parametrize("pooling", ["avg", "blur"])
@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
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


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
@pytest.mark.parametrize("pooling", ["max", "blur"])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_tiles_are_the_whole_picture(backbone, pooling, padding, upsampling):
    network = small_network(backbone, pooling)
    network.use(upsampling, padding)
    whole, tiled, largest = whole_and_tiled(network, least_tile(network.config) + 16)
    assert whole.std() > 0.1 and largest < 1e-3
    assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(112, 40), (121, 5), (3, 110), (1, 1), (105, 129)])
@pytest.mark.parametrize("pooling", ["max", "blur"])
def test_tiles_of_sides_that_are_short_or_no_multiple_of_the_stride(size, pooling):
    network = small_network()
    network.use(padding="reflect", upsampling="bilinear", pooling=pooling)
    whole, tiled, largest = whole_and_tiled(network, TILE, size)
    assert whole.shape == tiled.shape == (1, 3, *size) and largest < 1e-3


@pytest.mark.parametrize("limit", [0, 2**40])
def test_tiles_encoded_twice_or_kept(monkeypatch, limit):
    """With half of the style, and several pictures at once."""
    monkeypatch.setattr(tiling, "KEPT_FEATURES", limit)
    network, content = small_network(), random_picture(0, (110, 120), 2)
    pictures = [TiledPicture(network, content, tile=tile) for tile in (None, TILE)]
    with torch.inference_mode():
        whole, tiled = (each.statistics()[0] for each in pictures)
    assert len(pictures[1].tiles) > 4 and (pictures[1].kept is None) == (limit == 0)
    assert_close(tiled, whole, rtol=1e-6, atol=1e-7)
    assert whole_and_tiled(network, strength=0.5)[2] < 1e-3


@pytest.mark.parametrize("name", ["compact", "tiny", "ch_xor_pruned", "baseline"])
def test_tiles_of_every_model_of_the_store(name):
    """A photograph in a painting, and 0.05 of 255 at any pixel."""
    folder, outputs = ROOT / "imgs", []
    for tile in (None, 128):
        stylizer = Stylizer(STORE / f"{name}.pth", device="cpu", tile=tile)
        style = stylizer.encode_style(prepare_picture(folder / "style" / "calla.jpg", 64))
        content = prepare_picture(folder / "content" / "brandenburg_gate.jpg", 150)[:, :, :72, :136]
        outputs.append(stylizer.paint(content, style))
    assert len(stylizer.open(content).tiles) == 3
    assert outputs[0].std() > 0.3 and difference(*outputs) < 0.05


def test_statistics_are_exact_far_from_zero():
    """A mean a thousand times the standard deviation, in tiles: float32 sums of squares would leave nothing."""
    generator = torch.Generator().manual_seed(0)
    feature = (1000.0 + torch.randn(1, 4, 40, 50, generator=generator, dtype=torch.float64)).float()
    moments = tiling.Moments()
    for rows in feature.split(7, dim=2):
        moments.add(rows, torch.ones(1, 1, *rows.shape[2:]))
    mean, std = moments.result()
    assert_close(mean, feature.double().mean((2, 3), keepdim=True), rtol=1e-12, atol=0)
    assert_close(std, feature.double().std((2, 3), keepdim=True), rtol=1e-9, atol=0)


def test_a_tile_that_is_all_halo_is_refused():
    network = small_network()
    network.use("bilinear")
    least = least_tile(network.config)
    assert least == 2 * 40 + 8
    assert f"--tile {least - 1}: {least} pixels or more" in user_error(Stylizer, network, tile=least - 1)
    assert whole_and_tiled(network, least, size=(24, 93))[2] < 1e-3


@pytest.mark.parametrize("free, tile", [(None, None), (2**40, None), (2**31, 1024), (2**28, 512), (1, 256)])
def test_the_tile_is_chosen_by_the_free_memory(monkeypatch, capsys, free, tile):
    """4000 x 3000 pixels by `compact` would take about 4 GiB."""
    monkeypatch.setattr(stylize, "free_memory", lambda device: free)
    stylizer = Stylizer(STORE / "compact.pth", device="cpu")
    picture = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 3, 3000, 4000)
    assert all((stylizer.open(picture).tiles == stylizer.open(picture).tiles) for _ in range(2))
    most = (tile or 5000) // 8 - 2 * 5  # of 500 x 375 positions
    assert len(stylizer.open(picture).tiles) == -(-500 // most) * -(-375 // most)
    said = capsys.readouterr().err
    assert said.count("4000 x 3000 pixels") == (tile is not None) and (tile is None or f"tiles of {tile}" in said)
    explicit = Stylizer(stylizer.network, tile=2048)
    assert max(len(row) for row, _ in explicit.open(picture).tiles) * 8 > 1024 and not capsys.readouterr().err


@pytest.mark.parametrize("name, bytes_a_pixel", [("compact", 342), ("tiny", 101), ("baseline", 919)])
def test_memory_needed_is_no_less_than_what_was_measured(name, bytes_a_pixel):
    """The growth of the process while 24 (compact) or 4 megapixels are painted whole (benchmarks/stylize.py)."""
    network, _ = load_network(STORE / f"{name}.pth")
    needed = memory_needed(network.config, 10**6) / 10**6
    assert bytes_a_pixel <= needed < 2 * bytes_a_pixel


def test_tiles_of_the_command_line(tmp_path, capsys):
    """With everything at once; the tile's least is of the model."""
    network = picture_network()
    flags = {"mode": "test", "gpu_no": -1, "load_path": write_model(tmp_path / "model.pth", network),
             "content": write_noise(tmp_path / "content.png", (110, 123), 0), "preserve_color": "luma",
             "style": [write_noise(tmp_path / f"{seed}.png", (100, 130), seed) for seed in (1, 2)],
             "mask": write_noise(tmp_path / "mask.png", (110, 123), 3)}
    outputs = []
    for more in ({}, {"tile": 96}):
        assert main(words(flags | more | {"save_path": tmp_path / "out.png"})) == 0
        outputs.append(read_pixels(tmp_path / "out.png"))
    assert "tile" in capsys.readouterr().err  # the bar
    assert np.abs(outputs[0] - outputs[1]).max() <= 1 and (outputs[0] == outputs[1]).mean() > 0.999
    assert "--tile 71: 72 pixels or more" in refusal(capsys, *words(flags | {"tile": 71}))

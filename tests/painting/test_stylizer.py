"""`Stylizer`: from Python, and by torch.hub."""

import numpy as np
import pytest
import torch
from helpers import ROOT, picture_network, random_picture, small_network, user_error, write_model, write_noise
from PIL import Image
from torch.testing import assert_close

from data import denormalize, normalize, to_pil
from painting.stylizer import Stylizer


@pytest.fixture(scope="module")
def stylizer() -> Stylizer:
    return Stylizer(picture_network())


def to_array(pixels: torch.Tensor) -> np.ndarray:
    return pixels[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("strength", [1.0, 0.3])
@torch.inference_mode()
def test_it_paints_what_the_network_does(stylizer, strength):
    content, style = random_picture(0, (33, 50)), random_picture(1, (40, 27))
    network = stylizer.network
    desired = network(normalize(content), normalize(style), strength)
    actual = stylizer.paint(content, stylizer.encode_style(style), strength)
    assert_close(actual, desired, rtol=1e-4, atol=1e-5)
    assert stylizer.stylize(content, style, strength=strength).tobytes() == to_pil(denormalize(actual)).tobytes()


def test_every_kind_of_picture_is_the_same_picture(stylizer, tmp_path):
    paths = [write_noise(tmp_path / f"{seed}.png", (30, 41), seed) for seed in range(2)]
    desired = stylizer.stylize(*paths)
    assert desired.size == (41, 30) and desired.mode == "RGB"
    for kind in (str, Image.open, lambda path: np.asarray(Image.open(path)),
                 lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]):
        assert stylizer.stylize(*map(kind, paths)).tobytes() == desired.tobytes()
    style = stylizer.encode_style(paths[1])
    assert stylizer.stylize(paths[0], style).tobytes() == desired.tobytes()


def test_transparent_pixels_of_a_pillow_picture_are_white(stylizer):
    seen, hidden = (to_array(random_picture(seed, (24, 24))) for seed in range(2))
    alpha = np.zeros((24, 24, 1), np.uint8)
    alpha[:, :12] = 255
    seen[:, 12:], hidden[:, :12] = 255, seen[:, :12]
    picture = Image.fromarray(np.concatenate([hidden, alpha], axis=2))
    assert stylizer.stylize(picture, hidden).tobytes() == stylizer.stylize(seen, hidden).tobytes()
    assert picture.mode == "RGBA"


def test_several_pictures_at_once_are_single_ones(stylizer):
    content, style = random_picture(0, (30, 40), 3), stylizer.encode_style(random_picture(1))
    together = stylizer.paint(content, style)
    for number, alone in enumerate(content.split(1)):
        assert_close(together[number : number + 1], stylizer.paint(alone, style), rtol=1e-4, atol=1e-5)


def test_given_content_statistics_take_the_place_of_its_own(stylizer):
    content, style = random_picture(0), stylizer.encode_style(random_picture(1))
    mean, std = stylizer.content_statistics(content)
    own = stylizer.paint(content, style)
    assert torch.equal(stylizer.paint(content, style, content_statistics=(mean, std)), own)
    # Aligned to x = style.std * (f - mean) / std + style.mean, so a halved std doubles the style's.
    doubled = type(style)(style.mean, 2 * style.std)
    assert_close(stylizer.paint(content, style, content_statistics=(mean, std / 2)), stylizer.paint(content, doubled),
                 rtol=1e-3, atol=1e-3)
    assert not torch.allclose(stylizer.paint(content, doubled), own, atol=0.05)


def test_content_is_encoded_once_for_several_styles(stylizer, monkeypatch):
    content, calls = random_picture(0), []
    styles = [stylizer.encode_style(random_picture(seed)) for seed in (1, 2)]
    desired = [stylizer.paint(content, style) for style in styles]
    forward = stylizer.network.encoder.forward
    monkeypatch.setattr(stylizer.network.encoder, "forward", lambda image: calls.append(image.shape) or forward(image))
    opened = stylizer.open(content)
    for style, each in zip(styles, desired):
        assert torch.equal(stylizer.paint(opened, style), each)
    assert len(calls) == 1


@pytest.mark.parametrize("wrong", [None, 3, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)),
                                   np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8),
                                   Image.new("F", (4, 4))])
def test_what_is_no_picture_is_refused(stylizer, wrong):
    style = random_picture(1)
    assert user_error(stylizer.stylize, wrong, style).startswith("content: ")
    assert user_error(stylizer.stylize, style, wrong).startswith("style: ")


def test_files_that_cannot_be_used_are_named(stylizer, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("missing.jpg", "text.jpg"):
        assert name in user_error(stylizer.stylize, tmp_path / name, random_picture(0))
    assert "missing.pth" in user_error(Stylizer, tmp_path / "missing.pth")


def test_a_picture_that_is_not_finite_is_refused():
    network = small_network()
    with torch.no_grad():
        network.decoder.layers[0][-1].bias[1] = float("inf")
    assert "not finite" in user_error(Stylizer(network).stylize, random_picture(0), random_picture(1))


def test_settings(tmp_path):
    path = write_model(tmp_path / "small.pth", small_network())
    stylizer = Stylizer(path, device="cpu", upsampling="bilinear")
    assert stylizer.network.config.upsampling == "bilinear"
    assert not any(parameter.isnan().any() for parameter in stylizer.network.parameters())
    assert "--upsampling cubic" in user_error(Stylizer, path, upsampling="cubic")


@pytest.mark.parametrize("name", ["compact", "tiny", "baseline", "ch_xor_pruned"])
def test_torch_hub_gives_the_models_of_the_store(name):
    hub = torch.hub.load(str(ROOT), name, source="local", device="cpu")
    here = Stylizer(ROOT / "model-store" / f"{name}.pth", device="cpu")
    assert hub.network.config.to_dict() == here.network.config.to_dict()
    content, style = random_picture(0, (24, 24)), random_picture(1, (24, 24))
    assert hub.stylize(content, style).tobytes() == here.stylize(content, style).tobytes()

"""`Stylizer`: from Python, by torch.hub, and in a program that has modules of our modules' names."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, picture_network, random_picture, small_network, user_error, write_noise
from PIL import Image
from torch.testing import assert_close

from data import denormalize, normalize, to_pil
from painting.stylizer import Stylizer


@pytest.fixture(scope="module")
def stylizer() -> Stylizer:
    return Stylizer(picture_network())


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
    style = stylizer.encode_style(paths[1])
    assert stylizer.stylize(paths[0], style).tobytes() == desired.tobytes()


def test_transparent_pixels_of_a_pillow_picture_are_white(stylizer):
    seen, hidden = (random_picture(seed, (24, 24))[0].permute(1, 2, 0).numpy() for seed in range(2))
    alpha = np.zeros((24, 24, 1), np.uint8)
    alpha[:, :12] = 255
    seen[:, 12:], hidden[:, :12] = 255, seen[:, :12]
    picture = Image.fromarray(np.concatenate([hidden, alpha], axis=2))
    assert stylizer.stylize(picture, hidden).tobytes() == stylizer.stylize(seen, hidden).tobytes()
    assert picture.mode == "RGBA"


def test_content_is_encoded_once_for_several_styles(stylizer, monkeypatch):
    content, calls = random_picture(0), []
    styles = [stylizer.encode_style(random_picture(seed)) for seed in (1, 2)]
    desired = [stylizer.paint(content, style) for style in styles]
    forward = stylizer.network.encoder.forward
    monkeypatch.setattr(stylizer.network.encoder, "forward", lambda image: calls.append(image.shape) or forward(image))
    opened = stylizer.open(content)
    assert all(torch.equal(stylizer.paint(opened, style), each) for style, each in zip(styles, desired))
    assert len(calls) == 1


@pytest.mark.parametrize("wrong", [None, 3, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)),
                                   np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8),
                                   Image.new("F", (4, 4))])
def test_what_is_no_picture_is_refused(stylizer, wrong):
    style = random_picture(1)
    assert user_error(stylizer.stylize, wrong, style).startswith("content: ")
    assert user_error(stylizer.stylize, style, wrong).startswith("style: ")


def test_what_cannot_be_used_is_named_by_its_argument(stylizer, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("missing.jpg", "text.jpg"):
        assert user_error(stylizer.stylize, tmp_path / name, random_picture(0)).startswith(f"content {tmp_path / name}")
    assert user_error(Stylizer, tmp_path / "missing.pth").startswith(f"model {tmp_path / 'missing.pth'}")
    line = user_error(Stylizer, picture_network(), upsampling="cubic")
    assert line == "upsampling cubic: one of nearest, bilinear is needed"


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


@pytest.mark.parametrize("name", ["compact", "tiny", "baseline", "ch_xor_pruned"])
def test_torch_hub_gives_the_models_of_the_store(name):
    hub = torch.hub.load(str(ROOT), name, source="local", device="cpu")
    here = Stylizer(ROOT / "model-store" / f"{name}.pth", device="cpu")
    assert hub.network.config.to_dict() == here.network.config.to_dict()
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


@pytest.mark.parametrize("program", [OWN + HUB + USE + STYLIZER + USE + OWN, HUB + USE + STYLIZER + OWN + USE],
                         ids=["own first", "own later"])
def test_a_program_keeps_its_own_modules(tmp_path, program):
    """Its utils, data and network stay its own, imported before or after ours, and both work."""
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "__init__.py").touch()
    for name in ("utils", "data", "network/layers"):
        (tmp_path / f"{name}.py").write_text(f"NAME = 'my {name.rpartition('/')[2]}'\n")
    command = [sys.executable, "-c", program.format(root=str(ROOT))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

"""What the repository ships in model-store/: nothing changed, nothing too large, all of it loads."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from data import find_pictures, normalize, prepare_picture
from network import BUNDLED_VGG19, LossNetwork, load_network, load_vgg

STORE = Path(__file__).parent.parent / "model-store"
PHOTOGRAPHS = STORE.parent / "imgs" / "content"
SUMS = dict(reversed(line.split()) for line in (STORE / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize("name", SUMS)
def test_file_is_as_listed(name):
    content = (STORE / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SUMS[name]
    assert len(content) <= 16 * 2**20


def test_every_shipped_file_is_listed_and_described():
    ignored = (STORE.parent / ".gitignore").read_text().splitlines()
    shipped = {line.removeprefix("!/model-store/") for line in ignored if line.startswith("!/model-store/")}
    assert shipped - {"README.md", "SHA256SUMS"} == SUMS.keys()
    text = (STORE / "README.md").read_text()
    assert all(f"`{name}`" in text for name in SUMS)


@pytest.mark.parametrize("name", sorted(SUMS.keys() - {BUNDLED_VGG19.name}))
def test_model_loads(name):
    network, _ = load_network(STORE / name)
    assert network.config.backbone == "vgg19"


def test_bundled_vgg_loads_and_is_named_by_its_checksum():
    weights, origin = load_vgg("vgg19", "bundled")
    assert weights["19.weight"].shape == (512, 256, 3, 3)
    assert origin == f"bundled (sha256 {SUMS[BUNDLED_VGG19.name][:16]})"


@torch.inference_mode()
def test_bundled_features_have_a_mean_of_order_one():
    """Each ReLU of natural pictures, as the losses' weights count on."""
    network = LossNetwork("vgg19")
    network.layers.load_state_dict(load_vgg("vgg19", "bundled")[0])
    pictures = torch.cat([prepare_picture(path, 128, 128) for path in find_pictures(PHOTOGRAPHS, "")])
    feature = normalize(pictures)
    for layer in network.layers:
        feature = layer(feature)
        if isinstance(layer, nn.ReLU):
            assert 0.5 < feature.mean() < 2.0

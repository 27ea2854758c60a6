"""How the encoder and the loss network pad: zeros, as published, or by reflection. That both paint as networks written
out do: test_step.py, test_adain_files.py."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, random_picture, small_network, write_model
from torch.testing import assert_close

from data import normalize
from network import LossNetwork
from train import TrainConfig, build_trainer
from weights import load_network

PADDINGS = ("zeros", "reflect")


def pictures_of(size: int) -> list[torch.Tensor]:
    """Two contents and two styles, float64, ImageNet-normalised."""
    return [normalize(random_picture(seed, (size, size), 2)).double() for seed in range(2)]


@pytest.mark.parametrize("padding", PADDINGS)
@torch.inference_mode()
def test_a_network_pads_as_its_file_says(tmp_path, padding):
    """One of the original implementation, which holds only `state_dict`, pads with zeros."""
    network = small_network()
    network.use(padding=padding)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "original.pth")
    loaded, _ = load_network(write_model(tmp_path / "model.pth", network))
    original, _ = load_network(tmp_path / "original.pth")
    assert loaded.config == network.config and loaded.config.padding == padding
    told, from_file, without = (each.double()(*pictures_of(24)) for each in (network, loaded, original))
    assert torch.equal(told, from_file)
    assert torch.allclose(told, without, atol=1e-2) == torch.equal(told, without) == (padding == "zeros")


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
@torch.inference_mode()
def test_loss_network_pads_as_told(backbone):
    """Its first tap by hand; and all that it sees along the border of one colour comes from its padding."""
    image, spreads = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64), {}
    assert LossNetwork(backbone).padding == "zeros"
    for padding in PADDINGS:
        torch.manual_seed(0)
        network = LossNetwork(backbone, padding).double()
        feature, first = pictures_of(24)[0], network.layers[0]
        padded = F.pad(feature, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)
        desired = F.conv2d(padded, first.weight, first.bias).relu()
        assert_close(network.layers[:2](feature), desired, rtol=1e-9, atol=1e-9)
        spreads[padding] = [tap.std((2, 3)).max() for tap in network(image)]
    assert max(spreads["reflect"]) < 1e-12 < 1e-3 < min(spreads["zeros"])


@pytest.mark.parametrize("padding", [None, "zeros"])
def test_the_loss_network_of_a_training_pads_as_its_network_does(small, tmp_path, padding):
    """As the file says, or the flag."""
    network = small_network(width=8)
    network.use(padding="reflect")
    given = small | {"load_path": str(write_model(tmp_path / "reflect.pth", network)), "save_path": "x"}
    trainer = build_trainer(TrainConfig(**given, padding=padding), CPU, None)
    assert trainer.network.config.padding == trainer.forward_pass.loss_network.padding == (padding or "reflect")

"""How the encoder and the loss network pad: zeros, as published, or by reflection; against networks written out."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, random_picture, small_network, user_error, write_model
from torch.testing import assert_close

from data import normalize
from network import LossNetwork
from train import TrainConfig, build_trainer, train
from weights import load_network

PADDINGS = ("zeros", "reflect")
ENCODER_POOLINGS = (4, 9, 18)  # indices in torchvision's vgg19.features
ENCODER_CONVS = (0, 2, 5, 7, 10, 12, 14, 16, 19)
DECODER_CONVS = ((1, False), (5, True), (8, False), (11, False), (14, False), (18, True), (21, False), (25, True),
                 (28, False))  # by index, and whether an upsampling stands before


def padded(feature: torch.Tensor, padding: str) -> torch.Tensor:
    """One pixel on every side."""
    return F.pad(feature, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)


def encode(state: dict, image: torch.Tensor, padding: str) -> torch.Tensor:
    """The VGG19 encoder, written out."""
    for index in range(ENCODER_CONVS[-1] + 1):
        if index in ENCODER_POOLINGS:
            image = F.max_pool2d(image, 2)
        elif index in ENCODER_CONVS:
            weight, bias = state[f"encoder.layers.0.{index}.weight"], state[f"encoder.layers.0.{index}.bias"]
            image = F.conv2d(padded(image, padding), weight, bias).relu()
    return image


def paint(state: dict, content: torch.Tensor, style: torch.Tensor, padding: str) -> torch.Tensor:
    """The network of the original implementation, written out; pictures and output ImageNet-normalised."""
    content, style = encode(state, content, padding), encode(state, style, padding)
    means, stds = ([each.mean((2, 3), keepdim=True) for each in (content, style)],
                   [each.std((2, 3), keepdim=True) for each in (content, style)])
    feature = (content - means[0]) / (stds[0] + 1e-5) * stds[1] + means[1]
    for index, is_upsampled in DECODER_CONVS:
        if is_upsampled:
            feature = feature.repeat_interleave(2, 2).repeat_interleave(2, 3)
        weight, bias = state[f"decoder.layers.0.{index}.weight"], state[f"decoder.layers.0.{index}.bias"]
        feature = F.conv2d(padded(feature, "reflect"), weight, bias)
        if index != DECODER_CONVS[-1][0]:
            feature = feature.relu()
    return feature


def pictures_of(size: int) -> list[torch.Tensor]:
    """Two contents and two styles, float64, ImageNet-normalised."""
    return [normalize(random_picture(seed, (size, size), 2)).double() for seed in range(2)]


@pytest.mark.parametrize("padding", PADDINGS)
@torch.inference_mode()
def test_network_is_the_one_written_out(tmp_path, padding):
    """In float64: told to use a padding, and built with it from its file; one of the original implementation, which
    holds only `state_dict`, pads with zeros."""
    network = small_network()
    network.use(padding=padding)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "original.pth")
    loaded, _ = load_network(write_model(tmp_path / "model.pth", network))
    original, _ = load_network(tmp_path / "original.pth")
    assert loaded.config == network.config and loaded.config.padding == padding
    pictures, state = pictures_of(24), network.double().state_dict()
    for actual, used in ((network, padding), (loaded.double(), padding), (original.double(), "zeros")):
        assert_close(actual(*pictures), paint(state, *pictures, used), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(*(paint(state, *pictures, each) for each in PADDINGS), atol=1e-2)


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
        desired = F.conv2d(padded(feature, padding), first.weight, first.bias).relu()
        assert_close(network.layers[:2](feature), desired, rtol=1e-9, atol=1e-9)
        spreads[padding] = [tap.std((2, 3)).max() for tap in network(image)]
    assert max(spreads["reflect"]) < 1e-12 < 1e-3 < min(spreads["zeros"])


@pytest.mark.parametrize("padding", [None, "zeros"])
def test_training_pads_as_its_file_or_the_flag_says_and_a_run_stays_so(small, tmp_path, padding):
    network = small_network(width=8)
    network.use(padding="reflect")
    given = small | {"load_path": str(write_model(tmp_path / "reflect.pth", network)), "max_iter": 1,
                     "save_path": str(tmp_path / "run"), "padding": padding}
    desired = padding or "reflect"
    trainer = build_trainer(TrainConfig(**given), CPU, None)
    assert trainer.network.config.padding == trainer.forward_pass.loss_network.padding == desired
    if padding is None:
        return
    assert train(given) == 0
    again = {"save_path": given["save_path"], "resume": True, "max_iter": 2}
    assert train(again) == 0 and load_network(tmp_path / "run")[0].config.padding == desired
    assert "padding" in user_error(train, again | {"padding": "reflect"})

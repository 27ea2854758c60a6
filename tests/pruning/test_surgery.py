"""Surgery: a network without channels is the network in which these channels are zero, or another constant."""

import copy
import re

import numpy as np
import pytest
import torch
from helpers import convs, plant, small_network, user_error
from torch.testing import assert_close

from network import StyleTransferNetwork, bottleneck_conv
from pruning.surgery import cut_bottleneck, cut_channels

SAME = {"rtol": 1e-9, "atol": 1e-9}  # of float64
# Channels to plant, by number of their conv.
OFF = {0: [1], 4: [2, 3], 8: [5], 9: [0], 15: [7]}
CONSTANT = {2: [6], 8: [4], 11: [1], 16: [2]}


def paint(network: StyleTransferNetwork, strength: float = 1.0) -> torch.Tensor:
    """What a network in float64 paints of noise, of sides that are no multiples of the stride."""
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, *size, generator=generator, dtype=torch.float64)
                      for size in ((37, 21), (24, 33)))
    with torch.inference_mode():
        return network(content, style, strength)


def paint_with(network: StyleTransferNetwork, values: dict[str, dict[int, float]], strength: float = 1.0):
    """What it paints when these channels have these values everywhere after the ReLU."""
    return paint(plant(copy.deepcopy(network), values), strength)


def spread(network: StyleTransferNetwork, names: list[str] | None = None) -> dict[str, list[int]]:
    """Two channels of 6 of each of these convs, or of all; of those whose features are added the same."""
    numbers = {number: number for number in range(len(convs(network)))} | {
        second: first for first, second in network.config.added_convs}
    return {name: [numbers[number] % 6, (numbers[number] + 3) % 6] for number, name in enumerate(convs(network))
            if names is None or name in names}


@pytest.mark.parametrize("backbone, pooling, upsampling, padding, strength, levels", [
    ("vgg19", "max", "nearest", "zeros", 1.0, 1), ("vgg16", "avg", "bilinear", "zeros", 0.4, 2),
    ("vgg16", "blur", "nearest", "reflect", 0.0, 1), ("vgg19", "blur", "bilinear", "reflect", 1.0, 4),
])
def test_cutting_is_setting_to_zero(backbone, pooling, upsampling, padding, strength, levels):
    network = small_network(backbone, pooling, adain_levels=levels).double()
    network.use(upsampling, padding)
    cuts = spread(network)
    cut = cut_channels(network, cuts)
    assert set(cut.config.widths[:-1]) == {4}
    desired = paint_with(network, {name: dict.fromkeys(channels, 0.0) for name, channels in cuts.items()}, strength)
    assert_close(paint(cut, strength), desired, **SAME)
    assert not torch.allclose(paint(network, strength), desired)


@pytest.mark.parametrize("padding, strength, levels", [
    ("zeros", 1.0, 1), ("zeros", 0.3, 1), ("reflect", 0.6, 1), ("reflect", 0.6, 3)])
def test_constants_are_folded_exactly(padding, strength, levels):
    """In the bottleneck and the decoder; in the encoder where it reflects."""
    network = small_network(adain_levels=levels).double()
    network.use(padding=padding)
    names = convs(network)
    exact = names if padding == "reflect" else names[names.index(bottleneck_conv(network.config)) :]
    constants = {name: {channels[0]: 0.5 + 0.1 * number}
                 for number, (name, channels) in enumerate(spread(network, exact).items())}
    desired = paint_with(network, constants, strength)
    assert_close(paint(cut_channels(network, constants, constants), strength), desired, **SAME)
    assert not torch.allclose(paint(cut_channels(network, constants), strength), desired)
    if padding == "zeros":  # makes it differ along the border: `select_channels` lets it stay
        constants = {names[2]: {3: 2.0}}
        cut = cut_channels(network, constants, constants)
        assert not torch.allclose(paint(cut, strength), paint_with(network, constants, strength), **SAME)


def test_cuts_add_up_and_leave_their_input_as_it_was():
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cuts = {"encoder.layers.0.0": [1], "encoder.layers.0.2": np.array([5, 0]), "encoder.layers.0.19": (2, 3),
            "decoder.layers.0.1": [4], "decoder.layers.0.25": range(5)}
    cut = cut_channels(network, cuts)
    assert cut.config == network.config.with_widths([5, 4, 6, 6, 6, 6, 6, 6, 4, 5, 6, 6, 6, 6, 6, 6, 1, 3])
    twice = cut_channels(cut, {"encoder.layers.0.19": [3]})  # what is 3 now was 5
    once = cut_channels(network, cuts | {"encoder.layers.0.19": [2, 3, 5]})
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())
    with torch.no_grad():  # the input is untouched, and shares no memory with the output
        for parameter in cut.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_cut_keeps_every_layer_as_it_was():
    """Kernel, stride, padding and its mode, pooling, upsampling, training or not: only two widths change."""
    network = small_network("vgg16", "avg").train()
    network.use("bilinear", "reflect")
    cut = cut_bottleneck(network, [2])
    before, after = (re.sub(r"Conv2d\(\d+, \d+", "Conv2d(", repr(each)) for each in (network, cut))
    assert after == before and "reflect" in after
    assert cut.training and not cut_bottleneck(network.eval(), [2]).training
    assert all(parameter.requires_grad for parameter in cut.parameters())


@pytest.mark.parametrize("cuts, needed", [
    ({"encoder.layers.0.19": [6]}, "channel 6: the bottleneck has 6 channels, 0 to 5"),
    ({"encoder.layers.0.19": [2, 3, 2]}, "channel 2 is named more than once"),
    ({"encoder.layers.0.19": range(6)}, "the bottleneck has 6, at most 5 can go"),
    ({"decoder.layers.0.28": [0]}, "decoder.layers.0.28: no conv with channels to cut"),
    ({"decoder.layers.0.1": [-1]}, "channel -1: decoder.layers.0.1 has 6 channels"),
])
def test_impossible_cuts_are_refused(cuts, needed):
    assert needed in user_error(cut_channels, small_network(), cuts)


def test_of_convs_whose_features_are_added_the_same_channels_go():
    network = small_network(adain_levels=2)
    needed = "encoder.layers.0.16 and decoder.layers.0.1: their features are added"
    for cuts in ({"encoder.layers.0.16": [1]}, {"encoder.layers.0.16": [1], "decoder.layers.0.1": [2]}):
        assert needed in user_error(cut_channels, network, cuts)

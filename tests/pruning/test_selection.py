"""The choice of channels: in the bottleneck, of every layer, down to a budget of multiply-adds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import convs, plant, random_picture, small_config, small_network, user_error
from test_responses import L2, RESPONSES, make_folders
from test_surgery import CONSTANT

from data import prepare_picture
from network import NetworkConfig, conv_layers, count_macs, least_kept
from prune import PruneConfig
from pruning.report import largest_change
from pruning.responses import LayerResponses, Responses, choose_pictures, measure_responses
from pruning.selection import most_macs, select, select_by_magnitude, select_channels, select_in_bottleneck
from pruning.surgery import cut_channels

FULL = NetworkConfig.full()


@pytest.mark.parametrize("settings, desired", [
    ({}, [1, 3]), ({"prune_num": 0}, []), ({"prune_num": 3}, [1, 3, 2]), ({"prune_num": 4}, [1, 3, 2, 0]),
    ({"prune_channels": (4, 0)}, [0, 4]),
    # Width 5, in fours: 4 channels stay, or all 5.
    ({"round_to": 4}, [1]), ({"round_to": 4, "prune_num": 4}, [1]), ({"round_to": 4, "prune_num": 0}, []),
    ({"round_to": 4, "prune_channels": (4, 0)}, [0]),
])
def test_channels_of_the_bottleneck(settings, desired):
    """Summed responses 6, 0, 2.5, 0, 7."""
    assert select_in_bottleneck(RESPONSES, PruneConfig(**settings)) == desired


def test_where_none_is_off_none_is_cut_and_where_all_are_it_is_refused():
    assert select_in_bottleneck(Responses(L2 + 1, RESPONSES.paths, 2), PruneConfig()) == []
    message = user_error(select_in_bottleneck, Responses(np.zeros((2, 5), np.float32), ["", ""], 1), PruneConfig())
    assert "all 5" in message and "channel_loss_weight" in message


def test_off_and_constant_channels_are_cut_exactly(measured):
    network, config, found = measured
    cuts, constants = select_channels(network.config, found.layers, config)
    names = convs(network)
    for number, channels in CONSTANT.items():
        is_exact = number != 2  # in the encoder, which pads with zeros, it is not: it stays
        desired = channels if is_exact else []
        assert sorted(cuts[names[number]]) == sorted([*found.layers[names[number]].off, *desired])
        assert constants[names[number]] == dict.fromkeys(desired, 0.75)
    for name in convs(network):
        assert set(found.layers[name].off) <= set(cuts[name])
    cut = cut_channels(network, cuts, constants)
    content, style = (prepare_picture(found.paths[number], 32, 32) for number in (2, 3))
    assert largest_change(network, cut, content, style, 1.0) < 1e-2  # of 255, in float32
    _, constants = select_channels(replace(network.config, padding="reflect"), found.layers, config)
    assert constants[names[2]] == {6: 0.75}


def test_channels_that_are_added_go_where_both_are_off(tmp_path):
    """Convs 7 and 9, and 3 and 13, of a network measured and cut in every layer, exactly."""
    network = small_network(width=8, adain_levels=3)
    names = convs(network)
    planted = {7: [1, 2], 9: [2, 5], 3: [0], 13: [0], 11: [4]}
    plant(network, {names[number]: dict.fromkeys(channels, 0.0) for number, channels in planted.items()})
    config = replace(make_folders(tmp_path), prune_layers="all")
    found = measure_responses(network, config, *choose_pictures(config))
    cuts, constants = select_channels(network.config, found.layers, config)
    off = {name: layer.off.tolist() for name, layer in found.layers.items()}
    assert all(set(channels) <= set(off[names[number]]) for number, channels in planted.items())
    for first, second in ((7, 9), (3, 13)):
        both = sorted(set(off[names[first]]).intersection(off[names[second]]))
        assert sorted(cuts[names[first]]) == sorted(cuts[names[second]]) == both and both
    cut = cut_channels(network, cuts, constants)
    content, style = (prepare_picture(found.paths[number], 32, 32) for number in (2, 3))
    assert largest_change(network, cut, content, style, 1.0) < 1e-2  # of 255, in float32
    for rank in ("response", "magnitude"):
        smaller = replace(config, prune_macs=0.5, prune_rank=rank, round_to=2)
        cut = cut_channels(network, *select(network, found, smaller))
        assert count_macs(cut.config, 512) <= 0.5 * count_macs(network.config, 512)
        assert cut(*(random_picture(seed).float() for seed in range(2))).isfinite().all()


def drawn_responses(config: NetworkConfig, seed: int = 0) -> dict[str, LayerResponses]:
    """Responses without a measurement: the importance drawn, a fifth of the channels off, means of 0.5."""
    generator = np.random.default_rng(seed)
    drawn = {}
    for layer in conv_layers(config, 0)[:-1]:
        importance = generator.gamma(0.5, size=layer.width).astype(np.float32)
        importance[generator.random(layer.width) < 0.2] = 0
        largest = (importance > 0).astype(np.float32)
        drawn[layer.name] = LayerResponses(importance[None], 0 * largest, largest, largest / 2, importance)
    return drawn


@pytest.mark.parametrize("backbone, macs, multiple", [
    ("vgg19", 1.0, 8), ("vgg19", 0.55, 1), ("vgg19", 0.1, 8), ("vgg16", 0.3, 8),
])
def test_a_budget_is_met_and_not_needlessly_undercut(backbone, macs, multiple):
    """The least important channels go, and their mean takes their place."""
    full = NetworkConfig.full(backbone)
    layers, drawn = conv_layers(full, 512), drawn_responses(full)
    cuts, constants = select_channels(full, drawn, PruneConfig(prune_macs=macs, round_to=multiple))
    widths = [layer.width - len(cuts.get(layer.name, [])) for layer in layers]
    before, after = count_macs(full, 512), count_macs(full.with_widths(widths), 512)
    assert after <= macs * before
    if macs < 0.6:  # one step saves at most 2% (a channel of 64 in two convs), or 8 times that
        assert after > (macs - 0.02 * multiple) * before
    else:
        assert all(len(cuts[name]) <= len(drawn[name].off) for name in drawn)
    for layer, width in zip(layers[:-1], widths):
        assert width >= least_kept(layer.width) and width % multiple == 0
        found, cut = drawn[layer.name], cuts[layer.name]
        kept = sorted(set(range(layer.width)) - set(cut))
        assert not cut or found.importance[cut].max() <= found.importance[kept].min()
        assert constants[layer.name] == {channel: 0.5 for channel in cut if channel not in found.off}


def test_of_equally_important_channels_the_one_that_saves_most_goes():
    before = count_macs(FULL, 512)
    equal = {layer.name: LayerResponses(np.ones((1, layer.width)), np.zeros(layer.width), *[np.ones(layer.width)] * 3)
             for layer in conv_layers(FULL, 0)[:-1]}
    saved = [before - count_macs(FULL.with_widths([*FULL.widths[:number], width - 1, *FULL.widths[number + 1 :]]), 512)
             for number, width in enumerate(FULL.widths[:-1])]
    cuts, _ = select_channels(FULL, equal, PruneConfig(prune_macs=1 - 1 / before))
    assert [len(cut) for cut in cuts.values()] == [int(number == np.argmax(saved)) for number in range(17)]


@pytest.mark.parametrize("multiple, desired", [(1, 5), (2, 6), (4, 8), (8, 8), (16, 10)])
def test_widths_are_rounded_up_by_keeping_the_strongest(multiple, desired):
    config = small_config(width=10)
    largest = np.array([0, 0, 3, 0, 1, 2, 0, 0, 4, 5.0])
    found = LayerResponses(largest[None], 0 * largest, largest, largest / 2, np.array([5, 4, 9, 3, 9, 9, 2, 1, 9, 9.0]))
    drawn = {layer.name: found for layer in conv_layers(config, 0)[:-1]}
    cuts, _ = select_channels(config, drawn, PruneConfig(prune_layers="all", round_to=multiple))
    # Off are 7, 6, 3, 1, 0, of rising importance; the most important of them stay.
    assert set(map(tuple, cuts.values())) == {(7, 6, 3, 1, 0)[: 10 - desired]}
    drawn["decoder.layers.0.8"] = LayerResponses(np.zeros((1, 10)), *[np.zeros(10)] * 4)  # all off: a channel stays
    cuts, _ = select_channels(config, drawn, PruneConfig(prune_layers="all", round_to=multiple))
    assert len(cuts["decoder.layers.0.8"]) == 10 - min(multiple, 10)


def test_a_budget_below_what_is_kept_is_refused():
    message = user_error(most_macs, FULL, PruneConfig(prune_macs=0.005))
    assert message.startswith("prune_macs 0.005: a tenth of every layer")
    least = float(message.rsplit("which is ")[1].split()[0])
    assert most_macs(FULL, PruneConfig(prune_macs=least)) == pytest.approx(least * count_macs(FULL, 512))
    assert "multiples of 32" in user_error(most_macs, FULL, PruneConfig(prune_macs=least, round_to=32))


@pytest.mark.parametrize("less, multiple, desired", [
    (0, 1, (1, 2, 0)), (1, 1, (1, 2, 0, 5)), (1, 4, (1, 2, 0, 5, 7, 8)),
])
def test_plain_magnitude_takes_the_same_fraction_of_every_layer(less, multiple, desired):
    """Where 7 of 10 channels of each layer just meet the budget, and where they cost a multiply-add too many."""
    network = small_network(width=10)
    config = network.config
    norms = torch.tensor([3, -1, 2, 9, 8, -4, 7, 5, 6, 10.0])[:, None, None, None]
    with torch.no_grad():
        for name in convs(network):
            network.get_submodule(name).weight[:] = norms
    macs = (count_macs(config.with_widths([7] * 17 + [3]), 512) - less + 0.5) / count_macs(config, 512)
    cuts = select_by_magnitude(network, PruneConfig(prune_macs=macs, round_to=multiple))
    assert set(map(tuple, cuts.values())) == {desired}

"""Pruning every layer: surgery on any conv, what is measured of it, the choice by budget, the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    paint_within_range,
    random_picture,
    read_pixels,
    refusal,
    small_config,
    small_network,
    user_error,
    words,
    write_model,
)
from PIL import Image
from test_prune import make_folders
from torch.testing import assert_close

from data import normalize, prepare_picture
from main import main
from network import (
    POOLINGS,
    NetworkConfig,
    StyleTransferNetwork,
    adain,
    channel_statistics,
    conv_layers,
    count_macs,
    count_parameters,
    least_kept,
)
from prune import PruneConfig, choose_channels, largest_pixel_difference
from pruning import responses as responses_module
from pruning.responses import LayerResponses, Responses, find_folders, measure_responses
from pruning.selection import macs_of_widths, most_macs, select_by_magnitude, select_channels
from pruning.surgery import cut_bottleneck, cut_channels
from weights import load_network

BOTTLENECK = {"vgg19": "encoder.layers.0.19", "vgg16": "encoder.layers.0.14"}


def convs(config: NetworkConfig) -> list[str]:
    """Names of all convs that can be cut."""
    return [layer.name for layer in conv_layers(config, size=0)][:-1]


def plant(network: StyleTransferNetwork, channels: dict[str, list[int]], value: float) -> None:
    """Channels that are `value` after the ReLU whatever the picture: zero filters, and it as the bias."""
    with torch.no_grad():
        for name, indices in channels.items():
            conv = network.get_submodule(name)
            conv.weight[indices] = 0
            conv.bias[indices] = value


PAIRS = [(random_picture(0, (37, 21)), random_picture(1, (24, 32))),
         (random_picture(2, (16, 43)), random_picture(3, (40, 17)))]


# ------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("size", [64, 72, 100])
@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_layers_are_the_networks_convs_and_their_macs_add_up(backbone, pooling, size):
    """Whatever stands between the convs, so that no budget of multiply-adds is missed by what a pooling takes."""
    widths = {"vgg19": [3, 5, 4, 7, 6, 2, 9, 8, 5, 7, 1, 4, 6, 3, 8, 5, 2, 3],
              "vgg16": [3, 5, 4, 7, 6, 2, 9, 8, 5, 7, 1, 4, 6, 3]}[backbone]
    config = small_config(backbone, pooling).with_widths(widths)
    network = StyleTransferNetwork(config)
    layers = conv_layers(config, size)
    assert [f"{layer.name}.weight" for layer in layers] == [name for name in network.state_dict() if "weight" in name]
    for layer in layers:
        assert network.get_submodule(layer.name).weight.shape == (layer.width, layer.width_in, 3, 3)
        assert layer.parameters == count_parameters(network.get_submodule(layer.name))
    assert sum(layer.macs for layer in layers) == count_macs(config, size)
    assert [layer.name for layer in layers if layer.kind == "bottleneck"] == [BOTTLENECK[backbone]]
    assert [layer.kind for layer in layers].index("output") == len(layers) - 1
    # The same from the full network's layers and other widths.
    full = conv_layers(NetworkConfig.full(backbone), size)
    assert macs_of_widths(full, widths) == count_macs(config, size)


# ------------------------------------------------------------------------------------------------- surgery


def test_cut_of_several_layers_is_slicing_by_hand():
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cuts = {"encoder.layers.0.0": [1], "encoder.layers.0.2": [5, 0], "encoder.layers.0.19": [2, 3],
            "decoder.layers.0.1": [4], "decoder.layers.0.25": [0, 1, 2, 3, 4]}
    cut = cut_channels(network, cuts)
    names = [*convs(network.config), "decoder.layers.0.28"]
    kept_in = [0, 1, 2]
    for name in names:
        kept = [channel for channel in range(len(before[f"{name}.bias"])) if channel not in cuts.get(name, [])]
        assert_close(cut.state_dict()[f"{name}.weight"], before[f"{name}.weight"][kept][:, kept_in], rtol=0, atol=0)
        assert_close(cut.state_dict()[f"{name}.bias"], before[f"{name}.bias"][kept], rtol=0, atol=0)
        kept_in = kept
    assert cut.config == network.config.with_widths([5, 4, 6, 6, 6, 6, 6, 6, 4, 5, 6, 6, 6, 6, 6, 6, 1, 3])
    for name, tensor in network.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_cutting_dead_channels_of_all_layers_changes_no_pixel(backbone, pooling):
    network = small_network(backbone, pooling, width=8)
    dead = {name: [number % 8, (number + 3) % 8] for number, name in enumerate(convs(network.config))}
    plant(network, dead, -0.5)
    paint_within_range(network)
    cut = cut_channels(network, dead)
    assert set(cut.config.widths[:-1]) == {6}
    assert largest_pixel_difference(network, cut, PAIRS, 1.0) < 1e-3  # of 255
    for name in dead:  # each layer counts: cutting a living channel of any is seen
        living = next(channel for channel in range(8) if channel not in dead[name]
                      and responds(network, name, channel))
        assert largest_pixel_difference(network, cut_channels(network, {name: [living]}), PAIRS, 1.0) > 1e-2


def responds(network: StyleTransferNetwork, name: str, channel: int) -> bool:
    """Whether setting the channel's filter and bias to zero changes the pictures."""
    other = cut_channels(network, {})
    plant(other, {name: [channel]}, 0.0)
    return largest_pixel_difference(network, other, PAIRS, 1.0) > 1e-2


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_constant_channels_of_bottleneck_and_decoder_are_folded_exactly(strength):
    network = small_network(width=8)
    names = convs(network.config)
    names = names[names.index(BOTTLENECK["vgg19"]):]
    planted = {name: [number % 8] for number, name in enumerate(names)}
    for number, name in enumerate(names):
        plant(network, {name: planted[name]}, 0.5 + 0.1 * number)
    paint_within_range(network)
    constants = {name: {number % 8: 0.5 + 0.1 * number} for number, name in enumerate(names)}
    cut = cut_channels(network, planted, constants)
    assert largest_pixel_difference(network, cut, PAIRS, strength) < 1e-3
    assert largest_pixel_difference(network, cut_channels(network, planted), PAIRS, strength) > 0.1


def test_a_constant_of_the_encoder_is_not_exact_at_the_border():
    """Why `select_channels` does not fold them: zero padding. Reflection leaves no difference."""
    network = small_network(width=8)
    plant(network, {"encoder.layers.0.5": [3]}, 2.0)
    for padding, is_exact in (("zeros", False), ("reflect", True)):
        network.use(padding=padding)
        paint_within_range(network)
        cut = cut_channels(network, {"encoder.layers.0.5": [3]}, {"encoder.layers.0.5": {3: 2.0}})
        difference = largest_pixel_difference(network, cut, PAIRS, 1.0)
        assert difference < 1e-3 if is_exact else difference > 0.05


def test_constant_encoder_channels_are_chosen_where_the_encoder_reflects(measured):
    network, _, found = measured
    names = convs(network.config)
    selection = select_channels(conv_layers(network.config, 512), found.layers, None, 1, "reflect")
    assert 6 in selection.cuts[names[2]] and selection.folded[names[2]] == 1


@pytest.mark.parametrize(("cuts", "constants", "needed"), [
    ({"decoder.layers.0.28": [0]}, {}, "decoder.layers.0.28"),
    ({"encoder.layers.0.1": [0]}, {}, "encoder.layers.0.1"),
    ({"decoder.layers.0.1": [6]}, {}, "channel 6: decoder.layers.0.1 has 6 channels"),
    ({"decoder.layers.0.1": [-1]}, {}, "channel -1"),
    ({"encoder.layers.0.0": [1, 1]}, {}, "channel 1"),
    ({"encoder.layers.0.0": range(6)}, {}, "at most 5"),
    ({"decoder.layers.0.1": [2]}, {"decoder.layers.0.1": {3: 1.0}}, "channel 3 of decoder.layers.0.1"),
    ({}, {"decoder.layers.0.1": {3: 1.0}}, "channel 3 of decoder.layers.0.1"),
])
def test_impossible_cuts_are_refused(cuts, constants, needed):
    assert needed in user_error(cut_channels, small_network(), cuts, constants)


def test_cut_bottleneck_is_a_cut_of_that_conv():
    network = small_network("vgg16")
    desired = cut_channels(network, {BOTTLENECK["vgg16"]: (channel for channel in (4, 2))})
    for name, tensor in cut_bottleneck(network, [2, 4]).state_dict().items():
        assert_close(tensor, desired.state_dict()[name], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- measurement


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[StyleTransferNetwork, PruneConfig, Responses]:
    """A network with planted channels, measured on 3 photographs and 2 paintings."""
    network = small_network(width=8)
    names = convs(network.config)
    plant(network, {names[0]: [1], names[4]: [2, 3], names[8]: [5], names[9]: [0], names[15]: [7]}, -0.5)
    plant(network, {names[2]: [6], names[8]: [4], names[11]: [1], names[16]: [2]}, 0.75)
    paint_within_range(network)
    config = replace(make_folders(tmp_path_factory.mktemp("pictures")), prune_layers="all")
    return network, config, measure_responses(network, config, find_folders(config))


@torch.inference_mode()
def test_every_layer_is_measured(measured):
    """Against layers run by hand: the encoder over all pictures, the decoder over content i with style i."""
    network, _, actual = measured
    pictures = [normalize(prepare_picture(path, 32, 32)) for path in actual.paths]
    by_conv = {name: [] for name in convs(network.config)}

    def run(block: str, layers, feature):
        for index, layer in enumerate(layers):
            feature = layer(feature)
            if isinstance(layer, torch.nn.ReLU):
                by_conv[f"{block}.layers.0.{index - 1}"].append(feature.clone())
        return feature

    features = [run("encoder", network.encoder.layers[0], picture) for picture in pictures]
    aligned = [adain(features[content], *channel_statistics(features[3 + style]))
               for content, style in ((0, 0), (1, 1), (2, 0))]
    for feature in aligned:
        run("decoder", network.decoder.layers[0], feature)
    assert list(actual.layers) == convs(network.config)
    for name, found in actual.layers.items():
        stacked = torch.cat(by_conv[name])  # (n, C, H, W)
        desired = stacked.square().sum(dim=(2, 3)).sqrt()
        assert found.l2.shape == ((5 if name.startswith("encoder") else 3), 8)
        assert_close(torch.from_numpy(found.l2), desired, rtol=1e-3, atol=1e-4)
        assert_close(torch.from_numpy(found.largest), stacked.amax(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
        assert_close(torch.from_numpy(found.smallest), stacked.amin(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
        mean = torch.cat(aligned) if name == BOTTLENECK["vgg19"] else stacked
        assert_close(torch.from_numpy(found.mean), mean.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(actual.layers[BOTTLENECK["vgg19"]].l2, actual.l2)
    assert not any(module._forward_hooks for module in network.modules())


def test_planted_channels_are_found(measured):
    network, _, found = measured
    layers = found.layers
    names = convs(network.config)
    for number, channels in {0: [1], 4: [2, 3], 8: [5], 9: [0], 15: [7]}.items():
        assert set(channels) <= set(layers[names[number]].off)
        assert (layers[names[number]].importance[channels] == 0).all()
    for number, channel in {2: 6, 8: 4, 11: 1, 16: 2}.items():
        assert layers[names[number]].constant.tolist() == [channel]


def test_measuring_the_bottleneck_alone_gives_the_same_bottleneck(measured):
    network, config, found = measured
    actual = measure_responses(network, replace(config, prune_layers="bottleneck"), find_folders(config))
    assert actual.layers == {} and actual.paths == found.paths
    np.testing.assert_array_equal(actual.l2, found.l2)


def test_more_styles_than_contents_start_the_contents_over(measured, tmp_path):
    network, _, _ = measured
    config = replace(make_folders(tmp_path, contents=1, styles=3), prune_layers="all")
    found = measure_responses(network, config, find_folders(config)).layers
    assert len(found["encoder.layers.0.0"].l2) == 4 and len(found["decoder.layers.0.25"].l2) == 3


def test_importance_is_the_squared_change_of_the_output(monkeypatch):
    """Against cutting: where the output is linear in a channel, the first order is all of it.

    The last hidden layer of the decoder feeds the output conv directly, so replacing its channel by the mean
    changes the output by exactly what the importance estimates.
    """
    monkeypatch.setattr(responses_module, "IMPORTANCE_PROBES", 600)
    network = small_network("vgg16", width=4)
    content, style = random_picture(0, (16, 16)), random_picture(1, (16, 16))
    name = convs(network.config)[-1]
    means = {each: torch.full((4,), 0.3) for each in convs(network.config)}
    actual = responses_module._estimate_importance(network, [(content, style)] * 600, means, 1.0)[name]
    with torch.no_grad():
        before = network(normalize(content), normalize(style))
        for channel in range(4):
            cut = cut_channels(network, {name: [channel]}, {name: {channel: 0.3}})
            desired = (cut(normalize(content), normalize(style)) - before).square().sum()
            assert_close(actual[channel], desired, rtol=0.25, atol=1e-3)  # 600 draws: 6% standard deviation


def test_measuring_twice_gives_the_same(measured):
    network, config, found = measured
    again = measure_responses(network, config, find_folders(config))
    for name in found.layers:
        np.testing.assert_array_equal(again.layers[name].importance, found.layers[name].importance)


def test_layers_survive_the_file(measured, tmp_path):
    network, _, found = measured
    found.save(tmp_path / "responses.npz")
    actual = Responses.load(tmp_path / "responses.npz", width=8)
    actual.check_layers("x", conv_layers(network.config, 0)[:-1])
    for name, layer in found.layers.items():
        for key, desired in vars(layer).items():
            np.testing.assert_array_equal(getattr(actual.layers[name], key), desired)


def test_a_file_without_the_layers_is_refused(measured):
    network, _, found = measured
    layers = conv_layers(network.config, 0)[:-1]
    message = user_error(replace(found, layers={}).check_layers, "some.npz", layers)
    assert "--responses some.npz" in message and "--prune_layers all" in message
    some = {name: layer for name, layer in found.layers.items() if name != "decoder.layers.0.5"}
    assert "decoder.layers.0.5" in user_error(replace(found, layers=some).check_layers, "some.npz", layers)
    other = conv_layers(network.config.with_widths([8, 8, 5, *[8] * 14, 3]), 0)[:-1]
    assert "5 channels" in user_error(found.check_layers, "some.npz", other)


# ------------------------------------------------------------------------------------------------- choice


def test_off_and_constant_channels_are_cut_exactly(measured):
    network, _, found = measured
    selection = select_channels(conv_layers(network.config, 512), found.layers, None, 1, "zeros")
    names = convs(network.config)
    for number, channel in {8: 4, 11: 1, 16: 2}.items():
        assert channel in selection.cuts[names[number]]
        assert selection.constants[names[number]] == {channel: 0.75} and selection.folded[names[number]] == 1
    assert 6 not in selection.cuts[names[2]] and selection.folded[names[2]] == 0  # constant, but zero-padded
    for name in names:
        assert set(found.layers[name].off) <= set(selection.cuts[name])
        assert len(selection.cuts[name]) == len(found.layers[name].off) + selection.folded[name]
    cut = cut_channels(network, selection.cuts, selection.constants)
    pairs = [tuple(prepare_picture(path, 32, 32) for path in (found.paths[content], found.paths[3 + style]))
             for content, style in ((0, 0), (1, 1), (2, 0))]
    assert largest_pixel_difference(network, cut, pairs, 1.0) < 1e-3


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


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("budget", [1.0, 0.55, 0.3, 0.1])
@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
def test_a_budget_is_met_and_not_needlessly_undercut(backbone, budget, multiple):
    full = NetworkConfig.full(backbone)
    layers, drawn = conv_layers(full, 512), drawn_responses(full)
    macs = most_macs(layers, budget, multiple)
    selection = select_channels(layers, drawn, macs, multiple, "zeros")
    widths = [layer.width - len(selection.cuts.get(layer.name, [])) for layer in layers]
    before, after = count_macs(full, 512), count_macs(full.with_widths(widths), 512)
    assert after <= budget * before
    if budget < 0.6:  # one step saves at most 2% (a channel of 64 in two convs), or 8 times that
        assert after > (budget - 0.02 * multiple) * before
    else:
        assert all(len(selection.cuts[name]) <= len(drawn[name].off) for name in drawn)
    for layer, width in zip(layers[:-1], widths):
        assert width >= least_kept(layer.width) and width % multiple == 0


def test_the_least_important_go_first_and_their_mean_takes_their_place():
    full = NetworkConfig.full()
    layers, drawn = conv_layers(full, 512), drawn_responses(full)
    selection = select_channels(layers, drawn, most_macs(layers, 0.4, 1), 1, "zeros")
    for name, found in drawn.items():
        cut = selection.cuts[name]
        kept = sorted(set(range(len(found.mean))) - set(cut))
        assert found.importance[cut].max() <= found.importance[kept].min()
        assert set(found.off) <= set(cut) and len(cut) > len(found.off)
        assert selection.constants[name] == {channel: 0.5 for channel in cut if channel not in found.off}


def test_of_equally_important_channels_the_one_that_saves_most_goes():
    full = NetworkConfig.full()
    layers = conv_layers(full, 512)
    before = macs_of_widths(layers, list(full.widths))
    equal = {layer.name: LayerResponses(np.ones((1, layer.width)), np.zeros(layer.width), *[np.ones(layer.width)] * 3)
             for layer in layers[:-1]}
    saved = []
    for number in range(len(layers) - 1):
        widths = list(full.widths)
        widths[number] -= 1
        saved.append(before - macs_of_widths(layers, widths))
    selection = select_channels(layers, equal, before - 1, 1, "zeros")
    assert [len(cut) for cut in selection.cuts.values()] == [int(number == np.argmax(saved)) for number in range(17)]


def test_a_layer_that_is_off_keeps_a_channel():
    config = small_config()
    drawn = drawn_responses(config)
    name = "decoder.layers.0.8"
    drawn[name] = LayerResponses(np.zeros((1, 6)), *[np.zeros(6)] * 4)
    selection = select_channels(conv_layers(config, 512), drawn, None, 1, "zeros")
    assert len(selection.cuts[name]) == 5 and selection.off[name] == 6


@pytest.mark.parametrize(("multiple", "desired"), [(1, 5), (2, 6), (4, 8), (8, 8), (16, 10)])
def test_widths_are_rounded_up_by_keeping_the_strongest(multiple, desired):
    config = small_config(width=10)
    largest = np.array([0, 0, 3, 0, 1, 2, 0, 0, 4, 5.0])
    found = LayerResponses(largest[None], 0 * largest, largest, largest / 2, np.array([5, 4, 9, 3, 9, 9, 2, 1, 9, 9.0]))
    drawn = {layer.name: found for layer in conv_layers(config, 0)[:-1]}
    selection = select_channels(conv_layers(config, 512), drawn, None, multiple, "zeros")
    for name in drawn:
        # Off are 7, 6, 3, 1, 0, of rising importance; the most important of them stay.
        assert selection.cuts[name] == [7, 6, 3, 1, 0][: 10 - desired]


@pytest.mark.parametrize(("change", "desired"), [
    ({}, [1]), ({"prune_num": 3}, [1]), ({"prune_num": 4}, [1]), ({"prune_num": 0}, []),
    ({"prune_channels": (4, 0)}, [0]),
])
def test_rounding_in_the_bottleneck_mode(change, desired):
    """Width 5, in fours: 4 channels stay, or all 5; summed responses 6, 0, 2.5, 0, 7."""
    l2 = np.array([[5.0, 0.0, 1.0, 0.0, 2.0], [1.0, 0.0, 1.5, 0.0, 5.0]], np.float32)
    assert choose_channels(PruneConfig(round_to=4, **change), Responses(l2, ["a", "b"], 1)) == desired


def test_a_budget_below_what_is_kept_is_refused():
    layers = conv_layers(NetworkConfig.full(), 512)
    message = user_error(most_macs, layers, 0.005, 1)
    assert "--prune_macs 0.005" in message and "tenth" in message
    least = float(message.rsplit("which is ")[1].split()[0])
    assert most_macs(layers, least, 1) == pytest.approx(least * count_macs(NetworkConfig.full(), 512))
    assert "multiples of 32" in user_error(most_macs, layers, least, 32)


def test_plain_magnitude_takes_the_same_share_of_every_layer():
    config = small_config(width=10)
    layers = conv_layers(config, 512)
    magnitudes = {layer.name: np.array([3.0, 1, 2, 9, 8, 4, 7, 5, 6, 10]) for layer in layers}

    def macs(width: int) -> int:
        return macs_of_widths(layers, [width] * (len(layers) - 1) + [3])

    selection = select_by_magnitude(layers, magnitudes, drawn_responses(config), macs(7), 1)
    assert set(map(tuple, selection.cuts.values())) == {(1, 2, 0)} and not selection.constants
    narrower = select_by_magnitude(layers, magnitudes, drawn_responses(config), macs(7) - 1, 1)
    assert set(map(tuple, narrower.cuts.values())) == {(1, 2, 0, 5)}
    even = select_by_magnitude(layers, magnitudes, drawn_responses(config), macs(7), 4)
    assert set(map(tuple, even.cuts.values())) == {(1, 2, 0, 5, 7, 8)}


# -------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def files(measured, tmp_path_factory) -> dict:
    """The measured network as a model file, and flags that prune all of it."""
    network, config, _ = measured
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "model.pth", network)
    flags = {"--mode": "prune", "--gpu_no": -1, "--load_path": folder / "model.pth", "--imsize": 32, "--cropsize": 32,
             "--content_dir": config.content_dir, "--style_dir": config.style_dir, "--latency_runs": 1,
             "--report_size": 64, "--prune_nums": 0}
    assert main(words(flags | {"--prune_layers": "all", "--save_path": folder / "all"})) == 0
    return {"flags": flags, "all": folder / "all", "model": folder / "model.pth"}


def test_prune_all_end_to_end(files, measured, tmp_path, capsys):
    report = json.loads((files["all"] / "report.json").read_text())
    network, _, found = measured
    pruned, checkpoint = load_network(files["all"])
    rows = report["layers"]
    assert [row["name"] for row in rows] == [layer.name for layer in conv_layers(network.config, 0)]
    assert [row["width_after"] for row in rows] == list(pruned.config.widths)
    for key in ("parameters", "macs"):
        for when in ("before", "after"):
            assert sum(row[f"{key}_{when}"] for row in rows) == report[f"{key}_{when}"]
    assert report["macs_after"] == count_macs(pruned.config, 64) < report["macs_before"]
    assert report["parameters_after"] == count_parameters(pruned)
    off = {name: len(layer.off) for name, layer in found.layers.items()}
    assert {row["name"]: row["channels_off_for_all"] for row in rows[:-1]} == off
    assert sum(row["channels_constant_folded"] or 0 for row in rows) == 3
    assert report["max_pixel_difference"] < 1e-3 and report["compared_pairs"] == 3
    assert report["channels_before"] - report["channels_after"] == len(report["cut_channels"])
    assert checkpoint["pruned_layers"]["encoder.layers.0.0"] == found.layers["encoder.layers.0.0"].off.tolist()
    with Image.open(files["all"] / "widths.png") as picture:
        assert min(picture.size) > 300 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 2
    # Both files make the same picture in test mode.
    outputs = []
    for name in ("model", "all"):
        out = tmp_path / f"{name}.png"
        assert main(words({"--mode": "test", "--gpu_no": -1, "--load_path": files[name], "--content": found.paths[0],
                           "--style": found.paths[3], "--save_path": out})) == 0
        outputs.append(read_pixels(out))
    assert outputs[0].shape == (40, 50, 3) and np.array_equal(*outputs)


def test_a_budget_from_kept_responses(files, tmp_path, capsys):
    kept = files["all"] / "responses.npz"
    flags = files["flags"] | {"--prune_macs": 0.4, "--responses": kept, "--save_path": tmp_path}
    assert main(words(flags)) == 0
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0.2 * report["macs_before"] < report["macs_after"] <= 0.4 * report["macs_before"]
    assert report["prune_layers"] == "all" and report["prune_macs"] == 0.4
    assert "channels of decoder.layers.0.25" in shown.out and "widths.png" in shown.err and "measure" not in shown.err
    # The layers are kept when the file is written again by the mode that does not need them.
    flags = files["flags"] | {"--responses": tmp_path / "responses.npz", "--save_path": tmp_path / "bottleneck"}
    assert main(words(flags)) == 0
    report = json.loads((tmp_path / "bottleneck" / "report.json").read_text())
    narrower = [row["name"] for row in report["layers"] if row["width_after"] < row["width_before"]]
    assert narrower == [BOTTLENECK["vgg19"]]
    assert report["layers"][0]["channels_off_for_all"] is None
    assert Responses.load(tmp_path / "bottleneck" / "responses.npz", 8).layers
    assert "channels of decoder" not in capsys.readouterr().out
    assert not (tmp_path / "bottleneck" / "widths.png").exists()


def test_magnitude_rank_cuts_the_smallest_filters(files, measured, tmp_path):
    flags = files["flags"] | {"--prune_macs": 0.4, "--responses": files["all"] / "responses.npz",
                              "--save_path": tmp_path, "--prune_rank": "magnitude"}
    assert main(words(flags)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prune_rank"] == "magnitude"
    assert 0.2 * report["macs_before"] < report["macs_after"] <= 0.4 * report["macs_before"]
    weight = measured[0].get_submodule(BOTTLENECK["vgg19"]).weight
    smallest = weight.abs().sum(dim=(1, 2, 3)).argsort()[: len(report["cut_channels"])]
    assert report["cut_channels"] == sorted(smallest.tolist())


@pytest.mark.parametrize(("change", "needed"), [
    ({"--prune_macs": 0.5, "--prune_num": 1}, "--prune_num and --prune_macs 0.5"),
    ({"--prune_macs": 0.5, "--prune_channels": 1}, "--prune_channels and --prune_macs 0.5"),
    ({"--prune_layers": "all", "--prune_num": 1}, "--prune_num and --prune_layers all"),
    ({"--prune_rank": "magnitude"}, "--prune_macs"),
    ({"--prune_macs": 0}, "--prune_macs"), ({"--prune_macs": 1.5}, "--prune_macs"),
    ({"--prune_macs": 0.001}, "--prune_macs 0.001"),
    ({"--prune_layers": "encoder"}, "--prune_layers"), ({"--round_to": 0}, "--round_to"),
    ({"--prune_layers": "all", "--responses": "BOTTLENECK"}, "holds the bottleneck only"),
])
def test_refusals(files, tmp_path, capsys, change, needed):
    if "--responses" in change:
        found = Responses.load(files["all"] / "responses.npz", 8)
        replace(found, layers={}).save(tmp_path / "responses.npz")
        change = change | {"--responses": tmp_path / "responses.npz"}
    assert needed in refusal(capsys, *words(files["flags"] | {"--save_path": tmp_path / "out"} | change))
    assert not (tmp_path / "out" / "pruned.pth").exists()

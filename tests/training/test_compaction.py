"""Compacting any layers: costs, epsilon, census and steering by hand; steps and resumed runs by the trainer."""

import argparse
import math
from dataclasses import replace

import pytest
import torch
from helpers import CPU, SMALL_TRAINING, make_trainer, random_batch, read_metrics, small_network, write_model
from torch import nn
from torch.testing import assert_close

import loss as losses
from data import normalize
from network import NetworkConfig, StyleTransferNetwork, adain, channel_statistics, conv_layers, count_macs, least_kept
from settings import epsilon
from train import train
from training.compaction import ChannelCensus, CompactLosses, NetworkCost, TargetSteering, selected_convs
from utils import save_checkpoint
from weights import load_network

FULL = NetworkConfig.full()
ODD = NetworkConfig("vgg19", "max", (5, 7, 3, 11, 13, 2, 9, 4, 17), (6, 1, 8, 15, 10, 12, 14, 19, 3))
FACTORS = [9 * layer.positions for layer in conv_layers(FULL, 64)]  # multiply-adds a pair of channels


def macs_of(config: NetworkConfig) -> float:
    return count_macs(config, 64) / count_macs(FULL, 64)


def test_cost_of_channels_on_is_that_of_the_network_cut_to_them():
    """ODD's widths as the channels that are on in the full network, in each selection of layers."""
    encoder_cut = NetworkConfig("vgg19", "max", ODD.encoder_widths, FULL.decoder_widths)
    decoder_cut = NetworkConfig("vgg19", "max", FULL.encoder_widths, ODD.decoder_widths)
    bottleneck_cut = NetworkConfig("vgg19", "max", (*FULL.encoder_widths[:-1], 100), FULL.decoder_widths)
    for layers, cut in (("all", ODD), ("encoder", encoder_cut), ("decoder", decoder_cut),
                        ("bottleneck", bottleneck_cut)):
        selected = selected_convs(FULL, layers)
        for network in (FULL, cut):
            cost = NetworkCost(FULL, layers, CPU)(torch.tensor(network.widths[selected]))
            assert cost.item() == pytest.approx(macs_of(network), rel=1e-5)
        assert NetworkCost(ODD, layers, CPU)(torch.tensor(ODD.widths[selected])).item() == pytest.approx(
            macs_of(ODD), rel=1e-5)


def test_gradient_goes_to_the_channels_that_cost_most():
    """By hand: the derivative by a layer's channels is factor * (channels before) + factor * (channels after)."""
    assert (least_kept(11), least_kept(64)) == (2, 7)  # as many of each layer are spared
    norms = [torch.ones(2, width, requires_grad=True) for width in FULL.widths[:-1]]
    compact = CompactLosses(FULL, "all", "macs", 1.0, CPU)
    compact.channel_loss(compact.spared(norms)).backward()
    widths = [3, *(0.5 * width for width in (*FULL.encoder_widths, *FULL.decoder_widths[:-1])), 3]  # l0 is 1/2
    for layer, (norm, width) in enumerate(zip(norms, FULL.widths), 1):
        by_channel = FACTORS[layer - 1] * widths[layer - 1] + FACTORS[layer] * widths[layer + 1]
        desired = by_channel / count_macs(FULL, 64) * 0.25 / 2  # dl0/dnorm = eps / (norm + eps)^2, mean of 2 rows
        gradient = norm.grad[:, (norm.grad != 0).all(dim=0)]  # of the channels that are not spared
        assert_close(gradient, torch.full((2, width - least_kept(width)), desired), rtol=1e-4, atol=0)


def test_losses_of_several_layers_by_hand():
    """Widths 6; eps 1. Encoder: 54 channels, l0 1/2 in one picture, 0 in the other; decoder: 48, 3/4 in both."""
    config = small_network().config
    norms = [torch.tensor([[1.0], [0.0]]).expand(2, 6)] * 9 + [torch.full((2, 6), 3.0)] * 8
    compact = CompactLosses(config, "all", "count", 1.0, CPU)
    assert_close(compact.channel_loss(norms), torch.tensor((54 * 0.25 + 48 * 0.75) / 102))
    assert_close(compact.xor_loss(norms), torch.tensor(54 * 0.5 / 102))
    macs = CompactLosses(config, "all", "macs", 1.0, CPU).channel_loss(norms)
    widths = [3, *[1.5] * 9, *[4.5] * 8, 3]
    pairs = [width_in * width for width_in, width in zip(widths, widths[1:])]
    desired = sum(factor * pair for factor, pair in zip(FACTORS, pairs))
    assert_close(macs, torch.tensor(desired / count_macs(FULL, 64)), rtol=1e-5, atol=0)


def test_epsilon_of_the_command_line():
    assert (epsilon("1e-5"), epsilon("relative:0.01")) == (1e-5, "relative:0.01")
    for bad in ("relative:", "relative:0", "share:0.1", "relative:-1", "0", "inf", "nan", "relative:1:2"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got {bad}, a number above 0 or relative:NUMBER is"):
            epsilon(bad)


def test_relative_epsilon_by_hand():
    """Layers of 2, 1 and 2 channels with mean norms 5, 40 and 0; the last keeps the paper's epsilon."""
    norm = torch.tensor([[2.0, 4.0, 30.0, 0.0, 0.0], [6.0, 8.0, 50.0, 0.0, 0.0]], requires_grad=True)
    relative, fixed = (CompactLosses(ODD, "all", "count", eps, CPU) for eps in ("relative:0.1", 0.1))
    actual = torch.stack([relative.epsilon_of(layer) for layer in norm.split((2, 1, 2), dim=1)])
    assert_close(actual, torch.tensor([0.5, 4.0, 1e-5]))
    assert not actual.requires_grad and fixed.epsilon_of(norm) == 0.1


def test_relative_epsilon_does_not_see_the_scale_of_a_layer():
    config, generator = small_network().config, torch.Generator().manual_seed(0)
    norms = [torch.rand(4 if layer < 9 else 2, 6, generator=generator) for layer in range(17)]
    scaled = [norm * (1.0 + layer) for layer, norm in enumerate(norms)]
    for cost in ("count", "macs"):
        compact = CompactLosses(config, "all", cost, "relative:0.1", CPU)
        assert_close(compact.channel_loss(scaled), compact.channel_loss(norms))
        assert_close(compact.xor_loss(scaled), compact.xor_loss(norms))


def test_census_counts_channels_that_were_on_lately():
    census = ChannelCensus(ODD, "bottleneck", 2, CPU)
    norm = torch.ones(4, 17)
    census.add([norm])
    assert census.widths().tolist() == [17.0]
    norm[:, :5] = 0.0
    norm[1:, 5:8] = 0.0  # on for one picture: on
    census.add([norm])
    assert census.widths().tolist() == [17.0]  # all were on in the batch before
    census.add([norm])
    assert census.widths().tolist() == [12.0]
    cut = NetworkConfig("vgg19", "max", (*ODD.encoder_widths[:-1], 12), ODD.decoder_widths)
    assert census.macs().item() == pytest.approx(macs_of(cut), rel=1e-5)
    census.add([torch.ones(4, 17)])
    assert census.widths().tolist() == [17.0]


def steering() -> TargetSteering:
    return TargetSteering(weight=10.0, start=torch.tensor(1.0), target=0.5, max_iter=1000)


def test_steering_follows_its_schedule():
    """After 6 of 1,000 iterations the schedule is at 1 - 0.5 * 6 / 600 = 0.995; after 600 and later at 0.5."""
    on_schedule = steering()
    for iteration in range(1, 1001):
        weight = on_schedule.update(torch.tensor(1.0 - 0.5 * min(iteration / 600, 1.0)), iteration)
        assert weight.item() == pytest.approx(10.0, rel=1e-3)
    above, below = steering(), steering()
    for iteration in range(1, 7):
        high, low = (each.update(torch.tensor(macs), iteration) for each, macs in ((above, 1.0), (below, 0.985)))
    distances = [0.5 * iteration / 600 for iteration in range(1, 7)]
    gain, damping = TargetSteering.GAIN / 1000, TargetSteering.DAMPING
    assert high.item() == pytest.approx(10.0 * math.exp(gain * sum(distances) + damping * 0.005), rel=1e-3)
    change = gain * sum(each - 0.015 for each in distances) - damping * 0.01
    assert low.item() == pytest.approx(10.0 * math.exp(change), rel=1e-3)
    assert low < 10.0 < high


def test_steered_weight_stays_in_its_range_and_comes_back():
    held = steering()
    for iteration in range(1, 10_001):
        weight = held.update(torch.tensor(1.0), iteration)
    assert weight.item() == pytest.approx(10.0 * TargetSteering.RANGE, rel=1e-3)
    assert held.update(torch.tensor(0.0), iteration) < weight


def run_layers(part: nn.Module, image: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The output of every ReLU, and the last layer's, layer by layer."""
    features = []
    for layer in part.layers[0]:
        image = torch.relu(image) if isinstance(layer, nn.ReLU) else layer(image)
        features += [image] if isinstance(layer, nn.ReLU) else []
    return features, image


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
def test_step_over_several_layers_matches_the_definition(backbone):
    """Terms and gradients against features taken from the plain layers, picture batch by picture batch."""
    settings = dict(compact_layers="all", l0_eps=1.0, xor_loss_weight=5.0, style_loss_weight=0.0,
                    uncorrelation_loss_weight=0.0, backbone=backbone)
    trainer, plain = make_trainer(small_network(backbone), dtype=torch.float64, **settings), small_network(backbone)
    plain = plain.double()
    content, style = (normalize(pictures).double() for pictures in random_batch())
    terms, *_ = trainer.forward_pass(content, style, all_terms=False)
    (terms["channel"] + terms["xor"]).backward()

    content, style = (run_layers(plain.encoder, pictures)[0] for pictures in (content, style))
    decoder, _ = run_layers(plain.decoder, adain(content[-1], *channel_statistics(style[-1])))
    features = [torch.cat(pair) for pair in zip(content, style)] + decoder
    norms = [losses.channel_norm(feature) for feature in features]
    for norm in norms:  # the strongest of the 6 channels is spared
        strongest = norm.detach().mean(dim=0).argmax()
        norm.register_hook(lambda gradient, channel=strongest: gradient * (torch.arange(6) != channel))
    channel = sum(losses.channel_loss(norm, 1.0) for norm in norms) / len(norms)  # layers of equal width
    xor = sum(losses.xor_loss(norm, 1.0) for norm in norms) / len(norms)
    assert_close(terms["channel"], channel, rtol=1e-9, atol=0)
    assert_close(terms["xor"], xor, rtol=1e-9, atol=0)
    (channel + xor).backward()
    for (name, actual), desired in zip(trainer.network.named_parameters(), plain.parameters()):
        if desired.grad is None:  # the last conv, of which nothing is asked
            assert actual.grad is None or not actual.grad.any(), name
        else:
            assert_close(actual.grad, desired.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_layers_of_a_selection_are_the_ones_that_are_compared():
    """Whatever the layers, the bottleneck's metrics are its own."""
    desired = make_trainer(small_network()).step(*random_batch())
    widths = {"encoder": 9, "decoder": 8}
    for layers, count in widths.items():
        trainer = make_trainer(small_network(), compact_layers=layers)
        actual = trainer.step(*random_batch())
        assert len(trainer.census.widths()) == count
        for name in ("nonzero_channels", "channels_off_for_all", "channels_off_for_some"):
            assert torch.equal(actual[name], desired[name]), (layers, name)


def test_bottleneck_run_of_any_widths_goes_on_with_more_layers(tmp_path):
    """Cut in every layer, to one channel in the bottleneck: it keeps its widths. Also a file whose sums have no names
    yet, as older runs wrote them."""
    torch.manual_seed(0)
    config = replace(ODD, encoder_widths=(*ODD.encoder_widths[:-1], 1))
    start = write_model(tmp_path / "start.pth", StyleTransferNetwork(config))
    train(SMALL_TRAINING | {"load_path": str(start), "save_path": str(tmp_path / "run"), "max_iter": 2})
    path = tmp_path / "run" / "check_point.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["metric_sums"]["names"]
    for name in ("compact_layers", "compact_cost", "target_macs"):  # newer
        del checkpoint["train_config"][name]
    save_checkpoint(checkpoint, path)
    train({"save_path": str(tmp_path / "run"), "resume": True, "max_iter": 4, "compact_layers": "all",
           "target_macs": 0.001})
    rows = read_metrics(tmp_path / "run")
    assert "macs" not in rows[1] and "layer_widths" not in rows[1]
    assert rows[3]["macs"] > 0 and len(rows[3]["layer_widths"]) == 17
    network, before = load_network(path)[0], load_network(start)[0]
    assert network.config == config
    assert any(not torch.equal(*pair) for pair in zip(network.parameters(), before.parameters()))

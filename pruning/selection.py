"""Which channels go: those that do nothing, those that are asked for, the least important down to a budget."""

import math
from dataclasses import replace

import numpy as np

from network import ConvLayer, NetworkConfig, StyleTransferNetwork, bottleneck_conv, conv_layers, least_kept
from pruning.responses import LayerResponses, Responses
from utils import UserError

FRACTION_STEPS = 1000  # fractions of the channels that magnitude pruning tries

Widths = dict[str, int]  # by conv, in forward order
Cuts = dict[str, list[int]]  # channels by conv, in the order in which they go
Constants = dict[str, dict[int, float]]  # what takes the place of cut channels, as `surgery.cut_channels` takes it


def select(network: StyleTransferNetwork, responses: Responses, config) -> tuple[Cuts, Constants]:
    """What the config asks for: channels of every layer, or of the bottleneck alone."""
    if not config.every_layer:
        return {bottleneck_conv(network.config): select_in_bottleneck(responses, config)}, {}
    if config.prune_rank == "magnitude":
        return select_by_magnitude(network, config), {}
    return select_channels(network.config, responses.layers, config)


def rounded_width(width: int, before: int, multiple: int) -> int:
    """The next multiple of `multiple` that is at least `width`; `before` where that would be more."""
    return min(math.ceil(width / multiple) * multiple, before)


def select_in_bottleneck(responses: Responses, config) -> list[int]:
    """The bottleneck channels to cut, weakest first: those named, the N weakest, or those that are off for every
    picture; the strongest are spared to leave a multiple of `round_to`. Raises UserError when nothing would be left."""
    width = responses.l2.shape[1]
    if config.prune_channels is not None:
        channels = config.prune_channels
    elif config.prune_num is not None:
        channels = responses.weakest_first[: config.prune_num]
    else:
        channels = responses.off_for_all
        if len(channels) == width:
            raise UserError(f"all {width} bottleneck channels are zero for every measured picture: nothing would be "
                            "left; train with a smaller channel_loss_weight or l0_eps")
    number = width - rounded_width(width - len(channels), width, config.round_to)
    return [channel for channel in responses.weakest_first.tolist() if channel in channels][:number]


def least_widths(layers: list[ConvLayer], multiple: int) -> Widths:
    """The widths that a budget never goes below; the picture keeps its three colours."""
    return {layer.name: layer.width if layer.kind == "output"
            else rounded_width(least_kept(layer.width), layer.width, multiple) for layer in layers}


def macs_of_widths(layers: list[ConvLayer], widths: Widths) -> int:
    """The multiply-adds of these layers with other widths."""
    return sum(replace(layer, width_in=width_in, width=width).macs
               for layer, width_in, width in zip(layers, (layers[0].width_in, *widths.values()), widths.values()))


def most_macs(network: NetworkConfig, config) -> float:
    """The multiply-adds that `prune_macs` allows, infinite without it. Raises UserError when no cut would meet it."""
    if config.prune_macs is None:
        return math.inf
    layers = conv_layers(network, config.report_size)
    before = sum(layer.macs for layer in layers)
    least = macs_of_widths(layers, least_widths(layers, config.round_to))
    if least > config.prune_macs * before:
        raise UserError(f"prune_macs {config.prune_macs}: a tenth of every layer's channels is kept, in multiples of "
                        f"{config.round_to}, which is {math.ceil(1e4 * least / before) / 1e4} of the multiply-adds")
    return config.prune_macs * before


def select_channels(network: NetworkConfig, responses: dict[str, LayerResponses], config) -> tuple[Cuts, Constants]:
    """The channels to cut from every conv but the last.

    First those go that are off, and those that are constant, but for those of an encoder that pads with zeros, before
    the bottleneck (see `surgery.cut_channels`): both exactly, for everything measured. With `prune_macs`, the least
    important others follow until the multiply-adds are at or below it, and their mean takes their place, in any
    encoder: it comes nearer to them than nothing would. Each layer keeps at least one channel. Widths are multiples of
    `round_to` where the width before is not less: of the channels that would go, the most important stay.
    """
    layers, multiple = conv_layers(network, config.report_size), config.round_to
    kinds = {}  # of every channel: what goes first is the least
    for layer in layers[:-1]:
        kinds[layer.name] = kind = np.zeros(layer.width, int)
        if layer.kind != "encoder" or network.padding == "reflect":
            kind[responses[layer.name].constant] = -1
        kind[responses[layer.name].off] = -2
    widths, orders, importance = {layer.name: layer.width for layer in layers}, {}, {}
    for group in cut_together(network):
        found = [responses[name] for name in group]
        kind, lost = np.max([kinds[name] for name in group], axis=0), sum(each.importance for each in found)
        l2 = sum(each.l2.sum(axis=0, dtype=np.float64) for each in found)
        order = np.lexsort((l2, lost, kind))
        orders |= dict.fromkeys(group, order)
        importance[group] = lost[order]
        widths |= dict.fromkeys(group, rounded_width(max(1, np.count_nonzero(kind == 0)), len(kind), multiple))
    widths = _cut_to_budget(layers, widths, importance, most_macs(network, config), multiple)
    cuts, constants = {}, {}
    for name, kind in kinds.items():
        cuts[name] = channels = orders[name][: len(kind) - widths[name]].tolist()
        values = np.where(kind == -1, responses[name].largest, responses[name].mean)
        constants[name] = {channel: float(values[channel]) for channel in channels if values[channel]}
    return cuts, constants


def cut_together(network: NetworkConfig) -> list[tuple[str, ...]]:
    """The convs but the last, in forward order, grouped where features are added, so that the same channels go."""
    names = [layer.name for layer in conv_layers(network, size=0)[:-1]]
    added = {names[first]: names[second] for first, second in network.added_convs}
    return [(name, added[name]) if name in added else (name,) for name in names if name not in added.values()]


def select_by_magnitude(network: StyleTransferNetwork, config) -> Cuts:
    """Plain magnitude pruning, to compare with: each layer keeps the same fraction of its channels, the largest that
    meets `prune_macs`, those with the largest l1 norms of their filters (Li et al., arXiv 1608.08710, sec. 3.1)."""
    layers, multiple = conv_layers(network.config, config.report_size), config.round_to
    least, most = least_widths(layers, multiple), most_macs(network.config, config)
    for kept in range(FRACTION_STEPS, -1, -1):
        widths = {layer.name: max(least[layer.name], layer.width * kept // FRACTION_STEPS // multiple * multiple)
                  for layer in layers}
        if macs_of_widths(layers, widths) <= most:
            break
    cuts = {}
    for group in cut_together(network.config):
        norms = sum(network.get_submodule(name).weight.detach().abs().sum(dim=(1, 2, 3)) for name in group)
        cuts |= dict.fromkeys(group, norms.argsort(stable=True)[: len(norms) - widths[group[0]]].tolist())
    return cuts


def _cut_to_budget(layers: list[ConvLayer], widths: Widths, importance: dict[tuple[str, ...], np.ndarray], macs: float,
                   multiple: int) -> Widths:
    """The widths after cutting on, step by step, until the multiply-adds are at most `macs`.

    importance: by group of `cut_together`, of its channels in the order in which they go. Each step narrows the group
    that loses the least importance for the multiply-adds that it saves, in its own convs and in the next ones, to the
    next multiple of `multiple`.
    """
    least, total = least_widths(layers, multiple), macs_of_widths(layers, widths)
    while total > macs:
        steps = []
        for group, lost in importance.items():
            width, narrower = widths[group[0]], (widths[group[0]] - 1) // multiple * multiple
            if narrower >= least[group[0]]:
                after = widths | dict.fromkeys(group, narrower)
                saved = total - macs_of_widths(layers, after)
                steps.append((lost[len(lost) - width : len(lost) - narrower].sum() / saved, after, saved))
        _, widths, saved = min(steps, key=lambda step: step[0])
        total -= saved
    return widths

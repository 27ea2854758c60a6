"""Which channels go, in all layers: those that do nothing, then the least important, to a multiply-add budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from network import ConvLayer, least_kept
from pruning.responses import LayerResponses
from utils import UserError

SHARE_STEPS = 1000  # shares of the channels that magnitude pruning tries


@dataclass(frozen=True)
class Selection:
    """What is cut from each conv, by name, the channels in the order in which they go.

    constants: the values that take the place of cut channels, as `surgery.cut_channels` takes them.
    off, folded: how many channels of each conv are off, and how many constant ones the next conv's bias replaces.
    """

    cuts: dict[str, list[int]]
    constants: dict[str, dict[int, float]]
    off: dict[str, int]
    folded: dict[str, int]


def rounded_width(width: int, before: int, multiple: int) -> int:
    """The next multiple of `multiple` that is at least `width`; `before` where that would be more."""
    return min(math.ceil(width / multiple) * multiple, before)


def least_widths(layers: list[ConvLayer], multiple: int) -> list[int]:
    """The widths that a budget never goes below; the picture keeps its three colours."""
    return [layer.width if layer.kind == "output" else rounded_width(least_kept(layer.width), layer.width, multiple)
            for layer in layers]


def macs_of_widths(layers: list[ConvLayer], widths: list[int]) -> int:
    """`count_macs` of the network of `layers` cut to `widths`."""
    widths_in = [layers[0].width_in, *widths[:-1]]
    return sum(9 * layer.positions * width_in * width for layer, width_in, width in zip(layers, widths_in, widths))


def most_macs(layers: list[ConvLayer], prune_macs: float, multiple: int) -> float:
    """The budget in multiply-adds of `--prune_macs`. Raises UserError when no cut would meet it."""
    before = sum(layer.macs for layer in layers)
    least = macs_of_widths(layers, least_widths(layers, multiple))
    if least > prune_macs * before:
        rounding = f" in multiples of {multiple}" if multiple > 1 else ""
        raise UserError(f"--prune_macs {prune_macs}: a tenth of every layer's channels is kept{rounding}, which is "
                        f"{math.ceil(1e4 * least / before) / 1e4} of the multiply-adds")
    return prune_macs * before


def select_channels(
    layers: list[ConvLayer], responses: Mapping[str, LayerResponses], macs: float | None, multiple: int, padding: str
) -> Selection:
    """The channels to cut from every conv but the last. padding: of the network's encoder.

    First those go that are off, and those that are constant, but for those of an encoder that pads with zeros, before
    the bottleneck (see `surgery.cut_channels`): both exactly, for everything measured. With `macs`, the least important
    others follow until the multiply-adds are at or below it, and their mean takes their place, in any encoder: it comes
    nearer to them than nothing would. Each layer keeps at least one channel. Widths are multiples of `multiple`
    where the width before is not less: of the channels that would go, the most important stay.
    """
    orders, widths = [], []
    for layer in layers[:-1]:
        found = responses[layer.name]
        off, constant = found.off, _foldable(layer, found, padding)
        rank = np.zeros(layer.width, int)  # the kinds go one after the other, each by importance
        rank[off], rank[constant] = -2, -1
        orders.append(np.lexsort((found.l2.sum(axis=0, dtype=np.float64), found.importance, rank)))
        widths.append(rounded_width(max(1, layer.width - len(off) - len(constant)), layer.width, multiple))
    widths.append(layers[-1].width)
    if macs is not None:
        importance = [responses[layer.name].importance[order] for layer, order in zip(layers, orders)]
        widths = _cut_to_budget(layers, widths, importance, macs, multiple)

    cuts, constants, folded = {}, {}, {}
    for layer, order, width in zip(layers, orders, widths):
        found = responses[layer.name]
        constant = _foldable(layer, found, padding)
        values = found.mean.copy()
        values[found.off], values[constant] = 0, found.largest[constant]
        cuts[layer.name] = order[: layer.width - width].tolist()
        constants[layer.name] = {channel: float(values[channel]) for channel in cuts[layer.name] if values[channel]}
        folded[layer.name] = len(set(cuts[layer.name]) & set(constant.tolist()))
    return Selection(cuts, constants, {name: len(responses[name].off) for name in cuts}, folded)


def select_by_magnitude(
    layers: list[ConvLayer], magnitudes: Mapping[str, np.ndarray], responses: Mapping[str, LayerResponses],
    macs: float, multiple: int,
) -> Selection:
    """Plain magnitude pruning, to compare with: each layer keeps the same share of its channels, the largest that
    meets `macs`, those whose filters have the largest l1 norms (Li et al., arXiv 1608.08710, sec. 3.1).

    magnitudes: l1 norms of the filters, by conv, (C,). Nothing takes the place of a cut channel.
    """
    least = least_widths(layers, multiple)
    for kept in range(SHARE_STEPS, -1, -1):
        widths = [max(floor, layer.width * kept // SHARE_STEPS // multiple * multiple)
                  for layer, floor in zip(layers[:-1], least)] + [layers[-1].width]
        if macs_of_widths(layers, widths) <= macs:
            break
    cuts = {layer.name: np.argsort(magnitudes[layer.name], kind="stable")[: layer.width - width].tolist()
            for layer, width in zip(layers[:-1], widths)}
    return Selection(cuts, {}, {name: len(responses[name].off) for name in cuts}, dict.fromkeys(cuts, 0))


def _foldable(layer: ConvLayer, found: LayerResponses, padding: str) -> np.ndarray:
    """Indices of the constant channels that the next conv's bias replaces exactly."""
    return found.constant[:0] if layer.kind == "encoder" and padding == "zeros" else found.constant


def _cut_to_budget(
    layers: list[ConvLayer], widths: list[int], importance: list[np.ndarray], macs: float, multiple: int
) -> list[int]:
    """The widths after cutting on, step by step, until the multiply-adds are at most `macs`.

    importance: of the channels of each layer but the last, in the order in which they go. Each step narrows the
    layer that loses the least importance for the multiply-adds that it saves, in its own conv and in the next one,
    to the next multiple of `multiple`.
    """
    widths, least = list(widths), least_widths(layers, multiple)
    total = macs_of_widths(layers, widths)
    while total > macs:
        steps = []
        for number, (layer, lost) in enumerate(zip(layers, importance)):
            narrower = (widths[number] - 1) // multiple * multiple
            if narrower < least[number]:
                continue
            width_in = widths[number - 1] if number else layer.width_in
            saved = 9 * (widths[number] - narrower) * (
                layer.positions * width_in + layers[number + 1].positions * widths[number + 1])
            cost = lost[layer.width - widths[number] : layer.width - narrower].sum()
            steps.append((cost / saved, number, narrower, saved))
        _, number, narrower, saved = min(steps)
        widths[number] = narrower
        total -= saved
    return widths

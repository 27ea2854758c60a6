"""Compacting a network while it learns: the channel and xor losses over its layers, what is left of it, and the
steering of the channel loss's weight towards a target."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import loss as losses
from network import NetworkConfig, conv_layers, least_kept

# The parts that the channel and xor losses act on; of the encoder, "bottleneck" takes the last layer only.
COMPACT_LAYERS = {"bottleneck": ("encoder",), "encoder": ("encoder",), "decoder": ("decoder",),
                  "all": ("encoder", "decoder")}
COMPACT_COSTS = ("count", "macs")
RELATIVE = "relative:"


def l0_epsilon(text: str) -> float | str:
    """The value of `--l0_eps`: a number as such, `relative:NUMBER` as the text it is."""
    try:
        value = float(text.removeprefix(RELATIVE))
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, a number above 0 or relative:NUMBER is needed")
    return text if text.startswith(RELATIVE) else value


def selected_widths(network: NetworkConfig, layers: str) -> dict[str, tuple[int, ...]]:
    """The widths of the layers in a selection of COMPACT_LAYERS, by part, in forward order, without RGB."""
    widths = {"encoder": network.encoder_widths, "decoder": network.decoder_widths[:-1]}
    first = -1 if layers == "bottleneck" else 0
    return {part: widths[part][first:] for part in COMPACT_LAYERS[layers]}


class NetworkCost:
    """The multiply-adds of a network that has some channels off, as a fraction of those of `NetworkConfig.full`: a sum
    over the convs of factor x channels in x channels out."""

    def __init__(self, network: NetworkConfig, device: torch.device | str) -> None:
        full = conv_layers(NetworkConfig.full(network.backbone), size=network.stride)  # fractions have no size
        full_macs = sum(layer.macs for layer in full)
        self.encoder_convs = len(network.encoder_widths)
        self.widths = torch.tensor((3, *network.widths), dtype=torch.float32, device=device)  # (1 + convs,)
        factors = [layer.macs / (layer.width_in * layer.width * full_macs) for layer in full]
        self.factors = torch.tensor(factors, device=device)  # (convs,)

    def __call__(self, channels_on: dict[str, Tensor]) -> Tensor:
        """channels_on: by part, (layers,), in its last layers, for the decoder the last before RGB; all others are on.
        Differentiable."""
        encoder = channels_on.get("encoder", self.widths[:0])
        decoder = channels_on.get("decoder", self.widths[1 + self.encoder_convs : -1])
        fixed = self.widths[: 1 + self.encoder_convs - len(encoder)]
        widths = torch.cat([fixed, encoder, decoder, self.widths[-1:]])  # (1 + convs,)
        return (self.factors * widths[:-1] * widths[1:]).sum()


class CompactLosses:
    """The channel and xor losses over the selected layers of a network.

    They take `norms`: by part, the `channel_norm` of its selected layers side by side: "encoder": (2B, C), content and
    style together; "decoder": (B, C'). For a gradient, they are to come from `spared`.
    """

    def __init__(self, network: NetworkConfig, layers: str, cost: str, l0_eps: float | str, device: torch.device):
        self.widths = selected_widths(network, layers)
        self.epsilon = float(str(l0_eps).removeprefix(RELATIVE))
        self.is_relative = isinstance(l0_eps, str)
        self.is_published = layers == "bottleneck"
        self.cost = None if cost == "count" else NetworkCost(network, device)

    def spared(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norms for both losses. Departing from the paper, where other layers than the bottleneck are selected, the
        strongest `least_kept` channels of each get no gradient: with no channel on, the picture would be one colour."""
        if self.is_published:
            return norms
        result = {}
        for part, widths in self.widths.items():
            norm = norms[part].detach()
            is_spared = torch.zeros(norm.shape[1], dtype=torch.bool, device=norm.device)
            for means, of_layer in zip(norm.mean(dim=0).split(widths), is_spared.split(widths)):
                of_layer.scatter_(0, means.topk(least_kept(len(means))).indices, True)
            result[part] = torch.where(is_spared, norm, norms[part])
        return result

    def epsilon_of(self, norm: Tensor, widths: tuple[int, ...]) -> float | Tensor:
        """The epsilon of l0 for norms, (n, C), of layers side by side: a number, or where it is relative to the mean
        norm of each layer, (C,), without a gradient. A layer that is off altogether keeps the paper's."""
        if not self.is_relative:
            return self.epsilon
        means = [layer.mean().expand(layer.shape[1]) for layer in norm.detach().split(widths, dim=1)]
        return (self.epsilon * torch.cat(means)).clamp_min(losses.L0_EPS)

    def channel_loss(self, norms: dict[str, Tensor]) -> Tensor:
        """The share of the selected channels that are on (Kim & Choi, eq. 4), or, departing from the paper, the
        `NetworkCost` of as many in each layer."""
        if self.cost is None:
            return self._mean_over_channels(losses.channel_loss, norms)
        channels_on = {}
        for part, widths in self.widths.items():
            on = losses.l0_norm(norms[part], self.epsilon_of(norms[part], widths)).mean(dim=0)  # (C,)
            channels_on[part] = torch.stack([layer.sum() for layer in on.split(widths)])
        return self.cost(channels_on)

    def xor_loss(self, norms: dict[str, Tensor]) -> Tensor:
        """Kim & Choi, eq. 5, as the mean over all selected channels."""
        return self._mean_over_channels(losses.xor_loss, norms)

    def _mean_over_channels(self, loss: Callable, norms: dict[str, Tensor]) -> Tensor:
        channels = sum(map(sum, self.widths.values()))
        return sum(loss(norms[part], self.epsilon_of(norms[part], widths)) * (sum(widths) / channels)
                   for part, widths in self.widths.items())


class ChannelCensus:
    """Which of the selected channels are still on: with any response in one of the last `memory` batches, since one
    alone has too few pictures."""

    def __init__(self, network: NetworkConfig, layers: str, memory: int, device: torch.device) -> None:
        self.layer_widths, self.memory = selected_widths(network, layers), memory
        self.cost = NetworkCost(network, device)
        # For how many batches each channel has been off, by part, (C,); kept in checkpoints.
        self.batches_off = {part: torch.zeros(sum(each), device=device) for part, each in self.layer_widths.items()}

    def add(self, norms: dict[str, Tensor]) -> None:
        """norms: as in `CompactLosses`."""
        for part, batches_off in self.batches_off.items():
            self.batches_off[part] = (batches_off + 1) * (norms[part] == 0).all(dim=0)

    def widths(self) -> dict[str, Tensor]:
        """The channels on in each layer, by part, (layers,)."""
        is_on = {part: (batches_off < self.memory).float() for part, batches_off in self.batches_off.items()}
        return {part: torch.stack([layer.sum() for layer in is_on[part].split(widths)])
                for part, widths in self.layer_widths.items()}

    def macs(self) -> Tensor:
        """The `NetworkCost` of the channels that are on."""
        return self.cost(self.widths())


class TargetSteering:
    """Steers the channel loss's weight so that a run ends at a fraction of the full network's multiply-adds.

    A schedule goes from the network's fraction at the start down to the target in a straight line, and stays
    there from SCHEDULE_END of the run on. The weight is that at the start times exp(DAMPING x distance to the
    schedule + GAIN x the distances summed up / iterations of the run), within a factor RANGE of its start.
    """

    SCHEDULE_END = 0.6  # the rest of the run is for the pictures
    # Channels answer late, and many at once: the distance itself must count, and a sum over the past little.
    GAIN, DAMPING, RANGE = 300.0, 50.0, 100.0

    def __init__(self, weight: float, start: float, target: float, max_iter: int, device: torch.device) -> None:
        self.weight, self.start, self.target, self.max_iter = weight, start, target, max_iter
        self.log_change = torch.zeros((), device=device)  # kept in checkpoints

    def update(self, macs: Tensor, iteration: int) -> Tensor:
        """The weight for the step of an iteration, counted from 1, a scalar. macs: scalar, the fraction now."""
        progress = min(1.0, iteration / (self.SCHEDULE_END * self.max_iter))
        distance = macs - (self.start + (self.target - self.start) * progress)
        limit = math.log(self.RANGE)
        self.log_change = (self.log_change + self.GAIN / self.max_iter * distance).clamp(-limit, limit)
        return self.weight * (self.DAMPING * distance + self.log_change).clamp(-limit, limit).exp()

"""Compacting a network while it learns: the losses over its layers, what is left of it, and steering to a target."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import loss as losses
from network import NetworkConfig, conv_layers, least_kept

# The parts that the channel and xor losses act on; of the encoder, "bottleneck" takes the last layer only.
COMPACT_LAYERS = {"bottleneck": ("encoder",), "encoder": ("encoder",), "decoder": ("decoder",),
                  "all": ("encoder", "decoder")}
COMPACT_COSTS = ("count", "macs")


def selected_convs(network: NetworkConfig, layers: str) -> slice:
    """Where in `network.widths` a selection of COMPACT_LAYERS is, without RGB."""
    convs = len(network.encoder_widths)
    first = {"bottleneck": convs - 1, "decoder": convs}.get(layers, 0)
    return slice(first, -1 if "decoder" in COMPACT_LAYERS[layers] else convs)


class NetworkCost:
    """The multiply-adds of a network that has some of the selected layers' channels off, as a fraction of those of
    `NetworkConfig.full`: a sum over the convs of factor x channels in x channels out."""

    def __init__(self, network: NetworkConfig, layers: str, device: torch.device) -> None:
        full = conv_layers(NetworkConfig.full(network.backbone), size=network.stride)  # fractions have no size
        full_macs = sum(layer.macs for layer in full)
        self.factors = torch.tensor([9 * layer.positions / full_macs for layer in full], device=device)  # (convs,)
        widths = torch.tensor((3, *network.widths), dtype=torch.float32, device=device)  # (1 + convs,)
        selected = selected_convs(network, layers)
        self.before, self.behind = widths[: 1 + selected.start], widths[1:][selected.stop :]

    def __call__(self, channels_on: Tensor) -> Tensor:
        """channels_on: (layers,), of the selected ones; all others are on. Differentiable."""
        widths = torch.cat([self.before, channels_on, self.behind])  # (1 + convs,)
        return (self.factors * widths[:-1] * widths[1:]).sum()


class CompactLosses:
    """The channel and xor losses over the selected layers of a network.

    They take `norms`: the `channel_norm` of each, in forward order: of the encoder's (2B, C), content and style
    together, of the decoder's (B, C). For a gradient, they are to come from `spared`.
    """

    def __init__(self, network: NetworkConfig, layers: str, cost: str, l0_eps: float | str, device: torch.device):
        self.epsilon = float(str(l0_eps).removeprefix("relative:"))
        self.is_relative = isinstance(l0_eps, str)
        self.is_published = layers == "bottleneck"
        self.channels = sum(network.widths[selected_convs(network, layers)])
        self.cost = None if cost == "count" else NetworkCost(network, layers, device)

    def spared(self, norms: Sequence[Tensor]) -> Sequence[Tensor]:
        """The norms for both losses. Departing from the paper, where other layers than the bottleneck are selected, the
        strongest `least_kept` channels of each get no gradient: with no channel on, the picture would be one colour."""
        if self.is_published:
            return norms
        strongest = [norm.detach().mean(dim=0).topk(least_kept(norm.shape[1])).indices for norm in norms]
        return [norm.index_copy(1, channels, norm.detach()[:, channels]) for norm, channels in zip(norms, strongest)]

    def epsilon_of(self, norm: Tensor) -> float | Tensor:
        """The epsilon of l0 for a layer's norms, (n, C): a number, or where it is relative to their mean, a scalar
        without a gradient. A layer that is off altogether keeps the paper's."""
        return (self.epsilon * norm.detach().mean()).clamp_min(losses.L0_EPS) if self.is_relative else self.epsilon

    def channel_loss(self, norms: Sequence[Tensor]) -> Tensor:
        """The share of the selected channels that are on (Kim & Choi, eq. 4), or, departing from it, what they cost."""
        on = self._by_layer(losses.channel_loss, norms)
        return on.sum() / self.channels if self.cost is None else self.cost(on)

    def xor_loss(self, norms: Sequence[Tensor]) -> Tensor:
        """Kim & Choi, eq. 5, as the mean over all selected channels."""
        return self._by_layer(losses.xor_loss, norms).sum() / self.channels

    def _by_layer(self, loss: Callable, norms: Sequence[Tensor]) -> Tensor:
        """The sum of a loss over the channels of each layer, (layers,)."""
        return torch.stack([norm.shape[1] * loss(norm, self.epsilon_of(norm)) for norm in norms])


class ChannelCensus:
    """Which of the selected channels are on in any of the last `memory` batches: one alone has too few pictures."""

    def __init__(self, network: NetworkConfig, layers: str, memory: int, device: torch.device) -> None:
        self.layer_widths, self.memory = network.widths[selected_convs(network, layers)], memory
        self.cost = NetworkCost(network, layers, device)
        # What the losses leave on: none of the bottleneck where it is selected alone, as published; else see `spared`.
        least = [0 if layers == "bottleneck" else least_kept(width) for width in self.layer_widths]
        self.least_macs = self.cost(torch.tensor(least, device=device))
        # For how many batches each channel has been off, (channels of all layers,); kept in checkpoints.
        self.batches_off = torch.zeros(sum(self.layer_widths), device=device)

    def add(self, norms: Sequence[Tensor]) -> None:
        """norms: as in `CompactLosses`."""
        self.batches_off = (self.batches_off + 1) * torch.cat([(norm == 0).all(dim=0) for norm in norms])

    def widths(self) -> Tensor:
        """The channels on in each layer, (layers,)."""
        is_on = (self.batches_off < self.memory).float()
        return torch.stack([layer.sum() for layer in is_on.split(self.layer_widths)])

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

    def __init__(self, weight: float, start: Tensor, target: float, max_iter: int) -> None:
        """start: scalar, the fraction then, on the device on which it is followed."""
        self.weight, self.start, self.target, self.max_iter = weight, start, target, max_iter
        self.log_change = torch.zeros_like(start)  # kept in checkpoints

    def update(self, macs: Tensor, iteration: int) -> Tensor:
        """The weight for the step of an iteration, counted from 1, a scalar. macs: scalar, the fraction now."""
        progress = min(1.0, iteration / (self.SCHEDULE_END * self.max_iter))
        distance = macs - (self.start + (self.target - self.start) * progress)
        limit = math.log(self.RANGE)
        self.log_change = (self.log_change + self.GAIN / self.max_iter * distance).clamp(-limit, limit)
        return self.weight * (self.DAMPING * distance + self.log_change).clamp(-limit, limit).exp()

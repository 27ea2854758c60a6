"""Compacting a network while it learns: the layers that get smaller, what is left of it, and the steering of the
channel loss's weight towards a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import loss as losses
from network import NetworkConfig, conv_layers, least_kept

# The parts that the channel and xor losses act on; of the encoder, "bottleneck" takes the last layer only.
COMPACT_LAYERS = {
    "bottleneck": ("encoder",),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "all": ("encoder", "decoder"),
}
COMPACT_COSTS = ("count", "macs")


def selected_widths(network: NetworkConfig, layers: str) -> dict[str, tuple[int, ...]]:
    """The widths of the layers in a selection of COMPACT_LAYERS, by part, in forward order. The last of the
    decoder, RGB, is in none."""
    widths = {
        "encoder": network.encoder_widths[-1:] if layers == "bottleneck" else network.encoder_widths,
        "decoder": network.decoder_widths[:-1],
    }
    return {part: widths[part] for part in COMPACT_LAYERS[layers]}


# ------------------------------------------------------------------------------------------------ losses


@dataclass(frozen=True)
class Epsilon:
    """The epsilon of l0: in units of a channel's l2 norm, or as a share of the mean norm in the channel's layer."""

    value: float
    is_relative: bool = False

    @classmethod
    def parse(cls, given: float | str) -> "Epsilon":
        """From 0.01, "0.01" or "relative:0.01". Raises ValueError for anything else."""
        kind, _, number = str(given).rpartition(":")
        value = float(number)
        if kind not in ("", "relative") or not 0.0 < value < math.inf:
            raise ValueError(f"{given} is neither a number above 0 nor relative:NUMBER")
        return cls(value, kind == "relative")

    def of_layers(self, norm: Tensor, widths: tuple[int, ...]) -> float | Tensor:
        """What the channels of layers side by side take: a number, or (C,), alike within a layer, no gradient.

        norm: (n, C), the layers' `channel_norm`, C the sum of widths. A layer that is off altogether has no
        scale, and keeps the paper's epsilon.
        """
        if not self.is_relative:
            return self.value
        means = [layer.mean().expand(layer.shape[1]) for layer in norm.detach().split(widths, dim=1)]
        return (self.value * torch.cat(means)).clamp_min(losses.L0_EPS)


def spare_strongest(norm: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The same norms, without a gradient to the `least_kept` channels of each layer with the largest means, so that
    no layer goes off altogether: the picture would be one colour.

    norm: (n, C), of layers side by side, C the sum of widths.
    """
    with torch.no_grad():
        spared = torch.zeros(norm.shape[1], dtype=torch.bool, device=norm.device)
        for means, of_layer in zip(norm.mean(dim=0).split(widths), spared.split(widths)):
            of_layer.scatter_(0, means.topk(least_kept(len(means))).indices, True)
    return torch.where(spared, norm.detach(), norm)


class NetworkCost:
    """The multiply-adds of a network that has some channels off, as a fraction of the full network's,
    `NetworkConfig.full`: fractions compare between runs, and a pruned network's is below 1.

    A sum over the convs of factor x channels in x channels out.
    """

    def __init__(self, network: NetworkConfig, device: torch.device) -> None:
        full = conv_layers(NetworkConfig.full(network.backbone), size=network.stride)  # fractions have no size
        full_macs = sum(layer.macs for layer in full)
        self.encoder_convs = len(network.encoder_widths)
        self.widths = torch.tensor((3, *network.widths), dtype=torch.float32, device=device)  # (1 + convs,)
        self.factors = torch.tensor([9 * layer.positions / full_macs for layer in full], device=device)  # (convs,)

    def __call__(self, channels_on: dict[str, Tensor]) -> Tensor:
        """channels_on: by part, (layers,), the channels that are on in its last layers, for the decoder the last
        before RGB; the others have theirs all on. Differentiable."""
        encoder = channels_on.get("encoder", self.widths[:0])
        decoder = channels_on.get("decoder", self.widths[1 + self.encoder_convs : -1])
        fixed = self.widths[: 1 + self.encoder_convs - len(encoder)]
        widths = torch.cat([fixed, encoder, decoder, self.widths[-1:]])  # (1 + convs,)
        return (self.factors * widths[:-1] * widths[1:]).sum()


def range_of_macs(network: NetworkConfig, layers: str) -> tuple[float, float]:
    """The multiply-adds without any channel of the selected layers, and with all, as fractions of the full
    network's."""
    cost = NetworkCost(network, torch.device("cpu"))
    none = {part: torch.zeros(len(widths)) for part, widths in selected_widths(network, layers).items()}
    return cost(none).item(), cost({}).item()


class CompactLosses:
    """The channel and xor losses over the selected layers of a network.

    They take `norms`: by part, the `channel_norm` of its selected layers side by side: "encoder": (2B, C),
    content and style together; "decoder": (B, C'). For a gradient, they are to come from `spared`.
    """

    def __init__(
        self, network: NetworkConfig, layers: str, cost: str, epsilon: Epsilon, device: torch.device
    ) -> None:
        self.widths = selected_widths(network, layers)
        self.epsilon = epsilon
        self.spares = layers != "bottleneck"  # the paper's losses spare none
        self.cost = None if cost == "count" else NetworkCost(network, device)

    def spared(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norms for both losses: with other layers than the bottleneck, the strongest channels of each get no
        gradient, see `spare_strongest`."""
        if not self.spares:
            return norms
        return {part: spare_strongest(norms[part], widths) for part, widths in self.widths.items()}

    def channel_loss(self, norms: dict[str, Tensor]) -> Tensor:
        """The share of the selected channels that are on (Kim & Choi, eq. 4, over all of them), or, departing
        from the paper, what the network costs with as many channels on in each layer, see `NetworkCost`."""
        if self.cost is None:
            return self._mean_over_channels(losses.channel_loss, norms)
        channels_on = {}
        for part, widths in self.widths.items():
            on = losses.l0_norm(norms[part], self.epsilon.of_layers(norms[part], widths)).mean(dim=0)  # (C,)
            channels_on[part] = torch.stack([layer.sum() for layer in on.split(widths)])
        return self.cost(channels_on)

    def xor_loss(self, norms: dict[str, Tensor]) -> Tensor:
        """Kim & Choi, eq. 5, as the mean over all selected channels."""
        return self._mean_over_channels(losses.xor_loss, norms)

    def _mean_over_channels(self, loss: Callable, norms: dict[str, Tensor]) -> Tensor:
        channels = sum(map(sum, self.widths.values()))
        return sum(loss(norms[part], self.epsilon.of_layers(norms[part], widths)) * (sum(widths) / channels)
                   for part, widths in self.widths.items())


# ---------------------------------------------------------------------------------------------- progress


class ChannelCensus:
    """Which of the selected channels are still on: those with any response in one of the last `memory` batches.

    One batch alone has too few pictures: a channel that it leaves off is on for others. Everything stays on
    the device.
    """

    def __init__(self, network: NetworkConfig, layers: str, memory: int, device: torch.device) -> None:
        self.part_widths = selected_widths(network, layers)
        self.memory = memory
        self.cost = NetworkCost(network, device)
        self.batches_off = {
            part: torch.zeros(sum(widths), device=device) for part, widths in self.part_widths.items()
        }

    def add(self, norms: dict[str, Tensor]) -> None:
        """norms: as in `CompactLosses`."""
        for part, batches_off in self.batches_off.items():
            is_off = (norms[part] == 0).all(dim=0)  # (C,)
            self.batches_off[part] = (batches_off + 1) * is_off

    def widths(self) -> dict[str, Tensor]:
        """The channels on in each layer, by part, (layers,)."""
        return {
            part: torch.stack([layer.sum() for layer in (self.batches_off[part] < self.memory).float().split(widths)])
            for part, widths in self.part_widths.items()
        }

    def macs(self) -> Tensor:
        """The multiply-adds of the network without the channels that are off, as a fraction of the full one's."""
        return self.cost(self.widths())

    def state(self) -> dict[str, Tensor]:
        return {part: batches_off.cpu() for part, batches_off in self.batches_off.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for part, batches_off in state.items():
            self.batches_off[part].copy_(batches_off)


class TargetSteering:
    """Steers the channel loss's weight so that a run ends at a fraction of the full network's multiply-adds.

    A schedule goes from the network's fraction at the start down to the target in a straight line, and stays
    there from SCHEDULE_END of the run on. The weight is that at the start times exp(DAMPING x distance to the
    schedule + GAIN x the distances summed up / iterations of the run). Sum and exponent are held, so that the
    weight stays within a factor RANGE of its start and comes back soon. Everything stays on the device.
    """

    SCHEDULE_END = 0.6  # the rest of the run is for the pictures
    # Channels answer late, and many at once: the distance itself must count, and a sum over the past little. With
    # 3000 and 20, a trial of 300 iterations went 0.1 below its target.
    GAIN = 300.0
    DAMPING = 50.0
    RANGE = 100.0

    def __init__(self, weight: float, start: float, target: float, max_iter: int, device: torch.device) -> None:
        self.weight, self.start, self.target, self.max_iter = weight, start, target, max_iter
        self.iteration = torch.zeros((), device=device)
        self.log_change = torch.zeros((), device=device)

    def update(self, macs: Tensor) -> Tensor:
        """The weight for the next step, a scalar. macs: scalar, the fraction now."""
        self.iteration = self.iteration + 1
        progress = (self.iteration / (self.SCHEDULE_END * self.max_iter)).clamp(max=1.0)
        distance = macs - (self.start + (self.target - self.start) * progress)
        limit = math.log(self.RANGE)
        self.log_change = (self.log_change + self.GAIN / self.max_iter * distance).clamp(-limit, limit)
        return self.weight * (self.DAMPING * distance + self.log_change).clamp(-limit, limit).exp()

    def state(self) -> dict[str, Tensor]:
        return {"iteration": self.iteration.cpu(), "log_change": self.log_change.cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.iteration.copy_(state["iteration"])
        self.log_change.copy_(state["log_change"])

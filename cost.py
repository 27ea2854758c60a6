"""What a network costs: parameters, multiply-adds, time."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from network import ENCODERS, POOL, NetworkConfig, StyleTransferNetwork
from utils import time_in_turns


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(config: NetworkConfig, size: int) -> int:
    """Multiply-adds of stylising one pair of `size` x `size` pictures (content and style through the encoder,
    one through the decoder), by torch's own FLOP counter; nothing is computed.

    Of the convs as they are defined, so that figures compare with published ones, and as all budgets of multiply-adds
    count them: `upsampled_conv` does the same in fewer, poolings count for none.
    """
    with torch.device("meta"):
        network = StyleTransferNetwork(replace(config, pooling="max"))  # the counter sees none but a blur
        image = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.encoder(image)
        network.decoder.layers[0](network.encoder(image))
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations


def least_kept(width: int) -> int:
    """The channels, of `width`, that compacting several layers leaves in a layer: a tenth, at least one."""
    return math.ceil(0.1 * width)


@dataclass(frozen=True)
class ConvLayer:
    """One conv of a network, and what it costs.

    name: its prefix in the state dict; kind: encoder, bottleneck (the encoder's last), decoder, or output (RGB).
    positions: at which the filters are applied for one pair, content and style in the encoder.
    """

    name: str
    kind: str
    width_in: int
    width: int
    positions: int

    @property
    def parameters(self) -> int:
        return self.width * (9 * self.width_in + 1)

    @property
    def macs(self) -> int:
        """Multiply-adds for one pair, of the layer as it is defined."""
        return 9 * self.width_in * self.width * self.positions


def conv_layers(config: NetworkConfig, size: int) -> list[ConvLayer]:
    """Every conv in forward order, each one's output the input of the next, for pairs of `size` x `size` pictures.

    The multiply-adds add up to `count_macs(config, size)`, without a network being built.
    """
    layout, widths = ENCODERS[config.backbone], iter(config.widths)
    layers, width_in, side, index = [], 3, size, 0
    for entry in layout:  # conv, ReLU; or pooling
        if entry == POOL:
            side, index = side // 2, index + 1
            continue
        kind = "bottleneck" if len(layers) + 1 == len(config.encoder_widths) else "encoder"
        layers.append(ConvLayer(f"encoder.layers.0.{index}", kind, width_in, next(widths), 2 * side * side))
        width_in, index = layers[-1].width, index + 2
    index = 0
    for entry in reversed(layout):  # padding, conv, ReLU; or upsampling
        if entry == POOL:
            side, index = side * 2, index + 1
            continue
        kind = "output" if len(layers) + 1 == len(config.widths) else "decoder"
        layers.append(ConvLayer(f"decoder.layers.0.{index + 1}", kind, width_in, next(widths), side * side))
        width_in, index = layers[-1].width, index + 3
    return layers


def bottleneck_conv(config: NetworkConfig) -> str:
    """The name of the encoder's last conv, whose output channels are the bottleneck."""
    return next(layer.name for layer in conv_layers(config, size=0) if layer.kind == "bottleneck")


def macs_per_channel_pair(backbone: str, size: int) -> tuple[int, ...]:
    """Multiply-adds of every conv, encoder then decoder, for each of its pairs of an input and an output channel:
    filter taps x positions, counted as in `count_macs`. size: a multiple of the stride, pixels."""
    return tuple(9 * layer.positions for layer in conv_layers(NetworkConfig.full(backbone), size))


@torch.inference_mode()
def time_pairs(networks: list[StyleTransferNetwork], size: int, runs: int) -> list[list[float]]:
    """Seconds of stylising one random pair of `size` x `size` pictures, `runs` times, for each network in turns."""
    device = next(networks[0].parameters()).device
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, size, size, generator=generator).to(device) for _ in range(2))
    return time_in_turns([lambda network=network: network(content, style) for network in networks], runs, device)

"""Surgery: a new network without some of the channels of any of its convs."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch

from network import ConvLayer, NetworkConfig, StyleTransferNetwork, bottleneck_conv, conv_layers
from utils import UserError


def cut_channels(network: StyleTransferNetwork, cuts: Mapping[str, Iterable[int]],
                 constants: Mapping[str, Mapping[int, float]] | None = None) -> StyleTransferNetwork:
    """A new network without the given channels of the given convs; `network` stays as it is.

    cuts: channel indices by conv, named as in the state dict without `.weight`. Their filters go, and the next
    conv loses the inputs they fed; AdaIN treats channels one by one, so the bottleneck's others are untouched.
    constants: values after the ReLU, by conv and channel, that take the place of cut channels: the next conv's
    bias gets what they fed it. That equals a constant channel where the next conv pads by reflection: after the
    bottleneck (AdaIN makes of a channel that is the same constant for content and style that constant again), in the
    decoder, and in an encoder that pads by reflection. Zero padding makes it differ along the border.
    Of two convs whose features are added (`NetworkConfig.added_convs`), the same channels go.
    Raises UserError for a conv that is not there or gives the picture, an index that is not there or twice the
    same, or when no channel of a conv would be left.
    """
    layers = conv_layers(network.config, size=0)
    kept = _channels_that_stay(network.config, layers, {name: [*map(int, channels)] for name, channels in cuts.items()})
    cut = StyleTransferNetwork(network.config.with_widths([len(kept[layer.name]) for layer in layers]))
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    constants = constants or {}
    added_to = {layers[second].name: layers[first].name for first, second in network.config.added_convs}
    for layer, following in pairwise(layers):
        indices = torch.tensor(kept[layer.name], device=next(network.parameters()).device)
        for key in (f"{layer.name}.weight", f"{layer.name}.bias"):
            state[key] = state[key][indices]
        weight, bias = f"{following.name}.weight", f"{following.name}.bias"
        for name in (layer.name, added_to.get(layer.name)):
            for channel, value in constants.get(name, {}).items():
                state[bias] += value * state[weight][:, channel].sum(dim=(1, 2))
        state[weight] = state[weight][:, indices]
    cut.to(state[bias].dtype).load_state_dict(state)
    return cut.train(network.training).to(indices.device, memory_format=torch.channels_last)


def cut_bottleneck(network: StyleTransferNetwork, channels: Iterable[int]) -> StyleTransferNetwork:
    """`cut_channels` of the bottleneck, the encoder's last conv."""
    return cut_channels(network, {bottleneck_conv(network.config): channels})


def _channels_that_stay(network: NetworkConfig, layers: list[ConvLayer],
                        cuts: dict[str, list[int]]) -> dict[str, list[int]]:
    """The channels that stay, by conv. Raises UserError for cuts that cannot be made."""
    for name in cuts.keys() - {layer.name for layer in layers if layer.kind != "output"}:
        raise UserError(f"{name}: no conv with channels to cut")
    kept = {}
    for layer in layers:
        channels = cuts.get(layer.name, [])
        place = "the bottleneck" if layer.kind == "bottleneck" else layer.name
        for channel in channels:
            if not 0 <= channel < layer.width:
                raise UserError(f"channel {channel}: {place} has {layer.width} channels, 0 to {layer.width - 1}")
        if len(set(channels)) != len(channels):
            raise UserError(f"channel {max(channels, key=channels.count)} is named more than once")
        if len(channels) >= layer.width:
            raise UserError(f"{len(channels)} channels to cut: {place} has {layer.width}, at most {layer.width - 1} "
                            "can go")
        kept[layer.name] = sorted(set(range(layer.width)) - set(channels))
    for first, second in ([layers[conv].name for conv in pair] for pair in network.added_convs):
        if kept[first] != kept[second]:
            raise UserError(f"{first} and {second}: their features are added; the same channels are to be cut")
    return kept

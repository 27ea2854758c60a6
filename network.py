"""The networks and their configuration: encoder, AdaIN, decoder, the loss network; and what a network costs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import in_full

ADAIN_EPS = 1e-5

POOL = "pool"
# The encoder of each backbone: the width of every conv (each followed by a ReLU), and the poolings between.
ENCODERS = {
    "vgg19": (64, 64, POOL, 128, 128, POOL, 256, 256, 256, 256, POOL, 512),  # to relu4_1
    "vgg16": (64, 64, POOL, 128, 128, POOL, 256, 256, 256),  # to relu3_3
}
# The loss network goes on to the deepest of its taps, which are indices in torchvision's `vgg.features`.
LOSS_NETWORKS = {
    "vgg19": (ENCODERS["vgg19"], (1, 6, 11, 20)),  # relu1_1, relu2_1, relu3_1, relu4_1
    # relu1_2, relu2_2, relu3_3, relu4_3, as the paper has it; the original implementation taps relu2_1.
    "vgg16": ((*ENCODERS["vgg16"], POOL, 512, 512, 512), (3, 8, 15, 22)),
}
BACKBONES = tuple(ENCODERS)
POOLINGS = ("max", "avg", "blur")
UPSAMPLINGS = ("nearest", "bilinear")
PADDINGS = ("zeros", "reflect")


def _conv_widths(layout) -> tuple[int, ...]:
    return tuple(entry for entry in layout if entry != POOL)


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that describes a style-transfer network: a pruned one only has smaller widths.

    backbone, pooling (in the encoder), upsampling (in the decoder), padding (in the encoder, and in the loss network
    that teaches it; the decoder always reflects): one of the choices above, the first is the published one.
    encoder_widths, decoder_widths: output channels of every conv, in forward order. The last encoder width is the
    bottleneck; the last decoder width is 3 (RGB). Raises ValueError where something does not fit.
    """

    backbone: str
    pooling: str
    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    upsampling: str = "nearest"
    padding: str = "zeros"

    def __post_init__(self) -> None:
        for name, choices in (("backbone", BACKBONES), ("pooling", POOLINGS), ("upsampling", UPSAMPLINGS),
                              ("padding", PADDINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(choices)}")
        convs = len(_conv_widths(ENCODERS[self.backbone]))
        for name, widths in (("encoder", self.encoder_widths), ("decoder", self.decoder_widths)):
            if len(widths) != convs or any(not isinstance(width, int) or width < 1 for width in widths):
                raise ValueError(f"{name} widths {list(widths)}: {self.backbone} needs {convs} whole numbers >= 1")
        if self.decoder_widths[-1] != 3:
            raise ValueError(f"the last decoder width is {self.decoder_widths[-1]}, 3 is needed")

    @classmethod
    def full(cls, backbone: str = "vgg19", pooling: str = "max") -> "NetworkConfig":
        """The unpruned network: the backbone's own widths, and the decoder as their mirror image."""
        widths = _conv_widths(ENCODERS[backbone])
        return cls(backbone, pooling, widths, (*reversed(widths[:-1]), 3))

    @classmethod
    def from_dict(cls, values: dict) -> "NetworkConfig":
        """What `to_dict` gave. Older files lack the newer properties, which then are as published."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in dict(values).items()})

    def to_dict(self) -> dict:
        """Plain types, for a checkpoint or a JSON file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of every conv, encoder then decoder, in forward order."""
        return self.encoder_widths + self.decoder_widths

    def with_widths(self, widths: Sequence[int]) -> "NetworkConfig":
        """The same network with other `widths`. Raises ValueError when they do not fit."""
        convs = len(self.encoder_widths)
        return replace(self, encoder_widths=tuple(widths[:convs]), decoder_widths=tuple(widths[convs:]))

    @property
    def bottleneck_width(self) -> int:
        return self.encoder_widths[-1]

    @property
    def stride(self) -> int:
        """Side of the square of pixels that one bottleneck position covers: 8 (vgg19) or 4 (vgg16)."""
        return 2 ** ENCODERS[self.backbone].count(POOL)


class BlurPool2d(nn.Module):
    """Halves the sides behind a low-pass filter, (1 3 3 1)/8 in each direction (Zhang, arXiv 1904.11486):
    (B, C, H, W), H and W even, to (B, C, H/2, W/2). What is too fine for the smaller grid is averaged away."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        filters = (row[:, None] * row).expand(channels, 1, 4, 4).contiguous()
        self.register_buffer("filters", filters, persistent=False)  # files hold what is learned

    def forward(self, feature: Tensor) -> Tensor:
        padded = F.pad(feature, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filters, stride=2, groups=len(self.filters))


def _pooling_layer(pooling: str, channels: int) -> nn.Module:
    if pooling == "blur":
        return BlurPool2d(channels)
    return (nn.MaxPool2d if pooling == "max" else nn.AvgPool2d)(2, 2)


def _encoder_layers(layout, widths: Sequence[int], pooling: str, padding: str) -> nn.Sequential:
    """VGG layers numbered as in torchvision's `vgg.features`: conv, ReLU, ..., pooling."""
    layers, width_in, remaining = [], 3, iter(widths)
    for entry in layout:
        if entry == POOL:
            layers.append(_pooling_layer(pooling, width_in))
        else:
            width = next(remaining)
            layers += [nn.Conv2d(width_in, width, 3, padding=1, padding_mode=padding), nn.ReLU(inplace=True)]
            width_in = width
    return nn.Sequential(*layers)


def _decoder_layers(config: NetworkConfig) -> nn.Sequential:
    """The encoder mirrored: convs in reverse order, each pooling a x2 upsampling."""
    layers, width_in, remaining = [], config.bottleneck_width, iter(config.decoder_widths)
    for entry in reversed(ENCODERS[config.backbone]):
        if entry == POOL:
            layers.append(nn.Upsample(scale_factor=2, mode=config.upsampling))
        else:
            width = next(remaining)
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(width_in, width, 3), nn.ReLU(inplace=True)]
            width_in = width
    return nn.Sequential(*layers[:-1])  # pictures are not clipped at zero: no ReLU at the end


def upsampled_conv(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest x2 upsampling, ReflectionPad(1) and a 3 x 3 conv, in 4/9 of their multiply-adds.

    feature: (B, C, H, W); weight: (C', C, 3, 3); bias: (C',). Returns (B, C', 2H, 2W). Of the nine pixels that a filter
    sees, several are copies of one: added up, its taps become a 4 x 4 filter of a transposed conv with stride 2. The
    upsampled picture's reflection repeats its edge, since the first two rows are equal.
    """
    flipped = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))  # (C, C', 5, 5)
    rows = flipped[:, :, 1:] + flipped[:, :, :-1]
    taps = rows[:, :, :, 1:] + rows[:, :, :, :-1]  # (C, C', 4, 4)
    # Not F.pad's "replicate": torch.compile takes its gradient for another memory layout (torch 2.14).
    padded = torch.cat([feature[:, :, :1], feature, feature[:, :, -1:]], dim=2)
    padded = torch.cat([padded[..., :1], padded, padded[..., -1:]], dim=3)  # (B, C, H + 2, W + 2)
    return F.conv_transpose2d(padded, taps, bias, stride=2, padding=3)


def channel_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of every channel over its positions, in float32 or finer.

    feature: (B, C, H, W), H * W >= 2. Returns mean and std, each (B, C, 1, 1), std >= 0.
    """
    std, mean = torch.std_mean(in_full(feature), dim=(2, 3), keepdim=True)
    return mean, std


def adain(
    content_feature: Tensor, style_mean: Tensor, style_std: Tensor, strength: float | Tensor = 1.0,
    content_statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Adaptive instance normalisation (Huang & Belongie, arXiv 1703.06868, eq. 8), in float32 or finer.

    content_feature: (B, C, H, W); means and standard deviations: (B, C, 1, 1), see `channel_statistics`.
    strength: 0 gives the content feature back, 1 the aligned one, linear between.
    content_statistics: mean and standard deviation of the whole content, where the feature is a tile of it.
    """
    content_mean, content_std = content_statistics or channel_statistics(content_feature)
    content_feature = in_full(content_feature)
    aligned = (content_feature - content_mean) / (content_std + ADAIN_EPS) * style_std + style_mean
    if isinstance(strength, float) and strength == 1.0:  # a tensor is one input of an exported graph
        return aligned
    return (1.0 - strength) * content_feature + strength * aligned


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, height, width): the image with its last row and column repeated, or without its last ones.

    It decides nothing by the sizes, so that a tracer keeps no decision: a slice would ask whether it is the whole.
    """
    return F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]), mode="replicate")


def pad_to_stride(image: Tensor, stride: int) -> Tensor:
    """The image up to the next multiple of the stride in height and width, two at least: its edge repeated.

    Poolings would else drop the remainder, and statistics and reflection need 2 x 2 positions.
    """
    return resized(image, *(torch.sym_max(2, (side + stride - 1) // stride) * stride for side in image.shape[2:]))


class _Part(nn.Module):
    """The encoder, (B, 3, H, W), ImageNet-normalised, to (B, C, H/stride, W/stride), >= 0; or the decoder, back."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layers])  # the original implementation's key names are `layers.0.<index>`

    def forward(self, feature: Tensor) -> Tensor:
        for step in self._steps(feature.device.type):
            feature = step(feature)
        return feature

    def features(self, feature: Tensor, every_layer: bool = True) -> list[Tensor]:
        """The output of every conv, after its ReLU where it has one; the last, or the only one without `every_layer`,
        is what `forward` returns."""
        if not every_layer:
            return [self(feature)]
        features = []
        for step in self._steps(feature.device.type):
            feature = step(feature)
            if isinstance(step, nn.ReLU):
                features.append(feature)
        return features if isinstance(step, nn.ReLU) else [*features, feature]

    def _steps(self, device_type: str) -> Iterable[Callable[[Tensor], Tensor]]:
        """The layers, with each nearest upsampling and the conv after it as one `upsampled_conv`.

        Not where a CPU convolves in bfloat16: its transposed convolutions take two to three times as long then, with
        their gradients, as all multiply-adds of the two layers (torch 2.14 with AMX).
        """
        if device_type == "cpu" and torch.is_autocast_enabled("cpu"):
            return self.layers[0]
        steps, layers = [], iter(self.layers[0])
        for layer in layers:
            if isinstance(layer, nn.Upsample) and layer.mode == "nearest":
                next(layers)  # its reflection padding
                conv = next(layers)
                layer = partial(upsampled_conv, weight=conv.weight, bias=conv.bias)
            steps.append(layer)
        return steps


class StyleTransferNetwork(nn.Module):
    """Encoder, AdaIN and decoder (Kim & Choi, Sensors 2022, fig. 1), of the widths in `config`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        layout = ENCODERS[config.backbone]
        self.encoder = _Part(_encoder_layers(layout, config.encoder_widths, config.pooling, config.padding))
        self.decoder = _Part(_decoder_layers(config))

    def use(self, upsampling: str | None = None, padding: str | None = None, pooling: str | None = None) -> None:
        """Have the decoder upsample by another of UPSAMPLINGS, or the encoder pad by another of PADDINGS or pool by
        another of POOLINGS, with the same weights. None: as it does."""
        changed = {"upsampling": upsampling, "padding": padding, "pooling": pooling}
        self.config = replace(self.config, **{name: value for name, value in changed.items() if value is not None})
        for layer in self.decoder.layers[0]:
            if isinstance(layer, nn.Upsample):
                layer.mode = self.config.upsampling
        for index, layer in enumerate(self.encoder.layers[0]):
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = self.config.padding
                weight = layer.weight
            elif pooling is not None and not isinstance(layer, nn.ReLU):
                self.encoder.layers[0][index] = _pooling_layer(pooling, len(weight)).to(weight)

    def encode(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W), ImageNet-normalised, any size. Returns the bottleneck's feature, (B, C, h, w): h and w
        are the sides over the stride, rounded up, 2 at least."""
        return self.encoder(pad_to_stride(image, self.config.stride))

    def forward(self, content: Tensor, style: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """content: (B, 3, H, W) and style: (B, 3, H', W'), ImageNet-normalised, any size. Returns (B, 3, H, W) in
        normalised space."""
        content_feature = self.encode(content)  # (B, C, H/stride, W/stride)
        style_feature = self.encode(style)  # (B, C, H'/stride, W'/stride)
        aligned = adain(content_feature, *channel_statistics(style_feature), strength)
        return resized(self.decoder(aligned), *content.shape[2:])


class LossNetwork(nn.Module):
    """A frozen VGG, tapped at four ReLUs; its poolings stay max poolings."""

    def __init__(self, backbone: str, padding: str = "zeros") -> None:
        super().__init__()
        layout, self.taps = LOSS_NETWORKS[backbone]
        self.layers = _encoder_layers(layout, _conv_widths(layout), "max", padding)
        self.padding = padding
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W), ImageNet-normalised. Returns the four features, shallow to deep."""
        features = []
        for index, layer in enumerate(self.layers):
            image = layer(image)
            if index in self.taps:
                features.append(image)
        return features


def build_from_vgg(config: NetworkConfig, vgg: dict[str, Tensor]) -> tuple[StyleTransferNetwork, LossNetwork]:
    """A full network with the VGG's weights, from `load_vgg`, in its encoder and a new decoder; and the loss network.
    """
    network = StyleTransferNetwork(config)
    encoder = network.encoder.layers[0]
    encoder.load_state_dict({name: vgg[name] for name in encoder.state_dict()})
    initialize(network.decoder, network)
    return network, build_loss_network(config, vgg)


def build_loss_network(config: NetworkConfig, vgg: dict[str, Tensor]) -> LossNetwork:
    """The frozen VGG, from `load_vgg`, that a network of `config` learns from: of its backbone, padding as it does."""
    loss_network = LossNetwork(config.backbone, config.padding)
    loss_network.layers.load_state_dict(vgg)
    return loss_network


def initialize(part: nn.Module, network: StyleTransferNetwork) -> None:
    """He initialisation of every conv in a part of the network, in place, from torch's global generator: torch's own
    shrinks the signal by half at every layer, which takes a thousand iterations to undo."""
    output = network.decoder.layers[0][-1]  # gives the picture, without a ReLU behind it
    for conv in part.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear" if conv is output else "relu")
            nn.init.zeros_(conv.bias)


# -------------------------------------------------------------------------------------------------- cost


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


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
    """Every conv in forward order, each one's output the input of the next, for pairs of `size` x `size` pictures."""
    with torch.device("meta"):  # a network without its weights
        modules = StyleTransferNetwork(config).named_modules()
    kinds = {len(config.encoder_widths): "bottleneck", len(config.widths): "output"}
    layers, side = [], size
    for name, module in modules:
        part = name.partition(".")[0]
        if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)):
            side //= 2
        elif isinstance(module, nn.Upsample):
            side *= 2
        elif isinstance(module, nn.Conv2d):
            kind = kinds.get(len(layers) + 1, part)
            positions = side * side * (2 if part == "encoder" else 1)
            layers.append(ConvLayer(name, kind, module.in_channels, module.out_channels, positions))
    return layers


def count_macs(config: NetworkConfig, size: int) -> int:
    """Multiply-adds of stylising one pair of `size` x `size` pictures: content and style through the encoder, one pass
    of the decoder. The convs count as they are defined, as in published figures: `upsampled_conv` does with fewer."""
    return sum(layer.macs for layer in conv_layers(config, size))


def bottleneck_conv(config: NetworkConfig) -> str:
    """The name of the encoder's last conv, whose output channels are the bottleneck."""
    return next(layer.name for layer in conv_layers(config, size=0) if layer.kind == "bottleneck")

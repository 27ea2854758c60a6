"""The networks and their configuration: encoder, AdaIN, decoder, the loss network; and what a network costs."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import channel_statistics, in_full
from utils import UserError

ADAIN_EPS = 1e-5

# The encoder of each backbone: the width of every conv (each followed by a ReLU), in groups with a pooling between.
ENCODERS = {
    "vgg19": ((64, 64), (128, 128), (256, 256, 256, 256), (512,)),  # to relu4_1
    "vgg16": ((64, 64), (128, 128), (256, 256, 256)),  # to relu3_3
}
# The loss network goes on to the deepest of its taps, which are indices in torchvision's `vgg.features`.
LOSS_NETWORKS = {
    "vgg19": (ENCODERS["vgg19"], (1, 6, 11, 20)),  # relu1_1, relu2_1, relu3_1, relu4_1
    # relu1_2, relu2_2, relu3_3, relu4_3, as the paper has it; the original implementation taps relu2_1.
    "vgg16": ((*ENCODERS["vgg16"], (512, 512, 512)), (3, 8, 15, 22)),
}
BACKBONES = tuple(ENCODERS)
POOLINGS = ("max", "avg", "blur")
UPSAMPLINGS = ("nearest", "bilinear")
PADDINGS = ("zeros", "reflect")


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that describes a style-transfer network: a pruned one only has smaller widths.

    backbone, pooling (in the encoder), upsampling (in the decoder), padding (in the encoder, and in the loss network
    that teaches it; the decoder always reflects): one of the choices above, the first is the published one.
    encoder_widths, decoder_widths: output channels of every conv, in forward order. The last encoder width is the
    bottleneck; the last decoder width is 3 (RGB).
    adain_levels: on how many of the encoder's features AdaIN acts: 1, as published, is the bottleneck alone; each more
    is the one before the next shallower pooling, and is added in the decoder where it has upsampled to the same size.
    A file holds `dataclasses.asdict` of it. Raises UserError where something does not fit.
    """

    backbone: str
    pooling: str
    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    # Older files lack what follows, which is then as published.
    upsampling: str = "nearest"
    padding: str = "zeros"
    adain_levels: int = 1

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "decoder_widths"):  # JSON has lists, and so have older files
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in (("backbone", BACKBONES), ("pooling", POOLINGS), ("upsampling", UPSAMPLINGS),
                              ("padding", PADDINGS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)}: one of {', '.join(choices)} is needed")
        convs, levels = sum(map(len, ENCODERS[self.backbone])), len(ENCODERS[self.backbone])
        for name, widths in (("encoder", self.encoder_widths), ("decoder", self.decoder_widths)):
            if len(widths) != convs or any(not isinstance(width, int) or width < 1 for width in widths):
                raise UserError(f"{name} widths {list(widths)}: {self.backbone} needs {convs} whole numbers >= 1")
        if self.decoder_widths[-1] != 3:
            raise UserError(f"the last decoder width is {self.decoder_widths[-1]}, 3 is needed")
        if self.adain_levels not in range(1, 1 + levels):
            raise UserError(f"adain_levels {self.adain_levels}: {self.backbone} has 1 to {levels}")
        for first, second in self.added_convs:
            if self.widths[first] != self.widths[second]:
                raise UserError(f"adain_levels {self.adain_levels}: {self.widths[first]} channels cannot be added to "
                                f"{self.widths[second]}")

    @classmethod
    def full(cls, backbone: str = "vgg19", pooling: str = "max") -> "NetworkConfig":
        """The unpruned network: the backbone's own widths, and the decoder as their mirror image."""
        widths = (*chain(*ENCODERS[backbone]),)
        return cls(backbone, pooling, widths, (*reversed(widths[:-1]), 3))

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of every conv, encoder then decoder, in forward order."""
        return self.encoder_widths + self.decoder_widths

    def with_widths(self, widths: Sequence[int]) -> "NetworkConfig":
        """The same network with other `widths`. Raises UserError when they do not fit."""
        convs = len(self.encoder_widths)
        return replace(self, encoder_widths=widths[:convs], decoder_widths=widths[convs:])

    @property
    def bottleneck_width(self) -> int:
        return self.encoder_widths[-1]

    @property
    def level_convs(self) -> tuple[int, ...]:
        """The convs of the encoder, counted from 0, whose features AdaIN acts on, the deepest first."""
        lasts = [convs - 1 for convs in accumulate(map(len, ENCODERS[self.backbone]))]
        return tuple(lasts[: -1 - self.adain_levels : -1])

    @property
    def added_convs(self) -> list[tuple[int, int]]:
        """Pairs of convs, counted from 0 in forward order, whose features are added to each other: of the encoder, as
        AdaIN aligns it, and of the decoder, upsampled."""
        convs = len(self.encoder_widths)
        return [(conv, 2 * convs - 2 - conv) for conv in self.level_convs[1:]]  # the decoder is the mirror image

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of the features that AdaIN acts on, the deepest, the bottleneck, first."""
        return tuple(self.encoder_widths[conv] for conv in self.level_convs)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that one bottleneck position covers: 8 (vgg19) or 4 (vgg16)."""
        return 2 ** (len(ENCODERS[self.backbone]) - 1)


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
    return {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2), "blur": BlurPool2d(channels)}[pooling]


def _encoder_layers(groups, widths: Sequence[int], pooling: str, padding: str) -> nn.Sequential:
    """VGG layers numbered as in torchvision's `vgg.features`: conv, ReLU, ..., pooling."""
    layers, channels = [], pairwise((3, *widths))
    for group in groups:
        if layers:
            layers.append(_pooling_layer(pooling, layers[-2].out_channels))
        for _ in group:
            layers += [nn.Conv2d(*next(channels), 3, padding=1, padding_mode=padding), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _decoder_layers(config: NetworkConfig) -> nn.Sequential:
    """The encoder mirrored: convs in reverse order, each pooling a x2 upsampling."""
    layers, channels = [], pairwise((config.bottleneck_width, *config.decoder_widths))
    for group in reversed(ENCODERS[config.backbone]):
        if layers:
            layers.append(nn.Upsample(scale_factor=2, mode=config.upsampling))
        for _ in group:
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(*next(channels), 3), nn.ReLU(inplace=True)]
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


def level_statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`channel_statistics` of the features of every level, one level's channels behind the other's."""
    means, stds = zip(*map(channel_statistics, features))
    return torch.cat(means, dim=1), torch.cat(stds, dim=1)


def adain(content_feature: Tensor, style_mean: Tensor, style_std: Tensor, strength: float | Tensor = 1.0,
          content_statistics: Sequence[Tensor] = ()) -> Tensor:
    """Adaptive instance normalisation (Huang & Belongie, arXiv 1703.06868, eq. 8), in float32 or finer.

    content_feature: (B, C, H, W); means and standard deviations: (B, C, 1, 1), see `channel_statistics`.
    strength: 0 gives the content feature back, 1 the aligned one, linear between.
    content_statistics: mean and standard deviation of the whole content, where the feature is a tile of it.
    """
    content_mean, content_std = content_statistics or channel_statistics(content_feature)
    scale = style_std / (content_std + ADAIN_EPS)
    # All that is linear in the feature at once: features are large, statistics are small.
    return torch.addcmul(strength * (style_mean - scale * content_mean), in_full(content_feature),
                         (1.0 - strength) + strength * scale)


def align(features: Sequence[Tensor], mean: Tensor, std: Tensor, strength: float | Tensor = 1.0,
          content_statistics: Sequence[Tensor] = ()) -> list[Tensor]:
    """`adain` of every level's feature, (B, C, H, W). mean, std, content_statistics: as of `level_statistics`."""
    widths = [feature.shape[1] for feature in features]
    statistics = [each.split(widths, dim=1) for each in (mean, std, *content_statistics)]
    return [adain(feature, style_mean, style_std, strength, of_content)
            for feature, style_mean, style_std, *of_content in zip(features, *statistics)]


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


class Part(nn.Module):
    """The encoder, (B, 3, H, W), ImageNet-normalised, to (B, C, H/stride, W/stride), >= 0; or the decoder, back."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layers])  # the original implementation's key names are `layers.0.<index>`

    def forward(self, feature: Tensor, *shallower: Tensor) -> Tensor:
        """shallower: what a decoder adds to its feature behind each upsampling, the first one's first."""
        return self.features(feature, *shallower, convs=())[-1]

    def features(self, feature: Tensor, *shallower: Tensor, convs: Collection[int] | None = None) -> list[Tensor]:
        """The outputs of the convs, each behind its ReLU where it has one, in forward order: of all, or of those in
        `convs`, counted from 0, and the last one, whose is what `forward` returns."""
        added, features, conv, layers = [*shallower], [], 0, [*self.layers[0]]
        # A CPU's transposed convolutions in bfloat16 take two to three times as long, with their gradients, as all
        # multiply-adds of the two layers (torch 2.14 with AMX).
        is_joined = not (feature.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
        remaining = iter(layers)
        for layer in remaining:
            if is_joined and not added and isinstance(layer, nn.Upsample) and layer.mode == "nearest":
                _, following = next(remaining), next(remaining)  # its reflection padding, and the conv
                feature = upsampled_conv(feature, following.weight, following.bias)
                continue
            feature = layer(feature)
            if added and isinstance(layer, nn.Upsample):
                feature.add_(added.pop(0))  # upsampling made it, and nobody else has it
            if isinstance(layer, nn.ReLU) or layer is layers[-1]:
                if convs is None or conv in convs or layer is layers[-1]:
                    features.append(feature)
                conv += 1
        return features


class StyleTransferNetwork(nn.Module):
    """Encoder, AdaIN and decoder (Kim & Choi, Sensors 2022, fig. 1), of the widths in `config`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        groups = ENCODERS[config.backbone]
        self.encoder = Part(_encoder_layers(groups, config.encoder_widths, config.pooling, config.padding))
        self.decoder = Part(_decoder_layers(config))

    def use(self, upsampling: str | None = None, padding: str | None = None, pooling: str | None = None,
            adain_levels: int | None = None) -> None:
        """Have the decoder upsample by another of UPSAMPLINGS, the encoder pad by another of PADDINGS or pool by
        another of POOLINGS, or AdaIN act on another number of levels, with the same weights. None: as it does.
        Raises UserError where the widths do not fit."""
        changed = {"upsampling": upsampling, "padding": padding, "pooling": pooling, "adain_levels": adain_levels}
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

    def encode(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W), ImageNet-normalised, any size. Returns the features that AdaIN acts on: the bottleneck,
        (B, C, h, w), h and w the sides over the stride, rounded up, 2 at least; then shallower ones, each of twice the
        sides of the one before."""
        return self.encoder.features(pad_to_stride(image, self.config.stride), convs=self.config.level_convs)[::-1]

    def forward(self, content: Tensor, style: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """content: (B, 3, H, W), style: (B, 3, H', W'), any size. Returns (B, 3, H, W). All ImageNet-normalised."""
        statistics = level_statistics(self.encode(style))  # its features, the largest there are, go at once
        aligned = align(self.encode(content), *statistics, strength)  # [(B, C, H/stride, W/stride), ...]
        return resized(self.decoder(*aligned), *content.shape[2:])


class LossNetwork(nn.Module):
    """A frozen VGG, tapped at four ReLUs; its poolings stay max poolings."""

    def __init__(self, backbone: str, padding: str = "zeros", weights: dict[str, Tensor] | None = None) -> None:
        """padding: as the network that learns from it pads. weights: of `load_vgg`; None: random ones."""
        super().__init__()
        groups, self.taps = LOSS_NETWORKS[backbone]
        self.layers = _encoder_layers(groups, (*chain(*groups),), "max", padding)
        self.padding = padding
        self.requires_grad_(False)
        if weights is not None:
            self.layers.load_state_dict(weights)

    def forward(self, image: Tensor, also: tuple[int, ...] = ()) -> list[Tensor]:
        """image: (B, 3, H, W), ImageNet-normalised. Returns the four features, shallow to deep, and what comes out of
        the layers `also`, by their index."""
        features = {}
        for index, layer in enumerate(self.layers):
            image = layer(image)
            if index in self.taps or index in also:
                features[index] = image
        return [features[index] for index in (*self.taps, *also)]


def build_from_vgg(config: NetworkConfig, vgg: dict[str, Tensor]) -> StyleTransferNetwork:
    """A full network with the VGG's weights, from `load_vgg`, in its encoder, and a new decoder."""
    network = StyleTransferNetwork(config)
    encoder = network.encoder.layers[0]
    encoder.load_state_dict({name: vgg[name] for name in encoder.state_dict()})
    initialize(network.decoder)
    return network


def initialize(part: nn.Module) -> None:
    """He initialisation of every conv in a network or its decoder, in place, from torch's global generator: torch's own
    shrinks the signal by half at every layer, which takes a thousand iterations to undo."""
    convs = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:  # the last gives the picture, without a ReLU behind it
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear" if conv is convs[-1] else "relu")
        nn.init.zeros_(conv.bias)


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
    """Every conv in forward order, each one's output the input of the next, for pairs of `size` x `size` pictures; size
    is a multiple of the stride."""
    with torch.device("meta"):  # a network without its weights
        modules = StyleTransferNetwork(config).named_modules()
    convs = [(name, module) for name, module in modules if isinstance(module, nn.Conv2d)]
    levels = [level for level, group in enumerate(ENCODERS[config.backbone]) for _ in group]  # poolings before each
    kinds = ["encoder"] * len(levels[1:]) + ["bottleneck"] + ["decoder"] * len(levels[1:]) + ["output"]
    positions = [2 * (size >> level) ** 2 for level in levels] + [(size >> level) ** 2 for level in reversed(levels)]
    return [ConvLayer(name, kind, conv.in_channels, conv.out_channels, places)
            for (name, conv), kind, places in zip(convs, kinds, positions)]


def count_macs(config: NetworkConfig, size: int) -> int:
    """Multiply-adds of stylising one pair of `size` x `size` pictures: content and style through the encoder, one pass
    of the decoder. The convs count as they are defined, as in published figures: `upsampled_conv` does with fewer."""
    return sum(layer.macs for layer in conv_layers(config, size))


def bottleneck_conv(config: NetworkConfig) -> str:
    """The name of the encoder's last conv, whose output channels are the bottleneck."""
    return next(layer.name for layer in conv_layers(config, size=0) if layer.kind == "bottleneck")

"""A picture of any size through a network, tile by tile: exactly what the whole picture gives, which is one tile.

At a true border every layer pads as it does for the whole picture. Where a tile is cut out of the picture it is read
with a halo, as wide as what the layers' padding changes there, and the halo's results are thrown away. What all
positions share, the mean and the standard deviation of the bottleneck, is merged over all tiles before any is aligned.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data import normalize
from loss import channel_moments
from network import ENCODERS, NetworkConfig, StyleTransferNetwork, align, conv_layers
from utils import progress_bar

TILES = (1024, 512, 256)  # pixels, what is chosen from where the whole picture would not fit
KEPT_FEATURES = 512 * 2**20  # bytes of bottleneck features that are kept; of more, each tile is encoded again


def halos(config: NetworkConfig) -> tuple[int, int]:
    """Bottleneck positions on each side of a tile that its features depend on, and that its painted pixels do."""
    encoder = decoder = 0  # of each layer's own pixels: from the bottleneck on, one is two of those nearer to a picture
    for number, group in enumerate(reversed(ENCODERS[config.backbone])):
        if number:  # these two look at their neighbours
            encoder, decoder = 2 * encoder + (config.pooling == "blur"), 2 * decoder + (config.upsampling == "bilinear")
        encoder, decoder = encoder + len(group), decoder + len(group)  # each 3 x 3 conv sees one more
    return -(-encoder // config.stride), -(-decoder // config.stride)


def least_tile(config: NetworkConfig) -> int:
    """Side in pixels of the smallest tile of which something is left without its halo."""
    return (2 * max(halos(config)) + 1) * config.stride


def memory_needed(config: NetworkConfig, pixels: int) -> int:
    """About the bytes that painting so many pixels at once takes at its peak, by the widest layer; rather too many."""
    layers = conv_layers(config, config.stride)  # of a content picture with one position, and a style picture
    widest = max(layer.width * layer.positions / (2 if layer.name.startswith("encoder") else 1) for layer in layers)
    # float32: a layer's input, padded, and output; shallower features, and aligned; and pictures.
    return int(4 * pixels * (5 * widest / config.stride**2 + 2 * shallower_width(config) + 12))


def shallower_width(config: NetworkConfig) -> float:
    """The channels at every pixel that all levels but the bottleneck come to."""
    return sum(width << 2 * level for level, width in enumerate(config.level_widths) if level) / config.stride**2


def cut(feature: Tensor, rows: range, columns: range, level: int = 0) -> Tensor:
    """The part of (B, C, H, W) that is at these rows and columns, not copied. level: how many levels the feature is
    above the bottleneck whose rows and columns they are."""
    return feature[:, :, rows.start << level : rows.stop << level, columns.start << level : columns.stop << level]


class TiledPicture:
    """A picture, or several of one size, on the way through a network."""

    def __init__(self, network: StyleTransferNetwork, pixels: Tensor, tile: int | None = None) -> None:
        """pixels: (B, 3, H, W), uint8, any size and device.

        tile: side in pixels, `least_tile` or more, of what passes through the network at once, halo included (where
        features are not kept, the encoder's halo comes to what is decoded); None: the whole picture.
        """
        self.network, self.pixels = network, pixels
        self.like = next(network.parameters())  # features are on its device, of its type
        self.stride = network.config.stride
        self.grid = tuple(max(2, -(-side // self.stride)) for side in pixels.shape[2:])  # as `pad_to_stride`
        self.halos = halos(network.config)
        rows, columns = (self._spans(places, tile) for places in self.grid)
        self.tiles = [(row, column) for row in rows for column in columns]
        self.kept = None  # (B, C, *grid) and on, a level each, once every tile has been encoded
        self.plain = None  # statistics without weights, once they are known

    def _spans(self, places: int, tile: int | None) -> list[range]:
        """The places of one side in as few spans as tiles without their halos allow, as equal as can be."""
        is_whole = tile is None or places * self.stride <= tile
        count = 1 if is_whole else -(-places // (tile // self.stride - 2 * max(self.halos)))
        ends = [places * number // count for number in range(count + 1)]
        return [range(start, stop) for start, stop in zip(ends, ends[1:])]

    @torch.inference_mode()
    def statistics(self, weights: Sequence[Tensor] = ()) -> list[tuple[Tensor, Tensor]]:
        """Mean and unbiased standard deviation of every channel over all positions, (B, C, 1, 1) each, float32, merged
        in float64. With weights, (1, 1, *grid) each: over the positions as each of these weighs them."""
        if not weights and self.plain is not None:
            return self.plain
        moments = [[Moments() for _ in self.network.config.level_widths] for _ in weights or [None]]
        shapes = [(len(self.pixels), width, self.grid[0] << level, self.grid[1] << level)
                  for level, width in enumerate(self.network.config.level_widths)]
        fits = sum(map(math.prod, shapes)) * self.like.element_size() <= KEPT_FEATURES
        kept = [self.like.new_empty(each) for each in shapes] if fits and not self.kept and len(self.tiles) > 1 else []
        for rows, columns in self._progress("encode"):
            features = self.features(rows, columns)
            for of_weight, weight in zip(moments, weights or [None]):
                for each, feature in zip(of_weight, features):
                    each.add(feature, None if weight is None else cut(weight, rows, columns))
            for level, whole in enumerate(kept):
                cut(whole, rows, columns, level).copy_(features[level])
        self.kept = self.kept or kept or (features if len(self.tiles) == 1 else None)
        merged = [zip(*(each.result() for each in of_weight)) for of_weight in moments]
        statistics = [tuple(torch.cat(values, dim=1).to(self.like.dtype) for values in each) for each in merged]
        if not weights:
            self.plain = statistics
        return statistics

    def paint(self, style, strength: float) -> Iterator[tuple[range, range, Tensor]]:
        """Every tile painted: its rows and columns in the picture, and its pixels, (B, 3, h, w), ImageNet-normalised.
        style: one of `control`."""
        styles, weights = style.regions(tuple(self.pixels.shape[2:]), self.stride)
        statistics = self.statistics(weights)

        def aligned(rows: range, columns: range) -> list[Tensor]:
            features = self.features(rows, columns)
            parts = [align(features, each.mean, each.std, strength, of_content)
                     for each, of_content in zip(styles, statistics)]
            if not weights:
                return parts[0]
            shares = [cut(weight, rows, columns) for weight in weights]
            return [sum(part * F.interpolate(share, part.shape[2:]) for part, share in zip(of_level, shares))
                    for of_level in zip(*parts)]

        for tile in self._progress("paint"):
            read = self._widened(tile, self.halos[1])
            decoded = self.network.decoder(*aligned(*read))
            shown = self._pixels_of(tile)
            yield *shown, cut(decoded, *_within(shown, self._pixels_of(read)))
            del decoded

    def features(self, rows: range, columns: range) -> list[Tensor]:
        """What AdaIN acts on at positions of `grid`: the bottleneck, (B, C, rows, columns), then shallower levels."""
        if self.kept is not None:
            return [cut(kept, rows, columns, level) for level, kept in enumerate(self.kept)]
        read = self._widened((rows, columns), self.halos[0])
        image = normalize(cut(self.pixels, *self._pixels_of(read)).to(self.like.device)).to(self.like.dtype)
        within = _within((rows, columns), read)
        return [cut(feature, *within, level) for level, feature in enumerate(self.network.encode(image))]

    def _widened(self, spans: Sequence[range], halo: int) -> list[range]:
        """Rows and columns of the grid with a halo on all sides, as far as there is something."""
        return [range(max(0, span.start - halo), min(places, span.stop + halo))
                for span, places in zip(spans, self.grid)]

    def _pixels_of(self, spans: Sequence[range]) -> list[range]:
        """The picture's rows and columns that these of the grid stand for."""
        return [range(span.start * self.stride, min(span.stop * self.stride, side))
                for span, side in zip(spans, self.pixels.shape[2:])]

    def _progress(self, description: str) -> Iterator[tuple[range, range]]:
        """The tiles, with a progress bar where there is something to wait for."""
        return progress_bar(len(self.tiles), description, "tile", hidden=len(self.tiles) == 1, leave=False,
                            iterable=self.tiles)


def _within(spans: Sequence[range], read: Sequence[range]) -> list[range]:
    """Where rows and columns lie among those that were read."""
    return [range(span.start - around.start, span.stop - around.start) for span, around in zip(spans, read)]


class Moments:
    """Weighted mean and variance of every channel, merged over tiles (Chan, Golub & LeVeque 1979), in float64."""

    def __init__(self) -> None:
        self.weight = self.squares = self.mean = self.deviations = 0.0  # sums of w, w^2, and of w (x - mean)^2

    def add(self, feature: Tensor, weights: Tensor | None) -> None:
        """feature: (B, C, h, w); weights: (1, 1, h, w) or coarser, 0 or more; None: 1 everywhere."""
        if weights is None:
            mean, deviations = (moment.double() for moment in channel_moments(feature))
            weight = squares = feature.shape[2] * feature.shape[3]
        else:
            feature, weights = feature.double(), F.interpolate(weights.double(), feature.shape[2:])
            weight, squares = weights.sum().item(), weights.square().sum().item()
            if weight == 0.0:
                return
            mean = (feature * weights).sum((2, 3), keepdim=True) / weight
            deviations = ((feature - mean).square() * weights).sum((2, 3), keepdim=True)
        total, difference = self.weight + weight, mean - self.mean
        self.mean = self.mean + difference * (weight / total)
        self.deviations = self.deviations + deviations + difference.square() * (self.weight * weight / total)
        self.weight, self.squares = total, self.squares + squares

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (B, C, 1, 1), float64; unbiased, for weights as for that many observations of
        unequal reliability. Some weight must be above 0."""
        freedom = self.weight - self.squares / self.weight
        return self.mean, (self.deviations / max(freedom, 1e-12)).sqrt()

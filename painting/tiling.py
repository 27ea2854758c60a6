"""A picture of any size through a network, tile by tile: exactly what the whole picture gives.

At a true border every layer pads as it does for the whole picture. Where a tile is cut out of the picture it is read
with a halo, as wide as what the layers' padding changes there, and the halo's results are thrown away. What all
positions share, the mean and the standard deviation of the bottleneck, is merged over all tiles before any is aligned.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from data import normalize
from network import ENCODERS, POOL, NetworkConfig, StyleTransferNetwork
from utils import progress_bar, release_freed_memory

TILES = (1024, 512, 256)  # pixels, what is chosen from where the whole picture would not fit
KEPT_FEATURES = 512 * 2**20  # bytes of bottleneck features that are kept; of more, each tile is encoded again


def encoder_halo(config: NetworkConfig) -> int:
    """Bottleneck positions on each side of a tile that the tile's own features depend on."""
    reach, scale = 0, 1  # pixels of the picture
    for entry in ENCODERS[config.backbone]:
        if entry == POOL:
            reach += scale * (config.pooling == "blur")  # which looks at its neighbours
            scale *= 2
        else:
            reach += scale  # a 3 x 3 conv sees one more of its own pixels
    return -(-reach // scale)


def decoder_halo(config: NetworkConfig) -> int:
    """Bottleneck positions on each side of a tile that the tile's own pixels depend on."""
    reach = 0  # of each layer's own pixels, counted from a cut, as many are not what the whole picture gives
    for entry in reversed(ENCODERS[config.backbone]):
        if entry == POOL:
            reach = 2 * reach + (config.upsampling == "bilinear")  # which looks at its neighbours
        else:
            reach += 1
    return -(-reach // config.stride)


def least_tile(config: NetworkConfig) -> int:
    """Side in pixels of the smallest tile of which something is left without its halo."""
    return (2 * max(encoder_halo(config), decoder_halo(config)) + 1) * config.stride


def memory_needed(config: NetworkConfig, pixels: int) -> int:
    """About the bytes that painting so many pixels at once takes at its peak, by the widest layer; rather too many."""
    scale, scales = 1, []  # of each conv in the encoder; the decoder mirrors them
    for entry in ENCODERS[config.backbone]:
        if entry == POOL:
            scale *= 2
        else:
            scales.append(scale)
    widest = max(width / scale**2 for width, scale in zip(config.widths, scales + scales[::-1]))
    return int(4 * pixels * (5 * widest + 12))  # float32: a layer's input, padded, and output; and pictures


def cut(feature: Tensor, rows: range, columns: range) -> Tensor:
    """The part of (B, C, H, W) that is at these rows and columns, not copied."""
    return feature[:, :, rows.start : rows.stop, columns.start : columns.stop]


class TiledPicture:
    """A picture, or several of one size, on the way through a network."""

    def __init__(self, network: StyleTransferNetwork, pixels: Tensor, margin: int = 0, tile: int | None = None) -> None:
        """pixels: (B, 3, H, W), uint8, any size and device; margin: see `StyleTransferNetwork.stylize`.

        tile: side in pixels, `least_tile` or more, of what passes through the network at once, halo included; None: the
        whole picture.
        """
        self.network, self.pixels = network, pixels
        stride = network.config.stride
        sides = [max(2, -(-side // stride)) * stride for side in pixels.shape[2:]]  # as StyleTransferNetwork.pad
        margin = min(margin, min(sides) - stride)  # a reflection is smaller than the picture
        self.margin = margin // stride
        self.grid = tuple(side // stride for side in sides)
        self.sources = [_sources(own, side, margin) for own, side in zip(pixels.shape[2:], sides)]
        self.halos = encoder_halo(network.config), decoder_halo(network.config)
        rows, columns = (_spans(places, tile // stride - 2 * max(self.halos) if tile and len(source) > tile else places)
                         for places, source in zip(self.grid, self.sources))
        self.tiles = [(row, column) for row in rows for column in columns]
        self.kept = None  # (B, C, *grid) once every tile has been encoded
        self._statistics = None

    def statistics(self, weights: Sequence[Tensor] = ()) -> list[tuple[Tensor, Tensor]]:
        """Mean and unbiased standard deviation of every channel over all positions, (B, C, 1, 1) each, float32, summed
        up in float64. With weights, (1, 1, *grid) each: over the positions as each of these weighs them."""
        if weights:
            return [moments.result() for moments in self._moments(weights)]
        if self._statistics is None:
            self._statistics = [moments.result() for moments in self._moments([None])]
        return self._statistics

    def _moments(self, weights: Sequence[Tensor | None]) -> list["_Moments"]:
        moments = [_Moments() for _ in weights]
        kept = self.kept
        with self._bar("encode") as bar:
            for rows, columns in self.tiles:
                feature = self.feature(rows, columns)
                for each, weight in zip(moments, weights):
                    each.add(feature, None if weight is None else cut(weight, rows, columns))
                if self.kept is None:
                    kept = self._keep(feature, rows, columns, kept)
                self._end_tile(bar)
        self.kept = kept
        return moments

    def _keep(self, feature: Tensor, rows: range, columns: range, kept: Tensor | None) -> Tensor | None:
        """`kept` with a tile's feature in its place; None where all of them would be too many."""
        if len(self.tiles) == 1:
            return feature
        shape = (*feature.shape[:2], *self.grid)
        if math.prod(shape) * feature.element_size() > KEPT_FEATURES:
            return None
        kept = feature.new_empty(shape) if kept is None else kept
        cut(kept, rows, columns).copy_(feature)
        return kept

    def paint(self, align: Callable[[Tensor, range, range], Tensor]) -> Iterator[tuple[slice, slice, Tensor]]:
        """Every tile painted: its rows and columns in the picture, and its pixels, (B, 3, h, w), ImageNet-normalised.

        align: from content features, with the rows and columns of `grid` that they are from, to those to decode.
        """
        stride, halo = self.network.config.stride, self.halos[1]
        with self._bar("paint") as bar:
            for tile in self.tiles:
                read = [_widened(span, halo, places) for span, places in zip(tile, self.grid)]
                decoded = self.network.decoder(align(self.feature(*read), *read))
                shown = [slice(span.start * stride, min(span.stop * stride, side))
                         for span, side in zip(tile, self.pixels.shape[2:])]
                inner = [slice(own.start - span.start * stride, own.stop - span.start * stride)
                         for own, span in zip(shown, read)]
                if all(own.start < own.stop for own in shown):  # else it is all beyond the picture's own edge
                    yield *shown, decoded[:, :, inner[0], inner[1]]
                del decoded
                self._end_tile(bar)

    def _bar(self, description: str):
        """A progress bar, shown where there is something to wait for."""
        return progress_bar(len(self.tiles), description, "tile", hidden=len(self.tiles) == 1, leave=False)

    def _end_tile(self, bar) -> None:
        bar.update()
        if len(self.tiles) > 1 and self.pixels.device.type == "cpu":
            release_freed_memory()

    def feature(self, rows: range, columns: range) -> Tensor:
        """The bottleneck at these positions of `grid`, (B, C, rows, columns)."""
        if self.kept is not None:
            return cut(self.kept, rows, columns)
        stride, pixels, inner = self.network.config.stride, self.pixels, []
        for axis, (span, source) in enumerate(zip((rows, columns), self.sources), start=2):
            seen = range(span.start + self.margin, span.stop + self.margin)
            read = _widened(seen, self.halos[0], len(source) // stride)
            pixels = _take(pixels, axis, source[read.start * stride : read.stop * stride])
            inner.append(range(seen.start - read.start, seen.stop - read.start))
        image = normalize(pixels.to(next(self.network.parameters()).device))
        return cut(self.network.encoder(image), *inner)


class _Moments:
    """Mean and variance of every channel, merged over tiles (Chan, Golub & LeVeque 1979), in float64."""

    def __init__(self) -> None:
        self.weight = self.squares = self.mean = self.deviations = 0.0  # sums of w, w^2, and of w (x - mean)^2

    def add(self, feature: Tensor, weights: Tensor | None) -> None:
        """feature: (B, C, h, w); weights: (1, 1, h, w), 0 or more, or None for ones."""
        feature = feature.double()
        if weights is None:
            weight = squares = float(feature.shape[2] * feature.shape[3])
            variance, mean = torch.var_mean(feature, (2, 3), correction=0, keepdim=True)
            deviations = variance * weight
        else:
            weights = weights.double()
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
        """Mean and standard deviation, (B, C, 1, 1), float32; unbiased, for weights as for that many observations of
        unequal reliability. Some weight must be above 0."""
        freedom = self.weight - self.squares / self.weight
        return self.mean.float(), (self.deviations / max(freedom, 1e-12)).sqrt().float()


def _sources(side: int, padded: int, margin: int) -> Tensor:
    """For each row (or column) that the encoder sees, the picture's row: `side` of them, the last repeated up to
    `padded`, and `margin` more reflected at each end."""
    places = torch.arange(-margin, padded + margin).abs()
    return torch.minimum(places, 2 * (padded - 1) - places).clamp(max=side - 1)


def _spans(places: int, most: int) -> list[range]:
    """`places` in as few spans of at most `most` as they take, of sizes as equal as can be."""
    count = -(-places // most)
    ends = [places * number // count for number in range(count + 1)]
    return [range(start, stop) for start, stop in zip(ends, ends[1:])]


def _widened(span: range, halo: int, places: int) -> range:
    """With a halo on both sides, as far as there is something."""
    return range(max(0, span.start - halo), min(places, span.stop + halo))


def _take(pixels: Tensor, axis: int, places: Tensor) -> Tensor:
    """`index_select`, without a copy where the places follow each other."""
    first = int(places[0])
    if torch.equal(places, torch.arange(first, first + len(places))):
        return pixels.narrow(axis, first, len(places))
    return pixels.index_select(axis, places.to(pixels.device))

"""How good stylised pictures are: losses, SSIM, a learned perceptual distance, flat tiles, means with intervals."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from data import denormalize, normalize
from loss import content_loss, style_distance, style_statistics
from network import LossNetwork
from utils import import_extra
from weights import load_vgg

METRICS = {"content": "content loss", "style": "style loss", "ssim": "SSIM", "stlpips": "ST-LPIPS",
           "flat": "flat tiles"}
LOSS_METRICS = ("content", "style")
MIN_SIDE = 21  # pixels: features of smaller pictures are too small for the reflection padding of ST-LPIPS
CONFIDENCE = 0.95
INTERVAL = "95% t interval of the mean over pairs, clustered by content and by style picture"

SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for values of range 1
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

TILE = 16  # pixels: side of the tiles that may be flat
FLAT, LIVE = 1.5, 6.0  # of 255: standard deviations of luma, below which a tile is flat, above which it is not


# SSIM, and the t quantile below, are our own: the libraries that have them are large, for a few lines each.

def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of the luma (Wang et al., IEEE Transactions on Image Processing 13(4), 2004, eq. 13).

    first, second: (B, 3, H, W), RGB, 0..1, sides of 11 or more. Returns (B,), float64, at most 1 (equal
    luma): the mean over every position at which the 11 x 11 Gaussian window fits into the picture. Colour
    goes in only through the luma: a new palette with old structure is what style transfer is for.
    """
    inner = slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2))  # what does not depend on the padding

    def blur(image: Tensor) -> Tensor:  # one axis at a time: both at once take ten times as long
        down = gaussian_blur(image, (1, SSIM_WINDOW), SSIM_SIGMA)
        return gaussian_blur(down, (SSIM_WINDOW, 1), SSIM_SIGMA)[..., inner, inner]  # (B, 1, H-10, W-10)

    # In float64: a variance as the difference of two squares loses half of its digits.
    luma = torch.tensor(LUMA, device=first.device, dtype=torch.float64)[:, None, None]
    x, y = ((image.double() * luma).sum(dim=1, keepdim=True) for image in (first, second))  # (B, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + SSIM_C1) * (variance_x + variance_y + SSIM_C2))
    return similarity.mean(dim=(1, 2, 3))


def tile_deviations(pixels: Tensor) -> Tensor:
    """Standard deviation of the luma in every tile of 16 x 16 pixels; what is left at the right and at the bottom does
    not count. pixels: (1, 3, H, W), uint8. Returns (H // 16, W // 16), float64, of 255; the luma is Pillow's."""
    red, green, blue = pixels[0].int()
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16  # (H, W)
    tiles = luma.double().unfold(0, TILE, TILE).unfold(1, TILE, TILE)  # (H // 16, W // 16, 16, 16)
    return tiles.flatten(2).std(dim=2, correction=0)


def flat_tiles(painted: Tensor, content: Tensor) -> Tensor:
    """The share of the photograph's tiles with something in them that the painted picture leaves flat; 0 where the
    photograph has no such tile. painted, content: (1, 3, H, W), uint8. Returns a scalar, float64."""
    live, flat = tile_deviations(content) > LIVE, tile_deviations(painted) < FLAT
    return (flat & live).sum().double() / live.sum().clamp(min=1)


class Meter:
    """Measures outputs by the chosen metrics, and holds the networks that this takes.

    The losses are computed as in training, but that the loss network pads with zeros, as VGG learned, whatever a
    network in training pads with, so that all models are measured alike.
    """

    def __init__(self, metrics: tuple[str, ...], backbone: str, vgg_weights: str, style_kind: str, seed: int,
                 device: torch.device) -> None:
        """metrics: of METRICS; the others as in training. Raises UserError when weights or a package cannot be had."""
        self.metrics, self.style_kind, self.device = metrics, style_kind, device
        self.vgg_origin, self.loss_network = None, lambda image: []  # without loss metrics there are no features
        if "stlpips" in metrics:
            stlpips = import_extra("stlpips_pytorch.stlpips", "metrics", "metrics stlpips (the others need no package)")
            # Ghildyal & Liu, ECCV 2022, arXiv 2207.13686, with the weights its package carries.
            network = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
            self.stlpips = network.eval().requires_grad_(False).to(device)
        if set(LOSS_METRICS) & set(metrics):
            vgg, self.vgg_origin = load_vgg(backbone, vgg_weights, seed)
            self.loss_network = LossNetwork(backbone, weights=vgg).to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def open_content(self, picture: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What `measure` takes of a content picture, (1, 3, H, W), uint8, sides of MIN_SIDE or more: itself, on the
        device, and the loss network's deepest feature; none without loss metrics."""
        picture = picture.to(self.device)
        return picture, self.loss_network(normalize(picture))[-1:]

    @torch.inference_mode()
    def open_style(self, picture: Tensor) -> list[tuple[Tensor, ...]]:
        """What `measure` takes of a style picture, as `open_content`: the statistics of the loss network's features."""
        return style_statistics(self.loss_network(normalize(picture.to(self.device))), self.style_kind)

    @torch.inference_mode()
    def measure(self, content: tuple[Tensor, list[Tensor]], style: list[tuple[Tensor, ...]],
                outputs: list[Tensor]) -> Tensor:
        """content, style: of `open_content` and `open_style`; outputs of one or more models for this pair:
        (1, 3, H, W), ImageNet-normalised. Returns (len(outputs), len(metrics)), float64.

        The losses see the output as in training, neither clipped nor rounded. The other metrics compare the picture as
        it is written, clipped and with 8 bits, with the content picture.
        """
        return torch.stack([self._measure_one(*content, style, output) for output in outputs])

    def _measure_one(self, pixels: Tensor, content_feature: list, style: list, output: Tensor) -> Tensor:
        features = self.loss_network(output)
        written = (denormalize(output) * 255.0).round()
        ways = {
            "content": lambda: content_loss(features, content_feature),
            "style": lambda: style_distance(style_statistics(features, self.style_kind), style),
            "ssim": lambda: ssim(written / 255.0, pixels / 255.0)[0],
            "stlpips": lambda: self.stlpips(written / 127.5 - 1, pixels / 127.5 - 1).squeeze(),
            "flat": lambda: flat_tiles(written.byte(), pixels),
        }
        return torch.stack([ways[metric]().double() for metric in self.metrics])


@lru_cache
def t_quantile(freedom: int) -> float:
    """The t for which Student's distribution with `freedom` >= 1 degrees has CONFIDENCE between -t and t."""
    # With x = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1): finite ends, a smooth integrand.
    angle = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(CONFIDENCE, share / share[-1], angle))


def summarize(values: np.ndarray, pairs: list[tuple[int, int]]) -> dict:
    """The "mean" over pairs, and the lower and the upper end of its 95% "interval", which is None for a single pair.

    values: (n,); pairs: the content and the style picture of each, by number. Pairs that share a picture are not
    independent, so the variance is that of Cameron, Gelbach & Miller (Journal of Business & Economic Statistics 29(2),
    2011): by content + by style - by pair, each that of cluster sums. Where every picture is in one pair, this is the
    common t interval. A kind with one picture counts as given: the interval says nothing about others of that kind.
    """
    clusters = [*zip(*pairs), range(len(pairs))]
    mean = float(np.mean(values))
    by_content, by_style, by_pair = (_cluster_variance(values - mean, numbers) for numbers in clusters)
    # The difference can fall below its parts, even below zero, when contents and styles offset each other.
    variance = max(by_content + by_style - by_pair, by_content, by_style)
    freedom = min((len(set(numbers)) for numbers in clusters[:2] if len(set(numbers)) > 1), default=1) - 1
    margin = t_quantile(freedom) * math.sqrt(variance) if freedom else math.inf
    return {"mean": mean, "interval": [mean - margin, mean + margin] if math.isfinite(margin) else None}


def _cluster_variance(residuals: np.ndarray, numbers: list[int]) -> float:
    """Variance of the mean when the residuals of one cluster go together; 0 for a single cluster."""
    count = len(set(numbers))
    sums = np.bincount(np.unique(numbers, return_inverse=True)[1], weights=residuals)
    return count / (count - 1) * float((sums**2).sum()) / len(residuals) ** 2 if count > 1 else 0.0


@dataclass(frozen=True)
class Measurement:
    """What was measured. values: (pairs, models, metrics); pairs: of content and style, each by number or path."""

    values: np.ndarray
    pairs: list[tuple]
    names: list[str]  # of the models
    metrics: tuple[str, ...]

    def summary(self, model: int, minus: int | None = None) -> dict[str, dict]:
        """Every metric's `summarize` for one model, or of its differences from another, pair by pair."""
        values = self.values[:, model] - (0.0 if minus is None else self.values[:, minus])  # (pairs, metrics)
        return {metric: summarize(of_metric, self.pairs) for metric, of_metric in zip(self.metrics, values.T)}

    def table(self) -> str:
        """Models down, metrics across; below, differences from the first. What is not in METRICS has its own name."""
        summaries = {name: self.summary(model) for model, name in enumerate(self.names)}
        summaries |= {f"{name} - {self.names[0]}": self.summary(model, minus=0)
                      for model, name in enumerate(self.names) if model}
        rows = {"": [METRICS.get(metric, metric) for metric in self.metrics]}
        rows |= {name: [*map(show_summary, summary.values())] for name, summary in summaries.items()}
        named, width = max(map(len, rows)) + 2, max(20, 2 + max(len(cell) for row in rows.values() for cell in row))
        lines = [f"{name:{named}}" + "".join(f"{cell:>{width}}" for cell in row) for name, row in rows.items()]
        contents, styles = (len(set(numbers)) for numbers in zip(*self.pairs))
        lines.append(f"{len(self.pairs)} pairs of {contents} content and {styles} style pictures; ± is the {INTERVAL}")
        return "\n".join(lines)


def show_summary(summary: dict) -> str:
    """A mean with the half of its interval, to four digits of the mean."""
    if summary["interval"] is None:
        return f"{summary['mean']:.4g}"
    margin = summary["interval"][1] - summary["mean"]
    return f"{summary['mean']:#.4g} ± {margin:#.2g}"

"""What a picture is painted in: one style, several mixed, two divided by a mask; and the content's colours kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import UserError

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
PRESERVED = ("luma", "histogram")
CHUNK = 2**20  # pixels whose colours are in float64 at once
ASPECT = 0.01  # relative difference in height that a mask may have, scaled to the content's width; or one pixel


@dataclass(frozen=True, eq=False)
class Style:
    """What painting takes from a style picture: mean and deviation of every level's channels, (1, C, 1, 1) each."""

    mean: Tensor
    std: Tensor

    def regions(self, size: tuple[int, int], stride: int) -> tuple[list["Style"], list[Tensor]]:
        """Itself, and no weights: it is everywhere."""
        return [self], []


@dataclass(frozen=True, eq=False)
class MaskedStyle:
    """One style where a mask is white, another where it is black, between the two where it is grey."""

    white: Style
    black: Style
    mask: Image.Image  # L

    def regions(self, size: tuple[int, int], stride: int) -> tuple[list[Style], list[Tensor]]:
        """The styles with their weights at every bottleneck position of a content picture of `size`, (height, width):
        (1, 1, h, w), 0..1, together 1, each the mean of the mask over the position's pixels. A style alone, without
        weights, where the other is nowhere."""
        mask = self.mask if self.mask.size == size[::-1] else self.mask.resize(size[::-1], Image.Resampling.BILINEAR)
        weights = np.asarray(mask.reduce(stride), np.float32) / 255.0
        # At least 2 x 2 positions, as `network.pad_to_stride`.
        weights = np.pad(weights, [(0, max(0, 2 - side)) for side in weights.shape], mode="edge")
        if weights.min() == 1.0 or weights.max() == 0.0:
            return [self.white if weights.min() == 1.0 else self.black], []
        weights = torch.from_numpy(weights).to(self.white.mean.device)[None, None]
        return [self.white, self.black], [weights, 1.0 - weights]


def check_mask(mask: Image.Image | None, pixels: Tensor) -> None:
    """Raises UserError for a mask of another aspect than a content picture, (1, 3, H, W)."""
    height, width = pixels.shape[2:]
    if mask is not None and abs(mask.height * width / mask.width - height) > max(1.0, ASPECT * height):
        raise UserError(f"mask: {mask.width} x {mask.height} pixels, the content picture has {width} x {height}; "
                        "the same aspect is needed")


def mix(styles: Sequence[Style], weights: Sequence[float]) -> Style:
    """One style of several, in these shares; weights: 0 or more, of any sum above 0.

    This mixes the features that are aligned to each (the style interpolation of Huang & Belongie, arXiv 1703.06868):
    aligning is linear in mean and standard deviation.
    """
    shares = [weight / sum(weights) for weight in weights]
    return Style(*(sum(share * getattr(style, name) for share, style in zip(shares, styles) if share > 0.0)
                   for name in ("mean", "std")))


def check_styles(styles: int, weights: Sequence[float] | None, mask) -> None:
    """Raises UserError where so many styles cannot be made one by these weights or this mask."""
    if mask is not None and (styles != 2 or weights is not None):
        got = "style_weights, too" if weights is not None else f"{styles} style(s)"
        raise UserError(f"mask: got {got}; two styles are needed, for its white and its black")
    if weights is not None:
        try:
            named = f"style_weights {' '.join(f'{weight:g}' for weight in weights)}"
        except (TypeError, ValueError) as error:
            raise UserError(f"style_weights {weights}: a list of numbers is needed, one for each style") from error
        if len(weights) != styles:
            raise UserError(f"{named}: {len(weights)} for {styles} style(s); one each is needed")
        if not all(0.0 <= weight for weight in weights) or not 0.0 < sum(weights) < float("inf"):
            raise UserError(f"{named}: numbers of 0 or more are needed, not all of them 0, of a finite sum")
    elif mask is None and styles != 1:
        raise UserError(f"style: got {styles}; to make one of them, style_weights, or mask with two, is needed")


def keep_colors(content: Tensor, painted: Tensor) -> Tensor:
    """The painted picture's lightness in the content's colours. Both (B, 3, H, W), 0..1, as is the result.

    In Y'CbCr: Y' of the painted picture, Cb and Cr of the content. It is the Y of the YIQ in which Gatys et al.
    ("Preserving Color in Neural Artistic Style Transfer", arXiv 1606.05897) do the same, and linear in RGB, unlike
    CIELAB: Y' is met at every pixel, and where no colour has both that Y' and the content's chroma, as much of the
    chroma is left as fits, in the same hue. Clipping RGB would change all three.
    """
    weights = painted.new_tensor(LUMA)[:, None, None]
    luma = (painted * weights).sum(1, keepdim=True)  # (B, 1, H, W)
    colour = content - (content * weights).sum(1, keepdim=True)  # of luma 0: RGB of Cb and Cr alone
    above, below = colour.amax(1, keepdim=True), -colour.amin(1, keepdim=True)
    fits = torch.minimum((1.0 - luma) / above.clamp(min=1e-6), luma / below.clamp(min=1e-6))
    return (luma + fits.clamp(0.0, 1.0) * colour).clamp(0.0, 1.0)


def match_colors(style: Tensor, content: Tensor) -> Tensor:
    """The style picture in the content's colours: with the mean and the covariance of its RGB. All (1, 3, H, W), uint8.

    x -> A (x - mean of style) + mean of content, A = S_content^(1/2) S_style^(-1/2) (the second of the two choices of
    Gatys et al., arXiv 1606.05897). Where the style's colours do not vary, neither do the result's.
    """
    (style_mean, style_covariance), (content_mean, content_covariance) = map(_color_moments, (style, content))
    values, vectors = torch.linalg.eigh(style_covariance)
    # Less than a level of 255 is noise: stretched, it would be what one sees.
    inverse = torch.where(values > 1.0, values.clamp(min=1.0).rsqrt(), 0.0)
    to_white = vectors * inverse @ vectors.T
    values, vectors = torch.linalg.eigh(content_covariance)
    matrix = vectors * values.clamp(min=0.0).sqrt() @ vectors.T @ to_white
    parts = [(matrix @ (part.double() - style_mean) + content_mean).round().clamp(0.0, 255.0).byte()
             for part in style.flatten(2)[0].split(CHUNK, dim=1)]
    return torch.cat(parts, dim=1).reshape(style.shape)


def _color_moments(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, (3, 1), and covariance, (3, 3), of the colours of a picture, (1, 3, H, W), uint8; in float64."""
    colours = picture.flatten(2)[0]  # (3, H * W)
    mean = sum(part.double().sum(1, keepdim=True) for part in colours.split(CHUNK, dim=1)) / colours.shape[1]
    covariance = sum(part @ part.T for part in (part.double() - mean for part in colours.split(CHUNK, dim=1)))
    return mean, covariance / colours.shape[1]

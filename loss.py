"""The losses: pure functions, tensors in, scalar out; the caller weights them.

Every one computes in float32 where the features are of half precision: a variance, a correlation or an epsilon of
1e-5 does not survive bfloat16. Call them outside autocast, which would bring matrix products back to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

L0_EPS = 1e-5
CORRELATION_EPS = 1e-5
STYLE_LOSSES = ("meanstd", "gram")


def in_full(values: Tensor) -> Tensor:
    """The values in float32, or finer where they are finer."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def channel_moments(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of every channel over its positions, and the sum of the squared deviations from it, (B, C, 1, 1) each, in
    float32 or finer. feature: (B, C, H, W)."""
    feature = in_full(feature)
    # Not by .mean(): the ONNX exporter would call it as a graph's output is called (torch 2.14).
    mean = feature.sum(dim=(2, 3), keepdim=True) / (feature.shape[2] * feature.shape[3])
    # The deviations add up to 0, so that their squares' sum has no gradient by way of the mean.
    return mean, (feature - mean.detach()).square().sum(dim=(2, 3), keepdim=True)


def channel_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of every channel over its positions, in float32 or finer.

    feature: (B, C, H, W), H * W >= 2. Returns mean and std, each (B, C, 1, 1), std >= 0, where it is 0 without a
    gradient. On a CPU torch.std_mean takes ten times as long (torch 2.14).
    """
    mean, squares = channel_moments(feature)
    variance = squares / (feature.shape[2] * feature.shape[3] - 1)
    return mean, torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)


def content_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean squared error at the deepest tap. features, targets: lists of (B, C, H, W), shallow to deep."""
    return F.mse_loss(in_full(features[-1]), in_full(targets[-1]))


def style_loss(features: list[Tensor], targets: list[Tensor], kind: str = "meanstd") -> Tensor:
    """Distance of the features' statistics, averaged over the taps and divided by their number again.

    features, targets: lists of (B, C, H, W), shallow to deep; H and W may differ between the two. kind: "meanstd"
    compares channel means and unbiased standard deviations (Huang & Belongie, eq. 13), "gram" the Gram matrices. The
    published weight of 100 belongs to this double division.
    """
    return style_distance(style_statistics(features, kind), style_statistics(targets, kind))


def style_statistics(features: list[Tensor], kind: str = "meanstd") -> list[tuple[Tensor, ...]]:
    """What `style_loss` compares at each tap: mean and standard deviation, (B, C, 1, 1), or Gram matrix, (B, C, C)."""
    if kind == "meanstd":
        return [channel_statistics(feature) for feature in features]
    flat = [in_full(feature).flatten(2) for feature in features]  # (B, C, H*W) each
    return [(each @ each.transpose(1, 2) / each.shape[2],) for each in flat]  # f f^T / (H * W)


def style_distance(statistics: list[tuple[Tensor, ...]], targets: list[tuple[Tensor, ...]]) -> Tensor:
    """`style_loss` of the `style_statistics` of features and targets."""
    layers = len(statistics)
    distances = (F.mse_loss(own, target) for layer in zip(statistics, targets) for own, target in zip(*layer))
    return sum(distances) / layers / layers


def uncorrelation_loss(feature: Tensor) -> Tensor:
    """Mean absolute correlation between different channels, summed over the batch (Kim et al., arXiv 1807.01493; the
    published weight of 50 belongs to the sum).

    feature: (B, C, H, W). A channel that is constant, or the only one, correlates with nothing: 0, gradient 0.
    """
    flat = in_full(feature).flatten(2)  # (B, C, H*W)
    centred = flat - flat.mean(dim=2, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=2)  # (B, C)
    covariance = centred @ centred.transpose(1, 2)  # (B, C, C)
    correlation = covariance / (norm[:, :, None] * norm[:, None, :] + CORRELATION_EPS)
    channels = feature.shape[1]
    diagonal = correlation.diagonal(dim1=1, dim2=2).abs().sum()
    return (correlation.abs().sum() - diagonal) / max(1, channels * (channels - 1))


def channel_norm(feature: Tensor) -> Tensor:
    """The l2 norm of every channel over its positions: (B, C, H, W) to (B, C), >= 0, in float32 or finer.

    feature: of a batch, behind a ReLU, so that a channel that is off is zero, as the next convolution reads it. The
    gradient at an all-zero channel is 0: what is off stays off.
    """
    return torch.linalg.vector_norm(in_full(feature).flatten(2), dim=2)


def l0_norm(norm: Tensor, eps: float | Tensor = L0_EPS) -> Tensor:
    """l0 = norm / (norm + eps), 0 for a channel that is off, near 1 for one that is on (Kim & Choi, eq. 3).

    norm: (..., C) from `channel_norm`; eps: a number, or (C,). It is written as 1 - eps / (norm + eps), since in
    float32 the quotient's gradient is round-off for norms above about 75.
    """
    return 1.0 - eps / (norm + eps)


def channel_loss(norm: Tensor, eps: float | Tensor = L0_EPS) -> Tensor:
    """Mean of l0 over pictures and channels: the share of channels that are on (Kim & Choi, eq. 4).

    norm: (n, C), the `channel_norm` of content and style features together, or of a batch of any inputs. The norms of
    several layers may stand side by side in C.
    """
    return l0_norm(norm, eps).mean()


def xor_loss(norm: Tensor, eps: float | Tensor = L0_EPS) -> Tensor:
    """Mean of |l0_i - l0_j| over channels and pairs of pictures: 0 when the same channels are on for every picture
    (Kim & Choi, eq. 5).

    norm: (n, C), n >= 2, as for `channel_loss`. No n x n table: sum_{i<j} |x_i - x_j| = sum_i (#{x < x_i} -
    #{x > x_i}) x_i, the counts read off the sorted values. Equal values cancel exactly, so that saturated channels get
    no gradient. x is eps / (norm + eps) = 1 - l0, which keeps its digits where l0 rounds to 1.
    """
    pictures, channels = norm.shape
    off = (eps / (norm + eps)).t().contiguous()  # (C, n)
    with torch.no_grad():
        ordered = off.sort(dim=1).values
        smaller = torch.searchsorted(ordered, off)
        larger = pictures - torch.searchsorted(ordered, off, right=True)
        sign_sum = (smaller - larger).to(off.dtype)  # (C, n)
    return (sign_sum * off).sum() / (channels * pictures * (pictures - 1) / 2)


def moved(image: Tensor, move: Tensor) -> Tensor:
    """(B, C, H, W), moved up and to the left by `move`, (2,): rows and columns, >= 0; the last ones are repeated."""
    for axis, by in zip((2, 3), move):
        places = torch.arange(image.shape[axis], device=image.device) + by
        image = image.index_select(axis, places.clamp_max(image.shape[axis] - 1))
    return image


def shift_loss(output: Tensor, moved_output: Tensor, move: Tensor, stride: int) -> Tensor:
    """Mean squared difference of the same things in what is painted of a picture and of that picture `moved` by `move`,
    each less than `stride`: 0 when the paint follows.

    output, moved_output: (B, 3, H, W), ImageNet-normalised, H and W 2 * stride or more. A border is left out: what is
    painted there depends on what only one of the two pictures shows.
    """
    border = min(3 * stride, (min(output.shape[2:]) - stride) // 4)
    inner = (..., slice(border, -border - stride), slice(border, -border - stride))
    return F.mse_loss(in_full(moved(output, move)[inner]), in_full(moved_output[inner]))


def distillation_errors(output: Tensor, teacher_output: Tensor, feature: Tensor,
                        teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
    """How far a student is from its teacher: the mean squared error of the outputs, (B, 3, H, W), and that of the
    bottleneck features, (B, C, h, w), as a fraction of the teacher's mean square. The loss is their sum."""
    feature_error = F.mse_loss(in_full(feature), in_full(teacher_feature))
    square = in_full(teacher_feature).square().mean()
    return F.mse_loss(in_full(output), in_full(teacher_output)), feature_error / square.clamp_min(1e-12)

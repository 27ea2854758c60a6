"""What a picture is painted in: the style of one picture."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Style:
    """All that painting takes from a style picture: mean and standard deviation of its bottleneck, (1, C, 1, 1)
    each."""

    mean: Tensor
    std: Tensor

"""The network as graphs of tensors that take pictures of any size: what leaves this toolkit for other programs.

They compute what `StyleTransferNetwork` does, with RGB of 0..1 around it. Every size is an expression of the picture's,
see `network.resized`: else the exported file would return a wrong one for others without a word.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import IMAGENET_MEAN, IMAGENET_STD
from network import StyleTransferNetwork, align, level_statistics, resized

# The axes of every input whose size may be any.
AXES = {
    "content": {0: "batch", 2: "height", 3: "width"}, "style": {0: "batch", 2: "style_height", 3: "style_width"},
    "mean": {0: "batch"}, "std": {0: "batch"}, "strength": {},
}


def in_rows(feature: Tensor) -> Tensor:
    """(B, C, H, W) as (B, C, 1, H * W). Convolutions of integers leave a feature's channels side by side at every
    position; onnxruntime puts them in order for this, and then aligns a channel at once, in a fifth of the time."""
    return feature.flatten(2).unsqueeze(2)


class Graph(nn.Module):
    """From a content picture, and a style as mean and std, to the painted picture: a network with what stands around
    it, normalisation, padding and cropping. `inputs` names what `forward` takes, of AXES; `outputs` what it returns."""

    inputs, outputs = ("content", "mean", "std", "strength"), ("picture",)

    def __init__(self, network: StyleTransferNetwork) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("rgb_mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("rgb_std", torch.tensor(IMAGENET_STD)[:, None, None])
        # Where `fill_for_integers` added channels that the first conv reads, and that the last one gives.
        first, last = network.encoder.layers[0][0], network.decoder.layers[0][-1]
        self.register_buffer("colors", torch.arange(first.weight.shape[1]).clamp_max(2))  # the last colour again
        self.added = len(last.weight) - 3

    def encode(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W), 0..1. Returns (B, C, ceil(H/stride), ceil(W/stride)), at least 2 x 2."""
        normalized = (image - self.rgb_mean) / self.rgb_std
        return self.network.encode(normalized.index_select(1, self.colors) if len(self.colors) > 3 else normalized)

    def statistics(self, style: Tensor) -> tuple[Tensor, Tensor]:
        """style: (B, 3, H, W), 0..1. Returns `level_statistics`, (B, C, 1, 1) each."""
        return level_statistics([*map(in_rows, self.encode(style))])

    def forward(self, content: Tensor, mean: Tensor, std: Tensor, strength: Tensor) -> Tensor:
        """content: (B, 3, H, W), 0..1; mean, std: (B, C, 1, 1); strength: (1,), 0..1. Returns (B, 3, H, W), 0..1."""
        features = self.encode(content)
        rows = align([*map(in_rows, features)], mean, std, strength)
        decoded = self.network.decoder(*(row.squeeze(2).reshape(feature.shape) for row, feature in zip(rows, features)))
        scale, offset = (F.pad(each, (0, 0, 0, 0, 0, self.added)) for each in (self.rgb_std, self.rgb_mean))
        picture = decoded * scale + offset  # `quantize` makes it part of the last conv
        return resized(picture[:, :3] if self.added else picture, *content.shape[2:]).clamp(0.0, 1.0)


class StyleGraph(Graph):
    """From a style picture to all that is taken from it: mean and std of every bottleneck channel."""

    inputs, outputs = ("style",), ("mean", "std")
    forward = Graph.statistics


class PairGraph(Graph):
    """From a content and a style picture to the painted picture."""

    inputs = ("content", "style", "strength")

    def forward(self, content: Tensor, style: Tensor, strength: Tensor) -> Tensor:
        return super().forward(content, *self.statistics(style), strength)


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """The graph as torch.export has it, for a batch and pictures of any size. Raises torch's error if one is fixed."""
    statistic = (2, sum(graph.network.config.level_widths), 1, 1)
    sizes = {"content": (2, 3, 37, 45), "style": (2, 3, 52, 44), "mean": statistic, "std": statistic, "strength": (1,)}
    example = tuple(torch.rand(sizes[name]) for name in graph.inputs)
    dims = {dim: torch.export.Dim(dim) for name in graph.inputs for dim in AXES[name].values()}
    shapes = {name: {axis: dims[dim] for axis, dim in AXES[name].items()} for name in graph.inputs}
    with torch.no_grad():
        return torch.export.export(graph.eval(), example, dynamic_shapes=shapes)


def fill_up(network: StyleTransferNetwork, multiple: int) -> StyleTransferNetwork:
    """A new network that paints the same, with every width (but the picture's 3 colours) brought up to a `multiple` by
    channels that are zero: their filters are, and what they feed."""
    widths = [-(-width // multiple) * multiple for width in network.config.widths[:-1]]
    filled = StyleTransferNetwork(network.config.with_widths([*widths, 3])).to(next(network.parameters()).dtype)
    state = filled.state_dict()
    for name, tensor in network.state_dict().items():
        state[name].zero_()[tuple(map(slice, tensor.shape))] = tensor
    return filled.eval()

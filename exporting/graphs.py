"""The network as graphs of tensors that take pictures of any size: what leaves this toolkit for other programs.

They compute what `StyleTransferNetwork` does, with RGB of 0..1 around it. A decision by the size of the picture that
is traced would be kept, and the exported file would return a wrong size for others without a word: every size is an
expression of the picture's, see `network.resized`.
"""

import torch
from torch import Tensor, nn

from data import IMAGENET_MEAN, IMAGENET_STD
from network import StyleTransferNetwork, adain, channel_statistics, resized


class Graph(nn.Module):
    """A network with what stands around it: RGB of 0..1 in and out, normalisation, padding and cropping.

    `inputs` names what `forward` takes, with the axes whose size may be any; `outputs` what it returns.
    """

    inputs: dict[str, dict[int, str]]
    outputs: tuple[str, ...]

    def __init__(self, network: StyleTransferNetwork) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("rgb_mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("rgb_std", torch.tensor(IMAGENET_STD)[:, None, None])

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace `forward` with."""
        raise NotImplementedError

    def encode(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W), 0..1. Returns (B, C, ceil(H/stride), ceil(W/stride)), at least 2 x 2."""
        return self.network.encode((image - self.rgb_mean) / self.rgb_std)

    def paint(self, content: Tensor, mean: Tensor, std: Tensor, strength: Tensor) -> Tensor:
        """content: (B, 3, H, W), 0..1; mean, std: (B, C, 1, 1); strength: (1,), 0..1. Returns (B, 3, H, W), 0..1."""
        aligned = adain(self.encode(content), mean, std, strength)
        picture = self.network.decoder(aligned) * self.rgb_std + self.rgb_mean  # `quantize` makes it part of the conv
        return resized(picture, *content.shape[2:]).clamp(0.0, 1.0)


IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}
STYLE_AXES = {0: "batch", 2: "style_height", 3: "style_width"}


class StyleGraph(Graph):
    """From a style picture to all that is taken from it: mean and std of every bottleneck channel."""

    inputs = {"style": STYLE_AXES}
    outputs = ("mean", "std")

    def example(self) -> tuple[Tensor, ...]:
        return (torch.rand(2, 3, 52, 44),)

    def forward(self, style: Tensor) -> tuple[Tensor, Tensor]:
        return channel_statistics(self.encode(style))


class ContentGraph(Graph):
    """From a content picture, and a style as mean and std, to the painted picture."""

    inputs = {"content": IMAGE_AXES, "mean": {0: "batch"}, "std": {0: "batch"}, "strength": {}}
    outputs = ("picture",)

    def example(self) -> tuple[Tensor, ...]:
        style = torch.rand(2, 2, self.network.config.bottleneck_width, 1, 1)
        return torch.rand(2, 3, 37, 45), *style, torch.tensor([0.5])

    def forward(self, content: Tensor, mean: Tensor, std: Tensor, strength: Tensor) -> Tensor:
        return self.paint(content, mean, std, strength)


class PairGraph(Graph):
    """From a content and a style picture to the painted picture."""

    inputs = {"content": IMAGE_AXES, "style": STYLE_AXES, "strength": {}}
    outputs = ("picture",)

    def example(self) -> tuple[Tensor, ...]:
        return torch.rand(2, 3, 37, 45), torch.rand(2, 3, 52, 44), torch.tensor([0.5])

    def forward(self, content: Tensor, style: Tensor, strength: Tensor) -> Tensor:
        return self.paint(content, *channel_statistics(self.encode(style)), strength)


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """The graph as torch.export has it, for a batch and pictures of any size. Raises torch's error where a size that
    it saw would stay in it."""
    dims = {name: torch.export.Dim(name) for axes in graph.inputs.values() for name in axes.values()}
    shapes = {name: {axis: dims[dim] for axis, dim in axes.items()} for name, axes in graph.inputs.items()}
    with torch.no_grad():
        return torch.export.export(graph.eval(), graph.example(), dynamic_shapes=shapes)


def fill_up(network: StyleTransferNetwork, multiple: int) -> StyleTransferNetwork:
    """A new network that paints the same, with every width (but the picture's 3 colours) brought up to a `multiple` by
    channels that are zero: their filters are, and what they feed."""
    config = network.config
    widths = [-(-width // multiple) * multiple for width in config.widths[:-1]]
    filled = StyleTransferNetwork(config.with_widths([*widths, config.widths[-1]]))
    filled.to(next(network.parameters()).dtype)
    state = filled.state_dict()
    for name, tensor in network.state_dict().items():
        state[name].zero_()[tuple(map(slice, tensor.shape))] = tensor
    return filled.eval()

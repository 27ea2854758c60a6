"""The network as graphs of tensors that take pictures of any size: what leaves this toolkit for other programs.

They compute what `StyleTransferNetwork.stylize` does. That decides in Python how a picture is padded; a tracer keeps
such a decision as it was for the picture it saw, and the exported file then returns a wrong size for others without a
word. Here every size is an expression of the picture's: padding and cropping choose rows and columns by number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import IMAGENET_MEAN, IMAGENET_STD
from network import StyleTransferNetwork, adain, channel_statistics


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, height, width): the image without its last rows and columns, or with the last one repeated.

    A slice would ask whether it is the whole image, and keep the answer.
    """
    return F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]), mode="replicate")


class Graph(nn.Module):
    """A network with what stands around it: RGB of 0..1 in and out, normalisation, padding, margin and cropping.

    `inputs` names what `forward` takes, with the axes whose size may be any; `outputs` what it returns.
    """

    inputs: dict[str, dict[int, str]]
    outputs: tuple[str, ...]

    def __init__(self, network: StyleTransferNetwork, margin: int = 0) -> None:
        """margin: pixels, a multiple of the stride, see `StyleTransferNetwork.stylize`."""
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder
        self.stride, self.margin = network.config.stride, margin
        self.register_buffer("rgb_mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("rgb_std", torch.tensor(IMAGENET_STD)[:, None, None])

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace `forward` with."""
        raise NotImplementedError

    def encode(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W), 0..1. Returns (B, C, ceil(H/stride), ceil(W/stride)), at least 2 x 2."""
        stride = self.stride
        height, width = (torch.sym_max(2, (side + stride - 1) // stride) for side in image.shape[2:])
        image = resized((image - self.rgb_mean) / self.rgb_std, height * stride, width * stride)
        if self.margin == 0:
            return self.encoder(image)
        margin = torch.sym_min(self.margin // stride, torch.sym_min(height, width) - 1)  # a reflection is smaller
        feature = self.encoder(F.pad(image, (margin * stride,) * 4, mode="reflect"))
        return F.pad(feature, (-margin,) * 4, mode="replicate")  # cuts the margin off

    def decode(self, feature: Tensor, height: int, width: int) -> Tensor:
        """feature: (B, C, h, w). Returns the picture's upper left (B, 3, height, width), 0..1."""
        picture = self.decoder(feature) * self.rgb_std + self.rgb_mean
        return resized(picture, height, width).clamp(0.0, 1.0)

    def paint(self, content: Tensor, mean: Tensor, std: Tensor, strength: Tensor) -> Tensor:
        """content: (B, 3, H, W), 0..1; mean, std: (B, C, 1, 1); strength: (1,), 0..1. Returns (B, 3, H, W), 0..1."""
        feature = self.encode(content)
        # Not adain's own strength: it asks whether that is 1.
        feature = (1.0 - strength) * feature + strength * adain(feature, mean, std)
        return self.decode(feature, *content.shape[2:])


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
        style = torch.rand(2, 2, self.encoder.layers[0][-2].out_channels, 1, 1)
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
    state = filled.state_dict()
    for name, tensor in network.state_dict().items():
        state[name].zero_()[tuple(map(slice, tensor.shape))] = tensor
    return filled.eval()

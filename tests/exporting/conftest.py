"""What several test files of exporting use: one file of each format, made once."""

from pathlib import Path

import pytest
import torch
from helpers import filled, small_config, words, write_model

from main import main
from network import StyleTransferNetwork

# Name of the file: pooling, upsampling and padding of the network, and further flags.
EXPORTS = {
    "split.onnx": (("max", "nearest", "zeros"), {"split": True}),
    "whole.onnx": (("blur", "bilinear", "reflect"), {}),
    "program.pt2": (("avg", "nearest", "reflect"), {}),
    "weights.safetensors": (("max", "bilinear", "zeros"), {}),
}


def exporting_network(pooling="max", upsampling="nearest", padding="zeros", backbone="vgg16") -> StyleTransferNetwork:
    """Narrow, of uneven widths as after pruning, but multiples of 4 as in a page; it paints mostly within range."""
    config = small_config(backbone, pooling)
    widths = [4 + 4 * (number % 3 == 1) for number in range(len(config.widths) - 1)]
    network = filled(StyleTransferNetwork(config.with_widths([*widths, 3]))).requires_grad_(False)
    network.use(upsampling, padding)
    pictures = torch.randn(2, 1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    network.decoder.layers[0][-1].weight /= network(*pictures).std()  # what is painted is neither grey nor clipped
    return network


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A folder with all of EXPORTS, each by the command line, and what it was made from as NAME.pth."""
    folder = tmp_path_factory.mktemp("exported")
    for name, (settings, flags) in EXPORTS.items():
        model = write_model(folder / f"{name}.pth", exporting_network(*settings), vgg_weights="random", iteration=7)
        assert main(words({"mode": "export", "load_path": model, "save_path": folder / "files" / name} | flags)) == 0
    return folder

"""Shared by all tests: the repository root on the path, the reference values, small pictures."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import run as run_module  # noqa: E402
from network import NetworkConfig, StyleTransferNetwork  # noqa: E402
from utils import UserError  # noqa: E402

REFERENCE = json.loads((Path(__file__).parent / "reference_values.json").read_text())


def user_error(function, *arguments, **named) -> str:
    """The message of the UserError that the call must raise; it must be one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert message.strip() and len(message.splitlines()) == 1, repr(message)
    return message


def write_picture(path: Path, size: tuple[int, int] = (24, 16), color=(200, 100, 50), **options) -> Path:
    """A picture of one colour; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def write_map(path: Path, size: tuple[int, int] = (40, 30), number: int = 0) -> Path:
    """A picture whose red is 5 * column, green 7 * row, blue `number`: a pixel tells where it is from."""
    width, height = size
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = 5 * np.arange(width)[None, :]
    pixels[..., 1] = 7 * np.arange(height)[:, None]
    pixels[..., 2] = number
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def small_config(backbone: str = "vgg19", pooling: str = "max", width: int = 6) -> NetworkConfig:
    convs = {"vgg19": 9, "vgg16": 7}[backbone]
    return NetworkConfig(backbone, pooling, (width,) * convs, (*(width,) * (convs - 1), 3))


def small_network(backbone: str = "vgg19", pooling: str = "max", width: int = 6, seed: int = 0) -> StyleTransferNetwork:
    """A narrow network with He-initialised weights and small biases: quick, and its pictures are not flat."""
    network = StyleTransferNetwork(small_config(backbone, pooling, width))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = (2.0 / parameter[0].numel()) ** 0.5 if parameter.dim() == 4 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval()


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training in this process gets SIGTERM within `iteration`, until `monkeypatch.undo()`."""

    class StoppingSums(run_module.MetricSums):
        def add(self, metrics, at):
            super().add(metrics, at)
            if at == iteration:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_module, "MetricSums", StoppingSums)


@pytest.fixture(scope="session")
def reference() -> dict:
    """Values computed with an independent implementation; the file says how."""
    return REFERENCE

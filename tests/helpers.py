"""What several test files use: small pictures, networks and trainers, command lines, what a run wrote, refusals."""

import json
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import PictureError, load_picture
from main import main
from network import LossNetwork, NetworkConfig, StyleTransferNetwork, build_from_vgg, conv_layers
from train import TrainConfig
from training import loop as run_module
from training.step import TransferTrainer
from utils import UserError, save_checkpoint
from weights import load_vgg, model_checkpoint

ROOT = Path(__file__).parent.parent
CONTENT_DIR, STYLE_DIR = ROOT / "imgs" / "content", ROOT / "imgs" / "style"
CPU = torch.device("cpu")
REPORTING_MAIN = Path(__file__).parent / "reporting_main.py"
# Values computed with an independent implementation; the file says how.
REFERENCE = json.loads((Path(__file__).parent / "reference_values.json").read_text())

# A training small enough for a test: settings of TrainConfig.
SMALL_TRAINING = dict(
    content_dir=str(CONTENT_DIR), style_dir=str(STYLE_DIR), vgg_weights="random", imsize=40, cropsize=32, batch_size=2,
    num_workers=0, gpu_no=-1, wb_mode="disabled", amp="off", encoder_lr=5e-5, decoder_lr=1e-3,
    uncorrelation_loss_weight=0.01, channel_loss_weight=100.0, xor_loss_weight=5.0, check_iter=1,
)
# Settings of TrainConfig with which every term of the loss has a gradient.
EVERY_TERM = dict(style_loss_weight=100.0, uncorrelation_loss_weight=50.0, channel_loss_weight=1e3,
                  xor_loss_weight=500.0)
# What a published training logs.
METRICS = ("content", "style", "uncorrelation", "channel", "xor", "total", "nonzero_channels", "channels_off_for_all",
           "channels_off_for_some")


# ----------------------------------------------------------------------------------------------- pictures


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


def random_picture(seed: int, size: tuple[int, int] = (32, 40), pictures: int = 1) -> Tensor:
    """(pictures, 3, H, W), uint8; size is (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (pictures, 3, *size), generator=generator, dtype=torch.uint8)


def random_batch(size: int = 16, pictures: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Content and style of one training step, (pictures, 3, size, size), uint8, each."""
    content, style = random_picture(seed, (size, size), 2 * pictures).split(pictures)
    return content, style


def write_noise(path: Path, size: tuple[int, int], seed: int) -> Path:
    """A `random_picture` as a file; size is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_picture(seed, size)[0].permute(1, 2, 0).numpy()).save(path)
    return path


def pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) of a picture as it is loaded, in RGB and without metadata; whole numbers that may be subtracted."""
    assert image.mode == "RGB" and not image.info
    return np.asarray(image).astype(int)


def read_pixels(path: Path) -> np.ndarray:
    """(H, W, 3), whole numbers that may be subtracted."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


# ----------------------------------------------------------------------------------- networks and trainers


def small_config(
    backbone: str = "vgg19", pooling: str = "max", width: int = 6, adain_levels: int = 1
) -> NetworkConfig:
    convs = {"vgg19": 9, "vgg16": 7}[backbone]
    return NetworkConfig(backbone, pooling, (width,) * convs, (*(width,) * (convs - 1), 3), adain_levels=adain_levels)


def small_network(*shape, seed: int = 0, **more) -> StyleTransferNetwork:
    """A narrow network, of a `small_config`, that is `filled`."""
    return filled(StyleTransferNetwork(small_config(*shape, **more)), seed)


def filled(network: StyleTransferNetwork, seed: int = 0) -> StyleTransferNetwork:
    """The network with He-initialised weights and small biases: its pictures are not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = (2.0 / parameter[0].numel()) ** 0.5 if parameter.dim() == 4 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval()


def within_range(network: StyleTransferNetwork, share: float = 0.02) -> StyleTransferNetwork:
    """The network with outputs within the range of pictures: where denormalising clips, nothing could differ."""
    with torch.no_grad():
        network.decoder.layers[0][-1].weight *= share
    return network


def picture_network() -> StyleTransferNetwork:
    """A narrow network whose outputs are mostly within the range of pictures, and not flat."""
    return within_range(small_network(width=12), 0.3)


def convs(network: StyleTransferNetwork) -> list[str]:
    """Names of all convs that can be cut."""
    return [layer.name for layer in conv_layers(network.config, size=0)][:-1]


def plant(network: StyleTransferNetwork, values: dict[str, dict[int, float]]) -> StyleTransferNetwork:
    """The network, changed in place: these channels have these values after the ReLU whatever the picture, by zero
    filters and the value as the bias. values: 0 or more, by conv and channel."""
    with torch.no_grad():
        for name, channels in values.items():
            conv = network.get_submodule(name)
            for channel, value in channels.items():
                conv.weight[channel] = 0
                conv.bias[channel] = value
    return network


def write_model(path: Path, network: StyleTransferNetwork, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model_checkpoint(network, **more), path)
    return path


@lru_cache
def random_vgg(backbone: str = "vgg19", seed: int = 0) -> dict[str, Tensor]:
    """`--vgg_weights random`; not to be changed."""
    return load_vgg(backbone, "random", seed)[0]


def make_trainer(
    network: StyleTransferNetwork | None = None, device: torch.device = CPU, dtype: torch.dtype = torch.float32,
    **settings
) -> TransferTrainer:
    """A trainer of SMALL_TRAINING with other `settings`, in a data type; without a network, of the full one at its
    start."""
    config = TrainConfig(**SMALL_TRAINING | settings)
    vgg = random_vgg(config.backbone)
    torch.manual_seed(0)
    if network is None:
        network = build_from_vgg(NetworkConfig.full(config.backbone), vgg)
    loss_network = LossNetwork(config.backbone, network.config.padding, vgg)
    return TransferTrainer(network.to(dtype), loss_network, config, device)


# --------------------------------------------------------------------------------- command lines, and runs


def words(flags: dict) -> list[str]:
    """A command line of flags and their values: several for a tuple or list, none for True. `--` may be left out."""
    line = []
    for flag, value in flags.items():
        values = value if isinstance(value, (tuple, list)) else () if value is True else (value,)
        line += [flag if flag.startswith("--") else f"--{flag}", *map(str, values)]
    return line


def refusal(capsys, *arguments) -> str:
    """Run main in this process; it must refuse with code 2 and one line, which is returned."""
    code = main([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


def refused(path, **options) -> str:
    """The message of the PictureError that `load_picture` must raise; it must be one line and name the file."""
    with pytest.raises(PictureError) as caught:
        load_picture(path, **options)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1
    return message


def user_error(function, *arguments, **named) -> str:
    """The message of the UserError that the call must raise; it must be one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert message.strip() and len(message.splitlines()) == 1, repr(message)
    return message


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(iteration: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """A run in this process gets the signal within `iteration`, until `monkeypatch.undo()`."""

    class StoppingSums(run_module.MetricSums):
        def add(self, metrics, at):
            super().add(metrics, at)
            if at == iteration:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(run_module, "MetricSums", StoppingSums)


def limit_file_system(monkeypatch: pytest.MonkeyPatch, lacks: Iterable[str], number: int) -> None:
    """Have os.link, os.fsync of folders, os.replace of what is there, or fcntl.flock raise the error, as shares do."""
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    fsync, replace = os.fsync, os.replace
    refusing = {"os.fsync": lambda file: refuse() if stat.S_ISDIR(os.fstat(file).st_mode) else fsync(file),
                "os.replace": lambda old, new: refuse() if os.path.exists(new) else replace(old, new)}
    for name in lacks:
        monkeypatch.setattr(name, refusing.get(name, refuse))


class Payload:
    """Unpickled, it makes the file `path` by a call of os.system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@contextmanager
def output_of(command: list, **more):
    """A process that prints text, killed after ten minutes, so that a run that hangs fails a test and does not hang it.
    """
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **more) as process:
        timer = threading.Timer(600, process.kill)
        timer.start()
        try:
            yield process
            process.wait()
        finally:
            timer.cancel()

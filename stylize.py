"""Picture in, picture out."""

from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data import PictureError, denormalize, load_alpha, normalize, prepare_picture, to_pil
from network import StyleTransferNetwork
from utils import UserError, lacks_memory
from weights import load_network

DEMO_CONTENT = Path(__file__).parent / "imgs" / "content" / "brandenburg_gate.jpg"
DEMO_STYLE = Path(__file__).parent / "imgs" / "style" / "starry_night.jpg"


def open_model(load_path: str, swap_max_pool: bool, backbone: str | None) -> tuple[StyleTransferNetwork, dict]:
    """`load_network`, refusing a network of another backbone than asked for."""
    network, checkpoint = load_network(Path(load_path), swap_max_pool)
    if backbone is not None and backbone != network.config.backbone:
        raise UserError(f"--backbone {backbone}: {load_path} is a {network.config.backbone} network "
                        f"with {network.config.bottleneck_width} bottleneck channels")
    return network, checkpoint


class UnusablePicture(UserError):
    """A picture that cannot be read, or that there is too little memory for; the message names its flag and path."""


@contextmanager
def usable(path: Path, flag: str):
    """Within the block, what is wrong with the picture at `path` is raised as an UnusablePicture."""
    try:
        yield
    except PictureError as error:
        reason = too_large(path) if isinstance(error.__cause__, MemoryError) else error
        raise UnusablePicture(f"--{flag} {reason}") from error
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise UnusablePicture(f"--{flag} {too_large(path)}") from error


def load_input(path: Path, config, flag: str) -> Tensor:
    """One picture as (1, 3, H, W), uint8. Raises UnusablePicture when it cannot be used."""
    with usable(path, flag):
        return prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)


def load_transparency(path: Path, config, flag: str) -> Image.Image | None:
    """The alpha of a picture, mode L, as large as `load_input` has it; None without one. Raises UnusablePicture."""
    with usable(path, flag):
        return load_alpha(path, config.imsize, config.cropsize, config.max_pixels)


def too_large(path: Path) -> str:
    """What to say of a picture that there is too little memory for."""
    try:
        with Image.open(path) as picture:  # reads no pixel
            size = f"{picture.width} x {picture.height} pixels are"
    except Exception:  # whatever Pillow's decoders raise: the size is an extra
        size = "it is"
    return f"{path}: {size} too much for the memory; a smaller --imsize or --cropsize, or a smaller copy of it, helps"


def check_margin(margin: int) -> None:
    """Raises UserError, naming the flag, for a margin in pixels that the poolings do not divide."""
    if margin % 8:
        raise UserError(f"--margin {margin}: a multiple of 8 is needed, or 0")


@torch.inference_mode()
def encode_style(network: StyleTransferNetwork, style: Tensor, margin: int = 0) -> tuple[Tensor, Tensor]:
    """style: (1, 3, H, W), uint8, any size and device. Returns its style code on the network's device."""
    device = next(network.parameters()).device
    return network.style_code(normalize(style.to(device)), margin)


@torch.inference_mode()
def stylize(
    network: StyleTransferNetwork, content: Tensor, style_code: tuple, strength: float, margin: int = 0
) -> Tensor:
    """content: (1, 3, H, W), uint8, any size and device; margin: see `StyleTransferNetwork.stylize`.

    Returns (1, 3, H, W), ImageNet-normalised, not clipped, on the network's device.
    """
    device = next(network.parameters()).device
    return network.stylize(normalize(content.to(device)), style_code, strength, margin)


def stylize_picture(
    network: StyleTransferNetwork, content: Tensor, style_code: tuple, strength: float, margin: int = 0
) -> Image.Image:
    """content: (1, 3, H, W), uint8, any size and device. Returns a picture of exactly that size."""
    return to_pil(denormalize(stylize(network, content, style_code, strength, margin)))

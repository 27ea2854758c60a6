"""Picture in, picture out."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data import PictureError, denormalize, normalize, prepare_picture, to_pil
from network import StyleTransferNetwork
from utils import UserError
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


def load_input(path: Path, config, flag: str) -> Tensor:
    """One picture as (1, 3, H, W), uint8. Raises UserError naming the flag when it cannot be used."""
    try:
        return prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
    except PictureError as error:
        raise UserError(f"--{flag} {error}") from error


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

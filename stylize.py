"""Picture in, picture out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from control import Style
from data import (
    PictureError,
    denormalize,
    from_pil,
    load_alpha,
    normalize,
    picture_source,
    prepare_picture,
    to_pil,
)
from network import UPSAMPLINGS, StyleTransferNetwork, align
from tiling import TiledPicture, least_tile
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
        with Image.open(picture_source(Path(path))) as picture:  # reads no pixel
            size = f"{picture.width} x {picture.height} pixels are"
    except Exception:  # whatever Pillow's decoders raise: the size is an extra
        size = "it is"
    return f"{path}: {size} too much for the memory; a smaller --imsize or --cropsize, or a smaller copy of it, helps"


def check_margin(margin: int) -> None:
    """Raises UserError, naming the flag, for a margin in pixels that the poolings do not divide."""
    if margin % 8:
        raise UserError(f"--margin {margin}: a multiple of 8 is needed, or 0")


class Stylizer:
    """Paints pictures of any size by one network.

        Stylizer("model-store/compact.pth").stylize("photo.jpg", "painting.jpg", strength=0.5).save("painted.png")

    A picture is a path, a Pillow picture, or pixels of type uint8: an array (H, W, 3), or a tensor (1, 3, H, W).
    """

    def __init__(
        self, model: str | Path | StyleTransferNetwork, *, device: str | torch.device | None = None,
        upsampling: str | None = None, margin: int = 0, tile: int | None = None,
    ) -> None:
        """model: a model file, the folder of a run or a pruning, or a network.

        device: None is the GPU where there is one, for a network where it is. upsampling, margin: see
        `StyleTransferNetwork.use` and `.stylize`. tile: see `TiledPicture`.
        Raises UserError when the model cannot be loaded or a setting does not fit it.
        """
        check_margin(margin)
        if isinstance(model, StyleTransferNetwork):
            self.network, device = model, device or next(model.parameters()).device
        else:
            self.network, _ = load_network(Path(model))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network.to(self.device, memory_format=torch.channels_last)
        if upsampling not in (None, *UPSAMPLINGS):
            raise UserError(f"--upsampling {upsampling}: one of {', '.join(UPSAMPLINGS)} is needed")
        self.network.use(upsampling)
        if tile is not None and tile < least_tile(self.network.config):
            raise UserError(f"--tile {tile}: {least_tile(self.network.config)} pixels or more are needed")
        self.margin, self.tile = margin, tile

    @torch.inference_mode()
    def encode_style(self, picture) -> Style:
        """All that painting takes from a style picture."""
        (statistics,) = self.open(picture, "style").statistics()
        return Style(*statistics)

    @torch.inference_mode()
    def content_statistics(self, content: Tensor | TiledPicture) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a content picture's bottleneck, (B, C, 1, 1) each. content: see `paint`."""
        (statistics,) = self.open(content, "content").statistics()
        return statistics

    @torch.inference_mode()
    def paint(
        self, content: Tensor | TiledPicture, style: Style, strength: float = 1.0, *,
        content_statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """content: (B, 3, H, W), uint8, any size and device, or what `open` made of it, which is encoded only once.

        strength: from 0, the decoder's copy of the content, to 1, the full style. content_statistics: what to align by
        in place of the content's own. Returns (B, 3, H, W), ImageNet-normalised, not clipped, on the network's device.
        """
        content = self.open(content, "content")
        painted = torch.empty(content.pixels.shape, device=self.device)
        for rows, columns, tile in self._painted(content, style, strength, content_statistics):
            painted[:, :, rows, columns] = tile
        return painted

    @torch.inference_mode()
    def stylize(self, content, style, *, strength: float = 1.0) -> Image.Image:
        """Content and style: pictures (see the class); a style that is used often, as `encode_style` gives it.

        strength: see `paint`. Returns the painted picture, of exactly the content's size. Raises UserError when a
        picture cannot be used.
        """
        code = style if isinstance(style, Style) else self.encode_style(style)
        content = self.open(content, "content")
        painted = np.empty((*content.pixels.shape[2:], 3), np.uint8)
        for rows, columns, tile in self._painted(content, code, strength):
            painted[rows, columns] = to_pil(denormalize(tile))
        return Image.fromarray(painted)

    def open(self, picture, name: str = "content") -> TiledPicture:
        """A picture on its way through the network. name: of the argument, for errors."""
        if isinstance(picture, TiledPicture):
            return picture
        return TiledPicture(self.network, _pixels(picture, name), self.margin, self.tile)

    def _painted(
        self, content: TiledPicture, style: Style, strength: float,
        content_statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Every tile of `content` painted, see `TiledPicture.paint`."""
        if content_statistics is None:
            (content_statistics,) = content.statistics()
        return content.paint(lambda feature, rows, columns: align(feature, *content_statistics, style.mean, style.std,
                                                                  strength))


def _pixels(picture, name: str) -> Tensor:
    """A picture of any kind as (B, 3, H, W), uint8. name: of the argument. Raises UserError when it is none."""
    if isinstance(picture, (str, Path)):
        with usable(Path(picture), name):
            return prepare_picture(Path(picture))
    if isinstance(picture, Image.Image):
        try:
            return from_pil(picture)
        except PictureError as error:
            raise UserError(f"{name}: {error}") from error
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        picture = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
    if isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.ndim == 4 and picture.shape[1] == 3:
        if picture.numel():
            return picture
    got = type(picture).__name__
    if isinstance(picture, (np.ndarray, Tensor)):
        got = f"{got} of shape {tuple(picture.shape)} and type {str(picture.dtype).removeprefix('torch.')}"
    raise UserError(f"{name}: got a {got}; a path, a Pillow picture, or pixels of type uint8 are needed, an array "
                    "(H, W, 3) or a tensor (1, 3, H, W)")


# Until test mode paints by `Stylizer`.


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

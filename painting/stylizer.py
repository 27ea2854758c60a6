"""Picture in, picture out."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data import PictureError, denormalize, load_alpha, look_at, normalize, prepare_picture, to_pil
from network import StyleTransferNetwork
from painting.control import PRESERVED, MaskedStyle, Style, check_mask, check_styles, keep_colors, match_colors, mix
from painting.tiling import TILES, TiledPicture, cut, least_tile, memory_needed
from utils import UserError, free_memory, lacks_memory, note
from weights import find_model_file, load_network, model_names

ROOT = Path(__file__).parent.parent
DEMO_CONTENT = ROOT / "imgs" / "content" / "brandenburg_gate.jpg"
DEMO_STYLE = ROOT / "imgs" / "style" / "starry_night.jpg"
MOST_CHANGE = 3  # of 255: by how much half precision may change a picture
PROBE_SIDE = 256  # pixels: shorter side of the pair that this is measured on
WHOLE_SHARE = 0.8  # of the free memory, what a picture painted in one piece may take


class OpenedModel(NamedTuple):
    """A network with its name in tables and folders, its file, and what else the file says."""

    name: str
    file: Path
    network: StyleTransferNetwork
    checkpoint: dict
    sha256: str | None = None  # of the file, where it is to be told


def open_models(config) -> list[OpenedModel]:
    """The models of `load_path`. Raises UserError for an unusable one, or the same twice."""
    models = []
    for path, name in zip(config.load_path, model_names(config.load_path)):
        network, checkpoint = load_network(path, config.swap_max_pool, config.backbone, config.vgg_weights)
        file = find_model_file(Path(path))
        if any(file.samefile(model.file) for model in models):
            raise UserError(f"load_path {path}: this model is named twice")
        models.append(OpenedModel(name, file, network, checkpoint))
    return models


def common_backbone(models: Sequence[OpenedModel], flag: str, advice: str = "") -> str:
    """The models' backbone, whose VGG measures losses. Raises UserError, naming the flag, where there are several."""
    backbones = {model.network.config.backbone: model.file for model in models}
    if len(backbones) > 1:
        found = " and ".join(f"{file} is a {backbone} network" for backbone, file in backbones.items())
        raise UserError(f"{flag}: {found}; their losses are not comparable{advice}")
    return next(iter(backbones))


class UnusablePicture(UserError):
    """A picture that cannot be read, or that the memory is too small for; the message names its argument and path."""


@contextmanager
def usable(path, name: str):
    """What is wrong with a picture, a path or Pillow's, raises UnusablePicture in the block. name: of its argument."""
    try:
        yield
    except (PictureError, MemoryError, RuntimeError) as error:
        if lacks_memory(error) or isinstance(error.__cause__, MemoryError):
            width, height = seen.size if (seen := look_at(path)) else "??"
            error = (f"{path}: {width} x {height} pixels are too much for the memory; a smaller imsize or cropsize, a "
                     "smaller copy of it, or in test mode a smaller tile helps")
        elif not isinstance(error, PictureError):
            raise
        raise UnusablePicture(f"{name} {error}") from None


def load_input(path: Path, config, name: str, least_side: int = 1) -> Tensor:
    """One picture, (1, 3, H, W), uint8. Raises UnusablePicture, also where a side is below `least_side` pixels."""
    with usable(path, name):
        picture = prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
        height, width = picture.shape[2:]
        if min(height, width) < least_side:
            raise PictureError(f"{path}: {width} x {height} pixels; measuring takes {least_side} or more a side")
        return picture


class Stylizer:
    """Paints pictures of any size by one network.

        Stylizer("model-store/compact.pth").stylize("photo.jpg", "painting.jpg", strength=0.5).save("painted.png")

    A picture is a path, a Pillow picture, or pixels of type uint8: an array (H, W, 3), or a tensor (1, 3, H, W).
    """

    def __init__(self, model: str | Path | StyleTransferNetwork, *, device: str | torch.device | None = None,
                 upsampling: str | None = None, tile: int | None = None, vgg_weights: str | Path | None = None) -> None:
        """model: a model file, the folder of a run or a pruning, or a network, which is copied.

        device: None is the GPU where there is one, for a network where it is. upsampling: in the decoder, of network's
        UPSAMPLINGS; None is as the network does it. tile: see `TiledPicture`; None paints in tiles where the whole
        picture would not fit the free memory. vgg_weights: the encoder of a decoder.pth, see `load_network`.
        Raises UserError when the model cannot be loaded or a setting does not fit it.
        """
        if isinstance(model, StyleTransferNetwork):
            self.network = copy.deepcopy(model)
            device = next(model.parameters()).device if device is None else device
        else:
            if not isinstance(model, (str, Path)):
                raise UserError(f"model: got a {type(model).__name__}; a path or a StyleTransferNetwork is needed")
            with torch.random.fork_rng(devices=()):  # the program's random numbers stay what they would have been
                self.network, _ = load_network(Path(model), flag="model", vgg_weights=vgg_weights)
        try:
            device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
            self.device = torch.device(device)
            self.network.to(self.device, memory_format=torch.channels_last)
        except (RuntimeError, AssertionError) as error:  # none of this name, or none here, or torch was built without
            if lacks_memory(error):
                raise
            raise UserError(f"device {device}: cannot be used ({str(error).splitlines()[0]})") from error
        self.network.use(upsampling)
        least = least_tile(self.network.config)
        if tile is not None and not (isinstance(tile, Integral) and tile >= least):
            raise UserError(f"tile {tile}: {least} pixels or more are needed")
        self.tile = tile
        self._told = set()  # sizes of pictures of which `_tile_for` has said that they are painted in tiles

    def encode_style(self, picture) -> Style:
        """All that painting takes from a style picture."""
        return Style(*self.open(picture, "style").statistics()[0])

    @torch.inference_mode()
    def paint(self, content, style, strength: float = 1.0, *, keeps_colors: bool = False) -> Tensor:
        """content: (B, 3, H, W), uint8, any size and device, or what `open` made of it, which is encoded only once.

        style: of `encode_style` or `combine`. strength: from 0, the decoder's copy of the content, to 1, the full
        style. keeps_colors: as `control.keep_colors` does. Returns (B, 3, H, W), ImageNet-normalised, not clipped, on
        the network's device.
        """
        content = self.open(content)
        painted = content.like.new_empty(content.pixels.shape)
        for rows, columns, tile in self._painted(content, style, strength, keeps_colors):
            cut(painted, rows, columns).copy_(tile)
        return painted

    @torch.inference_mode()
    def paint_picture(self, content, style, strength: float = 1.0, *, keeps_colors: bool = False) -> Image.Image:
        """`paint` of one content, as a picture: in tiles, nothing else is as large. Raises UserError if not finite."""
        content = self.open(content)
        painted = Image.new("RGB", content.pixels.shape[:1:-1])
        for rows, columns, tile in self._painted(content, style, strength, keeps_colors):
            painted.paste(to_pil(denormalize(tile)), (columns.start, rows.start))
        return painted

    def stylize(self, content, style, *, strength: float = 1.0, style_weights: Sequence[float] | None = None, mask=None,
                preserve_color: str | None = None, style_size: int | None = None) -> Image.Image:
        """The painted picture, of exactly the content's size: RGB, or RGBA where the content is transparent.

        content: a picture (see the class). style: a picture, or as `encode_style` gives it; a list of them with
        style_weights, see `control.mix`, or of two with mask. strength: see `paint`. mask: a picture of the content's
        aspect, white where the first style is painted, black where the second is. preserve_color: luma, see
        `control.keep_colors`, or histogram, see `control.match_colors`. style_size: what the shorter sides of the
        styles are resized to, pixels: the scale of their strokes.
        Raises UserError when a picture cannot be used or is not painted with finite values, or when the settings do not
        fit each other.
        """
        if preserve_color not in (None, *PRESERVED):
            raise UserError(f"preserve_color {preserve_color}: one of {', '.join(PRESERVED)} is needed")
        if not (isinstance(strength, Real) and 0 <= strength <= 1):
            raise UserError(f"strength {strength}: a number from 0 to 1 is needed")
        if style_size is not None and not (isinstance(style_size, Integral) and style_size >= 1):
            raise UserError(f"style_size {style_size}: a whole number, 1 or more, is needed")
        with usable(content, "content"):
            alpha = load_alpha(content) if isinstance(content, (str, Path, Image.Image)) else None
        content = self.open(content)
        styles = style if isinstance(style, (list, tuple)) else [style]
        change = "style_size" if style_size else "preserve_color histogram" if preserve_color == "histogram" else None
        if change and any(isinstance(each, Style) for each in styles):
            raise UserError(f"{change}: a style that is encoded already cannot be changed; a picture is needed")
        check_styles(len(styles), style_weights, mask)
        mask = None if mask is None else open_mask(mask)
        check_mask(mask, content.pixels)
        styles = [each if isinstance(each, Style) else _pixels(each, "style", style_size) for each in styles]
        for name, each in (("content", content.pixels), *(("style", each) for each in styles)):
            number = len(each.mean if isinstance(each, Style) else each)
            if number != 1:
                raise UserError(f"{name}: got {number} pictures in one tensor; one is needed (`paint` takes several)")
        code = self.combine(styles, style_weights, mask, content.pixels if preserve_color == "histogram" else None)
        painted = self.paint_picture(content, code, strength, keeps_colors=preserve_color == "luma")
        if alpha is not None:
            painted.putalpha(alpha)
        return painted

    def open(self, picture, name: str = "content") -> TiledPicture:
        """A picture on its way through the network. name: of the argument, for errors."""
        if isinstance(picture, TiledPicture):
            return picture
        pixels = _pixels(picture, name)
        return TiledPicture(self.network, pixels, self.tile or self._tile_for(pixels))

    def _tile_for(self, pixels: Tensor) -> int | None:
        """The tile to paint a picture in: None where there is memory for the whole. Says so where there is not."""
        needed, free = memory_needed(self.network.config, pixels.numel() // 3), free_memory(self.device)
        if needed < WHOLE_SHARE * free:
            return None
        tile = next((each for each in TILES if memory_needed(self.network.config, each * each) < 0.5 * free), TILES[-1])
        if pixels.shape not in self._told:
            self._told.add(pixels.shape)
            height, width = pixels.shape[2:]
            note(f"{width} x {height} pixels would take about {needed / 2**30:.1f} GiB in one piece, "
                 f"{free / 2**30:.1f} GiB are free: painted in tiles of {tile} pixels (tile)")
        return tile

    def combine(self, styles: Sequence, weights: Sequence[float] | None = None, mask: Image.Image | None = None,
                colors_of: Tensor | None = None) -> Style | MaskedStyle:
        """One style of several that `check_styles` lets pass: of encoded ones, or of pixels, (1, 3, H, W), uint8, which
        get the colours of others first where there is `colors_of`."""
        styles = [each if isinstance(each, Style) else
                  self.encode_style(each if colors_of is None else match_colors(each, colors_of.to(each.device)))
                  for each in styles]
        if mask is not None:
            return MaskedStyle(*styles, mask)
        return styles[0] if weights is None else mix(styles, weights)

    def _painted(self, content: TiledPicture, style: Style | MaskedStyle, strength: float,
                 keeps_colors: bool) -> Iterator[tuple[range, range, Tensor]]:
        """Every tile of `content` painted, see `TiledPicture.paint`."""
        for rows, columns, tile in content.paint(style, strength):
            if keeps_colors:
                shown = cut(content.pixels, rows, columns).to(self.device)
                tile = normalize(255.0 * keep_colors(shown.float() / 255.0, denormalize(tile)))
            yield rows, columns, tile


def open_mask(picture) -> Image.Image:
    """A picture of any kind, see `Stylizer`, or an array (H, W), as a mask: mode L."""
    if isinstance(picture, np.ndarray) and picture.ndim == 2:
        picture = np.dstack([picture] * 3)
    return to_pil_image(_pixels(picture, "mask")[0]).convert("L")


def _pixels(picture, name: str, size: int | None = None) -> Tensor:
    """A picture of any kind as (B, 3, H, W), uint8; with `size`, resized so that its shorter side has this many pixels.
    name: of the argument. Raises UserError when it is none."""
    if isinstance(picture, (str, Path, Image.Image)):
        with usable(picture, name):
            return prepare_picture(picture, size)
    got = f"{type(picture).__name__} {getattr(picture, 'shape', '')} {getattr(picture, 'dtype', '')}".strip()
    if isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.dtype == np.uint8:
        picture = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy())
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.ndim != 4 or picture.shape[1] != 3 \
            or not picture.numel():
        raise UserError(f"{name}: got a {got}; a path, a Pillow picture, or pixels of type uint8 are needed, an array "
                        "(H, W, 3) or a tensor (1, 3, H, W)")
    return picture if size is None else prepare_picture(to_pil_image(picture[0]), size)


def half_dtype(device: torch.device) -> torch.dtype | None:
    """float16 on GPUs that are fast in it, of compute capability 7.0 or newer. CPUs are fast in bfloat16 alone, which
    changes pictures of the models in model-store by up to 18 of 255."""
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if is_fast else None


def decode_in_half(stylizer: Stylizer, name: str) -> None:
    """`--amp auto`: compute the decoder in `half_dtype`, where there is one, and where that changes the picture of the
    bundled pair by at most MOST_CHANGE; says where it does not. name: of the model.

    The encoder and the statistics stay in float32: AdaIN divides by the content's deviation, which makes an encoder's
    rounding in channels that hardly respond as large as what the style's channels do.
    """
    dtype, decoder = half_dtype(stylizer.device), stylizer.network.decoder
    if dtype is None:
        return
    pair = [prepare_picture(path, PROBE_SIDE) for path in (DEMO_CONTENT, DEMO_STYLE)]
    in_float32, desired = decoder.forward, np.asarray(stylizer.stylize(*pair), int)
    decoder.forward = torch.autocast(stylizer.device.type, dtype)(in_float32)
    try:
        change = np.abs(desired - np.asarray(stylizer.stylize(*pair), int)).max()
    except UserError:  # not finite: float16 ends at 65504
        change = 255
    if change > MOST_CHANGE:
        decoder.forward = in_float32
        note(f"--amp auto: {name} stays in float32: in {str(dtype).removeprefix('torch.')} a picture changes by "
             f"{change} of 255")


def make_stylizers(config, models: Sequence[OpenedModel], device: torch.device) -> dict[Path, Stylizer]:
    """One for each model, by its file. config: a TestConfig."""
    stylizers = {model.file: Stylizer(model.network, device=device, upsampling=config.upsampling, tile=config.tile)
                 for model in models}
    for model in models if config.amp == "auto" else ():
        decode_in_half(stylizers[model.file], model.name)
    return stylizers

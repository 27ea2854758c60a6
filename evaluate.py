"""`--mode test`: stylise pictures with a full or pruned network."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import (
    MAX_PIXELS,
    OUTPUT_FORMATS,
    PictureError,
    denormalize,
    find_pictures,
    normalize,
    prepare_picture,
    save_picture,
    to_pil,
)
from network import StyleTransferNetwork, load_network
from utils import UserError, make_folder, note, progress_bar, resolve_device

CELL = 256  # pixels: side of a picture in the contact sheet
SHEET_SIDE = 8192  # pixels: no contact sheet is larger; its cells shrink instead
SMALLEST_CELL = 16


@dataclass(frozen=True)
class TestConfig:
    """Every setting of test mode, with its default."""

    __test__ = False  # not a pytest class

    load_path: str | None = None
    content: str | None = None
    style: str | None = None
    save_path: str | None = None
    backbone: str | None = None
    swap_max_pool: bool = False
    style_strength: float = 1.0
    imsize: int | None = None
    cropsize: int | None = None
    max_pixels: int = MAX_PIXELS
    gpu_no: int | None = None

    def check(self) -> None:
        """Raises UserError for what is missing."""
        for flag in ("load_path", "content", "style", "save_path"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is needed in test mode")


def open_model(load_path: str, swap_max_pool: bool, backbone: str | None) -> tuple[StyleTransferNetwork, dict]:
    """`load_network`, refusing a network of another backbone than asked for."""
    network, checkpoint = load_network(Path(load_path), swap_max_pool)
    if backbone is not None and backbone != network.config.backbone:
        raise UserError(f"--backbone {backbone}: {load_path} is a {network.config.backbone} network "
                        f"with {network.config.bottleneck_width} bottleneck channels")
    return network, checkpoint


def load_input(path: Path, config, flag: str) -> torch.Tensor:
    """One picture as (1, 3, H, W), uint8. Raises UserError naming the flag when it cannot be used."""
    try:
        return prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
    except PictureError as error:
        raise UserError(f"--{flag} {error}") from error


@torch.inference_mode()
def encode_style(network: StyleTransferNetwork, style: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """style: (1, 3, H, W), uint8, any size and device. Returns its style code on the network's device."""
    device = next(network.parameters()).device
    return network.style_code(normalize(style.to(device)))


@torch.inference_mode()
def stylize_picture(
    network: StyleTransferNetwork, content: torch.Tensor, style_code: tuple, strength: float
) -> Image.Image:
    """content: (1, 3, H, W), uint8, any size and device. Returns a picture of exactly that size."""
    device = next(network.parameters()).device
    output = network.stylize(normalize(content.to(device)), style_code, strength)
    return to_pil(denormalize(output))


def _input_paths(path: str, flag: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the pictures: one, or all of a folder."""
    path = Path(path)
    if path.is_dir():
        return path, find_pictures(path, f"--{flag}")
    return path.parent, [path]


def _names(root: Path, paths: list[Path]) -> list[str]:
    """A file-name part for each picture, unique among them: its path below `root`, without the suffix
    unless two pictures differ in nothing else."""
    stems = ["-".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}-{path.suffix[1:]}" for stem, path in zip(stems, paths)]


def test(given: dict) -> int:
    """Run `--mode test` with the flags given on the command line. Returns the exit code."""
    config = TestConfig(**given)
    config.check()
    device = resolve_device(config.gpu_no)
    content_root, contents = _input_paths(config.content, "content")
    style_root, styles = _input_paths(config.style, "style")
    save_path = Path(config.save_path)
    to_file = save_path.suffix.lower() in OUTPUT_FORMATS
    is_single = not (Path(config.content).is_dir() or Path(config.style).is_dir())
    if to_file and not is_single:
        raise UserError(f"--save_path {save_path}: one file cannot hold {len(contents)} x {len(styles)} pictures; "
                        "name a folder")
    network, _ = open_model(config.load_path, config.swap_max_pool, config.backbone)
    network = network.to(device, memory_format=torch.channels_last)

    if is_single:
        code = encode_style(network, load_input(styles[0], config, "style"))
        picture = stylize_picture(network, load_input(contents[0], config, "content"), code, config.style_strength)
        if to_file:
            make_folder(save_path.parent, "--save_path")
        else:
            make_folder(save_path, "--save_path")
            save_path = save_path / f"{contents[0].stem}_{styles[0].stem}.png"
        save_picture(picture, save_path)
        note(f"wrote {save_path} ({picture.width} x {picture.height})")
        return 0

    make_folder(save_path, "--save_path")
    _stylize_all(network, config, (content_root, contents), (style_root, styles), save_path)
    note(f"wrote {len(contents) * len(styles)} pictures and contact_sheet.png to {save_path}")
    return 0


def _stylize_all(
    network: StyleTransferNetwork, config: TestConfig, contents: tuple[Path, list[Path]],
    styles: tuple[Path, list[Path]], folder: Path,
) -> None:
    """Every content with every style, and the contact sheet. contents, styles: from `_input_paths`."""
    sheet = _Sheet(len(contents[1]), len(styles[1]))
    codes = []
    for column, path in enumerate(styles[1], 1):
        picture = load_input(path, config, "style")
        codes.append(encode_style(network, picture))
        sheet.place(to_pil(picture.float() / 255.0), 0, column)
    content_names, style_names = _names(*contents), _names(*styles)
    with progress_bar(len(content_names) * len(style_names), "stylise", "picture") as bar:
        for row, (path, content_name) in enumerate(zip(contents[1], content_names), 1):
            picture = load_input(path, config, "content")
            sheet.place(to_pil(picture.float() / 255.0), row, 0)
            for column, (code, style_name) in enumerate(zip(codes, style_names), 1):
                output = stylize_picture(network, picture, code, config.style_strength)
                save_picture(output, folder / f"{content_name}_{style_name}.png")
                sheet.place(output, row, column)
                bar.update()
    sheet.save(folder / "contact_sheet.png")


class _Sheet:
    """A contact sheet: styles along the top, contents down the left, the outputs between."""

    def __init__(self, contents: int, styles: int) -> None:
        longest = max(contents, styles) + 1
        self.cell = min(CELL, SHEET_SIDE // longest)
        self.image = None
        if self.cell >= SMALLEST_CELL:
            self.image = Image.new("RGB", ((styles + 1) * self.cell, (contents + 1) * self.cell), "white")

    def place(self, picture: Image.Image, row: int, column: int) -> None:
        if self.image is None:
            return
        inner = self.cell - max(2, self.cell // 32)
        picture = picture.copy()
        picture.thumbnail((inner, inner))
        left = column * self.cell + (self.cell - picture.width) // 2
        top = row * self.cell + (self.cell - picture.height) // 2
        self.image.paste(picture, (left, top))

    def save(self, path: Path) -> None:
        if self.image is None:
            note(f"no {path.name}: more than {SHEET_SIDE // SMALLEST_CELL - 1} pictures on a side do not fit")
            return
        # A light rule sets the inputs off from the outputs.
        draw = ImageDraw.Draw(self.image)
        draw.line([(self.cell, 0), (self.cell, self.image.height)], fill="#888888")
        draw.line([(0, self.cell), (self.image.width, self.cell)], fill="#888888")
        save_picture(self.image, path)

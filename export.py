"""`--mode export`: a model as ONNX, torch.export, safetensors or a page, checked before it is left on the disk."""

import math
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import MAX_PIXELS, normalize
from exporting.formats import FORMATS, ONNX, check_files, make_files, need_packages, open_painter
from exporting.graphs import fill_up
from exporting.integers import fill_for_integers, quantize_files
from exporting.webpage import CHANNEL_MULTIPLE, check_page_folder, find_styles, page_files, runtime_files, write_page
from folders import find_pictures, only_held_out, split_holdout
from painting.pairs import choose_pairs
from painting.quality import MIN_SIDE, Measurement, Meter, ssim
from painting.stylizer import load_input
from settings import check_needed, setting
from utils import UserError, describe_device, make_folder, note, show, time_in_turns, write_atomically
from weights import find_model_file, load_network

CPU = torch.device("cpu")
INT8_TOLERANCE = 1.0  # any: only sizes and finite values are checked, `compare` measures the rest with photographs
CALIBRATION_PAIRS = 16
THREADS = (1, 2)
TIMED_RUNS = 15


@dataclass(frozen=True)
class ExportConfig:
    """Every setting of export mode, with its default."""

    load_path: str | None = setting(needed=True)
    save_path: str | None = setting(
        more=f"also a file, whose format its suffix says: {', '.join(FORMATS)}; FOLDER/ gets a page that paints in the "
        "browser", needed=True)
    backbone: str | None = None
    swap_max_pool: bool = False
    upsampling: str | None = None  # None: as the file says
    split: bool = setting(
        False, "two .onnx files, NAME.style.onnx from a style to its statistics and NAME.content.onnx from a content "
        "and such statistics to the picture, so that a style is encoded only once", "output")
    int8: bool = setting(
        False, "integers of 8 bits in place of float32 in .onnx files: faster on CPUs, a quarter of the size; ranges "
        f"are measured with {CALIBRATION_PAIRS} pairs of --content_dir and --style_dir, and what it changes with "
        "held-out ones", "output")
    content_dir: str | None = None
    style_dir: str | None = setting(more="the styles of a page, in place of the bundled ones")
    holdout: float = setting(0.1, more="--int8 is compared by it")
    imsize: int | None = 384
    cropsize: int | None = setting(384, more="it is cut from the centre")
    max_pixels: int = MAX_PIXELS
    pairs: int = setting(20, more="held-out ones, which compare integers with float32")
    vgg_weights: str = "bundled"
    seed: int = setting(0, more="of --pairs and of --vgg_weights random")

    @property
    def is_page(self) -> bool:
        """Whether a folder is written, a page: `save_path` ends in a slash, or is a folder without a format's name."""
        path = Path(self.save_path)
        return self.save_path.endswith(("/", os.sep)) or (path.suffix.lower() not in FORMATS and path.is_dir())

    @property
    def suffix(self) -> str:
        """Of the files that are written: a page holds ONNX files."""
        return ONNX if self.is_page else Path(self.save_path).suffix.lower()

    def check(self) -> None:
        """Raises UserError for what is missing or contradicts itself."""
        check_needed(self, "export")
        if self.suffix not in FORMATS:
            raise UserError(f"save_path {self.save_path}: a name that ends in {', '.join(FORMATS[:-1])} or "
                            f"{FORMATS[-1]} is needed, or for a page one that ends in /")
        for name in ("split", "int8"):
            if getattr(self, name) and (self.is_page or self.suffix != ONNX):
                raise UserError(f"{name}: only for {ONNX} files, save_path {self.save_path} is none")
        for name in ("content_dir", "style_dir"):
            if self.int8 and not getattr(self, name):
                raise UserError(f"int8: {name} is needed, pictures that the ranges are measured with")
        if self.int8 and not self.holdout:
            raise UserError("int8 with holdout 0: some pictures must be held out, to compare with float32")
        if self.style_dir is not None and not self.is_page and not self.int8:
            raise UserError(f"style_dir: only a page has styles, save_path {self.save_path} is none; end it with /")


Pairs = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by number: content and style, (1, 3, H, W), uint8


def load_pairs(config: ExportConfig) -> list[Pairs]:
    """Contents and styles to measure ranges with, and held-out ones to compare by. Raises UserError for folders without
    such pictures, or pictures that cannot be used."""
    names = ("content_dir", "style_dir")
    found = [(find_pictures(getattr(config, name), f"--{name}"), config.holdout, f"--{name} {getattr(config, name)}")
             for name in names]
    learned, held_out = [split_holdout(*each)[0] for each in found], [only_held_out(*each) for each in found]
    loaded = []
    for paths, count in ((learned, CALIBRATION_PAIRS), (held_out, config.pairs)):
        numbers = choose_pairs(*map(len, paths), min(count, math.prod(map(len, paths))), config.seed)
        loaded.append({pair: tuple(load_input(paths[kind][pair[kind]], config, name, MIN_SIDE)
                                   for kind, name in enumerate(names)) for pair in numbers})
    return loaded


def compare(made: dict[str, dict[Path, bytes]], pairs: Pairs, meter: Meter) -> None:
    """Print what integers cost in quality, on the held-out pairs, and what they save in size and time. made: the files,
    first in float32, then in integers, by what is printed for them."""
    painters = [open_painter(files) for files in made.values()]
    losses, alike, largest = [], [], []
    for content, style in pairs.values():
        painted = [paint(content, style, 1.0) for paint in painters]
        losses.append(meter.measure(meter.open_content(content), meter.open_style(style),
                                    [normalize(picture * 255.0) for picture in painted]))
        alike.append(ssim(*painted).item())
        largest.append((painted[0] - painted[1]).abs().max().item())
    show(Measurement(torch.stack(losses).numpy(), list(pairs), list(made), meter.metrics).table())
    show(f"int8 against float32: SSIM {statistics.mean(alike):.4f} (least {min(alike):.4f}), largest difference of a "
         f"colour value {statistics.mean(largest):.3f} of 1 (most {max(largest):.3f})")
    for name, files in made.items():
        show(f"{name}: {sum(map(len, files.values())) / 2**20:.2f} MiB")
    height, width = content.shape[2:]
    for threads in THREADS:
        calls = [partial(open_painter(files, threads), content, style, 1.0) for files in made.values()]
        times = [statistics.median(taken) * 1000 for taken in time_in_turns(calls, TIMED_RUNS, CPU)]
        show(f"a pair, content of {width} x {height}, {threads} threads: float32 {times[0]:.1f} ms, int8 "
             f"{times[1]:.1f} ms (medians of {TIMED_RUNS})")
    show(describe_device(CPU))


def export(given: dict) -> int:
    """Run `--mode export` with the flags given on the command line. Returns the exit code."""
    config = ExportConfig(**given)
    config.check()
    need_packages(config.suffix)
    path = Path(config.save_path)
    if config.is_page:
        check_page_folder(path)
        runtime_files()  # what is missing is said before anything takes time
        styles = find_styles(config.style_dir, path)
    elif path.is_dir():
        raise UserError(f"save_path {path}: is a folder, the name of a file is needed")
    network, checkpoint = load_network(config.load_path, config.swap_max_pool, config.backbone, config.vgg_weights)
    network.use(config.upsampling)
    network.requires_grad_(False)
    if path.exists() and path.samefile(find_model_file(Path(config.load_path))):
        raise UserError(f"save_path {path}: would overwrite the model that load_path names; choose another")
    make_folder(path.parent, "--save_path")
    if config.int8:
        calibration, held_out = load_pairs(config)
        meter = Meter(("content", "style"), network.config.backbone, config.vgg_weights, "meanstd", config.seed, CPU)

    if config.is_page:
        network = fill_up(network, CHANNEL_MULTIPLE)
    files = make_files(network, checkpoint, path / f"page{ONNX}" if config.is_page else path,
                       split=config.split or config.is_page)
    show(f"{'in float32 ' if config.int8 else ''}at most {check_files(files, network):.1g} of 1 from PyTorch's "
          "pictures of several sizes")
    if config.is_page:
        page = page_files(network, Path(config.load_path).stem, *files.values(), styles)
        write_page(path, page)
        note(f"wrote a page of {len(page)} files ({sum(map(len, page.values())) / 2**20:.1f} MiB) to {path}; to see "
             f"it: python exporting/page/serve.py {path}")
        return 0
    if config.int8:
        filled = make_files(fill_for_integers(network), checkpoint, path, config.split)
        float_files, files = files, quantize_files(filled, [*calibration.values()])
        check_files(files, network, INT8_TOLERANCE)
        compare({"float32": float_files, "int8": files}, held_out, meter)
    for file, content in files.items():
        write_atomically(file, lambda out, content=content: out.write(content), durable=True)
    sizes = ", ".join(f"{file.name} ({len(content) / 2**20:.2f} MiB)" for file, content in files.items())
    note(f"wrote {sizes} to {path.parent}")
    return 0

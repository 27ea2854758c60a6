"""`--mode export`: a model as ONNX, torch.export program or safetensors, checked before it is left on the disk."""

import importlib
import io
import itertools
import json
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from data import MAX_PIXELS, denormalize, find_split, normalize
from exporting.graphs import ContentGraph, Graph, PairGraph, StyleGraph, fill_up, trace
from exporting.integers import INTEGER_MULTIPLE, quantize
from exporting.webpage import CHANNEL_MULTIPLE, check_page_folder, find_styles, page_files, runtime_files, write_page
from network import StyleTransferNetwork
from painting.pairs import choose_pairs
from painting.quality import Measurement, Meter, check_measurable, ssim
from painting.stylizer import load_input, open_model, usable
from settings import setting
from utils import UserError, describe_device, make_folder, note, time_in_turns, write_atomically
from weights import SAFETENSORS, find_model_file, load_network, pack_safetensors

ONNX, TORCH_EXPORT = ".onnx", ".pt2"
FORMATS = (ONNX, TORCH_EXPORT, SAFETENSORS)
PAGE = "page"  # for the browser: a folder
SPLIT = {"style": StyleGraph, "content": ContentGraph}

# Older ones fail on our graphs.
GRAPH_TORCH = "2.9"
ONNX_PACKAGES = {"onnx": "1.18", "onnxscript": "0.7", "onnxruntime": "1.23"}

# What every export is painted with, (height, width): odd, small, not square, multiples of 8 and not.
CONTENT_SIZES = ((48, 64), (61, 83), (5, 9), (24, 107))
STYLE_SIZES = ((40, 40), (33, 57), (90, 7))
STRENGTHS = (1.0, 0.6, 0.0)
TOLERANCE = 1e-3  # of colour values 0..1
INT8_TOLERANCE = 1.0  # any: only sizes and finite values are checked, `compare` measures the rest with photographs

CALIBRATION_PAIRS = 16
THREADS = (1, 2)
TIMED_RUNS = 15

# From content (B, 3, H, W), style (B, 3, H', W'), both RGB of 0..1, and a strength, to the picture (B, 3, H, W).
Painter = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class ExportConfig:
    """Every setting of export mode, with its default."""

    load_path: str | None = setting(needed=True)
    save_path: str | None = setting(
        more=f"a file, whose format its suffix says: {', '.join(FORMATS)}; or FOLDER/, for a page that paints in the "
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
    cropsize: int | None = setting(384, more="cut from the centre")
    max_pixels: int = MAX_PIXELS
    pairs: int = setting(20, more="the held-out ones that compare integers with float32")
    vgg_weights: str = "bundled"
    seed: int = setting(0, more="of --pairs and of --vgg_weights random")

    @property
    def format(self) -> str:
        """PAGE for a folder, else one of FORMATS, as the suffix of `save_path` says."""
        suffix = Path(self.save_path).suffix.lower()
        is_folder = self.save_path.endswith(("/", os.sep)) or (suffix not in FORMATS and Path(self.save_path).is_dir())
        return PAGE if is_folder else suffix

    def check(self) -> None:
        """Raises UserError for what is missing or contradicts itself."""
        for flag in ("load_path", "save_path"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is needed in export mode")
        if self.format not in (*FORMATS, PAGE):
            raise UserError(f"--save_path {self.save_path}: a name that ends in {', '.join(FORMATS[:-1])} or "
                            f"{FORMATS[-1]} is needed, or for a page one that ends in /")
        if self.split and self.format != ONNX:
            raise UserError(f"--split: only {ONNX} files are split, --save_path {self.save_path} is none")
        if self.int8 and self.format != ONNX:
            raise UserError(f"--int8: only {ONNX} files are quantised, --save_path {self.save_path} is none")
        for flag in ("content_dir", "style_dir"):
            if self.int8 and not getattr(self, flag):
                raise UserError(f"--int8: --{flag} is needed, pictures that the ranges are measured with")
        if self.int8 and not self.holdout:
            raise UserError("--int8 with --holdout 0: some pictures must be held out, to compare with float32")
        if self.style_dir is not None and self.format != PAGE and not self.int8:
            raise UserError(f"--style_dir: only a page has styles, --save_path {self.save_path} is none; end it with /")


def need_packages(format: str) -> None:
    """Raises UserError where what a graph is made and checked with is missing or too old. format: any but SAFETENSORS.
    """
    if torch.__version__ < GRAPH_TORCH:
        raise UserError(f"--save_path: {ONNX} and {TORCH_EXPORT} files need torch {GRAPH_TORCH} or newer, this is "
                        f"{torch.__version__}; {SAFETENSORS} files do not")
    if format == TORCH_EXPORT:
        return
    for name, oldest in ONNX_PACKAGES.items():
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            reason = str(error)
        else:
            if TorchVersion(package.__version__) >= oldest:
                continue
            reason = f"got {name} {package.__version__}, {oldest} or newer is needed"
        raise UserError(f"--save_path: {ONNX} files need more packages ({reason}); in the toolkit's folder: "
                        "pip install '.[export]'")


# ------------------------------------------------------------------------------------------------ formats


def to_onnx(graph: Graph, network: StyleTransferNetwork) -> bytes:
    """The graph as an ONNX file with its weights inside."""
    program = trace(graph)
    axes = {name: {axis: torch.export.Dim(dim) for axis, dim in dims.items()} for name, dims in graph.inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that inputs share an axis's name
        exported = torch.onnx.export(program, input_names=list(graph.inputs), output_names=list(graph.outputs),
                                     dynamic_shapes=axes, verbose=False)
    model = exported.model_proto
    for name, value in describe(network).items():
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def describe(network: StyleTransferNetwork) -> dict[str, str]:
    """What a file says of itself beside its graph."""
    return {"config": json.dumps(network.config.to_dict())}


def to_torch_export(graph: Graph, network: StyleTransferNetwork) -> bytes:
    """The graph as `torch.export.load` reads it."""
    buffer = io.BytesIO()
    torch.export.save(trace(graph), buffer, extra_files=describe(network))
    return buffer.getvalue()


def onnx_session(content: bytes, threads: int = 0):
    """An onnxruntime session on the CPU. threads: 0 for one a core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run: in the way of others
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_onnx(session, **inputs: Tensor) -> list[Tensor]:
    """The outputs of a session, as tensors."""
    return [torch.from_numpy(output) for output in session.run(None, {name: each.numpy() for name, each in
                                                                      inputs.items()})]


def onnx_painter(content: bytes, threads: int = 0) -> Painter:
    session = onnx_session(content, threads)
    return lambda picture, style, strength: run_onnx(
        session, content=picture, style=style, strength=torch.tensor([strength]))[0]


def split_painter(style_graph: bytes, content_graph: bytes, threads: int = 0) -> Painter:
    style_session, content_session = onnx_session(style_graph, threads), onnx_session(content_graph, threads)

    def paint(content: Tensor, style: Tensor, strength: float) -> Tensor:
        mean, std = run_onnx(style_session, style=style)
        return run_onnx(content_session, content=content, mean=mean, std=std, strength=torch.tensor([strength]))[0]

    return paint


def torch_export_painter(content: bytes) -> Painter:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda picture, style, strength: module(picture, style, torch.tensor([strength]))


def safetensors_painter(content: bytes) -> Painter:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"copy{SAFETENSORS}"
        copy.write_bytes(content)
        return network_painter(load_network(copy)[0])


def network_painter(network: StyleTransferNetwork) -> Painter:
    """How this toolkit itself paints."""
    def paint(content: Tensor, style: Tensor, strength: float) -> Tensor:
        return denormalize(network(normalize(content * 255.0), normalize(style * 255.0), strength))

    return paint


# ------------------------------------------------------------------------------------------------ check


def check_picture(generator: torch.Generator, batch: int, size: tuple[int, int]) -> Tensor:
    """Blobs with grain, (batch, 3, *size), 0..1: smooth and rough, and no two alike."""
    blobs, grain = (torch.rand(batch, 3, *sides, generator=generator) for sides in ((3, 3), size))
    blobs = torch.nn.functional.interpolate(blobs, size=size, mode="bilinear")
    return (0.8 * blobs + 0.2 * grain).clamp(0.0, 1.0)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@torch.inference_mode()
def largest_difference(
    painter: Painter, network: StyleTransferNetwork, flag: str, tolerance: float = TOLERANCE
) -> float:
    """The largest difference of a colour value, 0..1, from what this toolkit paints: every content size with every
    style size, strengths and batches in turn.

    Raises UserError, beginning with `flag`, for the first size at which it is above `tolerance`.
    """
    desired_painter, generator = network_painter(network), torch.Generator().manual_seed(0)
    largest = 0.0
    for number, (size, style_size) in enumerate(itertools.product(CONTENT_SIZES, STYLE_SIZES)):
        batch, strength = 1 + number % 2, STRENGTHS[number % len(STRENGTHS)]
        content, style = (check_picture(generator, batch, sides) for sides in (size, style_size))
        at = (f"for a content of {size[0]} x {size[1]} and a style of {style_size[0]} x {style_size[1]} pixels, "
              f"batch {batch}, strength {strength:g}")
        try:
            actual = painter(content, style, strength)
        except Exception as error:  # as above
            raise UserError(f"{flag}: the exported file fails {at} ({_first_line(error)}); nothing was "
                            "written") from error
        desired = desired_painter(content, style, strength)
        if actual.shape != desired.shape:
            raise UserError(f"{flag}: the exported file returns {tuple(actual.shape)} in place of "
                            f"{tuple(desired.shape)} {at}; nothing was written")
        difference = (actual - desired).abs().max().item()
        if not difference <= tolerance:  # NaN is not, either
            raise UserError(f"{flag}: the exported file differs from PyTorch by {difference:.2g} of 1 {at}, at most "
                            f"{tolerance:g} is allowed; nothing was written")
        largest = max(largest, difference)
    return largest


# ------------------------------------------------------------------------------------------------ int8


class PicturePairs:
    """Pairs to measure ranges with, and held-out ones to compare by, each (1, 3, H, W), uint8, of the folders."""

    def __init__(self, config: ExportConfig) -> None:
        """Raises UserError for folders without such pictures, or pictures that cannot be read."""
        learned, held_out = zip(*(find_split(getattr(config, flag), f"--{flag}", config.holdout)
                                  for flag in ("content_dir", "style_dir")))
        self.calibration, _ = _load_pairs(learned, CALIBRATION_PAIRS, config)
        self.held_out, self.numbers = _load_pairs(held_out, config.pairs, config)


def _load_pairs(
    paths: Sequence[list[Path]], count: int, config: ExportConfig
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[int, int]]]:
    """`count` pairs, or all where there are fewer: pictures, and their numbers."""
    pairs = choose_pairs(*map(len, paths), min(count, math.prod(map(len, paths))), config.seed)
    loaded = [{number: _load_measurable(paths[kind][number], config, flag)
               for number in {pair[kind] for pair in pairs}}
              for kind, flag in enumerate(("content_dir", "style_dir"))]
    return [(loaded[0][content], loaded[1][style]) for content, style in pairs], pairs


def _load_measurable(path: Path, config: ExportConfig, flag: str) -> Tensor:
    picture = load_input(path, config, flag)
    with usable(path, flag):
        check_measurable(picture, path)
    return picture


def quantize_files(files: dict[Path, bytes], pictures: PicturePairs, config: ExportConfig) -> dict[Path, bytes]:
    """The ONNX files of `make_files` with integers, see `quantize`."""
    strength = np.ones(1, np.float32)
    pairs = [tuple(picture.numpy() / np.float32(255) for picture in pair) for pair in pictures.calibration]
    if not config.split:
        inputs = [{"content": content, "style": style, "strength": strength} for content, style in pairs]
        return {path: quantize(content, inputs) for path, content in files.items()}
    (style_path, style_graph), (content_path, content_graph) = files.items()
    session = onnx_session(style_graph)
    inputs = [{"content": content, **dict(zip(StyleGraph.outputs, session.run(None, {"style": style}))),
               "strength": strength} for content, style in pairs]
    return {style_path: quantize(style_graph, [{"style": style} for _, style in pairs]),
            content_path: quantize(content_graph, inputs)}


def compare(
    float_files: list[bytes], int8_files: list[bytes], pictures: PicturePairs, meter: Meter, config: ExportConfig
) -> None:
    """Print what integers cost in quality, on the held-out pairs, and what they save."""
    painters = [open_painter(files, config) for files in (float_files, int8_files)]
    losses, alike, largest = [], [], []
    for content, style in pictures.held_out:
        painted = [painter(content / 255.0, style / 255.0, 1.0) for painter in painters]
        losses.append(meter.measure(meter.open_content(content), meter.open_style(style),
                                    [normalize(picture * 255.0) for picture in painted]))
        alike.append(ssim(*painted).item())
        largest.append((painted[0] - painted[1]).abs().max().item())
    names = ["float32", "int8"]
    print(Measurement(torch.stack(losses).numpy(), pictures.numbers, names, meter.metrics).table())
    print(f"int8 against float32: SSIM {statistics.mean(alike):.4f} (least {min(alike):.4f}), largest difference of a "
          f"colour value {statistics.mean(largest):.3f} of 1 (most {max(largest):.3f})")
    content, style = (picture / 255.0 for picture in pictures.held_out[0])
    width, height = content.shape[3], content.shape[2]
    for name, files in zip(names, (float_files, int8_files)):
        print(f"{name}: {sum(map(len, files)) / 2**20:.2f} MiB")
    for threads in THREADS:
        calls = [partial(open_painter(files, config, threads), content, style, 1.0)
                 for files in (float_files, int8_files)]
        times = [statistics.median(taken) * 1000 for taken in time_in_turns(calls, TIMED_RUNS, torch.device("cpu"))]
        print(f"a pair, content of {width} x {height}, {threads} threads: float32 {times[0]:.1f} ms, int8 "
              f"{times[1]:.1f} ms (medians of {TIMED_RUNS})")
    print(describe_device(torch.device("cpu")))


# ------------------------------------------------------------------------------------------------ mode


def make_files(network: StyleTransferNetwork, checkpoint: dict, config: ExportConfig) -> dict[Path, bytes]:
    """What is to be written, by path."""
    path = Path(config.save_path)
    if config.format == SAFETENSORS:
        return {path: pack_safetensors(network, checkpoint)}
    if config.format == TORCH_EXPORT:
        return {path: to_torch_export(PairGraph(network), network)}
    if config.format == PAGE:
        return {path / f"{name}{ONNX}": to_onnx(graph(network), network) for name, graph in SPLIT.items()}
    if config.split:
        return {path.with_suffix(f".{name}{ONNX}"): to_onnx(graph(network), network)
                for name, graph in SPLIT.items()}
    return {path: to_onnx(PairGraph(network), network)}


def open_painter(files: list[bytes], config: ExportConfig, threads: int = 0) -> Painter:
    """What paints with the contents of the files of `make_files`. threads: of ONNX files; 0 for one a core."""
    if config.format == SAFETENSORS:
        return safetensors_painter(*files)
    if config.format == TORCH_EXPORT:
        return torch_export_painter(*files)
    return (split_painter if config.split or config.format == PAGE else onnx_painter)(*files, threads)


def check_files(
    files: list[bytes], network: StyleTransferNetwork, config: ExportConfig, tolerance: float = TOLERANCE
) -> float:
    """`largest_difference` of what paints with the files. Raises UserError where they cannot be used."""
    flag = f"--save_path {config.save_path}"
    try:
        painter = open_painter(files, config)
    except Exception as error:  # whatever a runtime raises: the file is not to be used
        raise UserError(f"{flag}: the exported file cannot be read back ({_first_line(error)}); nothing was "
                        "written") from error
    return largest_difference(painter, network, flag, tolerance)


def export(given: dict) -> int:
    """Run `--mode export` with the flags given on the command line. Returns the exit code."""
    config = ExportConfig(**given)
    config.check()
    if config.format != SAFETENSORS:
        need_packages(config.format)
    path = Path(config.save_path)
    if config.format == PAGE:
        check_page_folder(path)
        runtime_files()  # missed before anything takes time
        styles = find_styles(config.style_dir, path)
    elif path.is_dir():
        raise UserError(f"--save_path {path}: is a folder, the name of a file is needed")
    network, checkpoint = open_model(config.load_path, config.swap_max_pool, config.backbone, config.vgg_weights)
    network.use(config.upsampling)
    if path.exists() and path.samefile(find_model_file(Path(config.load_path))):
        raise UserError(f"--save_path {path}: would overwrite the model that --load_path names; choose another")
    make_folder(path.parent, "--save_path")
    network.requires_grad_(False)
    if config.int8:  # what cannot be had is missed before anything takes time
        pictures = PicturePairs(config)
        meter = Meter(("content", "style"), network.config.backbone, config.vgg_weights, "meanstd", config.seed,
                      torch.device("cpu"))

    written = fill_up(network, CHANNEL_MULTIPLE) if config.format == PAGE else network
    files = make_files(written, checkpoint, config)
    difference = check_files(list(files.values()), network, config)
    print(f"{'in float32 ' if config.int8 else ''}at {len(CONTENT_SIZES)} content and {len(STYLE_SIZES)} style sizes "
          f"at most {difference:.1g} of 1 from PyTorch's pictures")
    if config.format == PAGE:
        graphs, name = {file.name: content for file, content in files.items()}, Path(config.load_path).stem
        page = page_files(written, name, graphs, styles)
        write_page(path, page)
        size = sum(map(len, page.values())) / 2**20
        note(f"wrote a page of {len(page)} files ({size:.1f} MiB) to {path}; to see it: "
             f"python exporting/page/serve.py {path}")
        return 0
    if config.int8:
        filled = make_files(fill_up(network, INTEGER_MULTIPLE), checkpoint, config)
        float_files, files = files, quantize_files(filled, pictures, config)
        check_files(list(files.values()), network, config, INT8_TOLERANCE)
        compare(list(float_files.values()), list(files.values()), pictures, meter, config)
    for file, content in files.items():
        write_atomically(file, lambda out, content=content: out.write(content), durable=True)
    sizes = ", ".join(f"{file.name} ({len(content) / 2**20:.2f} MiB)" for file, content in files.items())
    note(f"wrote {sizes} to {path.parent}")
    return 0

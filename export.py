"""`--mode export`: a model as ONNX, torch.export program or safetensors, checked before it is left on the disk."""

import io
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import denormalize, normalize
from graphs import ContentGraph, Graph, PairGraph, StyleGraph, trace
from network import StyleTransferNetwork
from stylize import check_margin, open_model
from utils import UserError, make_folder, note, write_atomically
from webpage import check_page_folder, fill_up, find_styles, page_files, runtime_files, write_page
from weights import SAFETENSORS, find_model_file, load_network, pack_safetensors

ONNX, TORCH_EXPORT = ".onnx", ".pt2"
FORMATS = (ONNX, TORCH_EXPORT, SAFETENSORS)
PAGE = "page"  # for the browser: a folder
SPLIT = {"style": StyleGraph, "content": ContentGraph}

# What every export is painted with, (height, width): odd, small, not square, multiples of 8 and not.
CONTENT_SIZES = ((48, 64), (61, 83), (5, 9), (24, 107))
STYLE_SIZES = ((40, 40), (33, 57), (90, 7))
STRENGTHS = (1.0, 0.6, 0.0)
TOLERANCE = 1e-3  # of colour values 0..1

# From content (B, 3, H, W), style (B, 3, H', W'), both RGB of 0..1, and a strength, to the picture (B, 3, H, W).
Painter = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class ExportConfig:
    """Every setting of export mode, with its default."""

    load_path: str | None = None
    save_path: str | None = None
    backbone: str | None = None
    swap_max_pool: bool = False
    upsampling: str | None = None  # None: as the file says
    margin: int = 0
    split: bool = False
    style_dir: str | None = None  # None: the bundled styles

    @property
    def format(self) -> str:
        """PAGE for a folder, else one of FORMATS, as the suffix of `save_path` says."""
        suffix = Path(self.save_path).suffix.lower()
        is_folder = self.save_path.endswith(("/", os.sep)) or (suffix not in FORMATS and Path(self.save_path).is_dir())
        return PAGE if is_folder else suffix

    def check(self) -> None:
        """Raises UserError for what is missing or contradicts itself."""
        check_margin(self.margin)
        for flag in ("load_path", "save_path"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is needed in export mode")
        if self.format not in (*FORMATS, PAGE):
            raise UserError(f"--save_path {self.save_path}: a name that ends in {', '.join(FORMATS[:-1])} or "
                            f"{FORMATS[-1]} is needed, or for a page one that ends in /")
        if self.split and self.format != ONNX:
            raise UserError(f"--split: only {ONNX} files are split, --save_path {self.save_path} is none")
        if self.margin and self.format == SAFETENSORS:
            raise UserError(f"--margin {self.margin}: a {SAFETENSORS} file holds weights, not how a picture is "
                            "continued; leave it out")
        if self.style_dir is not None and self.format != PAGE:
            raise UserError(f"--style_dir: only a page has styles, --save_path {self.save_path} is none; end it with /")


def need_packages() -> None:
    """Raises UserError where a package is missing that ONNX files are made and checked with."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--save_path: {ONNX} files need more packages ({error}); "
                        "pip install -r requirements-export.txt") from error


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
    for name, value in describe(graph, network).items():
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def describe(graph: Graph, network: StyleTransferNetwork) -> dict[str, str]:
    """What a file says of itself beside its graph."""
    return {"config": json.dumps(network.config.to_dict()), "margin": str(graph.margin)}


def to_torch_export(graph: Graph, network: StyleTransferNetwork) -> bytes:
    """The graph as `torch.export.load` reads it."""
    buffer = io.BytesIO()
    torch.export.save(trace(graph), buffer, extra_files=describe(graph, network))
    return buffer.getvalue()


def onnx_session(content: bytes, threads: int = 0):
    """An onnxruntime session on the CPU. threads: 0 for one a core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_onnx(session, **inputs: Tensor) -> list[Tensor]:
    """The outputs of a session, as tensors."""
    return [torch.from_numpy(output) for output in session.run(None, {name: each.numpy() for name, each in
                                                                      inputs.items()})]


def onnx_painter(content: bytes) -> Painter:
    session = onnx_session(content)
    return lambda picture, style, strength: run_onnx(
        session, content=picture, style=style, strength=torch.tensor([strength]))[0]


def split_painter(style_graph: bytes, content_graph: bytes) -> Painter:
    style_session, content_session = onnx_session(style_graph), onnx_session(content_graph)

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


def network_painter(network: StyleTransferNetwork, margin: int = 0) -> Painter:
    """How this toolkit itself paints."""
    def paint(content: Tensor, style: Tensor, strength: float) -> Tensor:
        code = network.style_code(normalize(style * 255.0), margin)
        return denormalize(network.stylize(normalize(content * 255.0), code, strength, margin))

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
def largest_difference(painter: Painter, network: StyleTransferNetwork, margin: int, flag: str) -> float:
    """The largest difference of a colour value, 0..1, from what this toolkit paints: every content size with every
    style size, strengths and batches in turn.

    Raises UserError, beginning with `flag`, for the first size at which it is above TOLERANCE.
    """
    desired_painter, generator = network_painter(network, margin), torch.Generator().manual_seed(0)
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
        if not difference <= TOLERANCE:  # NaN is not, either
            raise UserError(f"{flag}: the exported file differs from PyTorch by {difference:.2g} of 1 {at}, at most "
                            f"{TOLERANCE:g} is allowed; nothing was written")
        largest = max(largest, difference)
    return largest


# ------------------------------------------------------------------------------------------------ mode


def make_files(network: StyleTransferNetwork, checkpoint: dict, config: ExportConfig) -> dict[Path, bytes]:
    """What is to be written, by path."""
    path = Path(config.save_path)
    if config.format == SAFETENSORS:
        return {path: pack_safetensors(network, checkpoint)}
    if config.format == TORCH_EXPORT:
        return {path: to_torch_export(PairGraph(network, config.margin), network)}
    if config.format == PAGE:
        network = fill_up(network)
        return {path / f"{name}{ONNX}": to_onnx(graph(network, config.margin), network)
                for name, graph in SPLIT.items()}
    if config.split:
        return {path.with_suffix(f".{name}{ONNX}"): to_onnx(graph(network, config.margin), network)
                for name, graph in SPLIT.items()}
    return {path: to_onnx(PairGraph(network, config.margin), network)}


def open_painter(files: list[bytes], config: ExportConfig) -> Painter:
    """What paints with the contents of the files of `make_files`."""
    if config.format == SAFETENSORS:
        return safetensors_painter(*files)
    if config.format == TORCH_EXPORT:
        return torch_export_painter(*files)
    return split_painter(*files) if config.split or config.format == PAGE else onnx_painter(*files)


def check_files(files: list[bytes], network: StyleTransferNetwork, config: ExportConfig) -> float:
    """`largest_difference` of what paints with the files. Raises UserError where they cannot be used."""
    flag = f"--save_path {config.save_path}"
    try:
        painter = open_painter(files, config)
    except Exception as error:  # whatever a runtime raises: the file is not to be used
        raise UserError(f"{flag}: the exported file cannot be read back ({_first_line(error)}); nothing was "
                        "written") from error
    return largest_difference(painter, network, config.margin, flag)


def export(given: dict) -> int:
    """Run `--mode export` with the flags given on the command line. Returns the exit code."""
    config = ExportConfig(**given)
    config.check()
    if config.format in (ONNX, PAGE):
        need_packages()
    path = Path(config.save_path)
    if config.format == PAGE:
        check_page_folder(path)
        runtime_files()  # missed before anything takes time
        styles = find_styles(config.style_dir, path)
    elif path.is_dir():
        raise UserError(f"--save_path {path}: is a folder, the name of a file is needed")
    network, checkpoint = open_model(config.load_path, config.swap_max_pool, config.backbone)
    network.use(config.upsampling)
    if path.exists() and path.samefile(find_model_file(Path(config.load_path))):
        raise UserError(f"--save_path {path}: would overwrite the model that --load_path names; choose another")
    make_folder(path.parent, "--save_path")
    network.requires_grad_(False)

    files = make_files(network, checkpoint, config)
    difference = check_files(list(files.values()), network, config)
    print(f"at {len(CONTENT_SIZES)} content and {len(STYLE_SIZES)} style sizes at most {difference:.1g} of 1 from "
          "PyTorch's pictures")
    if config.format == PAGE:
        graphs = {file.name: content for file, content in files.items()}
        page = page_files(fill_up(network), Path(config.load_path).stem, graphs, styles, config.margin)
        write_page(path, page)
        size = sum(map(len, page.values())) / 2**20
        note(f"wrote a page of {len(page)} files ({size:.1f} MiB) to {path}; to see it: python web/serve.py {path}")
        return 0
    for file, content in files.items():
        write_atomically(file, lambda out, content=content: out.write(content))
    sizes = ", ".join(f"{file.name} ({len(content) / 2**20:.2f} MiB)" for file, content in files.items())
    note(f"wrote {sizes} to {path.parent}")
    return 0

"""The file formats of export mode: files made from a network, and opened again as what paints with them."""

import io
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import denormalize
from exporting.graphs import AXES, Graph, PairGraph, StyleGraph, trace
from network import StyleTransferNetwork
from painting.stylizer import Stylizer
from utils import UserError, import_extra
from weights import SAFETENSORS, load_network, pack_safetensors

ONNX, TORCH_EXPORT = ".onnx", ".pt2"
FORMATS = (ONNX, TORCH_EXPORT, SAFETENSORS)
SPLIT = {"style": StyleGraph, "content": Graph}

GRAPH_TORCH = "2.9"  # older ones fail on our graphs
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# What every export is painted with, (height, width): odd, small, not square, multiples of 8 and not.
CONTENT_SIZES = ((48, 64), (61, 83), (5, 9), (24, 107))
STYLE_SIZES = ((40, 40), (33, 57), (90, 7))
STRENGTHS = (1.0, 0.6, 0.0)
TOLERANCE = 1e-3  # of colour values 0..1

# From content (B, 3, H, W) and style (B, 3, H', W'), uint8, and a strength, to the picture (B, 3, H, W), 0..1.
Painter = Callable[[Tensor, Tensor, float], Tensor]


def need_packages(suffix: str) -> None:
    """Raises UserError where what files of this suffix are made and checked with is missing, or torch too old."""
    if suffix != SAFETENSORS and torch.__version__ < GRAPH_TORCH:
        raise UserError(f"save_path: {ONNX} and {TORCH_EXPORT} files need torch {GRAPH_TORCH} or newer, this is "
                        f"{torch.__version__}; {SAFETENSORS} files do not")
    for name in ONNX_PACKAGES if suffix == ONNX else ():
        import_extra(name, "export", f"save_path: {ONNX} files need more packages")


def make_files(network: StyleTransferNetwork, checkpoint: dict, path: Path, split: bool) -> dict[Path, bytes]:
    """What is to be written, by path: one file of the format that the suffix says, or with `split` two ONNX files.

    checkpoint: what the network was loaded from.
    """
    if split:
        return {path.with_suffix(f".{name}{ONNX}"): to_onnx(graph(network), network) for name, graph in SPLIT.items()}
    if path.suffix.lower() == SAFETENSORS:
        return {path: pack_safetensors(network, checkpoint)}
    make = to_onnx if path.suffix.lower() == ONNX else to_torch_export
    return {path: make(PairGraph(network), network)}


def to_onnx(graph: Graph, network: StyleTransferNetwork) -> bytes:
    """The graph as an ONNX file, with its weights inside and the network's configuration in the metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that inputs share an axis's name
        exported = torch.onnx.export(trace(graph), input_names=list(graph.inputs), output_names=list(graph.outputs),
                                     dynamic_shapes={name: AXES[name] for name in graph.inputs}, verbose=False)
    exported.model.metadata_props["config"] = json.dumps(asdict(network.config))
    return exported.model_proto.SerializeToString()


def to_torch_export(graph: Graph, network: StyleTransferNetwork) -> bytes:
    """The graph as `torch.export.load` reads it, with the network's configuration as an extra file."""
    buffer = io.BytesIO()
    torch.export.save(trace(graph), buffer, extra_files={"config": json.dumps(asdict(network.config))})
    return buffer.getvalue()


def onnx_session(content: bytes, threads: int = 0):
    """An onnxruntime session on the CPU. threads: 0 for one a core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads would slow down other work
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def open_painter(files: dict[Path, bytes], threads: int = 0) -> Painter:
    """What paints with the files of `make_files`. threads: for ONNX files; 0 for one a core."""
    suffix, contents = next(iter(files)).suffix.lower(), list(files.values())
    if suffix == SAFETENSORS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"copy{SAFETENSORS}"
            copy.write_bytes(contents[0])
            return network_painter(load_network(copy)[0])
    if suffix == TORCH_EXPORT:
        module = torch.export.load(io.BytesIO(contents[0])).module()
        return lambda content, style, strength: module(content / 255, style / 255, torch.tensor([strength]))
    *style_sessions, session = (onnx_session(each, threads) for each in contents)

    def paint(content: Tensor, style: Tensor, strength: float) -> Tensor:
        inputs = {"style": (style / 255).numpy()}
        for each in style_sessions:
            inputs = dict(zip(StyleGraph.outputs, each.run(None, inputs)))
        inputs |= {"content": (content / 255).numpy(), "strength": np.array([strength], np.float32)}
        return torch.from_numpy(session.run(None, inputs)[0])

    return paint


def network_painter(network: StyleTransferNetwork) -> Painter:
    """How this toolkit itself paints."""
    stylizer = Stylizer(network)
    return lambda content, style, strength: denormalize(stylizer.paint(content, stylizer.encode_style(style), strength))


@torch.inference_mode()
def check_files(files: dict[Path, bytes], network: StyleTransferNetwork, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a colour value, 0..1, between what the files paint and what the network paints: random
    pictures of every content size with every style size, strengths and batches in turn.

    Raises UserError where the files cannot be opened, fail, or differ by more than `tolerance`.
    """
    at, largest, generator = "", 0.0, torch.Generator().manual_seed(0)
    try:
        painter, network_paints = open_painter(files), network_painter(network)
        for number, (size, style_size) in enumerate(itertools.product(CONTENT_SIZES, STYLE_SIZES)):
            batch, strength = 1 + number % 2, STRENGTHS[number % len(STRENGTHS)]
            content, style = (torch.randint(0, 256, (batch, 3, *sides), generator=generator, dtype=torch.uint8)
                              for sides in (size, style_size))
            at = (f" for a content of {size[0]} x {size[1]} and a style of {style_size[0]} x {style_size[1]} pixels, "
                  f"batch {batch}, strength {strength:g}")
            actual, desired = (paint(content, style, strength) for paint in (painter, network_paints))
            if actual.shape != desired.shape:
                raise UserError(f"it paints {tuple(actual.shape)} in place of {tuple(desired.shape)}")
            difference = (actual - desired).abs().max().item()
            if not difference <= tolerance:  # NaN is not, either
                raise UserError(f"it differs from PyTorch by {difference:.2g} of 1, at most {tolerance:g} is allowed")
            largest = max(largest, difference)
    except Exception as error:  # whatever a runtime raises: the file is not to be used
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"save_path {next(iter(files))}: the exported file cannot be used{at} ({reason}); nothing was "
                        "written") from error
    return largest

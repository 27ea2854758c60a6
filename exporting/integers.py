"""ONNX graphs with 8-bit integers in place of float32, by static quantisation: faster on CPUs, and smaller."""

import logging
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from exporting.formats import onnx_session
from exporting.graphs import StyleGraph, fill_up
from network import StyleTransferNetwork

# What computes in integers. What stands between, AdaIN, its statistics and upsampling, stays in float32.
INTEGER_OPS = ["Conv", "Relu", "MaxPool", "AveragePool", "Pad", "Gather", "Slice"]
# onnxruntime's convolutions of 8 bits take 1.3 to 3.5 times as long for 3 colours or 12 channels as for 4 and 16.
MULTIPLE = 16  # of the channels that come out
COLORS = 4  # that go into the first one


def fill_for_integers(network: StyleTransferNetwork) -> StyleTransferNetwork:
    """A network that paints the same, of widths that onnxruntime is fast with; its first conv takes COLORS, its last
    one gives MULTIPLE, of which the additional ones count for nothing. Only a Graph takes such a network."""
    filled = fill_up(network, MULTIPLE)
    first, last = filled.encoder.layers[0][0], filled.decoder.layers[0][-1]
    first.weight = nn.Parameter(F.pad(first.weight, (0, 0, 0, 0, 0, COLORS - 3)))
    last.weight = nn.Parameter(F.pad(last.weight, (0, 0, 0, 0, 0, 0, 0, MULTIPLE - 3)))
    last.bias = nn.Parameter(F.pad(last.bias, (0, MULTIPLE - 3)))
    return filled.requires_grad_(False)


def quantize_files(files: dict[Path, bytes], pairs: list[tuple[Tensor, Tensor]]) -> dict[Path, bytes]:
    """The ONNX files of `formats.make_files`, one or the two of a split network, with integers, see `quantize`.

    pairs: content and style pictures, (1, 3, H, W) each, uint8, to measure ranges with.
    """
    contents, codes = ([picture.numpy() / np.float32(255) for picture in pictures] for pictures in zip(*pairs))
    codes, quantized = [{"style": style} for style in codes], {}
    *style_files, (path, content_graph) = files.items()
    for style_path, style_graph in style_files:
        quantized[style_path] = quantize(style_graph, codes)
        session = onnx_session(style_graph)
        codes = [dict(zip(StyleGraph.outputs, session.run(None, code))) for code in codes]
    inputs = [{"content": content, "strength": np.ones(1, np.float32)} | code for content, code in zip(contents, codes)]
    return quantized | {path: quantize(content_graph, inputs)}


def quantize(content: bytes, inputs: list[dict[str, np.ndarray]]) -> bytes:
    """The graph of an ONNX file with unsigned 8-bit activations, and signed 8-bit filters with a scale a channel.
    inputs: by input name, what the ranges of the activations are measured with."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reader = SimpleNamespace(get_next=partial(next, iter(inputs), None))  # all that is asked of a CalibrationDataReader
    logger = logging.getLogger()
    level, _ = logger.level, logger.setLevel(logging.ERROR)  # the package recommends what is done here already
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "quantized"))
            plain.write_bytes(content)
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # makes one node of Conv, Mul and Add
            # The mean over the pictures of each one's range: the widest of all leaves the others too few steps.
            ranges = {"CalibMovingAverage": True, "TensorQuantOverrides": _overrides(onnx.load(prepared).graph)}
            quantize_static(
                prepared, quantized, reader, quant_format=QuantFormat.QDQ, per_channel=True, extra_options=ranges,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=INTEGER_OPS)
            model = onnx.load(quantized)
    finally:
        logger.setLevel(level)
    pad_integers(model.graph)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _overrides(graph) -> dict:
    """How the first conv's filters and the picture are quantised, by tensor: the filters in 7 bits, since processors
    without VNNI add two products of 8 bits in 16, more than which those of bright pixels would need; the picture, which
    the last conv gives where the graph paints one, as in a file with 8 bits, for values of 0 to 1."""
    first, *_, last = [node for node in graph.node if node.op_type == "Conv"]
    overrides = {first.input[1]: [{"axis": 0, "reduce_range": True}]}
    if any(value.name == "picture" for value in graph.output):
        overrides[last.output[0]] = [{"scale": np.array(1 / 255, np.float32), "zero_point": np.array(0, np.uint8)}]
    return overrides


def pad_integers(graph) -> None:
    """Let every Pad between a DequantizeLinear and a QuantizeLinear of the same units pad the integers, in place.

    onnxruntime would convert to float32 before it and back after it, which takes longer than the padding.
    """
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        before, after = made_by.get(pad.input[0]), [node for node in graph.node if pad.output[0] in node.input]
        if [node.op_type for node in (before, *after) if node] != ["DequantizeLinear", "QuantizeLinear"]:
            continue
        units = [[values[name] for name in node.input[1:]] for node in (before, *after)]
        if all(np.array_equal(*pair) for pair in zip(*units)):
            pad.input[0], pad.output[0] = before.input[0], after[0].output[0]
            graph.node.remove(after[0])
            if not any(before.output[0] in node.input for node in graph.node):
                graph.node.remove(before)

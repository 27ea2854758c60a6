"""ONNX graphs with 8-bit integers in place of float32, by static quantisation: faster on CPUs, and smaller."""

import logging
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

from exporting.formats import onnx_session
from exporting.graphs import StyleGraph

# What computes in integers. What stands between, AdaIN and its statistics, stays in float32.
INTEGER_OPS = ["Conv", "Relu", "MaxPool", "AveragePool", "Pad", "Resize", "Gather", "Slice"]
# onnxruntime's convolutions of 8 bits take 1.3 to 3.5 times as long for 3 colours or 12 channels as for 4 and 16.
INTEGER_MULTIPLE = 16  # of the channels that come out, see graphs.fill_up
COLOR_CHANNELS = 4  # that go into the first one


def quantize_files(files: dict[Path, bytes], pairs: list[tuple[Tensor, Tensor]]) -> dict[Path, bytes]:
    """The ONNX files of `formats.make_files`, one or the two of a split network, with integers, see `quantize`.

    pairs: content and style pictures, (1, 3, H, W) each, uint8, to measure ranges with.
    """
    strength = np.ones(1, np.float32)
    contents, styles = ([picture.numpy() / np.float32(255) for picture in pictures] for pictures in zip(*pairs))
    if len(files) == 1:
        codes = [{"style": style} for style in styles]
    else:
        session = onnx_session(next(iter(files.values())))
        codes = [dict(zip(StyleGraph.outputs, session.run(None, {"style": style}))) for style in styles]
    inputs = [{"content": content, "strength": strength} | code for content, code in zip(contents, codes)]
    all_inputs = [inputs] if len(files) == 1 else [[{"style": style} for style in styles], inputs]
    return {path: quantize(content, each) for (path, content), each in zip(files.items(), all_inputs)}


def quantize(content: bytes, inputs: list[dict[str, np.ndarray]]) -> bytes:
    """The graph of an ONNX file with unsigned 8-bit activations, and signed 8-bit filters with a scale a channel.

    inputs: by input name, what the ranges of the activations are measured with.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Inputs(CalibrationDataReader):
        remaining = iter(inputs)

        def get_next(self) -> dict | None:
            return next(self.remaining, None)

    logger = logging.getLogger()
    level, _ = logger.level, logger.setLevel(logging.ERROR)  # the package recommends what is done here already
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "quantized"))
            plain.write_bytes(content)
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # makes one node of Conv, Mul and Add
            model = onnx.load(prepared)
            fill_up_colors(model.graph)
            onnx.save(model, prepared)
            quantize_static(
                prepared, quantized, Inputs(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=INTEGER_OPS,
                # The mean over the pictures of each one's range: the widest of all leaves the others too few steps.
                extra_options={"CalibMovingAverage": True, "TensorQuantOverrides": _picture_range(model.graph)})
            model = onnx.load(quantized)
    finally:
        logger.setLevel(level)
    pad_integers(model.graph)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _picture_conv(graph):
    """The conv that gives the picture, the last one; None in a graph that paints none."""
    if not any(value.name == "picture" for value in graph.output):
        return None
    return [node for node in graph.node if node.op_type == "Conv"][-1]


def _picture_range(graph) -> dict:
    """The scale and the zero point of the picture: those of a picture file with 8 bits, for values of 0 to 1."""
    last = _picture_conv(graph)
    if last is None:
        return {}
    return {last.output[0]: [{"scale": np.array(1 / 255, np.float32), "zero_point": np.array(0, np.uint8)}]}


def fill_up_colors(graph) -> None:
    """Let the convs that take colours take COLOR_CHANNELS, and the one that gives the picture give INTEGER_MULTIPLE, in
    place. Filters for the additional channels are zero."""
    from onnx import helper, numpy_helper

    def fill(name: str, axis: int, size: int) -> None:
        values = numpy_helper.to_array(tensors[name])
        added = [(0, size - length if each == axis else 0) for each, length in enumerate(values.shape)]
        tensors[name].CopyFrom(numpy_helper.from_array(np.pad(values, added), name))

    def constant(name: str, *values: int) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(values), name))
        return name

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes, last = list(graph.node), _picture_conv(graph)
    first = [node for node in nodes if node.op_type == "Conv" and tensors[node.input[1]].dims[1] == 3]
    colors = constant("colors", *range(3), *[2] * (COLOR_CHANNELS - 3))  # the last one again
    for weight in {conv.input[1] for conv in first}:  # content and style may share it
        fill(weight, 1, COLOR_CHANNELS)
    for conv in first:
        image, conv.input[0] = conv.input[0], f"{conv.name}_colors"
        nodes.insert(nodes.index(conv), helper.make_node("Gather", [image, colors], [conv.input[0]],
                                                         f"{conv.name}_gather", axis=1))
    if last is not None:
        for name in last.input[1:]:
            fill(name, 0, INTEGER_MULTIPLE)
        image, last.output[0] = last.output[0], f"{last.name}_filled"
        ends = [constant(name, value) for name, value in (("first", 0), ("end", 3), ("axis", 1))]
        nodes.insert(nodes.index(last) + 1, helper.make_node("Slice", [last.output[0], *ends], [image],
                                                             f"{last.name}_slice"))
    del graph.node[:], graph.value_info[:]  # the latter are shapes as they were
    graph.node.extend(nodes)


def pad_integers(graph) -> None:
    """Let every Pad between a DequantizeLinear and a QuantizeLinear of the same units pad the integers, in place.

    onnxruntime would convert to float32 before it and back after it, which takes longer than the padding.
    """
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    users = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        before, after = made_by.get(pad.input[0]), users.get(pad.output[0], [])
        if before is None or (before.op_type, [node.op_type for node in after]) != (
                "DequantizeLinear", ["QuantizeLinear"]):
            continue
        units = [[values[name] for name in node.input[1:]] for node in (before, *after)]
        if not all(np.array_equal(*pair) for pair in zip(*units)):
            continue
        users[pad.input[0]].remove(pad)
        pad.input[0], pad.output[0] = before.input[0], after[0].output[0]
        users.setdefault(before.input[0], []).append(pad)
        made_by[pad.output[0]] = pad
        graph.node.remove(after[0])
        if not users[before.output[0]]:
            users[before.input[0]].remove(before)
            graph.node.remove(before)

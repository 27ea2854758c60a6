"""ONNX graphs with 8-bit integers in place of float32, by static quantisation: faster on CPUs, and smaller."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# What computes in integers. What stands between, AdaIN and its statistics, stays in float32.
INTEGER_OPS = ["Conv", "Relu", "MaxPool", "AveragePool", "Pad", "Resize"]


def quantize(content: bytes, inputs: list[dict[str, np.ndarray]]) -> bytes:
    """The graph of an ONNX file with unsigned 8-bit activations, and signed 8-bit filters with a scale a channel.

    inputs: by input name, what the ranges of the activations are measured with.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Inputs(CalibrationDataReader):
        def __init__(self) -> None:
            self.remaining: Iterator[dict] = iter(inputs)

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
            quantize_static(
                prepared, quantized, Inputs(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=INTEGER_OPS,
                # The mean over the pictures of each one's range: the widest of all leaves the others too few steps.
                extra_options={"CalibMovingAverage": True, "TensorQuantOverrides": _picture_range(model)})
            model = onnx.load(quantized)
    finally:
        logger.setLevel(level)
    pad_integers(model.graph)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _picture_range(model) -> dict:
    """The last conv gives the picture, where there is one: its 8 bits are those of a picture file, and what they cannot
    hold is what clipping to 0..1 takes away."""
    if not any(value.name == "picture" for value in model.graph.output):
        return {}
    last = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    return {last.output[0]: [{"scale": np.array(1 / 255, np.float32), "zero_point": np.array(0, np.uint8)}]}


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

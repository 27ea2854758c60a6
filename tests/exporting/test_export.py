"""Export mode: every format paints this toolkit's pictures at any size, a broken file never stays."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import ROOT, random_picture, refusal, small_network, user_error, words, write_model, write_noise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.torch_version import TorchVersion

import export as export_module
from data import denormalize, normalize
from exporting import formats
from exporting.graphs import Graph, PairGraph, StyleGraph
from main import main
from network import NetworkConfig, level_statistics
from weights import load_network

EXPORTS = ("split.onnx", "whole.onnx", "program.pt2", "weights.safetensors")  # of the fixture `exported`
SIZES = ((1, 1), (7, 30), (33, 49), (40, 24))  # height, width
OTHER_SIZES = ((41, 18), (3, 3), (24, 40), (50, 9))


@pytest.mark.parametrize("backbone, pooling, upsampling, padding, levels", [
    ("vgg19", "max", "nearest", "zeros", 1), ("vgg16", "avg", "bilinear", "reflect", 1),
    ("vgg16", "blur", "nearest", "reflect", 3),
])
@torch.inference_mode()
def test_graphs_compute_what_the_network_does(backbone, pooling, upsampling, padding, levels):
    """In float64."""
    network = small_network(backbone, pooling, adain_levels=levels).double()
    network.use(upsampling, padding)
    style_graph, content_graph, pair = (graph(network).double() for graph in (StyleGraph, Graph, PairGraph))
    mean, std, strength = pair.rgb_mean, pair.rgb_std, torch.tensor([0.3], dtype=torch.float64)
    for number, sizes in enumerate(zip(SIZES, OTHER_SIZES)):
        content, style = (random_picture(kind, size, 1 + number % 2).double() / 255 for kind, size in enumerate(sizes))
        normalized = [(image - mean) / std for image in (content, style)]
        desired = (network(*normalized, 0.3) * std + mean).clamp(0, 1)
        code = style_graph(style)
        same = {"rtol": 1e-9, "atol": 1e-9}
        assert_close(code, level_statistics(network.encode(normalized[1])), **same)
        assert_close(content_graph(content, *code, strength), desired, **same)
        assert_close(pair(content, style, strength), desired, **same)


def painter(folder: Path, name: str):
    """From content, style (B, 3, H, W), 0..1, and strength to the picture, as a user of the file would."""
    path = folder / name
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda content, style, strength: program(content, style, torch.tensor([strength])).numpy()
    is_split = name == "split.onnx"
    files = [path.with_suffix(f".{part}.onnx") for part in ("style", "content")] if is_split else [path]
    sessions = [formats.onnx_session(file.read_bytes(), threads=1) for file in files]  # not one a core in each worker

    def paint(content, style, strength):
        inputs = {"style": style.numpy()}
        if is_split:
            inputs = dict(zip(("mean", "std"), sessions[0].run(["mean", "std"], inputs)))
        inputs |= {"content": content.numpy(), "strength": np.array([strength], np.float32)}
        return sessions[-1].run(["picture"], inputs)[0]

    return paint


@pytest.mark.parametrize("name", EXPORTS[:3])
def test_files_paint_the_networks_pictures_at_any_size(exported, name):
    """Within the 0.001 of 1 that is promised: both compute in float32."""
    network, _ = load_network(exported / f"{name}.pth")
    paint = painter(exported / "files", name)
    for number, (size, style_size) in enumerate(zip(SIZES, OTHER_SIZES)):
        content, style = (random_picture(each, sides, 1 + 2 * (number % 2))
                          for each, sides in ((3, size), (4, style_size)))
        for strength in (1.0, 0.25):
            with torch.inference_mode():
                desired = denormalize(network(normalize(content), normalize(style), strength)).numpy()
            actual = paint(content / 255, style / 255, strength)
            assert actual.dtype == np.float32 and actual.shape == desired.shape
            assert 0.1 < ((desired > 0) & (desired < 1)).mean()  # or clipping would hide what differs
            np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-3)
    assert {path.name for path in (exported / "files").iterdir()} == {
        "split.style.onnx", "split.content.onnx", *EXPORTS} - {"split.onnx"}


@pytest.mark.parametrize("name, inputs, outputs", [
    ("split.style.onnx", {"style": ["batch", 3, "style_height", "style_width"]}, {"mean": 4, "std": 4}),
    ("split.content.onnx", {"content": ["batch", 3, "height", "width"], "mean": ["batch", 4, 1, 1],
                            "std": ["batch", 4, 1, 1], "strength": [1]}, {"picture": 4}),
    ("whole.onnx", {"content": ["batch", 3, "height", "width"], "style": ["batch", 3, "style_height", "style_width"],
                    "strength": [1]}, {"picture": 4}),
])
def test_onnx_files_say_what_they_take_and_are(exported, name, inputs, outputs):
    model = onnx.load(exported / "files" / name, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    for desired, values in ((inputs, model.graph.input), (outputs, model.graph.output)):
        shapes = {value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
                  for value in values}
        actual = {key: len(shape) if isinstance(desired[key], int) else shape for key, shape in shapes.items()}
        assert actual == desired
        assert all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in values)
    about = {entry.key: entry.value for entry in model.metadata_props}
    source = "split.onnx.pth" if name.startswith("split") else f"{name}.pth"
    assert NetworkConfig(**json.loads(about["config"])) == load_network(exported / source)[0].config
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_safetensors_file_holds_the_whole_model_and_is_exported_again(exported, tmp_path):
    file = exported / "files" / "weights.safetensors"
    desired, checkpoint = load_network(exported / "weights.safetensors.pth")
    actual, stored = load_network(file)
    assert actual.config == desired.config and not actual.training
    assert (stored["vgg_weights"], stored["iteration"]) == (checkpoint["vgg_weights"], checkpoint["iteration"])
    assert main(words({"mode": "export", "load_path": file, "save_path": tmp_path / "again.safetensors"})) == 0
    for tensors in (actual.state_dict(), load_file(file), load_file(tmp_path / "again.safetensors")):
        assert_close(tensors, desired.state_dict(), rtol=0, atol=0)
    with safe_open(tmp_path / "again.safetensors", "pt") as again, safe_open(file, "pt") as first:
        assert again.metadata() == first.metadata()


def test_safetensors_files_of_others(tmp_path):
    """A bare state_dict is read; other metadata, other tensors and no safetensors at all get one line."""
    network = small_network()
    state = network.state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    assert load_network(tmp_path / "bare.safetensors")[0].config == network.config
    save_file(state, tmp_path / "odd.safetensors", {"config": "no JSON"})
    save_file(state, tmp_path / "list.safetensors", {"config": "[1]"})
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for name, reason in (("odd", "JSON"), ("list", "no style-transfer network"), ("other", "no style-transfer network"),
                         ("text", "not a safetensors file"), ("none", "no such file")):
        message = user_error(load_network, tmp_path / f"{name}.safetensors")
        assert f"load_path {tmp_path / name}.safetensors" in message and reason in message


@pytest.mark.parametrize("breaks, height, reason", [
    (lambda picture: picture[:, :, :-5, :-3], 61, "for a content of 61 x 83 and a style of 40 x 40 pixels, batch 2, "
     "strength 1 (it paints (2, 3, 56, 80) in place of (2, 3, 61, 83))"),
    (lambda picture: picture + 0.0021, 5, "for a content of 5 x 9 and a style of 40 x 40 pixels, batch 1, strength 1 "
     "(it differs from PyTorch by 0.0021 of 1, at most 0.001 is allowed)"),
    (lambda picture: picture * float("nan"), 24, "content of 24 x 107 and a style of 40 x 40 pixels, batch 2, strength "
     "1 (it differs from PyTorch by nan of 1"),
])
def test_check_says_at_which_size_a_file_is_wrong(monkeypatch, breaks, height, reason):
    network = small_network("vgg16")
    own = formats.network_painter(network)

    def paint(content, style, strength):
        painted = own(content, style, strength)
        return breaks(painted) if content.shape[2] == height else painted

    monkeypatch.setattr(formats, "open_painter", lambda files: own)
    assert formats.check_files({Path("x.onnx"): b""}, network) == 0.0
    monkeypatch.setattr(formats, "open_painter", lambda files: paint)
    message = user_error(formats.check_files, {Path("x.onnx"): b""}, network)
    assert message.startswith("save_path x.onnx: the exported file cannot be used for a content") and reason in message
    assert message.endswith("; nothing was written")


@pytest.mark.parametrize("name, made, reason", [
    ("graph.pt2", b"no program", "the exported file cannot be used ("), ("graph.onnx", b"no graph", "cannot be used ("),
    ("graph.pt2", None, "differs from PyTorch by"),
])
def test_a_file_that_does_not_paint_the_networks_pictures_does_not_stay(
    exported, tmp_path, capsys, monkeypatch, name, made, reason
):
    """It cannot be read back, or is another network's; what was there before stays."""
    model, path = write_model(tmp_path / "model.pth", small_network("vgg16")), tmp_path / "files" / name
    path.parent.mkdir()
    path.write_bytes(b"what was there before")
    made = made or (exported / "files" / "program.pt2").read_bytes()
    for maker in ("to_onnx", "to_torch_export"):
        monkeypatch.setattr(formats, maker, lambda graph, network: made)
    assert reason in refusal(capsys, *words({"mode": "export", "load_path": model, "save_path": path}))
    assert [each.read_bytes() for each in path.parent.iterdir()] == [b"what was there before"]


@pytest.fixture
def pictures(tmp_path) -> dict:
    """Flags of --int8 for small pictures, about half of which are held out."""
    for number in range(6):
        for kind in ("content", "style"):
            write_noise(tmp_path / kind / f"{number}.png", (40, 50), number)
    return {"int8": True, "content_dir": tmp_path / "content", "style_dir": tmp_path / "style", "holdout": 0.5,
            "imsize": 34, "cropsize": 34, "pairs": 2, "vgg_weights": "random"}


def test_integers_paint_nearly_the_same(exported, tmp_path, capsys, monkeypatch, pictures):
    """The float32 files are those of the fixture, so that they need not be made again."""
    float_files = {tmp_path / f"split.{part}.onnx": (exported / "files" / f"split.{part}.onnx").read_bytes()
                   for part in ("style", "content")}
    made = []

    def make_files(network, checkpoint, path, split):
        made.append(network.config.widths)
        return dict(float_files) if len(made) == 1 else formats.make_files(network, checkpoint, path, split)

    monkeypatch.setattr(export_module, "make_files", make_files)
    assert main(words({"mode": "export", "load_path": exported / "split.onnx.pth", "save_path": tmp_path / "split.onnx",
                       "split": True} | pictures)) == 0
    report = capsys.readouterr().out
    assert "int8 - float32" in report and "2 pairs of 2 content and 2 style pictures" in report
    assert "a pair, content of 34 x 34, 2 threads: float32" in report and "SSIM" in report
    content, style = random_picture(5, (33, 50)), random_picture(6, (9, 70))
    actual, desired = (painter(folder, "split.onnx")(content / 255, style / 255, 0.7)
                       for folder in (tmp_path, exported / "files"))
    assert actual.shape == desired.shape
    difference = np.abs(actual - desired)
    assert 1e-4 < difference.mean() < 0.5 * desired.std()  # rounded, and not to another picture, which is 1.1
    assert 0.05 < desired.std()  # a plain picture would show nothing
    assert np.abs(actual * 255 - (actual * 255).round()).max() < 1e-3  # as a picture file has it
    assert made[1] == (*(-(-width // 16) * 16 for width in made[0][:-1]), 3)
    for path in float_files:
        assert_computes_in_integers(onnx.load(path).graph)


def assert_computes_in_integers(graph) -> None:
    """Every conv, and every padding between integers, with channels that are fast; the first conv so that two of its
    products fit 16 bits, as processors without VNNI add them."""
    shapes = [tensor.dims for tensor in graph.initializer if len(tensor.dims) == 4]
    assert all(shape[0] % 16 == 0 and shape[1] % 4 == 0 for shape in shapes if shape[2] == 3)
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for conv in (node for node in graph.node if node.op_type == "Conv"):
        weight, source = made_by[conv.input[1]], made_by[conv.input[0]]
        assert weight.op_type == source.op_type == "DequantizeLinear"
        assert kinds[weight.input[0]] == onnx.TensorProto.INT8 and kinds[source.input[2]] == onnx.TensorProto.UINT8
    first = next(made_by[node.input[1]].input[0] for node in graph.node if node.op_type == "Conv")
    filters = next(onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == first)
    assert 32 < np.abs(filters.astype(int)).max() <= 64
    pads = [node for node in graph.node if node.op_type == "Pad"]
    between = [pad for pad in pads if made_by[pad.input[0]].op_type in ("QuantizeLinear", "Pad")]
    assert len(between) >= len(pads) - 1 and len(between) > 0


def test_what_integers_need_is_missed_before_the_graph_is_made(tmp_path, capsys, monkeypatch, pictures):
    monkeypatch.delattr(export_module, "make_files")
    model, path = write_model(tmp_path / "model.pth", small_network("vgg16")), tmp_path / "graph.onnx"
    flags = {"mode": "export", "load_path": model, "save_path": path} | pictures
    message = refusal(capsys, *words(flags | {"vgg_weights": tmp_path / "none.pth"}))
    assert f"vgg_weights {tmp_path / 'none.pth'}: " in message
    message = refusal(capsys, *words(flags | {"imsize": 4, "cropsize": 4}))
    assert f"content_dir {tmp_path / 'content'}" in message and "4 x 4 pixels" in message and "21 or more" in message
    assert not path.exists()


def test_integers_that_cannot_be_used_do_not_stay(exported, tmp_path, capsys, monkeypatch, pictures):
    path = tmp_path / "whole.onnx"
    files = {path: (exported / "files" / path.name).read_bytes()}
    monkeypatch.setattr(export_module, "make_files", lambda *_, **__: dict(files))
    monkeypatch.setattr(export_module, "quantize_files", lambda files, pairs: dict.fromkeys(files, b"no graph"))
    flags = {"mode": "export", "load_path": exported / "whole.onnx.pth", "save_path": path}
    assert f"save_path {path}: the exported file cannot be used" in refusal(capsys, *words(flags | pictures))
    assert not path.exists()


@pytest.mark.parametrize("package", formats.ONNX_PACKAGES)
def test_missing_package_is_named(monkeypatch, package):
    """Only .onnx files need it."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    message = user_error(formats.need_packages, ".onnx")
    assert package in message and "pip install '.[export]'" in message
    for suffix in (".pt2", ".safetensors"):
        formats.need_packages(suffix)


def test_an_old_torch_is_named(monkeypatch):
    """For both kinds of graphs."""
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0+cpu"))
    for suffix in (".onnx", ".pt2"):
        assert "need torch 2.9 or newer, this is 2.8.0+cpu" in user_error(formats.need_packages, suffix)
    formats.need_packages(".safetensors")


def test_requirements_are_those_that_are_checked():
    (line,) = re.findall(r"^export = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.findall(r'"(\w+)>=[^"]+"', line)) == set(formats.ONNX_PACKAGES)

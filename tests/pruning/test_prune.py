"""Prune mode: what it writes and reports for one model, what it compares for several."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import plant, random_picture, read_pixels, refusal, small_network, within_range, words, write_model
from matplotlib.figure import Figure
from PIL import Image
from test_responses import make_folders
from torch.testing import assert_close

from data import normalize, prepare_picture
from loss import content_loss
from main import main
from network import LossNetwork, bottleneck_conv, conv_layers, count_macs, count_parameters
from prune import PruneConfig
from pruning.plots import plot_l2_curves
from pruning.report import largest_change, paint_grid, paint_with_cuts
from pruning.responses import Responses
from pruning.surgery import cut_bottleneck
from weights import load_network, load_vgg


def report_of(folder: Path, name: str = "report") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def assert_are_plots(folder: Path, *names: str) -> None:
    """Not small, and not of one or two greys."""
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 2


def test_largest_change_by_hand():
    """Two networks that paint one colour each: normalised 0 and 0.1, so 0.1 * std * 255 apart, most in red."""
    first, second = small_network(), small_network()
    with torch.no_grad():
        for network, value in ((first, 0.0), (second, 0.1)):
            network.decoder.layers[0][-1].weight.zero_()
            network.decoder.layers[0][-1].bias.fill_(value)
    pictures = random_picture(0, (16, 16)), random_picture(1, (21, 16))
    assert_close(largest_change(first, second, *pictures, 1.0), 0.1 * 0.229 * 255, rtol=1e-4, atol=0)
    assert largest_change(first, first, *pictures, 1.0) == 0


def test_zeroed_channels_paint_what_the_cut_network_paints():
    """In float64, for the grid and for the losses over the number of channels cut."""
    network = small_network().double()
    responses = Responses(np.array([[3.0, 1, 2, 0, 5, 4]], np.float32), ["a"], 1)  # weakest: 3, 1, 2, 0
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, 33, side, generator=generator, dtype=torch.float64) for side in (40, 29))
    painted = paint_with_cuts(network, responses, content, style, [4, 0, 1], 0.6)
    with torch.inference_mode():
        for channels, actual in zip(([3, 1, 2, 0], [], [3]), painted.values(), strict=True):
            assert_close(actual, cut_bottleneck(network, channels)(content, style, 0.6), rtol=1e-9, atol=1e-9)


def test_grid_shows_the_numbers_that_the_network_has(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr("pruning.report.plot_panels", lambda panels, path: shown.update(panels))
    config = PruneConfig(imsize=48, cropsize=48, prune_nums=(2, 0, 6))
    responses = Responses(np.arange(12.0).reshape(2, 6), ["a", "b"], contents=1)
    paint_grid(small_network(), responses, config, tmp_path / "grid.png")
    assert [*shown] == ["Content", "Style", "Prune 2 channels", "Prune 0 channels"]
    assert {picture.size for picture in shown.values()} == {(48, 48)}


# ---------------------------------------------------------------------------------- one model, and several


@pytest.fixture(scope="module")
def files(measured, tmp_path_factory) -> dict:
    """The measured network as a model file, and flags that prune all of it."""
    network, config, _ = measured
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "model.pth", network, iteration=7)
    flags = {"mode": "prune", "gpu_no": -1, "load_path": folder / "model.pth", "imsize": 32, "cropsize": 32,
             "content_dir": config.content_dir, "style_dir": config.style_dir, "latency_runs": 1,
             "report_size": 64, "prune_nums": 0}
    assert main(words(flags | {"prune_layers": "all", "save_path": folder / "all"})) == 0
    return {"flags": flags, "all": folder / "all", "model": folder / "model.pth"}


def test_prune_all_end_to_end(files, measured, tmp_path):
    report = report_of(files["all"])
    network, _, found = measured
    pruned, checkpoint = load_network(files["all"])
    rows = report["layers"]
    assert [row["name"] for row in rows] == [layer.name for layer in conv_layers(network.config, 0)]
    assert [row["width_after"] for row in rows] == list(pruned.config.widths)
    assert report["macs_after"] == sum(row["macs_after"] for row in rows) == count_macs(pruned.config, 64)
    assert report["parameters_after"] == sum(row["parameters_after"] for row in rows) == count_parameters(pruned)
    for key in ("parameters", "macs", "file_bytes"):
        assert report[f"{key}_after"] < report[f"{key}_before"]
    assert {row["name"]: row["channels_off_for_all"] for row in rows[:-1]} == {
        name: len(layer.off) for name, layer in found.layers.items()}
    assert sum(row["channels_constant_folded"] or 0 for row in rows) == 3
    assert (report["content_pictures"], report["style_pictures"]) == (3, 2) and report["latency_ms_after"] > 0
    assert report["channels_before"] - report["channels_after"] == len(report["cut_channels"])
    assert checkpoint["pruned_layers"]["encoder.layers.0.0"] == found.layers["encoder.layers.0.0"].off.tolist()
    assert checkpoint["iteration"] == 7 and checkpoint["pruned_channels"] == report["cut_channels"]
    assert_are_plots(files["all"], "widths", "l0_map", "l2_curve", "prune_grid")
    # Changes are measured on pictures that chose nothing.
    assert report["pairs_set_aside"] == list(map(list, found.pairs)) and report["compared_pairs"] == 1
    assert not set(found.pairs[0]) & set(found.paths) and report["max_pixel_difference"] < 1e-2
    # Both files make the same picture in test mode.
    outputs = []
    for name in ("model", "all"):
        out = tmp_path / f"{name}.png"
        assert main(words({"mode": "test", "gpu_no": -1, "load_path": files[name], "content": found.paths[0],
                           "style": found.paths[3], "save_path": out})) == 0
        outputs.append(read_pixels(out))
    assert outputs[0].shape == (40, 50, 3) and np.abs(outputs[0] - outputs[1]).max() <= 1


def test_a_channel_that_only_others_need_is_a_change(files, tmp_path, capsys):
    """A channel that is off for all that is measured, and on for what is set aside: the report must show it, at two
    sizes and two strengths."""
    config = make_folders(tmp_path)
    network = within_range(small_network())
    plant(network, {bottleneck_conv(network.config): {2: 1.0}})
    Responses(np.array([[1, 1, 0, 1, 1, 1]], np.float32).repeat(2, 0), [str(tmp_path / "content" / "00.png")] * 2, 1,
              pairs=[(str(tmp_path / "content" / "01.png"), str(tmp_path / "style" / "01.png"))]
              ).save(tmp_path / "responses.npz")
    flags = files["flags"] | {"load_path": write_model(tmp_path / "model.pth", network), "report_size": 16,
                              "content_dir": config.content_dir, "style_dir": config.style_dir,
                              "responses": tmp_path / "responses.npz", "save_path": tmp_path / "out"}
    assert main(words(flags)) == 0
    report = report_of(tmp_path / "out")
    assert report["cut_channels"] == [2]
    pruned, (pair,) = load_network(tmp_path / "out")[0], report["pairs_set_aside"]
    for change, (size, strength) in zip(report["changes"], ((32, 1.0), (32, 0.5), (16, 1.0), (16, 0.5)), strict=True):
        assert (change["imsize"], change["cropsize"], change["style_strength"]) == (size, size, strength)
        desired = largest_change(network, pruned, *(prepare_picture(path, size, size) for path in pair), strength)
        assert change["max_pixel_difference"] == pytest.approx(desired, rel=1e-3) and desired > 0.01
    assert report["max_pixel_difference"] == max(change["max_pixel_difference"] for change in report["changes"])
    change = f"{report['changes'][0]['max_pixel_difference']:.4f}"
    assert f"| largest change at imsize 32, strength 1, of 255 | {change} |" in capsys.readouterr().out
    # What was set aside must still be there, and be a picture.
    aside = tmp_path / "style" / "01.png"
    for spoil in (lambda: aside.write_bytes(b"no picture"), aside.unlink):
        spoil()
        line = refusal(capsys, *words(flags | {"save_path": tmp_path / "again"}))
        assert f"responses {aside}: " in line and not (tmp_path / "again").exists()


@pytest.mark.parametrize("more, is_advised", [({}, True), ({"prune_num": 0}, False)])
def test_advice_where_nothing_is_cut_unasked(files, tmp_path, capsys, more, is_advised):
    config, network = make_folders(tmp_path), small_network()
    plant(network, {bottleneck_conv(network.config): dict.fromkeys(range(network.config.bottleneck_width), 1.0)})
    flags = files["flags"] | {"load_path": write_model(tmp_path / "model.pth", network), "report_size": 16,
                              "content_dir": config.content_dir, "style_dir": config.style_dir}
    assert main(words(flags | more | {"save_path": tmp_path / "out"})) == 0
    assert report_of(tmp_path / "out")["cut_channels"] == []
    assert ("no channel is off for every picture" in capsys.readouterr().err) is is_advised


def test_a_folder_of_one_picture_has_none_to_compare(files, tmp_path, capsys):
    config = make_folders(tmp_path, contents=1)
    assert main(words(files["flags"] | {"content_dir": config.content_dir, "prune_num": 2, "half": True,
                                        "save_path": tmp_path / "out"})) == 0
    assert "what the cut changes is not measured" in capsys.readouterr().err
    report = report_of(tmp_path / "out")
    assert report["max_pixel_difference"] is None and report["changes"] == [] and report["content_pictures"] == 1
    state = torch.load(tmp_path / "out" / "pruned.pth", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float16} and len(report["cut_channels"]) == 2


def test_a_budget_from_kept_responses(files, measured, tmp_path, capsys):
    """By both ranks; the bottleneck alone is then cut by the same file."""
    flags = files["flags"] | {"responses": files["all"] / "responses.npz"}
    for rank in ("importance", "magnitude"):
        assert main(words(flags | {"prune_macs": 0.4, "prune_rank": rank, "save_path": tmp_path / rank})) == 0
        shown, report = capsys.readouterr(), report_of(tmp_path / rank)
        assert 0.2 * report["macs_before"] < report["macs_after"] <= 0.4 * report["macs_before"]
        assert report["prune_layers"] == "all" and report["prune_macs"] == 0.4 and report["prune_rank"] == rank
        assert "channels of decoder.layers.0.25" in shown.out and "measure" not in shown.err
        assert (tmp_path / rank / "widths.png").exists()
    weight = measured[0].get_submodule(bottleneck_conv(measured[0].config)).weight
    smallest = weight.abs().sum(dim=(1, 2, 3)).argsort()[: len(report["cut_channels"])]
    assert report["cut_channels"] == sorted(smallest.tolist())
    line = refusal(capsys, *words(flags | {"load_path": tmp_path / "magnitude", "save_path": tmp_path / "magnitude"}))
    assert "would overwrite a model" in line
    first = shutil.copy(flags["load_path"], tmp_path / "first.pth")  # what is made of it would be the second
    second = shutil.copytree(tmp_path / "magnitude", tmp_path / "two" / "first")
    two = {"load_path": [first, second / "pruned.pth"], "save_path": tmp_path / "two", "vgg_weights": "random"}
    assert "would overwrite a model" in refusal(capsys, *words(files["flags"] | two))
    # The layers are kept when the file is written again by the mode that does not need them.
    flags |= {"responses": tmp_path / "magnitude" / "responses.npz", "save_path": tmp_path / "bottleneck"}
    assert main(words(flags)) == 0
    report = report_of(tmp_path / "bottleneck")
    narrower = [row["name"] for row in report["layers"] if row["width_after"] < row["width_before"]]
    assert narrower == [bottleneck_conv(small_network().config)]
    assert Responses.load(tmp_path / "bottleneck" / "responses.npz", small_network(width=8).config).layers
    assert "channels of decoder" not in capsys.readouterr().out
    assert not (tmp_path / "bottleneck" / "widths.png").exists()


def test_magnitudes_of_every_network_are_in_sight(tmp_path, monkeypatch):
    """Ten times as large in the second: the axis, which they share, is the larger one's."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_l2_curves({name: Responses(np.full((4, 5), size), [], 2) for name, size in (("a", 1.0), ("b", 10.0))},
                   tmp_path / "l2_curves.png")
    assert [axes.get_ylim()[0] for axes in figures[0].axes] == [0, 0]
    assert all(axes.get_ylim()[1] >= 4 * 10 for axes in figures[0].axes)


def test_several_models_are_pruned_and_compared(files, tmp_path):
    """The second has no planted channels and is narrower. The losses are compared with cut networks and the loss
    network, by hand, on the pair that was set aside."""
    models = [files["model"], write_model(tmp_path / "other.pth", small_network(width=5, seed=1))]
    assert main(words(files["flags"] | {"load_path": models, "vgg_weights": "random", "prune_nums": [6, 0, 3],
                                        "save_path": tmp_path})) == 0
    report, curves = report_of(tmp_path), report_of(tmp_path, "curves")
    assert list(report["networks"]) == list(curves["networks"]) == ["model", "other"]
    for name in ("model", "other"):
        assert report["networks"][name] == report_of(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "pruned.pth", "report.json", "responses.npz", "l0_map.png", "l2_curve.png", "prune_grid.png"}
    assert [[point["cut"] for point in points] for points in curves["networks"].values()] == [[0, 3, 6], [0, 3]]
    assert_are_plots(tmp_path, "l0_maps", "l2_curves", "curves")
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table == report["table"] and table[0] == "|  | model | other |"
    rows = {title: cells for title, *cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)}
    for place, each in enumerate(report["networks"].values()):
        assert rows["off for all pictures"][place] == f"{each['channels_zero_for_all']} of {each['channels_before']}"
        assert rows["parameters"][place].startswith(f"{each['parameters_before']:,} to {each['parameters_after']:,} (")
        loss = each["metrics"]["content"]["mean"]
        assert float(rows["content loss"][place]) == pytest.approx(loss, rel=1e-3)

    network, _ = load_network(files["model"])
    responses = Responses.load(tmp_path / "model" / "responses.npz", network.config)
    loss_network = LossNetwork("vgg19")
    loss_network.layers.load_state_dict(load_vgg("vgg19", "random")[0])
    (pair,) = curves["pairs"]
    content, style = (normalize(prepare_picture(path, 32, 32)) for path in pair)
    variants = [(point, responses.weakest_first[: point["cut"]]) for point in curves["networks"]["model"]]
    variants.append((report["networks"]["model"]["metrics"], responses.off_for_all))
    for actual, channels in variants:
        with torch.inference_mode():
            output = cut_bottleneck(network, channels)(content, style)
            desired = content_loss(loss_network(output), loss_network(content)).item()
        assert actual["content"]["mean"] == pytest.approx(desired, rel=1e-3)
        assert actual["style"]["mean"] > 0 and actual["content"]["interval"] is None  # of a single pair

"""Quality: every metric against values known by hand or by another implementation, intervals, several models."""

import json
import math
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_picture, refusal, small_network, user_error, words, write_model, write_noise, write_picture
from PIL import Image
from torch.testing import assert_close

from data import denormalize, normalize, prepare_picture
from folders import is_held_out
from main import main
from network import LossNetwork, NetworkConfig, build_from_vgg
from painting import quality
from painting.pairs import choose_pairs, note_learned_from
from painting.quality import METRICS, MIN_SIDE, Measurement, Meter, flat_tiles, ssim, summarize, tile_deviations
from painting.sheets import comparison_sheet
from train import TrainConfig
from training.step import TransferTrainer
from weights import load_vgg, model_names


def grey(values: np.ndarray) -> torch.Tensor:
    """(H, W) to (1, 3, H, W)."""
    return torch.from_numpy(values)[None, None].repeat(1, 3, 1, 1)


def meter_of(*metrics: str, style_kind: str = "meanstd", seed: int = 0) -> Meter:
    return Meter(metrics, "vgg19", "random", style_kind, seed, torch.device("cpu"))


def measure(meter: Meter, content: torch.Tensor, style: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
    return meter.measure(meter.open_content(content), meter.open_style(style), outputs)


# --------------------------------------------------------------------------------------------- the metrics


ROWS, COLUMNS = np.mgrid[0:20, 0:26]
FIRST = ((ROWS * 7 + COLUMNS * 11) % 31) / 30.0
# By scikit-image 0.26.0: structural_similarity(FIRST, second, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, data_range=1.0), which averages over the same positions.
BY_SCIKIT_IMAGE = [
    (((ROWS * 5 + COLUMNS * 3) % 17) / 16.0, 0.006871175261505899),
    (FIRST * 0.5 + 0.25, 0.8015734369703438),
    (1 - FIRST, -0.9892174805613703),
    (np.full_like(FIRST, 0.5), 0.010032007581055508),
]


@pytest.mark.parametrize("second, desired", BY_SCIKIT_IMAGE)
def test_ssim_is_that_of_another_implementation(second, desired):
    assert ssim(grey(FIRST), grey(second)).item() == pytest.approx(desired, abs=1e-9)


def test_ssim_is_of_the_luma():
    """1 for equal pictures and for a red and a grey of its luma; a red and a blue are not alike."""
    picture = random_picture(0) / 255.0
    assert ssim(picture, picture).item() == pytest.approx(1.0, abs=1e-12)
    red = torch.zeros(1, 3, 16, 16)
    red[:, 0] = 1.0
    assert ssim(red, torch.full((1, 3, 16, 16), quality.LUMA[0])).item() == pytest.approx(1.0, abs=1e-7)
    assert ssim(red, red.flip(1)).item() < 0.7


def checked(tiles: list[list[float]], size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    """(1, 3, *size), uint8: grey, in each tile of 16 pixels half of the pixels by so much above 100, half below."""
    deviations = np.kron(np.array(tiles), np.ones((16, 16)))
    rows, columns = np.indices(deviations.shape)
    pixels = np.full(size, 100.0)
    height, width = deviations.shape
    pixels[:height, :width] += np.where((rows + columns) % 2, deviations, -deviations)
    return grey(pixels.astype(np.uint8))


def test_tile_deviations_are_those_of_the_tiles():
    """By hand, and of Pillow's own luma by numpy."""
    tiles = [[0.0, 1, 2], [6, 7, 90]]
    assert_close(tile_deviations(checked(tiles, (40, 63))), torch.tensor(tiles, dtype=torch.float64), rtol=0, atol=0)
    picture = random_picture(3, (48, 64))
    luma = np.asarray(Image.fromarray(picture[0].permute(1, 2, 0).numpy()).convert("L"), float)
    desired = luma.reshape(3, 16, 4, 16).std((1, 3))
    assert_close(tile_deviations(picture), torch.from_numpy(desired), rtol=1e-12, atol=0)


def test_flat_tiles_are_counted_among_those_with_something_in_the_photograph():
    """Above 6 in the photograph: four tiles. Below 1.5 in the painted picture: three of all, two of those four."""
    photograph = checked([[6.0, 7, 7], [0, 7, 7]])
    assert flat_tiles(checked([[1.0, 1, 2], [0, 0, 50]]), photograph).item() == 0.5
    assert flat_tiles(photograph, photograph).item() == 0.0
    assert flat_tiles(photograph, checked([[0.0] * 3] * 2)).item() == 0.0  # no tile to judge


def test_flat_tiles_are_of_the_picture_as_it_is_written():
    """An output beyond white, with details there, is flat when written."""
    content = checked([[20.0, 20, 20]] * 2)
    output = normalize(content)
    output[..., 32:] += 5.0  # the last column of tiles far beyond white
    values = measure(meter_of("flat"), content, content, [output])
    assert values.tolist() == [[pytest.approx(2 / 6)]]


def test_stlpips_is_zero_for_equal_pictures_grows_with_noise_and_is_the_packages_own():
    """By the package's documented use: pictures of 0..255 brought to -1..1."""
    from stlpips_pytorch import stlpips

    content = random_picture(0, (64, 64))
    picture = normalize(content)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    outputs = [picture, picture + 0.1 * noise, picture + noise]
    values = measure(meter_of("stlpips"), content, content, outputs)[:, 0]
    assert values[0] < 1e-9 < values[1] < values[2]
    own = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    with torch.no_grad():
        desired = own(content / 127.5 - 1, (denormalize(outputs[2]) * 255.0).round() / 127.5 - 1).item()
    assert values[2].item() == pytest.approx(desired, rel=1e-4)


@pytest.mark.parametrize("missing", ["stlpips_pytorch", "torchsummary"])
def test_missing_package_is_one_line(monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith("stlpips_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # `import` then raises as for a package that is not there
    message = user_error(meter_of, "stlpips")
    assert "metrics stlpips" in message and missing in message and "'.[metrics]'" in message


@pytest.mark.parametrize("style_kind", ["meanstd", "gram"])
def test_losses_are_those_of_training(style_kind):
    """The trainer's content and style loss of a batch of one, before its step, is the Meter's of the same pair."""
    vgg, origin = load_vgg("vgg19", "random", seed=3)
    torch.manual_seed(0)
    network, loss_network = build_from_vgg(NetworkConfig.full(), vgg), LossNetwork("vgg19", weights=vgg)
    content, style = random_picture(0, (32, 32)), random_picture(1, (32, 32))
    with torch.no_grad():
        output = network(normalize(content), normalize(style))
    meter = meter_of("content", "style", style_kind=style_kind, seed=3)
    actual = measure(meter, content, style, [output])[0]
    config = TrainConfig(style_loss=style_kind, amp="off", encoder_lr=1e-5, decoder_lr=1e-4)
    desired = TransferTrainer(network, loss_network, config, meter.device).step(content, style, all_terms=True)
    assert meter.vgg_origin == origin
    assert_close(actual, torch.stack([desired["content"], desired["style"]]).double(), rtol=1e-4, atol=0)
    # Another VGG is another measure, so that the equality above says something.
    other = measure(meter_of("content", style_kind=style_kind, seed=4), content, style, [output])[0, 0]
    assert abs(other / actual[0] - 1) > 3e-4


def test_the_picture_as_its_own_output_has_no_content_loss_and_as_both_no_style_loss():
    content, style = random_picture(0), random_picture(1)
    meter = meter_of(*METRICS)
    values = measure(meter, content, style, [normalize(content), normalize(style)])
    assert meter.metrics == ("content", "style", "ssim", "stlpips", "flat")
    assert_close(values[0, [0, 2, 3, 4]], torch.tensor([0, 1, 0, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)
    assert values[0, 1] > 0.01 and values[1, 0] > 0.01
    assert_close(values[1, 1].item(), 0.0, rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("freedom, desired", [(1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227), (1000, 1.96234)])
def test_t_quantile_is_that_of_the_tables(freedom, desired):
    assert quality.t_quantile(freedom) == pytest.approx(desired, rel=1e-5)


CROSSED = [(content, style) for content in range(3) for style in range(3)]


@pytest.mark.parametrize("pairs, values, variance, quantile", [
    # No picture in two pairs: variance (4 + 1 + 0 + 9) / 3, by 4; t of 3 degrees. One style for all counts as given.
    ([(0, 2), (1, 0), (2, 3), (3, 1)], [1, 2, 3, 6], 14 / 12, 3.18245),
    ([(0, 0), (1, 0), (2, 0), (3, 0)], [1, 2, 3, 6], 14 / 12, 3.18245),
    # Content means 2 and 4, style means 1, 2, 6. By content: 2 / 2 = 1 (variance of the means / their number); by
    # style: 7 / 3; by pair: residuals -3 -2 2 -1 0 4, squares 34, / 5 / 6 = 17 / 15. 1 + 7/3 - 17/15 = 2.2 is below
    # 7/3, which stands; the fewer are 2 contents: t of 1 degree.
    (CROSSED[:6], [0, 1, 5, 2, 3, 7], 7 / 3, 12.7062),
    # Values content + style, each 0, 2 and 4: means 2, 4, 6 of both kinds, variance 4, / 3; by pair: residuals the sums
    # of -2, 0, 2 with -2, 0, 2, squares 48, / 8 / 9 = 2/3. 4/3 + 4/3 - 2/3 = 2; t of 2 degrees.
    (CROSSED, [2 * (content + style) for content, style in CROSSED], 2, 4.30265),
    ([(0, 0)], [5], math.inf, 1),
])
def test_intervals_by_hand(pairs, values, variance, quantile):
    summary, mean = summarize(np.array(values, float), pairs), np.mean(values)
    low, high = summary["interval"] or (-math.inf, math.inf)
    desired = pytest.approx(quantile * math.sqrt(variance), rel=1e-5)
    assert summary["mean"] == mean and mean - low == desired and high - mean == desired


def test_differences_are_taken_pair_by_pair():
    """Two models that differ by 1 on every pair, whatever the pair: the difference is known exactly."""
    values = np.array([[[3.0], [4.0]], [[10.0], [11.0]], [[5.0], [6.0]]])
    measurement = Measurement(values, [(0, 0), (1, 1), (2, 2)], ["a", "b"], ("ssim",))
    assert measurement.summary(1, minus=0)["ssim"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    low, high = measurement.summary(0)["ssim"]["interval"]
    assert low < 3 and high > 9
    lines = measurement.table().splitlines()
    assert lines[0].split() == ["SSIM"] and lines[1].split()[:2] == ["a", "6.000"]
    assert lines[3].startswith("b - a") and "1.000 ±" in lines[3]


def test_columns_of_a_table_stand_apart():
    values = -1e-4 * np.random.default_rng(0).random((3, 2, 2))  # small and negative: as long as numbers get
    lines = Measurement(values, [(0, 0), (1, 1), (2, 2)], ["a", "b"], ("ssim", "flat")).table().splitlines()
    assert [len(re.findall(r" -?[\d.e-]+ ± [\d.e-]+(?= |$)", line)) for line in lines[1:4]] == [2, 2, 2]


# --------------------------------------------------------------------------------------------- pairs, names


@pytest.mark.parametrize("contents, styles", [(4, 6), (3, 3), (1, 4)])
def test_drawn_pairs_use_every_picture_evenly_and_none_twice(contents, styles):
    every = [(content, style) for content in range(contents) for style in range(styles)]
    assert choose_pairs(contents, styles, None, seed=0) == every
    assert choose_pairs(contents, styles, contents * styles, seed=5) == every
    for number in range(1, contents * styles + 1):
        pairs = choose_pairs(contents, styles, number, seed=5)
        assert len(set(pairs)) == number and pairs == sorted(pairs) and set(pairs) <= set(every)
        for kind, count in enumerate((contents, styles)):
            used = np.bincount([pair[kind] for pair in pairs], minlength=count)
            assert used.max() - used.min() <= 1
    assert len({tuple(choose_pairs(contents, styles, 2, seed)) for seed in range(20)}) > 1
    assert "pairs" in user_error(choose_pairs, contents, styles, contents * styles + 1, 0)


def test_names_of_models_tell_them_apart():
    assert model_names(["runs/a", "store/b.pth"]) == ["a", "b"]
    assert model_names(["runs/a/pruned.pth", "runs/b/pruned.pth"]) == ["a-pruned", "b-pruned"]
    assert model_names(["x/run", "y/../y/RUN.pth"]) == ["x-run", "y-RUN"]
    assert model_names(["/a/x/run", "/b/x/run", "/c/d/other"]) == ["a-x-run", "b-x-run", "c-d-other"]
    assert model_names(["x/run", "x/run.pth"]) == ["1-run", "2-run"]
    assert model_names(["x/mod\udce8le.pth", "/y/b"]) == ["mod\ufffdle", "b"]  # a name of another encoding


def test_comparison_shows_some_of_many_pairs_evenly():
    """Under a title for each column; of 40 pairs 16, the first one too."""
    pairs = [(content, style) for content in range(8) for style in range(5)]
    sheet, shown = comparison_sheet(pairs, ["one", "two"]), [pairs[row * 40 // 16] for row in range(16)]
    assert sheet.titles == ("content", "style", "one", "two")
    assert sheet.rows == [[("content", pair[0]), ("style", pair[1]), (*pair, 0), (*pair, 1)] for pair in shown]


# -------------------------------------------------------------------------------------------- command line


@pytest.fixture
def folders(tmp_path) -> dict:
    """Two contents, three styles, two narrow models of equal name; the flags of a test of the first."""
    for name, count in (("contents", 2), ("styles", 3)):
        for number in range(count):
            write_noise(tmp_path / name / f"{name[0]}{number}.png", (32, 36), 10 * count + number)
    for seed, name in enumerate(("one", "two")):
        write_model(tmp_path / name / "pruned.pth", small_network(seed=seed), vgg_weights="a VGG of long ago",
                    train_config={"content_dir": str(tmp_path / "contents"), "style_dir": "/no/such"})
    return {"mode": "test", "gpu_no": -1, "load_path": tmp_path / "one" / "pruned.pth",
            "content": tmp_path / "contents", "style": tmp_path / "styles", "save_path": tmp_path / "out",
            "vgg_weights": "random"}


def test_several_models_of_equal_name_are_measured_side_by_side(folders, tmp_path, capsys):
    models = [tmp_path / name / "pruned.pth" for name in ("one", "two")]
    assert main(words(folders | {"metrics": (), "load_path": models})) == 0
    captured = capsys.readouterr()
    out = tmp_path / "out"
    desired = {f"c{content}_s{style}.png" for content in range(2) for style in range(3)}
    for model in ("one-pruned", "two-pruned"):
        assert {path.name for path in (out / model).iterdir()} == desired
    assert {path.name for path in out.iterdir()} == {"one-pruned", "two-pruned", "comparison.png", "contact_sheet.png",
                                                   "metrics.json"}
    assert Image.open(out / "comparison.png").size == (4 * 256, 32 + 6 * 256)
    assert Image.open(out / "contact_sheet.png").size == (7 * 256, 32 + 3 * 256)
    for model in ("one-pruned", "two-pruned"):
        assert f"{model} was trained with VGG weights a VGG of long ago; its losses are measured with random" \
            in captured.err
        assert f"{model} has learned from 2 of the 5 pictures that it is measured with (its training had --holdout 0)" \
            in captured.err
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines] == ["content", "one-pruned", "two-pruned", "two-pruned", "6"]
    assert lines[0].split("  ")[-1].strip() == "flat tiles"

    report = json.loads((out / "metrics.json").read_text())
    assert [model["name"] for model in report["models"]] == ["one-pruned", "two-pruned"]
    assert report["settings"]["style_strength"] == 1.0 and report["vgg_weights_of_losses"].startswith("random")
    assert report["versions"]["torch"] == version("torch") and "threads" in report["device"]
    assert len(report["pairs"]) == 6 and report["pairs"][1]["style"] == str(tmp_path / "styles" / "s1.png")
    for model in report["models"]:
        for metric in METRICS:
            values = [pair["metrics"][model["name"]][metric] for pair in report["pairs"]]
            assert model["metrics"][metric]["mean"] == pytest.approx(np.mean(values))
            low, high = model["metrics"][metric]["interval"]
            assert low <= np.mean(values) <= high
    # SSIM and ST-LPIPS are of the files as written: anyone can measure them again.
    for pair in report["pairs"]:
        content = torch.from_numpy(np.array(Image.open(pair["content"]))).permute(2, 0, 1)[None] / 255.0
        name = f"{Path(pair['content']).stem}_{Path(pair['style']).stem}.png"
        written = torch.from_numpy(np.array(Image.open(out / "two-pruned" / name))).permute(2, 0, 1)[None] / 255.0
        assert pair["metrics"]["two-pruned"]["ssim"] == pytest.approx(ssim(content, written).item(), abs=1e-6)


def test_one_model_measured_alone_writes_what_it_did_and_the_metrics(folders, tmp_path):
    """A model's values do not depend on its company, and the pictures and the sheet are those of no metrics; with a
    control that changes the painted picture."""
    folders |= {"preserve_color": "luma"}
    assert main(words(folders | {"save_path": tmp_path / "plain"})) == 0
    assert main(words(folders | {"metrics": ("stlpips", "ssim")})) == 0
    plain, measured = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                       for name in ("plain", "out"))
    report = json.loads(measured.pop("metrics.json"))
    assert plain == measured and len(plain) == 7 and "contact_sheet.png" in plain
    assert list(report["models"][0]["metrics"]) == ["ssim", "stlpips"]
    assert report["models"][0]["difference_from_first"] is None and report["vgg_weights_of_losses"] is None
    both = {"load_path": [tmp_path / name / "pruned.pth" for name in ("two", "one")], "metrics": "ssim",
            "save_path": tmp_path / "both"}
    assert main(words(folders | both)) == 0
    again = json.loads((tmp_path / "both" / "metrics.json").read_text())["models"][1]["metrics"]["ssim"]
    assert again == report["models"][0]["metrics"]["ssim"]


def test_bad_input_is_refused_before_anything_is_written(folders, tmp_path, capsys):
    """The smallest picture that can be measured is, and models of two backbones are by what is no loss."""
    one, other = folders["load_path"], write_model(tmp_path / "vgg16.pth", small_network("vgg16"))
    Image.new("RGB", (40, MIN_SIDE - 1)).save(tmp_path / "flat.png")
    Image.new("RGB", (40, MIN_SIDE)).save(tmp_path / "just.png")
    folders |= {"style": tmp_path / "just.png", "content": tmp_path / "just.png"}
    for change, needed in (
        ({"load_path": [one, one.parent]}, "named twice"),
        ({"load_path": [one, other], "metrics": "style"}, "not comparable"),
        ({"metrics": "ssim", "content": tmp_path / "flat.png"}, f"40 x {MIN_SIDE - 1} pixels"),
    ):
        assert needed in refusal(capsys, *words(folders | change))
        assert not (tmp_path / "out").exists()
    assert main(words(folders | {"metrics": ()})) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["models"][0]["metrics"]["ssim"]["interval"] is None  # of a single pair
    assert main(words(folders | {"load_path": [one, other], "metrics": "ssim"})) == 0


def test_pictures_of_others_stand_beside_the_models(folders, tmp_path, capsys):
    """The pictures of a second model, taken as another program's: measured as that model's files."""
    metrics, others = {"metrics": ("content", "ssim", "flat"), "pairs": 4}, tmp_path / "others"
    two = {"load_path": tmp_path / "two" / "pruned.pth", "save_path": others}
    assert main(words(folders | metrics | two)) == 0
    drawn = sorted(others.glob("c*_s*.png"))
    assert {*others.iterdir()} == {*drawn, others / "comparison.png", others / "metrics.json"}
    assert len(drawn) == 4 and len({path.name[:2] for path in drawn}) == 2
    desired = json.loads((others / "metrics.json").read_text())
    for path in drawn[1::2]:
        Image.open(path).save(path.with_name(path.stem.replace("_", "__") + ".bmp"))
        path.unlink()
    capsys.readouterr()
    assert main(words(folders | metrics | {"painted": f"someone={others}"})) == 0
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[1:4] == ["pruned", "someone", "someone - pruned"]
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    model, someone = report["models"]
    assert (model["name"], someone["name"]) == ("pruned", "someone")
    assert someone["painted"] == str(others) and "file" not in someone
    for metric in ("ssim", "flat"):
        assert someone["metrics"][metric] == desired["models"][0]["metrics"][metric]
    meter = meter_of("content")
    sheet = Image.open(tmp_path / "out" / "comparison.png")
    assert sheet.size == (4 * 256, 32 + 4 * 256)
    for row, pair in enumerate(report["pairs"]):
        content, style = (prepare_picture(Path(pair[kind])) for kind in ("content", "style"))
        (file,) = others.glob(f"{Path(pair['content']).stem}_*{Path(pair['style']).stem}.*")
        loss = measure(meter, content, style, [normalize(prepare_picture(file))]).item()
        assert pair["metrics"]["someone"]["content"] == pytest.approx(loss, rel=1e-5)
        assert sheet.getpixel((3 * 256 + 128, 32 + row * 256 + 128)) == Image.open(file).getpixel((18, 16))


def test_pictures_of_others_that_do_not_fit_are_named(folders, tmp_path, capsys):
    others = tmp_path / "others"
    for stem in ("c0_s0", "c1_s0"):
        write_picture(others / f"{stem}.png", (36, 32))
    flags = folders | {"metrics": "ssim", "style": tmp_path / "styles" / "s0.png"}

    def line(given: str) -> str:
        return refusal(capsys, *words(flags | {"painted": given}))

    assert "another row has this name" in line(f"pruned={others}")
    write_picture(others / "c1__s0.jpg", (36, 32))
    assert "2 pictures are called c1_s0 or c1__s0; one is needed" in line(f"a={others}")
    (others / "c1__s0.jpg").unlink()
    write_picture(others / "c1_s0.png", (36, 40))
    assert f"--painted a: {others / 'c1_s0.png'} has 36 x 40 pixels, its content" in line(f"a={others}")


def test_pictures_that_a_model_has_learned_from_are_counted(tmp_path, capsys):
    """Of those in its training's folders, those that it did not hold out; nothing without such settings."""
    paths = [write_picture(tmp_path / folder / f"{number}.png") for folder in ("a", "b") for number in range(8)]
    held_out = [path for path in paths if is_held_out(path, 0.5)]
    config = {"content_dir": str(tmp_path / "a"), "style_dir": None, "holdout": 0.5}
    learned = [path for path in paths[:8] if path not in held_out]
    assert 0 < len(learned) < 8
    note_learned_from("model", {"train_config": config}, paths)
    assert f"model has learned from {len(learned)} of the 16 pictures" in capsys.readouterr().err
    for settings, measured in ((None, paths), (config, held_out), (config, paths[8:])):
        note_learned_from("model", {"train_config": settings}, measured)
        assert capsys.readouterr().err == ""

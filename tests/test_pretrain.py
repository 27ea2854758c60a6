"""Pretraining: views by position, the loss, export and its scaling, resume, refusals. Small crops, CPU."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config, small_network, user_error, write_map, write_picture
from torch.testing import assert_close

import network as network_module
import pretrain as pretrain_module
from data import (
    MIN_OVERLAP,
    VIEW_AREA,
    CropConfig,
    ViewPairs,
    common_part,
    draw_boxes,
    find_pictures,
    normalize,
    prepare_picture,
    split_holdout,
    training_loader,
)
from loss import TEMPERATURE, VIEW_LOSSES, found_share, infonce_loss, relative_std, vicreg_loss
from main import main
from network import LossNetwork, NetworkConfig, adain, channel_statistics, load_network, load_vgg, model_checkpoint
from pretrain import (
    DECODER_EXPORT_NAME,
    EXPORT_NAME,
    GRID,
    METRICS,
    STUDENT_EXPORT_NAME,
    TAPS,
    DecoderPretrainer,
    PretrainConfig,
    Pretrainer,
    PretrainNetwork,
    StudentPretrainer,
    export_weights,
    folded_weights,
    mean_activations,
    paint,
    pool_places,
    pretrain,
    rate_share,
    rescale,
)
from train import TrainConfig, build_trainer

ROOT = Path(__file__).parent.parent
CONTENT_DIR, STYLE_DIR = ROOT / "imgs" / "content", ROOT / "imgs" / "style"
SMALL = dict(
    content_dir=str(CONTENT_DIR), style_dir=str(STYLE_DIR), imsize=40, cropsize=32, batch_size=4, num_workers=0,
    gpu_no=-1, amp="off", check_iter=2, holdout=0.25,
)
CROP = CropConfig(40, 32, False, 10**8)


@pytest.fixture(autouse=True)
def little_to_measure(monkeypatch):
    monkeypatch.setattr(pretrain_module, "HELD_OUT_PAIRS", 4)
    monkeypatch.setattr(pretrain_module, "SCALE_PICTURES", 4)


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def natural_pictures(count: int = 4, size: int = 64) -> torch.Tensor:
    return torch.cat([prepare_picture(path, size, size) for path in find_pictures(CONTENT_DIR, "")[:count]])


def lively_network(seed: int = 0) -> PretrainNetwork:
    """Normalisations as after some training: their statistics, gains and offsets are not 0 and 1."""
    torch.manual_seed(seed)
    network = PretrainNetwork()
    network(torch.randn(4, 3, 32, 32), torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]).repeat(4, 1))
    with torch.no_grad():
        for norm in network.norms.values():
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.uniform_(-0.3, 0.5)
    return network.eval()


# ------------------------------------------------------------------------------------------------- the split


def test_crops_of_one_picture_are_on_one_side():
    names = [f"{number}{crop}.jpg" for number in range(200) for crop in ("", "_a", "_b", "_c", "_d")]
    learned, held_out = split_holdout([Path("folder") / name for name in names], 0.1)
    assert len(learned) + len(held_out) == 1000 and not set(learned) & set(held_out)
    for path in held_out:
        assert path.stem.rsplit("_")[0] not in {other.stem.rsplit("_")[0] for other in learned}
    assert 10 <= len(held_out) / 5 <= 30  # of 200 pictures


def test_split_goes_by_name_alone():
    """Order, folder, suffix and other pictures do not matter; a larger share only adds."""
    paths = [Path("one") / f"picture_{number}.jpg" for number in range(300)]
    _, held_out = split_holdout(paths, 0.1)
    others = [Path("two") / f"{path.stem}.PNG" for path in reversed(paths[:150])]
    assert {path.stem for path in split_holdout(others, 0.1)[1]} == {
        path.stem for path in held_out if path in paths[:150]
    }
    assert set(held_out) < set(split_holdout(paths, 0.3)[1])
    assert split_holdout(paths, 0.0) == (paths, [])


def test_a_known_name():
    """The first 16 hexadecimal digits of the name's SHA-256, as a fraction, against the share."""
    import hashlib

    place = int(hashlib.sha256(b"rose").hexdigest()[:16], 16) / 16**16
    paths = [Path("rose_b.jpg"), Path("other.jpg")]
    assert Path("rose_b.jpg") not in split_holdout(paths, place)[1]
    learned, held_out = split_holdout([*paths, Path("rose.png")], math.nextafter(place, 1))
    assert {Path("rose_b.jpg"), Path("rose.png")} <= set(held_out)


def test_split_that_leaves_nothing_is_refused():
    assert "--holdout 0.9: all 1 pictures of folder" in user_error(split_holdout, [_held_out_name(0.9)], 0.9)


def _held_out_name(share: float) -> Path:
    paths = [Path("folder") / f"{number}.jpg" for number in range(20)]
    return split_holdout(paths, share)[1][0]


# -------------------------------------------------------------------------------------------------- two views


def view_pairs(seed: int = 0, folders: int = 2) -> ViewPairs:
    return ViewPairs([find_pictures(folder, "") for folder in (CONTENT_DIR, STYLE_DIR)][:folders], CROP, seed, 1.0)


def test_views_depend_on_seed_and_position_alone():
    pairs = view_pairs()
    torch.manual_seed(1)
    first = [pairs[position] for position in (5, 6)]
    state = torch.get_rng_state()
    again = [view_pairs()[position] for position in (6, 5)][::-1]
    for (views, parts, _), (other_views, other_parts, _) in zip(first, again):
        assert torch.equal(views, other_views) and torch.equal(parts, other_parts)
        assert views.shape == (2, 3, 32, 32) and views.dtype == torch.uint8 and parts.shape == (2, 5)
    assert torch.equal(torch.get_rng_state(), state)  # the run's own random numbers go on as they would
    assert not torch.equal(first[0][0], view_pairs(seed=1)[5][0])
    assert not torch.equal(first[0][0][0], first[0][0][1])


def test_workers_show_the_same_views():
    batches = [list(training_loader(view_pairs(), range(3, 11), 4, workers, False)) for workers in (0, 2)]
    for (views, parts, _), (other_views, other_parts, _) in zip(*batches):
        assert torch.equal(views, other_views) and torch.equal(parts, other_parts)


def test_positions_take_the_folders_in_turn(monkeypatch):
    seen = []
    monkeypatch.setattr(ViewPairs, "_cut", lambda self, path, generator: (seen.append(path), None))
    pairs = view_pairs()
    for position in range(16):
        pairs[position]
    assert [path.parent for path in seen] == [CONTENT_DIR, STYLE_DIR] * 8
    assert len(set(seen)) == 16  # an epoch shows each picture once


def test_boxes_overlap_and_stay_inside():
    generator = np.random.default_rng(0)
    for size in ((40, 60), (200, 50), (33, 33)):
        boxes = np.stack([draw_boxes(size, generator) for _ in range(200)])  # (200, 2, 4)
        assert (boxes[..., :2] >= 0).all() and (boxes[..., 2:] <= size).all()
        area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
        assert (area <= VIEW_AREA[1] * np.prod(size) + 1e-6).all()
        common = np.minimum(boxes[:, 0, 2:], boxes[:, 1, 2:]) - np.maximum(boxes[:, 0, :2], boxes[:, 1, :2])
        assert (common > 0).all()
        assert (common.prod(axis=1) >= MIN_OVERLAP * area.min(axis=1) - 1e-6).all()


def test_common_part_by_hand():
    """Boxes 0..8 and 4..12 across, 0..4 and 0..8 down: common is 4..8 across, 0..4 down."""
    boxes = np.array([[0.0, 0, 8, 4], [4, 0, 12, 8]])
    actual = common_part(boxes, np.array([False, True]))
    # In the second view it is the left half, so of the mirrored view the right half.
    assert_close(actual, torch.tensor([[0.5, 0.0, 1.0, 1.0, 0.0], [0.5, 0.0, 1.0, 0.5, 1.0]]))


def test_places_by_hand():
    """A ramp across: the means of its quarters; mirrored, the same places in the same order."""
    ramp = torch.arange(16.0).expand(1, 1, 8, 16)
    part = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]])
    desired = torch.tensor([1.5, 5.5, 9.5, 13.5]).repeat(GRID)[:, None]
    assert_close(pool_places(ramp, part), desired)
    mirrored = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]])
    assert_close(pool_places(ramp.flip(3), mirrored), desired)
    # A half that begins inside a position: cells of width 2 at 0.5, 2.5, ...; each covers half, one, half.
    part = torch.tensor([[0.5 / 16, 0.0, 8.5 / 16, 1.0, 0.0]])
    assert_close(pool_places(ramp, part), torch.tensor([1.0, 3.0, 5.0, 7.0]).repeat(GRID)[:, None])


def test_both_views_see_the_same_places(tmp_path):
    """At strength 0 colours are left alone: a place's mean colour is about equal in both views, mirrored alike."""
    path = write_map(tmp_path / "map.png", (40, 30))  # red tells the column, green the row
    pairs = ViewPairs([[path]], CropConfig(60, 64, False, 10**8), 0, 0.0)
    flips = set()
    for position in range(12):
        views, parts, _ = pairs[position]
        first, second = (pool_places(view[None].float(), part[None]) for view, part in zip(views, parts))
        assert_close(first, second, rtol=0, atol=2.5)  # of 255; neighbouring places lie 5 and more apart
        flips |= {tuple(parts[:, 4].tolist())}
    assert flips == {(0.0, 0.0), (1.0, 1.0)}


# ---------------------------------------------------------------------------------------------------- the loss


def test_infonce_loss_by_hand():
    """Two orthogonal places seen alike: -log(e^(1/t) / (e^(1/t) + 1)); lengths do not matter."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    right = math.exp(1 / TEMPERATURE)
    assert float(infonce_loss(rows, rows)) == pytest.approx(-math.log(right / (right + 1)))
    assert float(infonce_loss(rows, rows.flip(0))) == pytest.approx(-math.log(1 / (right + 1)))
    collapsed = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    assert float(infonce_loss(collapsed, collapsed)) == pytest.approx(math.log(8))


def test_vicreg_loss_by_hand():
    """Rows (1, 1), (-1, -1), (0, 0): variances and covariances are all 1; 25 * 0 + 25 * 0 + 2 * 2 * 1^2 / 2."""
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    assert float(vicreg_loss(rows, rows)) == pytest.approx(2.0, abs=1e-3)
    # 0.1 apart in one of two components: + 25 * 0.01 / 2.
    assert float(vicreg_loss(rows, rows + torch.tensor([0.1, 0.0]))) == pytest.approx(2.125, abs=1e-3)
    collapsed = torch.ones(8, 2)  # std sqrt(1e-4) in place of 1
    assert float(vicreg_loss(collapsed, collapsed)) == pytest.approx(25 * 0.99, abs=1e-3)


@pytest.mark.parametrize("name", VIEW_LOSSES)
def test_loss_of_half_precision_embeddings_is_computed_in_float32(name):
    rows = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    actual = VIEW_LOSSES[name](*rows)
    assert actual.dtype == torch.float32 and torch.equal(actual, VIEW_LOSSES[name](*rows.float()))


def test_found_share_by_hand():
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0], [0.0, -3.0]])
    assert float(found_share(rows, rows * 3)) == 1.0
    assert float(found_share(rows, rows[[1, 0, 2, 3]])) == 0.5


def test_relative_std_tells_a_collapse():
    assert float(relative_std(torch.tensor([[0.6, 0.8]]).repeat(10, 1))) == pytest.approx(0.0, abs=1e-6)
    spread = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    assert float(relative_std(spread)) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", VIEW_LOSSES)
def test_loss_is_the_mean_over_taps_of_matching_places_and_reconstructions(name):
    config = PretrainConfig(**SMALL, view_loss=name, reconstruction_weight=3.0)
    trainer = Pretrainer(config, torch.device("cpu"))
    views, parts = (torch.stack(each) for each in list(zip(*(view_pairs()[position] for position in range(3))))[:2])
    loss, metrics = trainer.losses(views, parts)
    pictures = normalize(views.flatten(0, 1))
    embeddings, reconstructions = trainer.network(pictures, parts.flatten(0, 1))
    desired = []
    for embedding in embeddings:
        rows = embedding.reshape(3, 2, GRID**2, -1)
        desired.append(VIEW_LOSSES[name](*(rows[:, view].reshape(3 * GRID**2, -1) for view in (0, 1))))
    errors = [(reconstruction - pictures).square().mean() for reconstruction in reconstructions]
    assert_close(loss, sum(desired) / len(TAPS) + 3.0 * sum(errors) / len(TAPS), rtol=1e-4, atol=1e-5)
    assert_close(metrics[METRICS.index("reconstruction_relu3_1")], errors[2], rtol=1e-4, atol=1e-5)
    assert len(metrics) == len(METRICS) and metrics[METRICS.index("loss")] == loss
    assert_close(metrics[METRICS.index("loss_relu4_1")], desired[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VIEW_LOSSES)
def test_a_few_steps_lower_the_loss(name):
    trainer = Pretrainer(PretrainConfig(**SMALL, max_iter=100, view_loss=name), torch.device("cpu"))
    views, parts = (torch.stack(each) for each in list(zip(*(view_pairs()[position] for position in range(4))))[:2])
    losses = [float(trainer.step(views, parts, iteration)[0]) for iteration in range(1, 13)]
    assert losses[-1] < losses[0] - 0.5
    assert all(norm.weight.grad is not None for norm in trainer.network.norms.values())


def test_reconstruction_weight_makes_features_give_the_view_back():
    errors = {}
    for weight in (0.0, 25.0):
        config = PretrainConfig(**SMALL, max_iter=100, reconstruction_weight=weight)
        trainer = Pretrainer(config, torch.device("cpu"))
        views, parts = (torch.stack(each) for each in list(zip(*(view_pairs()[position] for position in range(4))))[:2])
        for iteration in range(1, 13):
            metrics = trainer.step(views, parts, iteration)
        errors[weight] = metrics[[METRICS.index(f"reconstruction_{tap}") for tap in TAPS]]
    assert (errors[25.0] < 0.8 * errors[0.0]).all()


def test_learning_rate_rises_then_falls_to_nothing():
    shares = [rate_share(iteration, 100) for iteration in range(1, 101)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(after < before for before, after in zip(shares[4:], shares[5:]))
    assert 0 < shares[-1] < 1e-3 and rate_share(1, 1) == 1.0


# ------------------------------------------------------------------------------------------------------ export


def test_folded_weights_compute_the_same_features():
    network = lively_network()
    vgg = LossNetwork("vgg19")
    vgg.layers.load_state_dict(folded_weights(network))
    image = desired = normalize(natural_pictures())
    wanted = []
    for index, layer in enumerate(network.layers):
        desired = layer(desired)
        if str(index) in network.norms:
            desired = network.norms[str(index)](desired)
        if index in network.taps.values():
            wanted.append(desired)
    for actual, desired in zip(vgg(image), wanted):
        scale = desired.mean()
        assert_close(actual / scale, desired / scale, rtol=1e-4, atol=1e-4)


def test_rescaling_only_divides_every_layer_by_its_mean():
    weights, pictures = folded_weights(lively_network()), natural_pictures()
    means = mean_activations(weights, pictures, torch.device("cpu"))
    plain, scaled = LossNetwork("vgg19"), LossNetwork("vgg19")
    plain.layers.load_state_dict(weights)
    scaled.layers.load_state_dict(rescale(weights, means))
    image = normalize(pictures)
    indices = network_module.conv_indices("vgg19")
    for tap, before, after in zip(plain.taps.values(), plain(image), scaled(image)):
        mean = means[indices.index(tap - 1)]
        assert float(before.mean()) == pytest.approx(mean, rel=1e-4)
        assert_close(after, before / mean, rtol=1e-4, atol=1e-4)
    again = mean_activations(rescale(weights, means), pictures, torch.device("cpu"))
    assert again == pytest.approx([1.0] * 9, rel=1e-4)


def test_dead_layer_is_refused():
    network = lively_network()
    with torch.no_grad():
        network.norms["7"].weight.zero_()
        network.norms["7"].bias.fill_(-1.0)
    assert "a layer is dead" in user_error(export_weights, network, natural_pictures(1), torch.device("cpu"))


def test_value_beyond_half_precision_is_refused():
    network = lively_network()
    with torch.no_grad():
        network.norms["0"].bias[0] = -1e9  # never active: the mean does not show its large weight
        network.layers[0].weight[0, 0, 0, 0] = 1e7
    assert "does not fit half precision" in user_error(
        export_weights, network, natural_pictures(1), torch.device("cpu")
    )


def test_exported_file_loads_as_bundled_and_by_path(tmp_path, monkeypatch):
    pretrain(SMALL | {"save_path": str(tmp_path), "max_iter": 2})
    path = tmp_path / EXPORT_NAME
    stored = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert set(stored) == {f"features.{index}.{kind}" for index in (0, 2, 5, 7, 10, 12, 14, 16, 19)
                           for kind in ("weight", "bias")}
    monkeypatch.setattr(network_module, "BUNDLED_VGG19", path)
    bundled, _ = load_vgg("vgg19", "bundled")
    by_path, _ = load_vgg("vgg19", str(path))
    for name in bundled:
        assert torch.equal(bundled[name], by_path[name]) and bundled[name].dtype == torch.float32
    means = mean_activations(bundled, natural_pictures(8, 40), torch.device("cpu"))
    assert all(0.2 < mean < 5 for mean in means), means  # one on the pictures learned from


# ----------------------------------------------------------------------------------------- the run, and resume


def assert_same_runs(actual: Path, desired: Path) -> None:
    checkpoints = [torch.load(folder / "check_point.pth", weights_only=True) for folder in (actual, desired)]
    for name, tensor in checkpoints[1]["state_dict"].items():
        assert_close(checkpoints[0]["state_dict"][name], tensor, rtol=0, atol=0, msg=name)
    assert read_metrics(actual) == read_metrics(desired)
    exported = [torch.load(folder / EXPORT_NAME, weights_only=True) for folder in (actual, desired)]
    assert all(torch.equal(exported[0][name], tensor) for name, tensor in exported[1].items())


def stop_in(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretraining of any kind gets SIGINT in `iteration`, until `monkeypatch` is undone."""
    real = Pretrainer.step

    def step_and_stop(self, views, parts, at):
        if at == iteration:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, views, parts, at)

    monkeypatch.setattr(Pretrainer, "step", step_and_stop)


def test_stopped_and_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, capsys):
    """A stop inside a check interval; the rest with a worker process."""
    settings = SMALL | {"max_iter": 6, "check_iter": 3}
    assert pretrain(settings | {"save_path": str(tmp_path / "whole")}) == 0

    with monkeypatch.context() as patch:
        stop_in(2, patch)
        assert pretrain(settings | {"save_path": str(tmp_path / "halves")}) == 130
    assert "python main.py --mode pretrain --resume --save_path" in capsys.readouterr().err
    assert not (tmp_path / "halves" / EXPORT_NAME).exists()
    assert pretrain({"save_path": str(tmp_path / "halves"), "resume": True, "num_workers": 1}) == 0
    assert_same_runs(tmp_path / "halves", tmp_path / "whole")

    rows = read_metrics(tmp_path / "whole")
    assert [row["iteration"] for row in rows] == [3, 6]
    assert all(set(METRICS) | {f"held_out_{name}" for name in METRICS} <= row.keys() for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())


# ------------------------------------------------------------------------------------------------ the decoder


def decoder_trainer(**changes) -> DecoderPretrainer:
    return DecoderPretrainer(PretrainConfig(**SMALL | {"vgg_weights": "random"} | changes), torch.device("cpu"))


@pytest.mark.parametrize("upsampling", [None, "bilinear"])
def test_decoder_learns_to_give_the_views_back(tmp_path, upsampling):
    trainer = decoder_trainer(max_iter=100, upsampling=upsampling)
    views = torch.stack([view_pairs()[position][0] for position in range(4)])
    before = {name: tensor.clone() for name, tensor in trainer.encoder.state_dict().items()}
    errors = [float(trainer.step(views, None, iteration)[0]) for iteration in range(1, 25)]
    assert errors[-1] < 0.6 * errors[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.encoder.state_dict().items())

    # The file makes the same pictures as the network with its normalisations.
    trainer.network.eval()
    error, metrics = trainer.losses(views, None)
    assert metrics.tolist() == [error.item()]
    trainer.export(tmp_path, None)
    network, checkpoint = load_network(tmp_path / DECODER_EXPORT_NAME)
    pictures = normalize(views.flatten(0, 1))
    with torch.no_grad():
        output = network.decoder(network.encoder(pictures))
        assert_close(output, trainer.network(trainer.encoder(pictures)), rtol=1e-3, atol=1e-4)
    assert (output - pictures).square().mean().item() == pytest.approx(error.item(), rel=1e-3)
    assert checkpoint["vgg_weights"] == trainer.vgg_origin
    assert network.config == replace(NetworkConfig.full(), upsampling=upsampling or "nearest")


def test_training_starts_from_the_decoder_and_resumes(tmp_path):
    settings = SMALL | {"vgg_weights": "random", "max_iter": 4}
    assert pretrain(settings | {"save_path": str(tmp_path / "whole")}) == 0
    assert pretrain(settings | {"save_path": str(tmp_path / "halves"), "max_iter": 2}) == 0
    resumed = {"save_path": str(tmp_path / "halves"), "resume": True}
    assert pretrain(resumed | {"max_iter": 4}) == 0
    assert [row["iteration"] for row in read_metrics(tmp_path / "whole")] == [2, 4]
    assert {"loss", "held_out_loss", "iteration"} == read_metrics(tmp_path / "halves")[-1].keys()
    assert "random" in user_error(pretrain, resumed | {"max_iter": 9, "vgg_weights": "bundled"})
    assert "--upsampling None" in user_error(pretrain, resumed | {"max_iter": 9, "upsampling": "bilinear"})

    start = tmp_path / "whole" / DECODER_EXPORT_NAME
    config = TrainConfig(content_dir="x", style_dir="x", save_path="x", load_path=str(start), vgg_weights="random",
                         encoder_lr=0.0)
    trainer, origin = build_trainer(config, torch.device("cpu"), None)
    assert trainer.losses.encoder_is_loss_network  # the weights went through both files unchanged
    assert origin == load_network(start)[1]["vgg_weights"]


def test_decoder_of_weights_that_changed_is_not_resumed(tmp_path):
    weights = {f"features.{name}": tensor for name, tensor in load_vgg("vgg19", "random")[0].items()}
    torch.save(weights, tmp_path / "vgg.pth")
    settings = SMALL | {"vgg_weights": str(tmp_path / "vgg.pth"), "save_path": str(tmp_path / "run"), "max_iter": 1}
    assert pretrain(settings) == 0
    torch.save({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "vgg.pth")
    resumed = {"save_path": str(tmp_path / "run"), "resume": True, "max_iter": 2}
    assert "was started with VGG weights" in user_error(pretrain, resumed)


# ------------------------------------------------------------------------------------------------ the student


def student_settings(folder: Path, **changes) -> dict:
    """A narrow student and a teacher twice as wide, in files."""
    files = {}
    for name, width, seed in (("teacher", 12, 1), ("load_path", 6, 0)):
        files[name] = str(folder / f"{name}.pth")
        origin = {"vgg_weights": "the teacher's"} if name == "teacher" else {}
        torch.save(model_checkpoint(small_network(width=width, seed=seed), **origin), files[name])
    return SMALL | files | {"lr": 5e-3} | changes


def student_trainer(folder: Path, **changes) -> StudentPretrainer:
    return StudentPretrainer(PretrainConfig(**student_settings(folder, **changes)), torch.device("cpu"))


def test_each_picture_is_painted_in_the_style_of_the_next_one():
    network = small_network()
    pictures = normalize(natural_pictures(6, size=32))  # three pictures, two views each
    output, feature = paint(network.encoder, network.decoder, pictures)
    for number in range(6):
        style = pictures[(number + 2) % 6][None]
        with torch.no_grad():
            desired = network(pictures[number][None], style)
        assert_close(output[number][None], desired, rtol=1e-4, atol=1e-4)
    assert torch.equal(feature, network.encoder(pictures))
    assert not torch.allclose(output, network.decoder(adain(feature, *channel_statistics(feature))), atol=1e-2)


def test_student_loss_by_definition(tmp_path):
    trainer = student_trainer(tmp_path)
    views = torch.stack([view_pairs()[position][0] for position in range(4)])
    trainer.network.eval()
    network, teacher = small_network(), small_network(width=12, seed=1)  # fresh norms divide by 1, with the biases
    pictures = normalize(views.flatten(0, 1))
    with torch.no_grad():
        loss, metrics = trainer.losses(views, None)
        output, own = paint(network.encoder, network.decoder, pictures)
        target, feature = paint(teacher.encoder, teacher.decoder, pictures)
        error = (trainer.network.projection(own) - feature).square().mean() / feature.square().mean()
    desired = [(output - target).square().mean() + error, (output - target).square().mean(), error]
    assert metrics.tolist() == pytest.approx([value.item() for value in desired], rel=1e-3)
    assert loss.item() == pytest.approx(metrics[0].item())


@pytest.mark.parametrize("new_weights", [False, True])
def test_student_comes_nearer_to_its_teacher(tmp_path, new_weights):
    trainer = student_trainer(tmp_path, max_iter=100, new_weights=new_weights)
    views = torch.stack([view_pairs()[position][0] for position in range(4)])
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    errors = torch.stack([trainer.step(views, None, iteration) for iteration in range(1, 41)])
    assert (errors[-1] < 0.7 * errors[0]).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.state_dict().items())

    # The file paints as the network with its normalisations, and knows whose losses it was taught with.
    trainer.network.eval()
    trainer.export(tmp_path, None)
    network, checkpoint = load_network(tmp_path / STUDENT_EXPORT_NAME)
    assert network.config == small_config() and checkpoint["vgg_weights"] == "the teacher's"
    pictures = normalize(views.flatten(0, 1))
    with torch.no_grad():
        assert_close(paint(network.encoder, network.decoder, pictures)[0], trainer.network(pictures)[0], rtol=1e-3,
                     atol=1e-3)


def test_student_upsamples_as_its_file_says_unless_another_is_asked_for(tmp_path):
    settings = student_settings(tmp_path)
    network = small_network()
    network.use_upsampling("bilinear")
    torch.save(model_checkpoint(network), settings["load_path"])
    for changes, desired in (({}, "bilinear"), ({"upsampling": "nearest"}, "nearest")):
        trainer = StudentPretrainer(PretrainConfig(**settings | changes), torch.device("cpu"))
        modes = {layer.mode for layer in trainer.network.decoder.layers if isinstance(layer, torch.nn.Upsample)}
        trainer.export(tmp_path, None)
        assert modes == {desired} == {load_network(tmp_path / STUDENT_EXPORT_NAME)[0].config.upsampling}


def test_new_weights_take_only_the_widths(tmp_path):
    given, new = (student_trainer(tmp_path, new_weights=new).network.encoder.layers for new in (False, True))
    assert torch.equal(given[0].weight, small_network().encoder.layers[0][0].weight)
    assert given[0].weight.shape == new[0].weight.shape and not torch.allclose(given[0].weight, new[0].weight)


def test_stopped_and_resumed_student_equals_uninterrupted_one(tmp_path, monkeypatch):
    settings = student_settings(tmp_path, max_iter=4)
    assert pretrain(settings | {"save_path": str(tmp_path / "whole")}) == 0
    with monkeypatch.context() as patch:
        stop_in(1, patch)
        assert pretrain(settings | {"save_path": str(tmp_path / "halves")}) == 130
    resumed = {"save_path": str(tmp_path / "halves"), "resume": True}
    assert pretrain(resumed) == 0
    rows = [read_metrics(tmp_path / name) for name in ("halves", "whole")]
    assert rows[0] == rows[1] and [row["iteration"] for row in rows[0]] == [2, 4]
    assert {"loss", "output_error", "feature_error", "held_out_output_error"} <= rows[0][-1].keys()
    networks = [load_network(tmp_path / name / STUDENT_EXPORT_NAME)[0].state_dict() for name in ("halves", "whole")]
    assert all(torch.equal(networks[0][name], tensor) for name, tensor in networks[1].items())

    other = settings["load_path"]
    assert f"not {other}; start a new run" in user_error(pretrain, resumed | {"teacher": other})
    assert "--new_weights False, not True" in user_error(pretrain, resumed | {"new_weights": True})


def test_one_folder_and_nothing_held_out(tmp_path):
    settings = {name: value for name, value in SMALL.items() if name != "content_dir"} | {"holdout": 0.0}
    assert pretrain(settings | {"save_path": str(tmp_path), "max_iter": 1}) == 0
    (row,) = read_metrics(tmp_path)
    assert not any(name.startswith("held_out") for name in row)
    assert torch.load(tmp_path / "check_point.pth", weights_only=True)["picture_counts"] == [8]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    pretrain(SMALL | {"save_path": str(tmp_path), "max_iter": 1})
    good = (tmp_path / "check_point.pth").read_bytes()
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 5, "lr": 1e30, "check_iter": 9}
    assert "is not finite" in user_error(pretrain, again)
    assert (tmp_path / "check_point.pth").read_bytes() == good


def test_broken_pictures_are_counted_in_their_folder(tmp_path, capsys):
    for number in range(12):
        write_picture(tmp_path / "style" / f"{number}.png", (48, 40), (20 * number, 0, 0))
    (tmp_path / "style" / "broken.png").write_bytes(b"no picture")
    pretrain(SMALL | {"style_dir": str(tmp_path / "style"), "save_path": str(tmp_path / "run"), "max_iter": 1})
    assert f"--style_dir {tmp_path / 'style'}: 13 pictures, 1 skipped" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    ({"save_path": None}, "--save_path is needed in pretrain mode"),
    ({"content_dir": None, "style_dir": None}, "--content_dir or --style_dir is needed"),
    ({"cropsize": 36}, "--cropsize 36: a multiple of 8"),
    ({"content_dir": "nowhere"}, "--content_dir nowhere: no such folder"),
    ({"resume": True}, "check_point.pth is not there"),
    ({"teacher": "a.pth"}, "--teacher and --load_path are needed together"),
    ({"load_path": "a.pth"}, "--teacher and --load_path are needed together"),
    ({"teacher": "a.pth", "load_path": "b.pth", "vgg_weights": "random"}, "give one of the two"),
    ({"teacher": "a.pth", "load_path": "b.pth", "batch_size": 1}, "2 or more are needed"),
    ({"teacher": "a.pth", "load_path": "b.pth"}, "--load_path b.pth: no such file"),
    ({"new_weights": True}, "--new_weights: --load_path says"),
    ({"upsampling": "bilinear"}, "--upsampling bilinear: a VGG has no decoder"),
])
def test_bad_settings_are_refused(tmp_path, changes, message):
    assert message in user_error(pretrain, SMALL | {"save_path": str(tmp_path / "run")} | changes)


def test_runs_are_not_mixed_up(tmp_path):
    """A run is not overwritten, and another mode's checkpoint is not resumed."""
    (tmp_path / "check_point.pth").write_bytes(b"")
    assert "holds a run already" in user_error(pretrain, SMALL | {"save_path": str(tmp_path)})
    torch.save({"state_dict": {}, "train_config": {}}, tmp_path / "check_point.pth")
    assert "holds no pretraining run" in user_error(pretrain, {"save_path": str(tmp_path), "resume": True})


def test_command_line(tmp_path, capsys):
    flags = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    assert main(["--mode", "pretrain", *flags, "--max_iter", "1", "--save_path", str(tmp_path)]) == 0
    assert (tmp_path / EXPORT_NAME).exists()
    assert main(["--mode", "pretrain", *flags, "--holdout", "1", "--save_path", str(tmp_path)]) == 2
    assert "a number from 0 to 0.9 is needed" in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in user_error(pretrain, SMALL | {"save_path": str(tmp_path)})


def test_metrics_name_the_taps_of_the_loss_network():
    assert TAPS == tuple(LossNetwork("vgg19").taps)

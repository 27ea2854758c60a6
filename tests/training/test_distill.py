"""Distillation: pictures by position, the student and its loss, painted triples, resume, refusals. Small crops, CPU."""

import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    CONTENT_DIR,
    CPU,
    ROOT,
    STYLE_DIR,
    read_metrics,
    small_config,
    small_network,
    stop_after,
    user_error,
    words,
    write_map,
    write_picture,
)
from PIL import Image
from torch.testing import assert_close

import distill as distill_module
from data import PictureError, find_pictures, load_triple, normalize, open_triples, prepare_picture, split_holdout
from distill import DistillConfig, Distiller, PaintedDistiller, distill, paint, rate_share
from loss import painted_loss
from main import main
from network import adain, channel_statistics
from train import TrainConfig, build_trainer
from training.sampling import CropConfig, MixedPictures, PaintedTriples, check_failures, collate, training_batches
from weights import STUDENT_NAME, load_network, model_checkpoint

SMALL = dict(imsize=40, cropsize=32, batch_size=4, num_workers=0, gpu_no=-1, amp="off", check_iter=2, holdout=0.25,
             lr=5e-3)
FOLDERS = dict(content_dir=str(CONTENT_DIR), style_dir=str(STYLE_DIR))
CROP = CropConfig(40, 32, False, 10**8)


@pytest.fixture(autouse=True)
def little_to_measure(monkeypatch):
    monkeypatch.setattr(distill_module, "HELD_OUT_PICTURES", 4)


def natural_pictures(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.cat([prepare_picture(path, size, size) for path in find_pictures(CONTENT_DIR, "")[:count]])


def settings(folder: Path, **changes) -> dict:
    """A narrow student and a teacher twice as wide, in files."""
    files = {}
    for name, width, seed in (("teacher", 12, 1), ("load_path", 6, 0)):
        files[name] = str(folder / f"{name}.pth")
        origin = {"vgg_weights": "the teacher's"} if name == "teacher" else {}
        torch.save(model_checkpoint(small_network(width=width, seed=seed), **origin), files[name])
    return SMALL | FOLDERS | files | changes


def distiller(folder: Path, **changes) -> Distiller:
    return Distiller(DistillConfig(**settings(folder, **changes)), CPU)


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


# ---------------------------------------------------------------------------------------- pictures by position


def mixed_pictures(seed: int = 0) -> MixedPictures:
    return MixedPictures([find_pictures(folder, "") for folder in (CONTENT_DIR, STYLE_DIR)], CROP, seed)


def test_pictures_depend_on_seed_and_position_alone():
    pictures = mixed_pictures()
    first = [pictures[position][0] for position in (5, 6)]
    again = [mixed_pictures()[position][0] for position in (6, 5)][::-1]
    for picture, other in zip(first, again):
        assert torch.equal(picture, other) and picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
    assert not torch.equal(first[0], mixed_pictures(seed=1)[5][0])


def test_workers_show_the_same_pictures():
    batches = [list(training_batches(mixed_pictures(), range(3, 11), 4, workers, False)) for workers in (0, 2)]
    assert [pictures.shape for pictures, _ in batches[0]] == [(4, 3, 32, 32)] * 2
    assert all(torch.equal(pictures, other) for (pictures, _), (other, _) in zip(*batches))


def test_positions_take_the_folders_in_turn(monkeypatch):
    seen = []
    monkeypatch.setattr(MixedPictures, "_cut", lambda self, path, generator: seen.append(path))
    pictures = mixed_pictures()
    for position in range(16):
        pictures[position]
    assert [path.parent for path in seen] == [CONTENT_DIR, STYLE_DIR] * 8
    assert len(set(seen)) == 16  # an epoch shows each picture once


def step(trainer: Distiller, iteration: int, *pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a run does at each iteration."""
    trainer.begin(iteration)
    return trainer.step(*pictures)


# ------------------------------------------------------------------------------------------- painted pictures


def paint_triples(folder: Path, count: int = 12, size: tuple[int, int] = (44, 36)) -> Path:
    """Triples whose pictures tell where a pixel is from; style is red, and painted is content with blue 200."""
    for number in range(count):
        write_map(folder / "content" / f"{number:02}.png", size)
        write_picture(folder / "style" / f"{number:02}.PNG", (50, 40), (255, number, 0))
        write_map(folder / "painted" / f"{number:02}.png", size, number=200)
    return folder


def test_triples_belong_together_by_name(tmp_path):
    folder = paint_triples(tmp_path, 11)
    for kind in ("content", "style", "painted"):
        write_picture(folder / kind / "deep" / "00.jpg", (60, 40))
    partners, tally = open_triples(folder, "--teacher", 40, 10**8)
    assert len(partners) == tally.total == 12 and not tally.paths
    for content, (style, painted) in partners.items():
        names = [path.relative_to(folder / kind).with_suffix("")
                 for path, kind in ((content, "content"), (style, "style"), (painted, "painted"))]
        assert names[0] == names[1] == names[2]


@pytest.mark.parametrize("size", [(44, 36), (88, 72)])
def test_content_and_painted_are_cut_at_the_same_place(tmp_path, size):
    """Red and green tell the place: equal in both, at crops that differ; the style is a crop of its own."""
    crop = CropConfig(36, 32, False, 10**8)
    partners, _ = open_triples(paint_triples(tmp_path), "--teacher", crop.imsize, crop.max_pixels)
    for painted in tmp_path.glob("painted/*"):  # painted at another size
        Image.open(painted).resize(size, Image.Resampling.NEAREST).save(painted)
    triples = PaintedTriples([list(partners)], crop, 0, partners)
    places = set()
    for position in range(12):
        content, style, painted, failures = triples[position]
        assert content.shape == style.shape == painted.shape == (3, 32, 32) and not failures
        assert_close(content[:2], painted[:2], rtol=0, atol=0 if size == (44, 36) else 3)
        assert (content[2] == 0).all() and (painted[2] == 200).all() and (style[0] == 255).all()
        places.add(tuple(content[:2, 0, 0].tolist()))
    assert len(places) > 6
    again = PaintedTriples([list(partners)], crop, 0, partners)[11]
    assert all(torch.equal(picture, other) for picture, other in zip(again[:3], (content, style, painted)))


def test_unusable_triples_are_skipped_and_counted(tmp_path, capsys):
    folder = paint_triples(tmp_path, 40)
    (folder / "style" / "03.PNG").unlink()
    (folder / "painted" / "05.png").write_bytes(b"no picture")
    write_picture(folder / "painted" / "07.png", (40, 40))  # cut square
    write_picture(folder / "painted" / "08.png", (40, 60))  # turned
    partners, tally = open_triples(folder, "--teacher", 40, 10**8)
    assert {path.stem for path in partners} == {f"{number:02}" for number in range(40)} - {"03", "05", "07", "08"}
    assert "40 pictures, 4 skipped" in tally.summary()
    reasons = capsys.readouterr().err
    assert "no 03 in style" in reasons and "the same aspect is needed" in reasons
    (folder / "content" / "09.png").unlink()
    assert "5 of 40 pictures cannot be used" in user_error(open_triples, folder, "--teacher", 40, 10**8)


def test_a_triple_that_breaks_later_is_replaced(tmp_path):
    partners, tally = open_triples(paint_triples(tmp_path, 20), "--teacher", 40, 10**8)
    (tmp_path / "painted" / "05.png").unlink()
    triples = PaintedTriples([list(partners)], CROP, 0, partners)
    *pictures, failures = collate([triples[position] for position in range(20)])
    check_failures(failures, [tally])
    assert [picture.shape for picture in pictures] == [(20, 3, 32, 32)] * 3
    assert tally.paths == {str(tmp_path / "content" / "05.png")} and (pictures[2][:, 2] == 200).all()


def test_rounded_sides_are_brought_to_the_content(tmp_path):
    paths = [write_picture(tmp_path / f"{size[0]}.png", size) for size in ((1000, 667), (50, 50), (384, 256))]
    content, _, painted = load_triple(*paths, 256, 10**8)
    assert content.size == painted.size == (384, 256)
    other = write_picture(tmp_path / "other.png", (376, 256))
    with pytest.raises(PictureError, match="the same aspect is needed"):
        load_triple(paths[0], paths[1], other, 256, 10**8)


def test_folders_without_triples_are_refused(tmp_path):
    assert "sub-folders content, style, painted" in user_error(open_triples, tmp_path, "--teacher", 40, 10**8)
    for kind in ("content", "style", "painted"):
        (tmp_path / kind).mkdir()
    assert "content: no picture in it" in user_error(open_triples, tmp_path, "--teacher", 40, 10**8)
    for kind in ("content", "style", "painted"):
        write_picture(tmp_path / kind / f"{kind}.png")
    assert "no picture has the same name in" in user_error(open_triples, tmp_path, "--teacher", 40, 10**8)


def test_painted_loss_by_hand():
    """One pixel of 16 x 16 and 3 channels is off by 6.4 in one channel: colours 6.4 / 768, means 0.1 / 12, and two
    of 16 * 15 * 3 differences each way."""
    painted = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    output = painted.clone()
    assert float(painted_loss(output, painted)) == 0.0
    output[0, 1, 5, 6] += 6.4
    assert float(painted_loss(output, painted)) == pytest.approx(6.4 / 768 + 0.1 / 12 + 2 * 2 * 6.4 / 720, rel=1e-4)
    assert float(painted_loss(painted + 0.5, painted)) == pytest.approx(1.0, rel=1e-4)  # no edge differs


def test_painted_loss_of_half_precision_is_computed_in_float32():
    pictures = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    actual = painted_loss(*pictures)
    assert actual.dtype == torch.float32 and torch.equal(actual, painted_loss(*pictures.float()))


def painted_settings(folder: Path, **changes) -> dict:
    given = settings(folder, teacher=str(paint_triples(folder / "triples")), **changes)
    return {name: value for name, value in given.items() if name not in FOLDERS}


def test_student_comes_nearer_to_painted_pictures(tmp_path):
    trainer = PaintedDistiller(DistillConfig(**painted_settings(tmp_path, max_iter=100)), CPU)
    content, style = natural_pictures(4), natural_pictures(4).flip(0)
    painted = 255 - content
    losses = [float(step(trainer, iteration, content, style, painted)["loss"]) for iteration in range(1, 41)]
    assert losses[-1] < 0.8 * losses[0]
    trainer.network.eval()
    loss, metrics = trainer.losses(content, style, painted)
    trainer.check(tmp_path, 1)
    network, checkpoint = load_network(tmp_path / STUDENT_NAME)
    with torch.no_grad():
        output = network(normalize(content), normalize(style))
    assert metrics.tolist() == [loss.item()] and checkpoint["vgg_weights"] is None
    assert loss.item() == pytest.approx(painted_loss(output, normalize(painted)).item(), rel=1e-3)


def test_run_of_painted_pictures_stops_and_resumes(tmp_path, monkeypatch):
    given = painted_settings(tmp_path, max_iter=4)
    assert distill(given | {"save_path": str(tmp_path / "whole")}) == 0
    with monkeypatch.context() as patch:
        stop_after(1, patch, signal.SIGINT)
        assert distill(given | {"save_path": str(tmp_path / "halves")}) == 130
    assert distill({"save_path": str(tmp_path / "halves"), "resume": True, "num_workers": 1}) == 0
    assert_same_runs(tmp_path / "halves", tmp_path / "whole")
    assert {"iteration", "loss", "held_out_loss"} == read_metrics(tmp_path / "whole")[-1].keys()


# ------------------------------------------------------------------------------------------------ the student


def test_each_picture_is_painted_in_the_style_of_the_next_one():
    network = small_network()
    pictures = normalize(natural_pictures(6))
    output, feature = paint(network.encoder, network.decoder, pictures)
    for number in range(6):
        style = pictures[(number + 1) % 6][None]
        with torch.no_grad():
            desired = network(pictures[number][None], style)
        assert_close(output[number][None], desired, rtol=1e-4, atol=1e-4)
    assert torch.equal(feature, network.encoder(pictures))
    assert not torch.allclose(output, network.decoder(adain(feature, *channel_statistics(feature))), atol=1e-2)


def test_student_loss_by_definition(tmp_path):
    trainer = distiller(tmp_path)
    given = natural_pictures()
    trainer.network.eval()
    network, teacher = small_network(), small_network(width=12, seed=1)  # fresh norms divide by 1, with the biases
    pictures = normalize(given)
    with torch.no_grad():
        loss, metrics = trainer.losses(given)
        output, own = paint(network.encoder, network.decoder, pictures)
        target, feature = paint(teacher.encoder, teacher.decoder, pictures)
        error = (trainer.network.projection(own) - feature).square().mean() / feature.square().mean()
    desired = [(output - target).square().mean() + error, (output - target).square().mean(), error]
    assert metrics.tolist() == pytest.approx([value.item() for value in desired], rel=1e-3)
    assert loss.item() == pytest.approx(metrics[0].item())


@pytest.mark.parametrize("new_weights", [False, True])
def test_student_comes_nearer_to_its_teacher(tmp_path, new_weights):
    trainer = distiller(tmp_path, max_iter=100, new_weights=new_weights)
    given = natural_pictures()
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    first, *_, last = [step(trainer, iteration, given) for iteration in range(1, 41)]
    assert all(last[name] < 0.7 * first[name] for name in trainer.metrics)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.state_dict().items())

    # The file paints as the network with its normalisations, and knows whose losses it was taught with.
    trainer.network.eval()
    trainer.check(tmp_path, 1)
    network, checkpoint = load_network(tmp_path / STUDENT_NAME)
    assert network.config == small_config() and checkpoint["vgg_weights"] == "the teacher's"
    pictures = normalize(given)
    with torch.no_grad():
        assert_close(paint(network.encoder, network.decoder, pictures)[0],
                     paint(trainer.network.encoder, trainer.network.decoder, pictures)[0], rtol=1e-3, atol=1e-3)


def test_student_upsamples_and_pools_as_its_file_says_unless_another_is_asked_for(tmp_path):
    files = settings(tmp_path)
    network = small_network()
    network.use("bilinear", pooling="blur")
    torch.save(model_checkpoint(network), files["load_path"])
    for changes, desired, pooling in (({}, "bilinear", "blur"), ({"upsampling": "nearest"}, "nearest", "blur"),
                                      ({"pooling": "avg"}, "bilinear", "avg")):
        trainer = Distiller(DistillConfig(**files | changes), CPU)
        modes = {layer.mode for layer in trainer.network.decoder.layers if isinstance(layer, torch.nn.Upsample)}
        trainer.check(tmp_path, 1)
        saved = load_network(tmp_path / STUDENT_NAME)[0].config
        assert modes == {desired} == {saved.upsampling} and saved.pooling == pooling


def test_new_weights_take_only_the_widths(tmp_path):
    given, new = (distiller(tmp_path, new_weights=new).network.encoder.layers for new in (False, True))
    assert torch.equal(given[0].weight, small_network().encoder.layers[0][0].weight)
    assert given[0].weight.shape == new[0].weight.shape and not torch.allclose(given[0].weight, new[0].weight)


def test_student_that_pads_by_reflection(tmp_path):
    files = settings(tmp_path)
    network = small_network()
    network.use(padding="reflect")
    torch.save(model_checkpoint(network), files["load_path"])
    trainer = Distiller(DistillConfig(**files), CPU)
    given = natural_pictures()
    step(trainer, 1, given)
    trainer.network.eval()
    trainer.check(tmp_path, 1)
    student, _ = load_network(tmp_path / STUDENT_NAME)
    assert student.config == replace(small_config(), padding="reflect")
    with torch.no_grad():
        feature = trainer.network.encoder(normalize(given))
        assert_close(student.encoder(normalize(given)), feature, rtol=1e-3, atol=1e-3)
        student.use(padding="zeros")
        assert not torch.allclose(student.encoder(normalize(given)), feature, rtol=1e-2, atol=1e-2)


def test_learning_rate_rises_then_falls_to_nothing():
    shares = [rate_share(iteration, 100) for iteration in range(1, 101)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(after < before for before, after in zip(shares[4:], shares[5:]))
    assert 0 < shares[-1] < 1e-3 and rate_share(1, 1) == 1.0


# ----------------------------------------------------------------------------------------- the run, and resume


def assert_same_runs(actual: Path, desired: Path) -> None:
    checkpoints = [torch.load(folder / "check_point.pth", weights_only=True) for folder in (actual, desired)]
    for name, tensor in checkpoints[1]["state_dict"].items():
        assert_close(checkpoints[0]["state_dict"][name], tensor, rtol=0, atol=0, msg=name)
    assert read_metrics(actual) == read_metrics(desired)
    exported = [load_network(folder / STUDENT_NAME)[0].state_dict() for folder in (actual, desired)]
    assert all(torch.equal(exported[0][name], tensor) for name, tensor in exported[1].items())


def test_stopped_and_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, capsys):
    """A stop inside a check interval; the rest with a worker process."""
    given = settings(tmp_path, max_iter=6, check_iter=3)
    assert distill(given | {"save_path": str(tmp_path / "whole")}) == 0
    with monkeypatch.context() as patch:
        stop_after(2, patch, signal.SIGINT)
        assert distill(given | {"save_path": str(tmp_path / "halves")}) == 130
    assert "python main.py --mode distill --resume --save_path" in capsys.readouterr().err
    assert not (tmp_path / "halves" / STUDENT_NAME).exists()
    resumed = {"save_path": str(tmp_path / "halves"), "resume": True}
    assert distill(resumed | {"num_workers": 1}) == 0
    assert_same_runs(tmp_path / "halves", tmp_path / "whole")

    rows = read_metrics(tmp_path / "whole")
    assert [row["iteration"] for row in rows] == [3, 6]
    for row in rows:
        assert set(Distiller.metrics) | {f"held_out_{name}" for name in Distiller.metrics} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())

    other = given["load_path"]
    assert f"not {other}; start a new run" in user_error(distill, resumed | {"teacher": other})
    assert "--new_weights False, not True" in user_error(distill, resumed | {"new_weights": True})
    assert "--batch_size 1" in user_error(distill, resumed | {"batch_size": 1})


def test_training_starts_from_the_student(tmp_path):
    assert distill(settings(tmp_path, save_path=str(tmp_path / "run"), max_iter=1)) == 0
    start = str(tmp_path / "run" / STUDENT_NAME)
    config = TrainConfig(content_dir="x", style_dir="x", save_path="x", load_path=start, vgg_weights="random")
    trainer = build_trainer(config, CPU, None)
    desired = load_network(start)[0].state_dict()
    assert all(torch.equal(tensor, desired[name]) for name, tensor in trainer.network.state_dict().items())


def test_one_folder_and_nothing_held_out(tmp_path):
    assert distill(settings(tmp_path, content_dir=None, holdout=0.0, save_path=str(tmp_path), max_iter=1)) == 0
    (row,) = read_metrics(tmp_path)
    assert not any(name.startswith("held_out") for name in row)
    assert torch.load(tmp_path / "check_point.pth", weights_only=True)["picture_counts"] == [8]


def test_folder_of_a_run_is_a_teacher_network(tmp_path):
    paint_triples(tmp_path / "run")
    (tmp_path / "run" / "pruned.pth").touch()
    assert not DistillConfig(teacher=str(tmp_path / "run")).teacher_is_pictures
    (tmp_path / "run" / "pruned.pth").unlink()
    assert DistillConfig(teacher=str(tmp_path / "run")).teacher_is_pictures


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    distill(settings(tmp_path, save_path=str(tmp_path), max_iter=1))
    good = (tmp_path / "check_point.pth").read_bytes()
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 5, "lr": 1e30, "check_iter": 9}
    assert "is not finite" in user_error(distill, again)
    assert (tmp_path / "check_point.pth").read_bytes() == good


def test_broken_pictures_are_counted_in_their_folder(tmp_path, capsys):
    for number in range(12):
        write_picture(tmp_path / "style" / f"{number}.png", (48, 40), (20 * number, 0, 0))
    (tmp_path / "style" / "broken.png").write_bytes(b"no picture")
    distill(settings(tmp_path, style_dir=str(tmp_path / "style"), save_path=str(tmp_path / "run"), max_iter=1))
    assert f"--style_dir {tmp_path / 'style'}: 13 pictures, 1 skipped" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    ({"save_path": None}, "--save_path is needed in distill mode"),
    ({"teacher": None}, "--teacher is needed in distill mode"),
    ({"load_path": None}, "--load_path is needed in distill mode"),
    ({"content_dir": None, "style_dir": None}, "--content_dir or --style_dir is needed"),
    ({"teacher": str(ROOT / "imgs")}, "--content_dir and --style_dir must not be given"),
    ({"load_path": str(ROOT)}, f"--load_path {ROOT}: the folder holds neither"),
    ({"cropsize": 36}, "--cropsize 36: a multiple of 8"),
    ({"resume": True}, "check_point.pth is not there"),
    ({"batch_size": 1}, "2 or more are needed"),
    ({}, "--load_path b.pth: no such file"),
])
def test_bad_settings_are_refused(tmp_path, changes, message):
    given = SMALL | FOLDERS | {"teacher": "a.pth", "load_path": "b.pth", "save_path": str(tmp_path / "run")}
    assert message in user_error(distill, given | changes)


def test_folders_are_refused_by_their_flag(tmp_path):
    given = settings(tmp_path, save_path=str(tmp_path / "run"))
    assert "--content_dir nowhere: no such folder" in user_error(distill, given | {"content_dir": "nowhere"})
    (tmp_path / "empty").mkdir()
    given |= {"content_dir": None, "style_dir": None, "teacher": str(tmp_path / "empty")}
    assert "empty: neither the folder of a run nor" in user_error(distill, given)


@pytest.mark.parametrize("other", ["train_config", "pretrain_config"])
def test_runs_are_not_mixed_up(tmp_path, other):
    """A run is not overwritten, and another mode's checkpoint is not resumed."""
    (tmp_path / "check_point.pth").write_bytes(b"")
    given = SMALL | FOLDERS | {"teacher": "a.pth", "load_path": "b.pth", "save_path": str(tmp_path)}
    assert "holds a run already" in user_error(distill, given)
    torch.save({"state_dict": {}, other: {}}, tmp_path / "check_point.pth")
    assert "holds no run of --mode distill" in user_error(distill, {"save_path": str(tmp_path), "resume": True})


def test_command_line(tmp_path, capsys):
    given = settings(tmp_path, max_iter=1, save_path=str(tmp_path / "run"))
    flags = words(given)
    assert main(["--mode", "distill", *flags]) == 0
    assert (tmp_path / "run" / STUDENT_NAME).exists()
    assert main(["--mode", "distill", *flags, "--holdout", "1"]) == 2
    assert "a number from 0 to 0.9 is needed" in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in user_error(distill, settings(tmp_path, save_path=str(tmp_path / "run")))

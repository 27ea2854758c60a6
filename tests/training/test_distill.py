"""Distillation: the split, the student and its loss, resume. Small crops, CPU."""

import hashlib
import math
import signal
from pathlib import Path

import pytest
import torch
from helpers import CONTENT_DIR, CPU, STYLE_DIR, read_metrics, small_network, stop_after, user_error, write_picture
from torch.testing import assert_close

import distill as distill_module
from data import normalize, prepare_picture
from distill import DistillConfig, Distiller, Student, distill, in_next_style, rate_share
from folders import find_pictures, split_holdout
from training.dead_units import DeadUnits
from weights import STUDENT_NAME, load_network, model_checkpoint

SMALL = dict(imsize=40, cropsize=32, batch_size=4, num_workers=0, gpu_no=-1, amp="off", check_iter=2, holdout=0.25,
             lr=5e-3)
FOLDERS = dict(content_dir=str(CONTENT_DIR), style_dir=str(STYLE_DIR))


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
    trainer = Distiller(DistillConfig(**settings(folder, **changes)), CPU)
    trainer.dead_units = DeadUnits(natural_pictures(), natural_pictures().roll(-1, dims=0))
    return trainer


def test_split_goes_by_name_alone():
    """By the first 16 hexadecimal digits of the SHA-256 of the name without suffix and _a to _d, as a fraction, against
    the share. Order, folder and other pictures do not matter; crops of one picture are on one side."""
    paths = [Path("one") / f"{number}{crop}.{kind}" for number in range(100)
             for crop, kind in (("", "jpg"), ("_a", "PNG"), ("_d", "webp"))]
    for share in (0.0, 0.1, 0.3):
        held_out = [path for path in paths if
                    int(hashlib.sha256(path.stem.split("_")[0].encode()).hexdigest()[:16], 16) / 16**16 < share]
        assert split_holdout(paths, share, "") == ([path for path in paths if path not in held_out], held_out)
        assert 0.5 * share <= len(held_out) / len(paths) <= 1.5 * share
    assert "--style_dir two: --holdout 0.3 would hold all its 1 pictures out" in \
        user_error(split_holdout, held_out[:1], 0.3, "--style_dir two")


def test_each_picture_is_painted_in_the_style_of_the_next_one():
    network = small_network(adain_levels=2).double()
    pictures = normalize(natural_pictures(6)).double()
    output, feature = in_next_style(network, pictures)
    for number in range(6):
        desired = network(pictures[number][None], pictures[(number + 1) % 6][None])
        assert_close(output[number][None], desired, rtol=1e-9, atol=1e-12)
    assert torch.equal(feature, network.encoder(pictures))
    assert not torch.allclose(output, network(pictures, pictures), atol=1e-2)


@pytest.mark.parametrize("padding, levels", [("zeros", 1), ("reflect", 3)])
@torch.no_grad()
def test_folded_network_does_what_the_student_does(padding, levels):
    """In float64 but for the weights, which the folded network holds in float32."""
    network = small_network(adain_levels=levels)
    network.use(padding=padding)
    student, pictures = Student(network, 12), normalize(natural_pictures())
    for _ in range(3):  # statistics other than those at the start
        in_next_style(student, pictures)
    student.eval()
    folded = student.folded()
    assert folded.config == network.config
    desired, actual = (in_next_style(each.double(), pictures.double()) for each in (student, folded))
    assert_close(actual, desired, rtol=1e-4, atol=1e-4)


def test_student_errors_by_definition(tmp_path):
    trainer = distiller(tmp_path)
    given = natural_pictures()
    trainer.network.eval()
    network, teacher = small_network(), small_network(width=12, seed=1)  # fresh norms divide by 1, with the biases
    pictures = normalize(given)
    with torch.no_grad():
        actual = trainer.errors(given)
        (output, own), (target, feature) = (in_next_style(each, pictures) for each in (network, teacher))
        error = (trainer.network.projection(own) - feature).square().mean() / feature.square().mean()
    desired = [(output - target).square().mean() + error, (output - target).square().mean(), error]
    assert actual.tolist() == pytest.approx([value.item() for value in desired], rel=1e-3)


@pytest.mark.parametrize("new_weights", [False, True])
def test_student_comes_nearer_to_its_teacher(tmp_path, new_weights):
    trainer = distiller(tmp_path, max_iter=100, new_weights=new_weights)
    start = small_network().encoder.layers[0][0].weight  # of new weights, only the widths are the file's
    assert torch.allclose(trainer.network.encoder.layers[0][0].weight, start) != new_weights
    given = natural_pictures()
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    steps = []
    for iteration in range(1, 41):
        trainer.begin(iteration)
        steps.append(trainer.step(given))
    assert all(steps[-1][name] < 0.7 * steps[0][name] for name in trainer.metrics)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.state_dict().items())

    # The file paints as the network with its normalisations, and knows whose losses it was taught with.
    trainer.network.eval()
    row, _ = trainer.report(tmp_path, 1)
    network, checkpoint = load_network(tmp_path / STUDENT_NAME)
    assert network.config == small_network().config and checkpoint["vgg_weights"] == "the teacher's"
    assert len(row["dead_units_by_layer"]) == 17
    pictures = normalize(given)
    with torch.no_grad():
        assert_close(in_next_style(network, pictures), in_next_style(trainer.network, pictures), rtol=1e-3, atol=1e-3)


def test_nothing_but_the_errors_moves_a_weight(tmp_path):
    """No weight decay: without a gradient, biases and normalisations stay as they are."""
    trainer = distiller(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.network.named_parameters()}
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.named_parameters())


def test_student_upsamples_and_pools_as_its_file_says_unless_another_is_asked_for(tmp_path):
    files = settings(tmp_path)
    network = small_network()
    network.use("bilinear", pooling="blur")
    torch.save(model_checkpoint(network), files["load_path"])
    for changes, desired, pooling in (({}, "bilinear", "blur"), ({"upsampling": "nearest"}, "nearest", "blur"),
                                      ({"pooling": "avg", "adain_levels": 2}, "bilinear", "avg")):
        trainer = Distiller(DistillConfig(**files | changes), CPU)
        modes = {layer.mode for layer in trainer.network.decoder.layers[0] if isinstance(layer, torch.nn.Upsample)}
        trainer.dead_units = DeadUnits(natural_pictures(), natural_pictures())
        trainer.report(tmp_path, 1)
        saved = load_network(tmp_path / STUDENT_NAME)[0].config
        assert modes == {desired} == {saved.upsampling} and saved.pooling == pooling
        assert saved.adain_levels == changes.get("adain_levels", 1)


def test_learning_rate_rises_then_falls_to_nothing():
    shares = [rate_share(iteration, 100) for iteration in range(1, 101)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(after < before for before, after in zip(shares[4:], shares[5:]))
    assert 0 < shares[-1] < 1e-3 and rate_share(1, 1) == 1.0


def test_stopped_and_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, capsys):
    """A stop inside a check interval; the rest with a worker process."""
    given = settings(tmp_path, max_iter=6, check_iter=3)
    assert distill(given | {"save_path": str(tmp_path / "whole")}) == 0
    with monkeypatch.context() as patch:
        stop_after(2, patch, signal.SIGINT)
        assert distill(given | {"save_path": str(tmp_path / "halves")}) == 130
    assert "python main.py --mode distill --resume --save_path" in capsys.readouterr().err
    resumed = {"save_path": str(tmp_path / "halves"), "resume": True}
    assert distill(resumed | {"num_workers": 1}) == 0
    checkpoints = [torch.load(tmp_path / name / "check_point.pth", weights_only=True) for name in ("halves", "whole")]
    halves, whole = (each["state_dict"] for each in checkpoints)
    assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())
    assert read_metrics(tmp_path / "halves") == read_metrics(tmp_path / "whole")
    rows = read_metrics(tmp_path / "whole")
    assert [row["iteration"] for row in rows] == [3, 6]
    for row in rows:
        assert set(Distiller.metrics) | {f"held_out_{name}" for name in Distiller.metrics} <= row.keys()
        assert all(math.isfinite(row[name]) for name in Distiller.metrics)

    other = given["load_path"]
    assert f"not {other}; start a new run" in user_error(distill, resumed | {"teacher": other})
    assert "--new_weights False, not True" in user_error(distill, resumed | {"new_weights": True})
    assert "--batch_size 1" in user_error(distill, resumed | {"batch_size": 1})


def test_one_folder_with_a_broken_picture_and_nothing_held_out(tmp_path, capsys):
    for number in range(12):
        write_picture(tmp_path / "style" / f"{number}.png", (48, 40), (20 * number, 0, 0))
    (tmp_path / "style" / "broken.png").write_bytes(b"no picture")
    folders = {"content_dir": None, "style_dir": str(tmp_path / "style"), "save_path": str(tmp_path / "run")}
    assert distill(settings(tmp_path, max_iter=1, holdout=0) | folders) == 0
    errors = capsys.readouterr().err
    assert f"--style_dir {tmp_path / 'style'}: 13 pictures, 1 skipped" in errors and errors.count("broken.png") == 1
    (row,) = read_metrics(tmp_path / "run")
    assert not any(name.startswith("held_out") for name in row)


def test_several_processes_and_runs_of_other_modes_are_refused(tmp_path, monkeypatch):
    torch.save({"state_dict": {}, "train_config": {}, "optimizer": {}}, tmp_path / "check_point.pth")
    assert "holds no run of --mode distill" in user_error(distill, {"save_path": str(tmp_path), "resume": True})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in user_error(distill, settings(tmp_path, save_path=str(tmp_path / "run")))

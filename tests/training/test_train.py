"""Training runs: resume, faults, signals, wandb, metrics. Small crops, random VGG, CPU."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CPU,
    METRICS,
    REPORTING_MAIN,
    SMALL_TRAINING,
    output_of,
    read_metrics,
    refusal,
    stop_after,
    user_error,
    words,
)
from torch.testing import assert_close

from evaluate import test as stylise
from network import NetworkConfig
from pruning.surgery import cut_bottleneck
from train import TrainConfig, build_trainer, train
from training import step as step_module
from utils import save_checkpoint
from weights import BUNDLED_VGG19, load_network, same_vgg

STEERED = dict(compact_layers="all", compact_cost="macs", l0_eps="relative:0.1", target_macs=0.001,
               channel_loss_weight=10.0, optimizer="muon")
WANDB = dict(wb_name="trial", wb_tags=("channel loss", "xor loss"), wb_notes="a note")


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "check_point.pth", weights_only=True)


@pytest.mark.parametrize("more, number", [({"shift_loss_weight": 30.0}, signal.SIGUSR1), (STEERED, signal.SIGTERM)],
                         ids=["bottleneck", "every layer"])
def test_stopped_and_resumed_run_equals_uninterrupted_run(small, tmp_path, monkeypatch, capsys, more, number):
    """Stopped inside a check interval, and the rest with a worker process: bit for bit, and what is logged."""
    settings = small | {"check_iter": 4, "max_iter": 6} | more
    train(settings | {"save_path": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        stop_after(3, patch, number)
        assert train(settings | {"save_path": str(tmp_path / "halves")}) == 128 + number
    go_on = f"go on with: python main.py --mode train --resume --save_path {tmp_path / 'halves'}"
    assert f"stopped after iteration 3, saved, {go_on}" in capsys.readouterr().err
    assert checkpoint_of(tmp_path / "halves")["iteration"] == 3
    assert train({"save_path": str(tmp_path / "halves"), "resume": True, "num_workers": 1}) == 0
    whole, halves = (checkpoint_of(tmp_path / name) for name in ("whole", "halves"))
    for name in ("state_dict", "census", "steering"):
        for key, desired in whole.get(name, {}).items():
            assert_close(halves[name][key], desired, rtol=0, atol=0, msg=f"{name} {key}")
    rows = read_metrics(tmp_path / "halves")
    assert rows == read_metrics(tmp_path / "whole") and [row["iteration"] for row in rows] == [4, 6]
    if more is STEERED:
        assert all(len(row["layer_widths"]) == 17 and 0 < row["macs"] < 0.05 for row in rows)
        assert rows[0]["channel_weight"] != rows[1]["channel_weight"] and load_network(tmp_path / "halves")


def test_resume_auto_starts_and_goes_on(small, tmp_path, capsys):
    """Lines that a killed run logged behind its last checkpoint go."""
    settings = small | {"save_path": str(tmp_path / "run"), "resume": "auto", "check_iter": 2}
    assert train(settings | {"max_iter": 2}) == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 4, "content": 99.0}) + "\n" + '{"iteration": 5, "con')
    assert train(settings | {"max_iter": 4}) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [2, 4] and rows[1]["content"] != 99.0
    assert train(settings | {"max_iter": 4}) == 0 and "has done its 4 iterations" in capsys.readouterr().err


def test_what_a_resumed_run_keeps_and_what_may_change(small, tmp_path):
    """What is refused leaves the checkpoint as it was. VGG weights are known by what is in the file."""
    path = tmp_path / "check_point.pth"
    shutil.copy(BUNDLED_VGG19, tmp_path / "copy.pth")
    settings = small | {"save_path": str(tmp_path), "max_iter": 1, "vgg_weights": "bundled", "encoder_lr": 0.0}
    train(settings)
    checkpoint = checkpoint_of(tmp_path)
    checkpoint["train_config"]["gpu_no"] = 7  # of another machine
    save_checkpoint(checkpoint | {"processes": 3}, path)
    good = path.read_bytes()
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 2, "batch_size": 6}
    assert "holds a run already" in user_error(train, settings)
    for changes, said in (
        ({"batch_size": 2}, "3 processes of --batch_size 2 trained this run, now there are 1 of 2"),
        ({"backbone": "vgg16"}, "--backbone vgg19, not vgg16"), ({"pooling": "avg"}, "--pooling None, not avg"),
        ({"padding": "reflect"}, "--padding None, not reflect"),
        ({"vgg_weights": "random"}, "VGG weights"), ({"encoder_lr": 1e-5}, "freezes or thaws a part"),
        # The other part has as many tensors.
        ({"encoder_lr": 1e-5, "decoder_lr": 0.0}, "freezes or thaws a part"),
        ({"encoder_lr": 1e-5, "encoder_layers": "bottleneck"}, "freezes or thaws a part"),
    ):
        assert said in user_error(train, again | changes)
        assert path.read_bytes() == good
    assert train(again | {"vgg_weights": str(tmp_path / "copy.pth"), "lr": 1e-4}) == 0
    assert checkpoint_of(tmp_path)["processes"] == 1


@pytest.mark.parametrize("first, second, desired", [
    ("bundled (sha256 00aa)", "/a/b.pth (sha256 00aa)", True),
    ("bundled (sha256 00aa)", "bundled (sha256 00ab)", False),
    ("imagenet (torchvision X)", "imagenet (torchvision X, sha256 00aa)", True),
    ("random (He initialisation, seed 0)", "random (He initialisation, seed 1)", False),
    (None, None, True),
    (None, "bundled (sha256 00aa)", False),
])
def test_origins_of_the_same_weights(first, second, desired):
    assert same_vgg(first, second) == same_vgg(second, first) == desired


@pytest.mark.parametrize("name, value, other", [
    ("upsampling", "bilinear", "nearest"), ("pooling", "blur", "max"), ("padding", "reflect", "zeros")])
def test_the_file_says_how_to_sample_and_pad_unless_another_way_is_asked_for(small, tmp_path, name, value, other):
    train(small | {"save_path": str(tmp_path / "a"), "max_iter": 1, name: value})
    train({"save_path": str(tmp_path / "a"), "resume": True, "max_iter": 2})
    assert getattr(cut_bottleneck(load_network(tmp_path / "a")[0], range(3)).config, name) == value
    for more, desired in (({}, value), ({name: other}, other)):
        config = TrainConfig(**small | {"load_path": str(tmp_path / "a"), "save_path": "x"} | more)
        trainer = build_trainer(config, CPU, None)
        assert getattr(trainer.network.config, name) == desired
        assert trainer.forward_pass.loss_network.padding == trainer.network.config.padding


def test_new_weights_keep_the_widths_alone(small):
    """He initialisation: every conv anew, of the variance that keeps the signal's size; the seed decides."""
    before, _ = load_network(small["load_path"])
    config = TrainConfig(**small | {"new_weights": True, "save_path": "x"})
    networks = [build_trainer(config, CPU, None).network for _ in range(2)]
    assert networks[0].config == before.config
    for name, actual in networks[0].state_dict().items():
        assert torch.equal(actual, networks[1].state_dict()[name])
        if name.endswith("bias"):
            assert not actual.any()
            continue
        assert not torch.equal(actual, before.state_dict()[name])
        gain = 1.0 if actual.shape[0] == 3 else 2.0
        assert actual.std().item() == pytest.approx((gain / actual[0].numel()) ** 0.5, rel=0.2)


def test_vgg16_and_average_pooling_train(tmp_path):
    settings = {"backbone": "vgg16", "swap_max_pool": True, "style_loss": "gram", "max_iter": 2}
    train(SMALL_TRAINING | settings | {"save_path": str(tmp_path)})
    assert load_network(tmp_path)[0].config == NetworkConfig.full("vgg16", "avg")


def test_a_second_run_is_refused_and_a_kill_leaves_a_good_checkpoint(small, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(REPORTING_MAIN), "--mode", "train", *words(small | {"max_iter": 5000})]
    with output_of([*command, "--save_path", folder], stderr=subprocess.DEVNULL) as process:
        for iteration in process.stdout:
            if int(iteration) == 3:
                for more in ({}, {"resume": "auto"}):
                    given = small | {"save_path": str(folder)} | more
                    assert "another run is writing to it" in user_error(train, given)
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    _, checkpoint = load_network(folder)
    assert checkpoint["iteration"] >= 2
    assert train({"save_path": str(folder), "resume": True, "max_iter": checkpoint["iteration"] + 1}) == 0


def test_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    good = (tmp_path / "check_point.pth").read_bytes()
    # A rate this large makes iteration 2's weights, and so iteration 3's losses, overflow.
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 9, "check_iter": 9, "decoder_lr": 1e30}
    assert "not finite: content, " in user_error(train, again)
    assert (tmp_path / "check_point.pth").read_bytes() == good


def test_compile_without_a_compiler_is_one_line(small, tmp_path, monkeypatch, capsys):
    """The step is cut short to its first loss: what is compiled does not matter where nothing can be. What it would
    leave in the cache is for processors with this one's instructions."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(step_module.ForwardPass, "forward",
                        lambda self, content, style, all_terms, move: ({"content": content.sin().sum()}, {}))
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    with inductor.patch({"cpp.cxx": ("/no/compiler",)}):
        line = refusal(capsys, "--mode", "train",
                       *words(small | {"save_path": tmp_path, "max_iter": 1, "compile": True}))
    assert "error: --compile: torch.compile failed" in line and "/no/compiler" in line
    assert torch.compiler.config.cache_key_tag == torch.backends.cpu.get_cpu_capability()


def test_only_convolutions_of_a_training_may_use_tf32(small, tmp_path):
    train(small | {"save_path": str(tmp_path / "run"), "max_iter": 1})
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32  # products are the losses'
    picture = str(next(Path(small["content_dir"]).iterdir()))
    stylise({"load_path": (small["load_path"],), "content": (picture,), "style": (picture,), "gpu_no": -1,
             "save_path": str(tmp_path / "out.png")})
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("fails", [False, True])
def test_every_check_writes_and_wandb_gets_what_metrics_jsonl_gets(small, tmp_path, monkeypatch, capsys, fails):
    """A metrics row, a grid and a checkpoint. A wandb that fails ends no training."""
    logged, started = {}, {}

    def init(**settings):
        started.update(settings)
        return SimpleNamespace(id="a", dir=".", log=log, finish=lambda: None)

    def log(values, step):
        if fails:
            raise ConnectionResetError("Connection lost")
        logged[step] = values

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **_: None, Image=str))
    given = {"save_path": str(tmp_path), "max_iter": 5, "check_iter": 2, "keep_checkpoints": 2, "wb_mode": "offline"}
    assert train(small | given | WANDB) == 0
    assert started["mode"] == "offline" and started["config"]["max_iter"] == 5
    assert {f"wb_{name}": started[name] for name in ("name", "tags", "notes")} == WANDB
    assert capsys.readouterr().err.count("wandb failed (Connection lost)") == fails
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    assert all({"iteration", "dead_units", "dead_units_by_layer", *METRICS} == row.keys() for row in rows)
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == [f"iteration_{number:07}.png" for number in (2, 4, 5)]
    models = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert models == ["check_point.pth", "check_point_0000004.pth", "check_point_0000005.pth"]
    desired = {row.pop("iteration"): row | {"pictures": str(path)} for row, path in zip(rows, pictures)}
    assert logged == ({} if fails else desired)


def test_a_long_run_lists_no_positions(small, tmp_path, monkeypatch):
    stop_after(1, monkeypatch)
    assert train(small | {"save_path": str(tmp_path), "max_iter": 10**12, "batch_size": 2}) == 143
    assert checkpoint_of(tmp_path)["samples_seen"] == 2

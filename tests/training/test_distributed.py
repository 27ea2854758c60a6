"""Two gloo processes on the CPU: the gradients of one process with the whole batch; a run that is killed, goes on, and
stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers import (
    REPORTING_MAIN,
    ROOT,
    SMALL_TRAINING,
    output_of,
    read_metrics,
    small_network,
    user_error,
    words,
    write_model,
)
from torch.testing import assert_close

from train import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SETTINGS = {
    "bottleneck": {"l0_eps": 1.0},
    "every layer": {"l0_eps": 1.0, "compact_layers": "all", "compact_cost": "macs", "target_macs": 0.001,
                    "max_iter": 20, "shift_loss_weight": 30.0},
    # An epsilon relative to the mean over both processes' pictures.
    "relative": {"l0_eps": "relative:0.1", "compact_layers": "decoder"},
    "frozen layers shared with VGG": {"l0_eps": 1.0, "encoder_layers": "bottleneck"},
}
GRADIENTS = """
import json
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from helpers import CPU, make_trainer, random_batch, small_network
from folders import FailedPictures
from utils import process_count, process_group, process_rank

def step(settings):
    # A function of its own: what takes part in the group has to be gone before the interpreter ends.
    if process_count() == 1:
        settings["compile"] = False
    network = None if "encoder_layers" in settings else small_network()  # None: the full one, as VGG is
    trainer = make_trainer(network, dtype=torch.float64, uncorrelation_loss_weight=50.0,
                           channel_loss_weight=1e3, **{{"xor_loss_weight": 500.0}} | settings)
    part = 4 // process_count()
    own = slice(process_rank() * part, (process_rank() + 1) * part)
    metrics = trainer.step(*(pictures[own] for pictures in random_batch(32, 4)), all_terms=True)
    return metrics, {{name: each.grad for name, each in trainer.network.named_parameters() if each.requires_grad}}

with process_group(CPU):
    results = {{name: step(settings) for name, settings in json.loads(sys.argv[2]).items()}}
    tally = FailedPictures("photos", "--content_dir", 100)
    for number in range(2):
        tally.add(f"{{process_rank()}}-{{number}}.jpg", "broken")
    tally.add_other_processes()
    results["failed"] = sorted(tally.paths)
if process_rank() == 0:
    torch.save(results, sys.argv[1])
"""


def compute(folder: Path, settings: dict) -> list[dict]:
    """What one process, not compiled, and two computed in one step of each of the settings."""
    script = folder / "gradients.py"
    script.write_text(GRADIENTS.format(root=str(ROOT)))
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        subprocess.run([*launcher, str(script), str(folder / name), json.dumps(settings)], check=True, env=ENVIRONMENT,
                       timeout=1200)
    return [torch.load(folder / name, weights_only=True) for name in ("one", "two")]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return compute(tmp_path_factory.mktemp("gradients"), SETTINGS)


def assert_same_step(results: list[dict], name: str) -> None:
    (desired_metrics, desired), (metrics, actual) = (each[name] for each in results)
    for parameter, gradient in desired.items():
        assert (actual[parameter] - gradient).norm() < 1e-9 * gradient.norm(), parameter
    of_all = {"channel", "xor", "nonzero_channels", "macs", "channel_weight"} & desired_metrics.keys()
    for metric in of_all:  # of the global batch in every process
        assert_close(metrics[metric], desired_metrics[metric], rtol=1e-6, atol=0, msg=metric)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_of_two_processes_are_those_of_the_whole_batch(results, name):
    assert_same_step(results, name)


@pytest.mark.skipif(shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
                    reason="torch.compile needs a C++ compiler on the CPU, and Python's headers")
def test_compiled_steps_of_two_processes_are_an_eager_one(tmp_path):
    """Also where terms of weight 0 are measured. (test_gpu.py has every layer: on a CPU that compiles for minutes.)"""
    settings = {"l0_eps": 1.0, "shift_loss_weight": 30.0, "xor_loss_weight": 0.0, "compile": True}
    assert_same_step(compute(tmp_path, {"compiled": settings}), "compiled")


def test_pictures_that_fail_in_any_process_count_in_all(results):
    assert results[1]["failed"] == ["0-0.jpg", "0-1.jpg", "1-0.jpg", "1-1.jpg"]


def test_run_of_two_processes_survives_a_kill_and_stops_in_all(tmp_path):
    """One of two processes gets SIGKILL in iteration 5, torchrun starts both again, and they go on from iteration 4;
    then torchrun gets SIGTERM. All that is written is what one process with the whole batch writes."""
    folder = tmp_path / "two"
    # Tiny rates: Adam steps by the sign of small gradients at first, which would make rounding grow.
    settings = SMALL_TRAINING | dict(load_path=str(write_model(tmp_path / "narrow.pth", small_network())), check_iter=2,
                                     encoder_lr=1e-8, decoder_lr=1e-6, batch_size=1, max_iter=5000, resume="auto")
    command = [*TORCHRUN, "--max-restarts", "1", str(REPORTING_MAIN), "--mode", "train", "--save_path", str(folder),
               *words(settings)]
    seen = []
    with open(tmp_path / "errors", "w") as errors, output_of(command, env=ENVIRONMENT | {"KILLED": "0:5"},
                                                             stderr=errors) as process:
        for iteration in process.stdout:  # of either process
            seen.append(int(iteration))
            if seen[-1] == 7:
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
    said = (tmp_path / "errors").read_text()
    assert "exitcode: -9" in said and "go on with: python main.py --mode train --resume" in said
    assert said.count("training on") == 2 and seen.count(5) >= 3  # the first process says it, at both starts
    checkpoint = torch.load(folder / "check_point.pth", weights_only=True)
    assert checkpoint["iteration"] >= 7

    train(settings | {"save_path": str(tmp_path / "one"), "batch_size": 2, "max_iter": 6})
    two, one = read_metrics(folder), read_metrics(tmp_path / "one")
    assert [row["iteration"] for row in two][:3] == [2, 4, 6]
    for actual, desired in zip(two, one):
        for name in ("content", "style", "channel", "xor", "nonzero_channels", "total"):
            assert actual[name] == pytest.approx(desired[name], rel=2e-3), (name, actual["iteration"])
    assert "2 processes of --batch_size 1 trained this run" in user_error(
        train, {"save_path": str(folder), "resume": True})

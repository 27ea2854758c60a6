"""Two gloo processes on the CPU: the gradients of one process with the whole batch; a run that resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPORTING_MAIN, ROOT, read_metrics, small_network, write_model
from torch.testing import assert_close

from training.sampling import shard_positions

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

GRADIENTS = """
import json
import sys
sys.path.insert(0, {root!r})
import torch
from data import normalize
from network import NetworkConfig, StyleTransferNetwork, build_from_vgg
from weights import load_vgg
from train import TrainConfig
from training.step import TransferTrainer
from utils import process_count, process_group, process_rank

device = torch.device("cpu")
with process_group(device):
    config = TrainConfig(amp="off", compile=sys.argv[2] == "compile", encoder_lr=1e-5,
                         uncorrelation_loss_weight=50.0, channel_loss_weight=1e3, xor_loss_weight=500.0,
                         **({{"l0_eps": 1.0}} | json.loads(sys.argv[3])))
    torch.manual_seed(0)
    network, loss_network = build_from_vgg(NetworkConfig.full(), load_vgg("vgg19", "random")[0])
    teacher = StyleTransferNetwork(NetworkConfig.full()) if config.teacher else None
    trainer = TransferTrainer(network, loss_network, config, device, teacher)
    if teacher:  # at 0 the projection would pass no gradient on
        torch.nn.init.normal_(trainer.losses.projection.weight, std=0.05, generator=torch.Generator().manual_seed(2))
    pictures = torch.randint(0, 256, (2, 4, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    share = 4 // process_count()
    own = slice(process_rank() * share, (process_rank() + 1) * share)
    metrics = trainer.step(pictures[0, own], pictures[1, own], all_terms=True)
    if process_rank() == 0:
        trained = [*network.named_parameters(), *getattr(trainer.losses, "projection", network).named_parameters()]
        torch.save({{"gradients": {{n: p.grad for n, p in trained}},
                    "weights": network.state_dict(), "metrics": metrics}}, sys.argv[1])
"""


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


EVERY_LAYER = dict(compact_layers="all", compact_cost="macs", target_macs=0.5, teacher="given", max_iter=20,
                   shift_loss_weight=30.0)
# An epsilon relative to the mean over both processes' pictures.
RELATIVE = dict(compact_layers="decoder", l0_eps="relative:0.1")


# Compiled code rounds in another order, and a ReLU whose input comes out on the other side of zero moves gradients.
@pytest.mark.parametrize("kind, settings, tolerance", [
    ("eager", {}, 1e-5), ("eager", EVERY_LAYER, 1e-5), ("eager", RELATIVE, 1e-5),
    pytest.param("compile", {}, 0.03, marks=needs_compiler),
], ids=["eager", "every layer", "relative", "compiled"])
def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path, kind, settings, tolerance):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS.format(root=str(ROOT)))
    results = []
    for name, launcher, how in (("one", [sys.executable], "eager"), ("two", TORCHRUN, kind)):
        command = [*launcher, str(script), str(tmp_path / name), how, json.dumps(settings)]
        subprocess.run(command, check=True, env=ENVIRONMENT, timeout=600)
        results.append(torch.load(tmp_path / name, weights_only=True))
    desired, actual = results
    for name, gradient in desired["gradients"].items():
        error = (actual["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < tolerance, (name, float(error))
    of_all = {"channel", "xor", "nonzero_channels", "macs", "channel_weight"} & desired["metrics"].keys()
    for name in of_all:  # of the global batch in every process
        assert_close(actual["metrics"][name], desired["metrics"][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_positions_of_one_run(processes):
    """Together the processes draw what one process with the whole batch draws, iteration by iteration."""
    shards = [shard_positions(24, 5, 2, rank, processes) for rank in range(processes)]
    actual = [[position for shard in shards for position in shard[2 * i : 2 * i + 2]] for i in range(5)]
    desired = [list(range(24 + 2 * processes * i, 24 + 2 * processes * (i + 1))) for i in range(5)]
    assert actual == desired


def train_flags(folder: Path, max_iter: int) -> list[str]:
    # Tiny rates: Adam steps by the sign of small gradients at first, which would make rounding grow.
    return f"""--mode train --gpu_no -1 --vgg_weights random --imsize 40 --cropsize 32 --batch_size 1 --num_workers 0
        --content_dir {ROOT}/imgs/content --style_dir {ROOT}/imgs/style --wb_mode disabled --amp off --check_iter 2
        --encoder_lr 1e-8 --decoder_lr 1e-6
        --save_path {folder} --max_iter {max_iter}""".split()


def test_torchrun_trains_resumes_and_saves_once(tmp_path):
    """2 processes, 4 iterations, resumed to 6: one set of files, and the means of one process of batch 2."""
    folder = tmp_path / "two"
    for max_iter, more in ((4, []), (6, ["--resume"])):
        result = subprocess.run([*TORCHRUN, str(ROOT / "main.py"), *train_flags(folder, max_iter), *more], text=True,
                                env=ENVIRONMENT, capture_output=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("training on") == 1
    single = tmp_path / "one"
    subprocess.run([sys.executable, str(ROOT / "main.py"), *train_flags(single, 6), "--batch_size", "2"], check=True,
                   env=ENVIRONMENT, capture_output=True, timeout=300)
    two, one = read_metrics(folder), read_metrics(single)
    assert [row["iteration"] for row in two] == [2, 4, 6]
    for actual, desired in zip(two, one):
        for name in ("content", "style", "channel", "xor", "nonzero_channels", "total"):
            assert actual[name] == pytest.approx(desired[name], rel=2e-3), (name, actual["iteration"])


def test_torchrun_stops_all_processes_at_one_iteration(tmp_path):
    folder = tmp_path / "run"
    with open(tmp_path / "errors", "w") as errors, subprocess.Popen(
        [*TORCHRUN, str(REPORTING_MAIN), *train_flags(folder, 5000)], text=True, env=ENVIRONMENT, stderr=errors,
        stdout=subprocess.PIPE,
    ) as process:
        for iteration in process.stdout:  # of either process; at 3, the checkpoint of 2 is written
            if int(iteration) == 3:
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
    rest = (tmp_path / "errors").read_text()
    assert "go on with: python main.py --mode train --resume" in rest
    assert torch.load(folder / "check_point.pth", weights_only=True)["iteration"] >= 2


def test_killed_process_goes_on_after_torchruns_restart(tmp_path):
    """--resume auto: one of two processes gets SIGKILL; torchrun starts both again; the weights are an undisturbed
    run's, bit for bit."""
    model = write_model(tmp_path / "narrow.pth", small_network())
    for name, killed in (("disturbed", "0:7"), ("undisturbed", "")):
        command = [*TORCHRUN, "--max-restarts", "1", str(REPORTING_MAIN), *train_flags(tmp_path / name, 12),
                   "--load_path", str(model), "--check_iter", "3", "--resume", "auto"]
        result = subprocess.run(command, env=ENVIRONMENT | {"KILLED": killed}, capture_output=True, text=True,
                                timeout=300)
        assert result.returncode == 0, result.stderr
        assert ("exitcode: -9" in result.stderr) == bool(killed)
        assert [row["iteration"] for row in read_metrics(tmp_path / name)] == [3, 6, 9, 12]
    actual, desired = (torch.load(tmp_path / name / "check_point.pth", weights_only=True)["state_dict"]
                       for name in ("disturbed", "undisturbed"))
    for name, tensor in desired.items():
        assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)

"""The fast step learns what the plain one learns; what makes it fast does what it says."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import CPU, ROOT, make_trainer, random_vgg, small_network, write_model
from plain import PlainTrainer
from torch.testing import assert_close

from training.step import conv_format
from utils import time_in_turns

OFF = dict(style_loss_weight=0.0, uncorrelation_loss_weight=0.0, channel_loss_weight=0.0, xor_loss_weight=0.0)
# An epsilon that gives channels of any strength a gradient.
ON = dict(style_loss_weight=100.0, uncorrelation_loss_weight=50.0, channel_loss_weight=1e3, xor_loss_weight=500.0)
WEIGHTS = {"content": OFF, "all": ON} | {
    name.removesuffix("_loss_weight"): OFF | {name: weight} for name, weight in ON.items()
}


def batch(seed: int, size: int = 16, pictures: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 256, (2, pictures, 3, size // 4, size // 4), generator=generator, dtype=torch.uint8)
    return list(low.repeat_interleave(4, 3).repeat_interleave(4, 4))  # patches, so that filters see edges


# -------------------------------------------------------------------------------------------- same learning


def one_step_each(settings: dict, seed: int) -> tuple[dict, dict, float]:
    """The losses of the fast and the plain step, and the largest relative difference of a gradient."""
    fast = make_trainer(**settings)
    config = fast.config
    plain = PlainTrainer(fast.network.state_dict(), random_vgg(), config.weights, config.learning_rates, config.l0_eps,
                         CPU)
    actual, desired = fast.step(*batch(seed)), plain.step(*batch(seed))
    errors = []
    for part, rate in config.learning_rates.items():
        for mine, theirs in zip(getattr(fast.network, part).parameters(), getattr(plain, part).parameters()):
            if rate:
                errors.append(((mine.grad - theirs.grad).norm() / theirs.grad.norm()).item())
            else:
                assert mine.grad is None and torch.equal(mine, theirs)
    return actual, desired, max(errors)


@pytest.mark.parametrize("encoder_lr", [0.0, 1e-5], ids=["frozen", "trained"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_fast_step_equals_plain_step(weights, encoder_lr):
    """Losses and gradients in float32, of the first step from the same weights."""
    settings = dict(encoder_lr=encoder_lr, decoder_lr=1e-4, l0_eps=1.0) | weights
    errors = []
    # Where rounding puts one ReLU's input on the other side of zero, gradients jump by some thousandths,
    # between any two ways of computing the same, on some machines in most batches: so the first without a jump counts.
    for seed in range(16):
        actual, desired, error = one_step_each(settings, seed)
        for name, value in desired.items():
            assert actual[name].item() == pytest.approx(value, rel=1e-4), name
        errors.append(error)
        if error < 1e-4:
            break
    assert errors[-1] < 1e-4 and max(errors) < 0.1, errors


def test_bfloat16_curves_stay_together():
    """The losses of the first step within 2% of float32, the means of both halves of 30 iterations within 10%.

    The means are over two runs: a single one drifts, as it does from any rounding.
    """
    curves = {"off": [], "bf16": []}  # of 2 runs, 30 iterations each
    for amp, runs in curves.items():
        for run in range(2):
            trainer = make_trainer(small_network(width=32).train(), amp=amp, encoder_lr=3e-5, decoder_lr=3e-4,
                                   l0_eps=1.0, **ON)
            runs.append([trainer.step(*batch(100 * run + number % 6), all_terms=True) for number in range(30)])
    for name in ("content", "style", "uncorrelation", "channel", "xor", "total"):
        exact, rounded = (torch.tensor([[step[name] for step in run] for run in curves[amp]]) for amp in curves)
        assert_close(rounded[:, 0], exact[:, 0], rtol=0.02, atol=0.0)
        assert not torch.equal(rounded, exact), name  # it was another precision
        for half in (slice(15), slice(15, None)):
            assert rounded[:, half].mean().item() == pytest.approx(exact[:, half].mean().item(), rel=0.1), (name, half)
    assert exact[:, 24:].mean() < 0.95 * exact[:, :6].mean()  # the total fell: there was something to follow


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_step_equals_eager_step():
    """Losses and gradients, also where a check measures the terms of weight 0. (test_gpu.py has every layer: on a
    CPU that compiles for minutes.)"""
    settings = dict(encoder_lr=1e-5, decoder_lr=1e-4, l0_eps=1.0) | ON
    settings |= {"shift_loss_weight": 30.0, "xor_loss_weight": 0.0}
    eager, compiled = (make_trainer(compile=compile, **settings) for compile in (False, True))
    for number, all_terms in enumerate((False, True, False)):
        for trainer in (eager, compiled):
            trainer.begin(number + 1)
        desired, actual = (trainer.step(*batch(number), all_terms=all_terms) for trainer in (eager, compiled))
        assert desired.keys() == actual.keys()
        for name, value in desired.items():
            # A count may move by one where a channel's only response is rounding.
            assert_close(actual[name], value, rtol=2e-2 if "channels" in name else 1e-3, atol=1e-6,
                         msg=lambda text, place=f"{name} of step {number}": f"{place}: {text}")
        if number == 0:  # the random start; later, one ReLU's input on the other side of zero moves many gradients
            errors = [((one.grad - other.grad).norm() / one.grad.norm()).item()
                      for one, other in zip(eager.network.parameters(), compiled.network.parameters())]
            assert max(errors) < 0.05, errors
        # Adam makes much of rounding: where a gradient is next to nothing, its sign decides the first step.
        compiled.losses.load_state_dict(eager.losses.state_dict())


# ------------------------------------------------------------------------------------------------- its parts

def test_format_of_convolutions():
    assert conv_format(CPU, None, is_trained=True) == torch.contiguous_format
    assert conv_format(CPU, None, is_trained=False) == torch.channels_last
    assert conv_format(CPU, torch.bfloat16, is_trained=True) == torch.channels_last
    assert conv_format(torch.device("cuda"), None, is_trained=True) == torch.channels_last


def test_calls_take_turns():
    order = []
    times = time_in_turns([lambda: order.append("a"), lambda: order.append("b")], turns=3, device=CPU, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(each) for each in times] == [3, 3] and all(each >= 0 for row in times for each in row)


# ------------------------------------------------------------------------------------------------ benchmarks


def run_benchmark(name: str, *arguments) -> tuple[str, dict]:
    """What it printed, and the JSON of its last line."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


def test_train_step_benchmark():
    _, report = run_benchmark(
        "train_step.py", "--device", "cpu", "--cropsize", 32, "--imsize", 40, "--batch_size", 1, "--turns", 2,
        "--seconds", 0.1, "--num_workers", 1, "--content_dir", ROOT / "imgs" / "content",
        "--style_dir", ROOT / "imgs" / "style", "--amp", "off", "--default_format", "--bilinear",
    )
    for setting in ("ch_xor", "baseline"):
        steps = report["steps"][setting]
        assert steps.keys() == {"plain", "this trainer", "this trainer, default format",
                                "this trainer, bilinear"}
        for each in steps.values():
            seconds = each["seconds"]
            assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"] and seconds["runs"] == 2
            assert each["iterations_per_second"] == pytest.approx(1 / seconds["median"])
            assert each["share_of_peak"] == pytest.approx(
                each["teraflop_per_second"] * 1e12 / report["matrix_product_flop_per_second"]["float32"])
        assert steps["plain"]["ratio"] == 1.0
        operations = {name: each["teraflop_per_step"] for name, each in steps.items()}
        assert operations["this trainer"] < operations["this trainer, bilinear"] <= operations["plain"]
        assert min(report["end_to_end"][setting].values()) > 0
    # With a frozen encoder 2 passes of 9 less, and 5/9 of the convs after an upsampling (less at this size).
    frozen = report["steps"]["baseline"]
    assert frozen["this trainer"]["teraflop_per_step"] < 0.8 * frozen["plain"]["teraflop_per_step"]
    assert report["loader"].keys() == {"plain", "this loader", "this loader, cached"}


def test_stylize_benchmark(tmp_path):
    write_model(tmp_path / "small.pth", small_network())
    text, report = run_benchmark("stylize.py", tmp_path / "small.pth", "full-vgg16", "--device", "cpu", "--sizes", 32,
                                 40, "--runs", 2)
    assert report["sizes"].keys() == {"32", "40"}
    small, full = (report["sizes"]["40"][name] for name in (str(tmp_path / "small.pth"), "full-vgg16"))
    assert 0 < small["pair_ms"]["min"] <= small["pair_ms"]["median"] <= small["pair_ms"]["max"]
    assert small["multiply_adds"] < full["multiply_adds"] and small["content_ms"]["median"] > 0
    assert report["parameters"]["full-vgg16"] > 1_000_000 and "full-vgg16" in text


def test_video_benchmark():
    model = ROOT / "model-store" / "tiny.pth"
    text, report = run_benchmark("video.py", model, "--device", "cpu", "--size", 128, "--frames", 9, "--steps", 2, 1.5,
                                 "--runs", 1)
    plain, smooth = report["results"]
    assert plain["frames_per_second"]["median"] > 0 and (plain["smoothing"], smooth["smoothing"]) == (0, 0.8)
    for step in ("2", "1.5"):
        assert 0 < smooth["shimmer"][step] < 0.5 * plain["shimmer"][step]
    assert f"{plain['shimmer']['2']:.2f}" in text


def test_benchmark_refuses_what_is_no_model(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "stylize.py"), str(tmp_path / "none.pth")],
                            capture_output=True, text=True)
    assert result.returncode == 2 and "no such file" in result.stderr and "Traceback" not in result.stderr

"""The benchmarks run, and print what their pages and reports read."""

import json
import subprocess
import sys

import pytest
from helpers import CPU, ROOT, small_network, write_model

from utils import time_in_turns


def test_calls_take_turns():
    order = []
    times = time_in_turns([lambda: order.append("a"), lambda: order.append("b")], turns=3, device=CPU, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(each) for each in times] == [3, 3] and all(each >= 0 for row in times for each in row)


def run_benchmark(name: str, *arguments) -> tuple[str, dict]:
    """What it printed, and the JSON of its last line."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


def test_train_step_benchmark():
    """The smallest run: one setting, one turn, crops of 16 pixels."""
    _, report = run_benchmark(
        "train_step.py", "--device", "cpu", "--settings", "baseline", "--cropsize", 16, "--imsize", 20, "--batch_size",
        1, "--turns", 1, "--seconds", 0.1, "--num_workers", 0, "--content_dir", ROOT / "imgs" / "content",
        "--style_dir", ROOT / "imgs" / "style", "--amp", "off",
    )
    steps = report["steps"]["baseline"]
    assert steps.keys() == report["end_to_end"]["baseline"].keys() >= {"plain", "this trainer"}
    for each in steps.values():
        assert 0 < each["seconds"]["min"] <= each["seconds"]["median"] <= each["seconds"]["max"]
        assert each["iterations_per_second"] == pytest.approx(1 / each["seconds"]["median"])
        assert each["share_of_peak"] == pytest.approx(
            each["teraflop_per_second"] * 1e12 / report["matrix_product_flop_per_second"]["float32"])
    # With a frozen encoder 2 passes of 9 less, and 5/9 of the convs after an upsampling (less at this size).
    assert steps["this trainer"]["teraflop_per_step"] < 0.9 * steps["plain"]["teraflop_per_step"]
    assert steps["plain"]["ratio"] == 1.0 and min(report["end_to_end"]["baseline"].values()) > 0
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

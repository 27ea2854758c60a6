"""The benchmarks run, and print what their pages and reports read."""

import json
import sys

import plot_runs
import pytest
import stylize
import train_step
import video
from helpers import CPU, ROOT, small_network, write_model
from PIL import Image

from utils import time_in_turns


def test_calls_take_turns():
    order = []
    times = time_in_turns([lambda: order.append("a"), lambda: order.append("b")], turns=3, device=CPU, warmup=1)
    assert order == ["a", "b"] * 4
    assert [len(each) for each in times] == [3, 3] and all(each >= 0 for row in times for each in row)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *arguments) -> tuple[str, dict]:
        """What the script printed, and the JSON of its last line."""
        device = ["--device", "cpu"] if script is train_step else ["--gpu_no", "-1"]
        monkeypatch.setattr(sys, "argv", [script.__name__, *device, *map(str, arguments)])
        script.main()
        printed = capsys.readouterr().out
        return printed, json.loads(printed.splitlines()[-1])

    return run


def test_train_step_benchmark(run):
    """The smallest run: one setting, one turn, crops of 16 pixels."""
    _, report = run(train_step, "--settings", "baseline", "--cropsize", 16, "--imsize", 20, "--batch_size", 1,
                    "--turns", 1, "--steps", 1, "--seconds", 0.1, "--num_workers", 0, "--amp", "off",
                    "--default_format")
    steps = report["steps"]["baseline"]
    assert steps.keys() == report["end_to_end"]["baseline"].keys() == {
        "plain", "this trainer", "this trainer, default format"}
    for each in steps.values():
        assert 0 < each["seconds"]["min"] <= each["seconds"]["median"] <= each["seconds"]["max"]
        assert each["iterations_per_second"] == pytest.approx(1 / each["seconds"]["median"])
    # With a frozen encoder 2 passes of 9 less, and 5/9 of the convs after an upsampling (less at this size).
    assert steps["this trainer"]["teraflop_per_step"] < 0.9 * steps["plain"]["teraflop_per_step"]
    assert steps["plain"]["ratio"] == 1.0 and min(report["end_to_end"]["baseline"].values()) > 0
    assert report["loader"].keys() == {"plain", "this loader", "this loader, cached"}


def test_stylize_benchmark(run, tmp_path, monkeypatch):
    model = str(write_model(tmp_path / "small.pth", small_network()))
    text, report = run(stylize, model, "full-vgg16", "--sizes", 32, 40, "--runs", 2)
    assert report["sizes"].keys() == {"32", "40"}
    small, full = (report["sizes"]["40"][name] for name in (model, "full-vgg16"))
    assert 0 < small["pair_ms"]["min"] <= small["pair_ms"]["median"] <= small["pair_ms"]["max"]
    assert small["multiply_adds"] < full["multiply_adds"] and small["content_ms"]["median"] > 0
    assert report["parameters"]["full-vgg16"] > 1_000_000 and "full-vgg16" in text

    _, report = run(stylize, model, "--megapixels", 0.01, "--tile", 96, "--runs", 1)
    for each in report["megapixels"]["0.01"][model].values():
        assert (each["width"], each["height"]) == (125, 80) and each["seconds"]["median"] > 0
    monkeypatch.setattr(stylize, "free_memory", lambda device: 0)
    assert stylize.measure_large(small_network(), 0.01, None, 1, CPU) is None
    monkeypatch.setattr(sys, "argv", ["stylize.py", str(tmp_path / "none.pth")])
    with pytest.raises(SystemExit, match="^2$"):
        stylize.main()


def test_video_benchmark(run):
    text, report = run(video, ROOT / "model-store" / "tiny.pth", "--size", 128, "--frames", 9, "--runs", 1)
    plain, smooth = report["results"]
    assert plain["frames_per_second"]["median"] > 0 and (plain["smoothing"], smooth["smoothing"]) == (0, 0.8)
    for step in ("2", "1.5"):
        assert 0 < smooth["shimmer"][step] < 0.9 * plain["shimmer"][step]  # how much less, test_video.py says
    assert f"{plain['shimmer']['2']:.2f}" in text


def test_plot_of_runs(tmp_path, capsys):
    """Whatever the runs are called: no formula, nothing hidden, not longer than the plot."""
    runs = []
    for number in (1, 2):
        runs.append(tmp_path / f"{'_$' [: number]}run_{{{number}\n{'x' * 200}")
        runs[-1].mkdir()
        rows = [{"iteration": 50 * check, "content": 2.0 / check, "style": number, "channels_off_for_all": check,
                 "channels_off_for_some": number} for check in (1, 2)]
        (runs[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_runs.read_run(runs[1]) == {"iteration": [50, 100], "content": [2.0, 1.0], "style": [2, 2],
                                           "channels_off_for_all": [1, 2], "channels_off_for_some": [2, 2]}
    flags = ["--save_path", str(tmp_path / "plots" / "curves.png"), "--runs", *map(str, runs)]
    plot_runs.main(flags)
    assert Image.open(tmp_path / "plots" / "curves.png").width > 1000
    assert plot_runs.shown_name("_a$\nb") == r"​_a\$ b" and len(plot_runs.shown_name("x" * 99)) == 40
    (runs[0] / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="^2$"):
        plot_runs.main(flags)
    assert capsys.readouterr().err.startswith(f"error: --runs {runs[0]}: no metrics.jsonl of a training run")

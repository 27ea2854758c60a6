"""The plot of quality against cost: losses as measured, costs of the very files, one line for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quality_cost
from helpers import ROOT, small_config, small_network, write_model
from PIL import Image

from main import main
from network import count_macs, count_parameters


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """metrics.json of three small networks on two pairs."""
    folder = tmp_path_factory.mktemp("measured")
    for width in (4, 6, 8):
        write_model(folder / f"narrow_{width}.pth", small_network(width=width))
    models = [str(folder / f"narrow_{width}.pth") for width in (8, 4, 6)]
    pictures = ["--content", str(ROOT / "imgs" / "content"), "--style", str(ROOT / "imgs" / "style")]
    flags = ["--imsize", "32", "--pairs", "4", "--metrics", "content", "style", "--vgg_weights", "random"]
    assert main(["--mode", "test", "--gpu_no", "-1", "--load_path", *models, *pictures, *flags,
                 "--save_path", str(folder / "out")]) == 0
    return folder / "out" / "metrics.json"


def test_points_are_the_measured_losses_and_the_files_costs(measured, tmp_path, capsys):
    path = tmp_path / "plots" / "plot.png"
    arguments = ["--metrics", str(measured), "--group", "small=narrow_[46]", "--style_weight", "10", "--size", "32",
                 "--runs", "1", "--gpu_no", "-1", "--save_path", str(path)]
    assert quality_cost.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    last = result["points"][-1]
    assert f"{last['median_loss']:.3f}" in lines[3]
    assert f"({last['loss'] / result['points'][0]['loss'] - 1:+.1%})" in lines[3]
    assert [(point["name"], point["group"]) for point in result["points"]] == [
        ("narrow_8", "other"), ("narrow_4", "small"), ("narrow_6", "small")]
    report = json.loads(measured.read_text())
    for point, width in zip(result["points"], (8, 4, 6)):
        losses, first = ([pair["metrics"][name]["content"] + 10 * pair["metrics"][name]["style"]
                          for pair in report["pairs"]] for name in (point["name"], "narrow_8"))
        assert point["loss"] == pytest.approx(np.mean(losses))
        assert point["median_loss"] == pytest.approx(np.median(losses))
        assert point["difference"] == pytest.approx(np.mean(losses) - np.mean(first))
        assert (point["difference_margin"] == 0) == (point["name"] == "narrow_8")
        assert point["parameters"] == count_parameters(small_network(width=width))
        assert point["macs"] == count_macs(small_config(width=width), 32)
        assert point["latency_ms"]["median"] > 0
    assert result["vgg_weights_of_losses"].startswith("random")
    assert Image.open(path).width > 1000


def test_refusals(measured, tmp_path, capsys):
    report = json.loads(measured.read_text())
    changed, without = tmp_path / "changed.json", tmp_path / "without.json"
    changed.write_text(json.dumps(report | {"models": [report["models"][0] | {"sha256": "0" * 64}]}))
    without.write_text(json.dumps(report | {"models": [report["models"][0] | {"metrics": {"ssim": {}}}]}))
    (tmp_path / "none.json").write_text("[]")
    cases = [
        (["--metrics", str(changed)], "was changed; measure again"),
        (["--metrics", str(without)], "lacks a loss"),
        (["--metrics", str(tmp_path / "none.json")], "not a metrics.json"),
        (["--metrics", str(measured), "--runs", "0"], "--runs 0"),
        (["--metrics", str(measured), "--group", "all"], "NAME=PATTERN is needed"),
    ]
    for arguments, needed in cases:
        assert quality_cost.main([*arguments, "--gpu_no", "-1", "--save_path", str(tmp_path / "plot.png")]) == 2
        captured = capsys.readouterr()
        assert needed in captured.err and captured.err.count("\n") == 1
        assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("arguments, message", [
    (["a.pth", "photos", "paintings"], "error: got 3 arguments; BASELINE PHOTOS PAINTINGS OUT"),
    (["a.pth", "photos", "paintings", "{out}", "smaller_0.5"], "error: smaller_0.5: compaction_BUDGET,"),
    (["{out}/a.pth", "photos", "paintings", "{out}", "magnitude_0.5"], "error: --load_path {out}/a.pth: no such file"),
])
def test_script_of_the_comparison_refuses_in_one_line(tmp_path, arguments, message):
    command = ["bash", str(ROOT / "benchmarks" / "compaction.sh"), *(each.format(out=tmp_path) for each in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(message.format(out=tmp_path))

"""The plots of training runs: what is drawn is what the runs wrote."""

import json

import plot_runs
import pytest
from measure import label_plainly
from PIL import Image

from pruning.plots import new_figure
from utils import CHECKPOINT_NAME, save_checkpoint


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Three runs with two checks each; the last has the smallest epsilon."""
    folders = []
    for number, eps in enumerate((1e-3, 1e-1, 1e-5)):
        folder = tmp_path / f"eps_{number}"
        folder.mkdir()
        rows = [{"iteration": 50 * check, "content": 2.0 / check, "style": 1.0 / check + number,
                 "channels_off_for_all": 100.0 * check + number, "channels_off_for_some": 150.0 * check + number}
                for check in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_checkpoint({"train_config": {"l0_eps": eps, "load_path": None}}, folder / CHECKPOINT_NAME)
        folders.append(str(folder))
    return folders


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_runs_against_a_setting(runs, tmp_path, capsys):
    path = tmp_path / "plots" / "eps.png"
    assert plot_runs.main(["--runs", *runs, "--against", "l0_eps", "--last", "2", "--save_path", str(path)]) == 0
    rows = last_line(capsys)["runs"]
    assert [(row["run"], row["l0_eps"]) for row in rows] == [("eps_0", 1e-3), ("eps_1", 1e-1), ("eps_2", 1e-5)]
    assert rows[1] == {"run": "eps_1", "l0_eps": 1e-1, "iteration": 100, "content": 1.5, "style": 1.75,
                       "channels_off_for_all": 151.0, "channels_off_for_some": 226.0}
    assert Image.open(path).width > 1000


def test_runs_over_the_iterations(runs, tmp_path, capsys):
    path = tmp_path / "curves.png"
    assert plot_runs.main(["--runs", *runs[:2], "--save_path", str(path)]) == 0
    assert [row["channels_off_for_some"] for row in last_line(capsys)["runs"]] == [300.0, 301.0]
    assert Image.open(path).width > 1000


@pytest.mark.parametrize("change, needed", [
    (["--against", "load_path"], "--against load_path: eps_0 has None"),
    (["--against", "no_flag"], "--against no_flag: eps_0 has None"),
    (["--last", "0"], "--last 0"),
    (["--runs", "no/such/run"], "--runs no/such/run: no readable metrics.jsonl"),
])
def test_refusals(runs, tmp_path, capsys, change, needed):
    flags = {"--runs": runs, "--save_path": [str(tmp_path / "plot.png")]}
    flags |= {change[0]: change[1:]}
    assert plot_runs.main([word for flag, words in flags.items() for word in (flag, *words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {needed}") and captured.err.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(("least", "greatest", "desired"), [
    (0.001, 3.0, ["0.001", "0.01", "0.1", "1"]), (0.05, 0.9, ["0.06", "0.1", "0.2", "0.3", "0.4", "0.6", "1"]),
    (2.0, 5.0, ["2", "3", "4", "5"]), (0.11, 0.19, [f"{number / 100}" for number in range(11, 20)]),
])
def test_labels_of_a_logarithmic_axis_neither_crowd_nor_fail(least, greatest, desired):
    figure = new_figure(4, 3.6)
    axes = figure.subplots()
    axes.plot([0, 1], [least, greatest])
    axes.set_yscale("log")
    label_plainly(axes.yaxis)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    places = axes.yaxis.get_majorticklabels() + axes.yaxis.get_minorticklabels()
    shown = {place.get_position()[1]: place.get_text() for place in places if place.get_text()}
    assert [shown[value] for value in sorted(shown) if low <= value <= high] == desired

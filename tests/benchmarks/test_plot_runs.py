"""The plot of training runs: what is drawn is what the runs wrote."""

import json

import plot_runs
from PIL import Image


def test_runs_over_the_iterations(tmp_path, capsys):
    runs = []
    for number in (1, 2):
        runs.append(tmp_path / f"run_{number}")
        runs[-1].mkdir()
        rows = [{"iteration": 50 * check, "content": 2.0 / check, "style": number, "channels_off_for_all": check,
                 "channels_off_for_some": number} for check in (1, 2)]
        (runs[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_runs.read_run(runs[1]) == {"iteration": [50, 100], "content": [2.0, 1.0], "style": [2, 2],
                                           "channels_off_for_all": [1, 2], "channels_off_for_some": [2, 2]}
    flags = ["--save_path", str(tmp_path / "plots" / "curves.png"), "--runs", *map(str, runs)]
    assert plot_runs.main(flags) == 0
    assert Image.open(tmp_path / "plots" / "curves.png").width > 1000
    (runs[0] / "metrics.jsonl").write_text("{}\n")
    for other in (str(runs[0]), "no/such/run"):
        assert plot_runs.main([*flags, other]) == 2
        assert capsys.readouterr().err.startswith(f"error: --runs {runs[0]}: no metrics.jsonl of a training run")

"""Training runs side by side: channels off, content and style loss, over the iterations or against one setting.

    python benchmarks/plot_runs.py --runs runs/baseline runs/ch_xor --save_path curves.png
    python benchmarks/plot_runs.py --runs runs/eps_* --against l0_eps --save_path epsilon.png

Reads `metrics.jsonl` and the settings in `check_point.pth` of each run, and prints what it draws as a table; the
last line of the output is JSON.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from measure import label_plainly, print_json

from evaluate import model_names
from pruning.plots import new_figure
from utils import CHECKPOINT_NAME, UserError, load_checkpoint, make_folder

PANELS = ("channels off", "content", "style")
OFF = {"channels_off_for_all": "-", "channels_off_for_some": "--"}  # line styles


@dataclass(frozen=True)
class Run:
    """The metrics of a training run, one row a check, and its settings."""

    name: str
    rows: list[dict]
    settings: dict

    def last(self, rows: int) -> dict[str, float]:
        """Means over the last checks of what is drawn, and the iteration of the very last."""
        latest = self.rows[-rows:]
        means = {name: sum(row[name] for row in latest) / len(latest) for name in (*OFF, "content", "style")}
        return {"iteration": self.rows[-1]["iteration"], **means}


def read_run(path: str, name: str) -> Run:
    """Raises UserError when the folder holds no training run that has come to its first check."""
    file = Path(path) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--runs {path}: no readable metrics.jsonl ({error})") from error
    settings = load_checkpoint(Path(path) / CHECKPOINT_NAME, flag="--runs").get("train_config")
    if not rows or not isinstance(settings, dict) or not all(metric in rows[-1] for metric in OFF):
        raise UserError(f"--runs {path}: not the folder of a training run with a check behind it")
    return Run(name, rows, settings)


def plot_over_iterations(runs: list[Run], path: Path) -> None:
    """A line a run; of channels off, solid: for all pictures of a batch, dashed: for some."""
    figure = new_figure(12, 3.6)
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS))))
    for number, run in enumerate(runs):
        iterations = [row["iteration"] for row in run.rows]
        for metric, style in OFF.items():
            label = run.name if style == "-" else None
            panels["channels off"].plot(iterations, [row[metric] for row in run.rows], style, color=f"C{number}",
                                        linewidth=1, label=label)
        for metric in ("content", "style"):
            panels[metric].plot(iterations, [row[metric] for row in run.rows], color=f"C{number}", linewidth=1)
    _finish(figure, panels, "iteration", "for all (solid) and for some (dashed) pictures of a batch", path)


def plot_against(runs: list[Run], setting: str, rows: int, path: Path) -> None:
    """A point a run, at its setting's value, logarithmic."""
    runs = sorted(runs, key=lambda run: run.settings[setting])
    values = [run.settings[setting] for run in runs]
    figure = new_figure(12, 3.6)
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS))))
    lasts = [run.last(rows) for run in runs]
    for metric, style in OFF.items():
        panels["channels off"].plot(values, [last[metric] for last in lasts], f"o{style}", color="C0",
                                    label=metric.removeprefix("channels_off_").replace("_", " "))
    for metric in ("content", "style"):
        panels[metric].plot(values, [last[metric] for last in lasts], "o-", color="C0")
    for axes in panels.values():
        axes.set_xscale("log")
    _finish(figure, panels, setting, "pictures of a batch", path)


def _finish(figure, panels: dict, against: str, unit: str, path: Path) -> None:
    for title, axes in panels.items():
        axes.set_title(title if title == "channels off" else f"{title} loss")
        axes.set_xlabel(against)
        axes.grid(alpha=0.25)
        if title != "channels off":
            axes.set_yscale("log")
            label_plainly(axes.yaxis)
    panels["channels off"].set_ylabel(f"of the bottleneck's channels,\n{unit}", fontsize=8)
    panels["channels off"].set_ylim(bottom=0)
    panels["channels off"].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="folders of training runs")
    parser.add_argument("--against", help="a numeric flag of train mode, for instance l0_eps (default: the iterations)")
    parser.add_argument("--last", type=int, default=1, help="with --against: the mean of this many last checks")
    parser.add_argument("--save_path", required=True, help="the picture to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.last < 1:
            raise UserError(f"--last {options.last}: 1 or more is needed")
        runs = [read_run(path, name) for path, name in zip(options.runs, model_names(options.runs))]
        path = Path(options.save_path)
        for run in runs if options.against else ():
            value = run.settings.get(options.against)
            if not isinstance(value, (int, float)) or value <= 0:
                raise UserError(f"--against {options.against}: {run.name} has {value}, a number above 0 is needed")
        make_folder(path.parent, "--save_path")
        if options.against:
            plot_against(runs, options.against, options.last, path)
        else:
            plot_over_iterations(runs, path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = [options.against] if options.against else []
    rows = [{"run": run.name, **{name: run.settings[name] for name in settings}, **run.last(options.last)}
            for run in runs]
    for row in rows:
        print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()))
    print_json({"runs": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

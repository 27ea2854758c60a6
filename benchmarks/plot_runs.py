"""Training runs side by side: channels off, content and style loss over the iterations.

    python benchmarks/plot_runs.py --runs runs/baseline runs/ch_xor --save_path curves.png

Reads `metrics.jsonl` of each run.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pruning.plots import new_figure  # noqa: E402
from utils import UserError, errors_in_one_line, make_folder  # noqa: E402
from weights import model_names  # noqa: E402

OFF = {"channels_off_for_all": "-", "channels_off_for_some": "--"}  # line styles
LOSSES = ("content", "style")


def read_run(path: str) -> dict[str, list[float]]:
    """The columns of a run's metrics. Raises UserError where the folder holds no training run with a check."""
    try:
        rows = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
        columns = {name: [row[name] for row in rows] for name in ("iteration", *OFF, *LOSSES)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--runs {path}: no metrics.jsonl of a training run ({error})") from error
    if not rows:
        raise UserError(f"--runs {path}: the run has not come to its first check")
    return columns


def plot(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A line a run; of channels off, solid: for all pictures of a batch, dashed: for some."""
    figure = new_figure(12, 3.6)
    panels = figure.subplots(1, 1 + len(LOSSES))
    for number, (name, run) in enumerate(runs.items()):
        for metric, style in OFF.items():
            panels[0].plot(run["iteration"], run[metric], style, color=f"C{number}", linewidth=1,
                           label=name if style == "-" else None)
        for axes, metric in zip(panels[1:], LOSSES):
            axes.plot(run["iteration"], run[metric], color=f"C{number}", linewidth=1)
    for axes, title in zip(panels, ("channels off", *(f"{metric} loss" for metric in LOSSES))):
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("of the bottleneck's channels, for all (solid)\nand for some (dashed) pictures of a batch",
                         fontsize=8)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="folders of training runs")
    parser.add_argument("--save_path", required=True, help="the picture to write")
    return parser.parse_args(arguments)


@errors_in_one_line
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    path = Path(options.save_path)
    runs = {name: read_run(run) for name, run in zip(model_names(options.runs), options.runs)}
    make_folder(path.parent, "--save_path")
    plot(runs, path)


if __name__ == "__main__":
    sys.exit(main())

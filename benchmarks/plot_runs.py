"""Training runs side by side: channels off, content and style loss over the iterations.

    python benchmarks/plot_runs.py --runs runs/baseline runs/ch_xor --save_path curves.png

Reads `metrics.jsonl` of each run.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pruning.plots import saved_axes, shown_name  # noqa: E402
from utils import UserError, errors_in_one_line, make_folder  # noqa: E402
from weights import model_names  # noqa: E402

# A panel each: the metrics that it shows, with their line styles, and its title.
PANELS = (({"channels_off_for_all": "-", "channels_off_for_some": "--"}, "bottleneck channels off in a batch"),
          ({"content": "-"}, "content loss"), ({"style": "-"}, "style loss"))
COLUMNS = ("iteration", *(metric for metrics, _ in PANELS for metric in metrics))


def read_run(path: str) -> dict[str, list[float]]:
    """The columns of a run's metrics. Raises UserError where the folder holds no training run with a check."""
    try:
        rows = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--runs {path}: no metrics.jsonl of a training run ({error})") from error
    if not rows:
        raise UserError(f"--runs {path}: the run has not come to its first check")
    return columns


def plot(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A colour a run; of channels off, solid: for all pictures of a batch, dashed: for some."""
    with saved_axes(path, 12, 3.6, columns=len(PANELS)) as [every_axes]:
        for axes, (metrics, title) in zip(every_axes, PANELS):
            for number, (name, run) in enumerate(runs.items()):
                for metric, style in metrics.items():
                    label = shown_name(name) + (", for some" if style == "--" else "")
                    axes.plot(run["iteration"], run[metric], f"C{number}{style}", linewidth=1, label=label)
            axes.set(title=title, xlabel="iteration", ylim=(0, None))
            axes.grid(alpha=0.25)
        every_axes[0].legend(frameon=False, fontsize=8)


@errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="folders of training runs")
    parser.add_argument("--save_path", type=Path, required=True, help="the picture to write")
    options = parser.parse_args(arguments)
    runs = {name: read_run(run) for name, run in zip(model_names(options.runs), options.runs)}
    make_folder(options.save_path.parent, "--save_path")
    plot(runs, options.save_path)


if __name__ == "__main__":
    main()

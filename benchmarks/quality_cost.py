"""Loss of models against what they cost: style + content loss over multiply-adds and over latency.

    python main.py --mode test --load_path MODELS ... --content HELD_OUT --style HELD_OUT --metrics content style ...
    python benchmarks/quality_cost.py --metrics OUT/metrics.json --group compact=compact_* --group narrow=narrow_* \\
        --save_path quality_cost.png

Losses are those of `metrics.json`, which `--mode test --metrics` wrote; the files that it names are loaded, checked
against their SHA-256, and timed in turns. Models of a group, by the names in that file, are joined by a line, in the
order of their multiply-adds. The table also has the median over the pairs, and how far a model is above the first one
on the same pairs. The last line of the output is JSON.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from measure import label_plainly, print_json, spread, versions

from network import StyleTransferNetwork, count_macs, count_parameters, time_pairs
from painting.quality import mean_and_margin
from pruning.plots import new_figure
from utils import UserError, make_folder, resolve_device
from weights import load_network

ALONE = "other"  # the group of models that no pattern takes; no line joins them


@dataclass(frozen=True)
class Point:
    """A model in the plot: its loss over the pairs and its difference from the first model's, means with half of the
    95% interval, and what it costs for one pair."""

    name: str
    group: str
    loss: float
    margin: float
    median_loss: float
    difference: float
    difference_margin: float
    parameters: int
    macs: int
    latency_ms: dict[str, float]


def read_report(path: str) -> dict:
    """Raises UserError when it is no metrics.json with both losses."""
    try:
        report = json.loads(Path(path).read_text())
        has_losses = all({"content", "style"} <= model["metrics"].keys() for model in report["models"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--metrics {path}: not a metrics.json of --mode test ({error})") from error
    if not has_losses:
        raise UserError(f"--metrics {path}: lacks a loss; measure with --metrics content style")
    return report


def losses_of(report: dict, name: str, style_weight: float) -> np.ndarray:
    """content + style_weight * style of every pair: (n,)."""
    metrics = [pair["metrics"][name] for pair in report["pairs"]]
    return np.array([each["content"] + style_weight * each["style"] for each in metrics])


def numbered_pairs(report: dict) -> list[tuple[int, int]]:
    """Content and style picture of every pair, by number, as `mean_and_margin` takes them."""
    numbers = {kind: {path: number for number, path in enumerate(sorted({pair[kind] for pair in report["pairs"]}))}
               for kind in ("content", "style")}
    return [(numbers["content"][pair["content"]], numbers["style"][pair["style"]]) for pair in report["pairs"]]


def open_models(report: dict, flag: str) -> dict[str, StyleTransferNetwork]:
    """The networks that were measured. Raises UserError for a file that is gone or was changed since."""
    networks = {}
    for model in report["models"]:
        file = Path(model["file"])
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != model["sha256"]:
            raise UserError(f"{flag}: {file} is not there any more, or was changed; measure again")
        networks[model["name"]], _ = load_network(file)
    return networks


def group_of(name: str, groups: dict[str, str]) -> str:
    return next((group for group, pattern in groups.items() if fnmatchcase(name, pattern)), ALONE)


def plot(points: list[Point], size: int, style_weight: float, device: str, path: Path) -> None:
    """Two panels: the loss over multiply-adds and over latency, both logarithmic, a colour a group."""
    figure = new_figure(11, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    costs = {f"multiply-adds at {size} x {size}, 10^9": lambda point: point.macs / 1e9,
             f"latency of a pair at {size} x {size}, ms ({device})": lambda point: point.latency_ms["median"]}
    groups = list(dict.fromkeys(point.group for point in points))
    for axes, (title, cost) in zip(panels, costs.items()):
        for number, group in enumerate(groups):
            members = sorted((point for point in points if point.group == group), key=lambda point: point.macs)
            axes.plot([cost(point) for point in members], [point.loss for point in members],
                      "o" if group == ALONE else "o-", color=f"C{number}", markersize=4, linewidth=1, label=group)
            for point in members:
                axes.annotate(point.name, (cost(point), point.loss), fontsize=6, xytext=(3, 3),
                              textcoords="offset points")
        axes.set_xscale("log")
        axes.margins(x=0.15)  # room for the names
        label_plainly(axes.xaxis)
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"content + {style_weight:g} x style loss")
    if groups != [ALONE]:
        panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", required=True, help="metrics.json of --mode test, with content and style loss")
    parser.add_argument("--group", action="append", default=[], metavar="NAME=PATTERN",
                        help="models whose names match are one line in the plot; any number of these")
    parser.add_argument("--style_weight", type=float, default=100.0, help="of the style loss, as in training")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures that costs are given for, pixels")
    parser.add_argument("--runs", type=int, default=9, help="timed runs behind each median latency")
    parser.add_argument("--gpu_no", type=int)
    parser.add_argument("--save_path", required=True, help="the picture to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.runs < 1 or options.size < 16:
            raise UserError(f"--runs {options.runs}, --size {options.size}: 1 run and 16 pixels or more are needed")
        groups = dict(group.partition("=")[::2] for group in options.group)
        if not all(groups.values()):
            raise UserError(f"--group {options.group}: NAME=PATTERN is needed")
        device = resolve_device(options.gpu_no)
        report = read_report(options.metrics)
        networks = {name: network.to(device, memory_format=torch.channels_last)
                    for name, network in open_models(report, f"--metrics {options.metrics}").items()}
        path = Path(options.save_path)
        make_folder(path.parent, "--save_path")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times = time_pairs(list(networks.values()), options.size, options.runs)
    points, pairs = [], numbered_pairs(report)
    first = losses_of(report, next(iter(networks)), options.style_weight)
    for (name, network), taken in zip(networks.items(), times):
        losses = losses_of(report, name, options.style_weight)
        points.append(Point(name, group_of(name, groups), *mean_and_margin(losses, pairs), float(np.median(losses)),
                            *mean_and_margin(losses - first, pairs), count_parameters(network),
                            count_macs(network.config, options.size), spread(taken, 1e-3)))
    print(f"{'model':32}{'group':12}{'loss':>15}{'median':>9}{'above the first':>25}{'parameters':>12}{'10^9 MAC':>10}"
          f"{'latency, ms':>13}")
    for point in points:
        above = f"{point.difference:.3f} ± {point.difference_margin:.2g} ({point.difference / points[0].loss:+.1%})"
        print(f"{point.name[-32:]:32}{point.group[:11]:12}{f'{point.loss:.3f} ± {point.margin:.2g}':>15}"
              f"{point.median_loss:>9.3f}{above:>25}{point.parameters:>12,}{point.macs / 1e9:>10.2f}"
              f"{point.latency_ms['median']:>13.1f}")
    about = versions(device)
    plot(points, options.size, options.style_weight, about["device"], path)
    print_json({"points": [vars(point) for point in points], "style_weight": options.style_weight,
                "size": options.size, "vgg_weights_of_losses": report["vgg_weights_of_losses"], **about})
    return 0


if __name__ == "__main__":
    sys.exit(main())

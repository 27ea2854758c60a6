"""What pruning shows: which channels are off for which picture, how strong they are, what cutting them does."""

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from painting.quality import METRICS
from pruning.responses import Responses
from utils import write_atomically


@contextmanager
def saved_axes(path: Path, width: float, height: float, rows: int = 1, columns: int = 1, **more):
    """The axes of a figure, (rows, columns), which is written to `path` behind the block, in the format of its suffix;
    without pyplot: no display, no state left behind. Sides in inches; more: what matplotlib's `subplots` takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False, **more)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:] or None))


def shown_name(name: str) -> str:
    """A network's name as matplotlib shows it in full: $ is no formula there, _ at the beginning hides nothing in a
    legend, and it is one line of at most 40 letters."""
    name = " ".join(name.split())
    name = name if len(name) <= 40 else f"...{name[-37:]}"
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")  # U+200B is seen by nobody


def plot_l0_maps(responses: Mapping[str, Responses], path: Path) -> None:
    """For each network, by its name: pictures down, channels across; white: the channel responds to the picture, black:
    it is off. All have the same pictures in the same order."""
    with saved_axes(path, max(9, 4.5 * len(responses)), 5, columns=len(responses), sharey=True) as [every_axes]:
        for axes, (name, found) in zip(every_axes, responses.items()):
            is_on = found.l2 > 0
            axes.imshow(is_on, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.axhline(found.contents - 0.5, color="tab:red", linewidth=1)
            axes.set_xlabel("bottleneck channel")
            axes.set_title(f"{shown_name(name)}\noff (black) for every picture: {len(found.off_for_all)} of "
                           f"{is_on.shape[1]}\nfor at least one: {len(found.off_for_some)}", fontsize=10)
        styles = len(is_on) - found.contents
        every_axes[0].set_yticks([(found.contents - 1) / 2, found.contents + (styles - 1) / 2],
                                 [f"content\n({found.contents})", f"style\n({styles})"])


def plot_l2_curves(responses: Mapping[str, Responses], path: Path) -> None:
    """For each network, by its name: summed l2 norm of the channels, weakest first; the order in which they are cut."""
    columns = len(responses)
    with saved_axes(path, max(7, 4.5 * columns), 4.2, columns=columns, sharey=True) as [every_axes]:
        for axes, (name, found) in zip(every_axes, responses.items()):
            order, off = found.weakest_first, len(found.off_for_all)
            for pictures, rows, width, color in (("content", found.l2[: found.contents], 0.8, "C0"),
                                                 ("style", found.l2[found.contents :], 0.8, "C1"),
                                                 ("both", found.l2, 1.5, "black")):
                axes.plot(np.arange(1, len(order) + 1), rows.sum(axis=0)[order], label=pictures, linewidth=width,
                          color=color)
            if off:
                axes.axvline(off, color="tab:red", linestyle="--", linewidth=1,
                             label=f"{off} channels are off throughout")
            axes.set(xlim=(0, len(order)), xlabel="bottleneck channels, weakest first")
            axes.set_title(shown_name(name), fontsize=10)
            axes.legend(frameon=False)
        every_axes[0].set(ylim=(0, None), ylabel=f"l2 norm summed over {len(found.l2)} pictures")  # of all: shared


def plot_widths(report: dict, path: Path) -> None:
    """The channels of every conv before and after the cut, in forward order. report: of `report.build_report`."""
    layers, size = report["layers"], report["size_of_macs_and_latency"]
    places = np.arange(len(layers))
    with saved_axes(path, 9, 4.2) as [[axes]]:
        axes.bar(places, [layer["width_before"] for layer in layers], color="lightgray", label="before")
        bars = axes.bar(places, [layer["width_after"] for layer in layers], width=0.55, color="tab:blue", label="after")
        axes.bar_label(bars, fontsize=7)
        axes.set_xticks(places, [layer["name"].replace(".layers.0.", " ") for layer in layers], rotation=60, ha="right",
                        rotation_mode="anchor", fontsize=8)
        before, after = (report[f"macs_{when}"] / 1e9 for when in ("before", "after"))
        axes.set(ylabel="channels", title=f"multiply-adds at {size} x {size}: {before:.4g} to {after:.4g} x $10^9$")
        axes.legend(frameon=False)


def plot_panels(panels: Mapping[str, Image.Image], path: Path) -> None:
    """Pictures by the title over each, five in a row."""
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    with saved_axes(path, 2.6 * columns, 2.9 * rows, rows, columns) as every_axes:
        for axes in every_axes.flat:
            axes.axis("off")
        for axes, (title, picture) in zip(every_axes.flat, panels.items()):
            axes.imshow(picture)
            axes.set_title(title, fontsize=10)


def plot_curves(reports: Mapping[str, dict], path: Path) -> None:
    """The mean of every metric over the number of channels cut, a curve for each network, by name, and a dotted line at
    how many are off for all pictures. reports: of `report.build_report`, with losses."""
    metrics = next(iter(reports.values()))["metrics"]
    with saved_axes(path, 5 * len(metrics), 4.4, columns=len(metrics)) as [every_axes]:
        for axes, metric in zip(every_axes, metrics):
            for color, (name, report) in enumerate(reports.items()):
                label, off, points = shown_name(name), report["channels_zero_for_all"], report["curve"]
                axes.plot([point["cut"] for point in points], [point[metric]["mean"] for point in points],
                          f"C{color}.-", label=label)
                axes.axvline(off, color=f"C{color}", linestyle=":", linewidth=1, label=f"{label}: off for all")
            axes.set(xlabel="bottleneck channels cut, weakest first", ylabel=METRICS[metric], ylim=(0, None))
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(reports)),
                           frameon=False)

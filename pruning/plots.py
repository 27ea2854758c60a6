"""What pruning shows: which channels are zero for which picture, how strong they are, what cutting them does."""

from pathlib import Path

import numpy as np

from data import to_pil
from network import StyleTransferNetwork
from painting.stylizer import Stylizer, load_input
from pruning.responses import Responses
from pruning.surgery import cut_bottleneck
from utils import write_atomically


def new_figure(width: float, height: float):
    """A matplotlib figure without pyplot: no display, no state left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_l0_map(responses: Responses, path: Path) -> None:
    """Pictures down, channels across; white: the channel responds to the picture, black: it is zero."""
    is_on = responses.l2 > 0
    figure = new_figure(9, 5)
    axes = figure.subplots()
    axes.imshow(is_on, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    styles = len(is_on) - responses.contents
    axes.axhline(responses.contents - 0.5, color="tab:red", linewidth=1)
    axes.set_yticks([responses.contents / 2, responses.contents + styles / 2],
                    [f"content\n({responses.contents})", f"style\n({styles})"])
    axes.set_xlabel("bottleneck channel")
    axes.set_title(f"zero (black) for every picture: {len(responses.always_zero)} of {is_on.shape[1]} channels, "
                   f"for at least one: {len(responses.ever_zero)}")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def plot_l2_curve(responses: Responses, path: Path) -> None:
    """Summed l2 norm of the channels, weakest first; the order in which they are cut."""
    order = responses.weakest_first
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for name, rows in (("content", responses.l2[: responses.contents]), ("style", responses.l2[responses.contents :])):
        axes.plot(np.arange(1, len(order) + 1), rows.sum(axis=0)[order], linewidth=0.8, alpha=0.7, label=name)
    axes.plot(np.arange(1, len(order) + 1), responses.l2.sum(axis=0)[order], color="black", linewidth=1.5,
              label="both")
    zero = len(responses.always_zero)
    if zero:
        axes.axvline(zero, color="tab:red", linestyle="--", linewidth=1, label=f"{zero} channels are zero throughout")
    axes.set_xlim(0, len(order))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bottleneck channels, weakest first")
    axes.set_ylabel(f"l2 norm summed over {len(responses.l2)} pictures")
    axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def plot_widths(layers: list[dict], size: int, path: Path) -> None:
    """The channels of every conv before and after the cut, in forward order; layers: rows of the report, whose
    multiply-adds are for pairs of `size` x `size` pictures."""
    places = np.arange(len(layers))
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    axes.bar(places, [layer["width_before"] for layer in layers], color="lightgray", label="before")
    bars = axes.bar(places, [layer["width_after"] for layer in layers], width=0.55, color="tab:blue", label="after")
    axes.bar_label(bars, fontsize=7)
    axes.set_xticks(places, [layer["name"].replace(".layers.0.", " ") for layer in layers], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=8)
    axes.margins(x=0.01)
    axes.set_ylabel("channels")
    totals = [sum(layer[f"macs_{when}"] for layer in layers) / 1e9 for when in ("before", "after")]
    axes.set_title(f"multiply-adds at {size} x {size}: {totals[0]:.2f} to {totals[1]:.2f} x $10^9$")
    axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def plot_prune_grid(
    network: StyleTransferNetwork, responses: Responses, numbers: list[int], config, path: Path
) -> None:
    """Content, style, and the output after cutting the n weakest channels, for each n. config: a PruneConfig."""
    content, style = (load_input(Path(getattr(config, flag)), config, flag) for flag in ("content", "style"))
    panels = [("Content", to_pil(content.float() / 255.0)), ("Style", to_pil(style.float() / 255.0))]
    for number in numbers:
        cut = cut_bottleneck(network, responses.weakest_first[:number])
        output = Stylizer(cut).stylize(content, style, strength=config.style_strength)
        panels.append((f"Prune {number} channels", output))
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(2.6 * columns, 2.9 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (title, picture) in zip(figure.axes, panels):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))

"""Plots and sheets of pictures."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import save_picture, to_pil
from network import StyleTransferNetwork
from responses import Responses
from stylize import Stylizer, load_input
from surgery import cut_bottleneck
from utils import note, write_atomically

CELL = 256  # pixels: side of a picture in a sheet
SHEET_SIDE = 8192  # pixels: no sheet is larger; its cells shrink instead
SMALLEST_CELL = 16
TITLE_HEIGHT = 32  # pixels
COMPARED_ROWS = 16  # pairs in comparison.png at most
CONTACT_SHEET = "contact_sheet.png"
COMPARISON = "comparison.png"


# ------------------------------------------------------------------------------------------------- sheets


def contact_sheet(pairs: list[tuple[int, int]], names: list[str]) -> "Sheet":
    """For every content with every style: styles along the top, contents down the left, the outputs between,
    those of several models side by side."""
    places = defaultdict(list)
    models = len(names)
    styles = 1 + max(style for _, style in pairs)
    for content, style in pairs:
        first = 1 + style * models
        places["content", content] = [(content + 1, 0)]
        places["style", style] = [(0, first + (models - 1) / 2)]  # in the middle over its outputs
        for model in range(models):
            places[content, style, model] = [(content + 1, first + model)]
    titles = ("", *names * styles) if models > 1 else ()
    return Sheet(CONTACT_SHEET, places, inputs=(1, 1), titles=titles)


def comparison_sheet(pairs: list[tuple[int, int]], names: list[str]) -> "Sheet":
    """A pair a row: content, style, and the output of every model. Of many pairs some are shown, evenly spread."""
    places = defaultdict(list)
    rows = min(len(pairs), COMPARED_ROWS)
    for row in range(rows):
        content, style = pairs[row * len(pairs) // rows]
        places["content", content].append((row, 0))
        places["style", style].append((row, 1))
        for model in range(len(names)):
            places[content, style, model].append((row, model + 2))
    return Sheet(COMPARISON, places, inputs=(0, 2), titles=("content", "style", *names))


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a row, all as high as the lowest; one alone as it is."""
    if len(pictures) == 1:
        return pictures[0]
    height = min(picture.height for picture in pictures)
    row = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures]
    image = Image.new("RGB", (sum(picture.width for picture in row), height))
    left = 0
    for picture in row:
        image.paste(picture, (left, 0))
        left += picture.width
    return image


class Sheet:
    """Pictures in cells of one size, with a title over every column where there are titles.

    places: for the key of each picture, the cells it goes to, (row, column), a half being between two; a picture
    without a cell is left out. Keys of inputs are (kind, number), those of outputs longer. inputs: how many rows at the
    top and columns at the left hold inputs: a rule sets them off. A row or column of outputs none of which came is
    left out. Several threads may place pictures at a time.
    """

    def __init__(self, name: str, places: dict, inputs: tuple[int, int], titles: tuple[str, ...] = ()) -> None:
        self.name, self.places, self.inputs, self.titles = name, places, inputs, titles
        cells = [cell for each in places.values() for cell in each]
        rows, columns = (int(max(cell[axis] for cell in cells)) + 1 for axis in range(2))
        self.top = TITLE_HEIGHT if titles else 0
        self.cell = min(CELL, (SHEET_SIDE - self.top) // max(rows, columns))
        self.placed: dict[tuple, Image.Image] = {}

    @property
    def is_possible(self) -> bool:
        """Whether its cells are large enough to show something."""
        return self.cell >= SMALLEST_CELL

    def lacks(self, key: tuple) -> bool:
        """Whether it has a cell for the picture of this key, and not the picture."""
        return self.is_possible and bool(self.places.get(key)) and key not in self.placed

    def place(self, picture: Image.Image, key: tuple) -> None:
        if not self.lacks(key):
            return
        inner = self.cell - max(2, self.cell // 32)
        picture = picture.copy()
        picture.thumbnail((inner, inner))
        self.placed[key] = picture

    def save(self, folder: Path) -> bool:
        """Write the sheet into the folder. Returns whether there is one: too many pictures do not fit."""
        if not self.is_possible:
            note(f"no {self.name}: more than {SHEET_SIDE // SMALLEST_CELL - 1} pictures on a side do not fit")
            return False
        rows, columns = (self._shown(axis) for axis in range(2))
        image = Image.new("RGB", (len(columns) * self.cell, self.top + len(rows) * self.cell), "white")
        draw = ImageDraw.Draw(image)
        for column, title in enumerate(self.titles):
            if column in columns:
                self._write(title, columns[column], draw)
        while self.placed:
            key, picture = self.placed.popitem()
            for row, column in self.places[key]:
                if int(row) not in rows or int(column) not in columns:
                    continue
                left = (columns[int(column)] + column % 1) * self.cell + (self.cell - picture.width) / 2
                top = self.top + (rows[int(row)] + row % 1) * self.cell + (self.cell - picture.height) / 2
                image.paste(picture, (round(left), round(top)))
        top, left = (number * self.cell for number in self.inputs)
        if left:
            draw.line([(left, 0), (left, image.height)], fill="#888888")
        if top:
            draw.line([(0, self.top + top), (image.width, self.top + top)], fill="#888888")
        save_picture(image, folder / self.name)
        return True

    def _shown(self, axis: int) -> dict[int, int]:
        """The rows or columns that the sheet has, each with its place there."""
        filled = {cell[axis] for key in self.placed if len(key) > 2 for cell in self.places[key]}
        return {number: place for place, number in enumerate(sorted(filled | set(range(self.inputs[axis]))))}

    def _write(self, title: str, place: int, draw: ImageDraw.ImageDraw) -> None:
        """A title in the middle over its column, its beginning cut off where it is too long."""
        font = ImageFont.load_default(TITLE_HEIGHT // 2)
        shown = title
        while font.getlength(shown) > self.cell - 4 and len(shown) > 2:
            shown = f"…{shown[2:]}"
        draw.text(((place + 0.5) * self.cell, TITLE_HEIGHT / 2), shown, fill="black", font=font, anchor="mm")


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
        stylizer = Stylizer(cut, margin=config.margin)
        output = stylizer.stylize(content, style, strength=config.style_strength)
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

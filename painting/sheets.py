"""Sheets of pictures: every content with every style, or pair by pair."""

from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import save_picture
from utils import note

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

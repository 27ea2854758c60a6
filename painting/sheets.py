"""Sheets of pictures: every content with every style, or pair by pair."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from data import save_picture
from utils import note

CELL = 256  # pixels: side of a picture in a sheet
SHEET_SIDE = 8192  # pixels: no sheet is larger; its cells shrink instead
SMALLEST_CELL = 16
TITLE_HEIGHT = 32  # pixels
COMPARED_ROWS = 16  # pairs in comparison.png at most
CONTACT_SHEET = "contact_sheet.png"
COMPARISON = "comparison.png"

# ("content", number) and ("style", number) are inputs, (content, style, column) is an output.
Key = tuple


class Sheet:
    """Pictures in cells of one size, with a title over every column where there are titles.

    rows: the key of the picture in each cell, or None. Several threads may add pictures at a time.
    """

    def __init__(self, name: str, rows: list[list[Key | None]], titles: tuple[str, ...] = ()) -> None:
        self.name, self.rows, self.titles = name, rows, titles
        self.top = TITLE_HEIGHT if titles else 0
        self.cell = min(CELL, (SHEET_SIDE - self.top) // max(len(rows), len(rows[0])))
        self.keys = {key for row in rows for key in row}
        self.pictures: dict[Key, Image.Image] = {}  # small copies

    def lacks(self, key: Key) -> bool:
        """Whether it shows the picture of this key, and does not have it yet."""
        return key in self.keys and key not in self.pictures and self.cell >= SMALLEST_CELL

    def add(self, key: Key, picture: Image.Image) -> None:
        if self.lacks(key):
            picture, side = picture.copy(), self.cell - max(2, self.cell // 32)
            picture.thumbnail((side, side))
            self.pictures[key] = picture

    def save(self, folder: Path) -> bool:
        """Write the sheet into the folder. Returns whether there is one: too many pictures do not fit."""
        if self.cell < SMALLEST_CELL:
            note(f"no {self.name}: more than {SHEET_SIDE // SMALLEST_CELL - 1} pictures on a side do not fit")
            return False
        rows = [row for row in self.rows if self._is_shown(row)]
        columns = [column for column, keys in enumerate(zip(*self.rows)) if self._is_shown(keys)]
        cells = [pil_to_tensor(self._in_cell(row[column])) for row in rows for column in columns]
        grid = Image.fromarray(make_grid(cells, nrow=len(columns), padding=0).permute(1, 2, 0).numpy())
        image = Image.new("RGB", (grid.width, self.top + grid.height), "white")
        image.paste(grid, (0, self.top))
        if self.titles:
            for place, column in enumerate(columns):
                self._write(self.titles[column], place, ImageDraw.Draw(image))
        save_picture(image, folder / self.name)
        return True

    def _is_shown(self, keys: list[Key | None]) -> bool:
        """Whether a row or column of these keys has an output that came, or has inputs alone."""
        outputs = [key for key in keys if key is not None and len(key) == 3]
        return not outputs or any(key in self.pictures for key in outputs)

    def _in_cell(self, key: Key | None) -> Image.Image:
        """The picture in the middle of a white square."""
        cell = Image.new("RGB", (self.cell, self.cell), "white")
        if key in self.pictures:
            picture = self.pictures[key]
            cell.paste(picture, ((self.cell - picture.width) // 2, (self.cell - picture.height) // 2))
        return cell

    def _write(self, title: str, place: int, draw: ImageDraw.ImageDraw) -> None:
        """A title in the middle over its column, its beginning cut off where it is too long."""
        font = ImageFont.load_default(TITLE_HEIGHT // 2)
        shown = title
        while font.getlength(shown) > self.cell - 4 and len(shown) > 2:
            shown = f"…{shown[2:]}"
        draw.text(((place + 0.5) * self.cell, TITLE_HEIGHT / 2), shown, fill="black", font=font, anchor="mm")


def contact_sheet(pairs: list[tuple[int, int]], names: list[str]) -> Sheet:
    """Every content with every style: contents down the left, and under every style the outputs of all models side by
    side. names: of the models."""
    contents, styles = (sorted(set(numbers)) for numbers in zip(*pairs))
    outputs = [(style, column) for style in styles for column in range(len(names))]
    rows = [[None, *(("style", style) for style, _ in outputs)]]
    rows += [[("content", content), *((content, *output) for output in outputs)] for content in contents]
    return Sheet(CONTACT_SHEET, rows, ("", *names * len(styles)) if len(names) > 1 else ())


def comparison_sheet(pairs: list[tuple[int, int]], names: list[str]) -> Sheet:
    """A pair a row: content, style, and the output of every model. Of many pairs some are shown, evenly spread."""
    count = min(len(pairs), COMPARED_ROWS)
    shown = [pairs[row * len(pairs) // count] for row in range(count)]
    rows = [[("content", content), ("style", style), *((content, style, column) for column in range(len(names)))]
            for content, style in shown]
    return Sheet(COMPARISON, rows, ("content", "style", *names))


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a row, all as high as the lowest."""
    height = min(picture.height for picture in pictures)
    row = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures]
    return Image.fromarray(np.hstack([np.asarray(picture) for picture in row]))

"""Sheets of pictures: every content with every style, or pair by pair."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import save_picture

CELL = 256  # pixels: side of a picture in a sheet
SHEET_SIDE = 8192  # pixels: instead of a larger sheet cells shrink, to LEAST_CELL at least
LEAST_CELL = 16
TITLE_HEIGHT = 32  # pixels
COMPARED_ROWS = 16  # pairs in comparison.png at most
CONTACT_SHEET = "contact_sheet.png"
COMPARISON = "comparison.png"

# ("content", number) and ("style", number) are inputs, (content, style, column) is an output.
Key = tuple


@dataclass(frozen=True)
class Sheet:
    """Pictures in cells of one size: each cell's key, or None; and where there are titles, one over every column."""

    name: str
    rows: list[list[Key | None]]
    titles: tuple[str, ...] = ()

    @property
    def cell(self) -> int:
        """The side of a cell, pixels."""
        fitting = SHEET_SIDE // max(len(self.rows) + bool(self.titles), len(self.rows[0]))
        return max(LEAST_CELL, min(CELL, fitting))

    def save(self, folder: Path, pictures: dict[Key, Image.Image]) -> None:
        """Write the sheet into the folder, without the rows and columns that no output has come for."""
        def is_shown(keys) -> bool:
            outputs = [key for key in keys if key is not None and len(key) == 3]
            return not outputs or any(key in pictures for key in outputs)

        rows = [row for row in self.rows if is_shown(row)]
        columns = [column for column, keys in enumerate(zip(*self.rows)) if is_shown(keys)]
        cell, top = self.cell, TITLE_HEIGHT if self.titles else 0
        sheet = Image.new("RGB", (cell * len(columns), top + cell * len(rows)), "white")
        for (below, row), (right, column) in product(enumerate(rows), enumerate(columns)):
            if picture := pictures.get(row[column]):
                picture.thumbnail((cell - max(2, cell // 32),) * 2)
                sheet.paste(picture, (right * cell + (cell - picture.width) // 2,
                                      top + below * cell + (cell - picture.height) // 2))
        for right, column in enumerate(columns if self.titles else ()):
            title = self.titles[column][-cell // 9 :]  # what fits, in letters of 9 pixels
            ImageDraw.Draw(sheet).text(((right + 0.5) * cell, TITLE_HEIGHT / 2), title, fill="black",
                                       font=ImageFont.load_default(TITLE_HEIGHT // 2), anchor="mm")
        save_picture(sheet, folder / self.name)


def contact_sheet(pairs: list[tuple[int, int]], names: list[str]) -> Sheet:
    """Contents down the left, and under every style the outputs of all models side by side. names: of the models."""
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

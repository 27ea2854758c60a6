"""Bad input: one clear line on stderr and exit code 2. Every refusal of the command line that needs no more than flags
and a few files is a row here: what is given, and the words that the line must have.

`{tmp}` in a value is a folder of the test's own, with the files of `write_files`.
"""

from pathlib import Path

import pytest
from helpers import picture_network, refusal, write_model, write_noise, write_picture
from PIL import Image


def write_files(folder: Path) -> None:
    """A model, and pictures of 56 x 40 pixels: a content, two styles, a grey one, a mask, an upright mask."""
    write_model(folder / "model.pth", picture_network())
    for number, name in enumerate(("content", "style", "other")):
        write_noise(folder / f"{name}.png", (40, 56), number)
    write_picture(folder / "grey.png", (56, 40), (9, 9, 9))
    Image.new("L", (56, 40), 128).save(folder / "mask.png")
    Image.new("L", (40, 56), 128).save(folder / "upright.png")


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A row: mode, flags ("--imsize 0 --save_path {tmp}/out"), words that the line must have.
COMMAND_LINE = (
)

TRAINING = (
)

PAINT = "--gpu_no -1 --load_path {tmp}/model.pth --content {tmp}/content.png --save_path {tmp}/out.png "
PAINT_IN_ONE = PAINT + "--style {tmp}/style.png "
PAINT_IN_TWO = PAINT + "--style {tmp}/style.png {tmp}/other.png "
PAINTING = (
    ("test", PAINT_IN_TWO + "--style_weights 0.7", "--style_weights 0.7: 1 for 2 styles"),
    ("test", PAINT_IN_TWO + "--style_weights 0 0", "--style_weights 0 0: numbers of 0 or more"),
    ("test", PAINT_IN_TWO + "--style_weights 1 -1", "got -1"),
    ("test", PAINT_IN_TWO + "--style_weights 1 1 --metrics ssim", "--metrics compares with one style picture"),
    ("test", PAINT_IN_TWO + "--style_weights 1 1 --mask {tmp}/mask.png", "--mask: got style_weights, too"),
    ("test", PAINT_IN_ONE + "--mask {tmp}/mask.png", "--mask: got 1 style;"),
    ("test", PAINT_IN_TWO + "--mask {tmp}/mask.png --cropsize 24", "--cropsize cuts the content alone"),
    ("test", PAINT_IN_TWO + "--mask {tmp}/upright.png", "mask: 40 x 56 pixels, the content picture has 56 x 40"),
    ("test", PAINT_IN_TWO + "--mask {tmp}/none.png", "{tmp}/none.png: no such file"),
    ("test", PAINT_IN_ONE + "--content {tmp}/grey.png --preserve_color luma", "luma: the content picture is grey"),
    ("test", PAINT_IN_ONE + "--preserve_color hue", "hue"),
    ("test", PAINT_IN_ONE + "--style_size 0", "got 0"),
    ("test", PAINT_IN_ONE + "--tile 71", "--tile 71: 72 pixels or more"),
    ("test", PAINT_IN_ONE + "--backbone vgg16", "--backbone vgg16: {tmp}/model.pth is a vgg19 network"),
    ("test", PAINT_IN_TWO + "--mask {tmp}/mask.png --save_path {tmp}/mask.png", "would overwrite --mask"),
)

PICTURES_AND_FILES = (
)

PRUNING = (
)

EXPORTING = (
)

ROWS = COMMAND_LINE + TRAINING + PAINTING + PICTURES_AND_FILES + PRUNING + EXPORTING


@pytest.mark.parametrize("mode, flags, words", ROWS)
def test_bad_input_is_one_line(mode, flags, words, capsys, tmp_path):
    write_files(tmp_path)
    before = read_files(tmp_path)
    line = refusal(capsys, "--mode", mode, *flags.replace("{tmp}", str(tmp_path)).split())
    for word in words if isinstance(words, tuple) else (words,):
        assert word.replace("{tmp}", str(tmp_path)) in line
    assert read_files(tmp_path) == before  # nothing is written, nothing lost

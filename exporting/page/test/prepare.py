"""What page.test.mjs needs in a FOLDER: the page, pictures, and what `--mode test` paints of them."""

import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent.parent.parent
sys.path.insert(0, str(ROOT))

from main import main  # noqa: E402

STARRY_NIGHT = ROOT / "imgs" / "style" / "starry_night.jpg"
# What is painted: content, style, and more flags. PNG pictures leave their decoders no choice.
DESIRED = {
    "desired.png": ("photo.png", STARRY_NIGHT),
    "half.png": ("photo.png", STARRY_NIGHT, "--style_strength", "0.5"),
    "own.bmp": ("transparent.png", "painting.png"),  # a format without transparency
    "upright.png": ("lying.jpg", STARRY_NIGHT),
}


def run(*arguments) -> None:
    if main([str(argument) for argument in arguments]):
        sys.exit(1)


def write_pictures(folder: Path) -> None:
    photograph = Image.open(ROOT / "imgs" / "content" / "brandenburg_gate.jpg").resize((203, 151))
    photograph.save(folder / "photo.png")
    photograph.resize((67, 50)).save(folder / "small.png")
    photograph.resize((1600, 1200)).save(folder / "large.png")
    Image.open(ROOT / "imgs" / "style" / "great_wave.jpg").resize((99, 130)).save(folder / "painting.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # as a telephone writes it that was held upright
    photograph.save(folder / "lying.jpg", quality=95, exif=exif)
    photograph.putalpha(Image.linear_gradient("L").resize(photograph.size))
    photograph.save(folder / "transparent.png")
    for whole, cut in (("photo.png", "cut.png"), ("lying.jpg", "cut.jpg")):
        content = (folder / whole).read_bytes()
        (folder / cut).write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("no picture")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run("--mode", "export", "--load_path", ROOT / "model-store" / "compact.pth", "--save_path", f"{folder / 'page'}/")
    write_pictures(folder)
    for name, (content, style, *more) in DESIRED.items():
        run("--mode", "test", "--gpu_no", -1, "--content", folder / content, "--style", folder / style,
            "--save_path", folder / name, *more)

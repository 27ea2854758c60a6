"""Frames a second from file to file, and how much painted videos shimmer.

    python benchmarks/video.py model-store/tiny.pth model-store/compact.pth

The clip is a bundled photograph under a window that moves sideways. Shimmer is the mean difference, of 255, between the
same things in two frames of the painted file, aligned by the motion, 40 pixels and more from the border; the first
frames, in which smoothing sets in, do not count. At 2 pixels a frame the two are one frame apart; at 1.5, where every
other frame lies between pixels, two. Last line: JSON.
"""

import argparse
import sys
import time
from contextlib import redirect_stderr
from fractions import Fraction
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from measure import print_json, spread, versions
from PIL import Image

from main import main as run_command
from utils import UserError, errors_in_one_line, resolve_device

ROOT = Path(__file__).parent.parent
CONTENT, STYLE = ROOT / "imgs" / "content" / "canyon.jpg", ROOT / "imgs" / "style" / "starry_night.jpg"
SETTLED = 4  # frames after which shimmer counts
BORDER = 40


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model file, or folder of a run or a pruning")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU when there is one")
    parser.add_argument("--size", type=int, default=512, help="side of the frames, pixels")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--steps", type=float, nargs="+", default=[2, 1.5], help="motion, pixels a frame, twice of "
                        "which is a whole number; the first is timed")
    parser.add_argument("--smoothing", type=float, nargs="+", default=[0, 0.8], help="values of --temporal_smoothing")
    parser.add_argument("--runs", type=int, default=3, help="timed runs behind each median")
    return parser.parse_args()


def write_clip(path: Path, size: int, frames: int, step: float) -> None:
    """A window of `size` pixels moves over the photograph by `step` pixels a frame, to and fro."""
    import av

    with Image.open(CONTENT) as picture:
        scale = size / min(picture.size)
        sides = [round(scale * side) for side in picture.size]
        picture = picture.convert("RGB").resize(sides, Image.Resampling.BICUBIC)
    room = picture.width - size - 1
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "12"})
        stream.width = stream.height = size
        for number in range(frames):
            place = step * number % (2 * room)
            left = min(place, 2 * room - place)
            window = picture.transform((size, size), Image.Transform.AFFINE, (1, 0, left, 0, 1, 0),
                                       Image.Resampling.BICUBIC)
            container.mux(stream.encode(av.VideoFrame.from_image(window)))
        container.mux(stream.encode())


def shimmer(path: Path, step: float) -> float:
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(np.int16) for frame in container.decode(video=0)]
    apart = Fraction(step).denominator
    moved = round(step * apart)
    inner = slice(BORDER, -BORDER)
    there = (inner, slice(BORDER, -BORDER - moved), slice(None))
    before = (inner, slice(BORDER + moved, -BORDER), slice(None))
    return float(np.mean([np.abs(one[before] - other[there]).mean()
                          for one, other in zip(frames[SETTLED:], frames[SETTLED + apart :])]))


def paint(clip: Path, target: Path, model: str, smoothing: float, device: str | None) -> float:
    """Seconds that the command took, without Python's start."""
    flags = ["--gpu_no", "-1"] if device == "cpu" else []
    start, said = time.perf_counter(), StringIO()
    with redirect_stderr(said):
        code = run_command(["--mode", "test", "--load_path", model, "--content", str(clip), "--style", str(STYLE),
                            "--temporal_smoothing", str(smoothing), "--save_path", str(target), *flags])
    if code:
        raise UserError(said.getvalue().strip().splitlines()[-1].removeprefix("error: "))
    return time.perf_counter() - start


@errors_in_one_line
def main() -> None:
    arguments = parse_arguments()
    device = resolve_device({"cpu": -1, "cuda": 0, None: None}[arguments.device])
    report = versions(device) | {"results": []}
    print(f"{report['device']}, torch {report['torch']}, Python {report['python']}; {arguments.frames} frames of "
          f"{arguments.size} x {arguments.size} pixels; median (least to greatest) of {arguments.runs} runs")
    print(f"{'model':32}{'smoothing':>10}{'frames a second':>26}"
          + "".join(f"{f'shimmer at {step:g}':>18}" for step in arguments.steps))
    with TemporaryDirectory() as folder:
        clips = {step: Path(folder) / f"{step:g}.mp4" for step in arguments.steps}
        for step, clip in clips.items():
            write_clip(clip, arguments.size, arguments.frames, step)
        target = Path(folder) / "painted.mkv"
        for model in arguments.models:
            for smoothing in arguments.smoothing:
                shimmers = {}
                for step, clip in reversed(clips.items()):  # also warms up for the first, which is timed
                    paint(clip, target, model, smoothing, arguments.device)
                    shimmers[f"{step:g}"] = shimmer(target, step)
                rates = [arguments.frames / paint(clips[arguments.steps[0]], target, model, smoothing,
                                                  arguments.device) for _ in range(arguments.runs)]
                result = {"model": model, "smoothing": smoothing, "frames_per_second": spread(rates),
                          "shimmer": shimmers}
                report["results"].append(result)
                rate = result["frames_per_second"]
                speed = f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})"
                print(f"{model[-32:]:32}{smoothing:>10g}{speed:>26}"
                      + "".join(f"{shimmers[f'{step:g}']:>18.2f}" for step in arguments.steps), flush=True)
    print_json(report)


if __name__ == "__main__":
    sys.exit(main())

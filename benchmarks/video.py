"""Frames a second from file to file, and how much painted videos shimmer.

    python benchmarks/video.py model-store/tiny.pth model-store/compact.pth

The clip is a bundled photograph under a window that moves sideways. Shimmer is the mean difference, of 255, between the
same things in two frames of the painted file, aligned by the motion, 40 pixels and more from the border; the first
frames, in which smoothing sets in, do not count. At 2 pixels a frame the two are one frame apart; at 1.5, where every
other frame lies between pixels, two. Last line: JSON.
"""

import argparse
import json
import time
from contextlib import redirect_stderr
from fractions import Fraction
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from measure import benchmark_parser, show_spread, spread, versions
from PIL import Image

from evaluate import test
from utils import errors_in_one_line, resolve_device

ROOT = Path(__file__).parent.parent
CONTENT, STYLE = ROOT / "imgs" / "content" / "canyon.jpg", ROOT / "imgs" / "style" / "starry_night.jpg"
STEPS = (2, 1.5)  # motion, pixels a frame, twice of which is a whole number; the first is timed
SMOOTHING = (0, 0.8)  # values of --temporal_smoothing
SETTLED = 4  # frames after which shimmer counts
BORDER = 40


def parse_arguments() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("models", nargs="+", help="model file, or folder of a run or a pruning")
    parser.add_argument("--size", type=int, default=512, help="side of the frames, pixels")
    parser.add_argument("--frames", type=int, default=100)
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


def paint(clip: Path, target: Path, model: str, smoothing: float, gpu_no: int | None) -> float:
    """Seconds that test mode takes."""
    start = time.perf_counter()
    with redirect_stderr(StringIO()):
        test({"load_path": (model,), "content": (str(clip),), "style": (str(STYLE),), "temporal_smoothing": smoothing,
              "save_path": str(target), "gpu_no": gpu_no})
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace, clips: dict[float, Path], model: str, smoothing: float) -> dict:
    """Frames a second of the first clip, shimmer of all. clips: by their motion, in pixels a frame."""
    target = clips[STEPS[0]].with_name("painted.mkv")
    shimmers, rates = {}, []
    for step in reversed(STEPS):  # also warms up for the first, which is timed
        paint(clips[step], target, model, smoothing, arguments.gpu_no)
        shimmers[f"{step:g}"] = shimmer(target, step)
    for _ in range(arguments.runs):
        rates.append(arguments.frames / paint(clips[STEPS[0]], target, model, smoothing, arguments.gpu_no))
    return {"model": model, "smoothing": smoothing, "frames_per_second": spread(rates), "shimmer": shimmers}


@errors_in_one_line()
def main() -> None:
    arguments = parse_arguments()
    report = versions(resolve_device(arguments.gpu_no)) | {"results": []}
    print(f"{report['device']}, torch {report['torch']}, Python {report['python']}; {arguments.frames} frames of "
          f"{arguments.size} x {arguments.size} pixels; median (least to greatest) of {arguments.runs} runs")
    print(f"{'model':32}{'smoothing':>10}{'frames a second':>26}{'shimmer at 2':>18}{'at 1.5':>18}")
    with TemporaryDirectory() as folder:
        clips = {step: Path(folder) / f"{step:g}.mp4" for step in STEPS}
        for step, clip in clips.items():
            write_clip(clip, arguments.size, arguments.frames, step)
        for model in arguments.models:
            for smoothing in SMOOTHING:
                result = measure(arguments, clips, model, smoothing)
                report["results"].append(result)
                print(f"{model[-32:]:32}{smoothing:>10g}{show_spread(result['frames_per_second']):>26}"
                      + "".join(f"{result['shimmer'][f'{step:g}']:>18.2f}" for step in STEPS), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

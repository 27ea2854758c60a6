"""What the benchmarks share: pictures to load, peak memory, the matrix-product peak, versions, the closing JSON."""

import ctypes
import gc
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import describe_device, time_in_turns  # noqa: E402


def versions(device: torch.device) -> dict:
    """What stands beside a figure: the device, the versions, the command."""
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def spread(seconds: list[float], unit: float = 1.0) -> dict[str, float]:
    """Median, least and greatest of repeated times, in units of `unit` seconds."""
    values = [each / unit for each in seconds]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needs at its peak beyond what is held before it; None where that cannot be measured.

    On a GPU by torch's allocator; on the CPU the growth of the process's resident set (Linux only).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return None
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def matrix_product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random data, the fastest of 20: what the device can do."""
    side = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    (times,) = time_in_turns([lambda: left @ right], 20, device)
    return 2 * side**3 / min(times)


def write_pictures(folder: Path, count: int, size: tuple[int, int], seed: int) -> list[Path]:
    """JPEGs of soft blobs with grain, quality 90: about a photograph's bytes a pixel. size is (width, height)."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        blobs = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
        blobs = blobs.resize(size, Image.Resampling.BICUBIC)
        grain = generator.normal(0.0, 6.0, (size[1], size[0], 1))
        pixels = (np.asarray(blobs) + grain).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def print_json(values: dict) -> None:
    """The last line of every benchmark."""
    print(json.dumps(values))

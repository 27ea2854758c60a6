"""What the benchmarks share: the device, peak memory, what stands beside a figure, medians with their spread."""

import argparse
import ctypes
import gc
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import describe_device  # noqa: E402


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flag that all benchmarks of speed have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu_no", type=int, help="as of main.py: -1 for the CPU; default: GPU 0 when there is one")
    return parser


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


def show_spread(values: dict[str, float]) -> str:
    return f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})"


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """MiB that `call` needs at its peak beyond what is held before it.

    On a GPU by torch's allocator; on the CPU the growth of the process's resident set.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:  # a kernel, or a sandbox, that does not have it
        return float("nan")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024

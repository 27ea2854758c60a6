"""Before any test: the modules and the scripts on the path, and the fixtures that several files use."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Kernels that other programs, or other instruction sets, have left in torch.compile's cache are none of these tests'.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled_")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED.name
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "model-store")]

from helpers import SMALL_TRAINING, small_network, write_model, write_noise  # noqa: E402

from utils import usable_cores  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a script ignores
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FORCE_COLOR"):  # of a job, of CI
    os.environ.pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many as there are cores for, quotas of control groups included; each takes 1 to 2 GB."""
    return min(8, usable_cores())


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict:
    """Settings of a training on small pictures that goes on from a narrow network: quick, and its files are small."""
    folder = tmp_path_factory.mktemp("small")
    for number in range(6):
        write_noise(folder / ("content", "style")[number % 2] / f"{number}.png", (24, 30), number)
    write_model(folder / "narrow.pth", small_network(width=8))
    return SMALL_TRAINING | {"content_dir": str(folder / "content"), "style_dir": str(folder / "style"), "imsize": 20,
                             "cropsize": 16, "load_path": str(folder / "narrow.pth")}

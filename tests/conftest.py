"""Before any test: the modules and the benchmarks on the path, and the fixtures that several files use."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # in this order: both have a stylize.py

from helpers import REFERENCE  # noqa: E402


@pytest.fixture(scope="session")
def reference() -> dict:
    """Values computed with an independent implementation; the file says how."""
    return REFERENCE

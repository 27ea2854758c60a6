"""Importing this toolkit into a program that has modules of its own called `utils`, `data`, `network` …

Its modules lie at the top level, so a name may mean one of them or one of the program's.
"""

import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in ROOT.glob("*.py")}
FILES |= {path.parent.name: path for path in ROOT.glob("*/__init__.py")}


def at_home() -> bool:
    """Whether the names of all modules of this toolkit mean them, as in its own programs."""
    try:
        return all(Path(find_spec(name).origin).resolve() == file for name, file in FILES.items())
    except (ValueError, AttributeError, TypeError):  # there is none of this name, or it comes from no file
        return False


@contextmanager
def apart():
    """Within the block the names of this toolkit's modules, and of modules in them, mean them, behind it what they
    meant before. What was imported stays with those that imported it."""
    others = _take_out()
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
        _take_out()
        sys.modules.update(others)


def _take_out() -> dict:
    """Forget what these names mean now, and return it."""
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in FILES}

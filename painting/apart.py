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
    for name, file in FILES.items():
        if name in sys.modules:
            meant = getattr(sys.modules[name], "__file__", None)
        else:
            meant = getattr(find_spec(name), "origin", None)
        if meant is None or Path(meant).resolve() != file:
            return False
    return True


@contextmanager
def apart():
    """Within the block the names of this toolkit's modules mean them, behind it what they meant before. What was
    imported stays with those that imported it."""
    others = _modules()
    _forget(others)
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
        _forget(_modules())
        sys.modules.update(others)


def _modules() -> dict:
    """What the names of this toolkit's modules, and of modules in them, mean now."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in FILES}


def _forget(names) -> None:
    for name in names:
        del sys.modules[name]

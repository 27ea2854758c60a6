"""The house of DESIGN.md: every module stands in a row, and imports only from the rows below."""

import ast

import pytest
from helpers import ROOT

# Lowest first; a module of one row may not import another of the same.
ROWS = (
    ("utils", "metadata", "archives"),
    ("runfolder", "loss", "data", "network", "muon", "smoothing"),
    ("cost", "sampling"),
    ("weights", "compact", "graphs", "quantize", "tiling", "control"),
    ("quality", "responses", "surgery", "stylize"),
    ("selection", "figures", "webpage"),
    ("run", "pairs"),
    ("transfer", "painting", "video"),
    ("train", "distill", "evaluate", "prune", "export", "convert_vgg"),  # the modes, and a script that stands alone
    ("flags", "hubconf"),  # a script of torch.hub
    ("main",),
)
ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row}
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}


def imported(source: str) -> set[str]:
    """The top-level names of every import in the source, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: the modules are flat"
            found.add(node.module.split(".")[0])
    return found


def test_imports_are_found_wherever_they_stand():
    source = "import a.b, c as d\nfrom e.f import g\ndef h():\n    from i import j\n    import k\n"
    assert imported(source) == {"a", "c", "e", "i", "k"}


def test_every_module_stands_in_one_row():
    assert sum(len(row) for row in ROWS) == len(ROW_OF)
    assert MODULES.keys() == ROW_OF.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down(module):
    own = imported(MODULES[module].read_text()) & MODULES.keys()
    upwards = [other for other in sorted(own) if ROW_OF[other] >= ROW_OF[module]]
    assert not upwards, f"{module}.py imports {', '.join(upwards)}, which stand no lower"

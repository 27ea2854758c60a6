"""The house: every module stands in a row, and imports only from the rows below; what is cited is there."""

import ast
import re
import sys

import pytest
from helpers import ROOT

# Lowest first; a module of one row may not import another of the same.
ROWS = (
    ("utils", "archives", "loss"),
    ("network", "data", "painting.apart"),
    ("weights", "folders"),
    ("settings",),
    # The wings, each module above those that it uses.
    ("training.run_folder", "training.muon", "training.sampling", "training.compaction", "training.dead_units",
     "painting.smoothing", "painting.tiling", "painting.control", "painting.quality", "painting.sheets",
     "pruning.surgery", "exporting.graphs"),
    ("training.loop", "training.step", "painting.stylizer"),
    ("painting",),
    ("painting.pairs", "exporting.formats", "exporting.webpage"),
    ("painting.many", "painting.video", "pruning.responses", "exporting.integers"),
    ("pruning.selection", "pruning.plots"),
    ("pruning.report",),
    ("train", "distill", "evaluate", "prune", "export"),  # the modes
    ("hubconf",),  # a script of torch.hub
    ("main",),
)
WINGS = ("training", "painting", "pruning", "exporting")
MAY_USE = {"training": (), "painting": (), "pruning": ("painting",), "exporting": ("painting",)}  # beside themselves
ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row} | {wing: 0 for wing in WINGS
                                                                                  if wing != "painting"}


def name_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for folder in (ROOT, *(ROOT / wing for wing in WINGS))
           for path in sorted(folder.glob("*.py")) if path.name != "serve.py"}


def imported(source: str) -> set[str]:
    """The modules of every import in the source, wherever it stands; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: modules are named in full"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_stands_in_one_row():
    assert sum(len(row) for row in ROWS) + len(WINGS) - 1 == len(ROW_OF)
    assert MODULES.keys() == ROW_OF.keys()
    assert len(list(ROOT.glob("*.py"))) <= 15


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down(module):
    own = imported(MODULES[module].read_text()) & MODULES.keys()
    upwards = [other for other in sorted(own) if ROW_OF[other] >= ROW_OF[module]]
    assert not upwards, f"{module}.py imports {', '.join(upwards)}, which stand no lower"


@pytest.mark.parametrize("wing", WINGS)
def test_wings_use_only_the_wings_that_they_may(wing):
    used = {other.split(".")[0] for module, path in MODULES.items() if module.split(".")[0] == wing
            for other in imported(path.read_text()) & MODULES.keys()}
    assert not used & set(WINGS) - {wing, *MAY_USE[wing]}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"painting.smoothing"}))
def test_a_package_of_an_extra_is_imported_where_it_is_used(module):
    """A program without wandb, onnx, PyAV or OpenCV imports every module but that for smooth videos."""
    head = [node for node in ast.parse(MODULES[module].read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = imported("\n".join(map(ast.unparse, head)))
    assert "painting.smoothing" not in names
    packages = {name.split(".")[0] for name in names} - {name.split(".")[0] for name in MODULES}
    assert packages - sys.stdlib_module_names <= {"torch", "torchvision", "numpy", "PIL", "tqdm", "psutil",
                                                  "matplotlib"}


WRITTEN = {"report.md", "table.md", "gradients.py"}  # by speedrun.sh, by prune mode, and by a test


def test_cited_files_are_there():
    """Every document and program names files by their path from the root or from its own folder, or by their name."""
    folders = ("docs", "tests", "benchmarks", "examples", "imgs", "model-store", *WINGS)
    files = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*")
                                  if "node_modules" not in path.parts)]
    names = {path.name for path in files} | {str(path.relative_to(ROOT)) for path in files} | WRITTEN
    missing = []
    for path in files:
        if path.suffix in (".md", ".py", ".sh", ".json", ".mjs"):
            cited = re.findall(r"(?<![\w*/{}$.-])[\w./-]*\w\.(?:md|py|sh)\b", path.read_text())
            missing += [(path.name, name) for name in cited if name.rpartition("/")[2].lstrip(".") not in WRITTEN
                        and name not in names and not (path.parent / name).exists()]
    assert not missing

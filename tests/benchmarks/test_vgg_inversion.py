"""The benchmark that optimises pictures under a VGG's losses."""

import json

import pytest
import vgg_inversion
from helpers import ROOT
from PIL import Image

from data import normalize, prepare_picture
from network import LossNetwork
from weights import load_vgg

FOLDERS = ["--content_dir", str(ROOT / "imgs/content"), "--style_dir", str(ROOT / "imgs/style"), "--gpu_no", "-1"]


def test_optimising_lowers_what_it_weighs():
    network = LossNetwork("vgg19")
    network.layers.load_state_dict(load_vgg("vgg19", "random")[0])
    content, style = (normalize(prepare_picture(next((ROOT / "imgs" / kind).glob("*.jpg")), 32, 32))
                      for kind in ("content", "style"))
    _, first_content, first_style = vgg_inversion.optimise(network, content, style, 0.0, 1, 0.05)
    picture, content_loss, _ = vgg_inversion.optimise(network, content, style, 0.0, 15, 0.05)
    assert content_loss < 0.9 * first_content and picture.shape == content.shape
    _, _, style_loss = vgg_inversion.optimise(network, content, style, 100.0, 15, 0.05)
    assert style_loss < 0.9 * first_style


def test_grid_and_json(tmp_path, capsys):
    flags = [*FOLDERS, "--holdout", "0", "--pairs", "2", "--imsize", "32", "--size", "32", "--steps", "2"]
    assert vgg_inversion.main([*flags, "--style_loss_weight", "0", "5", "--save_path", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 36 + 4, 4 * 36 + 4)  # content, style, two weights; 4 pixels between
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [result["style_loss_weight"] for result in results] == [0.0, 5.0]
    assert all(result["content"] > 0 and result["style"] > 0 for result in results)


def test_refusals(tmp_path, capsys):
    for flags, needed in (
        (["--save_path", str(tmp_path / "grid.txt")], "--save_path"),
        (["--save_path", str(tmp_path / "grid.png"), "--pairs", "9", "--holdout", "0"], "--pairs wants 9"),
        (["--save_path", str(tmp_path / "grid.png"), "--vgg_weights", "nowhere.pth"], "nowhere.pth"),
    ):
        assert vgg_inversion.main([*FOLDERS, *flags]) == 2
        assert needed in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_numbers_and_a_broken_picture_are_one_line(tmp_path, capsys):
    save = ["--save_path", str(tmp_path / "grid.png")]
    with pytest.raises(SystemExit) as stopped:
        vgg_inversion.main([*FOLDERS, *save, "--steps", "0"])
    assert stopped.value.code == 2 and "--steps" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    flags = [*FOLDERS, *save, "--holdout", "0", "--pairs", "1", "--style_dir", str(tmp_path / "broken")]
    assert vgg_inversion.main(flags) == 2
    assert "a.png: not a readable picture" in capsys.readouterr().err

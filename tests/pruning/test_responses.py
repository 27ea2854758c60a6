"""Responses: which pictures are measured and set aside, what is measured of every channel, the file that keeps it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import convs, random_picture, small_network, user_error, write_noise
from test_surgery import CONSTANT, OFF
from torch.testing import assert_close

from data import normalize, prepare_picture
from network import NetworkConfig, adain, bottleneck_conv, channel_statistics
from prune import PruneConfig
from pruning import responses as responses_module
from pruning.responses import Responses, choose_pictures, measure_responses
from pruning.surgery import cut_channels

L2 = np.array([[5.0, 0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.5, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0, 3.0]], np.float32)
RESPONSES = Responses(L2, ["a.jpg", "b.jpg", "style/c d.jpg"], contents=2, pairs=[("e.jpg", "style/f.jpg")])
FIVE = NetworkConfig.full().with_widths([5] * 17 + [3])


def make_folders(folder, contents: int = 4, styles: int = 3) -> PruneConfig:
    """Folders of noise, of which a picture each is set aside."""
    for name, number in (("content", contents), ("style", styles)):
        for index in range(number):
            write_noise(folder / name / f"{index:02}.png", (40, 50), 10 * number + index)
    return PruneConfig(load_path=("m.pth",), save_path=str(folder / "out"), content_dir=str(folder / "content"),
                       style_dir=str(folder / "style"), imsize=32, cropsize=32)


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_measured_or_set_aside(tmp_path):
    config = make_folders(tmp_path, contents=11, styles=5)
    measured, pairs = choose_pictures(config)
    assert (measured, pairs) == choose_pictures(replace(config, prune_images=500))  # always the same
    assert list(map(len, measured.values())) == [9, 4]  # at most a quarter of a folder is set aside
    assert all(paths == sorted(paths) for paths in measured.values())
    for kind, paths in enumerate(measured.values()):
        aside = {pair[kind] for pair in pairs}
        assert len(aside) == (2, 1)[kind] and not aside & set(map(str, paths))
    assert len(pairs) == 2
    measured, pairs = choose_pictures(replace(config, prune_images=3, pairs=1))
    assert list(map(len, measured.values())) == [3, 3] and len(pairs) == 1


def test_a_broken_picture_is_not_set_aside(tmp_path, capsys):
    config = make_folders(tmp_path)
    _, ((first, _),) = choose_pictures(config)
    Path(first).write_bytes(Path(first).read_bytes()[:60])
    measured, ((other, _),) = choose_pictures(config)
    assert other != first and first in capsys.readouterr().err and len(measured["content_dir"]) == 2


# --------------------------------------------------------------------------------------------- measurement


@torch.inference_mode()
def test_every_layer_is_measured(measured):
    """Against layers run by hand: the encoder over all pictures, the decoder over content i with style i."""
    network, _, actual = measured
    pictures = [normalize(prepare_picture(path, 32, 32)) for path in actual.paths]
    by_conv = {name: [] for name in convs(network)}

    def run(block: str, layers, feature):
        for index, layer in enumerate(layers):
            feature = layer(feature)
            if isinstance(layer, torch.nn.ReLU):
                by_conv[f"{block}.layers.0.{index - 1}"].append(feature.clone())
        return feature

    features = [run("encoder", network.encoder.layers[0], picture) for picture in pictures]
    aligned = [adain(features[content], *channel_statistics(features[3 + style]))
               for content, style in ((0, 0), (1, 1), (2, 0))]
    for feature in aligned:
        run("decoder", network.decoder.layers[0], feature)
    assert actual.contents == 3 and list(actual.layers) == convs(network)
    bottleneck = bottleneck_conv(network.config)
    close = {"rtol": 1e-3, "atol": 1e-4}  # of float32, whose sums run in another order
    for name, found in actual.layers.items():
        stacked = torch.cat(by_conv[name])  # (n, C, H, W)
        desired = stacked.square().sum(dim=(2, 3)).sqrt()
        assert found.l2.shape == ((5 if name.startswith("encoder") else 3), 8)
        assert_close(torch.from_numpy(found.l2), desired, **close)
        assert_close(torch.from_numpy(found.largest), stacked.amax(dim=(0, 2, 3)), **close)
        assert_close(torch.from_numpy(found.smallest), stacked.amin(dim=(0, 2, 3)), **close)
        mean = torch.cat(aligned) if name == bottleneck else stacked
        assert_close(torch.from_numpy(found.mean), mean.mean(dim=(0, 2, 3)), **close)
    np.testing.assert_array_equal(actual.layers[bottleneck].l2, actual.l2)


def test_styles_of_a_broken_content_are_painted_with_another(tmp_path):
    """Every style occurs in the decoder's responses, also the one that was to be painted on it."""
    config = replace(make_folders(tmp_path, contents=11, styles=12), prune_layers="all")
    pictures = {f"{kind}_dir": sorted((tmp_path / kind).iterdir()) for kind in ("content", "style")}
    pictures["content_dir"][-1].write_bytes(b"broken")
    found = measure_responses(small_network(), config, pictures, [])
    assert found.contents == 10
    assert {len(layer.l2) for name, layer in found.layers.items() if name.startswith("decoder")} == {12}


def test_planted_channels_are_found(measured):
    network, _, found = measured
    layers = [found.layers[name] for name in convs(network)]
    for number, channels in OFF.items():
        assert set(channels) <= set(layers[number].off) and (layers[number].importance[channels] == 0).all()
    assert {number: layers[number].constant.tolist() for number in CONSTANT} == CONSTANT
    assert 5 in found.off_for_all


def test_the_bottleneck_alone_is_measured_alike_and_twice_gives_the_same(measured, tmp_path):
    network, config, found = measured
    again = measure_responses(network, config, *choose_pictures(config))
    alone = measure_responses(network, replace(config, prune_layers="bottleneck"), *choose_pictures(config))
    assert alone.layers == {} and alone.paths == found.paths and alone.pairs == found.pairs
    np.testing.assert_array_equal(alone.l2, found.l2)
    for name, layer in found.layers.items():
        np.testing.assert_array_equal(again.layers[name].importance, layer.importance)
    # Of more styles than contents, the contents start over.
    config = replace(make_folders(tmp_path, contents=2, styles=4), prune_layers="all")
    found = measure_responses(network, config, *choose_pictures(config))
    assert len(found.layers["encoder.layers.0.0"].l2) == 4 and len(found.layers["decoder.layers.0.25"].l2) == 3


def test_measuring_skips_a_broken_picture_and_refuses_many(tmp_path, capsys):
    network, config = small_network("vgg16"), make_folders(tmp_path)
    paths = [write_noise(tmp_path / "content" / f"more{number}.png", (13, 3), number) for number in range(10)]
    pictures = {"content_dir": paths, "style_dir": paths[:1]}
    paths[5].write_text("no picture")
    found = measure_responses(network, config, pictures, [])
    assert found.contents == 9 and str(paths[5]) not in found.paths and np.isfinite(found.l2).all()
    assert "more5.png" in capsys.readouterr().err
    paths[6].write_text("no picture")
    assert "content_dir" in user_error(measure_responses, network, config, pictures, [])


def test_importance_is_the_squared_change_of_the_output(monkeypatch):
    """Against cutting, in float64, in the random directions that the estimate looks at.

    The last hidden layer of the decoder feeds the output conv directly: replacing its channel by the mean changes the
    output by the first order alone.
    """
    monkeypatch.setattr(responses_module, "IMPORTANCE_PROBES", 2)
    network = small_network("vgg16", width=4).double()
    pair = random_picture(0, (16, 16)), random_picture(1, (16, 16))
    *_, name = names = convs(network)
    means = [torch.full((4,), 0.3, dtype=torch.float64)] * len(names)
    actual = responses_module._estimate_importance(network, [pair] * 2, means, 1.0)[-1]
    content, style = (normalize(each).double() for each in pair)
    with torch.no_grad():
        before, generator = network(content, style), torch.Generator().manual_seed(0)
        directions = [torch.randn(before.shape, generator=generator) for _ in range(2)]
        for channel in range(4):
            change = cut_channels(network, {name: [channel]}, {name: {channel: 0.3}})(content, style) - before
            desired = sum((change * direction).sum() ** 2 for direction in directions) / 2
            assert_close(actual[channel], desired, rtol=1e-8, atol=0)


# --------------------------------------------------------------------------------------------------- file


def test_what_the_responses_say_of_channels():
    assert RESPONSES.off_for_all.tolist() == [1, 3]
    assert RESPONSES.off_for_some.tolist() == [0, 1, 2, 3]
    assert RESPONSES.weakest_first.tolist() == [1, 3, 2, 0, 4]  # sums 6, 0, 2.5, 0, 7
    # A tiny response is stronger than none, beside large ones too.
    tiny = np.zeros((3, 3), np.float32)
    tiny[0], tiny[1] = (1e4, 1e4, 0), (0, 1e-4, 1e-30)
    assert Responses(tiny, [""] * 3, 1).weakest_first.tolist() == [2, 0, 1]


def test_responses_round_trip(measured, tmp_path):
    network, _, full = measured
    for desired, config in ((RESPONSES, FIVE), (full, network.config)):
        desired.save(tmp_path / "responses.npz")
        actual = Responses.load(tmp_path / "responses.npz", config, every_layer=bool(desired.layers))
        np.testing.assert_array_equal(actual.l2, desired.l2)
        assert (actual.paths, actual.contents, actual.pairs) == (desired.paths, desired.contents, desired.pairs)
        assert actual.layers.keys() == desired.layers.keys()
        for name, layer in desired.layers.items():
            for key, array in vars(layer).items():
                np.testing.assert_array_equal(getattr(actual.layers[name], key), array)
        with np.load(tmp_path / "responses.npz", allow_pickle=False) as file:
            np.testing.assert_allclose(file["l0"], desired.l2 / (desired.l2 + np.float32(1e-5)), rtol=1e-6)
    np.savez(tmp_path / "old.npz", l2=L2, paths=np.array(RESPONSES.paths), contents=np.array(2))
    older = Responses.load(tmp_path / "old.npz", FIVE)
    assert older.paths == RESPONSES.paths and older.pairs == [] and older.layers == {}


def test_responses_of_another_network_are_refused(measured, tmp_path):
    network, _, full = measured
    path = tmp_path / "responses.npz"
    some = {name: layer for name, layer in full.layers.items() if name != "decoder.layers.0.5"}
    other = network.config.with_widths([8, 8, 5, *[8] * 14, 3])
    for written, config, every_layer, needed in (
        (RESPONSES, network.config, False, "l2 has shape (3, 5) for 3 pictures, the network has 8"),
        (RESPONSES, FIVE, True, "the network has 5; prune_layers all"),
        (replace(full, layers=some), network.config, True, "0 channels of decoder.layers.0.5 were measured"),
        (full, other, True, "8 channels of encoder.layers.0.5 were measured, the network has 5"),
    ):
        written.save(path)
        assert needed in user_error(Responses.load, path, config, every_layer)


DAMAGES = {
    "text": lambda path: path.write_text("no archive"),
    "truncated": lambda path: (RESPONSES.save(path), path.write_bytes(path.read_bytes()[:-200])),
    "one row": lambda path: np.savez(path, l2=L2[0], paths=np.array(["a"]), contents=np.array(1)),
    "pickled": lambda path: np.savez(path, l2=L2, paths=np.array(["a", None, {}], dtype=object), contents=np.array(1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_files_are_no_responses(tmp_path, damage):
    path = tmp_path / "responses.npz"
    DAMAGES[damage](path)
    assert user_error(Responses.load, path, FIVE).startswith(f"responses {path}: not the responses.npz of this network")

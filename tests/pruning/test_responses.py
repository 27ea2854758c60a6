"""Responses: which pictures are measured and set aside, what is measured of every channel, the file that keeps it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_picture, small_network, user_error, write_noise
from test_surgery import convs
from torch.testing import assert_close

from data import normalize, prepare_picture
from network import NetworkConfig, StyleTransferNetwork, adain, bottleneck_conv, channel_statistics
from prune import PruneConfig
from pruning import responses as responses_module
from pruning.responses import Pictures, Responses, choose_pictures, measure_responses
from pruning.surgery import cut_channels

L2 = np.array([[5.0, 0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.5, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0, 3.0]], np.float32)
RESPONSES = Responses(L2, ["a.jpg", "b.jpg", "style/c d.jpg"], contents=2, pairs=[("e.jpg", "style/f.jpg")])
FIVE = NetworkConfig.full().with_widths([5] * 17 + [3])


def plant(network: StyleTransferNetwork, channels: dict[str, list[int]], value: float) -> None:
    """Channels that are `value` after the ReLU whatever the picture: zero filters, and it as the bias."""
    with torch.no_grad():
        for name, indices in channels.items():
            conv = network.get_submodule(name)
            conv.weight[indices] = 0
            conv.bias[indices] = value


def make_folders(folder, contents: int = 4, styles: int = 3) -> PruneConfig:
    """Folders of noise, of which a picture each is set aside."""
    for name, number in (("content", contents), ("style", styles)):
        for index in range(number):
            write_noise(folder / name / f"{index:02}.png", (40, 50), 10 * number + index)
    return PruneConfig(load_path=("m.pth",), save_path=str(folder / "out"), content_dir=str(folder / "content"),
                       style_dir=str(folder / "style"), imsize=32, cropsize=32)


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_measured_or_set_aside(tmp_path, capsys):
    config = make_folders(tmp_path, contents=11, styles=5)
    chosen = choose_pictures(config)
    assert chosen == choose_pictures(replace(config, prune_images=500))  # always the same
    assert list(map(len, chosen.measured.values())) == [9, 4]  # at most a quarter of a folder is set aside
    assert all(paths == sorted(paths) for paths in chosen.measured.values())
    for kind, paths in enumerate(chosen.measured.values()):
        aside = {pair[kind] for pair in chosen.pairs}
        assert len(aside) == (2, 1)[kind] and not aside & set(map(str, paths))
    assert len(chosen.pairs) == 2
    fewer = choose_pictures(replace(config, prune_images=3, pairs=1))
    assert list(map(len, fewer.measured.values())) == [3, 3] and len(fewer.pairs) == 1


def test_of_one_picture_none_is_set_aside(tmp_path):
    chosen = choose_pictures(make_folders(tmp_path, contents=1, styles=8))
    assert list(map(len, chosen.measured.values())) == [1, 6] and chosen.pairs == []


def test_a_broken_picture_is_not_set_aside(tmp_path, capsys):
    config = make_folders(tmp_path)
    ((first, _),) = choose_pictures(config).pairs
    Path(first).write_bytes(Path(first).read_bytes()[:60])
    chosen = choose_pictures(config)
    assert len(chosen.pairs) == 1 and chosen.pairs[0][0] != first
    assert first in capsys.readouterr().err and len(chosen.measured["content_dir"]) == 2


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
    assert not any(module._forward_hooks for module in network.modules())


def test_planted_channels_are_found(measured):
    network, _, found = measured
    names = convs(network)
    for number, channels in {0: [1], 4: [2, 3], 8: [5], 9: [0], 15: [7]}.items():
        assert set(channels) <= set(found.layers[names[number]].off)
        assert (found.layers[names[number]].importance[channels] == 0).all()
    for number, channel in {2: 6, 8: 4, 11: 1, 16: 2}.items():
        assert found.layers[names[number]].constant.tolist() == [channel]
    assert 5 in found.off_for_all


def test_the_bottleneck_alone_is_measured_alike_and_twice_gives_the_same(measured):
    network, config, found = measured
    again = measure_responses(network, config, choose_pictures(config))
    alone = measure_responses(network, replace(config, prune_layers="bottleneck"), choose_pictures(config))
    assert alone.layers == {} and alone.paths == found.paths and alone.pairs == found.pairs
    np.testing.assert_array_equal(alone.l2, found.l2)
    for name, layer in found.layers.items():
        np.testing.assert_array_equal(again.layers[name].importance, layer.importance)


def test_more_styles_than_contents_start_the_contents_over(measured, tmp_path):
    config = replace(make_folders(tmp_path, contents=2, styles=4), prune_layers="all")
    found = measure_responses(measured[0], config, choose_pictures(config))
    assert len(found.layers["encoder.layers.0.0"].l2) == 4 and len(found.layers["decoder.layers.0.25"].l2) == 3


@torch.inference_mode()
def test_measuring_skips_a_broken_picture_and_refuses_many(tmp_path, capsys):
    network, config = small_network("vgg16"), make_folders(tmp_path)
    paths = [write_noise(tmp_path / "content" / f"more{number}.png", (13, 3), number) for number in range(10)]
    pictures = Pictures({"content_dir": paths, "style_dir": paths[:1]}, [])
    paths[5].write_text("no picture")
    found = measure_responses(network, replace(config, imsize=None, cropsize=None), pictures)
    assert found.contents == 9 and str(paths[5]) not in found.paths and np.isfinite(found.l2).all()
    assert "more5.png" in capsys.readouterr().err
    paths[6].write_text("no picture")
    assert "content_dir" in user_error(measure_responses, network, config, pictures)


def test_importance_is_the_squared_change_of_the_output(monkeypatch):
    """Against cutting: where the output is linear in a channel, the first order is all of it.

    The last hidden layer of the decoder feeds the output conv directly, so replacing its channel by the mean
    changes the output by exactly what the importance estimates.
    """
    monkeypatch.setattr(responses_module, "IMPORTANCE_PROBES", 600)
    network = small_network("vgg16", width=4)
    content, style = random_picture(0, (16, 16)), random_picture(1, (16, 16))
    name = convs(network)[-1]
    means = {each: torch.full((4,), 0.3) for each in convs(network)}
    actual = responses_module._estimate_importance(network, [(content, style)] * 600, means, 1.0)[name]
    with torch.no_grad():
        before = network(normalize(content), normalize(style))
        for channel in range(4):
            cut = cut_channels(network, {name: [channel]}, {name: {channel: 0.3}})
            desired = (cut(normalize(content), normalize(style)) - before).square().sum()
            assert_close(actual[channel], desired, rtol=0.25, atol=1e-3)  # 600 draws: 6% standard deviation


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


def test_an_older_file_has_no_pairs(tmp_path):
    np.savez(tmp_path / "old.npz", l2=L2, paths=np.array(RESPONSES.paths), contents=np.array(2))
    found = Responses.load(tmp_path / "old.npz", FIVE)
    assert found.paths == RESPONSES.paths and found.pairs == [] and found.layers == {}


def test_responses_of_another_network_are_refused(measured, tmp_path):
    network, _, full = measured
    path = tmp_path / "responses.npz"
    RESPONSES.save(path)
    assert f"responses {path}: measured on 5 channels, the network has 8" in user_error(Responses.load, path,
                                                                                        network.config)
    assert "holds the bottleneck only; prune_layers all" in user_error(Responses.load, path, FIVE, True)
    some = {name: layer for name, layer in full.layers.items() if name != "decoder.layers.0.5"}
    replace(full, layers=some).save(path)
    assert "not measured on decoder.layers.0.5" in user_error(Responses.load, path, network.config, True)
    full.save(path)
    other = network.config.with_widths([8, 8, 5, *[8] * 14, 3])
    assert "the network has 5 channels there" in user_error(Responses.load, path, other, True)


def damaged(path):
    Responses(np.random.default_rng(0).random((50, 5), np.float32), ["x"] * 50, 25).save(path)
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)


ONE = np.array(1)
DAMAGES = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no archive"),
    "truncated": lambda path: (RESPONSES.save(path), path.write_bytes(path.read_bytes()[:-200])),
    "damaged within": damaged,
    "plain array": lambda path: np.save(path.open("wb"), L2),
    "one row": lambda path: np.savez(path, l2=L2[0], paths=np.array(["a"]), contents=ONE),
    "no dimension": lambda path: np.savez(path, l2=np.array(1.0), paths=np.array(["a"]), contents=ONE),
    "no paths": lambda path: np.savez(path, l2=L2, contents=ONE),
    "pickled": lambda path: np.savez(path, l2=L2, paths=np.array(["a", None, {}], dtype=object), contents=ONE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_files_are_no_responses(tmp_path, damage):
    path = tmp_path / "responses.npz"
    DAMAGES[damage](path)
    assert user_error(Responses.load, path, FIVE).startswith(f"responses {path}: not a responses.npz of this tool")

"""Surgery on the bottleneck, and the measurement and choice of its channels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import paint_within_range, random_picture, small_network, user_error, write_picture
from PIL import Image
from torch import nn
from torch.testing import assert_close

from data import normalize, prepare_picture
from network import POOLINGS, NetworkConfig, StyleTransferNetwork
from painting.stylizer import Stylizer, load_input
from prune import (
    PruneConfig,
    Responses,
    choose_channels,
    cut_bottleneck,
    find_folders,
    grid_numbers,
    largest_pixel_difference,
    measure_responses,
)
from pruning import plots as plots_module

LAST_ENCODER_CONV = {"vgg19": "encoder.layers.0.19", "vgg16": "encoder.layers.0.14"}
FIRST_DECODER_CONV = "decoder.layers.0.1"


# ----------------------------------------------------------------------------------------------- surgery


@pytest.mark.parametrize("channels", [[], [0], [5], [4, 1], [5, 4, 3, 2, 1]])
@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
def test_cut_is_slicing_by_hand(backbone, channels):
    network = small_network(backbone)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    config = network.config
    cut = cut_bottleneck(network, channels)

    kept = [channel for channel in range(6) if channel not in channels]
    desired = dict(before)
    for kind in ("weight", "bias"):
        name = f"{LAST_ENCODER_CONV[backbone]}.{kind}"
        desired[name] = before[name][kept]
    desired[f"{FIRST_DECODER_CONV}.weight"] = before[f"{FIRST_DECODER_CONV}.weight"][:, kept]
    assert list(cut.state_dict()) == list(desired)
    for name, actual in cut.state_dict().items():
        assert_close(actual, desired[name], rtol=0, atol=0)
    assert cut.config == replace(config, encoder_widths=(*config.encoder_widths[:-1], len(kept)))

    # The input is untouched, and shares no memory with the output.
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.fill_(7)
    assert network.config == config
    for name, actual in network.state_dict().items():
        assert_close(actual, before[name], rtol=0, atol=0)


@torch.inference_mode()
def test_cut_pieces_compute_what_the_kept_channels_computed():
    network = small_network()
    cut = cut_bottleneck(network, [0, 3])
    image = normalize(random_picture(0, (32, 24)))
    feature = network.encoder(image)
    assert_close(cut.encoder(image), feature[:, [1, 2, 4, 5]], rtol=1e-4, atol=1e-5)
    feature[:, [0, 3]] = 0
    assert_close(cut.decoder(feature[:, [1, 2, 4, 5]]), network.decoder(feature), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_cut_keeps_every_layer_as_it_was(pooling):
    """Kernel, stride, padding and its mode, pooling, upsampling: only two widths change."""
    network = small_network("vgg16", pooling)
    network.train()
    cut = cut_bottleneck(network, [2])
    for part in ("encoder", "decoder"):
        for before, after in zip(getattr(network, part).layers[0], getattr(cut, part).layers[0], strict=True):
            assert type(after) is type(before)
            if not isinstance(before, nn.Conv2d):
                assert repr(after) == repr(before)
                continue
            for name in ("kernel_size", "stride", "padding", "padding_mode", "dilation", "groups"):
                assert getattr(after, name) == getattr(before, name)
            assert after.bias is not None
    assert cut.training
    assert not cut_bottleneck(network.eval(), [2]).training
    assert cut.config.pooling == pooling
    assert all(parameter.requires_grad for parameter in cut.parameters())


def test_cut_takes_numpy_indices():
    actual = cut_bottleneck(small_network(), np.array([4, 1]))
    desired = cut_bottleneck(small_network(), [1, 4])
    for name, tensor in desired.state_dict().items():
        assert_close(actual.state_dict()[name], tensor, rtol=0, atol=0)


def test_cut_twice_is_cut_once():
    network = small_network()
    twice = cut_bottleneck(cut_bottleneck(network, [1]), [3])  # what is 3 now was 4
    for name, tensor in cut_bottleneck(network, [1, 4]).state_dict().items():
        assert_close(twice.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("channels", "needed"),
    [([6], "6"), ([0, 99], "99"), ([-1], "-1"), ([2, 3, 2], "channel 2"), (range(6), "at most 5"),
     ([0, 0, 1, 2, 3, 4], "channel 0")],
)
def test_impossible_cuts_are_refused(channels, needed):
    assert needed in user_error(cut_bottleneck, small_network(), channels)


def plant_dead_channels(network: StyleTransferNetwork, channels) -> None:
    """Zero filters and a negative bias: zero after the ReLU, whatever the picture."""
    with torch.no_grad():
        conv = network.encoder.layers[0][-2]
        conv.weight[channels] = 0
        conv.bias[channels] = -0.5


@pytest.mark.parametrize(("backbone", "strength"), [("vgg19", 1.0), ("vgg19", 0.4), ("vgg19", 0.0), ("vgg16", 1.0)])
@torch.inference_mode()
def test_cutting_dead_channels_changes_no_pixel(backbone, strength):
    network = small_network(backbone, width=8)
    plant_dead_channels(network, [0, 3, 7])
    paint_within_range(network)
    cut = cut_bottleneck(network, [0, 3, 7])
    pairs = [(random_picture(0, (37, 21)), random_picture(1, (24, 32)))]
    assert largest_pixel_difference(network, cut, pairs, strength) < 1e-3  # of 255
    living = cut_bottleneck(network, [1])
    assert largest_pixel_difference(network, living, pairs, strength) > 1e-2


@torch.inference_mode()
def test_cutting_dead_channels_of_the_full_network_changes_no_pixel():
    torch.manual_seed(0)
    network = StyleTransferNetwork(NetworkConfig.full()).eval()
    dead = list(range(0, 300))
    plant_dead_channels(network, dead)
    pairs = [(random_picture(0, (32, 32)), random_picture(1, (32, 32)))]
    assert largest_pixel_difference(network, cut_bottleneck(network, dead), pairs, 1.0) < 1e-3


def test_largest_pixel_difference_by_hand():
    """Two networks that paint one colour each: normalised 0 and 0.1, so 0.1 * std * 255 apart, most in red."""
    first, second = small_network(), small_network()
    with torch.no_grad():
        for network, value in ((first, 0.0), (second, 0.1)):
            network.decoder.layers[0][-1].weight.zero_()
            network.decoder.layers[0][-1].bias.fill_(value)
    pairs = [(random_picture(0, (16, 16)), random_picture(1, (16, 16)))]
    assert_close(largest_pixel_difference(first, second, pairs, 1.0), 0.1 * 0.229 * 255, rtol=1e-4, atol=0)
    assert largest_pixel_difference(first, first, pairs, 1.0) == 0


# --------------------------------------------------------------------------------------------- responses


L2 = np.array([[5.0, 0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.5, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0, 3.0]], np.float32)
RESPONSES = Responses(L2, ["a.jpg", "b.jpg", "style/c d.jpg"], contents=2)


def test_zero_channels():
    assert RESPONSES.always_zero.tolist() == [1, 3]
    assert RESPONSES.ever_zero.tolist() == [0, 1, 2, 3]


def test_weakest_first_is_by_sum_and_stable():
    assert RESPONSES.weakest_first.tolist() == [1, 3, 2, 0, 4]  # sums 6, 0, 2.5, 0, 7
    # A tiny response is stronger than none, beside large ones too.
    tiny = np.zeros((3, 3), np.float32)
    tiny[0], tiny[1] = (1e4, 1e4, 0), (0, 1e-4, 1e-30)
    assert Responses(tiny, [""] * 3, 1).weakest_first.tolist() == [2, 0, 1]


def test_responses_round_trip(tmp_path):
    RESPONSES.save(tmp_path / "responses.npz")
    actual = Responses.load(tmp_path / "responses.npz", width=5)
    np.testing.assert_array_equal(actual.l2, L2)
    assert actual.paths == RESPONSES.paths and actual.contents == 2
    with np.load(tmp_path / "responses.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["l0"], L2 / (L2 + np.float32(1e-5)), rtol=1e-6)


def test_responses_of_another_width_are_refused(tmp_path):
    RESPONSES.save(tmp_path / "responses.npz")
    message = user_error(Responses.load, tmp_path / "responses.npz", width=6)
    assert "--responses" in message and "5" in message and "6" in message


def truncated(path):
    RESPONSES.save(path)
    path.write_bytes(path.read_bytes()[:-200])


def damaged_within(path):
    Responses(np.random.default_rng(0).random((50, 5), np.float32), ["x"] * 50, 25).save(path)
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)


def plain_array(path):
    with open(path, "wb") as file:
        np.save(file, L2)


def one_row(path):
    np.savez(path, l2=L2[0], paths=np.array(["a"]), contents=np.array(1))


def no_dimension(path):
    np.savez(path, l2=np.array(1.0), paths=np.array(["a"]), contents=np.array(1))


def no_paths(path):
    np.savez(path, l2=L2, contents=np.array(1))


def pickled(path):
    np.savez(path, l2=L2, paths=np.array(["a", None, {}], dtype=object), contents=np.array(1))


DAMAGES = (lambda path: None, lambda path: path.touch(), lambda path: path.write_text("no archive"), truncated,
           damaged_within, plain_array, one_row, no_dimension, no_paths, pickled)
NAMES = ("missing", "empty", "text", "truncated", "damaged", "plain array", "one row", "no dimension", "no paths",
         "pickled")


@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
def test_other_files_are_no_responses(tmp_path, damage):
    path = tmp_path / "responses.npz"
    damage(path)
    message = user_error(Responses.load, path, width=5)
    assert "--responses" in message and str(path) in message


def make_folders(tmp_path, contents: int = 3, styles: int = 2) -> PruneConfig:
    for name, number in (("content", contents), ("style", styles)):
        for index in range(number):
            picture = random_picture(10 * number + index, (40, 50))[0].permute(1, 2, 0).numpy()
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / name / f"{index:02}.png")
    return PruneConfig(content_dir=str(tmp_path / "content"), style_dir=str(tmp_path / "style"), imsize=32, cropsize=32)


@torch.inference_mode()
def test_measured_responses_are_norms_of_the_bottleneck(tmp_path, capsys):
    network = small_network()
    plant_dead_channels(network, [2])
    config = make_folders(tmp_path)
    actual = measure_responses(network, config, find_folders(config))
    paths = [str(tmp_path / name) for name in ("content/00.png", "content/01.png", "content/02.png", "style/00.png",
                                               "style/01.png")]
    assert actual.paths == paths and actual.contents == 3
    for row, path in zip(actual.l2, paths):
        feature = network.encoder(normalize(prepare_picture(path, 32, 32)))[0].double()
        desired = feature.square().sum(dim=(1, 2)).sqrt()
        assert_close(torch.from_numpy(row).double(), desired, rtol=1e-4, atol=1e-5)
    assert 2 in actual.always_zero


@torch.inference_mode()
def test_measuring_skips_a_broken_picture_and_refuses_many(tmp_path, capsys):
    network, config = small_network("vgg16"), make_folders(tmp_path, contents=10)
    (tmp_path / "content" / "05.png").write_text("no picture")
    actual = measure_responses(network, config, find_folders(config))
    assert len(actual.l2) == 11 and actual.contents == 9
    assert str(tmp_path / "content" / "05.png") not in actual.paths
    assert "05.png" in capsys.readouterr().err
    (tmp_path / "content" / "06.png").write_text("no picture")
    assert "--content_dir" in user_error(measure_responses, network, config, find_folders(config))


@torch.inference_mode()
def test_no_more_pictures_are_measured_than_asked_for(tmp_path, capsys):
    config = replace(make_folders(tmp_path, contents=4, styles=2), prune_images=3)
    actual = measure_responses(small_network("vgg16"), config, find_folders(config))
    assert actual.contents == 3 and len(actual.l2) == 5
    assert len(set(actual.paths)) == 5 and actual.paths[:3] == sorted(actual.paths[:3])


@torch.inference_mode()
def test_pictures_without_sizes_given_may_be_of_any_size(tmp_path, capsys):
    config = replace(make_folders(tmp_path, contents=1, styles=1), imsize=None, cropsize=None)
    write_picture(tmp_path / "content" / "odd.png", (13, 3))
    actual = measure_responses(small_network("vgg16"), config, find_folders(config))
    assert actual.l2.shape == (3, 6) and np.isfinite(actual.l2).all()


# ------------------------------------------------------------------------------------------------- choice


def test_channels_that_are_zero_throughout_are_chosen_by_default():
    assert choose_channels(PruneConfig(), RESPONSES) == [1, 3]
    assert choose_channels(PruneConfig(), Responses(L2 + 1, RESPONSES.paths, 2)) == []


@pytest.mark.parametrize(("number", "desired"), [(0, []), (1, [1]), (3, [1, 3, 2]), (4, [1, 3, 2, 0])])
def test_the_weakest_are_chosen_by_number(number, desired):
    assert choose_channels(PruneConfig(prune_num=number), RESPONSES) == desired


def test_named_channels_are_chosen():
    assert choose_channels(PruneConfig(prune_channels=(4, 0)), RESPONSES) == [4, 0]


@pytest.mark.parametrize("number", [5, 6, 1000])
def test_cutting_all_by_number_is_refused(number):
    message = user_error(choose_channels, PruneConfig(prune_num=number), RESPONSES)
    assert f"--prune_num {number}" in message and "at most 4" in message


def test_nothing_left_is_refused():
    message = user_error(choose_channels, PruneConfig(), Responses(np.zeros((2, 5), np.float32), ["", ""], 1))
    assert "all 5" in message and "--channel_loss_weight" in message


def test_number_and_names_contradict_each_other():
    config = PruneConfig(load_path="m", save_path="s", content_dir="c", style_dir="d")
    config.check()
    message = user_error(replace(config, prune_num=1, prune_channels=(2,)).check)
    assert "--prune_num" in message and "--prune_channels" in message


@pytest.mark.parametrize("flag", ["load_path", "save_path", "content_dir", "style_dir"])
def test_missing_flags_are_named(flag):
    config = PruneConfig(**{name: "x" for name in ("load_path", "save_path", "content_dir", "style_dir")})
    assert f"--{flag}" in user_error(replace(config, **{flag: None}).check)


def test_grid_numbers():
    assert grid_numbers(PruneConfig(), 512) == [0, 100, 200, 300, 400, 470, 490, 500]
    assert grid_numbers(PruneConfig(), 300) == [0, 100, 200]  # a default is fitted to the network
    assert grid_numbers(PruneConfig(prune_nums=(3, 0)), 4) == [3, 0]
    message = user_error(grid_numbers, PruneConfig(prune_nums=(3, 4)), 4)
    assert "--prune_nums 4" in message and "at most 3" in message


def test_grid_is_painted_with_the_strength(tmp_path, monkeypatch):
    painted = []

    class Recorder(Stylizer):
        def stylize(self, *pictures, **settings):
            painted.append((self, pictures, settings))
            return super().stylize(*pictures, **settings)

    monkeypatch.setattr(plots_module, "Stylizer", Recorder)
    config = PruneConfig(imsize=48, cropsize=48, style_strength=0.5)
    responses = Responses(np.arange(12.0).reshape(2, 6), ["a", "b"], contents=1)
    network = small_network()
    plots_module.plot_prune_grid(network, responses, [0, 2], config, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 1000
    pictures = [load_input(Path(getattr(config, flag)), config, flag) for flag in ("content", "style")]
    for cut, number in zip((network, cut_bottleneck(network, [0, 1])), range(2)):
        stylizer, shown, settings = painted[number]
        assert settings == {"strength": 0.5}
        assert all(map(torch.equal, shown, pictures))
        assert_close(stylizer.network.state_dict(), cut.state_dict())


@pytest.mark.parametrize("size", [8, 20, 0])
def test_report_size_that_poolings_do_not_divide_is_refused(size):
    config = PruneConfig(load_path="m", save_path="s", content_dir="c", style_dir="d", report_size=size)
    assert f"--report_size {size}: a multiple of 8, 16 or more" in user_error(config.check)

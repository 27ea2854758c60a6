"""The networks against reference values, and every way a model or VGG file is read or refused."""

import json
import pickle
from collections import OrderedDict
from dataclasses import FrozenInstanceError, asdict, replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.models
from helpers import REFERENCE, Payload, random_vgg, small_config, small_network, user_error
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import weights as weights_module
from data import normalize
from network import (
    POOLINGS,
    BlurPool2d,
    LossNetwork,
    NetworkConfig,
    StyleTransferNetwork,
    adain,
    build_from_vgg,
    channel_statistics,
    count_macs,
    count_parameters,
    pad_to_stride,
)
from pruning.surgery import cut_bottleneck
from weights import find_model_file, load_network, load_vgg, model_checkpoint

BACKBONES = ("vgg19", "vgg16")


def reference_network(backbone: str) -> StyleTransferNetwork:
    """The network of reference_values.json, as its `how` builds it."""
    random = np.random.RandomState(REFERENCE["network"][backbone]["weight_seed"])
    network = StyleTransferNetwork(NetworkConfig.full(backbone))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    state = {}
    for name in REFERENCE["network"][f"keys_{backbone}"]:
        values = random.standard_normal(tuple(shapes[name]))
        values *= np.sqrt(2 / (shapes[name][1] * 9)) if len(shapes[name]) == 4 else 0.1
        state[name] = torch.from_numpy(values.astype(np.float32))
    network.load_state_dict(state)
    return network.eval()


def reference_image(seed: int, height: int, width: int) -> torch.Tensor:
    random = np.random.RandomState(seed)
    low = random.uniform(0, 255, (height // 8, width // 8, 3))
    up = np.kron(low, np.ones((8, 8, 1))) + random.uniform(-20, 20, (height, width, 3))
    return normalize(torch.from_numpy(up.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)[None])


def assert_matches(output: torch.Tensor, desired: dict) -> None:
    height, width = output.shape[2:]
    places = ((0, 0), (height // 2, width // 2), (height - 1, width - 1), (3, width - 5))
    pixels = torch.stack([output[0, :, y, x] for y, x in places[: len(desired["pixels"])]])
    assert_close(pixels, torch.tensor(desired["pixels"]), rtol=0, atol=2e-3)
    assert_close(output.mean().item(), desired["mean"], rtol=0, atol=2e-3)
    assert_close(output.std().item(), desired["std"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.inference_mode()
def test_reference(backbone):
    """Keys, parameters, encoder, pictures at three strengths, and the picture of a pruned network."""
    network, desired = reference_network(backbone), REFERENCE["network"][backbone]
    content, style = (reference_image(**desired[kind]) for kind in ("content", "style"))
    assert list(network.state_dict()) == REFERENCE["network"][f"keys_{backbone}"]
    assert count_parameters(network) == {"vgg19": 7010947, "vgg16": REFERENCE["parameters_vgg16"]}[backbone]
    for number, parameters in REFERENCE["parameters_after_pruning_the_bottleneck_vgg19"].items():
        assert backbone == "vgg16" or count_parameters(cut_bottleneck(network, range(int(number)))) == parameters
    feature = network.encoder(content)
    assert list(feature.shape) == desired["encoder"]["shape"] and feature.min() >= 0
    assert_close(feature.mean().item(), desired["encoder"]["mean"], rtol=0, atol=2e-3)
    assert_close(feature.std().item(), desired["encoder"]["std"], rtol=0, atol=2e-3)
    for strength in (1.0, 0.5, 0.0):
        output = network(content, style, strength)
        assert list(output.shape) == desired[f"strength_{strength}"]["shape"]
        assert_matches(output, desired[f"strength_{strength}"])
    cut = cut_bottleneck(network, range(0, 100, 2))
    assert count_parameters(cut) == desired["pruned_even_channels_below_100"]["params"]
    assert_matches(cut(content, style), desired["pruned_even_channels_below_100"])


def random_feature(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.parametrize("strength, desired", [(1.0, [7.0, 10.0, 13.0]), (0.25, [1.75, 4.0, 6.25]),
                                               (0.0, [0.0, 2.0, 4.0]), (torch.tensor([0.25]), [1.75, 4.0, 6.25])])
def test_adain_by_hand(strength, desired):
    content = torch.tensor([0.0, 2.0, 4.0]).reshape(1, 1, 1, 3)  # mean 2, std 2
    mean, std = torch.full((1, 1, 1, 1), 10.0), torch.full((1, 1, 1, 1), 3.0)
    assert_close(adain(content, mean, std, strength), torch.tensor(desired).reshape(1, 1, 1, 3))


@pytest.mark.parametrize("backbone, upsampling, levels", [
    ("vgg19", "nearest", 1), ("vgg16", "nearest", 1), ("vgg19", "bilinear", 1), ("vgg19", "nearest", 2),
    ("vgg16", "bilinear", 3),
])
def test_decoder_is_its_layers(backbone, upsampling, levels):
    """With a shallower feature added behind each of the first upsamplings."""
    network = small_network(backbone).double()
    network.use(upsampling, adain_levels=levels)
    features = [random_feature((1, 6, 3 << level, 5 << level), level).double() for level in range(levels)]
    desired, *added = features
    for layer in network.decoder.layers[0]:
        if isinstance(layer, nn.Upsample):
            desired = nn.functional.interpolate(desired, scale_factor=2, mode=upsampling)
            desired = desired + (added.pop(0) if added else 0)
        else:
            desired = layer(desired)
    assert_close(network.decoder(*features), desired, rtol=1e-9, atol=1e-9)
    assert_close(network.decoder.features(*features)[-1], desired, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backbone, size, style_size", [
    ("vgg19", (1, 40), (5, 7)), ("vgg19", (17, 16), (1, 1)), ("vgg16", (1, 1), (9, 3)), ("vgg16", (37, 61), (4, 4)),
])
@torch.inference_mode()
def test_pictures_of_any_size(backbone, size, style_size):
    """As with an edge repeated by hand up to the next multiple of the stride, two at least, and cut back."""
    network = small_network(backbone).double()
    content, style = random_feature((2, 3, *size), 0).double(), random_feature((2, 3, *style_size), 1).double()
    stride, features = {"vgg19": 8, "vgg16": 4}[backbone], []
    for image in (content, style):
        rows, columns = (np.arange(max(2 * stride, (side + stride - 1) // stride * stride)).clip(max=side - 1)
                         for side in image.shape[2:])
        features.append(network.encoder(image[:, :, rows][:, :, :, columns]))
        assert features[-1].shape[2:] == (len(rows) // stride, len(columns) // stride)
        (actual,) = network.encode(image)
        assert_close(actual, features[-1], rtol=1e-9, atol=1e-9)
    for strength in (1.0, 0.3):
        aligned = adain(features[0], *channel_statistics(features[1]), strength)
        desired = network.decoder(aligned)[:, :, : size[0], : size[1]]
        actual = network(content, style, strength)
        assert actual.shape == content.shape and actual.isfinite().all()
        assert_close(actual, desired, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backbone, levels, convs", [("vgg19", 2, (7,)), ("vgg19", 4, (7, 3, 1)), ("vgg16", 3, (3, 1))])
@torch.inference_mode()
def test_adain_acts_on_shallower_features_too(backbone, levels, convs):
    """On those before the poolings, each aligned by itself. convs: whose features they are, the deepest first."""
    network = small_network(backbone, adain_levels=levels).double()
    content, style = random_feature((1, 3, 37, 24), 0).double(), random_feature((1, 3, 16, 40), 1).double()
    features = [network.encoder.features(pad_to_stride(image, network.config.stride)) for image in (content, style)]
    aligned = [adain(features[0][conv], *channel_statistics(features[1][conv]), 0.3) for conv in (-1, *convs)]
    assert all(torch.equal(*each) for each in zip(network.encode(style), [features[1][conv] for conv in (-1, *convs)]))
    actual = network(content, style, 0.3)
    assert_close(actual, network.decoder(*aligned)[:, :, :37], rtol=1e-9, atol=1e-9)
    network.use(adain_levels=1)
    assert not torch.allclose(network(content, style, 0.3), actual)


def test_config_round_trip():
    assert (NetworkConfig.full("vgg19").stride, NetworkConfig.full("vgg16").stride) == (8, 4)
    config = NetworkConfig("vgg16", "avg", (1, 2, 3, 4, 5, 6, 7), (9, 8, 7, 6, 5, 4, 3), "bilinear", "reflect")
    values = json.loads(json.dumps(asdict(config)))
    assert NetworkConfig(**values) == config
    del values["upsampling"], values["padding"], values["adain_levels"]  # as in older files
    assert NetworkConfig(**values) == replace(config, upsampling="nearest", padding="zeros")
    with pytest.raises(FrozenInstanceError):
        config.pooling = "max"


@pytest.mark.parametrize("change, needed", [
    ({"backbone": "resnet50"}, "resnet50"),
    ({"pooling": "median"}, "pooling median: one of max, avg, blur is needed"),
    ({"upsampling": "cubic"}, "upsampling cubic: one of nearest, bilinear is needed"),
    ({"padding": "circular"}, "padding circular: one of zeros, reflect is needed"),
    ({"encoder_widths": (4,) * 6}, "7 whole numbers"),
    ({"decoder_widths": (*(4,) * 7, 3)}, "7 whole numbers"),
    ({"encoder_widths": (0, *(4,) * 6)}, "encoder"),
    ({"encoder_widths": (4.0, *(4,) * 6)}, "encoder"),
    ({"decoder_widths": (4,) * 7}, "3 is needed"),
    ({"adain_levels": 4}, "adain_levels 4: vgg16 has 1 to 3"),
    ({"adain_levels": 2, "decoder_widths": (6, 6, 5, 6, 6, 6, 3)}, "adain_levels 2: 6 channels cannot be added to 5"),
])
def test_config_errors(change, needed):
    with pytest.raises(ValueError, match=needed):
        replace(small_config("vgg16"), **change)


@pytest.mark.parametrize(("pooling", "pool"), [("max", nn.MaxPool2d), ("avg", nn.AvgPool2d), ("blur", BlurPool2d)])
def test_pooling_of_the_encoder(pooling, pool):
    """Built so, or changed with the same weights: the same layers where the network is, the same tensors in a file."""
    built, changed = small_network(pooling=pooling), small_network(pooling={"max": "avg"}.get(pooling, "max"))
    changed.use(pooling=pooling)
    for network in (built, changed):
        poolings = [layer for layer in network.encoder.layers[0] if "Pool" in type(layer).__name__]
        assert [type(layer) for layer in poolings] == [pool] * 3
    assert_same_network(changed, built)
    assert built.state_dict().keys() == small_network().state_dict().keys()
    changed.double().use(pooling="blur")
    assert changed.encoder(torch.rand(1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64


def test_blur_pool_by_hand():
    """(1 3 3 1)/8 of the columns 2i - 1 to 2i + 2, reflected at the border; rows likewise; channels alone."""
    row = torch.tensor([8.0, 16.0, 40.0, 0.0, 80.0, 8.0])
    columns = torch.tensor([16 + 3 * 8 + 3 * 16 + 40, 16 + 3 * 40 + 0 + 80, 0 + 3 * 80 + 3 * 8 + 80]) / 8.0
    feature = torch.stack([row.expand(4, 6), 2.0 * row.expand(4, 6)])[None]  # rows are alike: (1, 2, 4, 6)
    desired = torch.stack([columns.expand(2, 3), 2.0 * columns.expand(2, 3)])[None]
    assert_close(BlurPool2d(2)(feature), desired)
    assert_close(BlurPool2d(2)(feature.mT), desired.mT)


def assert_same_tensors(actual: dict, desired: dict) -> None:
    assert actual.keys() == desired.keys()
    for name, tensor in desired.items():
        assert actual[name].dtype == torch.float32 and torch.equal(actual[name], tensor), name


def assert_same_network(actual: StyleTransferNetwork, desired: StyleTransferNetwork) -> None:
    assert actual.config == desired.config
    assert not actual.training
    assert_same_tensors(actual.state_dict(), desired.state_dict())


@pytest.mark.parametrize("backbone, pooling, padding, dtype", [("vgg19", "blur", "reflect", torch.float32),
                                                               ("vgg16", "max", "zeros", torch.float16)])
def test_checkpoint_round_trip(tmp_path, backbone, pooling, padding, dtype):
    """In half precision too, which is loaded as float32."""
    network = small_network(backbone, pooling)
    network.use(padding=padding)
    torch.save(model_checkpoint(network, dtype, iteration=7), tmp_path / "model.pth")
    actual, checkpoint = load_network(tmp_path / "model.pth")
    assert_same_network(actual, network.to(dtype).float())
    assert checkpoint["iteration"] == 7


@pytest.mark.parametrize("backbone, pooling, cut", [("vgg16", "max", []), ("vgg19", "avg", [1, 4])])
def test_file_of_the_original_implementation(tmp_path, backbone, pooling, cut):
    """It holds only state_dict, pruned or not; that the encoder was trained with average pooling is for the caller to
    say."""
    desired = cut_bottleneck(small_network(backbone, pooling), cut)
    torch.save({"state_dict": OrderedDict(desired.state_dict())}, tmp_path / "original.pth")
    actual, _ = load_network(tmp_path / "original.pth", swap_max_pool=pooling == "avg")
    assert_same_network(actual, desired)


def test_swap_max_pool_against_the_file_is_refused(tmp_path):
    for pooling in POOLINGS:
        torch.save(model_checkpoint(small_network(pooling=pooling)), tmp_path / "model.pth")
        if pooling == "avg":
            assert load_network(tmp_path / "model.pth", swap_max_pool=True)[0].config.pooling == "avg"
        else:
            message = user_error(load_network, tmp_path / "model.pth", swap_max_pool=True)
            assert "swap_max_pool" in message and f"{pooling} pooling" in message


def test_model_file_of_a_folder(tmp_path):
    assert str(tmp_path) in user_error(find_model_file, tmp_path)
    (tmp_path / "pruned.pth").touch()
    assert find_model_file(tmp_path) == tmp_path / "pruned.pth"
    (tmp_path / "check_point.pth").touch()
    assert find_model_file(tmp_path) == tmp_path / "check_point.pth"
    assert find_model_file(tmp_path / "other.pth") == tmp_path / "other.pth"


# As others save them: wrapped networks, bare state dicts.
STATE = small_network().state_dict()


def prefixed(prefix: str, part: str = "") -> dict:
    """The state_dict with a prefix before the names of a part, or of all."""
    return {f"{part}{prefix}{name.removeprefix(part)}" if name.startswith(part) else name: tensor
            for name, tensor in STATE.items()}


WRAPPED = {
    "DataParallel": prefixed("module."),
    "compile in DataParallel": prefixed("module._orig_mod."),
    "decoder's layers only": prefixed("_orig_mod.", "decoder.layers."),
    "sharded": prefixed("_fsdp_wrapped_module."),
}


@pytest.mark.parametrize("kind", ["full checkpoint", "state_dict only", "bare"])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_networks_are_read(tmp_path, name, kind):
    state = WRAPPED[name]
    checkpoint = model_checkpoint(small_network(), iteration=7) | {"state_dict": state}
    torch.save({"full checkpoint": checkpoint, "state_dict only": {"state_dict": state}, "bare": state}[kind],
               tmp_path / "model.pth")
    network, found = load_network(tmp_path / "model.pth")
    assert network.config == small_config()
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, STATE[key])
    assert found.get("iteration") == (7 if kind == "full checkpoint" else None)


def test_what_torch_itself_writes_is_read(tmp_path):
    network = small_network()
    network.encoder = torch.nn.DataParallel(network.encoder)
    torch.save(torch.compile(torch.nn.DataParallel(network)).state_dict(), tmp_path / "model.pth")
    assert torch.equal(load_network(tmp_path / "model.pth")[0].decoder.layers[0][1].weight,
                       STATE["decoder.layers.0.1.weight"])


@pytest.mark.parametrize("content, named", [
    (STATE | prefixed("module."), "mixed"),  # every tensor twice: which is meant?
    ({"state_dict": prefixed("module.") | {"decoder.layers.0.1.bias": STATE["decoder.layers.0.1.bias"]}},
     "decoder.layers.0.1.bias"),
    (prefixed("module.net."), "net.encoder.layers.0."),
    (model_checkpoint(small_network()) | {"state_dict": prefixed("net.")}, "but net.encoder.layers.0."),
    *((content, "state_dict") for content in ({}, {"iteration": 3}, {"model": STATE}, {**STATE, "epoch": 3})),
])
def test_what_is_no_model_of_ours_is_refused(tmp_path, content, named):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    for flag in ("--load_path", "--teacher"):
        message = user_error(load_network, path, flag=flag)
        assert message.startswith(f"{flag} {path}") and named in message


FIRST = "encoder.layers.0.0.weight"
DAMAGE = {  # by what is to be named: a change of the tensors
    "decoder.layers.0.1.bias": lambda state: state.pop("decoder.layers.0.1.bias"),
    "encoder.layers.0.99.bias": lambda state: state.update({"encoder.layers.0.99.bias": torch.zeros(6)}),
    "encoder.layers.0.2.weight": lambda state: state.update({"encoder.layers.0.2.weight": torch.zeros(6, 5, 3, 3)}),
    FIRST: lambda state: state[FIRST][2, 1].fill_(float("nan")),
    "decoder.layers.0.28.bias": lambda state: state["decoder.layers.0.28.bias"][1].fill_(float("inf")),
    "tensors": lambda state: state.update({FIRST: [1.0, 2.0]}),
    "state_dict": lambda state: state.clear(),
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("named", DAMAGE)
def test_damaged_tensors_are_refused(tmp_path, named, with_config):
    checkpoint = model_checkpoint(small_network())
    if not with_config:
        checkpoint = {"state_dict": checkpoint["state_dict"]}
    DAMAGE[named](checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "model.pth")
    message = user_error(load_network, tmp_path / "model.pth")
    assert str(tmp_path / "model.pth") in message and (named in message or ".layers." not in named)


@pytest.mark.parametrize("config", [
    None, [], {}, {"backbone": "vgg19"},
    {**asdict(small_config()), "backbone": ["vgg19"]},
    {**asdict(small_config()), "encoder_widths": 7},
    {**asdict(small_config()), "encoder_widths": ["6"] * 9},
    {**asdict(small_config()), "encoder_widths": [6] * 8 + [7]},  # not what the tensors say
    {**asdict(small_config()), "depth": 5},  # a property of a version to come
])
def test_damaged_configuration_is_refused(tmp_path, config):
    path = tmp_path / "model.pth"
    torch.save({**model_checkpoint(small_network()), "config": config}, path)
    assert str(path) in user_error(load_network, path)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, save):
    touched, path = tmp_path / "touched", tmp_path / "model.pth"
    save({**model_checkpoint(small_network()), "payload": Payload(touched)}, path)
    message = user_error(load_network, path)
    assert str(path) in message and "load_path" in message
    assert not touched.exists()
    pickle.loads(pickle.dumps(Payload(touched)))  # the payload does work
    assert touched.exists()


def test_other_and_cut_files_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(model_checkpoint(small_network()), path)
    whole = path.read_bytes()
    others = (b"hello, this is a text\n", b"<!DOCTYPE html><html></html>", b"\x00" * 1000, b"PK\x03\x04 not really",
              bytes(range(256)) * 8)
    for content in (*(whole[: int(share * len(whole))] for share in (0.0, 0.1, 0.5, 0.9, 0.999)), *others):
        path.write_bytes(content)
        assert str(path) in user_error(load_network, path)
        for name in ("vgg.pth", "vgg.safetensors"):
            (tmp_path / name).write_bytes(content)
            assert f"vgg_weights {tmp_path / name}" in user_error(load_vgg, "vgg19", str(tmp_path / name))


def torchvision_state(vgg: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"features.{name}": tensor.clone() for name, tensor in vgg.items()}


def save_as(state: dict, path) -> None:
    """With the metadata that other programs write."""
    if path.suffix.lower() == ".safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        torch.save(state, path)


@pytest.mark.parametrize("backbone, deepest", [("vgg19", 19), ("vgg16", 21)])
def test_random_vgg_is_seeded_and_keeps_responses_of_order_one(backbone, deepest):
    """He initialisation: the variance of the first filters is 2 / fan_in, 27 inputs; responses neither die out nor
    explode on the way down."""
    again, origin = load_vgg(backbone, "random", seed=3)
    assert_same_tensors(again, random_vgg(backbone, 3))
    assert "random" in origin and "seed 3" in origin
    assert not torch.equal(load_vgg(backbone, "random", seed=4)[0]["0.weight"], again["0.weight"])
    assert list(again)[-1] == f"{deepest}.bias"
    assert not any(tensor.any() for name, tensor in again.items() if name.endswith("bias"))
    assert_close(again["0.weight"].std().item(), (2 / 27) ** 0.5, rtol=0.05, atol=0)
    loss_network = LossNetwork(backbone, weights=again)
    for feature in loss_network(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))):
        assert 0.3 < feature.square().mean().sqrt() < 3


@pytest.mark.parametrize("suffix, dtype, more", [(".pth", torch.float32, {"features.21.weight": torch.zeros(4, 4)}),
                                                 (".SafeTensors", torch.float16, {})])
def test_vgg_file_whole_or_cut_after_the_deepest_layer(tmp_path, suffix, dtype, more):
    state = {key: tensor.to(dtype) for key, tensor in torchvision_state(random_vgg("vgg19")).items()} | more
    path = tmp_path / f"vgg{suffix}"
    save_as(state, path)
    actual, origin = load_vgg("vgg19", str(path))
    assert_same_tensors(actual, {name: tensor.to(dtype).float() for name, tensor in random_vgg("vgg19").items()})
    assert str(path) in origin
    state["features.0.bias"][0] = 1.0
    save_as(state, path)
    assert load_vgg("vgg19", str(path))[1] != origin  # which tells contents apart


def test_vgg_files_that_do_not_fit_are_refused(tmp_path):
    """The last is of VGG16, cut at its encoder: its loss network goes deeper."""
    vgg19, vgg16 = (torchvision_state(random_vgg(backbone)) for backbone in BACKBONES)
    encoder = {key: tensor for key, tensor in vgg16.items() if int(key.split(".")[1]) <= 14}
    cases = [
        ("vgg19", "features.10.bias", {key: tensor for key, tensor in vgg19.items() if key != "features.10.bias"}),
        ("vgg19", "features.5.weight", vgg19 | {"features.5.weight": torch.zeros(128, 32, 3, 3)}),
        ("vgg19", "features.0.bias", vgg19 | {"features.0.bias": torch.full((64,), float("nan"))}),
        ("vgg19", "features.16", vgg16), ("vgg16", "features.17.weight", encoder),
    ]
    path = tmp_path / "vgg.pth"
    for backbone, key, state in cases:
        save_as(state, path)
        message = user_error(load_vgg, backbone, str(path))
        assert "vgg_weights" in message and str(path) in message and key in message


def test_bundled_weights_are_only_of_vgg19(tmp_path, monkeypatch):
    assert "vgg19" in user_error(load_vgg, "vgg16", "bundled")
    monkeypatch.setattr(weights_module, "BUNDLED_VGG19", tmp_path / "bundled.pth")
    assert f"vgg_weights {tmp_path}/bundled.pth: no such file" in user_error(load_vgg, "vgg19", "bundled")
    torch.save(torchvision_state(random_vgg("vgg19")), tmp_path / "bundled.pth")
    actual, origin = load_vgg("vgg19", "bundled")
    assert_same_tensors(actual, random_vgg("vgg19"))
    assert origin.startswith("bundled")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch cache, and no network."""

    def no_network(*arguments, **named):
        raise URLError("no network in this test")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


IMAGENET_FILES = {"vgg19": "vgg19-dcbb9e9d.pth", "vgg16": "vgg16-397923af.pth"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_imagenet_from_the_cache(hub, backbone):
    """Without a network and a cache, what is missing and what helps are said."""
    message = user_error(load_vgg, backbone, "imagenet")
    for needed in ("vgg_weights imagenet", IMAGENET_FILES[backbone], str(hub), "bundled", "random", "path"):
        assert needed in message
    (hub / IMAGENET_FILES[backbone]).write_bytes(b"<!DOCTYPE html>")  # what was put there by hand may be anything
    assert f"vgg_weights imagenet: {hub / IMAGENET_FILES[backbone]}" in user_error(load_vgg, backbone, "imagenet")
    torch.save(torchvision_state(random_vgg(backbone)), hub / IMAGENET_FILES[backbone])
    actual, origin = load_vgg(backbone, "imagenet")
    assert_same_tensors(actual, random_vgg(backbone))
    assert origin.startswith("imagenet")


@pytest.mark.parametrize("backbone, pooling", [("vgg19", "avg"), ("vgg16", "max")])
def test_build_from_vgg(backbone, pooling):
    network = build_from_vgg(NetworkConfig.full(backbone, pooling), random_vgg(backbone))
    loss_network = LossNetwork(backbone, weights=random_vgg(backbone))
    assert_same_tensors(loss_network.layers.state_dict(), random_vgg(backbone))
    for name, actual in network.encoder.layers[0].state_dict().items():
        assert_close(actual, random_vgg(backbone)[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.config.pooling == pooling
    with torch.no_grad():  # the encoder is a copy: training it must not move the loss network
        network.encoder.layers[0][0].weight.zero_()
    assert_same_tensors(loss_network.layers.state_dict(), random_vgg(backbone))


TAPS = {  # torchvision's index of each tapped ReLU, with its channels and how often the sides were halved
    "vgg19": ((1, 64, 0), (6, 128, 1), (11, 256, 2), (20, 512, 3)),
    "vgg16": ((3, 64, 0), (8, 128, 1), (15, 256, 2), (22, 512, 3)),
}


@pytest.mark.parametrize("backbone, padding", [("vgg19", "zeros"), ("vgg16", "zeros"), ("vgg19", "reflect")])
def test_loss_network_taps_against_torchvision(backbone, padding):
    """In float64; frozen, but passing gradients on."""
    layout = torchvision.models.vgg.cfgs[{"vgg19": "E", "vgg16": "D"}[backbone]]
    deepest = TAPS[backbone][-1][0]
    with torch.device("meta"):
        features = torchvision.models.vgg.make_layers(layout)[: deepest + 1]
    features.load_state_dict(random_vgg(backbone), assign=True)
    for layer in features:
        layer.padding_mode = padding  # which its convolutions have
    loss_network = LossNetwork(backbone, padding, random_vgg(backbone))
    image = random_feature((2, 3, 16, 24), 0).double().requires_grad_()
    actual = loss_network.double()(image)
    assert len(actual) == 4
    features.double()
    for feature, (index, channels, halvings) in zip(actual, TAPS[backbone]):
        assert feature.shape == (2, channels, 16 >> halvings, 24 >> halvings)
        assert_close(feature, features[: index + 1](image.clone()), rtol=1e-9, atol=1e-9)
    sum(feature.square().mean() for feature in actual).backward()
    assert image.grad.abs().max() > 0
    assert all(not each.requires_grad and each.grad is None for each in loss_network.parameters())


@pytest.mark.parametrize("config", [
    NetworkConfig.full("vgg16", "avg"),
    NetworkConfig("vgg19", "max", (5, 7, 3, 11, 13, 2, 9, 4, 17), (6, 1, 8, 15, 10, 12, 14, 19, 3), "bilinear"),
])
def test_multiply_adds_are_those_that_torch_counts(config):
    """By its FLOP counter, on the layers as they are defined; it takes a multiply-add for two operations."""
    with torch.device("meta"):
        network, image = StyleTransferNetwork(config), torch.empty(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.encoder(image)
        network.decoder.layers[0](network.encoder(image))
    assert count_macs(config, 64) == counter.get_total_flops() // 2
    assert count_macs(replace(config, pooling="blur"), 64) == count_macs(config, 64)

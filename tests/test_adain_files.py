"""Weights of AdaIN programs: decoder.pth and vgg_normalised.pth with random weights paint what networks written from
the description of their layout paint, and go through every mode."""

import numpy as np
import pytest
import torch
from helpers import refusal, small_network, words, write_model, write_noise
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.transforms.functional import pil_to_tensor

from main import main
from network import NetworkConfig, StyleTransferNetwork
from painting import Stylizer
from weights import as_torchvision, join_adain, load_network, load_vgg

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512)
DECODER = (256, "up", 256, 256, 256, 128, "up", 128, 64, "up", 64, 3)
SMALL_VGG = (6, 5, "pool", 7, 8, "pool", 9, 10, 11, 12, "pool", 14)
SMALL_DECODER = (13, "up", 12, 11, 10, 9, "up", 8, 7, "up", 6, 3)


def layers_of(layout: tuple, width_in: int) -> list[nn.Module]:
    layers = []
    for entry in layout:
        if entry == "pool":
            layers.append(nn.MaxPool2d(2, 2, 0, ceil_mode=True))
        elif entry == "up":
            layers.append(nn.UpsamplingNearest2d(scale_factor=2))
        else:
            conv = nn.Conv2d(width_in, entry, 3)
            nn.init.kaiming_normal_(conv.weight)
            nn.init.normal_(conv.bias, std=0.1)
            layers += [nn.ReflectionPad2d(1), conv, nn.ReLU()]
            width_in = entry
    return layers


def make_vgg(layout: tuple = VGG) -> nn.Sequential:
    """RGB of 0..1 to relu4_1. The 1x1 conv brings it to BGR of 0..255, less the mean."""
    colours = nn.Conv2d(3, 3, 1)
    colours.weight.data = 255 * torch.eye(3).flip(0)[:, :, None, None]
    colours.bias.data = -torch.tensor([103.939, 116.779, 123.68])
    layers = layers_of(layout, 3)
    layers[1].weight.data /= 60
    return nn.Sequential(colours, *layers)


def make_decoder(layout: tuple = DECODER, width_in: int = VGG[-1]) -> nn.Sequential:
    """relu4_1 to RGB of 0..1, mostly."""
    layers = layers_of(layout, width_in)[:-1]
    layers[-1].weight.data /= 10
    layers[-1].bias.data += 0.5
    return nn.Sequential(*layers)


def paint(vgg: nn.Module, decoder: nn.Module, content: Tensor, style: Tensor) -> Tensor:
    """(1, 3, H, W), 0..1, to the same. AdaIN's epsilon is added to the variances of content and style; Huang & Belongie
    add it to the content's standard deviation."""
    with torch.no_grad():
        content, style = vgg(content), vgg(style)
        (content_var, content_mean), (style_var, style_mean) = (
            torch.var_mean(feature, dim=(2, 3), keepdim=True) for feature in (content, style))
        return decoder((content - content_mean) * ((style_var + 1e-5) / (content_var + 1e-5)).sqrt() + style_mean)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both networks at full width, and their files; the encoder's goes on behind relu4_1, as the public one does."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adain")
    vgg, decoder = make_vgg(), make_decoder()
    more = {f"{index}.{kind}": torch.zeros(3) for index in (32, 35) for kind in ("weight", "bias")}
    torch.save(vgg.state_dict() | more, folder / "vgg_normalised.pth")
    torch.save(decoder.state_dict(), folder / "decoder.pth")
    for number, name in enumerate(("content", "style")):
        write_noise(folder / name / "1.png", (40, 48), number)
        write_noise(folder / name / "2.png", (37, 45), number + 2)
    return vgg, decoder, folder


def as_ours(image: Tensor) -> Tensor:
    return (image - MEAN) / STD


@pytest.mark.parametrize("height, width", [(40, 48), (17, 21)])
def test_folding_is_exact(height, width):
    """In float64, in which the encoder gives the same feature, and the decoder the same picture. A side that is no
    multiple of 8 is continued by its last row or column first."""
    torch.manual_seed(0)
    vgg, decoder = make_vgg(SMALL_VGG).double(), make_decoder(SMALL_DECODER, SMALL_VGG[-1]).double()
    widths = [entry for entry in SMALL_VGG + SMALL_DECODER if isinstance(entry, int)]
    network = StyleTransferNetwork(NetworkConfig.full().with_widths(widths)).double()
    network.use(padding="reflect")
    network.load_state_dict(join_adain(decoder.state_dict(), as_torchvision(vgg.state_dict())))
    image = torch.rand(1, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        desired = vgg(pad(image, (0, -width % 8, 0, -height % 8), mode="replicate"))
        (actual,) = network.encode(as_ours(image))
        torch.testing.assert_close(actual, desired, rtol=1e-9, atol=1e-9 * desired.max().item())
        torch.testing.assert_close(network.decoder(desired) * STD + MEAN, decoder(desired), rtol=1e-9, atol=1e-9)
        assert vgg(image).shape == desired.shape  # poolings of ceil mode


@pytest.fixture(scope="module")
def flags(files) -> dict:
    folder = files[2]
    return {"gpu_no": -1, "load_path": folder / "decoder.pth", "vgg_weights": folder / "vgg_normalised.pth"}


def test_test_mode_and_python_paint_as_the_other_program_does(files, flags, tmp_path, capsys):
    vgg, decoder, folder = files
    pair = {kind: folder / kind / "1.png" for kind in ("content", "style")}
    content, style = (pil_to_tensor(Image.open(path))[None] / 255 for path in pair.values())
    desired = 255 * paint(vgg, decoder, content, style)[0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert main(words({"mode": "test", "save_path": tmp_path / "out.png"} | pair | flags)) == 0
    assert "no effect" not in capsys.readouterr().err
    stylizer = Stylizer(flags["load_path"], vgg_weights=flags["vgg_weights"], device="cpu")
    for picture in (Image.open(tmp_path / "out.png"), stylizer.stylize(pair["content"], pair["style"])):
        assert np.abs(np.asarray(picture) - desired).max() <= 1


SMALL = {"imsize": 40, "cropsize": 40, "batch_size": 2, "max_iter": 1, "num_workers": 0, "amp": "off", "holdout": 0}
MODES = {  # by mode, its further flags: a pruning of no channel, and an iteration
    "prune": {"prune_num": 0, "prune_nums": 0, "imsize": 40, "cropsize": 40, "report_size": 16, "latency_runs": 1},
    "export": {}, "train": SMALL | {"wb_mode": "disabled", "encoder_lr": 5e-5}, "distill": SMALL,
}


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_take_both_files(files, flags, tmp_path, mode):
    """Prune and export mode make one file of both; the loss network of a training is the same VGG, and pads alike."""
    given = flags | MODES[mode] | {"mode": mode, "save_path": tmp_path / ("out.safetensors" if mode == "export" else
                                                                          "out")}
    if mode == "distill":
        given |= {"teacher": flags["load_path"], "load_path": write_model(tmp_path / "student.pth", small_network())}
    if mode != "export":
        given |= {f"{kind}_dir": files[2] / kind for kind in ("content", "style")}
    assert main(words({name: value for name, value in given.items() if (mode, name) != ("export", "gpu_no")})) == 0
    network, checkpoint = load_network(given["save_path"])
    assert checkpoint["vgg_weights"].startswith(str(flags["vgg_weights"]))
    joined, _ = load_network(flags["load_path"], vgg_weights=str(flags["vgg_weights"]))
    assert mode == "distill" or network.config == joined.config and network.config.padding == "reflect"
    if mode in ("prune", "export"):
        assert all(torch.equal(tensor, joined.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_the_last_conv_may_be_numbered_without_its_padding(files, tmp_path):
    path, tensors = tmp_path / "renumbered.pth", dict(files[0].state_dict())
    torch.save({key.replace("29.", "28."): tensor for key, tensor in tensors.items()}, path)
    actual, _ = load_vgg("vgg19", str(path))
    desired = as_torchvision(tensors)
    assert all(torch.equal(tensor, desired[f"features.{name}"]) for name, tensor in actual.items())


def test_what_does_not_fit_is_one_line_that_says_what_was_looked_for(files, flags, tmp_path, capsys):
    looked_for = "vgg_normalised.pth is needed, with a 1x1 conv called 0 and 3x3 convs 2, 5, 9, 12, 16, 19, 22, 25, 29"
    short, narrow, cut, odd = (tmp_path / f"{name}.pth" for name in ("short", "narrow", "cut", "odd"))
    torch.save(files[0].state_dict() | {"5.weight": [1.0]}, odd)
    torch.save({key: tensor for key, tensor in files[0].state_dict().items() if key != "29.bias"}, short)
    torch.save(make_vgg(SMALL_VGG).state_dict(), narrow)
    torch.save({key: tensor for key, tensor in files[1].state_dict().items() if key[:2] != "28"}, cut)
    for more, line in (
        ({"vgg_weights": "bundled"}, f"--vgg_weights bundled: --load_path {flags['load_path']} is the decoder of an "
                                     f"AdaIN program, its {looked_for}"),
        ({"vgg_weights": short}, f"--vgg_weights {short} is no encoder of --load_path"),
        ({"vgg_weights": odd}, looked_for),
        ({"vgg_weights": narrow}, "decoder.layers.0.1.weight has shape (256, 512, 3, 3), not (256, 14, 3, 3)"),
        ({"vgg_weights": tmp_path / "none.pth"}, f"--vgg_weights {tmp_path}/none.pth: no such file"),
        ({"load_path": cut}, "nor AdaIN's decoder.pth, 1, 5, 8, 11, 14, 18, 21, 25, 28"),
    ):
        given = {"mode": "test", "save_path": tmp_path / "out.png"} | flags | more
        assert line in refusal(capsys, *words(given))

"""Weights of AdaIN programs: decoder.pth and vgg_normalised.pth with random weights paint what networks written from
the description of their layout paint, and go through every mode."""

import numpy as np
import pytest
import torch
from helpers import SMALL_TRAINING, refusal, small_network, words, write_model, write_noise
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.transforms.functional import pil_to_tensor

from main import main
from network import NetworkConfig, StyleTransferNetwork, build_loss_network
from painting import Stylizer
from weights import fold_adain_vgg, join_adain, load_network, load_vgg

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512)
DECODER = (256, "up", 256, 256, 256, 128, "up", 128, 64, "up", 64, 3)
SMALL_VGG = (6, 5, "pool", 7, 8, "pool", 9, 10, 11, 12, "pool", 14)
SMALL_DECODER = (13, "up", 12, 11, 10, 9, "up", 8, 7, "up", 6, 3)


# ------------------------------------------------------------- the other program, by its description


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


def paint(vgg: nn.Module, decoder: nn.Module, content: Tensor, style: Tensor, in_root: bool) -> Tensor:
    """(1, 3, H, W), 0..1, to the same. in_root: whether the epsilon of AdaIN is added to the variances of content and
    style, as the other program does, or to the content's standard deviation (Huang & Belongie)."""
    with torch.no_grad():
        content, style = vgg(content), vgg(style)
        (content_var, content_mean), (style_var, style_mean) = (
            torch.var_mean(feature, dim=(2, 3), keepdim=True) for feature in (content, style))
        if in_root:
            return decoder((content - content_mean) * ((style_var + 1e-5) / (content_var + 1e-5)).sqrt() + style_mean)
        return decoder((content - content_mean) / (content_var.sqrt() + 1e-5) * style_var.sqrt() + style_mean)


# ---------------------------------------------------------------------------------------- comparisons


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


@pytest.mark.parametrize("height, width", [(40, 48), (37, 45), (17, 16)])
def test_folding_is_exact(height, width):
    """In float64, in which the encoder gives the same feature, and the decoder the same picture. A side that is no
    multiple of 8 is continued by its last row or column first."""
    torch.manual_seed(0)
    vgg, decoder = make_vgg(SMALL_VGG).double(), make_decoder(SMALL_DECODER, SMALL_VGG[-1]).double()
    widths = [entry for entry in SMALL_VGG + SMALL_DECODER if isinstance(entry, int)]
    network = StyleTransferNetwork(NetworkConfig.full().with_widths(widths)).double()
    network.use(padding="reflect")
    network.load_state_dict(join_adain(decoder.state_dict(), fold_adain_vgg(vgg.state_dict())))
    image = torch.rand(1, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        desired = vgg(pad(image, (0, -width % 8, 0, -height % 8), mode="replicate"))
        actual = network.encode(as_ours(image))
        torch.testing.assert_close(actual, desired, rtol=1e-9, atol=1e-9 * desired.max().item())
        torch.testing.assert_close(network.decoder(desired) * STD + MEAN, decoder(desired), rtol=1e-9, atol=1e-9)
        assert vgg(image).shape == desired.shape  # poolings of ceil mode


@pytest.mark.parametrize("height, width", [(40, 48), (37, 45)])
def test_files_paint_what_the_other_program_paints(files, height, width):
    """But for where AdaIN's epsilon is added. In float32; at sides that are no multiples of 8 it is given the content
    continued to them."""
    vgg, decoder, folder = files
    network, _ = load_network(folder / "decoder.pth", vgg_weights=str(folder / "vgg_normalised.pth"))
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.rand(1, 3, *size, generator=generator) for size in ((height, width), (48, 40)))
    whole = pad(content, (0, -width % 8, 0, -height % 8), mode="replicate")
    desired, with_their_epsilon = (paint(vgg, decoder, whole, style, in_root)[:, :, :height, :width].double()
                                   for in_root in (False, True))
    with torch.no_grad():
        actual = network(as_ours(content).float(), as_ours(style).float()) * STD + MEAN
    assert desired.std() > 0.1
    torch.testing.assert_close(actual, desired, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual, with_their_epsilon, rtol=0, atol=4 / 255)


# ---------------------------------------------------------------------------------------------- modes


@pytest.fixture(scope="module")
def flags(files) -> dict:
    folder = files[2]
    return {"load_path": folder / "decoder.pth", "vgg_weights": folder / "vgg_normalised.pth"}


@pytest.fixture(scope="module")
def joined(flags) -> StyleTransferNetwork:
    return load_network(flags["load_path"], vgg_weights=str(flags["vgg_weights"]))[0]


@pytest.fixture
def run(files, flags, tmp_path):
    """Runs a mode with the files, and with folders of pictures."""
    folders = {f"{kind}_dir": files[2] / kind for kind in ("content", "style")}

    def start(mode: str, **more) -> None:
        assert main(words({"mode": mode, "gpu_no": -1, "save_path": tmp_path / "out"} | folders | flags | more)) == 0

    return start


def assert_same(path, joined: StyleTransferNetwork) -> dict:
    """The network of a file of ours is the one of both files. Returns what the file says beside it."""
    network, checkpoint = load_network(path)
    assert network.config == joined.config and network.config.padding == "reflect"
    assert all(torch.equal(tensor, joined.state_dict()[name]) for name, tensor in network.state_dict().items())
    return checkpoint


def test_test_mode_and_python_paint_as_the_other_program_does(files, flags, tmp_path, capsys):
    vgg, decoder, folder = files
    pair = {kind: folder / kind / "1.png" for kind in ("content", "style")}
    content, style = (pil_to_tensor(Image.open(path))[None] / 255 for path in pair.values())
    desired = 255 * paint(vgg, decoder, content, style, in_root=True)[0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert main(words({"mode": "test", "gpu_no": -1, "save_path": tmp_path / "out.png"} | pair | flags)) == 0
    assert "no effect" not in capsys.readouterr().err
    stylizer = Stylizer(flags["load_path"], vgg_weights=flags["vgg_weights"], device="cpu")
    for picture in (Image.open(tmp_path / "out.png"), stylizer.stylize(pair["content"], pair["style"])):
        assert np.abs(np.asarray(picture) - desired).max() <= 1


def test_a_pruning_of_no_channel_makes_one_file_of_both(run, joined, flags, tmp_path):
    run("prune", prune_num=0, prune_nums=0, imsize=40, cropsize=40, report_size=16, latency_runs=1)
    assert assert_same(tmp_path / "out", joined)["vgg_weights"].startswith(str(flags["vgg_weights"]))


def test_export_mode_makes_one_file_of_both(flags, joined, tmp_path):
    path = tmp_path / "both.safetensors"
    assert main(words({"mode": "export", "save_path": path} | flags)) == 0
    assert_same(path, joined)


def test_training_goes_on_from_them(run, flags, tmp_path):
    """The loss network is the same VGG, and pads by reflection, too."""
    settings = {name: value for name, value in SMALL_TRAINING.items() if name not in ("vgg_weights", "gpu_no")}
    settings = {name: value for name, value in settings.items() if not name.endswith("_dir")}
    run("train", **settings, max_iter=1)
    network, checkpoint = load_network(tmp_path / "out")
    vgg, origin = load_vgg("vgg19", str(flags["vgg_weights"]))
    assert checkpoint["vgg_weights"] == origin
    assert network.config.padding == build_loss_network(network.config, vgg).padding == "reflect"


def test_the_loss_network_of_the_file_sees_what_its_vgg_does(files, flags, joined):
    vgg = files[0]
    image = torch.rand(1, 3, 40, 48)
    loss_network = build_loss_network(joined.config, load_vgg("vgg19", str(flags["vgg_weights"]))[0])
    features = loss_network(as_ours(image).float())
    for feature, index in zip(features, (3, 10, 17, 30)):  # relu1_1, relu2_1, relu3_1, relu4_1
        with torch.no_grad():
            desired = vgg[: index + 1](image)
        torch.testing.assert_close(feature, desired, rtol=0, atol=1e-5 * desired.max().item())


def test_the_last_conv_may_be_numbered_without_its_padding(files, tmp_path):
    path, tensors = tmp_path / "renumbered.pth", dict(files[0].state_dict())
    torch.save({key.replace("29.", "28."): tensor for key, tensor in tensors.items()}, path)
    actual, _ = load_vgg("vgg19", str(path))
    desired = fold_adain_vgg(tensors)
    assert all(torch.equal(tensor, desired[f"features.{name}"]) for name, tensor in actual.items())


def test_they_teach(run, flags, tmp_path):
    student = write_model(tmp_path / "student.pth", small_network())
    run("distill", load_path=student, teacher=flags["load_path"], imsize=40, cropsize=32, batch_size=2, max_iter=1,
        num_workers=0, amp="off", holdout=0)
    assert load_network(tmp_path / "out")[1]["vgg_weights"].startswith(str(flags["vgg_weights"]))


# ------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_one_line_that_says_what_was_looked_for(files, flags, tmp_path, capsys):
    looked_for = "vgg_normalised.pth is needed, with a 1x1 conv called 0 and 3x3 convs 2, 5, 9, 12, 16, 19, 22, 25, 29"
    short, narrow, cut = (tmp_path / f"{name}.pth" for name in ("short", "narrow", "cut"))
    torch.save({key: tensor for key, tensor in files[0].state_dict().items() if key != "29.bias"}, short)
    torch.save(make_vgg(SMALL_VGG).state_dict(), narrow)
    torch.save({key: tensor for key, tensor in files[1].state_dict().items() if key[:2] != "28"}, cut)
    for more, line in (
        ({"vgg_weights": "bundled"}, f"--vgg_weights bundled: --load_path {flags['load_path']} is the decoder of an "
                                     f"AdaIN program, its {looked_for}"),
        ({"vgg_weights": short}, f"--vgg_weights {short} is no encoder of --load_path"),
        ({"vgg_weights": short}, looked_for),
        ({"vgg_weights": narrow}, "decoder.layers.0.1.weight has shape (256, 512, 3, 3), not (256, 14, 3, 3)"),
        ({"vgg_weights": tmp_path / "none.pth"}, f"--vgg_weights {tmp_path}/none.pth: no such file"),
        ({"load_path": cut}, "nor AdaIN's decoder.pth, 1, 5, 8, 11, 14, 18, 21, 25, 28"),
    ):
        given = {"mode": "test", "gpu_no": -1, "save_path": tmp_path / "out.png"} | flags | more
        assert line in refusal(capsys, *words(given))

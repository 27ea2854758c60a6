"""The examples: each runs at its smallest setting, and what it says of the cut is so."""

import re
import sys

import pytest
import torch
import torchvision
from helpers import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "examples"))

import any_network  # noqa: E402


def test_any_network_runs(monkeypatch, capsys):
    monkeypatch.setattr(any_network, "CROP", 16)
    any_network.main(["--steps", "1"])
    first, before, after, measured, others = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1: task ") and "of 1920 channels" in first
    assert before.removeprefix("before: ").startswith("1,920 channels, 11,180,616 parameters, ")
    assert after.startswith("after: ") and others.startswith("other crops: ")
    assert float(measured.rsplit(" ", 1)[1]) <= 1e-9


@pytest.mark.parametrize("name, convs", [
    ("resnet18", r"layer[12]\.\d\.conv2"),  # read by nothing else, unlike the sums between the blocks
    ("mobilenet_v2", r"features\.[2-4]\.conv\.2"),  # behind a convolution of each channel by itself
    ("densenet121", r"features\.denseblock1\.denselayer[12]\.conv2"),
])
def test_a_cut_leaves_the_output(name, convs):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the running statistics become those of the one batch
            norm.weight.data[::3], norm.bias.data[::3] = 0.0, -1.0  # the ReLU behind it gives zero
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    model(images)
    model.eval()
    names = [each for each, _ in model.named_modules() if re.fullmatch(convs, each)]
    norms = any_network.watch(model, names)
    off = any_network.find_off(model, norms, images)
    small = any_network.cut(model, off, images[:1])
    for each in names:
        width, kept = (net.get_submodule(each).in_channels for net in (model, small))
        assert off[each].sum() == width - kept >= width // 3
    with torch.no_grad():
        desired, actual = model(images), small(images)
    assert desired.std(dim=0).min() > 1e-6
    torch.testing.assert_close(actual, desired, rtol=1e-9, atol=1e-9 * desired.abs().max().item())


def test_channels_that_are_read_elsewhere_and_the_last_one_are_not_cut():
    model = torchvision.models.resnet18(num_classes=5).eval()
    with pytest.raises(ValueError, match="layer2.1.conv1 is not the only layer that reads these channels"):
        any_network.cut(model, {"layer2.1.conv1": torch.arange(128) < 2}, torch.zeros(1, 3, 32, 32))
    small = any_network.cut(model, {"layer1.0.conv2": torch.ones(64, dtype=torch.bool)}, torch.zeros(1, 3, 32, 32))
    assert small.layer1[0].conv1.out_channels == small.layer1[0].conv2.in_channels == 1  # a convolution keeps one

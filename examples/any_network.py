"""The channel and xor losses on a network that is none of ours, and the cut of the channels that they switched off.

    pip install torch-pruning && python examples/any_network.py

A torchvision classifier with random weights learns which bundled photograph a crop is from, while the two losses switch
off channels between its convolutions. Torch-Pruning then cuts those that are off for every crop measured. It takes a
minute on two cores. docs/your_network.md explains it; of this repository your own code needs loss.py alone.
"""

import argparse
import copy
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import RandomCrop, ToTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loss import channel_loss, channel_norm, xor_loss  # noqa: E402

CROP = 48  # pixels


def draw(pictures: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Random crops, (number, 3, CROP, CROP), -1..1, and the index of the picture that each is from, (number,)."""
    labels = torch.randint(len(pictures), (number,))
    return torch.stack([RandomCrop(CROP)(pictures[label]) for label in labels]), labels


def watch(model: nn.Module, convs: list[str]) -> dict[str, Tensor]:
    """Have every forward pass write the norms of what each convolution reads, (B, C), into the dictionary returned."""
    norms = {}
    for name in convs:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: norms.update({name: channel_norm(inputs[0])}))
    return norms


@torch.no_grad()
def find_off(model: nn.Module, norms: dict[str, Tensor], crops: Tensor) -> dict[str, Tensor]:
    """For each watched convolution, which channels are zero for all of the crops: (C,) booleans."""
    off = {}
    for batch in crops.split(64):
        model(batch)
        for name, norm in norms.items():
            off[name] = off.get(name, True) & (norm == 0).all(dim=0)
    return off


def cut(model: nn.Module, off: dict[str, Tensor], example: Tensor) -> nn.Module:
    """A copy of the model without the channels in `off`: nothing computes them, and the named convolutions read the
    others. Where all are off the last stays. Raises ValueError where another layer reads them, too."""
    model = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(model, example)
    for name, channels in off.items():
        indices = channels.nonzero().flatten().tolist()[: len(channels) - 1]
        if indices:
            group = graph.get_pruning_group(model.get_submodule(name), tp.prune_conv_in_channels, indices)
            if sum(not graph.is_out_channel_pruning_fn(step.handler) for step, _ in group) > 1:
                raise ValueError(f"{name} is not the only layer that reads these channels: {group}")
            group.prune()
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision")
    parser.add_argument("--convs", default=r"layer\d\.\d\.conv2", help="a pattern: their inputs are watched")
    parser.add_argument("--eps", type=float, default=1.0, help="about a channel's norm in the beginning")
    parser.add_argument("--channel_weight", type=float, default=10.0, help="more: more channels go off")
    parser.add_argument("--xor_weight", type=float, default=10.0, help="more: channels are rather off for all or none")
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    files = sorted(ROOT.glob("imgs/content/*.jpg"))
    pictures = [2 * ToTensor()(Image.open(file).convert("RGB").reduce(5)) - 1 for file in files]  # of about 100 pixels
    model = getattr(torchvision.models, args.model)(num_classes=len(pictures))
    convs = [name for name, _ in model.named_modules() if re.fullmatch(args.convs, name)]
    norms = watch(model, convs)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    for step in range(1, args.steps + 1):
        crops, labels = draw(pictures, 16)
        task = F.cross_entropy(model(crops), labels)
        norm = torch.cat(list(norms.values()), dim=1)  # (B, channels of all convolutions)
        channel, xor = channel_loss(norm, args.eps), xor_loss(norm, args.eps)
        optimizer.zero_grad()
        (task + args.channel_weight * channel + args.xor_weight * xor).backward()
        optimizer.step()
        schedule.step()
        if step == 1 or step % 25 == 0:
            off = norm == 0
            print(f"step {step}: task {task:.2f}, channel {channel:.3f}, xor {xor:.3f}; of {norm.shape[1]} channels "
                  f"{off.any(dim=0).sum()} are off for some crops, {off.all(dim=0).sum()} for all")

    model.eval().double()  # in float64 an exact cut changes the output by rounding alone
    pictures = [picture.double() for picture in pictures]
    measured, others = draw(pictures, 256), draw(pictures, 256)
    small = cut(model, find_off(model, norms, measured[0]), measured[0][:1])
    for title, each in {"before": model, "after": small}.items():
        macs, parameters = tp.utils.count_ops_and_params(each, measured[0][:1])
        channels = sum(each.get_submodule(name).in_channels for name in convs)
        print(f"{title}: {channels:,} channels, {parameters:,} parameters, {macs:,.0f} multiply-adds")
    for name, (crops, labels) in {"the crops measured": measured, "other crops": others}.items():
        with torch.no_grad():
            output, small_output = model(crops), small(crops)
        right, change = (small_output.argmax(dim=1) == labels).double().mean(), (small_output - output).abs().max()
        print(f"{name}: {right:.0%} told right; outputs, of up to {output.abs().max():.3g}, change by {change:.2g}")


if __name__ == "__main__":
    main()

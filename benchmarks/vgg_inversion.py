"""What the losses of a VGG ask for, without encoder and decoder: pictures optimised pixel by pixel from noise.

For pairs of held-out pictures, Adam lowers content + weight * style loss, as in training, of a picture that starts as
noise (Gatys et al., CVPR 2016, with the statistics of AdaIN). Weights under which that gives no good picture cannot
train a decoder that does. Writes a picture grid: the contents, the styles, then for each of `--vgg_weights` a row for
each of `--style_loss_weight`. The last line of the output is JSON.

    python benchmarks/vgg_inversion.py --content_dir PHOTOS --style_dir PAINTINGS --vgg_weights random bundled \
        --save_path inversion.png
"""

import argparse
import sys
from pathlib import Path

import torch
from measure import print_json, versions
from torch import Tensor

import loss as losses
from data import OUTPUT_FORMATS, PictureError, find_measured, normalize, picture_grid, prepare_picture, save_picture
from network import LossNetwork
from settings import amount, count, fraction_to_0_9
from utils import UserError, note, progress_bar, resolve_device
from weights import load_vgg

NOISE = 0.1  # standard deviation of the first picture, in normalised colours


def optimise(network: LossNetwork, content: Tensor, style: Tensor, weight: float, steps: int, lr: float) -> tuple:
    """The picture after `steps` steps of Adam, and its last content and style loss.

    content, style: (B, 3, H, W), ImageNet-normalised. Returns (B, 3, H, W), likewise, and two floats.
    """
    generator = torch.Generator().manual_seed(0)
    picture = (NOISE * torch.randn(content.shape, generator=generator)).to(content.device).requires_grad_()
    optimizer = torch.optim.Adam([picture], lr)
    with torch.no_grad():
        content_target, style_target = network(content), network(style)
    with progress_bar(steps, f"style weight {weight:g}", "step") as bar:
        for _ in range(steps):
            features = network(picture)
            content_loss = losses.content_loss(features, content_target)
            style_loss = losses.style_loss(features, style_target, "meanstd")
            optimizer.zero_grad()
            (content_loss + weight * style_loss).backward()
            optimizer.step()
            bar.update()
    return picture.detach(), content_loss.item(), style_loss.item()


def held_out(folder: str, flag: str, options: argparse.Namespace) -> Tensor:
    """Evenly spread held-out pictures of a folder, the middle of each: (pairs, 3, size, size), uint8."""
    paths = find_measured(Path(folder), flag, options.holdout)
    if len(paths) < options.pairs:
        raise UserError(f"{flag} {folder}: {len(paths)} held-out pictures, --pairs wants {options.pairs}")
    chosen = [paths[number * len(paths) // options.pairs] for number in range(options.pairs)]
    return torch.cat([prepare_picture(path, options.imsize, options.size) for path in chosen])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vgg_weights", nargs="+", default=["random"], help="as main.py's flag, one or more")
    parser.add_argument("--content_dir", required=True, help="folder of photographs")
    parser.add_argument("--style_dir", required=True, help="folder of paintings")
    parser.add_argument("--style_loss_weight", type=amount, nargs="+", default=[0.0, 10.0])
    parser.add_argument("--holdout", type=fraction_to_0_9, default=0.1, help="the share that was held out; 0 takes all")
    parser.add_argument("--pairs", type=count, default=4)
    parser.add_argument("--imsize", type=count, default=128, help="shorter side of the pictures, pixels")
    parser.add_argument("--size", type=count, default=96, help="side of the square in their middle, pixels")
    parser.add_argument("--steps", type=count, default=120)
    parser.add_argument("--lr", type=amount, default=0.05)
    parser.add_argument("--save_path", type=Path, required=True, help="picture file to write")
    parser.add_argument("--gpu_no", type=int)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results = []
    try:
        if options.save_path.suffix.lower() not in OUTPUT_FORMATS:
            raise UserError(f"--save_path {options.save_path}: a picture file is needed ({' '.join(OUTPUT_FORMATS)})")
        device = resolve_device(options.gpu_no)
        vggs = {source: load_vgg("vgg19", source) for source in options.vgg_weights}
        content = normalize(held_out(options.content_dir, "--content_dir", options).to(device))
        style = normalize(held_out(options.style_dir, "--style_dir", options).to(device))
        rows = [content, style]
        for source, (weights, origin) in vggs.items():
            network = LossNetwork("vgg19").to(device)
            network.layers.load_state_dict(weights)
            for weight in options.style_loss_weight:
                picture, content_loss, style_loss = optimise(network, content, style, weight, options.steps, options.lr)
                rows.append(picture)
                results.append({"vgg_weights": source, "origin": origin, "style_loss_weight": weight,
                                "content": content_loss, "style": style_loss})
                note(f"{source}, style weight {weight:g}: content {content_loss:.4f}, style {style_loss:.4f}")
        save_picture(picture_grid([row.cpu() for row in rows]), options.save_path)
    except (UserError, PictureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_json({"results": results, **versions(device)})
    return 0


if __name__ == "__main__":
    sys.exit(main())

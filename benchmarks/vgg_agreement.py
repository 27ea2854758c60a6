"""How often VGG19 features call the same of two distorted copies nearer as a metric trained on human judgements.

For triplets of a held-out picture and two distorted copies, the features' distance (unit-normalised channels,
summed squared difference, averaged over positions and over the taps, as in LPIPS without its learned weights;
Zhang et al., arXiv 1801.03924) votes for one copy, ST-LPIPS (Ghildyal & Liu, arXiv 2207.13686; PyPI
`stlpips-pytorch`, its weights are in the package) for one; the figure is the share of equal votes. Beside it stands
what each distance minds: its mean for copies with one kind of distortion, over the mean of all kinds. The pixels'
own mean squared difference is measured beside the features. The last line of the output is JSON.

    python benchmarks/vgg_agreement.py --content_dir PHOTOS --style_dir PAINTINGS --vgg_weights random bundled
"""

import argparse
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import print_json, versions
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from data import PictureError, find_measured, find_pictures, normalize, prepare_picture
from main import count
from network import LossNetwork, load_vgg
from quality import load_stlpips
from utils import UserError, describe_device, note, resolve_device

RESAMPLES = 2000  # of the bootstrap


# ------------------------------------------------------------------------------------------- distorted copies


def distort(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A copy with one to three kinds of distortion in random order, each of a random strength.

    picture: (3, H, W), uint8. Returns the same.
    """
    kinds = tuple(KINDS.values())
    number = int(torch.randint(1, 4, (), generator=generator))
    for kind in torch.randperm(len(kinds), generator=generator)[:number].tolist():
        picture = kinds[kind](picture, float(torch.rand((), generator=generator)), generator)
    return picture


def blur(picture: Tensor, strength: float, _generator: torch.Generator) -> Tensor:
    sigma = 0.3 * 10**strength  # 0.3 to 3 pixels
    return v2.functional.gaussian_blur(picture, 2 * math.ceil(3 * sigma) + 1, sigma)


def noise(picture: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    sigma = 3.0 * 15**strength  # 3 to 45 of 255
    return _to_uint8(picture + sigma * torch.randn(picture.shape, generator=generator))


def jpeg(picture: Tensor, strength: float, _generator: torch.Generator) -> Tensor:
    file = io.BytesIO()
    v2.functional.to_pil_image(picture).save(file, "JPEG", quality=int(60 * 0.08**strength))  # 60 to 4
    return v2.functional.pil_to_tensor(Image.open(file))


def warp(picture: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Every pixel moves by a smooth random field of about 0.3 to 4 pixels."""
    height, width = picture.shape[1:]
    field = torch.randn(1, 2, 5, 5, generator=generator) * 0.3 * 13**strength
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True)[0]
    grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"))  # (2, H, W): x, y
    grid = 2 * (grid + field) / torch.tensor([width - 1, height - 1])[:, None, None] - 1
    moved = F.grid_sample(picture[None].float(), grid.permute(1, 2, 0)[None], mode="bicubic",
                          padding_mode="reflection", align_corners=True)
    return _to_uint8(moved[0])


def shift_colors(picture: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gain and offset of each channel, and saturation."""
    gain, offset = torch.randn(2, 3, 1, 1, generator=generator) * 0.25 * strength
    saturation = 1 + strength * float(2 * torch.rand((), generator=generator) - 1)
    return _to_uint8(v2.functional.adjust_saturation(picture, saturation) * (1 + gain) + 255 * offset / 2)


def _to_uint8(picture: Tensor) -> Tensor:
    return picture.round().clamp(0, 255).byte()


KINDS = {"blur": blur, "noise": noise, "JPEG": jpeg, "warp": warp, "colours": shift_colors}


def make_triplets(paths: list[Path], count: int, size: int, seed: int) -> Tensor:
    """Pictures in turn, each with two distorted copies of its centre: (count, 3, 3, size, size), uint8."""
    triplets = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        picture = prepare_picture(paths[number % len(paths)], size, size)[0]
        triplets.append(torch.stack([picture, distort(picture, generator), distort(picture, generator)]))
    return torch.stack(triplets)


def make_single_distortions(paths: list[Path], size: int, seed: int) -> Tensor:
    """Every picture's centre with two copies distorted in one way at half strength, for each kind in turn.

    Returns (pictures * kinds, 3, 3, size, size), uint8.
    """
    triplets = []
    for number, path in enumerate(paths):
        picture = prepare_picture(path, size, size)[0]
        for kind in KINDS.values():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            triplets.append(torch.stack([picture, *(kind(picture, 0.5, generator) for _ in range(2))]))
    return torch.stack(triplets)


# ------------------------------------------------------------------------------------------------- distances


class PixelDistance(nn.Module):
    """Mean squared difference of the pixels: what a metric has to beat."""

    def forward(self, triplets: Tensor) -> Tensor:
        """triplets: (B, 3, 3, H, W), uint8: a picture and two copies. Returns the copies' distances, (B, 2)."""
        pictures = triplets.float()
        return (pictures[:, 1:] - pictures[:, :1]).square().mean(dim=(2, 3, 4))


class FeatureDistance(nn.Module):
    """Squared difference of unit-normalised VGG19 features, averaged over positions and taps."""

    def __init__(self, source: str) -> None:
        super().__init__()
        weights, self.origin = load_vgg("vgg19", source)
        self.network = LossNetwork("vgg19")
        self.network.layers.load_state_dict(weights)

    def forward(self, triplets: Tensor) -> Tensor:
        """triplets: (B, 3, 3, H, W), uint8: a picture and two copies. Returns the copies' distances, (B, 2)."""
        distances = []
        for feature in self.network(normalize(triplets.flatten(0, 1))):
            unit = F.normalize(feature, dim=1).unflatten(0, (-1, 3))  # (B, 3, C, H, W)
            distances.append((unit[:, 1:] - unit[:, :1]).square().sum(dim=2).mean(dim=(2, 3)))
        return torch.stack(distances).mean(dim=0)


class ShiftTolerantLpips(nn.Module):
    """ST-LPIPS, see `quality.load_stlpips`."""

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.metric = load_stlpips(trunk)

    def forward(self, triplets: Tensor) -> Tensor:
        """triplets: (B, 3, 3, H, W), uint8: a picture and two copies. Returns the copies' distances, (B, 2)."""
        pictures = triplets.float() / 127.5 - 1
        return torch.stack([self.metric(pictures[:, 0], pictures[:, copy]).flatten() for copy in (1, 2)], dim=1)


# ------------------------------------------------------------------------------------------------- agreement


@torch.inference_mode()
def measure(distance: nn.Module, triplets: Tensor, device: torch.device, batch_size: int = 32) -> np.ndarray:
    """Distances of both copies, (n, 2). triplets: (n, 3, 3, H, W), uint8."""
    distance = distance.to(device).eval()
    return torch.cat([distance(batch) for batch in triplets.to(device).split(batch_size)]).cpu().numpy()


def votes(distance: nn.Module, triplets: Tensor, device: torch.device) -> np.ndarray:
    """Whether the first copy is nearer, for every triplet. triplets: (n, 3, 3, H, W), uint8. Returns (n,)."""
    first, second = measure(distance, triplets, device).T
    return first < second


def minds(distance: nn.Module, singles: Tensor, device: torch.device) -> dict[str, float]:
    """The mean distance of each kind of distortion over the mean of all. singles: `make_single_distortions`."""
    by_kind = measure(distance, singles, device).reshape(-1, len(KINDS), 2).mean(axis=(0, 2))
    return dict(zip(KINDS, (by_kind / by_kind.mean()).round(3).tolist()))


def agreement(equal: np.ndarray, pictures: int) -> dict[str, float]:
    """The share of equal votes and its 95% interval, bootstrapped over pictures (their triplets are not
    independent). equal: (n,), triplet i is of picture i modulo `pictures`."""
    groups = [equal[number::pictures] for number in range(min(pictures, len(equal)))]
    right = np.array([group.sum() for group in groups])
    total = np.array([len(group) for group in groups])
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    shares = right[drawn].sum(axis=1) / total[drawn].sum(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return {"agreement": float(equal.mean()), "low": float(low), "high": float(high)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vgg_weights", nargs="+", default=["random"], help="as main.py's flag, one or more")
    parser.add_argument("--content_dir", help="folder of photographs")
    parser.add_argument("--style_dir", help="folder of paintings")
    parser.add_argument("--holdout", type=float, default=0.1, help="the share that pretraining held out; 1 takes all")
    parser.add_argument("--triplets", type=count, default=1000)
    parser.add_argument("--size", type=count, default=128, help="side of the pictures, pixels")
    parser.add_argument("--trunk", choices=("alex", "vgg"), default="alex", help="of ST-LPIPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu_no", type=int)
    return parser.parse_args(arguments)


def held_out_pictures(options: argparse.Namespace) -> list[Path]:
    """The held-out pictures of both folders; all of them with --holdout 1."""
    paths = []
    for flag in ("content_dir", "style_dir"):
        folder = getattr(options, flag)
        if folder:
            paths += (find_pictures(folder, f"--{flag}") if options.holdout >= 1
                      else find_measured(folder, f"--{flag}", options.holdout))
    if not paths:
        raise UserError("--content_dir or --style_dir is needed")
    return paths


def _row(values: dict[str, float]) -> str:
    return " ".join(f"{value:.2f}" for value in values.values())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        device = resolve_device(options.gpu_no)
        paths = held_out_pictures(options)
        # Loaded before the triplets are made: a missing file is said at once.
        distances = {"pixels": PixelDistance()} | {source: FeatureDistance(source) for source in options.vgg_weights}
        metric = ShiftTolerantLpips(options.trunk)
        triplets = make_triplets(paths, options.triplets, options.size, options.seed)
        singles = make_single_distortions(paths, options.size, options.seed)
    except (UserError, PictureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    note(f"{len(triplets)} triplets of {len(paths)} held-out pictures, {options.size} x {options.size}, "
         f"on {describe_device(device)}")
    desired = votes(metric, triplets, device)
    metric_minds = minds(metric, singles, device)
    print(f"agreement, 95% interval; what it minds: {', '.join(KINDS)}")
    print(f"{'':24}{_row(metric_minds)}  ST-LPIPS ({options.trunk})", flush=True)
    results = {}
    for name, distance in distances.items():
        results[name] = agreement(votes(distance, triplets, device) == desired, len(paths))
        results[name] |= {"minds": minds(distance, singles, device), "origin": getattr(distance, "origin", "pixels")}
        print("{agreement:.3f} ({low:.3f} to {high:.3f})  ".format(**results[name])
              + f"{_row(results[name]['minds'])}  {results[name]['origin']}", flush=True)
    print_json({
        "metric": f"ST-LPIPS ({options.trunk})", "metric_minds": metric_minds, "triplets": len(triplets),
        "pictures": len(paths),
        "size": options.size, "seed": options.seed, "results": results, **versions(device),
    })
    return 0


if __name__ == "__main__":
    sys.exit(main())

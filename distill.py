"""`--mode distill`: a network of any widths learns to paint as another one does."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import MAX_PIXELS, normalize
from folders import FailedPictures
from loss import distillation_errors
from network import NetworkConfig, Part, StyleTransferNetwork, align, initialize, level_statistics
from settings import check_needed, refuse, setting
from training.dead_units import DeadUnits
from training.loop import run_training
from training.sampling import MixedPictures, first_pictures
from utils import UserError, autocast_dtype, process_count, save_checkpoint
from weights import STUDENT_NAME, load_network, model_checkpoint

# Settings that a resumed run keeps.
FIXED = ("teacher", "load_path", "new_weights", "vgg_weights", "upsampling", "pooling", "adain_levels")
WARMUP_SHARE = 0.05
HELD_OUT_PICTURES = 128


@dataclass(frozen=True)
class DistillConfig:
    """Every setting of a distillation, with its default; `main.py` makes the flags from it."""

    teacher: str | None = setting(needed=True)
    load_path: str | None = setting(needed=True, more="the one that learns")
    new_weights: bool = False
    vgg_weights: str | None = setting(more="nothing else needs it")
    upsampling: str | None = None  # None: as load_path says
    pooling: str | None = None  # likewise
    adain_levels: int | None = None  # likewise
    content_dir: str | None = None
    style_dir: str | None = None
    save_path: str | None = setting(needed=True)
    resume: bool | str = False  # "auto": where there is a run
    imsize: int = 256
    cropsize: int = setting(96, more="it is cut at a random place, and a multiple of 8")
    max_pixels: int = MAX_PIXELS
    holdout: float = 0.1
    lr: float = setting(1e-3, more="the highest one, between a warm-up and a decay to 0 at --max_iter")
    max_iter: int = 10_000
    batch_size: int = 16
    check_iter: int = 500
    keep_checkpoints: int = 1
    amp: str = setting("auto", more="auto is bf16 on GPUs and CPUs that are fast in it, and off elsewhere")
    seed: int = 0
    num_workers: int | None = None  # None: one a core, at most 8
    gpu_no: int | None = None
    cencrop, cache_dir, wb_mode = False, None, "disabled"  # no settings of this mode

    def check(self) -> None:
        """Raises UserError for settings that make no sense, naming the flag."""
        check_needed(self, "distill")
        refuse({
            f"--cropsize {self.cropsize}: a multiple of 8, 32 or more, is needed":
                self.cropsize < 32 or self.cropsize % 8,
            "--mode distill runs in one process; start it without torchrun": process_count() > 1,
            "--content_dir or --style_dir is needed in distill mode": not (self.content_dir or self.style_dir),
            "--batch_size 1: each picture takes the style of the next one, 2 or more are needed": self.batch_size < 2,
        })


def normalized(part: Part) -> Part:
    """The part with batch normalisation, which takes over the bias, behind every conv with a ReLU."""
    layers = []
    for layer, following in pairwise([*part.layers[0], None]):
        layers.append(layer)
        if isinstance(following, nn.ReLU):
            layers.append(nn.BatchNorm2d(layer.out_channels))
            layers[-1].bias, layer.bias = layer.bias, None
    return Part(nn.Sequential(*layers))


class Student(nn.Module):
    """A style-transfer network with batch normalisation, and the projection of its bottleneck to its teacher's.

    The filters are where it starts. Their scales go: normalisation wakes channels that cutting others left dead.
    """

    def __init__(self, network: StyleTransferNetwork, teacher_width: int) -> None:
        super().__init__()
        self.config = network.config
        self.encoder, self.decoder = normalized(network.encoder), normalized(network.decoder)
        self.projection = nn.Conv2d(network.config.bottleneck_width, teacher_width, 1)

    def folded(self) -> StyleTransferNetwork:
        """The network that does what this one does in evaluation, on the CPU: each conv takes its normalisation in."""
        network, student = StyleTransferNetwork(self.config), copy.deepcopy(self).cpu().eval()
        convs = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
        for layer, following in pairwise([*student.encoder.layers[0], *student.decoder.layers[0], None]):
            if isinstance(layer, nn.Conv2d):
                layer = fuse_conv_bn_eval(layer, following) if isinstance(following, nn.BatchNorm2d) else layer
                next(convs).load_state_dict(layer.state_dict())
        return network


def in_next_style(network: StyleTransferNetwork | Student, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture in the style of the batch's next one, (B, 3, H, W), and the bottleneck feature, (B, C, H/8, W/8).

    pictures: (B, 3, H, W), ImageNet-normalised.
    """
    levels = network.encoder.features(pictures, convs=network.config.level_convs)[::-1]
    mean, std = (statistic.roll(-1, dims=0) for statistic in level_statistics(levels))
    return network.decoder(*align(levels, mean, std)), levels[0]


def rate_share(iteration: int, max_iter: int) -> float:
    """The learning rate's course, 0..1: a linear warm-up, then half a cosine down to 0 behind the last iteration."""
    warmup = math.ceil(WARMUP_SHARE * max_iter)
    if iteration <= warmup:
        return iteration / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (iteration - warmup) / (max_iter + 1 - warmup))


class Distiller:
    """The student of a network, which is to paint as that does and see what it sees; the optimiser and one step."""

    metrics = ("loss", "output_error", "feature_error")  # the first is the sum of the others
    shown = ("loss",)

    def __init__(self, config: DistillConfig, device: torch.device, checkpoint: dict | None = None) -> None:
        """checkpoint: of the run that goes on; `restore` puts its weights back."""
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.held_out: Tensor | None = None  # (n, 3, H, W), uint8, in whole batches, for `report`
        self.amp_dtype = autocast_dtype(config.amp, device)
        if checkpoint is None:
            network, _ = load_network(config.load_path, vgg_weights=config.vgg_weights)
        else:
            network = StyleTransferNetwork(NetworkConfig(**checkpoint["student_config"]))
        teacher, teacher_checkpoint = load_network(config.teacher, flag="--teacher", vgg_weights=config.vgg_weights)
        if teacher.config.stride != network.config.stride:
            raise UserError(f"teacher {config.teacher} is a {teacher.config.backbone} network, with a bottleneck of "
                            f"1/{teacher.config.stride} of the side; this {network.config.backbone} has "
                            f"1/{network.config.stride}")
        self.teacher = teacher.to(device, memory_format=torch.channels_last).requires_grad_(False)
        self.vgg_origin = teacher_checkpoint.get("vgg_weights")
        if config.new_weights:
            initialize(network)
        network.use(config.upsampling, pooling=config.pooling, adain_levels=config.adain_levels)
        student = Student(network, teacher.config.bottleneck_width)
        self.network = student.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.Adam(self.network.parameters(), config.lr, fused=True)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape

    def show(self, pictures: MixedPictures, held_out: Sequence[list[Path]], tallies: Sequence[FailedPictures]) -> None:
        """Have `report` look at the first pictures, and measure some of those held out of each folder."""
        (shown,) = first_pictures(pictures, DeadUnits.PAIRS, tallies)
        self.dead_units = DeadUnits(shown, shown.roll(-1, dims=0))
        if measured := [(each, tally) for each, tally in zip(held_out, tallies) if each]:
            folders, their_tallies = zip(*measured)
            count = max(1, HELD_OUT_PICTURES // self.config.batch_size) * self.config.batch_size
            (self.held_out,) = first_pictures(MixedPictures(folders, self.config), count, their_tallies)

    def errors(self, pictures: Tensor) -> Tensor:
        """pictures: (B, 3, H, W), uint8. Returns `metrics`, (3,): the loss, and what it is the sum of."""
        pictures = normalize(pictures).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            with torch.no_grad():
                target, teacher_feature = in_next_style(self.teacher, pictures)
            output, feature = in_next_style(self.network, pictures)
            projected = self.network.projection(feature)  # (B, C of the teacher, H/8, W/8)
        errors = torch.stack(distillation_errors(output, target, projected, teacher_feature))
        return torch.cat([errors.sum()[None], errors])

    def begin(self, iteration: int) -> None:
        """Set the learning rate for the step of an iteration, counted from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate_share(iteration, self.config.max_iter)

    def step(self, pictures: Tensor, all_terms: bool = True) -> dict[str, Tensor]:
        """One step of Adam. pictures: (B, 3, H, W), uint8. Returns all `metrics`, scalars on the device."""
        errors = self.errors(pictures)
        self.optimizer.zero_grad(set_to_none=True)
        errors[0].backward()
        self.optimizer.step()
        return dict(zip(self.metrics, errors.detach()))

    @torch.no_grad()
    def report(self, folder: Path, iteration: int) -> tuple[dict, None]:
        """Count dead units, measure held-out pictures, normalised as in the export, where there are any, and write the
        student as a model file for `--load_path`. Returns the counts and the `metrics` for metrics.jsonl."""
        network = self.network.folded()
        save_checkpoint(model_checkpoint(network, vgg_weights=self.vgg_origin), folder / STUDENT_NAME)
        row = self.dead_units.count(network.to(self.device))
        if self.held_out is not None:
            self.network.eval()
            errors = [self.errors(pictures.to(self.device)) for pictures in self.held_out.split(self.config.batch_size)]
            self.network.train()
            means = torch.stack(errors).mean(dim=0).tolist()
            row |= {f"held_out_{name}": value for name, value in zip(self.metrics, means)}
        return row, None

    def state(self) -> dict:
        """What a checkpoint needs beside the optimiser to go on."""
        weights = {name: tensor.cpu() for name, tensor in self.network.state_dict().items()}
        return {"state_dict": weights, "vgg_weights": self.vgg_origin, "student_config": asdict(self.network.config)}

    def restore(self, checkpoint: dict) -> None:
        """Put back `state`. Raises UserError when the teacher is not as it was."""
        width = len(checkpoint["state_dict"]["projection.weight"])
        if width != self.network.projection.out_channels:
            raise UserError(f"--resume: --teacher {self.config.teacher} had a bottleneck of {width} channels")
        if checkpoint["state_dict"].keys() != self.network.state_dict().keys():
            raise UserError("--resume: the run is of a version that names its weights otherwise; start it anew")
        self.network.load_state_dict(checkpoint["state_dict"])


def distill(given: dict) -> int:
    """Run `--mode distill` with the flags given on the command line. Returns the exit code."""
    return run_training("distill", DistillConfig, given, FIXED, Distiller, MixedPictures)

"""`--mode distill`: a network of any widths learns to paint as another one does, or as painted pictures show."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import MAX_PIXELS, TRIPLE, FailedPictures, normalize, open_folder, open_triples, split_holdout
from loss import distillation_loss, painted_loss
from network import NetworkConfig, StyleTransferNetwork, adain, channel_statistics, initialize
from settings import setting
from training.loop import Checked, Run, is_finished, open_config
from training.run_folder import CheckpointFolder, WandbRun
from training.sampling import CropConfig, MixedPictures, PaintedTriples, PicturesByPosition, check_failures, collate
from utils import (
    UserError,
    allow_tf32,
    autocast_dtype,
    describe_device,
    note,
    process_count,
    resolve_device,
    save_checkpoint,
    seed_everything,
)
from weights import STUDENT_NAME, find_model_file, load_network, load_teacher, model_checkpoint

FIXED = ("teacher", "load_path", "new_weights", "upsampling", "pooling")  # settings that a resumed run keeps
WARMUP_SHARE = 0.05
HELD_OUT_PICTURES = 128


@dataclass(frozen=True)
class DistillConfig:
    """Every setting of a distillation, with its default; `main.py` makes the flags from it."""

    teacher: str | None = setting(
        needed=True, more="also a folder of pictures, whoever painted them, as "
        f"{', '.join(f'{name}/NAME' for name in TRIPLE)}")
    load_path: str | None = setting(needed=True, more="the one that learns")
    new_weights: bool = False
    upsampling: str | None = None  # None: as load_path says
    pooling: str | None = None  # likewise
    content_dir: str | None = None
    style_dir: str | None = None
    save_path: str | None = setting(needed=True)
    resume: bool | str = False  # "auto": where there is a run
    imsize: int = 256
    cropsize: int = setting(96, more="cut at a random place, a multiple of 8")
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

    def check(self) -> None:
        """Raises UserError for settings that make no sense, naming the flag."""
        if not self.save_path:
            raise UserError("--save_path is needed in distill mode")
        if self.cropsize < 32 or self.cropsize % 8:
            raise UserError(f"--cropsize {self.cropsize}: a multiple of 8, 32 or more, is needed")
        if process_count() > 1:
            raise UserError("--mode distill runs in one process; start it without torchrun")
        if self.resume and not self.teacher:
            return  # the run knows the rest
        if not self.teacher:
            raise UserError("--teacher is needed in distill mode: the network, or the folder of painted pictures, to "
                            "learn from")
        if not self.load_path:
            raise UserError("--load_path is needed in distill mode: the network that learns")
        if self.teacher_is_pictures:
            if self.content_dir or self.style_dir:
                raise UserError(f"--teacher {self.teacher} is a folder with contents and styles of its own; "
                                "--content_dir and --style_dir must not be given with it")
        elif not self.content_dir and not self.style_dir:
            raise UserError("--content_dir or --style_dir is needed in distill mode, where --teacher is a network")
        elif self.batch_size < 2:
            raise UserError("--batch_size 1: each picture is painted in the style of the next one; 2 or more are "
                            "needed")

    @property
    def teacher_is_pictures(self) -> bool:
        """Whether `teacher` is a folder that no network is in."""
        if not Path(self.teacher).is_dir():
            return False
        try:
            find_model_file(self.teacher, "--teacher")
        except UserError:
            return True
        return False


# --------------------------------------------------------------------------------------------- the student


def norms_behind(layers: nn.Sequential) -> nn.ModuleDict:
    """A batch normalisation for every conv of `layers`, by its index; it has the bias in the conv's place."""
    norms = nn.ModuleDict()
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            norm = norms[str(index)] = nn.BatchNorm2d(layer.out_channels)
            norm.bias, layer.bias = layer.bias, None
    return norms


class NormalizedLayers(nn.Module):
    """The layers of an encoder or a decoder, with batch normalisation behind every conv that has a ReLU."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.norms = norms_behind(layers if isinstance(layers[-1], nn.ReLU) else layers[:-1])

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W): an encoder's picture, or a decoder's bottleneck feature, to what the last layer gives."""
        for index, layer in enumerate(self.layers):
            feature = layer(feature)
            if str(index) in self.norms:
                feature = self.norms[str(index)](feature)
        return feature


class Student(nn.Module):
    """A style-transfer network with batch normalisation, and the projection of its bottleneck to its teacher's.

    Of given weights, the filters are where it starts. Their scales go: normalisation wakes channels that cutting
    others left dead.
    """

    def __init__(self, network: StyleTransferNetwork, teacher_width: int | None) -> None:
        """teacher_width: channels of the teacher's bottleneck; None: no projection."""
        super().__init__()
        self.encoder = NormalizedLayers(network.encoder.layers[0])
        self.decoder = NormalizedLayers(network.decoder.layers[0])
        self.projection = None
        if teacher_width is not None:
            self.projection = nn.Conv2d(network.config.bottleneck_width, teacher_width, 1)

    def folded(self, config: NetworkConfig) -> StyleTransferNetwork:
        """The network of `config` that paints as this one does in evaluation, on the CPU."""
        network = StyleTransferNetwork(config)
        for part in ("encoder", "decoder"):
            getattr(network, part).layers[0].load_state_dict(folded_weights(getattr(self, part)))
        return network


def paint(encoder: Callable, decoder: Callable, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture in the style of the batch's next one: all serve as both.

    pictures: (B, 3, H, W), ImageNet-normalised. Returns the outputs, (B, 3, H, W), and the bottleneck feature,
    (B, C, H/8, W/8).
    """
    feature = encoder(pictures)
    mean, std = (statistic.roll(-1, dims=0) for statistic in channel_statistics(feature))
    return decoder(adain(feature, mean, std)), feature


def rate_share(iteration: int, max_iter: int) -> float:
    """The learning rate's course, 0..1: a linear warm-up, then half a cosine down to 0 behind the last iteration."""
    warmup = math.ceil(WARMUP_SHARE * max_iter)
    if iteration <= warmup:
        return iteration / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (iteration - warmup) / (max_iter + 1 - warmup))


def folded_weights(network: NormalizedLayers) -> dict[str, Tensor]:
    """The convs on the CPU, the normalisation behind each, as in evaluation, folded in where there is one.

    Returns float32 tensors keyed `<N>.weight`, `<N>.bias`, N the index in `network.layers`.
    """
    weights = {name: tensor.detach().float().cpu() for name, tensor in network.layers.state_dict().items()}
    for index, norm in network.norms.items():
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = network.layers[int(index)].weight * gain[:, None, None, None]
        weights[f"{index}.weight"] = weight.detach().float().cpu().contiguous()
        weights[f"{index}.bias"] = (norm.bias - norm.running_mean * gain).detach().float().cpu()
    return weights


# ------------------------------------------------------------------------------------------------ the step


class Distiller:
    """The student of a network, which is to paint as that does and see what it sees (`distillation_loss`); the
    optimiser and one step."""

    metrics = ("loss", "output_error", "feature_error")
    shown = ("loss",)

    def __init__(self, config: DistillConfig, device: torch.device, checkpoint: dict | None = None) -> None:
        """checkpoint: of the run that goes on; `restore` puts its weights back."""
        seed_everything(config.seed)
        self.config = config
        self.device = device
        self.held_out: list[Tensor] | None = None  # pictures for `measure`, (n, 3, H, W), uint8, in whole batches
        self.amp_dtype = autocast_dtype(config.amp, device)
        if checkpoint is None:
            network, _ = load_network(config.load_path)
        else:
            network = StyleTransferNetwork(NetworkConfig.from_dict(checkpoint["student_config"]))
        teacher_width = self.open_teacher(network.config)
        if config.new_weights:
            initialize(network, network)
        network.use(config.upsampling, pooling=config.pooling)
        self.network_config = network.config
        self.network = Student(network, teacher_width).to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), config.lr, fused=True)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape

    def open_teacher(self, student: NetworkConfig) -> int | None:
        """Returns the channels of the teacher's bottleneck, None when there is none to match."""
        self.teacher, checkpoint = load_teacher(self.config.teacher, student)
        self.teacher.to(self.device, memory_format=torch.channels_last).requires_grad_(False)
        self.vgg_origin = checkpoint.get("vgg_weights")
        return self.teacher.config.bottleneck_width

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def losses(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """pictures: (B, 3, H, W), uint8. Returns the loss, and `metrics`, (n,), detached."""
        pictures = _as_input(pictures)
        with self.autocast():
            with torch.no_grad():
                target, teacher_feature = paint(self.teacher.encoder, self.teacher.decoder, pictures)
            output, feature = paint(self.network.encoder, self.network.decoder, pictures)
            projected = self.network.projection(feature)  # (B, C of the teacher, H/8, W/8)
        square = teacher_feature.float().square().mean()
        loss = distillation_loss(output, target, projected, teacher_feature, square)
        output_error = F.mse_loss(output.detach().float(), target.float())
        return loss, torch.stack([loss.detach(), output_error, loss.detach() - output_error])

    def begin(self, iteration: int) -> None:
        """Set the learning rate for the step of an iteration, counted from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate_share(iteration, self.config.max_iter)

    def step(self, *pictures: Tensor, all_terms: bool = True) -> dict[str, Tensor]:
        """One step of AdamW. pictures: the arguments of `losses`. Returns `metrics`, all of them at every step, as
        scalars on the device."""
        loss, metrics = self.losses(*pictures)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return dict(zip(self.metrics, metrics))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`metrics` of the held-out pictures, normalised as in the export; empty where none are held out."""
        if self.held_out is None:
            return {}
        self.network.eval()
        batches = zip(*(pictures.split(self.config.batch_size) for pictures in self.held_out))
        metrics = [self.losses(*(pictures.to(self.device) for pictures in batch))[1] for batch in batches]
        self.network.train()
        means = torch.stack(metrics).mean(dim=0).tolist()
        return {f"held_out_{name}": value for name, value in zip(self.metrics, means)}

    def check(self, folder: Path, iteration: int) -> Checked:
        """Measure held-out pictures; write the student as a model file for `--load_path`, the normalisations folded
        in."""
        network = self.network.folded(self.network_config)
        save_checkpoint(model_checkpoint(network, vgg_weights=self.vgg_origin), folder / STUDENT_NAME)
        return Checked(self.measure(), None)

    def state(self) -> dict:
        """What a checkpoint needs to go on."""
        weights = {name: tensor.cpu() for name, tensor in self.network.state_dict().items()}
        return {"state_dict": weights, "optimizer": self.optimizer.state_dict(), "vgg_weights": self.vgg_origin,
                "student_config": self.network_config.to_dict()}

    def restore(self, checkpoint: dict) -> None:
        """Put back `state`. Raises UserError when the teacher is not as it was."""
        projection = checkpoint["state_dict"].get("projection.weight")
        width = None if projection is None else len(projection)
        if width != (None if self.network.projection is None else self.network.projection.out_channels):
            raise UserError(f"--resume: --teacher {self.config.teacher} is not the one that the run began with: "
                            f"its bottleneck had {width} channels")
        self.network.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])


class PaintedDistiller(Distiller):
    """The student of pictures painted by anyone, which is to paint them pixel by pixel (`painted_loss`)."""

    metrics = ("loss",)

    def open_teacher(self, student: NetworkConfig) -> None:
        self.vgg_origin = None  # no VGG has a part in it

    def losses(self, content: Tensor, style: Tensor, painted: Tensor) -> tuple[Tensor, Tensor]:
        """content, style, painted: (B, 3, H, W), uint8. Returns the loss, and `metrics`, (1,), detached."""
        pictures = _as_input(torch.cat([content, style]))
        with self.autocast():
            content_feature, style_feature = self.network.encoder(pictures).chunk(2)
            output = self.network.decoder(adain(content_feature, *channel_statistics(style_feature)))
        loss = painted_loss(output, normalize(painted))
        return loss, loss.detach()[None]


def _as_input(pictures: Tensor) -> Tensor:
    """(B, 3, H, W), uint8, to ImageNet-normalised, in the memory format of the networks."""
    return normalize(pictures).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- mode


def distill(given: dict) -> int:
    """Run `--mode distill` with the flags given on the command line. Returns the exit code."""
    config, checkpoint = open_config("distill", DistillConfig, given, FIXED)
    device = resolve_device(config.gpu_no)
    allow_tf32(True)
    if is_finished(config, checkpoint):
        return 0
    opened, by_position = _open_pictures(config)
    with CheckpointFolder.of_run(config.save_path, config.keep_checkpoints, checkpoint is not None) as folder:
        kind = PaintedDistiller if config.teacher_is_pictures else Distiller
        trainer = kind(config, device, checkpoint)
        tallies = [tally for _, tally in opened]
        folders, held_out = zip(*(split_holdout(paths, config.holdout) for paths, _ in opened))
        measured = [(paths, tally) for paths, tally in zip(held_out, tallies) if paths]
        if measured:
            trainer.held_out = _always_the_same(measured, by_position, config.batch_size)
        counts = [len(paths) for paths in folders]
        precision = "float32" if trainer.amp_dtype is None else "bfloat16"
        note(f"distilling on {describe_device(device)}, {precision}; {sum(counts)} pictures")
        pictures = by_position(folders)
        return Run("distill", config, trainer, folder, pictures, tallies, counts, WandbRun.none(), checkpoint).loop()


def _open_pictures(
    config: DistillConfig,
) -> tuple[list[tuple[list[Path], FailedPictures]], Callable[[Sequence[list[Path]]], PicturesByPosition]]:
    """The pictures of each folder with the tally of its failures, and what makes crops by position of such pictures."""
    crop = CropConfig(config.imsize, config.cropsize, False, config.max_pixels)
    if config.teacher_is_pictures:
        partners, tally = open_triples(config.teacher, "--teacher", crop.shorter_side, config.max_pixels,
                                       config.save_path)
        by_position = partial(PaintedTriples, crop=crop, seed=config.seed, partners=partners)
        return [(list(partners), tally)], by_position
    opened = [open_folder(getattr(config, flag), f"--{flag}", config.max_pixels, config.save_path)
              for flag in ("content_dir", "style_dir") if getattr(config, flag)]
    return opened, partial(MixedPictures, crop=crop, seed=config.seed)


def _always_the_same(
    measured: list[tuple[list[Path], FailedPictures]], by_position: Callable, batch_size: int
) -> list[Tensor]:
    """Crops of held-out pictures, (n, 3, H, W), uint8, each, in whole batches."""
    pictures = by_position([paths for paths, _ in measured])
    count = max(1, HELD_OUT_PICTURES // batch_size) * batch_size
    *crops, failures = collate([pictures[position] for position in range(count)])
    check_failures(failures, [tally for _, tally in measured])
    return crops

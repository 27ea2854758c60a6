"""`--mode pretrain`: learn the VGG19 encoder from pictures alone, without labels, then a decoder to start from; or
teach a narrow network what a larger one does."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import (
    MAX_PIXELS,
    CropConfig,
    PictureError,
    ViewPairs,
    check_failures,
    collate,
    normalize,
    open_folder,
    prepare_picture,
    split_holdout,
    training_loader,
)
from loss import VIEW_LOSSES, distillation_loss, found_share, relative_std
from network import (
    LossNetwork,
    NetworkConfig,
    StyleTransferNetwork,
    adain,
    build_from_vgg,
    channel_statistics,
    initialize,
    load_network,
    load_teacher,
    load_vgg,
    model_checkpoint,
)
from utils import (
    CHECKPOINT_FORMAT,
    CheckpointFolder,
    MetricFile,
    UserError,
    autocast_dtype,
    catch_stop_signals,
    compare_resumed,
    describe_device,
    note,
    process_count,
    progress_bar,
    resolve_device,
    save_checkpoint,
    seed_everything,
)

EXPORT_NAME, DECODER_EXPORT_NAME, STUDENT_EXPORT_NAME = "vgg19_features.pth", "autoencoder.pth", "student.pth"
TAPS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
METRICS = ("loss", *(f"{name}_{tap}" for name in ("loss", "reconstruction", "std", "match") for tap in TAPS))

GRID = 4  # places a side at which two views are compared
HEAD_WIDTH, EMBEDDING_WIDTH = 512, 128
WARMUP_SHARE = 0.05
HELD_OUT_PAIRS = 128
SCALE_PICTURES = 32


@dataclass(frozen=True)
class PretrainConfig:
    """Every setting of a pretraining run, with its default; `main.py` makes the flags from it."""

    content_dir: str | None = None
    style_dir: str | None = None
    save_path: str | None = None
    resume: bool = False
    imsize: int = 256
    cropsize: int = 96
    max_pixels: int = MAX_PIXELS
    vgg_weights: str | None = None  # None: learn them; else a decoder for them is learned
    teacher: str | None = None  # not None: the network of `load_path` learns to do what it does
    load_path: str | None = None
    new_weights: bool = False
    upsampling: str | None = None  # None: as load_path says, or nearest
    holdout: float = 0.1
    view_strength: float = 0.4
    view_loss: str = "vicreg"
    reconstruction_weight: float = 25.0
    lr: float = 1e-3
    weight_decay: float = 1e-2
    max_iter: int = 10_000
    batch_size: int = 64
    check_iter: int = 500
    keep_checkpoints: int = 1
    amp: str = "auto"
    seed: int = 0
    num_workers: int | None = None  # None: one a core, at most 8
    gpu_no: int | None = None

    def check(self) -> None:
        """Raises UserError for settings that make no sense, naming the flag."""
        if not self.save_path:
            raise UserError("--save_path is needed in pretrain mode")
        if not self.resume and not self.content_dir and not self.style_dir:
            raise UserError("--content_dir or --style_dir is needed in pretrain mode")
        if self.cropsize < 32 or self.cropsize % 8:
            raise UserError(f"--cropsize {self.cropsize}: a multiple of 8, 32 or more, is needed")
        if process_count() > 1:
            raise UserError("--mode pretrain runs in one process; start it without torchrun")
        if (self.teacher is None) != (self.load_path is None):
            raise UserError("--teacher and --load_path are needed together in pretrain mode: the network that is "
                            "learned from, and the one that learns")
        if self.teacher and self.vgg_weights:
            raise UserError("--teacher and --vgg_weights: give one of the two in pretrain mode")
        if self.new_weights and not self.load_path:
            raise UserError("--new_weights: --load_path says the network whose widths to start with")
        if self.upsampling and not (self.teacher or self.vgg_weights):
            raise UserError(f"--upsampling {self.upsampling}: a VGG has no decoder; give --vgg_weights, to learn a "
                            "decoder for it, or --teacher and --load_path")
        if self.teacher and self.batch_size < 2:
            raise UserError("--batch_size 1: with --teacher, each picture is painted in the style of the next one; "
                            "2 or more are needed")


def pool_places(feature: Tensor, part: Tensor) -> Tensor:
    """Means of the feature over GRID x GRID places of the common part, the same place in the same row for
    both views.

    feature: (B, C, H, W); part: (B, 5), see `common_part`. Returns (B * GRID**2, C).
    """
    left, top, right, bottom, flipped = part.unbind(dim=1)
    down = _cell_shares(top, bottom, feature.shape[2])  # (B, GRID, H)
    across = _cell_shares(left, right, feature.shape[3])  # (B, GRID, W)
    across = torch.where(flipped[:, None, None] > 0, across.flip(1), across)
    pooled = torch.einsum("bgh,bchw,bkw->bgkc", down.to(feature.dtype), feature, across.to(feature.dtype))
    return pooled.flatten(0, 2)


def _cell_shares(low: Tensor, high: Tensor, size: int) -> Tensor:
    """How much of each of GRID cells between `low` and `high`, (B,), as shares, falls on each of `size`
    positions. Returns (B, GRID, size), rows of sum 1."""
    steps = torch.arange(GRID + 1, device=low.device) / GRID
    edges = (low[:, None] + (high - low)[:, None] * steps) * size  # (B, GRID + 1)
    edges = edges[:, :, None]
    position = torch.arange(size, device=low.device)
    shares = (torch.minimum(edges[:, 1:], position + 1) - torch.maximum(edges[:, :-1], position)).clamp(min=0.0)
    return shares / shares.sum(dim=2, keepdim=True)


# ------------------------------------------------------------------------------------------------ the step


def norms_behind(layers: nn.Sequential) -> nn.ModuleDict:
    """A batch normalisation for every conv of `layers`, by its index; it has the bias in the conv's place."""
    norms = nn.ModuleDict()
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            norm = norms[str(index)] = nn.BatchNorm2d(layer.out_channels)
            norm.bias, layer.bias = layer.bias, None
    return norms


class PretrainNetwork(nn.Module):
    """VGG19 to relu4_1 with batch normalisation behind every conv; at each tap a projection head, and a linear
    map from each position's channels to the square of pixels behind it."""

    def __init__(self) -> None:
        super().__init__()
        vgg = LossNetwork("vgg19")
        self.layers = vgg.layers.requires_grad_(True)  # numbered as in torchvision's `vgg.features`
        self.taps = vgg.taps
        self.norms = norms_behind(self.layers)
        for index in self.norms:
            nn.init.kaiming_normal_(self.layers[int(index)].weight, nonlinearity="relu")
            nn.init.zeros_(self.norms[index].bias)
        widths = [self.layers[index - 1].out_channels for index in self.taps.values()]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, HEAD_WIDTH),
                nn.BatchNorm1d(HEAD_WIDTH),
                nn.ReLU(),
                nn.Linear(HEAD_WIDTH, EMBEDDING_WIDTH),
            )
            for width in widths
        )
        self.painters = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 3 * 4**poolings, 1), nn.PixelShuffle(2**poolings))
            for poolings, width in enumerate(widths)  # a pooling lies between two taps
        )

    def forward(self, image: Tensor, part: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """image: (B, 3, H, W), ImageNet-normalised; part: (B, 5), see `common_part`. Returns the embeddings
        of each tap, (B * GRID**2, EMBEDDING_WIDTH), and the reconstructions from each, (B, 3, H, W)."""
        embeddings, reconstructions = [], []
        ends = iter(zip(self.heads, self.painters))
        for index, layer in enumerate(self.layers):
            image = layer(image)
            if str(index) in self.norms:
                image = self.norms[str(index)](image)
            if index in self.taps.values():
                head, painter = next(ends)
                embeddings.append(head(pool_places(image, part)))
                reconstructions.append(painter(image))
        return embeddings, reconstructions


class Pretrainer:
    """The VGG that is learned, the optimiser and one step."""

    metrics = METRICS
    vgg_origin = None  # the weights are new

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        seed_everything(config.seed)
        self.config = config
        self.device = device
        self.amp_dtype = autocast_dtype(config.amp, device)
        self.network = self.build().to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
        )
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape

    def build(self) -> nn.Module:
        return PretrainNetwork()

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def losses(self, views: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """views: (B, 2, 3, H, W), uint8; parts: (B, 2, 5). Returns the loss, and `metrics`, (n,), detached."""
        pictures = _as_pictures(views)
        with self.autocast():
            embeddings, reconstructions = self.network(pictures, parts.flatten(0, 1))
        losses, stds, matches = [], [], []
        for embedding in embeddings:
            by_view = embedding.unflatten(0, (len(views), 2, GRID**2)).transpose(0, 1)
            first, second = by_view.flatten(1, 2)  # (B * GRID**2, D) each
            losses.append(VIEW_LOSSES[self.config.view_loss](first, second))
            with torch.no_grad():
                stds.append(relative_std(torch.cat([first, second])))
                matches.append(found_share(first, second))
        errors = [F.mse_loss(reconstruction.float(), pictures) for reconstruction in reconstructions]
        loss = torch.stack(losses).mean() + self.config.reconstruction_weight * torch.stack(errors).mean()
        return loss, torch.stack([loss, *losses, *errors, *stds, *matches]).detach()

    def step(self, views: Tensor, parts: Tensor, iteration: int) -> Tensor:
        """One step of AdamW. Returns `metrics`, (n,), on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate_share(iteration, self.config.max_iter)
        loss, metrics = self.losses(views, parts)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return metrics

    @torch.no_grad()
    def measure(self, views: Tensor, parts: Tensor) -> dict[str, float]:
        """`metrics` of held-out pictures, normalised as in the export. views: (n, 2, 3, H, W), whole batches."""
        self.network.eval()
        size = self.config.batch_size
        metrics = [
            self.losses(views[start : start + size].to(self.device), parts[start : start + size].to(self.device))[1]
            for start in range(0, len(views), size)
        ]
        self.network.train()
        means = torch.stack(metrics).mean(dim=0).tolist()
        return {f"held_out_{name}": value for name, value in zip(self.metrics, means)}

    def export(self, folder: Path, scale_pictures: Tensor) -> None:
        """Write the weights for `--vgg_weights`. scale_pictures: see `export_weights`."""
        save_checkpoint(export_weights(self.network, scale_pictures, self.device), folder / EXPORT_NAME)


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


class DecoderPretrainer(Pretrainer):
    """The full decoder that is learned for a given VGG: it is to give the views back that the encoder saw.

    Batch normalisation makes that quick, and is folded into the convolutions that `--mode train` goes on with.
    """

    metrics = ("loss",)

    def build(self) -> nn.Module:
        vgg, self.vgg_origin = load_vgg("vgg19", self.config.vgg_weights, self.config.seed)
        network, _ = build_from_vgg(NetworkConfig.full(), vgg)
        network.use_upsampling(self.config.upsampling)
        self.network_config = network.config
        self.encoder = network.encoder.to(self.device, memory_format=torch.channels_last).requires_grad_(False)
        return NormalizedLayers(network.decoder.layers[0])

    def losses(self, views: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """views: (B, 2, 3, H, W), uint8. Returns the mean squared error of all of them, and `metrics`, (1,)."""
        pictures = _as_pictures(views)
        with self.autocast():
            with torch.no_grad():
                feature = self.encoder(pictures)
            output = self.network(feature)
        loss = F.mse_loss(output.float(), pictures)
        return loss, loss.detach()[None]

    def export(self, folder: Path, scale_pictures: None) -> None:
        """Write encoder and decoder as a model file for `--load_path`; nothing is scaled."""
        network = StyleTransferNetwork(self.network_config)
        network.encoder.load_state_dict(self.encoder.state_dict())
        network.decoder.layers[0].load_state_dict(folded_weights(self.network))
        save_checkpoint(model_checkpoint(network, vgg_weights=self.vgg_origin), folder / DECODER_EXPORT_NAME)


class Student(nn.Module):
    """A style-transfer network with batch normalisation, and the projection of its bottleneck to its teacher's."""

    def __init__(self, network: StyleTransferNetwork, teacher_width: int) -> None:
        super().__init__()
        self.encoder = NormalizedLayers(network.encoder.layers[0])
        self.decoder = NormalizedLayers(network.decoder.layers[0])
        self.projection = nn.Conv2d(network.config.bottleneck_width, teacher_width, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """See `paint`. Returns the outputs and the projected bottleneck feature, (B, teacher_width, H/8, W/8)."""
        output, feature = paint(self.encoder, self.decoder, pictures)
        return output, self.projection(feature)


def paint(encoder: Callable, decoder: Callable, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Each of two views, in the style of the same view of the batch's next picture: all serve as both.

    pictures: (2B, 3, H, W), ImageNet-normalised, two views of a picture behind each other. Returns the outputs,
    (2B, 3, H, W), and the bottleneck feature, (2B, C, H/8, W/8).
    """
    feature = encoder(pictures)
    mean, std = (statistic.roll(-2, dims=0) for statistic in channel_statistics(feature))
    return decoder(adain(feature, mean, std)), feature


class StudentPretrainer(Pretrainer):
    """The network of any widths that is to paint as its teacher does, and see what it sees (`distillation_loss`).

    Of given weights, the filters are where it starts. Their scales go: normalisation wakes channels that cutting
    others left dead (README, Compact every layer).
    """

    metrics = ("loss", "output_error", "feature_error")

    def build(self) -> nn.Module:
        network, _ = load_network(self.config.load_path)
        self.teacher, checkpoint = load_teacher(self.config.teacher, network.config)
        self.teacher.to(self.device, memory_format=torch.channels_last).requires_grad_(False)
        self.vgg_origin = checkpoint.get("vgg_weights")
        if self.config.new_weights:
            initialize(network, network)
        network.use_upsampling(self.config.upsampling)
        self.network_config = network.config
        return Student(network, self.teacher.config.bottleneck_width)

    def losses(self, views: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """views: (B, 2, 3, H, W), uint8. Returns the loss and `metrics`, (3,), detached."""
        pictures = _as_pictures(views)
        with self.autocast():
            with torch.no_grad():
                targets = paint(self.teacher.encoder, self.teacher.decoder, pictures)
            output, projected = self.network(pictures)
        square = targets[1].float().square().mean()
        loss = distillation_loss(output, targets[0], projected, targets[1], square)
        output_error = F.mse_loss(output.detach().float(), targets[0].float())
        return loss, torch.stack([loss.detach(), output_error, loss.detach() - output_error])

    def export(self, folder: Path, scale_pictures: None) -> None:
        """Write the student as a model file for `--load_path`, the normalisations folded in; nothing is scaled."""
        network = StyleTransferNetwork(self.network_config)
        for part in ("encoder", "decoder"):
            layers = getattr(network, part).layers[0]
            layers.load_state_dict(folded_weights(getattr(self.network, part)))
        save_checkpoint(model_checkpoint(network, vgg_weights=self.vgg_origin), folder / STUDENT_EXPORT_NAME)


def _as_pictures(views: Tensor) -> Tensor:
    """(B, 2, 3, H, W), uint8, to (2B, 3, H, W), ImageNet-normalised."""
    return normalize(views.flatten(0, 1)).contiguous(memory_format=torch.channels_last)


def rate_share(iteration: int, max_iter: int) -> float:
    """The learning rate's course, 0..1: a linear warm-up, then half a cosine down to 0 behind the last iteration."""
    warmup = math.ceil(WARMUP_SHARE * max_iter)
    if iteration <= warmup:
        return iteration / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (iteration - warmup) / (max_iter + 1 - warmup))


# ----------------------------------------------------------------------------------------------- export


def folded_weights(network: PretrainNetwork | NormalizedLayers) -> dict[str, Tensor]:
    """The convs on the CPU, the normalisation behind each, as in evaluation, folded in where there is one.

    Returns float32 tensors keyed `<N>.weight`, `<N>.bias`, N the index in `network.layers`, in a VGG that of
    torchvision's `vgg.features`.
    """
    weights = {name: tensor.detach().float().cpu() for name, tensor in network.layers.state_dict().items()}
    for index, norm in network.norms.items():
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = network.layers[int(index)].weight * gain[:, None, None, None]
        weights[f"{index}.weight"] = weight.detach().float().cpu().contiguous()
        weights[f"{index}.bias"] = (norm.bias - norm.running_mean * gain).detach().float().cpu()
    return weights


@torch.no_grad()
def mean_activations(weights: dict[str, Tensor], pictures: Tensor, device: torch.device) -> list[float]:
    """The mean behind every ReLU of a VGG19, over channels, positions and pictures.

    pictures: (n, 3, H, W), uint8.
    """
    network = LossNetwork("vgg19").to(device)
    network.layers.load_state_dict(weights)
    sums = None
    for picture in pictures.split(4):
        feature, means = normalize(picture.to(device)), []
        for layer in network.layers:
            feature = layer(feature)
            if isinstance(layer, nn.ReLU):
                means.append(feature.mean() * len(picture))
        sums = torch.stack(means) if sums is None else sums + torch.stack(means)
    return (sums / len(pictures)).tolist()


def rescale(weights: dict[str, Tensor], means: list[float]) -> dict[str, Tensor]:
    """The same VGG, with every feature divided by its layer's mean activation (Gatys et al., CVPR 2016, sec. 2,
    there per filter).

    ReLU and max pooling commute with a positive factor, so each conv takes its input's factor back out.
    weights: keyed `<N>.weight`, `<N>.bias`; means: > 0, one a conv, in order.
    """
    rescaled, before = {}, 1.0
    for key, mean in zip([key for key in weights if key.endswith(".weight")], means):
        bias = key.replace("weight", "bias")
        rescaled[key] = weights[key] * (before / mean)
        rescaled[bias] = weights[bias] / mean
        before = mean
    return rescaled


def export_weights(network: PretrainNetwork, pictures: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The encoder for `--vgg_weights`: torchvision's keys, half precision, mean activations of one on `pictures`.

    Raises UserError when a layer is dead, or a value does not fit half precision.
    """
    weights = folded_weights(network)
    means = mean_activations(weights, pictures, device)
    if not all(0 < mean < math.inf for mean in means):
        raise UserError(f"mean activations {means}: a layer is dead or not finite; a lower --lr may help")
    halved = {f"features.{key}": tensor.half() for key, tensor in rescale(weights, means).items()}
    for key, tensor in halved.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key} does not fit half precision; a lower --lr may help")
    return halved


# ------------------------------------------------------------------------------------------ start, resume


def resume_config(given: dict) -> tuple[PretrainConfig, dict]:
    """The settings of the run in `--save_path`, changed by the flags given now, and its newest checkpoint.

    Raises UserError when there is none.
    """
    checkpoint = CheckpointFolder.load_newest(given.get("save_path"))
    stored = checkpoint.get("pretrain_config")
    if not isinstance(stored, dict):
        raise UserError(f"--resume: --save_path {given['save_path']} holds no pretraining run")
    known = {field.name for field in fields(PretrainConfig)}
    stored = {name: value for name, value in stored.items() if name in known}
    fixed = ("vgg_weights", "teacher", "load_path", "new_weights", "upsampling")
    compare_resumed(given, asdict(PretrainConfig()) | stored, fixed)
    return PretrainConfig(**{**stored, **given, "resume": True}), checkpoint


def pretrain(given: dict) -> int:
    """Run `--mode pretrain` with the flags given on the command line. Returns the exit code."""
    checkpoint = None
    config = PretrainConfig(**given)
    if config.resume:
        config, checkpoint = resume_config(given)
    config.check()
    folder = CheckpointFolder.of_run(config.save_path, config.keep_checkpoints, is_resumed=checkpoint is not None)
    if checkpoint and checkpoint["iteration"] >= config.max_iter:
        note(f"the run in {config.save_path} has done its {checkpoint['iteration']} iterations; "
             "a larger --max_iter goes on")
        return 0
    run = _Run(config, folder, checkpoint)
    try:
        return run.loop()
    finally:
        for tally in run.tallies:
            note(tally.summary())


class _Run:
    """What a running pretraining holds; `loop` is the pretraining."""

    def __init__(self, config: PretrainConfig, folder: CheckpointFolder, checkpoint: dict | None) -> None:
        self.config = config
        self.folder = folder
        kind = DecoderPretrainer if config.vgg_weights else StudentPretrainer if config.teacher else Pretrainer
        self.trainer = kind(config, resolve_device(config.gpu_no))
        self.iteration = self.samples_seen = self.steps = 0
        # Over `steps`, since the last check.
        self.sums = torch.zeros(len(self.trainer.metrics), device=self.trainer.device)
        held_out = self._open_folders(scales=kind is Pretrainer)
        self.metrics = MetricFile(Path(config.save_path) / "metrics.jsonl")
        if checkpoint:
            self.restore(checkpoint)
        self.metrics.truncate_after(self.iteration)
        precision = "float32" if self.trainer.amp_dtype is None else "bfloat16"
        note(f"pretraining on {describe_device(self.trainer.device)}, {precision}; "
             f"{sum(self.picture_counts)} pictures, {held_out} more are held out")

    def _open_folders(self, scales: bool) -> int:
        """Find the pictures and split them. Returns how many are held out."""
        config = self.config
        folders, held_out, self.tallies = [], [], []
        for flag in ("content_dir", "style_dir"):
            if getattr(config, flag):
                paths, tally = open_folder(getattr(config, flag), f"--{flag}", config.max_pixels)
                self.tallies.append(tally)
                for lists, part in zip((folders, held_out), split_holdout(paths, config.holdout)):
                    lists.append(part)
        self.picture_counts = [len(paths) for paths in folders]
        crop = CropConfig(config.imsize, config.cropsize, False, config.max_pixels)
        self.pairs = ViewPairs(folders, crop, config.seed, config.view_strength)
        self.held_out = None  # or always the same views and their common parts, in whole batches
        measured = [(paths, tally) for paths, tally in zip(held_out, self.tallies) if paths]
        if measured:
            pairs = ViewPairs([paths for paths, _ in measured], crop, config.seed, config.view_strength)
            count = max(1, HELD_OUT_PAIRS // config.batch_size) * config.batch_size
            *self.held_out, failures = collate([pairs[position] for position in range(count)])
            check_failures(failures, [tally for _, tally in measured])
        self.scale_pictures = _scale_pictures(sum(folders, []), config) if scales else None
        return sum(map(len, held_out))

    def restore(self, checkpoint: dict) -> None:
        if checkpoint.get("vgg_weights") != self.trainer.vgg_origin:
            raise UserError(f"--resume: the run was started with VGG weights {checkpoint.get('vgg_weights')}, "
                            f"now they are {self.trainer.vgg_origin}")
        self.trainer.network.load_state_dict(checkpoint["state_dict"])
        self.trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        self.iteration, self.samples_seen = checkpoint["iteration"], checkpoint["samples_seen"]
        self.steps = checkpoint["metric_steps"]
        self.sums.copy_(checkpoint["metric_sums"])
        if checkpoint["picture_counts"] != self.picture_counts:
            note(f"the folders changed: {self.picture_counts} pictures to learn from, {checkpoint['picture_counts']} "
                 "before; other pictures will be drawn than without the interruption")

    def loop(self) -> int:
        """The iterations up to max_iter. Returns the exit code: 0, or 128 + the signal that stopped it."""
        config, device = self.config, self.trainer.device
        workers = config.num_workers if config.num_workers is not None else min(8, os.cpu_count())
        left = (config.max_iter - self.iteration) * config.batch_size
        positions = range(self.samples_seen, self.samples_seen + left)
        loader = training_loader(self.pairs, positions, config.batch_size, workers, device.type == "cuda")
        bar = progress_bar(config.max_iter, "pretrain", "it", initial=self.iteration)
        with bar, catch_stop_signals() as stop:
            for views, parts, failures in loader:
                check_failures(failures, self.tallies)
                views, parts = (batch.to(device, non_blocking=True) for batch in (views, parts))
                self.iteration += 1
                latest = self.trainer.step(views, parts, self.iteration)
                self.sums += latest
                self.steps += 1
                self.samples_seen += config.batch_size
                is_check = self.iteration % config.check_iter == 0 or self.iteration == config.max_iter
                if device.type == "cpu" or is_check or stop:
                    self.raise_if_bad()
                    bar.set_postfix_str(f"loss {latest[0]:.4f}", refresh=False)
                if is_check:
                    self.check()
                elif stop:
                    self.save()
                bar.update()
                if stop and self.iteration < config.max_iter:
                    break
            else:
                return 0
        note(f"stopped after iteration {self.iteration}, saved; go on with: "
             f"python main.py --mode pretrain --resume --save_path {config.save_path}")
        return stop.exit_code

    def raise_if_bad(self) -> None:
        """Raises UserError when a loss since the last check was not finite."""
        if not self.sums.isfinite().all():
            raise UserError(f"iteration {self.iteration}: the loss is not finite; {self.folder.last_good}. "
                            "A lower --lr may help")

    def check(self) -> None:
        """Every `check_iter`: metrics, what was learned as a file for training, a checkpoint."""
        row = {"iteration": self.iteration, **dict(zip(self.trainer.metrics, (self.sums / self.steps).tolist()))}
        self.sums.zero_()
        self.steps = 0
        if self.held_out:
            row |= self.trainer.measure(*self.held_out)
        self.trainer.export(Path(self.config.save_path), self.scale_pictures)
        self.metrics.append(row)
        self.save()

    def save(self) -> None:
        """Write the checkpoint. There is no random state in it: pictures go by position, and a step draws nothing.

        Raises UserError, and writes nothing, when a weight is not finite.
        """
        state_dict = {name: tensor.cpu() for name, tensor in self.trainer.network.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in state_dict.values()):
            raise UserError(f"iteration {self.iteration}: a weight is not finite; the checkpoint was not written, "
                            f"{self.folder.newest} is untouched. A lower --lr may help")
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "iteration": self.iteration,
            "pretrain_config": asdict(self.config),
            "vgg_weights": self.trainer.vgg_origin,
            "state_dict": state_dict,
            "optimizer": self.trainer.optimizer.state_dict(),
            "metric_sums": self.sums.cpu(),
            "metric_steps": self.steps,
            "samples_seen": self.samples_seen,
            "picture_counts": self.picture_counts,
        }
        self.folder.save(checkpoint, self.iteration)


def _scale_pictures(paths: list[Path], config: PretrainConfig) -> Tensor:
    """Squares from the middle of SCALE_PICTURES pictures, unaltered: (n, 3, H, W), uint8."""
    side = max(8, config.imsize // 8 * 8)
    squares = []
    for path in paths[:: max(1, len(paths) // SCALE_PICTURES)]:
        try:
            squares.append(prepare_picture(path, side, side, config.max_pixels))
        except PictureError:
            continue  # counted where the run draws it
    return torch.cat(squares)

"""`--mode train`: learn style transfer while the channel and xor losses switch channels off."""

import os
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import loss as losses
from compact import COMPACT_LAYERS, ChannelCensus, CompactLosses, Epsilon, TargetSteering, range_of_macs
from data import (
    MAX_PIXELS,
    CropConfig,
    FailedPictures,
    PictureCache,
    TrainingPictures,
    check_failures,
    collate,
    normalize,
    open_folder,
    picture_grid,
    save_picture,
    shard_positions,
    split_holdout,
    training_loader,
)
from muon import Muon
from network import (
    LossNetwork,
    NetworkConfig,
    StyleTransferNetwork,
    adain,
    build_from_vgg,
    build_loss_network,
    channel_statistics,
    initialize,
)
from runfolder import CheckpointFolder, MetricFile, WandbRun, compare_resumed
from utils import (
    UserError,
    any_process,
    autocast_dtype,
    average_over_processes,
    catch_stop_signals,
    describe_device,
    gather_with_gradient,
    is_first_process,
    make_folder,
    note,
    process_count,
    process_group,
    process_rank,
    progress_bar,
    random_state,
    resolve_device,
    restore_random_state,
    seed_everything,
)
from weights import load_network, load_teacher, load_vgg, model_checkpoint

TERMS = ("content", "style", "uncorrelation", "channel", "xor")
METRICS = (*TERMS, "total", "nonzero_channels", "channels_off_for_all", "channels_off_for_some")
PREVIEW_PICTURES = 4
CENSUS_MEMORY = 100  # batches
OPTIMIZERS = ("adam", "muon")
STOP_INTERVAL = 16  # iterations on GPUs between two askings whether another process was told to stop


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run, with its default; `main.py` makes the flags from it."""

    content_dir: str | None = None
    style_dir: str | None = None
    save_path: str | None = None
    load_path: str | None = None
    new_weights: bool = False
    resume: bool = False
    backbone: str = "vgg19"
    swap_max_pool: bool = False
    upsampling: str | None = None  # None: as --load_path says, or nearest
    padding: str | None = None  # None: as --load_path says, or zeros
    vgg_weights: str = "imagenet"
    imsize: int = 512
    cropsize: int = 256
    cencrop: bool = False
    max_pixels: int = MAX_PIXELS
    cache_dir: str | None = None
    holdout: float = 0.0
    lr: float = 1e-4
    encoder_lr: float | None = None  # None: lr
    decoder_lr: float | None = None  # None: lr
    optimizer: str = "adam"
    warmup_iter: int = 0
    decay_iter: int = 0
    max_iter: int = 80_000
    batch_size: int = 16
    style_loss: str = "meanstd"
    style_loss_weight: float = 100.0
    uncorrelation_loss_weight: float = 0.01
    channel_loss_weight: float = 1.0
    xor_loss_weight: float = 1.0
    l0_eps: float | str = losses.L0_EPS  # a number, or relative:NUMBER, see compact.Epsilon
    compact_layers: str = "bottleneck"
    compact_cost: str = "count"
    target_macs: float | None = None  # None: the channel loss keeps its weight
    teacher: str | None = None
    teacher_weight: float = 1.0
    check_iter: int = 500
    keep_checkpoints: int = 3
    amp: str = "auto"
    compile: bool = False
    seed: int = 0
    num_workers: int | None = None  # None: one a core, at most 8
    gpu_no: int | None = None
    wb_mode: str = "auto"
    wb_project: str = "compact_image_style_transfer"
    wb_name: str | None = None
    wb_notes: str | None = None
    wb_tags: tuple[str, ...] | None = None

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each part; 0 freezes it."""
        return {
            "encoder": self.lr if self.encoder_lr is None else self.encoder_lr,
            "decoder": self.lr if self.decoder_lr is None else self.decoder_lr,
        }

    def rate_share(self, iteration: int) -> float:
        """What the learning rates are multiplied by in an iteration, counted from 1: a straight line up over the
        first `warmup_iter`, and one down to 0, behind the last, over the last `decay_iter`."""
        up = iteration / max(1, self.warmup_iter)
        down = (self.max_iter + 1 - iteration) / (self.decay_iter + 1)
        return min(1.0, up, down)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term in the total loss; with `target_macs`, the channel loss's at the start."""
        weights = {
            "content": 1.0,
            "style": self.style_loss_weight,
            "uncorrelation": self.uncorrelation_loss_weight,
            "channel": self.channel_loss_weight,
            "xor": self.xor_loss_weight,
        }
        return weights if self.teacher is None else weights | {"distillation": self.teacher_weight}

    @property
    def takes_census(self) -> bool:
        """Whether the multiply-adds that are left are followed: in all but the published method."""
        return (self.compact_layers, self.compact_cost, self.target_macs) != ("bottleneck", "count", None)

    @property
    def census_memory(self) -> int:
        """Batches in which a channel that is on for any picture counts as on: 5% of the run, at most CENSUS_MEMORY."""
        return max(1, min(CENSUS_MEMORY, self.max_iter // 20))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what a step returns: METRICS, and what the settings add; terms before their total."""
        terms = () if self.teacher is None else ("distillation",)
        macs = ("macs",) if self.takes_census else ()
        channel_weight = () if self.target_macs is None else ("channel_weight",)
        return (*terms, *METRICS, *macs, *channel_weight)

    @property
    def crop(self) -> CropConfig:
        return CropConfig(self.imsize, self.cropsize, self.cencrop, self.max_pixels)

    def check(self) -> None:
        """Raises UserError for settings that make no sense, naming the flag."""
        for flag in ("save_path",) if self.resume else ("content_dir", "style_dir", "save_path"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is needed in train mode")
        stride = 8  # of the deepest tap of both loss networks
        if self.cropsize < 2 * stride or self.cropsize % stride:
            raise UserError(f"--cropsize {self.cropsize}: a multiple of {stride}, {2 * stride} or more, is needed")
        if self.new_weights and not self.load_path:
            raise UserError("--new_weights: --load_path says the network whose widths to start with")
        if self.new_weights and not all(self.learning_rates.values()):
            raise UserError("--new_weights: with --encoder_lr 0 or --decoder_lr 0 random weights would stay so")
        if self.warmup_iter + self.decay_iter > self.max_iter:
            raise UserError(f"--warmup_iter {self.warmup_iter} and --decay_iter {self.decay_iter}: together more than "
                            f"--max_iter {self.max_iter}")
        if not any(self.learning_rates.values()):
            raise UserError("--encoder_lr 0 and --decoder_lr 0: both parts are frozen, nothing would be learned")
        if self.teacher and not self.learning_rates["decoder"]:
            raise UserError("--teacher: the projection to the teacher's channels learns at the decoder's rate, and "
                            "--decoder_lr is 0")
        self._check_compacting()

    def _check_compacting(self) -> None:
        layers = f"--compact_layers {self.compact_layers}"
        if self.target_macs is not None and not self.channel_loss_weight:
            raise UserError(f"--target_macs {self.target_macs} steers the weight of the channel loss, and "
                            "--channel_loss_weight is 0")
        switches_off = self.takes_census and (self.channel_loss_weight or self.xor_loss_weight)
        for part in COMPACT_LAYERS[self.compact_layers]:
            if switches_off and not self.learning_rates[part]:
                raise UserError(f"{layers} with --{part}_lr 0: a frozen {part}'s channels stay as they are; choose "
                                "other layers, or --channel_loss_weight 0 --xor_loss_weight 0")
        if "decoder" in COMPACT_LAYERS[self.compact_layers] and self.batch_size * process_count() < 2:
            raise UserError(f"{layers} with --batch_size {self.batch_size}: the xor loss compares the outputs of 2 "
                            "pictures or more")

    def check_target(self, network: NetworkConfig) -> None:
        """Raises UserError for a `target_macs` that `network` is below already, or that the layers cannot reach."""
        if self.target_macs is None:
            return
        least, start = range_of_macs(network, self.compact_layers)
        if start <= self.target_macs:
            raise UserError(f"--target_macs {self.target_macs}: the network has {start:.3f} of the full network's "
                            "multiply-adds already")
        if least >= self.target_macs:
            raise UserError(f"--target_macs {self.target_macs}: without any channel of --compact_layers "
                            f"{self.compact_layers}, {least:.3f} of the multiply-adds are left; choose more layers")


# ----------------------------------------------------------------------------------------------- step


class Pass(NamedTuple):
    """What one forward pass computed, for the terms of the loss to take."""

    both: Tensor  # (2B, 3, H, W), content then style
    feature: Tensor  # (2B, C, H/stride, W/stride), of the bottleneck
    norms: dict[str, Tensor]  # "encoder": (2B * processes, C), "decoder": (B * processes, C'), see CompactLosses
    output: Tensor  # (B, 3, H, W)
    output_features: list[Tensor]  # of the loss network, shallow to deep
    targets: list[Tensor]  # likewise, of `both`


class TransferLosses(nn.Module):
    """One forward pass of training: pictures in, the terms of the loss out.

    A module of its own so that DistributedDataParallel can wrap it.
    """

    def __init__(
        self, network: StyleTransferNetwork, loss_network: LossNetwork, config: TrainConfig, amp_dtype, processes: int,
        device: torch.device, teacher: StyleTransferNetwork | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss_network = loss_network
        self.config = config
        self.amp_dtype = amp_dtype
        self.processes = processes
        self.gather = gather_with_gradient
        # The memory format of what goes into each.
        self.formats = {part: torch.channels_last for part in ("encoder", "decoder", "loss_network")}
        self.compact = CompactLosses(
            network.config, config.compact_layers, config.compact_cost, Epsilon.parse(config.l0_eps), device
        )
        self.all_encoder_layers = config.compact_layers in ("encoder", "all")
        is_frozen = config.learning_rates["encoder"] == 0 and not self.all_encoder_layers
        self.encoder_is_loss_network = is_frozen and _same_weights(network, loss_network)
        self.teacher = teacher
        if teacher is not None:
            # Used in training only: at 0, its features count as a plain mean square, 1, and it learns from there.
            self.projection = nn.Conv2d(network.config.bottleneck_width, teacher.config.bottleneck_width, 1)
            for parameter in self.projection.requires_grad_(config.teacher_weight > 0).parameters():
                nn.init.zeros_(parameter)

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def forward(
        self, content: Tensor, style: Tensor, all_terms: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the loss for one batch (Kim & Choi, eq. 6: total = content + sum of weight * term).

        content, style: (B, 3, H, W), ImageNet-normalised. A term of weight 0 is left out, or with
        `all_terms` measured without a gradient. Returns the terms by name, and the channel norms of the
        global batch, as in `Pass`; the encoder's end with the bottleneck's. Averaged over processes, terms and
        gradients are those of one process with the whole batch.
        """
        pictures = len(content)
        both = torch.cat([content, style])  # (2B, 3, H, W)
        with self.autocast(both.device):
            with torch.no_grad():
                targets = self.loss_network(both.contiguous(memory_format=self.formats["loss_network"]))
            encoder_features = self._encode(both, targets)
        feature = encoder_features[-1]
        content_feature, style_feature = feature[:pictures], feature[pictures:]  # (B, C, H/stride, W/stride)
        aligned = adain(content_feature, *channel_statistics(style_feature))
        with self.autocast(both.device):
            *decoder_features, output = self._decode(aligned)  # output: (B, 3, H, W)
            output_features = self.loss_network(output.contiguous(memory_format=self.formats["loss_network"]))

        norms = {"encoder": self._norms(encoder_features)}  # (2B * processes, C)
        if decoder_features:
            norms["decoder"] = self._norms(decoder_features)  # (B * processes, C')
        passed = Pass(both, feature, self.compact.spared(norms), output, output_features, targets)
        terms = {name: self._term(name, passed) for name, weight in self.config.weights.items() if weight}
        if all_terms:
            with torch.no_grad():
                for name in self.config.weights:
                    if name not in terms:
                        terms[name] = self._term(name, passed)
        return terms, {part: norm.detach() for part, norm in norms.items()}

    def _encode(self, both: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """The features that are looked at, shallow to deep; the last is the bottleneck's."""
        if self.encoder_is_loss_network:
            return targets[-1:]
        both = both.contiguous(memory_format=self.formats["encoder"])
        if self.all_encoder_layers:
            return self.network.encoder.features(both)
        return [self.network.encoder(both)]

    def _decode(self, aligned: Tensor) -> list[Tensor]:
        """The features that are looked at, deep to shallow, then the output."""
        aligned = aligned.contiguous(memory_format=self.formats["decoder"])
        if "decoder" in self.compact.widths:
            return self.network.decoder.features(aligned)
        return [self.network.decoder(aligned)]

    def _norms(self, features: list[Tensor]) -> Tensor:
        """The channel norms of a part's layers side by side, of the global batch."""
        return self.gather(torch.cat([losses.channel_norm(feature) for feature in features], dim=1))

    def _term(self, name: str, passed: Pass) -> Tensor:
        pictures = len(passed.output)
        match name:
            case "content":
                return losses.content_loss(passed.output_features, [target[:pictures] for target in passed.targets])
            case "style":
                style_targets = [target[pictures:] for target in passed.targets]
                return losses.style_loss(passed.output_features, style_targets, self.config.style_loss)
            case "uncorrelation":
                # The mean of content and style, each a sum over the batch: over the global one.
                return 0.5 * self.processes * losses.uncorrelation_loss(passed.feature)
            case "channel":
                return self.compact.channel_loss(passed.norms)
            case "xor":
                return self.compact.xor_loss(passed.norms)
            case "distillation":
                return self._distillation(passed)

    def _distillation(self, passed: Pass) -> Tensor:
        """See `losses.distillation_loss`."""
        pictures = len(passed.output)
        with torch.no_grad(), self.autocast(passed.both.device):
            teacher_feature = self.teacher.encoder(passed.both.contiguous(memory_format=torch.channels_last))
            style_code = channel_statistics(teacher_feature[pictures:])
            aligned = adain(teacher_feature[:pictures], *style_code)
            teacher_output = self.teacher.decoder(aligned.contiguous(memory_format=torch.channels_last))
        with self.autocast(passed.both.device):
            projected = self.projection(passed.feature)  # (2B, C of the teacher, H/stride, W/stride)
        square = self.gather(teacher_feature.float().square().mean().reshape(1)).mean()  # of the global batch
        return losses.distillation_loss(passed.output, teacher_output, projected, teacher_feature, square)


class Trainer:
    """The networks, the optimiser and one training step."""

    def __init__(
        self, network: StyleTransferNetwork, loss_network: LossNetwork, config: TrainConfig, device: torch.device,
        teacher: StyleTransferNetwork | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.network = network.to(device).train()
        amp_dtype, processes = autocast_dtype(config.amp, device), process_count()
        if teacher is not None:
            teacher = teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.losses = TransferLosses(
            self.network, loss_network.to(device), config, amp_dtype, processes, device, teacher
        ).to(device)
        # Frozen weights that autocast would round anew at every use are rounded once.
        loss_network.to(amp_dtype or torch.float32, memory_format=self.losses.formats["loss_network"])
        groups, self.group_parts = [], []
        for part, rate in config.learning_rates.items():
            module = getattr(self.network, part).requires_grad_(rate > 0)
            if rate > 0:
                added = parameter_groups(module, config.optimizer)
                groups += [group | {"lr": rate} for group in added]
                self.group_parts += [part] * len(added)
            self.losses.formats[part] = conv_format(device, amp_dtype, is_trained=rate > 0)
            module.to(memory_format=self.losses.formats[part])
        if teacher is not None:
            groups[-1]["params"] += self.losses.projection.parameters()  # the decoder's
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(groups, fused=True)
        else:
            self.optimizer = Muon(groups, amp_dtype or torch.float32)
        self.census = self.steering = None
        if config.takes_census:
            self.census = ChannelCensus(network.config, config.compact_layers, config.census_memory, device)
        if config.target_macs is not None:
            weight, start = config.channel_loss_weight, self.census.macs().item()
            self.steering = TargetSteering(weight, start, config.target_macs, config.max_iter, device)
        self.model = self.losses
        if processes > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if config.compile:
            if processes > 1:
                self.losses.gather = torch.compiler.disable(gather_with_gradient)
            self.model = compile_step(self.model, device, processes)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape

    def step(self, content: Tensor, style: Tensor, all_terms: bool = False) -> dict[str, Tensor]:
        """One step of Adam. content, style: (B, 3, H, W), uint8. Returns `TrainConfig.metrics` as
        scalars on the device, without terms that were left out."""
        if self.config.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may be overwritten
        self.optimizer.zero_grad(set_to_none=True)
        terms, norms = self.model(normalize(content), normalize(style), all_terms)
        weights, progress = self.follow(norms)
        total = sum(weights[name] * terms[name] for name, weight in self.config.weights.items() if weight)
        total.backward()
        self.optimizer.step()
        norm = norms["encoder"][:, -self.network.config.bottleneck_width :]  # (2B, C)
        off = norm == 0
        return {name: term.detach() for name, term in terms.items()} | progress | {
            "total": total.detach(),
            "nonzero_channels": losses.nonzero_channels(norm),
            "channels_off_for_all": off.all(dim=0).sum().float(),
            "channels_off_for_some": off.any(dim=0).sum().float(),
        }

    def set_rates(self, iteration: int) -> None:
        """Set the learning rates for the step of an iteration, counted from 1."""
        share = self.config.rate_share(iteration)
        for group, part in zip(self.optimizer.param_groups, self.group_parts):
            group["lr"] = self.config.learning_rates[part] * share

    def follow(self, norms: dict[str, Tensor]) -> tuple[dict[str, float | Tensor], dict[str, Tensor]]:
        """Count the channels that are left, and steer the channel loss's weight, where the settings want it.

        Returns the weights of the terms, and the metrics of it.
        """
        weights = self.config.weights
        if self.census is None:
            return weights, {}
        self.census.add(norms)
        progress = {"macs": self.census.macs()}
        if self.steering is not None:
            weights["channel"] = progress["channel_weight"] = self.steering.update(progress["macs"])
        return weights, progress

    def layer_widths(self) -> list[int]:
        """The channels on in each selected layer, encoder then decoder, in forward order."""
        return torch.cat(list(self.census.widths().values())).int().tolist()

    def state(self) -> dict[str, dict]:
        """What a checkpoint needs beside the network to go on: plain types and tensors."""
        parts = {"census": self.census, "steering": self.steering}
        state = {name: part.state() for name, part in parts.items() if part is not None}
        if self.losses.teacher is not None:
            state["projection"] = self.losses.projection.state_dict()
        return state | {"optimizer": self.optimizer.state_dict()}

    def restore(self, checkpoint: dict) -> None:
        """Put back `state`. Raises ValueError when other parts were trained. What the run did not count or steer
        before starts anew."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.set_rates(checkpoint["iteration"])  # load_state_dict put those of its run back
        if self.losses.teacher is not None:
            self.losses.projection.load_state_dict(checkpoint["projection"])
        same_layers = checkpoint["train_config"].get("compact_layers") == self.config.compact_layers
        if self.census is not None and same_layers and "census" in checkpoint:
            self.census.restore(checkpoint["census"])
        if self.steering is not None:
            if "steering" in checkpoint:
                self.steering.restore(checkpoint["steering"])
            self.steering.iteration.fill_(checkpoint["iteration"])

    @torch.no_grad()
    def preview(self, content: Tensor, style: Tensor):
        """A picture with the rows content, style, output. content, style: (n, 3, H, W), uint8."""
        content, style = normalize(content.to(self.device)), normalize(style.to(self.device))
        with self.losses.autocast(self.device):
            code = self.network.style_code(style)
            output = self.network.stylize(content, code)
        return picture_grid([content, style, output.float()])


def parameter_groups(module: nn.Module, optimizer: str) -> list[dict]:
    """The parameters of a part of the network, in groups as the optimiser takes them: Muon takes the filters of the
    hidden layers as matrices; biases, and the filters that give the picture's three colours, learn by Adam."""
    if optimizer == "adam":
        return [{"params": list(module.parameters())}]
    hidden = [parameter for parameter in module.parameters() if parameter.dim() == 4 and len(parameter) > 3]
    others = [parameter for parameter in module.parameters() if parameter.dim() != 4 or len(parameter) <= 3]
    return [{"params": hidden, "orthogonal": True}, {"params": others, "orthogonal": False}]


def conv_format(device: torch.device, amp_dtype: torch.dtype | None, is_trained: bool) -> torch.memory_format:
    """The memory format in which a part's convolutions are fastest.

    channels_last, except for trained parts in float32 on a CPU: there the gradient of a 3 x 3 conv's weight
    takes up to twice as long in it (64 channels at 128 x 128: 172 ms against 78 ms), while all else is a
    little faster (measured on 2 cores of an AMD EPYC without bfloat16 instructions, torch 2.14.1). On GPUs
    it is what the matrix units work in.
    """
    if device.type == "cpu" and amp_dtype is None and is_trained:
        return torch.contiguous_format
    return torch.channels_last


def compile_step(model: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """`model` through torch.compile, for batches of one shape; one GPU replays it as CUDA graphs."""
    # The xor loss's (C, 2B) table, a few KiB: the compiler lays it out as it likes, nothing to act on.
    warnings.filterwarnings("ignore", message="torch.searchsorted")
    cuda_graphs = device.type == "cuda" and processes == 1
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if cuda_graphs else "default")


def _same_weights(network: StyleTransferNetwork, loss_network: LossNetwork) -> bool:
    """Whether encoder and loss network compute the same: then their features are computed once."""
    encoder = network.encoder.layers[0].state_dict()
    vgg = loss_network.layers.state_dict()
    return (
        network.config.pooling == "max"
        and network.config.padding == loss_network.padding
        and encoder.keys() == vgg.keys()
        and all(encoder[name].shape == vgg[name].shape and torch.equal(encoder[name], vgg[name]) for name in vgg)
    )


class MetricSums:
    """Means of a run's metrics since the last check, and the first iteration at which each was not finite.

    Both stay on the device: reading them costs a synchronisation, so the loop does that seldom.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...] = METRICS) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.counts = torch.zeros(len(names), device=device)
        self.latest = torch.zeros(len(names), device=device)
        self.first_bad = torch.full((len(names),), -1, device=device, dtype=torch.int64)
        self._zero = torch.zeros((), device=device)
        self._present: dict[frozenset, Tensor] = {}  # one mask for each set of measured terms

    def add(self, metrics: dict[str, Tensor], iteration: int) -> None:
        names = frozenset(metrics)
        if names not in self._present:
            self._present[names] = torch.tensor([name in names for name in self.names], device=self.sums.device)
        present = self._present[names]
        values = torch.stack([metrics.get(name, self._zero) for name in self.names])
        self.sums += values
        self.counts += present
        self.latest = torch.where(present, values, self.latest)
        self.first_bad.masked_fill_(~values.isfinite() & (self.first_bad < 0), iteration)

    def raise_if_bad(self, folder: CheckpointFolder) -> None:
        """Raises UserError naming the first term that was not finite, its iteration, and what `folder` holds."""
        bad = {name: at for name, at in zip(self.names, self.first_bad.tolist()) if at >= 0}
        if not bad:
            return
        name = min(bad, key=bad.get)  # the earliest; of equals the first, and terms stand before their total
        raise UserError(f"iteration {bad[name]}: the {name} loss is not finite; {folder.last_good}. "
                        "A lower --lr, --encoder_lr or loss weight may help")

    def means(self) -> dict[str, float]:
        """The means over all iterations since `clear`, and over all processes (each must call this)."""
        return dict(zip(self.names, (average_over_processes(self.sums) / self.counts).tolist()))

    def clear(self) -> None:
        self.sums.zero_()
        self.counts.zero_()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; of several processes each must call this."""
        sums = average_over_processes(self.sums).cpu()
        return {"names": list(self.names), "sums": sums, "counts": self.counts.cpu()}

    def restore(self, state: dict) -> None:
        """Put back `state`; metrics that it lacks stay without a value."""
        names = state.get("names", METRICS)  # an older run's file has no names
        for own, stored in ((self.sums, state["sums"]), (self.counts, state["counts"])):
            values = dict(zip(names, stored.tolist()))
            own.copy_(torch.tensor([values.get(name, 0.0) for name in self.names]))


# ------------------------------------------------------------------------------------------ start, resume


def resume_config(given: dict) -> tuple[TrainConfig, dict]:
    """The settings of the run in `--save_path`, changed by the flags given now, and its newest checkpoint.

    Raises UserError when there is none, or when a flag would make it another network.
    """
    checkpoint = CheckpointFolder.load_newest(given.get("save_path"))
    stored = checkpoint.get("train_config")
    if not isinstance(stored, dict) or "optimizer" not in checkpoint:
        raise UserError(f"--resume: the run in --save_path {given['save_path']} holds a network but no training run; "
                        "use --load_path")
    known = {field.name for field in fields(TrainConfig)}
    stored = asdict(TrainConfig()) | {  # a flag that is newer than the run stood at its default
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if name in known
    }
    fixed = ("backbone", "swap_max_pool", "vgg_weights", "load_path", "new_weights", "teacher", "upsampling",
             "padding", "optimizer")
    compare_resumed(given, stored, fixed)
    return TrainConfig(**{**stored, **given, "resume": True}), checkpoint


def build_trainer(config: TrainConfig, device: torch.device, checkpoint: dict | None) -> tuple[Trainer, str]:
    """The trainer at its start, or as the checkpoint left it, and where its VGG weights are from."""
    seed_everything(config.seed)
    vgg, origin = load_vgg(config.backbone, config.vgg_weights, config.seed)
    if checkpoint is not None and checkpoint.get("vgg_weights") != origin:
        raise UserError(f"--resume: the run was started with VGG weights {checkpoint.get('vgg_weights')}, "
                        f"now they are {origin}")
    pooling = "avg" if config.swap_max_pool else "max"
    network, _ = build_from_vgg(NetworkConfig.full(config.backbone, pooling), vgg)
    if checkpoint is not None:
        network = StyleTransferNetwork(NetworkConfig.from_dict(checkpoint["config"]))
        network.load_state_dict(checkpoint["state_dict"])
    elif config.load_path:
        network, _ = load_network(config.load_path, config.swap_max_pool)
        if network.config.backbone != config.backbone:
            raise UserError(f"--load_path {config.load_path} is a {network.config.backbone} network, "
                            f"--backbone says {config.backbone}")
        if config.new_weights:
            initialize(network, network)
    network.use(config.upsampling, config.padding)
    config.check_target(network.config)
    teacher = load_teacher(config.teacher, network.config)[0] if config.teacher else None
    trainer = Trainer(network, build_loss_network(network.config, vgg), config, device, teacher)
    if checkpoint is not None:
        try:
            trainer.restore(checkpoint)
        except ValueError as error:
            raise UserError("--resume: --encoder_lr or --decoder_lr freezes or thaws a part; "
                            "start a new run with --load_path for that") from error
    return trainer, origin


# ------------------------------------------------------------------------------------------------ loop


def train(given: dict) -> int:
    """Run `--mode train` with the flags given on the command line. Returns the exit code."""
    checkpoint = None
    config = TrainConfig(**given)
    if config.resume:
        config, checkpoint = resume_config(given)
    config.check()
    device = resolve_device(config.gpu_no)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device):
        return _train_on(device, config, checkpoint)


def _train_on(device: torch.device, config: TrainConfig, checkpoint: dict | None) -> int:
    folder = CheckpointFolder.of_run(config.save_path, config.keep_checkpoints, is_resumed=checkpoint is not None)
    start = checkpoint["iteration"] if checkpoint else 0
    if start >= config.max_iter:
        note(f"the run in {config.save_path} has done its {start} iterations; a larger --max_iter goes on")
        return 0

    content, content_failed = open_folder(config.content_dir, "--content_dir", config.max_pixels)
    style, style_failed = open_folder(config.style_dir, "--style_dir", config.max_pixels)
    tallies = (content_failed, style_failed)
    content, style = (split_holdout(paths, config.holdout)[0] for paths in (content, style))
    trainer, origin = build_trainer(config, device, checkpoint)
    pictures = TrainingPictures(content, style, config.crop, config.seed, _open_cache(config))
    counts = [len(content), len(style)]
    if checkpoint and checkpoint["picture_counts"] != counts:
        note(f"the folders changed: {counts} usable pictures, {checkpoint['picture_counts']} before; "
             "other pictures will be drawn than without the interruption")
    note(f"training on {describe_device(device)}, {'float32' if trainer.losses.amp_dtype is None else 'bfloat16'}; "
         f"VGG weights: {origin}; {counts[0]} content and {counts[1]} style pictures")
    wb_mode = config.wb_mode if is_first_process() else "disabled"
    wandb_run = WandbRun(
        wb_mode, config.wb_project, config.wb_name, config.wb_notes, config.wb_tags, asdict(config),
        config.save_path, checkpoint["wandb_id"] if checkpoint else None,
    )
    run = _Run(config, trainer, folder, pictures, tallies, wandb_run, origin, counts,
               checkpoint["samples_seen"] if checkpoint else 0)
    if checkpoint:
        run.sums.restore(checkpoint["metric_sums"])
        restore_random_state(checkpoint["random_state"])
    if is_first_process():
        run.metrics.truncate_after(start)
    try:
        exit_code = run.loop(start)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--compile: torch.compile failed ({reason}); without the flag training needs no compiler") \
            from error
    finally:
        wandb_run.finish()
        for tally in tallies:
            note(tally.summary())
    return exit_code


def _open_cache(config: TrainConfig) -> PictureCache | None:
    if config.cache_dir is None:
        return None
    cache = PictureCache(make_folder(config.cache_dir, "--cache_dir"), config.max_pixels)
    if is_first_process():
        cache.remove_leftovers()
    return cache


@dataclass
class _Run:
    """What a running training holds; `loop` is the training."""

    config: TrainConfig
    trainer: Trainer
    folder: CheckpointFolder
    pictures: TrainingPictures
    tallies: tuple[FailedPictures, FailedPictures]
    wandb_run: WandbRun
    vgg_origin: str
    picture_counts: list[int]
    samples_seen: int  # by all processes together: where in the data the run is

    def __post_init__(self) -> None:
        save_path = Path(self.config.save_path)
        self.metrics = MetricFile(save_path / "metrics.jsonl")
        self.samples = make_folder(save_path / "samples", "--save_path")
        self.sums = MetricSums(self.trainer.device, self.config.metrics)

    def loop(self, start: int) -> int:
        """Iterations start + 1 to max_iter. Returns the exit code: 0, or 128 + the signal that stopped it."""
        config, device = self.config, self.trainer.device
        workers = config.num_workers if config.num_workers is not None else min(8, os.cpu_count())
        positions = shard_positions(
            self.samples_seen, config.max_iter - start, config.batch_size, process_rank(), process_count()
        )
        loader = training_loader(self.pictures, positions, config.batch_size, workers, device.type == "cuda")
        first = collate([self.pictures[position] for position in range(min(PREVIEW_PICTURES, config.batch_size))])
        check_failures(first[2], self.tallies)
        bar = progress_bar(config.max_iter, "train", "it", initial=start)
        shown = time.perf_counter()
        with bar, catch_stop_signals() as stop:
            for iteration, (content, style, failures) in enumerate(loader, start + 1):
                check_failures(failures, self.tallies)
                content, style = (batch.to(device, non_blocking=True) for batch in (content, style))
                is_check = iteration % config.check_iter == 0 or iteration == config.max_iter
                self.trainer.set_rates(iteration)
                self.sums.add(self.trainer.step(content, style, all_terms=is_check), iteration)
                self.samples_seen += config.batch_size * process_count()
                # Asking the others costs a round trip, so at the speed of a GPU not at every iteration.
                may_stop = process_count() == 1 or device.type == "cpu" or is_check or iteration % STOP_INTERVAL == 0
                stopping = may_stop and any_process(bool(stop))
                if device.type == "cpu" or is_check or stopping or time.perf_counter() - shown > 1.0:
                    self.sums.raise_if_bad(self.folder)
                    shown = time.perf_counter()
                    bar.set_postfix_str(self._progress(), refresh=False)
                if is_check:
                    self.check(iteration, first)
                elif stopping:
                    self.save(iteration)
                bar.update()
                if stopping and iteration < config.max_iter:
                    break
            else:
                return 0
        note(f"stopped after iteration {iteration}, saved; go on with: "
             f"python main.py --mode train --resume --save_path {config.save_path}")
        return stop.exit_code if stop else 0  # 0 where another process was told to stop

    def _progress(self) -> str:
        values = dict(zip(self.sums.names, self.sums.latest.tolist()))
        names = [name for name, weight in self.config.weights.items() if weight]
        names += [name for name in ("total", "macs", "channel_weight") if name in values]
        return ", ".join([*(f"{name} {values[name]:.4g}" for name in names),
                          f"nonzero {values['nonzero_channels']:.0f}"])

    def check(self, iteration: int, first: tuple[Tensor, Tensor, list]) -> None:
        """Every `check_iter`: metrics, a picture grid, a checkpoint."""
        means = self.sums.means()
        self.sums.clear()
        if is_first_process():
            has_layers = self.config.compact_layers != "bottleneck"
            layers = {"layer_widths": self.trainer.layer_widths()} if has_layers else {}
            self.metrics.append({"iteration": iteration, **means, **layers})
            path = self.samples / f"iteration_{iteration:07d}.png"
            save_picture(self.trainer.preview(*first[:2]), path)
            self.wandb_run.log(means, iteration, path)
        self.save(iteration)

    def save(self, iteration: int) -> None:
        """Write the checkpoint. Raises UserError, and writes nothing, when a weight is not finite."""
        metric_sums = self.sums.state()
        if not is_first_process():
            return
        network = self.trainer.network
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            raise UserError(f"iteration {iteration}: a weight is not finite; the checkpoint was not written, "
                            f"{self.folder.newest} is untouched. A lower learning rate may help")
        checkpoint = model_checkpoint(
            network,
            iteration=iteration,
            train_config={name: list(value) if isinstance(value, tuple) else value
                          for name, value in asdict(self.config).items()},
            vgg_weights=self.vgg_origin,
            **self.trainer.state(),
            random_state=random_state(),
            metric_sums=metric_sums,
            samples_seen=self.samples_seen,
            picture_counts=self.picture_counts,
            wandb_id=self.wandb_run.id,
        )
        self.folder.save(checkpoint, iteration)

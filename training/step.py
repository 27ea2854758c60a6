"""The training step of style transfer: one forward pass, the terms of the loss, backward."""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import loss as losses
from data import normalize, picture_grid, save_picture
from network import LossNetwork, StyleTransferNetwork, adain, channel_statistics
from settings import amount, count_or_zero, proper_fraction, setting
from training.compaction import (
    COMPACT_COSTS,
    COMPACT_LAYERS,
    ChannelCensus,
    CompactLosses,
    Epsilon,
    TargetSteering,
)
from training.loop import Checked
from training.muon import Muon
from utils import UserError, autocast_dtype, gather_with_gradient, make_folder, process_count
from weights import model_checkpoint

TERMS = ("content", "style", "uncorrelation", "channel", "xor")
METRICS = (*TERMS, "total", "nonzero_channels", "channels_off_for_all", "channels_off_for_some")
OPTIMIZERS = ("adam", "muon")
CENSUS_MEMORY = 100  # batches
MOVES_APART = 29  # has no divisor in common with stride**2 - 1, so that every move has its turn


def epsilon(text: str) -> float | str:
    """The value of `--l0_eps`: a number as such; `relative:NUMBER` as the text it is."""
    try:
        parsed = Epsilon.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, a number above 0 or relative:NUMBER is needed") from None
    return text if parsed.is_relative else parsed.value


@dataclass(frozen=True)
class TransferConfig:
    """The settings of the training step, with their defaults."""

    lr: float = 1e-4
    encoder_lr: float | None = setting(None, "learning rate of the encoder; 0 freezes it", "learning", amount,
                                       none="--lr")
    decoder_lr: float | None = setting(None, "learning rate of the decoder; 0 freezes it", "learning", amount,
                                       none="--lr")
    optimizer: str = setting(
        "adam", "adam, as published, or muon (Jordan et al., 2024), which makes the updates of the filters orthogonal",
        "learning", choices=OPTIMIZERS)
    warmup_iter: int = setting(0, "the learning rates rise from 0 over this many first iterations", "learning",
                               count_or_zero)
    decay_iter: int = setting(0, "the learning rates fall to 0 over this many last iterations", "learning",
                              count_or_zero)
    max_iter: int = 80_000
    style_loss: str = "meanstd"
    style_loss_weight: float = setting(100.0, "weight of the style loss; the content loss has weight 1", "losses",
                                       amount)
    uncorrelation_loss_weight: float = setting(0.01, "weight of the uncorrelation loss", "losses", amount)
    channel_loss_weight: float = setting(1.0, "weight of the channel loss, which switches channels off", "losses",
                                         amount)
    xor_loss_weight: float = setting(
        1.0, "weight of the xor loss, which makes the same channels off for all pictures", "losses", amount)
    shift_loss_weight: float = setting(
        0.0, "weight of the shift loss, beyond the papers: a photograph moved by a few pixels is to be painted the "
        "same, moved, which makes videos calmer; 30 is much", "losses", amount)
    l0_eps: float | str = setting(
        losses.L0_EPS, "epsilon of the channel and xor losses, in units of a channel's l2 norm; a larger one switches "
        "off stronger channels; relative:N is N times the mean norm of each layer", "compaction", epsilon, metavar="N")
    compact_layers: str = setting(
        "bottleneck", "layers that the channel and xor losses act on; bottleneck is as published", "compaction",
        choices=tuple(COMPACT_LAYERS))
    compact_cost: str = setting(
        "count", "what the channel loss measures: the share of channels that are on, or of the parameters or "
        "multiply-adds that they cost", "compaction", choices=COMPACT_COSTS)
    target_macs: float | None = setting(
        None, "adjust the weight of the channel loss, starting from --channel_loss_weight, so that the run ends at "
        "this fraction of the full network's multiply-adds", "compaction", proper_fraction)
    teacher: str | None = None
    teacher_weight: float = setting(1.0, "weight of the loss that compares with --teacher", "losses", amount)
    amp: str = setting("auto", more="auto is bf16 on GPUs and CPUs that are fast in it, and off elsewhere")
    compile: bool = setting(
        False, "faster training by torch.compile, after a minute or more of compiling; on a CPU this needs a C++ "
        "compiler", "the device")

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
        added = {"shift": self.shift_loss_weight} if self.shift_loss_weight else {}
        return weights | added | ({} if self.teacher is None else {"distillation": self.teacher_weight})

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
        terms = tuple(name for name in self.weights if name not in TERMS)
        macs = ("macs",) if self.takes_census else ()
        channel_weight = () if self.target_macs is None else ("channel_weight",)
        return (*terms, *METRICS, *macs, *channel_weight)

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics beside the progress bar."""
        terms = tuple(name for name, weight in self.weights.items() if weight)
        more = tuple(name for name in ("total", "macs", "channel_weight") if name in self.metrics)
        return (*terms, *more, "nonzero_channels")


class Pass(NamedTuple):
    """What one forward pass computed, for the terms of the loss to take."""

    both: Tensor  # (2B, 3, H, W), content then style
    feature: Tensor  # (2B, C, H/stride, W/stride), of the bottleneck
    norms: dict[str, Tensor]  # "encoder": (2B * processes, C), "decoder": (B * processes, C'), see CompactLosses
    output: Tensor  # (B, 3, H, W)
    output_features: list[Tensor]  # of the loss network, shallow to deep
    targets: list[Tensor]  # likewise, of `both`
    move: Tensor | None  # (2,), see `losses.moved`, for the shift loss


class TransferLosses(nn.Module):
    """One forward pass of training: pictures in, the terms of the loss out.

    A module of its own so that DistributedDataParallel can wrap it.
    """

    def __init__(
        self, network: StyleTransferNetwork, loss_network: LossNetwork, config: TransferConfig, amp_dtype,
        processes: int, device: torch.device, teacher: StyleTransferNetwork | None,
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
        self, content: Tensor, style: Tensor, all_terms: bool, move: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the loss for one batch (Kim & Choi, eq. 6: total = content + sum of weight * term).

        content, style: (B, 3, H, W), ImageNet-normalised. A term of weight 0 is left out, or with
        `all_terms` measured without a gradient. move: as in `Pass`. Returns the terms by name, and the channel norms of
        the global batch, as in `Pass`; the encoder's end with the bottleneck's. Averaged over processes, terms and
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
        passed = Pass(both, feature, self.compact.spared(norms), output, output_features, targets, move)
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
            case "shift":
                moved_output = self._paint_moved(passed)
                return losses.shift_loss(passed.output, moved_output, passed.move, self.network.config.stride)
            case "distillation":
                return self._distillation(passed)

    def _paint_moved(self, passed: Pass) -> Tensor:
        """The output for the content pictures `losses.moved`, in the same styles."""
        pictures = len(passed.output)
        content = losses.moved(passed.both[:pictures], passed.move)
        with self.autocast(content.device):
            feature = self.network.encoder(content.contiguous(memory_format=self.formats["encoder"]))
        aligned = adain(feature, *channel_statistics(passed.feature[pictures:]))
        with self.autocast(content.device):
            return self._decode(aligned)[-1]

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


class TransferTrainer:
    """The networks, the optimiser and one training step."""

    def __init__(
        self, network: StyleTransferNetwork, loss_network: LossNetwork, config: TransferConfig, device: torch.device,
        teacher: StyleTransferNetwork | None = None, vgg_origin: str | None = None,
    ) -> None:
        """vgg_origin: where the loss network's weights are from, for the file."""
        self.config = config
        self.device = device
        self.metrics, self.shown = config.metrics, config.shown
        self.vgg_origin = vgg_origin
        self.move = None
        if config.shift_loss_weight:
            stride = network.config.stride
            every = [(rows, columns) for rows in range(stride) for columns in range(stride)]
            self.moves = torch.tensor(every[1:], device=device)
            self.move = self.moves[0]
        self.preview_pictures: tuple[Tensor, Tensor] | None = None  # content and style for `check`, (n, 3, H, W), uint8
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
        """One step of the optimiser. content, style: (B, 3, H, W), uint8. Returns `TransferConfig.metrics` as
        scalars on the device, without terms that were left out."""
        if self.config.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may be overwritten
        self.optimizer.zero_grad(set_to_none=True)
        terms, norms = self.model(normalize(content), normalize(style), all_terms, self.move)
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

    def begin(self, iteration: int) -> None:
        """Set the learning rates, and the move of the shift loss, for the step of an iteration, counted from 1."""
        if self.move is not None:
            self.move = self.moves[MOVES_APART * iteration % len(self.moves)]
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

    def state(self) -> dict:
        """What a checkpoint needs to go on; it is a model file too."""
        parts = {"census": self.census, "steering": self.steering}
        state = {name: part.state() for name, part in parts.items() if part is not None}
        if self.losses.teacher is not None:
            state["projection"] = self.losses.projection.state_dict()
        return model_checkpoint(self.network, vgg_weights=self.vgg_origin, **state,
                                optimizer=self.optimizer.state_dict(), optimized=self._optimized())

    def _optimized(self) -> list[list]:
        """Name and shape of each parameter that learns, in the optimiser's order."""
        names = {parameter: name for name, parameter in self.losses.named_parameters()}
        return [[names[parameter], list(parameter.shape)]
                for group in self.optimizer.param_groups for parameter in group["params"]]

    def restore(self, checkpoint: dict) -> None:
        """Put back `state` but for the weights, which the network was built with. Raises UserError when other parts
        were trained. What the run did not count or steer before starts anew."""
        stored = checkpoint.get("optimized") or _shapes_in(checkpoint["optimizer"])  # older runs have no names
        own = self._optimized() if "optimized" in checkpoint else [shape for _, shape in self._optimized()]
        if stored != own:
            raise UserError("--resume: --encoder_lr or --decoder_lr freezes or thaws a part; "
                            "start a new run with --load_path for that")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.begin(checkpoint["iteration"])  # load_state_dict put those of its run back
        if self.losses.teacher is not None:
            self.losses.projection.load_state_dict(checkpoint["projection"])
        same_layers = checkpoint["train_config"].get("compact_layers") == self.config.compact_layers
        if self.census is not None and same_layers and "census" in checkpoint:
            self.census.restore(checkpoint["census"])
        if self.steering is not None:
            if "steering" in checkpoint:
                self.steering.restore(checkpoint["steering"])
            self.steering.iteration.fill_(checkpoint["iteration"])

    def check(self, folder: Path, iteration: int) -> Checked:
        """Write a picture grid of `preview_pictures` to `samples/`; count what is left of compacted layers."""
        path = make_folder(folder / "samples", "--save_path") / f"iteration_{iteration:07d}.png"
        save_picture(self.preview(*self.preview_pictures), path)
        has_layers = self.config.compact_layers != "bottleneck"
        return Checked({"layer_widths": self.layer_widths()} if has_layers else {}, path)

    @torch.no_grad()
    def preview(self, content: Tensor, style: Tensor):
        """A picture with the rows content, style, output. content, style: (n, 3, H, W), uint8."""
        content, style = normalize(content.to(self.device)), normalize(style.to(self.device))
        with self.losses.autocast(self.device):
            output = self.network(content, style)
        return picture_grid([content, style, output.float()])


def _shapes_in(optimizer: dict) -> list[list[int]]:
    """The shapes of the parameters in an optimiser's state dict, in its order."""
    order = [number for group in optimizer["param_groups"] for number in group["params"]]
    return [list(optimizer["state"][number]["exp_avg"].shape) for number in order]


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

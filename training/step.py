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
from training.dead_units import DeadUnits
from training.muon import Muon
from utils import UserError, autocast_dtype, gather_with_gradient, make_folder, process_count
from weights import model_checkpoint

TERMS = ("content", "style", "uncorrelation", "channel", "xor")
METRICS = (*TERMS, "total", "nonzero_channels", "channels_off_for_all", "channels_off_for_some")
OPTIMIZERS = ("adam", "muon")
PUBLISHED_RATES = {"encoder": 5e-6, "decoder": 1e-4}
CENSUS_MEMORY = 100  # batches
MOVES_APART = 29  # has no divisor in common with stride**2 - 1, so that every move has its turn
PREVIEW_PICTURES = 4


def epsilon(text: str) -> float | str:
    """The value of `--l0_eps`: a number as such; `relative:NUMBER` as the text it is."""
    try:
        parsed = Epsilon.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, a number above 0 or relative:NUMBER is needed") from None
    return text if parsed.is_relative else parsed.value


@dataclass(frozen=True)
class TransferConfig:
    """The settings of the training step; the defaults are the published `ch_xor`."""

    lr: float | None = setting(None, more="of both parts", none="each part has its own")
    encoder_lr: float | None = setting(None, "learning rate of the encoder; 0 freezes it", "learning", amount,
                                       none=f"--lr, or {PUBLISHED_RATES['encoder']:g}")
    decoder_lr: float | None = setting(None, "learning rate of the decoder; 0 freezes it", "learning", amount,
                                       none=f"--lr, or {PUBLISHED_RATES['decoder']:g}")
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
    uncorrelation_loss_weight: float = setting(0.0, "weight of the uncorrelation loss", "losses", amount)
    channel_loss_weight: float = setting(10_000.0, "weight of the channel loss, which switches channels off", "losses",
                                         amount)
    xor_loss_weight: float = setting(
        500.0, "weight of the xor loss, which makes the same channels off for all pictures", "losses", amount)
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
        "count", "what the channel loss measures: the share of channels that are on, or of the multiply-adds that they "
        "cost", "compaction", choices=COMPACT_COSTS)
    target_macs: float | None = setting(
        None, "adjust the weight of the channel loss, starting from --channel_loss_weight, so that the run ends at "
        "this fraction of the full network's multiply-adds", "compaction", proper_fraction)
    amp: str = setting("auto", more="auto is bf16 on GPUs and CPUs that are fast in it, and off elsewhere")
    compile: bool = setting(
        False, "faster training by torch.compile, after a minute or more of compiling; on a CPU this needs a C++ "
        "compiler", "the device")

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each part; 0 freezes it."""
        given = {"encoder": self.encoder_lr, "decoder": self.decoder_lr}
        return {part: next(rate for rate in (given[part], self.lr, published) if rate is not None)
                for part, published in PUBLISHED_RATES.items()}

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
        return weights | ({"shift": self.shift_loss_weight} if self.shift_loss_weight else {})

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


class Features(NamedTuple):
    """What one forward pass computed, for the terms of the loss to take."""

    both: Tensor  # (2B, 3, H, W), content then style
    bottleneck: Tensor  # (2B, C, H/stride, W/stride)
    norms: dict[str, Tensor]  # "encoder": (2B * processes, C), "decoder": (B * processes, C'), see CompactLosses
    output: Tensor  # (B, 3, H, W)
    output_features: list[Tensor]  # of the loss network, shallow to deep
    targets: list[Tensor]  # likewise, of `both`
    move: Tensor | None  # (2,), see `losses.moved`, for the shift loss


class ForwardPass(nn.Module):
    """One forward pass of training: pictures in, the terms of the loss out.

    A module of its own so that DistributedDataParallel can wrap it.
    """

    def __init__(
        self, network: StyleTransferNetwork, loss_network: LossNetwork, config: TransferConfig,
        amp_dtype: torch.dtype | None, device: torch.device,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss_network = loss_network
        self.config = config
        self.amp_dtype = amp_dtype
        self.processes = process_count()
        self.gather = gather_with_gradient
        # The memory format of what goes into each.
        self.formats = {part: torch.channels_last for part in ("encoder", "decoder", "loss_network")}
        self.compact = CompactLosses(
            network.config, config.compact_layers, config.compact_cost, Epsilon.parse(config.l0_eps), device
        )
        self.all_encoder_layers = config.compact_layers in ("encoder", "all")
        is_frozen = config.learning_rates["encoder"] == 0 and not self.all_encoder_layers
        self.encoder_is_loss_network = is_frozen and _same_weights(network, loss_network)

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def forward(
        self, content: Tensor, style: Tensor, all_terms: bool, move: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the loss for one batch (Kim & Choi, eq. 6: total = content + sum of weight * term).

        content, style: (B, 3, H, W), ImageNet-normalised. A term of weight 0 is left out, or with
        `all_terms` measured without a gradient. move: as in `Features`. Returns the terms by name, and the channel
        norms of the global batch, as in `Features`; the encoder's end with the bottleneck's. Averaged over processes,
        terms and gradients are those of one process with the whole batch.
        """
        pictures = len(content)
        both = torch.cat([content, style])  # (2B, 3, H, W)
        with self.autocast(both.device):
            with torch.no_grad():
                targets = self.loss_network(both.contiguous(memory_format=self.formats["loss_network"]))
            encoder_features = self._encode(both, targets)
        bottleneck = encoder_features[-1]
        content_feature, style_feature = bottleneck[:pictures], bottleneck[pictures:]  # (B, C, H/stride, W/stride)
        aligned = adain(content_feature, *channel_statistics(style_feature))
        with self.autocast(both.device):
            *decoder_features, output = self._decode(aligned)  # output: (B, 3, H, W)
            output_features = self.loss_network(output.contiguous(memory_format=self.formats["loss_network"]))

        norms = {"encoder": self._norms(encoder_features)}  # (2B * processes, C)
        if decoder_features:
            norms["decoder"] = self._norms(decoder_features)  # (B * processes, C')
        features = Features(both, bottleneck, self.compact.spared(norms), output, output_features, targets, move)
        terms = {name: self._term(name, features) for name, weight in self.config.weights.items() if weight}
        if all_terms:
            with torch.no_grad():
                terms |= {name: self._term(name, features) for name in self.config.weights if name not in terms}
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

    def _term(self, name: str, features: Features) -> Tensor:
        pictures = len(features.output)
        match name:
            case "content":
                content_targets = [target[:pictures] for target in features.targets]
                return losses.content_loss(features.output_features, content_targets)
            case "style":
                style_targets = [target[pictures:] for target in features.targets]
                return losses.style_loss(features.output_features, style_targets, self.config.style_loss)
            case "uncorrelation":
                # The mean of content and style, each a sum over the batch: over the global one.
                return 0.5 * self.processes * losses.uncorrelation_loss(features.bottleneck)
            case "channel":
                return self.compact.channel_loss(features.norms)
            case "xor":
                return self.compact.xor_loss(features.norms)
            case "shift":
                moved_output = self._paint_moved(features)
                return losses.shift_loss(features.output, moved_output, features.move, self.network.config.stride)

    def _paint_moved(self, features: Features) -> Tensor:
        """The output for the content pictures `losses.moved`, in the same styles."""
        pictures = len(features.output)
        content = losses.moved(features.both[:pictures], features.move)
        with self.autocast(content.device):
            bottleneck = self.network.encoder(content.contiguous(memory_format=self.formats["encoder"]))
        aligned = adain(bottleneck, *channel_statistics(features.bottleneck[pictures:]))
        with self.autocast(content.device):
            return self._decode(aligned)[-1]


class TransferTrainer:
    """The networks, the optimiser and one training step."""

    def __init__(
        self, network: StyleTransferNetwork, loss_network: LossNetwork, config: TransferConfig, device: torch.device,
        vgg_origin: str | None = None,
    ) -> None:
        """vgg_origin: where the loss network's weights are from, for the file. All is computed in the network's data
        type, its convolutions with `config.amp` in another."""
        self.config = config
        self.device = device
        self.metrics, self.shown = config.metrics, config.shown
        self.vgg_origin = vgg_origin
        self.shown_pictures: tuple[Tensor, Tensor] | None = None  # content and style for `report`, see `show`
        self.dead_units: DeadUnits | None = None
        self.network = network.to(device).train()
        self.dtype = next(network.parameters()).dtype
        amp_dtype = autocast_dtype(config.amp, device)
        self.forward_pass = ForwardPass(self.network, loss_network.to(device, self.dtype), config, amp_dtype, device)
        # Frozen weights that autocast would round anew at every use are rounded once.
        loss_network.to(amp_dtype or self.dtype, memory_format=self.forward_pass.formats["loss_network"])
        groups, self.group_parts = [], []
        for part, rate in config.learning_rates.items():
            module = getattr(self.network, part).requires_grad_(rate > 0)
            if rate > 0:
                added = parameter_groups(module, config.optimizer)
                groups += [group | {"lr": rate} for group in added]
                self.group_parts += [part] * len(added)
            self.forward_pass.formats[part] = conv_format(device, amp_dtype, is_trained=rate > 0)
            module.to(memory_format=self.forward_pass.formats[part])
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(groups, fused=True)
        else:
            self.optimizer = Muon(groups, amp_dtype or self.dtype)
        stride = network.config.stride
        every = [(rows, columns) for rows in range(stride) for columns in range(stride)]
        self.moves = torch.tensor(every[1:], device=device)  # all but (0, 0)
        self.move = self.moves[0] if config.shift_loss_weight else None
        self.census = self.steering = None
        if config.takes_census:
            self.census = ChannelCensus(network.config, config.compact_layers, config.census_memory, device)
        if config.target_macs is not None:
            weight, start = config.channel_loss_weight, self.census.macs().item()
            self.steering = TargetSteering(weight, start, config.target_macs, config.max_iter, device)
        self.model = self._wrapped()
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch has the same shape

    def _wrapped(self) -> nn.Module:
        """The forward pass as a step calls it: among several processes, and compiled, where that is asked for."""
        model, is_alone = self.forward_pass, process_count() == 1
        if not is_alone:
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        if not self.config.compile:
            return model
        if not is_alone:
            self.forward_pass.gather = torch.compiler.disable(gather_with_gradient)
        # The xor loss's (C, 2B) table, a few KiB: the compiler lays it out as it likes, nothing to act on.
        warnings.filterwarnings("ignore", message="torch.searchsorted")
        # Batches have one shape; one GPU replays the step as CUDA graphs.
        mode = "reduce-overhead" if self.device.type == "cuda" and is_alone else "default"
        return torch.compile(model, dynamic=False, mode=mode)

    def show(self, content: Tensor, style: Tensor) -> None:
        """Have `report` paint and look at these pictures, (n, 3, H, W), uint8, each."""
        self.shown_pictures = content[:PREVIEW_PICTURES], style[:PREVIEW_PICTURES]
        # Units of a decoder that is to be compacted are meant to die.
        self.dead_units = DeadUnits(content, style, warns="decoder" not in COMPACT_LAYERS[self.config.compact_layers])

    def step(self, content: Tensor, style: Tensor, all_terms: bool = False) -> dict[str, Tensor]:
        """One step of the optimiser. content, style: (B, 3, H, W), uint8. Returns `TransferConfig.metrics` as
        scalars on the device, without terms that were left out."""
        if self.config.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may be overwritten
        self.optimizer.zero_grad(set_to_none=True)
        content, style = (normalize(pictures).to(self.dtype) for pictures in (content, style))
        terms, norms = self.model(content, style, all_terms, self.move)
        weights, progress = self.config.weights, {}
        if self.census is not None:
            self.census.add(norms)
            progress["macs"] = self.census.macs()
        if self.steering is not None:
            weights["channel"] = progress["channel_weight"] = self.steering.update(progress["macs"])
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

    def layer_widths(self) -> list[int]:
        """The channels on in each selected layer, encoder then decoder, in forward order."""
        return torch.cat(list(self.census.widths().values())).int().tolist()

    def state(self) -> dict:
        """What a checkpoint needs to go on; it is a model file too."""
        parts = {"census": self.census, "steering": self.steering}
        state = {name: part.state() for name, part in parts.items() if part is not None}
        return model_checkpoint(self.network, vgg_weights=self.vgg_origin, **state,
                                optimizer=self.optimizer.state_dict(), optimized=self._optimized())

    def _optimized(self) -> list[list]:
        """Name and shape of each parameter that learns, in the optimiser's order."""
        names = {parameter: name for name, parameter in self.forward_pass.named_parameters()}
        return [[names[parameter], list(parameter.shape)]
                for group in self.optimizer.param_groups for parameter in group["params"]]

    def restore(self, checkpoint: dict) -> None:
        """Put back `state` but for the weights, which the network was built with. Raises UserError when other parts
        were trained. What the run did not count or steer before starts anew."""
        if checkpoint.get("optimized", self._optimized()) != self._optimized():
            raise UserError("--resume: --encoder_lr or --decoder_lr freezes or thaws a part; "
                            "start a new run with --load_path for that")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.begin(checkpoint["iteration"])  # load_state_dict put those of its run back
        same_layers = checkpoint["train_config"].get("compact_layers") == self.config.compact_layers
        if self.census is not None and same_layers and "census" in checkpoint:
            self.census.restore(checkpoint["census"])
        if self.steering is not None:
            if "steering" in checkpoint:
                self.steering.restore(checkpoint["steering"])
            self.steering.iteration.fill_(checkpoint["iteration"])

    @torch.no_grad()
    def report(self, folder: Path, iteration: int) -> tuple[dict, Path]:
        """Count dead units, and what is left of compacted layers; write a picture with the rows content, style, output
        to `samples/`. Returns the counts for metrics.jsonl, and the picture's path."""
        path = make_folder(folder / "samples", "--save_path") / f"iteration_{iteration:07d}.png"
        content, style = (normalize(pictures.to(self.device)).to(self.dtype) for pictures in self.shown_pictures)
        with self.forward_pass.autocast(self.device):
            style_statistics = channel_statistics(self.network.encoder(style))
            output = self.network.decoder(adain(self.network.encoder(content), *style_statistics))
        save_picture(picture_grid([content, style, output.float()]), path)
        has_layers = self.config.compact_layers != "bottleneck"
        widths = {"layer_widths": self.layer_widths()} if has_layers else {}
        return self.dead_units.count(self.network) | widths, path


def parameter_groups(module: nn.Module, optimizer: str) -> list[dict]:
    """The parameters of a part of the network, in groups as the optimiser takes them: Muon takes the filters of the
    hidden layers as matrices; biases, and the filters that give the picture's three colours, learn by Adam."""
    if optimizer == "adam":
        return [{"params": list(module.parameters())}]
    groups = {is_matrix: {"params": [], "orthogonal": is_matrix} for is_matrix in (True, False)}
    for parameter in module.parameters():
        groups[parameter.dim() == 4 and len(parameter) > 3]["params"].append(parameter)
    return list(groups.values())


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

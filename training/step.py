"""The training step of style transfer: one forward pass, the terms of the loss, backward."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

import loss as losses
from data import denormalize, normalize, save_picture, to_pil
from folders import FailedPictures
from network import LossNetwork, StyleTransferNetwork, align, bottleneck_conv, level_statistics
from training.compaction import COMPACT_LAYERS, ChannelCensus, CompactLosses, TargetSteering
from training.dead_units import DeadUnits
from training.muon import Muon
from training.sampling import TrainingPictures, first_pictures
from utils import UserError, autocast_dtype, gather_with_gradient, make_folder, note, process_count
from weights import model_checkpoint

CENSUS_MEMORY = 100  # batches, or a twentieth of the run's
MOVES_APART = 29  # has no divisor in common with stride**2 - 1, so that every move has its turn
PREVIEW_PICTURES = 4


class ForwardPass(nn.Module):
    """One forward pass of training: pictures in, the terms of the loss out; DistributedDataParallel can wrap it."""

    def __init__(self, network: StyleTransferNetwork, loss_network: LossNetwork, config,
                 amp_dtype: torch.dtype | None, device: torch.device) -> None:
        super().__init__()
        self.network, self.loss_network = network, loss_network
        self.weights, self.style_loss = config.weights, config.style_loss
        self.autocast = {"device_type": device.type, "dtype": amp_dtype, "enabled": amp_dtype is not None}
        self.processes = process_count()
        is_cut = config.compile and self.processes > 1  # compiled graphs do not reach over processes
        self.gather = torch.compiler.disable(gather_with_gradient) if is_cut else gather_with_gradient
        self.compact = CompactLosses(network.config, config.compact_layers, config.compact_cost, config.l0_eps, device)
        self.parts = COMPACT_LAYERS[config.compact_layers]
        self.whole_encoder = config.compact_layers in ("encoder", "all")  # else only its last layer is looked at
        self.level_convs = network.config.level_convs
        # The memory format of each in which convolutions are fastest. On a CPU, the gradient of a 3 x 3 conv's weight
        # in float32 takes up to twice as long in channels_last (64 channels at 128 x 128: 172 ms against 78 ms).
        is_slow = device.type == "cpu" and amp_dtype is None
        self.formats = {"loss_network": torch.channels_last}
        for part, rate in config.learning_rates.items():
            self.formats[part] = torch.contiguous_format if is_slow and rate else torch.channels_last
            getattr(network, part).to(memory_format=self.formats[part]).requires_grad_(rate > 0)
        if config.encoder_layers == "bottleneck":
            network.encoder.requires_grad_(False)
            network.get_submodule(bottleneck_conv(network.config)).requires_grad_(True)
        # What is frozen of the encoder is computed once where it is the loss network's beginning: so many layers.
        encoder = network.encoder.layers[0]
        learning = [int(name.split(".")[0]) for name, each in encoder.named_parameters() if each.requires_grad]
        frozen = encoder[: min(learning, default=len(encoder))]
        ours, vgg = frozen.state_dict(), loss_network.layers[: len(frozen)].state_dict()
        is_shared = (not self.whole_encoder and network.config.adain_levels == 1 and network.config.pooling == "max"
                     and network.config.padding == loss_network.padding
                     and all(torch.equal(ours[name], vgg[name]) for name in ours))
        self.shared_layers = len(frozen) if is_shared else 0
        # Frozen weights that autocast would round anew at every use are rounded once.
        loss_network.to(dtype=amp_dtype, memory_format=torch.channels_last)

    def forward(self, content: Tensor, style: Tensor, all_terms: bool,
                move: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
        """The terms of the loss for one batch (Kim & Choi, eq. 6: total = content + sum of weight * term).

        content, style: (B, 3, H, W), ImageNet-normalised. A term of weight 0 is left out, or with `all_terms` measured
        without a gradient. move: (2,), see `losses.moved`. Returns the terms by name, and the channel norms of the
        global batch, of the bottleneck and of the selected layers, see `CompactLosses`. Averaged over processes, terms
        and gradients are those of one process with the whole batch.
        """
        both = torch.cat([content, style])  # (2B, 3, H, W)
        with torch.autocast(**self.autocast):
            with torch.no_grad():
                also = (self.shared_layers - 1,) if self.shared_layers else ()
                targets = self.loss_network(both.contiguous(memory_format=self.formats["loss_network"]), also)
                targets, shared = targets[: len(self.loss_network.taps)], targets[len(self.loss_network.taps) :]
            encoder_features, levels = self._encode(both, *shared)
            content_features, style_features = zip(*(level.chunk(2) for level in levels))  # (B, C, H/stride, W/stride)
            *decoder_features, output = self._decode(align(content_features, *level_statistics(style_features)))
            output_features = self.loss_network(output.contiguous(memory_format=self.formats["loss_network"]))

        content_targets, style_targets = zip(*(target.chunk(2) for target in targets))
        norms = {"encoder": self._norms(encoder_features)}  # (2B * processes, C) each
        if "decoder" in self.parts:
            norms["decoder"] = self._norms(decoder_features)  # (B * processes, C') each
        selected = [norm for part in self.parts for norm in norms[part]]
        spared = self.compact.spared(selected)
        compute = {
            "content": lambda: losses.content_loss(output_features, content_targets),
            "style": lambda: losses.style_loss(output_features, style_targets, self.style_loss),
            # The mean of content and style, each a sum over the batch: over the global one.
            "uncorrelation": lambda: 0.5 * self.processes * losses.uncorrelation_loss(encoder_features[-1]),
            "channel": lambda: self.compact.channel_loss(spared),
            "xor": lambda: self.compact.xor_loss(spared),
            "shift": lambda: self._shift_loss(content, style_features, output, move),
        }
        terms = {}
        for name, weight in self.weights.items():
            if weight or all_terms:
                with torch.set_grad_enabled(weight > 0):
                    terms[name] = compute[name]()
        return terms, norms["encoder"][-1].detach(), [norm.detach() for norm in selected]

    def _encode(self, image: Tensor, shared: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The features whose channels the losses look at, in forward order, and those that AdaIN acts on, the deepest
        first. shared: what the `shared_layers` make of the image, if they have done so."""
        if shared is not None:
            shared = shared.contiguous(memory_format=self.formats["encoder"])
            return ([self.network.encoder.layers[0][self.shared_layers :](shared)],) * 2
        convs = None if self.whole_encoder else self.level_convs
        features = self.network.encoder.features(image.contiguous(memory_format=self.formats["encoder"]), convs=convs)
        if convs is None:
            return features, [features[conv] for conv in self.level_convs]
        return features[-1:], features[::-1]

    def _decode(self, aligned: list[Tensor]) -> list[Tensor]:
        """The features of all layers, in forward order; the last is the output."""
        aligned = [each.contiguous(memory_format=self.formats["decoder"]) for each in aligned]
        return self.network.decoder.features(*aligned)

    def _norms(self, features: list[Tensor]) -> Sequence[Tensor]:
        """The channel norms of each layer, of the global batch, gathered at once."""
        norms = [losses.channel_norm(feature) for feature in features]
        return self.gather(torch.cat(norms, dim=1)).split([norm.shape[1] for norm in norms], dim=1)

    def _shift_loss(self, content: Tensor, style_features: Sequence[Tensor], output: Tensor, move: Tensor) -> Tensor:
        """Of the output, and what is painted of the content pictures `losses.moved`, in the same styles."""
        with torch.autocast(**self.autocast):
            _, levels = self._encode(losses.moved(content, move))
            *_, moved_output = self._decode(align(levels, *level_statistics(style_features)))
        return losses.shift_loss(output, moved_output, move, self.network.config.stride)


class TransferTrainer:
    """The networks, the optimiser and one training step."""

    def __init__(self, network: StyleTransferNetwork, loss_network: LossNetwork, config, device: torch.device,
                 vgg_origin: str | None = None) -> None:
        """config: a TrainConfig; vgg_origin: where the loss network's weights are from, for the file. All is computed
        in the network's data type, its convolutions with `config.amp` in another."""
        self.config, self.device, self.vgg_origin = config, device, vgg_origin
        self.amp_dtype = autocast_dtype(config.amp, device)
        self.network = network.to(device).train()
        self.dtype = next(network.parameters()).dtype
        self.forward_pass = ForwardPass(network, loss_network.to(device, self.dtype), config, self.amp_dtype, device)
        groups = [{"params": [each for each in getattr(network, part).parameters() if each.requires_grad], "lr": rate}
                  for part, rate in config.learning_rates.items() if rate]  # without one, a part is frozen
        self.optimizer = (Muon(groups, self.amp_dtype or self.dtype) if config.optimizer == "muon"
                          else torch.optim.Adam(groups, fused=True))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        if config.warmup_iter + config.decay_iter > config.max_iter:
            most = (config.max_iter + 1) / (max(1, config.warmup_iter) + config.decay_iter + 1)  # where the lines meet
            note(f"--warmup_iter {config.warmup_iter} and --decay_iter {config.decay_iter} of --max_iter "
                 f"{config.max_iter}: the learning rates reach at most {most:.0%} of what was asked for")
        self.optimized = [[name, list(each.shape)] for name, each in self.forward_pass.named_parameters()
                          if each.requires_grad]
        side = torch.arange(network.config.stride, device=device)
        self.moves = torch.cartesian_prod(side, side)[1:]  # of the shift loss, all but (0, 0)
        self.census = self.steering = None
        if config.takes_census:
            memory = max(1, min(CENSUS_MEMORY, config.max_iter // 20))
            self.census = ChannelCensus(network.config, config.compact_layers, memory, device)
        if config.target_macs is not None:
            start, least = self.census.macs(), self.census.least_macs
            if not least < config.target_macs < start:
                raise UserError(f"--target_macs {config.target_macs}: --compact_layers {config.compact_layers} takes "
                                f"this network from {start:.3f} to {least:.3f} of the full one's multiply-adds at most")
            self.steering = TargetSteering(config.channel_loss_weight, start, config.target_macs, config.max_iter)
        self.shown = [*(name for name, weight in config.weights.items() if weight), "total", "nonzero_channels"]
        self.shown += ["macs"] if self.census else []
        self.begin(1)

        # The forward pass as a step calls it: among several processes, and compiled, where that is asked for.
        self.model, is_alone = self.forward_pass, process_count() == 1
        if not is_alone:
            self.model = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if config.compile:  # batches have one shape; one GPU replays the step as CUDA graphs
            mode = "reduce-overhead" if device.type == "cuda" and is_alone else "default"
            # What torch.compile keeps is for the vector length of one processor, which its keys leave out (torch
            # 2.14): another processor, or ATEN_CPU_CAPABILITY, would crash.
            if hasattr(torch.compiler, "config"):
                torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
            self.model = torch.compile(self.model, dynamic=False, mode=mode)
            # The xor loss's (C, 2B) table, a few KiB: the compiler lays it out as it likes, nothing to act on.
            warnings.filterwarnings("ignore", message="torch.searchsorted")
        torch.backends.cudnn.benchmark = True  # every batch has the same shape

    def show(self, pictures: TrainingPictures, _held_out, tallies: Sequence[FailedPictures]) -> None:
        """Have `report` paint and look at the first pictures."""
        content, style = first_pictures(pictures, DeadUnits.PAIRS, tallies)  # (n, 3, H, W), uint8, each
        self.shown_pictures = content[:PREVIEW_PICTURES], style[:PREVIEW_PICTURES]
        # Units of a decoder that is to be compacted are meant to die.
        self.dead_units = DeadUnits(content, style, warns="decoder" not in COMPACT_LAYERS[self.config.compact_layers])

    def begin(self, iteration: int) -> None:
        """Set the learning rates, and the move of the shift loss, for the step of an iteration, counted from 1."""
        self.iteration = iteration
        self.move = self.moves[MOVES_APART * iteration % len(self.moves)]
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * self.config.rate_share(iteration)

    def step(self, content: Tensor, style: Tensor, all_terms: bool = False) -> dict[str, Tensor]:
        """One step of the optimiser. content, style: (B, 3, H, W), uint8. Returns scalars on the device: the terms, see
        `ForwardPass`, their weighted total, how many bottleneck channels are on for a picture, off for all and for
        some, and what is left of the network, where that is followed."""
        if self.config.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step returned may be overwritten
        self.optimizer.zero_grad(set_to_none=True)
        content, style = (normalize(pictures).to(self.dtype) for pictures in (content, style))
        terms, bottleneck, norms = self.model(content, style, all_terms, self.move)

        weights, progress = self.config.weights, {}
        if self.census is not None:
            self.census.add(norms)
            progress["macs"] = self.census.macs()
        if self.steering is not None:
            weights["channel"] = progress["channel_weight"] = self.steering.update(progress["macs"], self.iteration)
        total = sum(weights[name] * terms[name] for name, weight in self.config.weights.items() if weight)
        total.backward()
        self.optimizer.step()

        off = bottleneck == 0  # (2B, C)
        return {name: term.detach() for name, term in terms.items()} | progress | {
            "total": total.detach(),
            "nonzero_channels": (bottleneck > 0).sum(dim=1).float().mean(),
            "channels_off_for_all": off.all(dim=0).sum().float(),
            "channels_off_for_some": off.any(dim=0).sum().float(),
        }

    @torch.no_grad()
    def report(self, folder: Path, iteration: int) -> tuple[dict, Path]:
        """Count dead units, and what is left of compacted layers; write a picture with the rows content, style, output
        to `samples/`. Returns the counts for metrics.jsonl, and the picture's path."""
        path = make_folder(folder / "samples", "--save_path") / f"iteration_{iteration:07d}.png"
        content, style = (normalize(pictures.to(self.device)).to(self.dtype) for pictures in self.shown_pictures)
        with torch.autocast(**self.forward_pass.autocast):
            output = self.network(content, style)
        rows = denormalize(torch.cat([content, style, output.float()]))
        save_picture(to_pil(make_grid(rows, nrow=len(content), padding=4, pad_value=1.0)), path)
        counts = self.dead_units.count(self.network)
        if self.config.compact_layers != "bottleneck":  # encoder, then decoder, in forward order
            counts["layer_widths"] = self.census.widths().int().tolist()
        return counts, path

    def state(self) -> dict:
        """What a checkpoint needs beside the optimiser to go on; it is a model file too."""
        followed = {"census": self.census and {"selected": self.census.batches_off},
                    "steering": self.steering and {"log_change": self.steering.log_change}}
        return model_checkpoint(self.network, vgg_weights=self.vgg_origin, optimized=self.optimized,
                                **{name: kept for name, kept in followed.items() if kept})

    def restore(self, checkpoint: dict) -> None:
        """Put back `state` but for the weights, which the network was built with. Raises UserError when other parts
        were trained. What the run did not count or steer before starts anew."""
        if sorted(checkpoint.get("optimized", self.optimized)) != sorted(self.optimized):  # older ones by group
            raise UserError("--resume: --encoder_lr, --decoder_lr or --encoder_layers freezes or thaws a part; start a "
                            "new run for that")
        same_layers = checkpoint["train_config"].get("compact_layers") == self.config.compact_layers
        if self.census is not None and same_layers and "census" in checkpoint:
            self.census.batches_off.copy_(torch.cat([*checkpoint["census"].values()]))  # older ones have it by part
        if self.steering is not None and "steering" in checkpoint:
            self.steering.log_change.copy_(checkpoint["steering"]["log_change"])

"""`--mode train`: learn style transfer while the channel and xor losses switch channels off."""

from dataclasses import dataclass

import torch

from data import MAX_PIXELS
from loss import L0_EPS
from network import PADDINGS, LossNetwork, NetworkConfig, StyleTransferNetwork, build_from_vgg, initialize
from settings import amount, check_needed, count_or_zero, epsilon, proper_fraction, refuse, setting
from training.compaction import COMPACT_COSTS, COMPACT_LAYERS
from training.loop import run_training
from training.sampling import TrainingPictures
from training.step import TransferTrainer
from utils import UserError, note, process_count
from weights import load_network, load_vgg, same_vgg

# Settings that a resumed run keeps.
FIXED = ("backbone", "swap_max_pool", "pooling", "load_path", "new_weights", "upsampling", "padding", "optimizer",
         "adain_levels")
PUBLISHED_RATES = {"encoder": 5e-6, "decoder": 1e-4}


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run, with its default, the published `ch_xor`; `main.py` makes the flags from it."""

    lr: float | None = setting(None, more="of both parts", none="each part has its own")
    encoder_lr: float | None = setting(None, "learning rate of the encoder; 0 freezes it", "learning", amount,
                                       none=f"--lr, or {PUBLISHED_RATES['encoder']:g}")
    decoder_lr: float | None = setting(None, "learning rate of the decoder; 0 freezes it", "learning", amount,
                                       none=f"--lr, or {PUBLISHED_RATES['decoder']:g}")
    encoder_layers: str = setting(
        "all", "layers of the encoder that learn: all, as published, or the bottleneck alone, which takes less time, "
        "and leaves the decoder the features that it knows", "learning", choices=("all", "bottleneck"))
    optimizer: str = setting("adam", "adam, as published, or muon (Jordan et al., 2024): updates made orthogonal",
                             "learning", choices=("adam", "muon"))
    warmup_iter: int = setting(0, "first iterations, over which the learning rates rise", "learning", count_or_zero)
    decay_iter: int = setting(0, "last iterations, over which the learning rates fall to 0", "learning", count_or_zero)
    max_iter: int = 80_000
    style_loss: str = "meanstd"
    style_loss_weight: float = setting(100.0, "weight of the style loss; the content loss's is 1", "losses", amount)
    uncorrelation_loss_weight: float = setting(0.0, "weight of the uncorrelation loss", "losses", amount)
    channel_loss_weight: float = setting(1e4, "weight of the channel loss: it switches channels off", "losses", amount)
    xor_loss_weight: float = setting(500.0, "weight of the xor loss: the same channels off for all", "losses", amount)
    shift_loss_weight: float = setting(
        0.0, "weight of the shift loss, beyond the papers: a photograph moved by a few pixels is to be painted the "
        "same, moved, which makes videos calmer; 30 is much", "losses", amount)
    l0_eps: float | str = setting(
        L0_EPS, "epsilon of the channel and xor losses, in units of a channel's l2 norm; a larger one switches off "
        "stronger channels; relative:N is N times the mean norm of each layer", "compaction", epsilon, metavar="N")
    compact_layers: str = setting("bottleneck", "layers of the channel and xor losses; bottleneck is as published",
                                  "compaction", choices=tuple(COMPACT_LAYERS))
    compact_cost: str = setting("count", "share that the channel loss measures: of channels that are on, or of their "
                                "multiply-adds", "compaction", choices=COMPACT_COSTS)
    target_macs: float | None = setting(
        None, "adjust the weight of the channel loss, starting from --channel_loss_weight, so that the run ends at "
        "this fraction of the full network's multiply-adds", "compaction", proper_fraction)
    amp: str = setting("auto", more="auto is bf16 on GPUs and CPUs that are fast in it, and off elsewhere")
    compile: bool = setting(False, "faster training by torch.compile, after a minute or more of compiling; on a CPU it "
                            "needs a C++ compiler", "the device")
    content_dir: str | None = setting(needed=True)
    style_dir: str | None = setting(needed=True)
    save_path: str | None = setting(needed=True)
    load_path: str | None = setting(more="what training starts from")
    new_weights: bool = False
    resume: bool | str = False  # "auto": where there is a run
    backbone: str = "vgg19"
    swap_max_pool: bool = False
    pooling: str | None = None  # None: as --load_path says, or max
    upsampling: str | None = None  # None: as --load_path says, or nearest
    padding: str | None = setting(
        None, "how encoder and loss network pad: zeros, as published, or reflect, which avoids a visible frame",
        "networks", choices=PADDINGS, none="as the model file says; new networks: zeros")
    adain_levels: int | None = None  # None: as --load_path says, or 1
    vgg_weights: str = setting("imagenet", more="also of a new encoder")
    imsize: int = 512
    cropsize: int = setting(256, more="it is cut at a random place, and a multiple of 8")
    cencrop: bool = setting(False, "cut the squares from the centre, not at a random place", "pictures to read")
    max_pixels: int = MAX_PIXELS
    cache_dir: str | None = setting(None, "folder that keeps the resized pictures, 1 MB for 512 x 683 pixels, for this "
                                    "and later runs: each is decoded only once", "pictures to read")
    holdout: float = 0.0
    batch_size: int = setting(4, more="this many photographs and this many paintings")
    check_iter: int = 500
    keep_checkpoints: int = 3
    seed: int = 0
    num_workers: int | None = None  # None: one a core, at most 8
    gpu_no: int | None = None
    wb_mode: str = setting("auto", "auto is online where a key is set up, and offline elsewhere; it never asks",
                           "wandb", choices=("auto", "online", "offline", "disabled"))
    wb_project: str = setting("compact_image_style_transfer", "project of the run", "wandb", str, metavar="TEXT")
    wb_name: str | None = setting(None, "name of the run", "wandb", str, metavar="TEXT", none="chosen by wandb")
    wb_notes: str | None = setting(None, "notes on the run", "wandb", str, metavar="TEXT")
    wb_tags: tuple[str, ...] | None = setting(None, "tags of the run", "wandb", str, metavar="TEXT")

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each part; 0 freezes it."""
        given = {part: (getattr(self, f"{part}_lr"), self.lr, rate) for part, rate in PUBLISHED_RATES.items()}
        return {part: next(rate for rate in rates if rate is not None) for part, rates in given.items()}

    def rate_share(self, iteration: int) -> float:
        """What the learning rates are multiplied by in an iteration, counted from 1: straight lines up over the first
        `warmup_iter`, and down to 0, behind the last, over the last `decay_iter`."""
        return min(1.0, iteration / max(1, self.warmup_iter), (self.max_iter + 1 - iteration) / (self.decay_iter + 1))

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term in the total loss; with `target_macs`, the channel loss's at the start."""
        names = ("style", "uncorrelation", "channel", "xor", *(("shift",) if self.shift_loss_weight else ()))
        return {"content": 1.0} | {name: getattr(self, f"{name}_loss_weight") for name in names}

    @property
    def takes_census(self) -> bool:
        """Whether the multiply-adds that are left are followed: in all but the published method."""
        return (self.compact_layers, self.compact_cost, self.target_macs) != ("bottleneck", "count", None)

    def check(self) -> None:
        """Raises UserError for settings that make no sense, naming the flag."""
        if not self.resume:  # a resumed run has them
            check_needed(self, "train")
        rates, parts = self.learning_rates, COMPACT_LAYERS[self.compact_layers]
        switches_off = self.takes_census and (self.channel_loss_weight or self.xor_loss_weight)
        frozen = [part for part in parts if switches_off and not rates[part]]
        refuse({
            f"--cropsize {self.cropsize}: a multiple of 8, 16 or more": self.cropsize < 16 or self.cropsize % 8,
            "--new_weights: --load_path says of which network's widths": self.new_weights and not self.load_path,
            "--encoder_lr 0 and --decoder_lr 0: both parts are frozen": not any(rates.values()),
            "--new_weights: random weights of a frozen part would stay":
                self.new_weights and not (all(rates.values()) and self.encoder_layers == "all"),
            f"--encoder_layers {self.encoder_layers} with --encoder_lr 0: no layer of the encoder learns":
                self.encoder_layers != "all" and not rates["encoder"],
            f"--encoder_layers {self.encoder_layers} with --compact_layers {self.compact_layers}: what is frozen stays":
                self.encoder_layers != "all" and self.compact_layers in ("encoder", "all"),
            f"--swap_max_pool is --pooling avg, and --pooling {self.pooling} was given too":
                self.swap_max_pool and self.pooling not in (None, "avg"),
            f"--compact_cost {self.compact_cost}: {' or '.join(COMPACT_COSTS)} is needed":  # of an older run
                self.compact_cost not in COMPACT_COSTS,
            f"--target_macs {self.target_macs} steers the channel loss's weight, and --channel_loss_weight is 0":
                self.target_macs is not None and not self.channel_loss_weight,
            f"--compact_layers {self.compact_layers} with --{''.join(frozen[:1])}_lr 0: what is frozen stays; choose "
            "other layers, or --channel_loss_weight 0 --xor_loss_weight 0": frozen,
            f"--compact_layers {self.compact_layers} with --batch_size {self.batch_size}: the xor loss compares the "
            "outputs of 2 pictures or more": "decoder" in parts and self.batch_size * process_count() < 2,
        })


def build_trainer(config: TrainConfig, device: torch.device, checkpoint: dict | None) -> TransferTrainer:
    """The trainer at its start, or with the network of the checkpoint, for its `restore`."""
    torch.manual_seed(config.seed)
    vgg, origin = load_vgg(config.backbone, config.vgg_weights, config.seed)
    note(f"VGG weights: {origin}")
    network = build_from_vgg(NetworkConfig.full(config.backbone, "avg" if config.swap_max_pool else "max"), vgg)
    if checkpoint is not None:
        if not same_vgg(checkpoint.get("vgg_weights"), origin):
            raise UserError(f"--resume: the run was started with VGG weights {checkpoint.get('vgg_weights')}, "
                            f"now they are {origin}")
        network = StyleTransferNetwork(NetworkConfig(**checkpoint["config"]))
        network.load_state_dict(checkpoint["state_dict"])
    elif config.load_path:
        network, _ = load_network(config.load_path, config.swap_max_pool, config.backbone, config.vgg_weights)
        if config.new_weights:
            initialize(network)
    network.use(config.upsampling, config.padding, config.pooling, config.adain_levels)
    if None not in (config.lr, config.encoder_lr, config.decoder_lr):
        note("--lr has no effect: --encoder_lr and --decoder_lr are the rates of both parts")
    if config.compact_layers != "bottleneck" and network.config.adain_levels > 1:
        raise UserError(f"--compact_layers {config.compact_layers}: this network adds features of its encoder to its "
                        f"decoder's (adain_levels {network.config.adain_levels}), which the losses do not switch off "
                        "together; bottleneck is needed")
    return TransferTrainer(network, LossNetwork(config.backbone, network.config.padding, vgg), config, device, origin)


def train(given: dict) -> int:
    """Run `--mode train` with the flags given on the command line. Returns the exit code."""
    return run_training("train", TrainConfig, given, FIXED, build_trainer, TrainingPictures)

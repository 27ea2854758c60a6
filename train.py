"""`--mode train`: learn style transfer while the channel and xor losses switch channels off."""

from dataclasses import asdict, dataclass

import torch

from data import MAX_PIXELS
from folders import open_folder, split_holdout
from network import PADDINGS, NetworkConfig, StyleTransferNetwork, build_from_vgg, build_loss_network, initialize
from settings import setting
from training.compaction import COMPACT_COSTS, COMPACT_LAYERS, range_of_macs
from training.dead_units import DeadUnits
from training.loop import Run, is_finished, open_config
from training.run_folder import CheckpointFolder, WandbRun
from training.sampling import CropConfig, PictureCache, TrainingPictures, first_pictures
from training.step import TransferConfig, TransferTrainer
from utils import (
    UserError,
    allow_tf32,
    describe_device,
    is_first_process,
    make_folder,
    note,
    process_count,
    process_group,
    resolve_device,
)
from weights import load_network, load_vgg, same_vgg

# Settings that a resumed run keeps.
FIXED = ("backbone", "swap_max_pool", "pooling", "load_path", "new_weights", "upsampling", "padding", "optimizer")


@dataclass(frozen=True)
class TrainConfig(TransferConfig):
    """Every setting of a training run, with its default; `main.py` makes the flags from it."""

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
        None, "how the encoder and the loss network continue a picture at its border: zeros, as published, or reflect, "
        "which avoids a visible frame", "networks", choices=PADDINGS,
        none="as the model file says; new networks: zeros")
    vgg_weights: str = setting("imagenet", more="also of a new encoder")
    imsize: int = 512
    cropsize: int = setting(256, more="it is cut at a random place, and a multiple of 8")
    cencrop: bool = setting(False, "cut the squares from the centre, not at a random place", "pictures to read")
    max_pixels: int = MAX_PIXELS
    cache_dir: str | None = setting(
        None, "folder that keeps the resized pictures for this and later runs, so that each is decoded only once; "
        "takes 3 bytes per pixel, 1 MB for a picture of 512 x 683", "pictures to read")
    holdout: float = 0.0
    batch_size: int = setting(4, more="this many photographs and this many paintings")
    check_iter: int = 500
    keep_checkpoints: int = 3
    seed: int = 0
    num_workers: int | None = None  # None: one a core, at most 8
    gpu_no: int | None = None
    wb_mode: str = setting(
        "auto", "auto is online where a key is set up, and offline elsewhere; it never asks", "wandb",
        choices=("auto", "online", "offline", "disabled"))
    wb_project: str = setting("compact_image_style_transfer", "project that the run belongs to", "wandb",
                              metavar="TEXT")
    wb_name: str | None = setting(None, "name of the run", "wandb", metavar="TEXT", none="chosen by wandb")
    wb_notes: str | None = setting(None, "notes on the run", "wandb", metavar="TEXT")
    wb_tags: tuple[str, ...] | None = setting(None, "tags of the run", "wandb", metavar="TEXT")

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
        if self.swap_max_pool and self.pooling not in (None, "avg"):
            raise UserError(f"--swap_max_pool is --pooling avg, and --pooling {self.pooling} was given too")
        if self.warmup_iter + self.decay_iter > self.max_iter:
            raise UserError(f"--warmup_iter {self.warmup_iter} and --decay_iter {self.decay_iter}: together more than "
                            f"--max_iter {self.max_iter}")
        if not any(self.learning_rates.values()):
            raise UserError("--encoder_lr 0 and --decoder_lr 0: both parts are frozen, nothing would be learned")
        self._check_compacting()

    def _check_compacting(self) -> None:
        if self.compact_cost not in COMPACT_COSTS:  # of an older run
            raise UserError(f"--compact_cost {self.compact_cost}: {' or '.join(COMPACT_COSTS)} is needed")
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


def build_trainer(config: TrainConfig, device: torch.device, checkpoint: dict | None) -> TransferTrainer:
    """The trainer at its start, or with the network of the checkpoint, for its `restore`."""
    torch.manual_seed(config.seed)
    vgg, origin = load_vgg(config.backbone, config.vgg_weights, config.seed)
    if checkpoint is not None and not same_vgg(checkpoint.get("vgg_weights"), origin):
        raise UserError(f"--resume: the run was started with VGG weights {checkpoint.get('vgg_weights')}, "
                        f"now they are {origin}")
    pooling = "avg" if config.swap_max_pool else "max"
    network, _ = build_from_vgg(NetworkConfig.full(config.backbone, pooling), vgg)
    if checkpoint is not None:
        network = StyleTransferNetwork(NetworkConfig.from_dict(checkpoint["config"]))
        network.load_state_dict(checkpoint["state_dict"])
    elif config.load_path:
        network, _ = load_network(config.load_path, config.swap_max_pool, vgg_weights=config.vgg_weights)
        if network.config.backbone != config.backbone:
            raise UserError(f"--load_path {config.load_path} is a {network.config.backbone} network, "
                            f"--backbone says {config.backbone}")
        if config.new_weights:
            initialize(network, network)
    network.use(config.upsampling, config.padding, config.pooling)
    config.check_target(network.config)
    return TransferTrainer(network, build_loss_network(network.config, vgg), config, device, origin)


def train(given: dict) -> int:
    """Run `--mode train` with the flags given on the command line. Returns the exit code."""
    config, checkpoint = open_config("train", TrainConfig, given, FIXED)
    device = resolve_device(config.gpu_no)
    allow_tf32(True)
    with process_group(device):
        if is_finished(config, checkpoint):
            return 0
        paths, tallies = zip(*(open_folder(getattr(config, flag), f"--{flag}", config.max_pixels, config.save_path)
                               for flag in ("content_dir", "style_dir")))
        trainer = build_trainer(config, device, checkpoint)
        with CheckpointFolder.of_run(config.save_path, config.keep_checkpoints, checkpoint is not None) as folder:
            learned = [split_holdout(each, config.holdout)[0] for each in paths]
            pictures = TrainingPictures(*learned, config.crop, config.seed, _open_cache(config))
            trainer.show(*first_pictures(pictures, DeadUnits.PAIRS, tallies))
            precision = "float32" if trainer.forward_pass.amp_dtype is None else "bfloat16"
            note(f"training on {describe_device(device)}, {precision}; VGG weights: {trainer.vgg_origin}; "
                 f"{len(learned[0])} content and {len(learned[1])} style pictures")
            wandb_run = WandbRun(
                config.wb_mode if is_first_process() else "disabled", folder.folder,
                checkpoint["wandb_id"] if checkpoint else None, project=config.wb_project, name=config.wb_name,
                notes=config.wb_notes, tags=config.wb_tags, config=asdict(config),
            )
            try:
                return Run("train", config, trainer, folder, pictures, tallies, wandb_run, checkpoint).loop()
            except Exception as error:
                # torch.compile passes on what its backends raise: no compiler, no Triton, a GPU too old for it.
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"--compile: torch.compile failed ({reason}); training without the flag needs no "
                                "compiler") from error


def _open_cache(config: TrainConfig) -> PictureCache | None:
    if config.cache_dir is None:
        return None
    cache = PictureCache(make_folder(config.cache_dir, "--cache_dir"), config.max_pixels)
    if is_first_process():
        cache.remove_leftovers()
    return cache

"""The command line: `python main.py --mode {train,test,prune,distill} ...`."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from compact import COMPACT_COSTS, COMPACT_LAYERS, Epsilon
from data import PICTURE_SUFFIXES, TRIPLE
from distill import DistillConfig, distill
from evaluate import OUTPUT_NAME, TestConfig, test
from loss import STYLE_LOSSES
from network import BACKBONES, PADDINGS, UPSAMPLINGS
from prune import PRUNE_RANKS, PRUNED_LAYERS, PruneConfig, prune
from quality import METRICS
from train import TrainConfig, train
from transfer import OPTIMIZERS
from utils import UserError, note
from weights import VGG_SOURCES

MODES = {
    "train": (TrainConfig, train),
    "test": (TestConfig, test),
    "prune": (PruneConfig, prune),
    "distill": (DistillConfig, distill),
}
OTHER_NAMES = {"eval": "test", "prune_eval": "prune"}  # as the original implementation calls them
GONE = {"pretrain": "learning VGG weights without labels is gone; --vgg_weights bundled is the original VGG19, and "
                    "--mode distill teaches a narrow network"}


# -------------------------------------------------------------------------------------------- value types


def _number(
    kind: Callable, low: float, high: float, needed: str, exclude_low: bool = False, exclude_high: bool = False
) -> Callable:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, {needed} is needed") from None
        excluded = (exclude_low and value == low) or (exclude_high and value == high)
        if not math.isfinite(value) or not low <= value <= high or excluded:
            raise argparse.ArgumentTypeError(f"got {text}, {needed} is needed")
        return value

    return parse


count = _number(int, 1, math.inf, "a whole number, 1 or more,")
count_or_zero = _number(int, 0, math.inf, "a whole number, 0 or more,")
count_or_all = _number(int, -1, math.inf, "a whole number, -1 or more,")
amount = _number(float, 0, math.inf, "a number, 0 or more,")
fraction = _number(float, 0, 1, "a number from 0 to 1")
positive_fraction = _number(float, 0, 1, "a number above 0, at most 1,", exclude_low=True)
share = _number(float, 0, 0.9, "a number from 0 to 0.9")
proper_fraction = _number(float, 0, 1, "a number between 0 and 1", exclude_low=True, exclude_high=True)


def epsilon(text: str) -> float | str:
    """A number as such; `relative:NUMBER` as the text it is."""
    try:
        parsed = Epsilon.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, a number above 0 or relative:NUMBER is needed") from None
    return text if parsed.is_relative else parsed.value


# -------------------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class Flag:
    """One flag: its help text (with the unit) and argparse's own options. Its default lives in the configs."""

    name: str
    help: str
    options: dict = field(default_factory=dict)

    @property
    def modes(self) -> list[str]:
        """The modes whose configuration has a field of this name."""
        return [mode for mode, (config, _) in MODES.items() if self.name in _defaults(config)]

    @property
    def full_help(self) -> str:
        defaults = {mode: _show(_defaults(MODES[mode][0])[self.name]) for mode in self.modes}
        if "default" in self.help:
            text = self.help
        elif len(set(defaults.values())) == 1:
            text = f"{self.help} (default: {next(iter(defaults.values()))})"
        else:
            each = ", ".join(f"{value} in {mode}" for mode, value in defaults.items())
            text = f"{self.help} (default: {each})"
        return text.replace("%", "%%")


def _defaults(config: type) -> dict:
    return {each.name: each.default for each in fields(config)}


def _show(value) -> str:
    if value is None:
        return "none"
    if value is False:
        return "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


_SWITCH = {"action": "store_true"}
FLAGS = (
    Flag("gpu_no", "device: -1 is the CPU, n that GPU (default: GPU 0 when there is one, else the CPU)", {"type": int}),
    Flag("load_path", "model file, or the folder of a run: the model to test or prune, or to start training from; "
         "test compares several; distill: the network that learns from --teacher (default: none; in test the compact "
         "model of model-store/)", {"nargs": "+"}),
    Flag("save_path", "train, prune, distill: the folder to write to; test: a picture file, or a folder (default: "
         f"none; in test {OUTPUT_NAME}.png for one picture, the folder {OUTPUT_NAME} for more)"),
    Flag("content_dir", f"folder of photographs, searched recursively for {' '.join(PICTURE_SUFFIXES)} in any case"),
    Flag("style_dir", "folder of paintings, likewise"),
    Flag("content", "content picture (test: or a folder of them; prune: for the picture grid; default: a bundled one)"),
    Flag("style", "style picture (test: or a folder of them; prune: for the picture grid; default: a bundled one)"),
    Flag("backbone", "VGG of encoder and loss network; in test and prune the file says which, and another is refused",
         {"choices": BACKBONES}),
    Flag("swap_max_pool", "average pooling in place of max pooling in the encoder", _SWITCH),
    Flag("upsampling", "how the decoder upsamples: nearest, as published, or bilinear, without lines 8 pixels apart "
         "where brightness changes slowly (default: as in the file of --load_path; of a new network nearest)",
         {"choices": UPSAMPLINGS}),
    Flag("padding", "how the encoder, and the loss network with it, pads: zeros, as published and as VGG learned, or "
         "reflect, without a frame on plain pictures (default: as in the file of --load_path; of a new network zeros)",
         {"choices": PADDINGS}),
    Flag("style_strength", "0 gives the content picture back, 1 the full style", {"type": fraction}),
    Flag("margin", "pixels, a multiple of 8, by which content and style are continued by reflection for the encoder, "
         "so that zero padding paints no frame along the border (prune: of the picture grid); 0: as published",
         {"type": count_or_zero}),
    Flag("imsize", "bring the shorter side of every picture to this many pixels", {"type": count}),
    Flag("cropsize", "side of the square cut from every picture, pixels (train, distill: at random, a multiple of "
         "8; test, prune: from the centre)", {"type": count}),
    Flag("cencrop", "cut training crops from the centre, not at random", _SWITCH),
    Flag("max_pixels", "refuse pictures of more pixels than this", {"type": count}),
    Flag("cache_dir", "folder to keep the resized pictures in, for this and later runs: each is decoded once "
         "(disk: 3 * imsize^2 bytes a square picture, 1.05 MB for 512 x 683)"),
    Flag("pairs", "stylise this many pairs, every picture as often as any other or once more (default: every content "
         "with every style)", {"type": count}),
    Flag("metrics", "measure content and style loss as in training, SSIM and ST-LPIPS of content and output, and write "
         "metrics.json; without names, all (default: measure nothing)", {"nargs": "*", "choices": tuple(METRICS)}),
    Flag("vgg_weights", f"where encoder (train) and loss network start: {', '.join(VGG_SOURCES)}, or the path of a "
         ".pth or .safetensors file with torchvision's keys"),
    Flag("holdout", "share of each folder's pictures, chosen by name, that is not learned from; test and prune take "
         "only this share of a folder, or with 0 all of it",
         {"type": share}),
    Flag("lr", "learning rate (train: of encoder and decoder where theirs is not given; distill: the highest, "
         "between a warm-up and a decay to 0 at --max_iter)", {"type": amount}),
    Flag("encoder_lr", "learning rate of the encoder; 0 freezes it (default: --lr)", {"type": amount}),
    Flag("decoder_lr", "learning rate of the decoder; 0 freezes it (default: --lr)", {"type": amount}),
    Flag("optimizer", "adam, as published, or muon: updates of the filters made orthogonal (Jordan et al., 2024); it "
         "learns faster from a new decoder", {"choices": OPTIMIZERS}),
    Flag("warmup_iter", "first iterations, over which the learning rates rise from 0", {"type": count_or_zero}),
    Flag("decay_iter", "last iterations of --max_iter, over which the learning rates fall to 0",
         {"type": count_or_zero}),
    Flag("max_iter", "iterations to train for", {"type": count}),
    Flag("batch_size", "pictures per iteration (train: of content and of style, each)", {"type": count}),
    Flag("style_loss", "statistics that the style loss compares", {"choices": STYLE_LOSSES}),
    Flag("style_loss_weight", "weight of the style loss (the content loss has 1)", {"type": amount}),
    Flag("uncorrelation_loss_weight", "weight of the uncorrelation loss", {"type": amount}),
    Flag("channel_loss_weight", "weight of the channel loss", {"type": amount}),
    Flag("xor_loss_weight", "weight of the xor loss", {"type": amount}),
    Flag("l0_eps", "epsilon of the channel and xor losses, in units of a channel's l2 norm; larger switches off "
         "stronger channels; relative:X is X times the mean norm of each layer in the batch", {"type": epsilon}),
    Flag("compact_layers", "layers whose channels the channel and xor losses act on: the paper's, or all of encoder, "
         "decoder (but its last), or both", {"choices": tuple(COMPACT_LAYERS)}),
    Flag("compact_cost", "what the channel loss measures: the share of those channels that are on, or the parameters "
         "or multiply-adds with as many on, as a fraction of the full network's", {"choices": COMPACT_COSTS}),
    Flag("target_macs", "steer the weight of the channel loss so that the run ends at this fraction of the full "
         "network's multiply-adds; --channel_loss_weight is where it starts", {"type": proper_fraction}),
    Flag("new_weights", "take only the widths from --load_path, and new weights (He initialisation): a narrow network "
         "from scratch", _SWITCH),
    Flag("teacher", "model file, or the folder of a run, whose outputs and bottleneck features are to be matched "
         f"(distillation); distill: also a folder of painted pictures, {'/NAME, '.join(TRIPLE)}/NAME, each of any "
         "suffix"),
    Flag("teacher_weight", "weight of the distillation loss, with --teacher", {"type": amount}),
    Flag("check_iter", "iterations between checks (metrics, picture grid or student, checkpoint)",
         {"type": count}),
    Flag("keep_checkpoints", "numbered checkpoints to keep beside the newest; -1 keeps all", {"type": count_or_all}),
    Flag("resume", "go on with the run in --save_path; flags not given are as that run had them", _SWITCH),
    Flag("amp", "mixed precision: auto is bf16 on GPUs of compute capability 8.0 and CPUs with AMX, else off",
         {"choices": ("auto", "off", "bf16")}),
    Flag("compile", "fuse the step with torch.compile, on one GPU with CUDA graphs; needs a C++ compiler on the CPU; "
         "takes a minute or more at the start", _SWITCH),
    Flag("seed", "seed of weights, pictures and crops (test: of --pairs and --vgg_weights random)",
         {"type": count_or_zero}),
    Flag("num_workers", "processes that decode pictures (default: one a core, at most 8)", {"type": count_or_zero}),
    Flag("wb_mode", "wandb: auto is online when a key is configured, else offline; it never asks",
         {"choices": ("auto", "online", "offline", "disabled")}),
    Flag("wb_project", "wandb project"),
    Flag("wb_name", "name of the wandb run (default: wandb makes one up)"),
    Flag("wb_notes", "notes on the wandb run"),
    Flag("wb_tags", "tags of the wandb run", {"nargs": "+"}),
    Flag("prune_images", "pictures of each folder to measure", {"type": count}),
    Flag("prune_layers", "cut channels of the bottleneck alone, or of every layer", {"choices": PRUNED_LAYERS}),
    Flag("prune_macs", "cut channels of all layers, the least important first, until this part of the multiply-adds is "
         "left (default: only channels that are off or constant for everything measured)", {"type": positive_fraction}),
    Flag("prune_rank", "what --prune_macs goes by: how much the picture changes without a channel, per multiply-add "
         "saved, its mean in its place; or magnitude, to compare with: the same share of every layer, the channels of "
         "the smallest filter weights", {"choices": PRUNE_RANKS}),
    Flag("round_to", "leave widths that are multiples of this, where the width before is not less: fewer channels are "
         "cut, or more with --prune_macs", {"type": count}),
    Flag("prune_num", "cut this many channels, weakest first (default: those that are zero for every measured picture)",
         {"type": count_or_zero}),
    Flag("prune_channels", "cut these channels, by index (default: see --prune_num)", {"type": int, "nargs": "+"}),
    Flag("prune_nums", "numbers of channels cut in the picture grid", {"type": count_or_zero, "nargs": "+"}),
    Flag("responses", "responses.npz of an earlier pruning of the same model: nothing is measured again"),
    Flag("half", "write the pruned weights in half precision: half the file, converted on load", _SWITCH),
    Flag("latency_runs", "timed runs behind each median latency", {"type": count}),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, no usage text: bad input gets one clear line."""
        raise UserError(f"{message} (see python main.py --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser, its flags grouped by mode. Flags that are not given leave no attribute behind."""
    parser = _Parser(
        prog="main.py", description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    parser.add_argument("--mode", choices=(*MODES, *OTHER_NAMES, *GONE), default="train",
                        metavar=f"{{{','.join((*MODES, *OTHER_NAMES))}}}",
                        help="train a network, stylise pictures, cut channels, or teach a network what another one "
                        "does; eval and prune_eval are other names of test and prune (default: train)")
    groups = {}
    for flag in FLAGS:
        title = " and ".join(", ".join(flag.modes).rsplit(", ", 1)) + (" mode" if len(flag.modes) == 1 else " modes")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(f"--{flag.name}", help=flag.full_help, **flag.options)
    return parser


def _fit(config: type, mode: str, name: str, value):
    """A parsed value as the mode's configuration holds it: several as a tuple. Raises UserError for several where
    the mode takes one."""
    if not isinstance(value, list):
        return value
    kind = next(each.type for each in fields(config) if each.name == name)
    if "tuple" in str(kind):
        return tuple(value)
    if len(value) > 1:
        raise UserError(f"--{name} {' '.join(map(str, value))}: {mode} mode takes one, not {len(value)}")
    return value[0]


def main(arguments: list[str] | None = None) -> int:
    """Parse, dispatch, and turn everything the user can put right into one line. Returns the exit code."""
    try:
        given = vars(build_parser().parse_args(arguments))
        mode = given.pop("mode")
        if mode in GONE:
            raise UserError(f"--mode {mode}: {GONE[mode]}")
        mode = OTHER_NAMES.get(mode, mode)
        config, run = MODES[mode]
        used = {name: _fit(config, mode, name, value) for name, value in given.items() if name in _defaults(config)}
        for name in given.keys() - used.keys():
            note(f"--{name} has no effect in {mode} mode")
        return run(used)
    except UserError as error:
        # Not `note`: of several processes, this may be the only one that failed.
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError:
        note("error: the GPU's memory is too small for this; a smaller --batch_size, --cropsize or --imsize helps")
        return 2
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        note("error: this machine's memory is too small for this; a smaller --batch_size, --cropsize or --imsize helps")
        return 2


if __name__ == "__main__":
    sys.exit(main())

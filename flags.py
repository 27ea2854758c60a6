"""The flags of the command line: topic, modes and meaning of each. Their defaults live in the configurations."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data import TRIPLE
from distill import DistillConfig
from evaluate import OUTPUT_NAME, TestConfig
from export import FORMATS, ExportConfig
from loss import STYLE_LOSSES
from network import BACKBONES, PADDINGS, POOLINGS, UPSAMPLINGS
from painting.control import PRESERVED
from painting.quality import METRICS
from prune import PRUNE_RANKS, PRUNED_LAYERS, PruneConfig
from train import TrainConfig
from training.compaction import COMPACT_COSTS, COMPACT_LAYERS, Epsilon
from training.step import OPTIMIZERS
from weights import VGG_SOURCES

ROOT = Path(__file__).parent
CONFIGS = {"train": TrainConfig, "test": TestConfig, "prune": PruneConfig, "distill": DistillConfig,
           "export": ExportConfig}
NEEDED = "needed"
MAX_RATE = 1000  # frames a second


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
fraction_below_1 = _number(float, 0, 1, "a number from 0 to below 1", exclude_high=True)
share = _number(float, 0, 0.9, "a number from 0 to 0.9")
proper_fraction = _number(float, 0, 1, "a number between 0 and 1", exclude_low=True, exclude_high=True)


def rate(text: str) -> float:
    """Frames a second: a number above 0, or a fraction."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = 0.0
    if not 0 < value <= MAX_RATE:
        raise argparse.ArgumentTypeError(f"got {text!r}, a number above 0, at most {MAX_RATE}, or a fraction such as "
                                         "30000/1001 is needed")
    return value


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
    """One flag, and the modes that have it. Its defaults live in the configurations of those modes."""

    name: str
    modes: tuple[str, ...]
    help: str
    type: Callable = str  # from the text to the value; bool for a switch, whose choices are words that may follow it
    choices: tuple[str, ...] = ()
    several: tuple[str, ...] = ()  # the modes in which it takes more than one value
    nargs: str = "+"  # where it takes several; "*" where none has a meaning, too
    needed: tuple[str, ...] = ()  # the modes that do not run without it
    none: str = "none"  # what happens where the default is None
    metavar: str | None = None

    def options(self, several: bool) -> dict:
        """What argparse is to know of it."""
        if self.type is bool:
            word = {"nargs": "?", "const": True, "choices": self.choices}
            return word if self.choices else {"action": "store_true"}
        value = {"choices": self.choices} if self.choices else {
            "type": self.type, "metavar": self.metavar or ("PATH" if self.type is str else "N")}
        return value | ({"nargs": self.nargs} if several else {})

    def default(self, modes: tuple[str, ...]) -> str:
        """The defaults in some of its modes, in words: "512 in train, prune; 256 in distill"."""
        modes_of = {}
        for mode in modes:
            said = NEEDED if mode in self.needed else self._show(getattr(CONFIGS[mode], self.name))
            modes_of.setdefault(said, []).append(mode)
        if len(modes_of) == 1:
            return next(iter(modes_of))
        return "; ".join(f"{said} in {', '.join(names)}" for said, names in modes_of.items())

    def _show(self, value) -> str:
        if value is None:
            return self.none
        if isinstance(value, bool):
            return "on" if value else "off"
        values = value if isinstance(value, tuple) else (value,)
        return " ".join(f"{each:g}" if isinstance(each, float) else str(each).removeprefix(f"{ROOT}/")
                        for each in values)


TRAIN, TEST, PRUNE, DISTILL, EXPORT = ((mode,) for mode in CONFIGS)
EVERY_MODE = tuple(CONFIGS)
TOPICS = {
    "pictures to read": (
        Flag("content", TEST + PRUNE, "content picture; in test mode also several, and folders or .zip archives of "
             "them, each painted in each style, or a video; in prune mode only for the picture grid", several=TEST),
        Flag("style", TEST + PRUNE, "style picture; in test mode also several, and folders or .zip archives of them; "
             "in prune mode only for the picture grid", several=TEST),
        Flag("content_dir", EVERY_MODE, "folder of photographs, searched with all its subfolders for pictures, "
             "which are told by their content, not by their names, or a .zip archive of them, read in place; in test "
             "mode another name of --content", several=TEST, needed=TRAIN + PRUNE),
        Flag("style_dir", EVERY_MODE, "folder or .zip archive of paintings, searched in the same way; in test mode "
             "another name of --style; in export mode the styles of a page, in place of the bundled ones",
             several=TEST, needed=TRAIN + PRUNE),
        Flag("imsize", EVERY_MODE, "resize every picture so that its shorter side has this many pixels", count,
             none="unchanged"),
        Flag("cropsize", EVERY_MODE, "side in pixels of the square that is cut from every picture: in train and "
             "distill mode at a random place, and a multiple of 8; in the other modes from the centre", count,
             none="no cut"),
        Flag("cencrop", TRAIN, "cut the squares from the centre, not at a random place", bool),
        Flag("max_pixels", EVERY_MODE, "refuse pictures with more pixels than this", count),
        Flag("holdout", EVERY_MODE, "share of each folder's pictures, chosen by their names, that is not learned "
             "from; test and prune mode take only this share of a folder, or with 0 all of it; export "
             "mode compares by it", share),
        Flag("pairs", TEST + EXPORT, "stylise only this many pairs, with every picture used equally often, give or "
             "take one; in export mode how many held-out ones compare integers with float32", count,
             none="every content with every style"),
        Flag("cache_dir", TRAIN, "folder that keeps the resized pictures for this and later runs, so that each is "
             "decoded only once; takes 3 bytes per pixel, 1 MB for a picture of 512 x 683"),
        Flag("num_workers", TRAIN + DISTILL, "number of processes that decode pictures", count_or_zero,
             none="one per core, at most 8"),
    ),
    "networks": (
        Flag("load_path", EVERY_MODE, "the network to start from, to stylise with, to cut or to teach: a model file, "
             "or the folder of a run; test mode compares several", several=TEST, needed=PRUNE + DISTILL + EXPORT),
        Flag("new_weights", TRAIN + DISTILL, "take only the layer widths from --load_path, and start from new random "
             "weights (He initialisation)", bool),
        Flag("teacher", TRAIN + DISTILL, "the network whose output and bottleneck features are to be matched: a model "
             "file, or the folder of a run; in distill mode also a folder of pictures, whoever painted them, as "
             f"{', '.join(f'{name}/NAME' for name in TRIPLE)}", needed=DISTILL),
        Flag("vgg_weights", TRAIN + TEST + EXPORT, "weights of the loss network, and in train mode of a new encoder: "
             f"{', '.join(VGG_SOURCES)}, or a .pth or .safetensors file with torchvision's names", metavar="SOURCE"),
        Flag("backbone", TRAIN + TEST + PRUNE + EXPORT, "VGG network that the encoder and the loss network are taken "
             "from; in test, prune and export mode the model file says which, and any other is refused",
             choices=BACKBONES, none="as the model file says"),
        Flag("swap_max_pool", TRAIN + TEST + PRUNE + EXPORT, "average pooling instead of max pooling in the encoder",
             bool),
        Flag("pooling", TRAIN + DISTILL, "how the encoder halves the size: max, as published, avg, or blur, a low-pass "
             "filter, which makes videos calmer", choices=POOLINGS, none="as the model file says; new networks: max"),
        Flag("upsampling", TRAIN + TEST + DISTILL + EXPORT, "how the decoder doubles the size: nearest, as published, "
             "or bilinear, which avoids faint lines 8 pixels apart in smooth areas", choices=UPSAMPLINGS,
             none="as the model file says; new networks: nearest"),
        Flag("padding", TRAIN, "how the encoder and the loss network continue a picture at its border: zeros, as "
             "published, or reflect, which avoids a visible frame", choices=PADDINGS,
             none="as the model file says; new networks: zeros"),
    ),
    "stylising": (
        Flag("style_strength", TEST + PRUNE, "from 0, the decoder's copy of the content picture, not the content "
             "itself, to 1, the full style; in test mode several, each painted, and side by side in a sheet", fraction,
             several=TEST),
        Flag("frame_rate", TEST, "frames a second of the video that a folder of frames becomes, by a --save_path "
             "such as painted.mp4; a number or a fraction", rate),
        Flag("temporal_smoothing", TEST, "less flicker in a video: the share of each painted frame, from 0 to below 1, "
             "that comes from the one before, carried along with the motion; 0.8 is much", fraction_below_1),
        Flag("style_weights", TEST, "mix all --style pictures to one style, in these shares, one each", amount,
             several=TEST, none="each style by itself"),
        Flag("mask", TEST, "picture of the content's aspect that makes two --style pictures one style: the first is "
             "painted where it is white, the second where it is black"),
        Flag("preserve_color", TEST, "keep the content's colours: luma paints the lightness alone, histogram gives the "
             "style the content's colours first", choices=PRESERVED),
        Flag("style_size", TEST, "resize style pictures so that their shorter sides have this many pixels, which sets "
             "the scale of what is taken from them", count, none="as --imsize says"),
        Flag("tile", TEST, "paint in tiles of this side in pixels, which gives the same picture in less memory; 88 or "
             "more for most models", count, none="only where the whole picture would not fit the free memory"),
    ),
    "output": (
        Flag("save_path", EVERY_MODE, "folder to write to; in test mode a picture file for one picture, a video file "
             f"for a video or a folder of its frames, and a folder for more (without this flag: {OUTPUT_NAME}); in "
             f"export mode a file, whose format its suffix says: {', '.join(FORMATS)}; or FOLDER/ for a page that "
             "paints in the browser",
             needed=TRAIN + PRUNE + DISTILL + EXPORT, none=f"{OUTPUT_NAME}.png"),
        Flag("split", EXPORT, "two .onnx files, NAME.style.onnx from a style to its statistics and NAME.content.onnx "
             "from a content and such statistics to the picture, so that a style is encoded only once", bool),
        Flag("int8", EXPORT, "integers of 8 bits in place of float32 in .onnx files: faster on CPUs, a quarter of the "
             "size; ranges are measured with 16 pairs of --content_dir and --style_dir, and what it changes with "
             "held-out ones", bool),
        Flag("skip_existing", TEST, "paint only the pictures that are not there yet, or damaged, whatever flags "
             "painted the others; not with --metrics", bool),
        Flag("metrics", TEST, "measure content loss, style loss, SSIM or ST-LPIPS, and write metrics.json; "
             "without a name, all four", choices=tuple(METRICS), several=TEST, nargs="*", none="nothing is measured"),
    ),
    "losses": (
        Flag("style_loss", TRAIN + TEST, "what the style loss compares: mean and standard deviation, or Gram "
             "matrices", choices=STYLE_LOSSES),
        Flag("style_loss_weight", TRAIN, "weight of the style loss; the content loss has weight 1", amount),
        Flag("uncorrelation_loss_weight", TRAIN, "weight of the uncorrelation loss", amount),
        Flag("channel_loss_weight", TRAIN, "weight of the channel loss, which switches channels off", amount),
        Flag("xor_loss_weight", TRAIN, "weight of the xor loss, which makes the same channels off for all pictures",
             amount),
        Flag("shift_loss_weight", TRAIN, "weight of the shift loss, beyond the papers: a photograph moved by a few "
             "pixels is to be painted the same, moved, which makes videos calmer; 30 is much", amount),
        Flag("teacher_weight", TRAIN, "weight of the loss that compares with --teacher", amount),
    ),
    "learning": (
        Flag("max_iter", TRAIN + DISTILL, "number of iterations", count),
        Flag("batch_size", TRAIN + DISTILL, "pictures per iteration; in train mode this many photographs and this "
             "many paintings", count),
        Flag("lr", TRAIN + DISTILL, "learning rate; in distill mode the highest one, between a warm-up and a decay to "
             "0 at --max_iter", amount),
        Flag("encoder_lr", TRAIN, "learning rate of the encoder; 0 freezes it", amount, none="--lr"),
        Flag("decoder_lr", TRAIN, "learning rate of the decoder; 0 freezes it", amount, none="--lr"),
        Flag("optimizer", TRAIN, "adam, as published, or muon (Jordan et al., 2024), which makes the updates of "
             "the filters orthogonal", choices=OPTIMIZERS),
        Flag("warmup_iter", TRAIN, "the learning rates rise from 0 over this many first iterations", count_or_zero),
        Flag("decay_iter", TRAIN, "the learning rates fall to 0 over this many last iterations", count_or_zero),
    ),
    "compaction": (
        Flag("l0_eps", TRAIN, "epsilon of the channel and xor losses, in units of a channel's l2 norm; a larger one "
             "switches off stronger channels; relative:N is N times the mean norm of each layer", epsilon),
        Flag("compact_layers", TRAIN, "layers that the channel and xor losses act on; bottleneck is as published",
             choices=tuple(COMPACT_LAYERS)),
        Flag("compact_cost", TRAIN, "what the channel loss measures: the share of channels that are on, or of the "
             "parameters or multiply-adds that they cost", choices=COMPACT_COSTS),
        Flag("target_macs", TRAIN, "adjust the weight of the channel loss, starting from --channel_loss_weight, so "
             "that the run ends at this fraction of the full network's multiply-adds", proper_fraction),
    ),
    "pruning": (
        Flag("prune_images", PRUNE, "number of pictures from each folder to measure the channels with", count),
        Flag("prune_layers", PRUNE, "cut channels of the bottleneck alone, or of every layer", choices=PRUNED_LAYERS),
        Flag("prune_macs", PRUNE, "cut the least important channels of every layer until this fraction of the "
             "multiply-adds is left", positive_fraction, none="cut only what is off or constant"),
        Flag("prune_rank", PRUNE, "what --prune_macs cuts first: by importance, the channels that change the "
             "picture least for the multiply-adds saved; by magnitude, for comparison, those of the smallest weights, "
             "an equal share of every layer", choices=PRUNE_RANKS),
        Flag("round_to", PRUNE, "leave each layer a multiple of this many channels, or as many as before where that is "
             "less", count),
        Flag("prune_num", PRUNE, "cut this many channels of the bottleneck, the weakest first", count_or_zero,
             none="all that are zero for every measured picture"),
        Flag("prune_channels", PRUNE, "cut the bottleneck channels with these numbers, counted from 0", int,
             several=PRUNE, none="see --prune_num"),
        Flag("prune_nums", PRUNE, "how many channels are cut in each picture of the picture grid", count_or_zero,
             several=PRUNE),
        Flag("responses", PRUNE, "responses.npz of an earlier pruning of the same model, to spare measuring again"),
        Flag("half", PRUNE, "save the weights in half precision, in half the space", bool),
        Flag("report_size", PRUNE, "side in pixels of the pictures that the report's multiply-adds and latencies are "
             "for", count),
        Flag("latency_runs", PRUNE, "timed runs that each median latency is taken from", count),
    ),
    "the run": (
        Flag("resume", TRAIN + DISTILL, "continue the run in --save_path; flags that are not given stay as they were; "
             "with auto, start a run there if there is none", bool, choices=("auto",)),
        Flag("check_iter", TRAIN + DISTILL, "iterations from one checkpoint, with metrics and sample pictures, to the "
             "next", count),
        Flag("keep_checkpoints", TRAIN + DISTILL, "numbered checkpoints to keep besides the newest; -1 keeps all",
             count_or_all),
        Flag("seed", TRAIN + TEST + DISTILL + EXPORT, "seed of everything random; in test and export mode of --pairs "
             "and of --vgg_weights random", count_or_zero),
    ),
    "the device": (
        Flag("gpu_no", TRAIN + TEST + PRUNE + DISTILL, "number of the GPU, or -1 for the CPU", int,
             none="GPU 0, or the CPU without one"),
        Flag("amp", TRAIN + TEST + DISTILL, "mixed precision: auto is bf16 on GPUs and CPUs that are fast in it, and "
             "off elsewhere; in test mode auto is a decoder in float16 on GPUs that are fast in it, for models whose "
             "pictures it changes by at most 3 of 255", choices=("auto", "off", "bf16")),
        Flag("compile", TRAIN, "faster training by torch.compile, after a minute or more of compiling; on a CPU this "
             "needs a C++ compiler", bool),
    ),
    "wandb": (
        Flag("wb_mode", TRAIN, "auto is online where a key is set up, and offline elsewhere; it never asks",
             choices=("auto", "online", "offline", "disabled")),
        Flag("wb_project", TRAIN, "project that the run belongs to", metavar="TEXT"),
        Flag("wb_name", TRAIN, "name of the run", metavar="TEXT", none="chosen by wandb"),
        Flag("wb_notes", TRAIN, "notes on the run", metavar="TEXT"),
        Flag("wb_tags", TRAIN, "tags of the run", several=TRAIN, metavar="TEXT"),
    ),
}
FLAGS = tuple(flag for flags in TOPICS.values() for flag in flags)

"""What settings are made of. Each field of a mode's configuration is a flag of the command line: the field has the
default, its metadata the help and the kind of value. What several modes have alike is said once, in SHARED."""

import argparse
import math
import os
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import field, fields
from fractions import Fraction

from loss import STYLE_LOSSES
from network import BACKBONES, POOLINGS, UPSAMPLINGS
from utils import UserError
from weights import MODEL_STORE, VGG_SOURCES

TOPICS = ("pictures to read", "networks", "stylising", "output", "losses", "learning", "compaction", "pruning",
          "the run", "the device", "wandb")
MOST = 10**12  # of anything that is counted: more of it, times something else, fits no integer of torch and numpy


def _number(kind: Callable, fits: Callable, needed: str, prefix: str = "") -> Callable:
    """What reads a number of a kind that `fits`; argparse's error says what is `needed`. With a `prefix` that it may
    have, it stays the text."""
    def parse(text: str):
        with suppress(ValueError, ZeroDivisionError, OverflowError):  # the last two are of fractions
            value = kind(text.removeprefix(prefix))
            if math.isfinite(value) and fits(value):
                return text if prefix and text.startswith(prefix) else value
        text = text if len(text) <= 50 else f"{text[:50]}..."
        raise argparse.ArgumentTypeError(f"got {text}, {needed} is needed")

    return parse


count = _number(int, lambda value: 1 <= value <= MOST, f"a whole number from 1 to {MOST}")
count_or_zero = _number(int, lambda value: 0 <= value <= MOST, f"a whole number from 0 to {MOST}")
count_or_all = _number(int, lambda value: -1 <= value <= MOST, f"a whole number from -1 to {MOST}")
workers = _number(int, lambda value: 0 <= value <= 1024, "a whole number from 0 to 1024")
seed = _number(int, lambda value: 0 <= value < 2**64, "a whole number from 0 to 18446744073709551615")  # torch's limit
amount = _number(float, lambda value: value >= 0, "a number, 0 or more,")
fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_fraction = _number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1,")
fraction_below_1 = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
fraction_to_0_9 = _number(float, lambda value: 0 <= value <= 0.9, "a number from 0 to 0.9")
proper_fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
epsilon = _number(float, lambda value: value > 0, "a number above 0 or relative:NUMBER", "relative:")
# Without a / it is no fraction to Fraction, which would work out 1e99999999.
rate = _number(lambda text: float(Fraction(text) if "/" in text else text), lambda value: 0 < value <= 1000,
               "a number above 0, at most 1000, or a fraction such as 30000/1001")


def path(text: str) -> str:
    """With the home folder for ~: a shell leaves --flag=~/name as it is. Other words stay what they are."""
    if not text:  # of a script's unset variable; the working folder, or no model at all, would be taken
        raise argparse.ArgumentTypeError("got nothing; a value is needed, or leave the flag out")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~/"):  # a folder of that name would be made
        raise argparse.ArgumentTypeError(f"got {text}, but this process has no home folder; a path without ~ is needed")
    return expanded


def _said(*said, **more) -> dict:
    return dict(zip(("help", "topic", "kind"), said)) | more


def setting(default=None, *said, **more):
    """A field of a configuration, with what its flag says and takes: help, topic, and kind, which makes the value of a
    text (without one, a path or a word is meant); and by name:

    more: what the help adds in this mode; choices: the words that it takes, of a switch those that may follow it; none:
    what happens where the default is None; needed: whether the mode does not run without it; nargs: "*" where none of
    several values has a meaning, too; metavar. What is left out, SHARED says.
    """
    return field(default=default, metadata=_said(*said, **more))


SHARED = {
    "content": _said("content picture", "pictures to read"),
    "style": _said("style picture", "pictures to read"),
    "content_dir": _said("folder of photographs, searched with all its subfolders for pictures, which are told by "
                         "their content, not by their names, or a .zip archive of them, read in place",
                         "pictures to read"),
    "style_dir": _said("folder or .zip archive of paintings, searched in the same way", "pictures to read"),
    "imsize": _said("resize every picture so that its shorter side has this many pixels", "pictures to read", count,
                    none="unchanged"),
    "cropsize": _said("side in pixels of the square that is cut from every picture", "pictures to read", count,
                      none="no cut"),
    "max_pixels": _said("refuse pictures with more pixels than this", "pictures to read", count),
    "holdout": _said("share of each folder's pictures, chosen by their names, that is not learned from",
                     "pictures to read", fraction_to_0_9),
    "pairs": _said("number of pairs to stylise", "pictures to read", count),
    "num_workers": _said("number of processes that decode pictures", "pictures to read", workers,
                         none="one per core, at most 8"),
    "load_path": _said("the network: a model file, or the folder of a run", "networks"),
    "new_weights": _said("take only the layer widths from --load_path, and start from new random weights (He "
                         "initialisation)", "networks"),
    "teacher": _said("the network whose output and bottleneck features are to be matched: a model file, or the folder "
                     "of a run", "networks"),
    "vgg_weights": _said(f"weights of the loss network: {', '.join(VGG_SOURCES)}, or a .pth or .safetensors file with "
                         "torchvision's names, or vgg_normalised.pth of an AdaIN program, which is then also the "
                         "encoder of its decoder.pth", "networks", metavar="SOURCE"),
    "backbone": _said("VGG network that the encoder and the loss network are taken from", "networks",
                      choices=BACKBONES, none="the model file's, and no other"),
    "swap_max_pool": _said("average pooling instead of max pooling in the encoder", "networks"),
    "pooling": _said("how the encoder halves the size: max, as published, avg, or blur, a low-pass filter, which makes "
                     "videos calmer", "networks", choices=POOLINGS, none="as the model file says; new networks: max"),
    "upsampling": _said("how the decoder doubles the size: nearest, as published, or bilinear, which avoids faint "
                        "lines 8 pixels apart in smooth areas", "networks", choices=UPSAMPLINGS,
                        none="as the model file says; new networks: nearest"),
    "adain_levels": _said("on how many of the encoder's features AdaIN acts: 1, as published, is the bottleneck; each "
                          "more is a shallower one, added in the decoder, which keeps finer detail of the photograph",
                          "networks", count, none="as the model file says; new networks: 1"),
    "style_strength": _said("from 0, the decoder's copy of the content picture, not the content itself, to 1, the full "
                            "style", "stylising", fraction),
    "save_path": _said("folder to write to", "output"),
    "style_loss": _said("what the style loss compares: mean and standard deviation, or Gram matrices", "losses",
                        choices=STYLE_LOSSES),
    "lr": _said("learning rate", "learning", amount),
    "max_iter": _said("number of iterations", "learning", count),
    "batch_size": _said("pictures per iteration", "learning", count),
    "resume": _said("continue the run in --save_path; flags that are not given stay as they were; with auto, start a "
                    "run there if there is none", "the run", choices=("auto",)),
    "check_iter": _said("iterations from one checkpoint, with metrics and sample pictures, to the next", "the run",
                        count),
    "keep_checkpoints": _said("numbered checkpoints to keep besides the newest; -1 keeps all", "the run", count_or_all),
    "seed": _said("seed of everything random", "the run", seed),
    "gpu_no": _said("number of the GPU, or -1 for the CPU", "the device", int, none="GPU 0, or the CPU without one"),
    "amp": _said("mixed precision", "the device", choices=("auto", "off", "bf16")),
}


def flags_of(config: type) -> dict[str, dict]:
    """What a flag's help and parser are made of, of every setting of a configuration, by name; the types of its fields
    say which flags are switches, and which take several values."""
    flags = {}
    for each in fields(config):
        kinds = typing.get_args(each.type | None)
        several = any(typing.get_origin(kind) is tuple for kind in kinds)
        flags[each.name] = SHARED.get(each.name, {}) | each.metadata | {
            "default": each.default, "is_switch": bool in kinds, "several": several}
    return flags


def description(flag: dict) -> str:
    """A flag's help, with what its mode adds and its default."""
    default = flag["default"]
    if flag.get("needed"):
        words = "needed"
    elif default is None:
        words = f"default: {flag.get('none', 'none')}"
    elif flag["is_switch"]:
        words = "default: off"
    else:
        values = default if isinstance(default, tuple) else (default,)
        shown = " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
        words = f"default: {shown}".replace(f"{MODEL_STORE.parent}/", "")
    return f"{'; '.join(flag[part] for part in ('help', 'more') if part in flag)} ({words})"


def check_needed(config, mode: str) -> None:
    """Raises UserError for a setting that the mode needs and that has no value."""
    refuse({f"--{each.name} is needed in {mode} mode": each.metadata.get("needed") and not getattr(config, each.name)
            for each in fields(config)})


def refuse(cases: dict[str, object]) -> None:
    """Raises UserError with the first message whose case is so. cases: by the message."""
    for message, is_so in cases.items():
        if is_so:
            raise UserError(message)


def changed(config) -> set[str]:
    """The names of the settings that are not at their defaults."""
    return {each.name for each in fields(config) if getattr(config, each.name) != each.default}

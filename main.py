"""The command line: `python main.py --mode {train,test,prune,distill,export} ...`."""

import argparse
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

import utils
from data import told
from distill import DistillConfig, distill
from evaluate import TestConfig, test
from export import ExportConfig, export
from prune import PruneConfig, prune
from settings import TOPICS, description, flags_of, path
from train import TrainConfig, train
from utils import UserError, note, process_count


class Mode(NamedTuple):
    """A mode's settings, which are its flags, and what it does with those that are given; it returns the exit code."""

    config: type
    run: Callable[[dict], int]
    about: str


MODES = {
    "train": Mode(TrainConfig, train, "train a network, and switch channels off while it learns (this is the default)"),
    "test": Mode(TestConfig, test, "stylise pictures with a trained network (also: eval)"),
    "prune": Mode(PruneConfig, prune, "cut channels out of a trained network (also: prune_eval)"),
    "distill": Mode(DistillConfig, distill, "train a small network to paint as another network does"),
    "export": Mode(ExportConfig, export,
                   "write a network as ONNX, torch.export or safetensors, or as a page for the browser"),
}
OTHER_NAMES = {"eval": "test", "prune_eval": "prune"}  # as the original implementation calls them
FLAGS = {name: flags_of(mode.config) for name, mode in MODES.items()}
MEMORY_FLAGS = ("tile", "imsize", "cropsize", "batch_size")  # a smaller one takes less memory
ABOUT = "\n".join((
    "Compact image style transfer: train networks, and cut out of them what they do not need.", "", "modes:",
    *(f"  {name:<9}{mode.about}" for name, mode in MODES.items()), "",
    "The flags of one mode: python main.py --mode prune --help; of all: docs/flags.md"))


class _Help(argparse.RawDescriptionHelpFormatter):
    """No path is torn apart at a hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """Flags in full only; one that is not given leaves no attribute behind; bad input gets one line, no usage text."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=_Help, **options)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)  # no flag begins so; -1e-5 does

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser(mode: str) -> argparse.ArgumentParser:
    """The parser of a mode. It takes the other modes' flags, too, and its help leaves them out."""
    command = f"python main.py --mode {mode}"
    parser = _Parser(prog=command, usage=f"{command} [--FLAG VALUE ...]", description=MODES[mode].about)
    groups = {topic: parser.add_argument_group(topic) for topic in TOPICS}
    every_flag = {name: flag for flags in FLAGS.values() for name, flag in flags.items()}
    for name, flag in (every_flag | FLAGS[mode]).items():
        choices, kind = flag.get("choices"), flag.get("kind", path)
        if flag["is_switch"]:
            options = {"nargs": "?", "const": True, "choices": choices} if choices else {"action": "store_true"}
        else:
            metavar = None if choices else flag.get("metavar", "PATH" if kind is path else "N")
            nargs = flag.get("nargs", "+") if flag["several"] else None
            options = {"nargs": nargs, "type": kind, "choices": choices, "metavar": metavar}
        shown = description(flag).replace("%", "%%") if name in FLAGS[mode] else argparse.SUPPRESS
        groups[flag["topic"]].add_argument(f"--{name}", help=shown, **options)
    return parser


def parse(arguments: list[str] | None) -> tuple[str, dict | None]:
    """The mode, and the flags that are given of it; None for them where help is asked for, which is printed."""
    first = _Parser(prog="python main.py", add_help=False, description=ABOUT)
    first.add_argument("-h", "--help", action="store_true")
    first.add_argument("--mode", choices=(*MODES, *OTHER_NAMES), metavar=f"{{{','.join(MODES)}}}", help="see above")
    named, others = first.parse_known_args(arguments)
    mode = getattr(named, "mode", "train")
    mode = OTHER_NAMES.get(mode, mode)
    if "help" in named:
        (build_parser(mode) if "mode" in named else first).print_help(utils.STDOUT)
        return mode, None
    given = vars(build_parser(mode).parse_args(others))
    for name in [name for name in given if name not in FLAGS[mode]]:
        note(f"--{name} has no effect in {mode} mode")
        del given[name]
    return mode, {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def main(arguments: list[str] | None = None) -> int:
    """Parse, dispatch, and turn everything the user can put right into one line. Returns the exit code."""
    process, mode = "", "train"
    told.clear()
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # what libraries say to a closed stderr goes into no file
        pass
    os.close(spare)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # broken tags, say: what is needed of them is checked
    try:
        utils.check_processes()
        if process_count() > 1:  # each says its own errors: it may be the only one that failed
            process = f"rank {utils.process_rank()} of {process_count()}: "
        mode, given = parse(arguments)
        if given is None:
            return 0
        torch.set_num_threads(min(torch.get_num_threads(), utils.usable_cores()))  # torch knows no control groups
        with utils.tidy_end():
            return MODES[mode].run(given)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        is_flag = re.split(r"[ :,]", str(error), maxsplit=1)[0] in FLAGS[mode]  # functions name their arguments
        message = f"--{error}" if is_flag else str(error)
    except (MemoryError, RuntimeError, OSError) as error:
        if utils.lacks_memory(error):
            memory = "the GPU's" if isinstance(error, torch.OutOfMemoryError) else "this machine's"
            *most, last = (f"--{name}" for name in MEMORY_FLAGS if name in FLAGS[mode])
            message = f"{memory} memory is too small for this; a smaller {', '.join(most)} or {last} helps"
        elif isinstance(error, OSError):  # a full disk, say, where no better word was found for it
            message = f"{error.filename or 'a file'}: cannot be read or written ({error.strerror or error})"
        else:
            raise
    print(f"error: {process}{message}", file=utils.STDERR)
    return 2


if __name__ == "__main__":
    sys.exit(main())

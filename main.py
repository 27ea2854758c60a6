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

from distill import DistillConfig, distill
from evaluate import TestConfig, test
from export import ExportConfig, export
from prune import PruneConfig, prune
from settings import NEEDED, SHARED, TOPICS, Flag, flags_of
from train import TrainConfig, train
from utils import UserError, check_processes, lacks_memory, note, process_count, process_rank, tidy_end


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
MEMORY_FLAGS = ("imsize", "cropsize", "batch_size")  # a smaller one takes less memory


# -------------------------------------------------------------------------------------------------- flags


def _all_flags() -> dict[str, dict[str, Flag]]:
    """Every flag in each of its modes; topic by topic, and first those that several modes have alike."""
    found = {}
    for mode, (config, *_) in MODES.items():
        for flag in flags_of(config):
            found.setdefault(flag.name, {})[mode] = flag
    order = [*SHARED, *(name for name in found if name not in SHARED)]
    topics = {name: TOPICS.index(next(iter(flag.values())).topic) for name, flag in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: (topics[name], order.index(name)))}


FLAGS = _all_flags()


def describe(flag: dict[str, Flag]) -> tuple[str, str]:
    """A flag's help and its default in words. In which modes they differ is said: "512 in train, prune; 256 in
    distill"."""
    additions, defaults = {}, {}
    for mode, each in flag.items():
        additions.setdefault(each.more, []).append(mode)
        defaults.setdefault(each.default_in_words, []).append(mode)
    said = [each.help]
    said += [f"in {', '.join(modes)} mode {more}" if len(flag) > 1 else more
             for more, modes in additions.items() if more]
    if len(defaults) > 1:
        defaults = ["; ".join(f"{default} in {', '.join(modes)}" for default, modes in defaults.items())]
    return "; ".join(said), *defaults


# ------------------------------------------------------------------------------------------------- parser


class _Parser(argparse.ArgumentParser):
    """Flags in full only; one that is not given leaves no attribute behind; bad input gets one line, no usage text."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


class _Values(argparse.Action):
    """Stores one value, or several as a tuple."""

    def __init__(self, several: bool, **options) -> None:
        super().__init__(**options)
        self.several = several

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not self.several and len(values) > 1:
            raise UserError(f"{option_string} {' '.join(map(str, values))}: one value is needed, not {len(values)}")
        setattr(namespace, self.dest, tuple(values) if self.several else values[0])


class _Help(argparse.RawDescriptionHelpFormatter):
    """At most 100 columns, no path torn apart at a hyphen, and one value shown where one is taken."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, indent_increment=4, max_help_position=28, width=100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        return text if getattr(action, "several", True) else text.split(" [")[0]


def _options(flag: Flag, several: bool) -> dict:
    """What argparse is to know of a flag."""
    if flag.is_switch:
        return {"nargs": "?", "const": True, "choices": flag.choices} if flag.choices else {"action": "store_true"}
    values = {"choices": flag.choices} if flag.choices else {
        "type": os.path.expanduser if flag.kind is str else flag.kind,  # a shell leaves --flag=~/name as it is
        "metavar": flag.metavar or ("PATH" if flag.kind is str else "N")}
    return values | {"nargs": flag.nargs, "action": _Values, "several": several}


def build_parser(mode: str | None) -> argparse.ArgumentParser:
    """The parser of a mode. It takes the other modes' flags, too, and its help leaves them out. None: of all modes,
    for the help that has every flag."""
    command = f"python main.py --mode {mode}" if mode else "python main.py"
    about = MODES[mode].about if mode else "\n".join((
        "Compact image style transfer: train networks, and cut out of them what they do not need.", "", "modes:",
        *(f"  {name:<9}{each.about}" for name, each in MODES.items()), "",
        "The flags of one mode, with its own defaults: python main.py --mode prune --help"))
    parser = _Parser(prog=command, usage=f"{command} [--FLAG VALUE ...]", description=about, formatter_class=_Help)
    if mode is None:
        _add_mode(parser)
    groups = {}
    for name, flag in FLAGS.items():
        shown = {mode: flag[mode]} if mode in flag else flag
        first = next(iter(shown.values()))
        group, text = parser, argparse.SUPPRESS
        if mode is None or mode in flag:
            if first.topic not in groups:
                groups[first.topic] = parser.add_argument_group(first.topic)
            group, (meaning, default) = groups[first.topic], describe(shown)
            text = f"{meaning} ({default if default == NEEDED else f'default: {default}'})".replace("%", "%%")
        if mode is None:
            text = f"[{'every mode' if len(flag) == len(MODES) else ', '.join(flag)}] {text}"
        group.add_argument(f"--{name}", help=text, **_options(first, any(each.several for each in shown.values())))
    return parser


def _add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=(*MODES, *OTHER_NAMES), metavar=f"{{{','.join(MODES)}}}",
                        help="one of the modes above (default: train)")


# --------------------------------------------------------------------------------------------------- main


def _with_dashes(message: str, mode: str) -> str:
    """The message, with `--` before its first word where that is a flag of the mode: functions name arguments."""
    word = re.split(r"[ :,]", message, maxsplit=1)[0]
    return f"--{message}" if mode in FLAGS.get(word, ()) else message


def main(arguments: list[str] | None = None) -> int:
    """Parse, dispatch, and turn everything the user can put right into one line. Returns the exit code."""
    process, mode = "", "train"
    for stream in (sys.stdout, sys.stderr):  # no name or sign that a terminal lacks may cost what was computed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # broken tags, say: what is needed of them is checked
    try:
        check_processes()
        if process_count() > 1:  # each says its own errors: it may be the only one that failed
            process = f"rank {process_rank()} of {process_count()}: "
        first = _Parser(prog="python main.py", add_help=False)
        first.add_argument("-h", "--help", action="store_true")
        _add_mode(first)
        named, others = first.parse_known_args(arguments)
        if "mode" in named:
            mode = OTHER_NAMES.get(named.mode, named.mode)
        if "help" in named:
            build_parser(mode if "mode" in named else None).print_help()
            return 0
        given = vars(build_parser(mode).parse_args(others))
        for name in given:
            if mode not in FLAGS[name]:
                note(f"--{name} has no effect in {mode} mode")
        with tidy_end():
            return MODES[mode].run({name: value for name, value in given.items() if mode in FLAGS[name]})
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        message = _with_dashes(str(error), mode)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        memory = "the GPU's" if isinstance(error, torch.OutOfMemoryError) else "this machine's"
        *most, last = (f"--{name}" for name in MEMORY_FLAGS if mode in FLAGS[name])
        message = f"{memory} memory is too small for this; a smaller {', '.join(most)} or {last} helps"
    except OSError as error:  # a full disk, say, where no better word was found for it
        message = f"{error.filename or 'a file'}: cannot be read or written ({error.strerror or error})"
    print(f"error: {process}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

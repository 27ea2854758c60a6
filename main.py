"""The command line: `python main.py --mode {train,test,prune,distill,export} ...`."""

import argparse
import sys
import textwrap

import torch

from distill import distill
from evaluate import test
from export import export
from flags import CONFIGS, EVERY_MODE, FLAGS, NEEDED, TOPICS
from prune import prune
from train import train
from utils import UserError, check_processes, lacks_memory, note, process_count, process_rank

MODES = {
    "train": (CONFIGS["train"], train),
    "test": (CONFIGS["test"], test),
    "prune": (CONFIGS["prune"], prune),
    "distill": (CONFIGS["distill"], distill),
    "export": (CONFIGS["export"], export),
}
ABOUT = {
    "train": "train a network, and switch channels off while it learns (this is the default)",
    "test": "stylise pictures with a trained network (also: eval)",
    "prune": "cut channels out of a trained network (also: prune_eval)",
    "distill": "train a small network to paint as another network does",
    "export": "write a network as ONNX, torch.export or safetensors, or as a page for the browser",
}
OTHER_NAMES = {"eval": "test", "prune_eval": "prune"}  # as the original implementation calls them
GONE = {"pretrain": "learning VGG weights without labels is gone; --vgg_weights bundled is the original VGG19, and "
                    "--mode distill teaches a narrow network"}
MEMORY_FLAGS = ("imsize", "cropsize", "batch_size")  # a smaller one takes less memory


# ------------------------------------------------------------------------------------------------- parser


class _Parser(argparse.ArgumentParser):
    """Flags in full only; one that is not given leaves no attribute behind; bad input gets one line, no usage text."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """At most 100 columns, and no path torn apart at a hyphen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, indent_increment=4, max_help_position=28, width=100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _add_mode(parser: argparse.ArgumentParser, default: str | None = "train") -> None:
    parser.add_argument("--mode", choices=(*MODES, *OTHER_NAMES, *GONE), default=default,
                        metavar=f"{{{','.join(MODES)}}}", help="one of the modes above (default: train)")


def build_parser(mode: str | None = None) -> argparse.ArgumentParser:
    """The parser of all flags, or, for its help, of those of one mode; grouped by topic."""
    command = "python main.py" if mode is None else f"python main.py --mode {mode}"
    about = ABOUT[mode] if mode else "\n".join((
        "Compact image style transfer: train networks, and cut out of them what they do not need.", "", "modes:",
        *(f"  {each:<9}{text}" for each, text in ABOUT.items()), "",
        "The flags of one mode, with its own defaults: python main.py --mode prune --help"))
    parser = _Parser(prog=command, usage=f"{command} [--FLAG VALUE ...]", description=about, formatter_class=_Help)
    if mode is None:
        _add_mode(parser)
    for topic, flags in TOPICS.items():
        shown = [flag for flag in flags if mode is None or mode in flag.modes]
        group = parser.add_argument_group(topic) if shown else None
        for flag in shown:
            modes = flag.modes if mode is None else (mode,)
            default = flag.default(modes)
            text = f"{flag.help} ({default})" if NEEDED in default else f"{flag.help} (default: {default})"
            if mode is None:
                text = f"[{'every mode' if modes == EVERY_MODE else ', '.join(modes)}] {text}"
            several = any(each in flag.several for each in modes)
            group.add_argument(f"--{flag.name}", help=text.replace("%", "%%"), **flag.options(several))
    return parser


def _asked(arguments: list[str] | None) -> tuple[str | None, bool]:
    """The mode that the command line names, None where it names none, and whether it asks for help."""
    parser = _Parser(prog="python main.py", add_help=False)
    parser.add_argument("-h", "--help", action="store_true", default=False)
    _add_mode(parser, default=None)
    asked, _ = parser.parse_known_args(arguments)
    if asked.mode in GONE:
        raise UserError(f"--mode {asked.mode}: {GONE[asked.mode]}")
    return OTHER_NAMES.get(asked.mode, asked.mode), asked.help


def _settings(given: dict, mode: str) -> dict:
    """What was given of the flags of a mode; several values as a tuple. Says which flags have no effect.

    Raises UserError for several values where the mode takes one.
    """
    used = {}
    for flag in (flag for flag in FLAGS if flag.name in given):
        value = given[flag.name]
        if mode not in flag.modes:
            note(f"--{flag.name} has no effect in {mode} mode")
        elif mode in flag.several:
            used[flag.name] = tuple(value)
        elif not flag.several:
            used[flag.name] = value
        elif len(value) == 1:
            used[flag.name] = value[0]
        else:
            raise UserError(f"--{flag.name} {' '.join(map(str, value))}: {mode} mode takes one, not {len(value)}")
    return used


def main(arguments: list[str] | None = None) -> int:
    """Parse, dispatch, and turn everything the user can put right into one line. Returns the exit code."""
    process, mode = "", "train"
    try:
        check_processes()
        if process_count() > 1:  # each says its own errors: it may be the only one that failed
            process = f"rank {process_rank()} of {process_count()}: "
        named, wants_help = _asked(arguments)
        if wants_help:
            build_parser(named).print_help()
            return 0
        mode = named or mode
        parser = build_parser()
        parser.prog = f"python main.py --mode {mode}"  # where an error says that there is help
        given = vars(parser.parse_args(arguments))
        del given["mode"]
        _, run = MODES[mode]
        return run(_settings(given, mode))
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        memory = "the GPU's" if isinstance(error, torch.OutOfMemoryError) else "this machine's"
        *most, last = (f"--{flag.name}" for flag in FLAGS if flag.name in MEMORY_FLAGS and mode in flag.modes)
        message = f"{memory} memory is too small for this; a smaller {', '.join(most)} or {last} helps"
    except OSError as error:  # a full disk, say, where no better word was found for it
        message = f"{error.filename or 'a file'}: cannot be read or written ({error.strerror or error})"
    print(f"error: {process}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

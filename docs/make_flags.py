"""Writes the table of all flags: `python docs/make_flags.py > docs/flags.md`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from main import FLAGS  # noqa: E402
from settings import TOPICS, Flag  # noqa: E402

HEAD = """# Flags

This file is made from the command line itself (`python docs/make_flags.py > docs/flags.md`).
`python main.py --mode prune --help` prints the flags of one mode, here prune, with its own defaults.

`--mode` is `train` (the default), `test` (also called `eval`), `prune` (also called `prune_eval`), `distill` or
`export`. Flags must be written in full. One that the mode does not have is named on stderr, and has no effect."""


def by_modes(flag: dict[str, Flag], name: str) -> dict:
    """The modes, "train, test", of each value that a property of a flag has in any. flag: by mode."""
    modes = {}
    for mode, each in flag.items():
        modes.setdefault(getattr(each, name), []).append(mode)
    return {value: ", ".join(each) for value, each in modes.items() if value is not None}


def row(name: str, flag: dict[str, Flag]) -> str:
    """A flag's line of its topic's table; one of its cells may be "512 in train, prune; 256 in distill"."""
    first, every_mode = next(iter(flag.values())), ", ".join(flag)
    meaning = first.help[0].upper() + first.help[1:]
    for more, modes in by_modes(flag, "more").items():
        meaning += f"; in {modes} mode {more}" if len(flag) > 1 else f"; {more}"
    meaning += "."
    if first.choices and not first.is_switch:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in first.choices)}."
    if several := by_modes(flag, "several").get(True):
        meaning += f" Takes several values{'' if several == every_mode else f' in {several} mode'}."
    defaults = [f"{default} in {modes}" if modes != every_mode else default
                for default, modes in by_modes(flag, "default_in_words").items()]
    cells = (f"`--{name}`", "every" if len(flag) == len(FLAGS) else every_mode, "; ".join(defaults), meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def document() -> str:
    """The whole of docs/flags.md."""
    names = dict.fromkeys(name for flags in FLAGS.values() for name in flags)
    by_mode = {name: {mode: flags[name] for mode, flags in FLAGS.items() if name in flags} for name in names}
    lines = [HEAD]
    for topic in TOPICS:
        lines += ["", f"## {topic[0].upper()}{topic[1:]}", "", "| flag | modes | default | meaning |",
                  "| --- | --- | --- | --- |"]
        lines += [row(name, flag) for name, flag in by_mode.items() if next(iter(flag.values())).topic == topic]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")

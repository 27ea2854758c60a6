"""Writes the table of all flags: `python docs/make_flags.py > docs/flags.md`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from flags import EVERY_MODE, TOPICS, Flag  # noqa: E402

HEAD = """# Flags

This file is made from the command line itself (`python docs/make_flags.py > docs/flags.md`).
`python main.py --mode prune --help` prints the flags of one mode, here prune, with its own defaults.

`--mode` is `train` (the default), `test` (also called `eval`), `prune` (also called `prune_eval`), `distill` or
`export`. Flags must be written in full. One that the mode does not have is named on stderr, and has no effect."""


def row(flag: Flag) -> str:
    """A flag's line of its topic's table."""
    modes = "every" if flag.modes == EVERY_MODE else ", ".join(flag.modes)
    meaning = flag.help[0].upper() + flag.help[1:] + "."
    if flag.choices and flag.type is not bool:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}."
    if flag.several:
        meaning += " Takes several values." if flag.several == flag.modes else (
            f" Takes several values in {', '.join(flag.several)} mode.")
    cells = (f"`--{flag.name}`", modes, flag.default(flag.modes), meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def document() -> str:
    """The whole of docs/flags.md."""
    lines = [HEAD]
    for topic, flags in TOPICS.items():
        lines += ["", f"## {topic[0].upper()}{topic[1:]}", "", "| flag | modes | default | meaning |",
                  "| --- | --- | --- | --- |", *map(row, flags)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")

"""Writes the table of all flags: `python docs/make_flags.py > docs/flags.md`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from main import FLAGS, MODES, describe  # noqa: E402
from settings import Flag  # noqa: E402

HEAD = """# Flags

This file is made from the command line itself (`python docs/make_flags.py > docs/flags.md`).
`python main.py --mode prune --help` prints the flags of one mode, here prune, with its own defaults.

`--mode` is `train` (the default), `test` (also called `eval`), `prune` (also called `prune_eval`), `distill` or
`export`. Flags must be written in full. One that the mode does not have is named on stderr, and has no effect."""


def row(name: str, flag: dict[str, Flag]) -> str:
    """A flag's line of its topic's table. flag: by mode."""
    meaning, default = describe(flag)
    meaning = meaning[0].upper() + meaning[1:] + "."
    choices = {f"`{choice}`": None for each in flag.values() for choice in each.choices if not each.is_switch}
    if choices:
        meaning += f" One of {', '.join(choices)}."
    several = [mode for mode, each in flag.items() if each.several]
    if several:
        meaning += " Takes several values" + ("." if len(several) == len(flag) else f" in {', '.join(several)} mode.")
    cells = (f"`--{name}`", "every" if len(flag) == len(MODES) else ", ".join(flag), default, meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def document() -> str:
    """The whole of docs/flags.md."""
    lines, last_topic = [HEAD], None
    for name, flag in FLAGS.items():
        topic = next(iter(flag.values())).topic
        if topic != last_topic:
            lines += ["", f"## {topic[0].upper()}{topic[1:]}", "", "| flag | modes | default | meaning |",
                      "| --- | --- | --- | --- |"]
        lines.append(row(name, flag))
        last_topic = topic
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")

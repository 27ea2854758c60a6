"""Writes the page of all flags: `python docs/make_flags.py > docs/flags.md`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from main import FLAGS, MODES  # noqa: E402
from settings import TOPICS, description  # noqa: E402

HEAD = """# Flags

This page is made from the command line itself (`python docs/make_flags.py > docs/flags.md`); `python main.py --mode
prune --help` prints the flags of one mode, here prune.

`--mode` is `train` (the default), `test` (also called `eval`), `prune` (also called `prune_eval`), `distill` or
`export`. Flags must be written in full. One that the mode does not have is named on stderr, and has no effect."""


def row(name: str, flag: dict) -> str:
    """A flag's line in the table of its mode."""
    meaning = description(flag)
    if flag.get("choices") and not flag["is_switch"]:
        meaning += f"; one of {', '.join(f'`{choice}`' for choice in flag['choices'])}"
    if flag["several"]:
        meaning += "; takes several values"
    return f"| `--{name}` | {meaning.replace('|', '&#124;')} |"


def document() -> str:
    """The whole of docs/flags.md: a table for each mode, topic by topic."""
    lines = [HEAD]
    for mode, flags in FLAGS.items():
        lines += ["", f"## {mode}", "", MODES[mode].about[0].upper() + MODES[mode].about[1:] + "."]
        for topic in TOPICS:
            rows = [row(name, flag) for name, flag in flags.items() if flag["topic"] == topic]
            lines += ["", f"| {topic} | meaning |", "| --- | --- |", *rows] if rows else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")

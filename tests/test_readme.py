"""The README: every command parses, every flag stands in its table as the parser has it, every file exists.

`python tests/test_readme.py` prints the table of flags for the README.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from main import FLAGS, MODES, OTHER_NAMES, build_parser  # noqa: E402


def readme() -> str:
    return (ROOT / "README.md").read_text()


def flag_rows() -> list[str]:
    """One table row a flag: name, modes, help with its default."""
    rows = []
    for flag in FLAGS:
        choices = flag.options.get("choices")
        values = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        text = flag.full_help.replace("%%", "%").replace("|", "\\|")
        rows.append(f"| `--{flag.name}` | {', '.join(flag.modes)} | {text[0].upper()}{text[1:]}.{values} |")
    return rows


def commands(text: str) -> list[str]:
    """The `python main.py` command lines of all bash blocks, continuation lines joined."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.split(r"\s#\s", line)[0]
            if "main.py --mode" in line and not line.lstrip().startswith("#"):
                found.append(line)
    return found


def test_there_are_commands_of_every_mode():
    text = " ".join(commands(readme()))
    assert all(f"--mode {mode}" in text.replace("'", "") for mode in MODES)
    assert len(commands(readme())) >= 8


@pytest.mark.parametrize("command", commands(readme()))
def test_command_parses(command):
    words = shlex.split(command)
    given = vars(build_parser().parse_args(words[words.index("main.py") + 1 :]))
    mode = given.pop("mode")
    config, _ = MODES[OTHER_NAMES.get(mode, mode)]
    config(**given).check()


def test_the_three_published_trainings_have_the_published_settings():
    published = [command for command in commands(readme()) if "${content}" in command]
    runs = [vars(build_parser().parse_args(shlex.split(command)[2:])) for command in published]
    by_name = {run["wb_name"]: run for run in runs}
    assert by_name.keys() == {"ch_xor", "baseline", "uncorrelation"}
    desired = {
        "ch_xor": (5e-6, 100.0, 0.0, 10000.0, 500.0),
        "baseline": (0.0, 100.0, 0.0, 0.0, 0.0),
        "uncorrelation": (5e-6, 100.0, 50.0, 0.0, 0.0),
    }
    names = ("encoder_lr", "style_loss_weight", "uncorrelation_loss_weight", "channel_loss_weight", "xor_loss_weight")
    for name, run in by_name.items():
        assert tuple(run[each] for each in names) == desired[name]
        assert (run["imsize"], run["cropsize"], run["batch_size"], run["max_iter"]) == (512, 256, 4, 80000)


def test_every_flag_stands_in_the_table():
    rows = [line for line in readme().splitlines() if line.startswith("| `--")]
    assert rows == flag_rows()


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", readme()):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_module_stands_in_the_file_map():
    text = readme()
    for path in sorted(ROOT.glob("*.py")):
        assert f"`{path.name}`" in text, path.name


if __name__ == "__main__":
    print("\n".join(["| flag | modes | meaning |", "| --- | --- | --- |", *flag_rows()]))

"""What the configurations say of the flags, the command line's help shows; docs/flags.md is up to date."""

import dataclasses
import runpy

import pytest
from helpers import ROOT, refusal, user_error

from main import FLAGS, MEMORY_FLAGS, MODES, OTHER_NAMES, build_parser, main
from settings import SHARED, TOPICS, changed, description, flags_of, setting
from utils import UserError

NAMES = {name for flags in FLAGS.values() for name in flags}


def printed(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class Example:
    """A configuration with a setting of every kind."""

    seed: int = 3
    save_path: str | None = setting(needed=True, more="a file")
    sizes: tuple[int, ...] | None = setting(None, "some sizes", "output", int, none="no sizes")
    half: bool = setting(False, "half of it", "output")
    again: bool | str = setting(False, "once more", "the run", choices=("auto",))
    rates: tuple[float, ...] = setting((0.5, 1e-5), "two rates", "learning", float)


def test_fields_are_flags():
    flags = flags_of(Example)
    assert {name: description(flag) for name, flag in flags.items()} == {
        "seed": "seed of everything random (default: 3)", "save_path": "folder to write to; a file (needed)",
        "sizes": "some sizes (default: no sizes)", "half": "half of it (default: off)",
        "again": "once more (default: off)", "rates": "two rates (default: 0.5 1e-05)"}
    assert [name for name, flag in flags.items() if flag["several"]] == ["sizes", "rates"]
    assert [name for name, flag in flags.items() if flag["is_switch"]] == ["half", "again"]
    assert changed(Example()) == set() and changed(Example(seed=4, half=True)) == {"seed", "half"}


def test_every_flag_is_whole():
    """In one topic, with one way to be written in all modes; what is shared is used."""
    assert {*SHARED, *MEMORY_FLAGS} <= NAMES and set(OTHER_NAMES.values()) <= MODES.keys()
    for name in NAMES:
        flag = [flags[name] for flags in FLAGS.values() if name in flags]
        assert len({(each["topic"], each["help"], each.get("kind"), each["is_switch"]) for each in flag}) == 1, name
        for each in flag:
            assert each["topic"] in TOPICS
            assert not each.get("choices") or each["default"] in (None, False, *each["choices"]), name
            assert not each.get("needed") or each["default"] is None, name


@pytest.mark.parametrize("mode, name", [(mode, name) for mode, flags in FLAGS.items() for name, flag in flags.items()
                                        if flag.get("needed")])
def test_needed_flags_are_needed(mode, name):
    others = {other: "x" for other, flag in FLAGS[mode].items() if flag.get("needed") and other != name}
    assert f"{name} is needed in {mode} mode" in user_error(MODES[mode].config(**others).check)


@pytest.mark.parametrize("mode", MODES)
def test_help_of_a_mode_has_its_flags_alone(mode, capsys):
    text = printed(capsys, "--mode", mode, "--help")
    lines = [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]
    assert sorted(lines) == sorted(FLAGS[mode])
    joined = " ".join(text.split())
    assert all(description(flag) in joined for flag in FLAGS[mode].values()) and MODES[mode].about in joined
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    topics = {flag["topic"] for flag in FLAGS[mode].values()}
    assert titles == ["options", *(topic for topic in TOPICS if topic in topics)]
    assert ("--load_path PATH [PATH ...]" in text) == FLAGS[mode]["load_path"]["several"]


@pytest.mark.parametrize("arguments, mode", [
    (["--mode", "eval", "-h"], "test"), (["--help", "--mode=prune_eval"], "prune"),
    (["--imsize", "x", "--mode", "distill", "--half", "--help"], "distill"),
])
def test_help_of_a_mode_by_other_words(arguments, mode, capsys):
    assert printed(capsys, *arguments) == build_parser(mode).format_help()


def test_help_without_a_mode_has_the_modes(capsys):
    text = printed(capsys, "--help")
    assert all(f"  {name:<9}{mode.about}\n" in text for name, mode in MODES.items())
    assert "python main.py --mode prune --help" in text and "docs/flags.md" in text


def test_page_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))
    document = page["document"]()
    assert (ROOT / "docs" / "flags.md").read_text() == document, "python docs/make_flags.py > docs/flags.md"
    for part, flags in zip(document.split("\n## ")[1:], FLAGS.values(), strict=True):
        assert sorted(line.split("`")[1][2:] for line in part.splitlines() if line.startswith("| `--")) == sorted(flags)
    assert page["row"]("pooling", {"help": "a|b", "default": None, "is_switch": False, "several": True, "choices": ("a",
        )}) == "| `--pooling` | a&#124;b (default: none); one of `a`; takes several values |"


def test_a_mode_gets_what_was_given_of_its_flags(monkeypatch, capsys):
    got = []
    for name, mode in MODES.items():
        monkeypatch.setitem(MODES, name, mode._replace(run=lambda given, name=name: got.append((name, given)) or 0))
    monkeypatch.setenv("HOME", "/home/x")
    for arguments, desired in (
        ("--seed 1 --resume --lr 0.1", ("train", {"seed": 1, "resume": True, "lr": 0.1})),
        ("--wb_name= --wb_notes=~/x", ("train", {"wb_name": "", "wb_notes": "~/x"})),  # no paths
        ("--resume auto --mode=distill", ("distill", {"resume": "auto"})),
        ("--content a b --mode eval --metrics --style_strength 0.5", ("test", {
            "content": ("a", "b"), "metrics": (), "style_strength": (0.5,)})),
        ("--mode test --frame_rate 30000/1001", ("test", {"frame_rate": 30000 / 1001})),
        ("--mode test --save_path=~/a.png --content ~/b c", ("test", {  # where no shell replaces ~
            "save_path": "/home/x/a.png", "content": ("/home/x/b", "c")})),
        ("--mode prune --content a --prune_nums 3 --half --gpu_no -1 --batch_size 3", ("prune", {
            "content": "a", "prune_nums": (3,), "half": True, "gpu_no": -1})),
    ):
        assert main(arguments.split()) == 0
        assert got.pop() == desired
    assert capsys.readouterr().err == "--batch_size has no effect in prune mode\n"
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # in a container without a home folder
    assert "got ~/a.png, but this process has no home folder" in refusal(capsys, "--save_path=~/a.png")


@pytest.mark.parametrize("message, said", [
    ("tile 12: too small", "--tile 12: too small"), ("tile, imsize", "--tile, imsize"), ("tile: no", "--tile: no"),
    ("--tile 12: too small", "--tile 12: too small"), ("tiles 12", "tiles 12"), ("round_to 3", "round_to 3"),
    ("/a/b.png: no such file", "/a/b.png: no such file"),
])
def test_arguments_that_functions_name_become_flags(message, said, monkeypatch, capsys):
    def run(_given: dict):
        raise UserError(message)

    monkeypatch.setitem(MODES, "test", MODES["test"]._replace(run=run))
    assert refusal(capsys, "--mode", "test") == f"error: {said}"

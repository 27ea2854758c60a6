"""Flags and configurations are held to each other; help for one mode and for all; docs/flags.md is up to date."""

import dataclasses
import runpy
import types
import typing

import pytest
from helpers import ROOT, user_error

from flags import CONFIGS, FLAGS, NEEDED, TOPICS, Flag
from main import ABOUT, MEMORY_FLAGS, MODES, OTHER_NAMES, build_parser, main

BY_NAME = {flag.name: flag for flag in FLAGS}


def field_types(mode: str) -> dict:
    """The type of every field of the mode's configuration."""
    hints = typing.get_type_hints(CONFIGS[mode])
    return {field.name: hints[field.name] for field in dataclasses.fields(CONFIGS[mode])}


def parts(hint) -> tuple:
    """`int | None` as its two types, any other type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def help_of(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    """The names of the flags that a help text explains, --mode and --help aside."""
    lines = [line for line in text.splitlines() if line.startswith("    --")]
    return [line.split()[0][2:] for line in lines if not line.startswith("    --mode ")]


# ------------------------------------------------------------------------------------ flags and fields


def test_names_of_flags_and_modes_are_each_said_once():
    assert len(BY_NAME) == len(FLAGS)
    assert list(CONFIGS) == list(MODES) == list(ABOUT)
    assert set(OTHER_NAMES.values()) <= MODES.keys()
    assert {*MEMORY_FLAGS} <= BY_NAME.keys()


@pytest.mark.parametrize("mode", CONFIGS)
def test_flags_of_a_mode_are_the_fields_of_its_configuration(mode):
    assert {flag.name for flag in FLAGS if mode in flag.modes} == field_types(mode).keys()


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_flag_says_its_modes_and_where_it_takes_several(flag):
    hints = {mode: field_types(mode)[flag.name] for mode in flag.modes}
    assert flag.modes == tuple(mode for mode in CONFIGS if mode in flag.modes), "not in the order of the modes"
    assert flag.several == tuple(
        mode for mode, hint in hints.items() if any(typing.get_origin(part) is tuple for part in parts(hint)))
    assert {flag.type is bool} == {bool in parts(hint) for hint in hints.values()}
    assert set(flag.needed) <= set(flag.modes)
    assert all(getattr(CONFIGS[mode], flag.name) is None for mode in flag.needed)
    assert all(getattr(CONFIGS[mode], flag.name) is False for mode in flag.modes if flag.type is bool)


@pytest.mark.parametrize("mode, flag", [(mode, flag) for flag in FLAGS for mode in flag.needed],
                         ids=lambda value: value if isinstance(value, str) else value.name)
def test_needed_flags_are_needed(mode, flag):
    others = {each.name: "x" for each in FLAGS if mode in each.needed and each is not flag}
    assert f"--{flag.name} is needed in {mode} mode" in user_error(CONFIGS[mode](**others).check)


@pytest.mark.parametrize("mode", CONFIGS)
def test_choices_hold_the_default(mode):
    for flag in FLAGS:
        default = getattr(CONFIGS[mode], flag.name) if mode in flag.modes and flag.choices else None
        assert default in (None, *flag.choices) or flag.type is bool, flag.name


def test_a_switch_may_be_followed_by_its_word():
    parse = build_parser().parse_args
    assert parse(["--resume", "--seed", "1"]).resume is True
    assert parse(["--resume", "auto"]).resume == "auto"
    assert "invalid choice: 'always'" in user_error(parse, ["--resume", "always"])


def test_defaults_in_words():
    modes = ("train", "test", "prune", "distill", "export")
    assert BY_NAME["imsize"].default(modes[:4]) == "512 in train, prune; unchanged in test; 256 in distill"
    assert BY_NAME["imsize"].default(("distill",)) == "256"
    assert BY_NAME["load_path"].default(modes) == ("none in train; model-store/compact.pth in test; needed in prune, "
                                                   "distill, export")
    assert BY_NAME["save_path"].default(("prune",)) == NEEDED
    assert BY_NAME["half"].default(("prune",)) == "off"
    assert BY_NAME["prune_nums"].default(("prune",)) == "0 100 200 300 400 470 490 500"
    assert BY_NAME["lr"].default(("train", "distill")) == "0.0001 in train; 0.001 in distill"
    with pytest.raises(AttributeError):
        Flag("no_such_field", ("train",), "").default(("train",))


# -------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("mode", CONFIGS)
def test_help_of_a_mode_has_its_flags_and_defaults_alone(mode, capsys):
    text = help_of(capsys, "--mode", mode, "--help")
    assert flags_in(text) == [flag.name for flag in FLAGS if mode in flag.modes]
    joined = " ".join(text.split())
    for flag in FLAGS:
        if mode in flag.modes:
            default = flag.default((mode,))
            assert f"{flag.help} " + (f"({default})" if default == NEEDED else f"(default: {default})") in joined
    assert ABOUT[mode] in joined
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options"] + [topic for topic, flags in TOPICS.items()
                                    if any(mode in flag.modes for flag in flags)]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("arguments, mode", [
    (["--mode=prune", "--help"], "prune"), (["--help", "--mode", "prune"], "prune"),
    (["--mode", "prune", "-h"], "prune"),
    (["--mode", "eval", "--help"], "test"), (["--help", "--mode=prune_eval"], "prune"),
    (["--imsize", "x", "--mode", "distill", "--half", "--help"], "distill"),
])
def test_help_of_a_mode_by_other_words(arguments, mode, capsys):
    assert help_of(capsys, *arguments) == build_parser(mode).format_help()


def test_help_of_a_mode_says_how_many_values_that_mode_takes(capsys):
    assert "--load_path PATH [PATH ...]" in help_of(capsys, "--mode", "test", "--help")
    assert "--load_path PATH [" not in help_of(capsys, "--mode", "prune", "--help")


def test_help_without_a_mode_has_everything(capsys):
    text = help_of(capsys, "--help")
    assert flags_in(text) == list(BY_NAME)
    for mode, about in ABOUT.items():
        assert f"  {mode:<9}{about}\n" in text
    assert "python main.py --mode prune --help" in text
    joined = " ".join(text.split())
    assert "--cencrop [train] " in joined and "--save_path PATH [every mode] " in joined
    assert BY_NAME["save_path"].default(tuple(CONFIGS)) in joined
    assert max(map(len, text.splitlines())) <= 100


def test_documentation_is_up_to_date():
    document = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))["document"]()
    assert (ROOT / "docs" / "flags.md").read_text() == document, "python docs/make_flags.py > docs/flags.md"
    rows = [line.split("`")[1][2:] for line in document.splitlines() if line.startswith("| `--")]
    assert rows == list(BY_NAME)

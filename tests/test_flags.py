"""What the configurations say of the flags, the command line's help shows; docs/flags.md is up to date."""

import dataclasses
import runpy

import pytest
from helpers import ROOT, refusal, user_error

from main import FLAGS, MEMORY_FLAGS, MODES, OTHER_NAMES, build_parser, describe, main
from settings import NEEDED, SHARED, TOPICS, changed, flags_of, setting
from utils import UserError


def printed(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    """The names of the flags that a help text explains, --mode and --help aside."""
    lines = [line for line in text.splitlines() if line.startswith("    --")]
    return [line.split()[0][2:] for line in lines if not line.startswith("    --mode ")]


# ---------------------------------------------------------------------------------------------- settings


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
    seed, save_path, sizes, half, again, rates = flags_of(Example)
    assert (seed.help, seed.topic, seed.default) == (SHARED["seed"]["help"], "the run", 3)
    assert (save_path.help, save_path.more, save_path.default_in_words) == ("folder to write to", "a file", NEEDED)
    assert [flag.several for flag in flags_of(Example)] == [False, False, True, False, False, True]
    assert [flag.is_switch for flag in flags_of(Example)] == [False, False, False, True, True, False]
    assert [flag.default_in_words for flag in (seed, sizes, half, rates)] == ["3", "no sizes", "off", "0.5 1e-05"]
    assert again.choices == ("auto",)
    assert changed(Example()) == set() and changed(Example(seed=4, half=True)) == {"seed", "half"}


def test_every_flag_is_whole():
    """In one topic, with one way to be written in all modes; what is shared is used."""
    assert SHARED.keys() <= FLAGS.keys() and set(OTHER_NAMES.values()) <= MODES.keys()
    assert {*MEMORY_FLAGS} <= FLAGS.keys()
    for name, flag in FLAGS.items():
        assert len({(each.topic, each.help, each.kind, each.is_switch) for each in flag.values()}) == 1, name
        assert all(each.topic in TOPICS and each.default in (None, False, *each.choices) for each in flag.values()
                   if each.choices), name
        assert all(each.default is None for each in flag.values() if each.needed), name


@pytest.mark.parametrize("mode, name", [(mode, name) for name, flag in FLAGS.items() for mode, each in flag.items()
                                        if each.needed])
def test_needed_flags_are_needed(mode, name):
    others = {other: "x" for other, flag in FLAGS.items() if mode in flag and flag[mode].needed and other != name}
    assert f"{name} is needed in {mode} mode" in user_error(MODES[mode].config(**others).check)


def test_help_and_defaults_in_words():
    def of(name: str, *modes: str) -> tuple[str, str]:
        return describe({mode: FLAGS[name][mode] for mode in modes or FLAGS[name]})

    assert of("imsize")[1] == "512 in train, prune; unchanged in test; 256 in distill; 384 in export"
    assert of("load_path")[1] == "none in train; model-store/compact.pth in test; needed in prune, distill, export"
    assert of("prune_nums")[1] == "0 100 200 300 400 470 490 500; for curves 0 to 500 in fifties"
    assert of("seed") == ("seed of everything random; in test, export mode of --pairs and of --vgg_weights random", "0")
    assert of("seed", "train") == ("seed of everything random", "0")
    assert of("seed", "test")[0] == "seed of everything random; of --pairs and of --vgg_weights random"


# -------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("mode", MODES)
def test_help_of_a_mode_has_its_flags_and_defaults_alone(mode, capsys):
    text = printed(capsys, "--mode", mode, "--help")
    own = {name: describe({mode: flag[mode]}) for name, flag in FLAGS.items() if mode in flag}
    assert flags_in(text) == list(own)
    joined = " ".join(text.split())
    for meaning, default in own.values():
        assert f"{meaning} " + (f"({default})" if default == NEEDED else f"(default: {default})") in joined
    assert MODES[mode].about in joined
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options"] + [topic for topic in TOPICS if any(FLAGS[name][mode].topic == topic for name in own)]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("arguments, mode", [
    (["--mode=prune", "--help"], "prune"), (["--help", "--mode", "prune"], "prune"),
    (["--mode", "eval", "-h"], "test"), (["--help", "--mode=prune_eval"], "prune"),
    (["--imsize", "x", "--mode", "distill", "--half", "--help"], "distill"),
])
def test_help_of_a_mode_by_other_words(arguments, mode, capsys):
    assert printed(capsys, *arguments) == build_parser(mode).format_help()


def test_help_of_a_mode_says_how_many_values_that_mode_takes(capsys):
    assert "--load_path PATH [PATH ...]" in printed(capsys, "--mode", "test", "--help")
    assert "--load_path PATH [" not in printed(capsys, "--mode", "export", "--help")


def test_help_without_a_mode_has_everything(capsys):
    text = printed(capsys, "--help")
    assert flags_in(text) == list(FLAGS)
    for name, mode in MODES.items():
        assert f"  {name:<9}{mode.about}\n" in text
    assert "python main.py --mode prune --help" in text
    joined = " ".join(text.split())
    assert "--cencrop [train] " in joined and "--save_path PATH [every mode] " in joined
    assert describe(FLAGS["save_path"])[1] in joined
    assert max(map(len, text.splitlines())) <= 100


def test_documentation_is_up_to_date():
    document = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))["document"]()
    assert (ROOT / "docs" / "flags.md").read_text() == document, "python docs/make_flags.py > docs/flags.md"
    rows = [line.split("`")[1][2:] for line in document.splitlines() if line.startswith("| `--")]
    assert rows == list(FLAGS)


# ------------------------------------------------------------------------------------------------ parsing


def test_a_mode_gets_what_was_given_of_its_flags(monkeypatch, capsys):
    got = []
    for name, mode in MODES.items():
        monkeypatch.setitem(MODES, name, mode._replace(run=lambda given, name=name: got.append((name, given)) or 0))
    for arguments, desired in (
        ("--seed 1 --resume --lr 0.1", ("train", {"seed": 1, "resume": True, "lr": 0.1})),
        ("--resume auto --mode=distill", ("distill", {"resume": "auto"})),
        ("--content a b --mode eval --metrics --style_strength 0.5", ("test", {
            "content": ("a", "b"), "metrics": (), "style_strength": (0.5,)})),
        ("--mode test --frame_rate 30000/1001", ("test", {"frame_rate": 30000 / 1001})),
        ("--mode prune --content a --prune_nums 3 --half --gpu_no -1 --batch_size 3", ("prune", {
            "content": "a", "prune_nums": (3,), "half": True, "gpu_no": -1})),
    ):
        assert main(arguments.split()) == 0
        assert got.pop() == desired
    assert capsys.readouterr().err == "--batch_size has no effect in prune mode\n"


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

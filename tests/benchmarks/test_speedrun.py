"""speedrun.sh: which commands it runs, what it skips, how it fits a time; its report says what the files say."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fit
import pytest
import report
import stylize
from helpers import CONTENT_DIR, ROOT, STYLE_DIR, read_metrics, words

import main
from network import count_parameters
from weights import load_network

# In the place of Python: main.py and the measuring scripts only leave what the script reads of their outputs, and each
# command a line in `calls`. FAIL=NAME:CODE lets the command that writes to NAME fail. The rest runs for real.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, sys
arguments = sys.argv[1:]
if arguments[0] in ("benchmarks/report.py", "benchmarks/fit.py"):
    os.execv(sys.executable, [sys.executable, *arguments])
if arguments[0] == "-":  # counts the pairs that there are
    sys.exit(print(1000))
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if arguments[0] == "benchmarks/stylize.py":
    print('{{"device": "a CPU", "torch": "2", "sizes": {{}}}}')
    sys.exit(0)
out = pathlib.Path(arguments[arguments.index("--save_path") + 1])
name, code = os.environ.get("FAIL", "none:0").split(":")
stopped = out / "stopped"
if out.name == name:
    print(f"error: {{name}}", file=sys.stderr)
    out.mkdir(exist_ok=True)
    stopped.touch()
    sys.exit(int(code))
if "--max_iter" in arguments:
    last = int(arguments[arguments.index("--max_iter") + 1])
    (out / "samples").mkdir(parents=True, exist_ok=True)
    # 1 iteration a second, 3 seconds a check.
    every = took = int(arguments[arguments.index("--check_iter") + 1])
    for path, time in ((f"check_point_{{last - every:07d}}.pth", 0), (f"samples/iteration_{{last:07d}}.png", took),
                       (f"check_point_{{last:07d}}.pth", took + 3)):
        (out / path).touch()
        os.utime(out / path, (10**9 + time, 10**9 + time))
    if stopped.exists():  # between the two: of those and its own checkpoint the last two are kept
        stopped.unlink()
        (out / f"check_point_{{last - every:07d}}.pth").unlink()
"""
TRAININGS = ["baseline", "uncorrelation", "ch_xor", "compact", "tiny"]
ORDER = ["baseline", "baseline_pruned", "uncorrelation", "uncorrelation_pruned", "ch_xor", "ch_xor_pruned",
         "compact_cut", "compact", "tiny_cut", "tiny", "compared", "latency", "curves"]


@pytest.fixture
def speedrun(tmp_path):
    """Run the script with a stand-in for Python. Returns exit code, stderr, and the commands by where they write to."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*arguments: Path | str, **environment: str) -> tuple[int, str, list[tuple[str, list[str]]]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        unset = dict.fromkeys(("SCALE", "TIME", "ITERATIONS", "HOLDOUT", "GPU", "VGG", "FLAGS"), "")  # but for these
        done = subprocess.run(
            ["bash", ROOT / "speedrun.sh", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300,
            env=os.environ | unset | {"PYTHON": str(python), "CALLS": str(calls)} | environment)
        lines = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return done.returncode, done.stderr, [(written_to(line), line) for line in lines]

    return run


def written_to(command: list[str]) -> str:
    return Path(command[command.index("--save_path") + 1]).stem if "--save_path" in command else "latency"


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_stages_and_their_settings(speedrun, tmp_path, monkeypatch, capsys):
    """What fails or is stopped, what is whole and not made again, and the settings of every stage."""
    def start(**failure: str) -> tuple[int, list[tuple[str, list[str]]]]:
        code, error, calls = speedrun(CONTENT_DIR, STYLE_DIR, "out", GPU="-1", FLAGS="--compile --num_workers 14",
                                      **failure)
        assert error == ""
        return code, calls

    code, first = start(FAIL="uncorrelation:2")  # a training that fails ends it
    assert code == 2 and [name for name, _ in first] == ORDER[:3]
    code, second = start(FAIL="ch_xor:143")  # stopped
    assert code == 143 and [name for name, _ in second] == ORDER[2:5]
    assert re.search(r"\| ch_xor \| [\d:]+ \| not whole \|", (tmp_path / "out" / "report.md").read_text())
    code, third = start(FAIL="ch_xor_pruned:2")  # a measurement that fails is named, and the rest goes on
    assert code == 1 and [name for name, _ in third] == ORDER[4:]
    assert value(third[0][1], "--resume") == "auto"
    assert not [word for word in dict(third)["compared"] if word.endswith("ch_xor_pruned")]
    assert re.search(r"\| ch_xor_pruned \| [\d:]+ \| failed \|", (tmp_path / "out" / "report.md").read_text())
    code, fourth = start()
    assert code == 0 and [name for name, _ in fourth] == ["ch_xor_pruned"]
    assert start() == (0, [])
    stages = report.read_stages(tmp_path / "out")
    assert list(stages) == ORDER and {stage["state"] for stage in stages.values()} == {"whole"}
    shown = shlex.split(stages["tiny"]["command"])
    assert shown[:2] == ["python", "main.py"] and value(shown, "--save_path") == str(tmp_path / "out" / "tiny")
    code, error, calls = speedrun(CONTENT_DIR, STYLE_DIR, "out", SCALE="small")
    assert code == 2 and error.startswith("error: OUT ") and "SCALE=full" in error and calls == []

    checked = {}
    for name, mode in main.MODES.items():
        def keep(given: dict, name=name) -> int:
            checked.setdefault(name, []).append(given)
            return 0

        monkeypatch.setitem(main.MODES, name, mode._replace(run=keep))
    for command in dict(first + second + third + fourth).values():
        if command[0] == "main.py":
            assert main.main(command[1:]) == 0
    assert capsys.readouterr().err == ""  # no flag without an effect
    trained = {Path(given["save_path"]).name: given for given in checked["train"]}
    names = ("encoder_lr", "decoder_lr", "style_loss_weight", "uncorrelation_loss_weight", "channel_loss_weight",
             "xor_loss_weight", "l0_eps", "imsize", "cropsize", "batch_size", "max_iter")
    more = (1e-5, 512, 256, 4, 80_000)
    desired = {"baseline": (0, 1e-4, 100, 0, 0, 0, *more), "uncorrelation": (5e-6, 1e-4, 100, 50, 0, 0, *more),
               "ch_xor": (5e-6, 1e-4, 100, 0, 10_000, 500, *more)}
    for name, settings in desired.items():
        assert tuple(trained[name][each] for each in names) == settings
        assert trained[name].get("optimizer", "adam") == "adam" and "decay_iter" not in trained[name]
        assert trained[name]["compile"] and trained[name]["num_workers"] == 14
    for given in (*checked["train"], *checked["test"]):
        assert given["holdout"] == 0.1 and given["gpu_no"] == -1
        for name, folder in (("content_dir", CONTENT_DIR), ("style_dir", STYLE_DIR)):
            assert given[name] in (str(folder), (str(folder),))  # test mode takes several
    compared = [Path(path).name for path in checked["test"][0]["load_path"]]
    assert compared == [*TRAININGS[:3], "baseline_pruned", "uncorrelation_pruned", "compact", "tiny"]


def test_time_is_shared_out_by_the_measured_rate(speedrun, tmp_path):
    """Beside 20 hours, what the stand-in takes is nothing."""
    code, _, calls = speedrun(CONTENT_DIR, STYLE_DIR, "out", TIME="20h", FAIL="baseline:143")
    assert code == 143 and len(calls) == 1 and not (tmp_path / "out" / "stages" / "baseline.iterations").exists()
    code, _, calls = speedrun(CONTENT_DIR, STYLE_DIR, "out", TIME="20h")
    assert code == 0 and [name for name, _ in calls if name not in TRAININGS] == [
        name for name in ORDER if name not in TRAININGS]
    iterations = {}
    for name in TRAININGS:
        *first, rest = (command for other, command in calls if other == name)
        stretches = [(value(command, "--max_iter"), value(command, "--check_iter")) for command in first]
        # An interrupted first stretch has no rate, and another one follows.
        assert stretches == [("400", "200"), ("800", "200")][: 2 if name == "baseline" else 1]
        iterations[name] = total = int(value(rest, "--max_iter"))
        decay = int(value(rest, "--decay_iter")) if "--decay_iter" in rest else 0
        assert decay == ((total - 200) // 2 if name in ("compact", "tiny") else 0)
    # A second an iteration after the first 400; 40 checks take 120 seconds. At first 8 of 25 parts are kept for what is
    # measured, and soon none: that takes no time here. Each training has its parts of what is then left.
    hours = {"baseline": 20 * 17 / 25 * 4 / 20, "uncorrelation": 20 * 3 / 16, "ch_xor": 20 * 6 / 13,
             "compact": 20 * 4 / 7, "tiny": 20}
    for name, share in hours.items():
        assert iterations[name] == pytest.approx(400 + share * 3600 - 120, rel=0.06), name


def test_iterations_that_fit(tmp_path):
    """0.1 s an iteration, 5 s a check; of 70 s that the last 400 and 2 checks took, 20 were for the start."""
    (tmp_path / "samples").mkdir()
    for name, time in (("check_point_0000600.pth", 100), ("samples/iteration_0000800.png", 120),
                       ("check_point_0000800.pth", 125)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10**9 + time, 10**9 + time))
    for took, seconds, checks, most, desired in (
        (70, 300, 4, 10**6, 800 + (300 - 20 - 4 * 5) * 10), (70, 300, 4, 1000, 1000), (70, -5, 4, 10**6, 800),
    ):
        assert fit.iterations_that_fit(tmp_path, 800, 200, took, seconds, checks, most) == desired
    (tmp_path / "check_point_0000600.pth").unlink()
    with pytest.raises(FileNotFoundError):
        fit.iterations_that_fit(tmp_path, 800, 200, 50, 60, 0, 10**6)


@pytest.mark.parametrize("arguments, environment, needed", [
    ([], {}, "got 0 arguments"), (["a", "b", "c", "d"], {}, "got 4 arguments"),
    *((["a", "b", "out"], {name: value}, f"{name}={value}") for name, value in (
        ("SCALE", "tiny"), ("TIME", "20"), ("TIME", "0m"), ("GPU", "cpu"), ("ITERATIONS", "many"))),
    (["a", "b", "out"], {"ITERATIONS": "3", "SCALE": "small"}, "ITERATIONS=3: 4 or more"),
    # Pictures are looked at before anything is written; this starts Python.
    ([CONTENT_DIR, "empty", "out"], {"PYTHON": sys.executable}, "STYLE {tmp}/empty: no picture in it; it is empty\n"),
])
def test_bad_usage_is_one_line(speedrun, tmp_path, arguments, environment, needed):
    (tmp_path / "empty").mkdir()
    code, error, calls = speedrun(*arguments, **environment)
    assert code == 2 and calls == [] and error.count("\n") == 1
    assert error.startswith(f"error: {needed.format(tmp=tmp_path)}")
    assert sorted(os.listdir(tmp_path)) == ["empty", "python"]


# ------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def out(small, tmp_path_factory) -> Path:
    """What the stages of a narrow baseline leave, measured for real."""
    out = tmp_path_factory.mktemp("speedrun")
    marks = out / "stages"
    marks.mkdir()
    pictures = {"content_dir": CONTENT_DIR, "style_dir": STYLE_DIR, "gpu_no": -1, "imsize": 32, "cropsize": 32}
    commands = {
        "baseline": small | {"mode": "train", "save_path": out / "baseline", "max_iter": 3},
        "baseline_pruned": {"mode": "prune", "load_path": out / "baseline", "prune_num": 2, "prune_nums": (0, 4),
                            "latency_runs": 1, "report_size": 32, "save_path": out / "baseline_pruned", **pictures},
        "compared": {"mode": "test", "load_path": (out / "baseline", out / "baseline_pruned"), "pairs": 6,
                     "metrics": ("content", "ssim"), "vgg_weights": "random", "save_path": out / "compared",
                     **pictures},
    }
    for seconds, (name, flags) in enumerate(commands.items()):
        assert main.main(words(flags)) == 0
        (marks / f"{name}.done").write_text(f"abc123\npython main.py --mode {flags['mode']}\n")
        (marks / f"{name}.seconds").write_text(f"{4000 * seconds}\n")
    (marks / "order").write_text("\n".join([*commands, "latency", "curves"]))
    (marks / "settings").write_text("CONTENT=photos\nSCALE=small\n")
    models = [str(out / name) for name in ("baseline", "baseline_pruned")]
    with pytest.MonkeyPatch.context() as patch, open(marks / "latency.log", "w") as log:
        patch.setattr(sys, "argv", ["stylize.py", *models, "--gpu_no", "-1", "--sizes", "32", "64", "--runs", "1"])
        patch.setattr(sys, "stdout", log)
        stylize.main()
    return out


def rows_of(text: str, section: str) -> dict[str, dict[str, str]]:
    """The rows of a section's table by their first cell: cells by title."""
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in table]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def test_report_says_what_the_files_say(out):
    assert report.main([str(out)]) == 0
    text = (out / "report.md").read_text()
    metrics = json.loads((out / "compared" / "metrics.json").read_text())
    networks = rows_of(text, "Networks")
    assert list(networks) == ["baseline", "baseline_pruned", "baseline_pruned − baseline"]
    for model in metrics["models"]:
        row, content = networks[model["name"]], model["metrics"]["content"]
        assert row["parameters"] == f"{count_parameters(load_network(out / model['name'])[0]):,}"
        assert row["iterations"] == "3" and float(row["a pair at 64², ms"]) > 0
        shown, margin = map(float, row["content loss"].split(" ± "))
        assert shown == pytest.approx(content["mean"], rel=0.01)
        assert margin == pytest.approx(content["interval"][1] - content["mean"], rel=0.1)
    difference = metrics["models"][1]["difference_from_first"]["ssim"]["mean"]
    assert float(networks["baseline_pruned − baseline"]["SSIM"].split()[0]) == pytest.approx(difference, rel=0.01)
    assert metrics["device"] in text and f"torch {metrics['versions']['torch']}" in text and "`SCALE=small`" in text

    pruned = json.loads((out / "baseline_pruned" / "report.json").read_text())
    assert rows_of(text, "Channels that go off") == {"baseline": {"network": "baseline"} | pruned["column"]}
    row = rows_of(text, "Trainings")["baseline"]
    assert row["iterations"] == "3"
    assert float(row["style loss"]) == pytest.approx(read_metrics(out / "baseline")[-1]["style"], rel=0.01)
    stages = rows_of(text, "Stages")
    assert stages["compared"] == {"stage": "compared", "time": "2:13:20", "state": "whole"}
    assert stages["curves"]["state"] == "not whole" and stages["all"]["time"] == "3:20:00"
    assert "Commit of the code: abc123." in text and "python main.py --mode prune\n" in text
    figures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert figures == ["compared/comparison.png", "baseline_pruned/l0_map.png", "baseline_pruned/l2_curve.png",
                       "baseline_pruned/prune_grid.png"]
    assert all((out / figure).is_file() for figure in figures)


def test_report_without_a_run_is_refused(tmp_path, capsys):
    for arguments in ([], [str(tmp_path)]):
        assert report.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1

"""The documents: every command parses, every link leads somewhere, no page grows too long, nothing is left out."""

import argparse
import math
import re
import runpy
import shlex
import sys
from functools import lru_cache
from pathlib import Path
from string import Template

import pytest
from helpers import ROOT, write_noise
from PIL import Image

import main

KB = 1024
LIMITS = {
    "README.md": 12 * KB, "docs/training.md": 6 * KB, "docs/compact.md": 6 * KB, "docs/pruning.md": 5 * KB,
    "docs/distilling.md": 3 * KB, "docs/measuring.md": 5 * KB, "docs/method.md": 6 * KB, "docs/performance.md": 6 * KB,
    "docs/exporting.md": 6 * KB, "docs/stylising.md": 7 * KB, "docs/video.md": 6 * KB,
    "docs/results.md": 8 * KB, "docs/recipes.md": 9 * KB, "docs/reproducing.md": 5 * KB,
    "docs/your_network.md": 4 * KB, "docs/reading.md": 3 * KB,
}
PAGES = sorted({*LIMITS, *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")), "model-store/README.md",
                "imgs/README.md"})
NAME = r"[A-Za-z_]\w*"
COMMENT = re.compile(r"(?:^|\s)#\s")
PROGRAMS = {"python", "python3", "torchrun", "bash", "pip", "uv", "make", "cp", "mv", "done", "npm", "node"}
OTHER_FLAGS = {"--nproc_per_node", "--max-restarts", "--index-url"}  # of torchrun and pip


@lru_cache
def read(page: str) -> str:
    return (ROOT / page).read_text()


def shell_lines(text: str) -> list[str]:
    """The commands of all bash blocks of a page, with variables expanded from assignments further up in the page (a
    loop's by the first of its values). Raises KeyError for another variable."""
    lines, variables = [], {}
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = Template(COMMENT.split(line)[0].strip()).substitute(variables)
            assigned = re.fullmatch(rf"({NAME})=(\"[^\"]*\"|'[^']*'|\S*)", line)
            looped = re.match(rf"for ({NAME}) in (\S+)", line)
            if assigned:
                variables[assigned[1]] = assigned[2].strip("\"'")
            elif looped:
                variables[looped[1]] = looped[2].rstrip(";")
            elif line:
                lines.append(line)
    return lines


def commands(page: str) -> list[list[str]]:
    """The commands of a page, as words."""
    return [shlex.split(line) for line in shell_lines(read(page))]


def every_command(script: str) -> list:
    """Parameters (page, arguments) of every command that runs a script whose path matches the pattern `script`."""
    found = []
    for page in PAGES:
        for words in commands(page):
            for place, word in enumerate(words):
                if re.fullmatch(script, word):
                    found.append(pytest.param(page, words[place:], id=f"{page}: {' '.join(words)[:100]}"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_line_of_a_block_is_of_a_known_program(page):
    """What no other test here parses must at least be there."""
    for line in shell_lines(read(page)):
        words = re.sub(r"^(\w+=(\"[^\"]*\"|\S*) )*", "", line).split()  # without what is set for this command alone
        assert words[0] in PROGRAMS, line
        assert all((ROOT / file).is_file() for file in re.findall(r"[\w./-]+\.(?:py|sh|txt)\b", line)), line
        assert words[0] != "make" or f"\n{words[1]}:" in read("Makefile")


DEMO = [pytest.param("demo.sh", shlex.split(line), id=f"demo.sh: {line[:60]}") for line in re.findall(
    r'^ *"\$python" (main\.py .*)', read("demo.sh").replace("\\\n", " "), re.MULTILINE)]


@pytest.mark.parametrize("page, words", every_command(r"main\.py") + DEMO)
def test_command_of_main_parses(page, words, tmp_path, monkeypatch, capsys):
    for other in commands(page):  # what an earlier command of the page paints is a folder of pictures to the next
        if "--paint" in other:
            (tmp_path / other[other.index("--paint") + 1]).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    checked = []
    for name, mode in main.MODES.items():
        def check(given: dict, config=mode.config) -> int:
            config(**given).check()
            checked.append(given)
            return 0

        monkeypatch.setitem(main.MODES, name, mode._replace(run=check))
    assert main.main(words[1:]) == 0, capsys.readouterr().err
    assert len(checked) == 1
    assert capsys.readouterr().err == ""  # no flag without an effect


def test_numeric_tests_are_there():
    (paths,) = re.findall(r"^NUMERIC := ((?:.*\\\n)*.*)", read("Makefile"), re.MULTILINE)
    assert all((ROOT / path).exists() for path in paths.replace("\\", "").split())


def test_every_mode_and_benchmark_has_a_command():
    modes = {words[words.index("--mode") + 1] for case in every_command(r"main\.py") for words in [case.values[1]]}
    assert modes == set(main.MODES)
    shown = {Path(case.values[1][0]).name for case in every_command(r"benchmarks/\w+\.(py|sh)")}
    scripts = {path.name for pattern in ("*.py", "*.sh") for path in ROOT.glob(f"benchmarks/{pattern}")}
    assert shown == scripts - {"measure.py", "plain.py", "fit.py", "report.py"}  # of the others, and of speedrun.sh


@pytest.mark.parametrize("page, words", every_command(r"benchmarks/\w+\.py"))
def test_command_of_a_benchmark_parses(page, words, monkeypatch):
    class Parsed(Exception):
        pass

    def parse(parser, *arguments):
        whole(parser, *arguments)
        raise Parsed

    whole = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[0]))["main"]()


def test_the_three_published_trainings_have_the_published_settings():
    configs = {}
    for words in commands("docs/training.md"):
        if words[2:4] == ["--mode", "train"] and "--content_dir" in words and "runs/two" not in words:
            given = vars(main.build_parser("train").parse_args(words[4:]))
            configs[Path(given["save_path"]).name] = main.MODES["train"].config(**given)
    desired = {
        "ch_xor": (5e-6, 100.0, 0.0, 10000.0, 500.0),
        "baseline": (0.0, 100.0, 0.0, 0.0, 0.0),
        "uncorrelation": (5e-6, 100.0, 50.0, 0.0, 0.0),
    }
    assert configs.keys() == desired.keys()
    for name, config in configs.items():
        weights = [config.weights[term] for term in ("style", "uncorrelation", "channel", "xor")]
        assert (config.learning_rates["encoder"], *weights) == desired[name]
        assert config.learning_rates["decoder"] == 1e-4 and config.optimizer == "adam"
        assert (config.imsize, config.cropsize, config.batch_size, config.max_iter) == (512, 256, 4, 80000)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_exists(page):
    known = {f"--{name}" for flags in main.FLAGS.values() for name in flags} | {"--mode", "--help"} | OTHER_FLAGS
    for path in (*ROOT.glob("benchmarks/*.py"), ROOT / "model-store" / "convert_vgg.py"):
        known |= set(re.findall(r'"(--\w+)"', path.read_text()))
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL))
    used = {flag for code in inline for flag in re.findall(r"(?<![\w-])--[\w-]+", code)}
    assert used <= known, used - known


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_page_is_short_and_every_link_leads_somewhere(page):
    assert (ROOT / page).stat().st_size <= LIMITS.get(page, math.inf)
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(str(path.resolve().relative_to(ROOT.resolve()))), target


def test_readme_leads_to_every_page():
    text = "".join(read(page) for page in ("README.md", *LIMITS))
    assert all(f"({path.name})" in text or f"(docs/{path.name})" in text for path in ROOT.glob("docs/*.md"))


def test_every_picture_of_the_results_is_shown():
    shown = {Path(target).name for page in PAGES for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", read(page))}
    assert {path.name for path in (ROOT / "imgs" / "results").iterdir()} == shown


def test_every_module_stands_in_the_file_tree():
    rows = re.findall(r"^\| ((?:`[^`]+` )+)\| \S", read("README.md"), re.MULTILINE)
    files = [file for row in rows for file in re.findall("`([^`]+)`", row) if file.endswith((".py", ".sh", "/"))]
    assert {file for file in files if file.endswith(".py")} == {path.name for path in ROOT.glob("*.py")}
    assert all((ROOT / file).exists() for file in files)


def test_requirements_are_what_pyproject_names():
    text = read("pyproject.toml")
    extras = dict(re.findall(r"^(\w+) = \[(.*)\]", text.split("[project.optional-dependencies]")[1], re.MULTILINE))
    assert all(re.fullmatch("[a-z0-9]+", extra) for extra in extras)  # older pips do not find a name with a dash or _
    assert "wandb" in extras and "compact-style-transfer[wandb,metrics,export,video,examples]" in extras["dev"]
    for name, line in (("requirements.txt", ".[wandb]"), ("requirements-dev.txt", ".[dev]")):
        assert [each for each in read(name).splitlines() if not each.startswith("#")] == [line]
    for page in (*PAGES, "export.py", "painting/quality.py", "painting/video.py", "benchmarks/peers.py"):
        assert set(re.findall(r"pip install '\.\[(\w+)\]'", read(page))) <= extras.keys(), page


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """With small pictures under the names that they read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    (tmp_path / "model-store").symlink_to(ROOT / "model-store")
    for number, name in enumerate(("photo.jpg", "painting.jpg")):
        write_noise(tmp_path / name, (24, 32), number)
    for block in re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
        exec(block, {})
        assert "painted.png" not in block or Image.open(tmp_path / "painted.png").size == (32, 24)

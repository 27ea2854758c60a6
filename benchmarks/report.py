"""The report of a `speedrun.sh`: `report.md` in its folder, from the files that the stages left there.

    python benchmarks/report.py runs/speedrun

Whatever is not there yet is left out, so a run that is under way has a report, too.
"""

import json
import sys
from pathlib import Path

STAGES = "stages"  # the folder of settings, order (the names), and NAME.done (commit, command), .seconds, .log, .failed
PUBLISHED = ("baseline", "uncorrelation", "ch_xor")
TRAININGS = (*PUBLISHED, "compact", "tiny")
METRICS = {"content": "content loss", "style": "style loss", "ssim": "SSIM"}
FIGURES = {"l0_map.png": "which channels (across) are off (black) for which picture (down)",
           "l2_curve.png": "summed response of the channels, weakest first",
           "prune_grid.png": "with more and more of the weakest channels cut"}


def read_json(path: Path) -> dict | None:
    """The values of a file; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a half-written last line does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_latency(log: Path) -> dict | None:
    """What benchmarks/stylize.py printed as its last line."""
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"')] if log.exists() else []
    return json.loads(lines[-1]) if lines else None


def table(kind: str, rows: dict[str, dict[str, str]]) -> list[str]:
    """Lines of Markdown: a row for each name, which is of this kind, with a column for every title; empty without rows.
    """
    titles = dict.fromkeys(title for cells in rows.values() for title in cells)
    lines = [[kind, *titles], ["---"] * (1 + len(titles))]
    lines += [[name, *(cells.get(title, "") for title in titles)] for name, cells in rows.items()]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)] if rows else []


def duration(seconds: int) -> str:
    """As in 1:02:03, hours, minutes and seconds."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def brief(value: float) -> str:
    """Three digits, or all before the point where there are more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_margin(summary: dict) -> str:
    """A mean with half of its interval, where it has one."""
    margin = "" if summary["interval"] is None else f" ± {summary['interval'][1] - summary['mean']:.2g}"
    return f"{summary['mean']:.3g}{margin}"


def figure(out: Path, path: Path, caption: str) -> list[str]:
    return ["", f"![{caption}]({path.relative_to(out).as_posix()})", "", f"*{caption}*"] if path.exists() else []


# ---------------------------------------------------------------------------------------------- sections


def heading(out: Path, compared: dict | None, latency: dict | None, stages: dict[str, dict]) -> list[str]:
    """What was run, on what, and with which versions."""
    settings = (out / STAGES / "settings").read_text().split("\n")
    lines = ["# Report", "", f"By `speedrun.sh`, with {', '.join(f'`{line}`' for line in settings if line)}.", ""]
    if compared:
        versions = ", ".join(f"{name} {number}" for name, number in compared["versions"].items())
        lines.append(f"Measured on {compared['device']}, with {versions}. VGG weights of the losses: "
                     f"{compared['vgg_weights_of_losses']}.")
    if latency:
        lines.append(f"Latency on {latency['device']}, torch {latency['torch']}.")
    commits = dict.fromkeys(stage["commit"] for stage in stages.values() if stage["commit"])
    return [*lines, f"Commit of the code: {', '.join(commits)}."] if commits else lines


def models(out: Path, compared: dict | None, latency: dict | None) -> list[str]:
    """Quality and cost of every network, and its differences from the first."""
    if not compared:
        return []
    rows, differences = {}, {}
    for model in compared["models"]:
        cells = rows[model["name"]] = {"iterations": str(model["iteration"]), "parameters": f"{model['parameters']:,}"}
        for size, costs in (latency["sizes"] if latency else {}).items():
            cost = {Path(path).name: each for path, each in costs.items()}.get(model["name"])
            if cost:
                cells[f"multiply-adds at {size}², 10⁹"] = brief(cost["multiply_adds"] / 1e9)
                cells[f"a pair at {size}², ms"] = brief(cost["pair_ms"]["median"])
        title = f"{model['name']} − {compared['models'][0]['name']}"
        for of, name, summaries in ((rows, model["name"], model["metrics"]),
                                    (differences, title, model["difference_from_first"] or {})):
            for metric, summary in summaries.items():
                of.setdefault(name, {})[METRICS[metric]] = with_margin(summary)
    note = (f"*{len(compared['pairs'])} held-out pairs with sides of {compared['settings']['cropsize']}; ± is half of "
            f"the {compared['interval']}. Latency: medians, all networks in turns.*")
    return ["", "## Networks", *table("network", rows | differences), "", note,
            *figure(out, out / "compared" / "comparison.png", "Held-out pairs: content, style, and every network")]


def channels(out: Path) -> list[str]:
    """What pruning measured and changed."""
    reports = {name: read_json(out / f"{name}_pruned" / "report.json") for name in PUBLISHED}
    rows = {name: report.get("column", {}) for name, report in reports.items() if report}
    lines = ["", "## Channels that go off", *table("network", rows)] if rows else []
    for name in rows:
        for file, caption in FIGURES.items():
            lines += figure(out, out / f"{name}_pruned" / file, f"{name}: {caption}")
    return lines


def trainings(out: Path) -> list[str]:
    """Where every training stands."""
    titles = {"content": "content loss", "style": "style loss", "channels_off_for_all": "off for all of a batch",
              "channels_off_for_some": "off for some"}
    rows = {}
    for name in TRAININGS:
        for last in read_rows(out / name / "metrics.jsonl")[-1:]:
            rows[name] = {"iterations": f"{last['iteration']:,}"}
            rows[name] |= {title: f"{last[key]:.3g}" for key, title in titles.items() if last.get(key) is not None}
    if not rows:
        return []
    return ["", "## Trainings", *table("training", rows), "",
            "*Means since the check before the last.*",
            *figure(out, out / "curves.png", "Channels off, content and style loss over the iterations")]


def read_stages(out: Path) -> dict[str, dict]:
    """Seconds, commit and command of every stage that began, in the order in which they did."""
    stages = {}
    order = out / STAGES / "order"
    for name in order.read_text().split() if order.exists() else ():
        mark, failed, seconds = (out / STAGES / f"{name}.{kind}" for kind in ("done", "failed", "seconds"))
        commit, command = mark.read_text().split("\n", 1) if mark.exists() else ("", "")
        state = "whole" if mark.exists() else "failed" if failed.exists() else "not whole"
        stages[name] = {"seconds": int(seconds.read_text()) if seconds.exists() else 0, "commit": commit,
                        "command": command.strip(), "state": state}
    return stages


def times(stages: dict[str, dict]) -> list[str]:
    rows = {name: {"time": duration(stage["seconds"]), "state": stage["state"]} for name, stage in stages.items()}
    rows["all"] = {"time": duration(sum(stage["seconds"] for stage in stages.values()))}
    return ["", "## Stages", *table("stage", rows)]


def commands(stages: dict[str, dict]) -> list[str]:
    lines = [stage["command"] for stage in stages.values() if stage["command"]]
    return ["", "## Commands", "", "```bash", *lines, "```"] if lines else []


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not (Path(arguments[0]) / STAGES / "settings").is_file():
        print("error: the folder that speedrun.sh wrote to is needed: python benchmarks/report.py runs/speedrun",
              file=sys.stderr)
        return 2
    out = Path(arguments[0])
    compared = read_json(out / "compared" / "metrics.json")
    latency = read_latency(out / STAGES / "latency.log")
    stages = read_stages(out)
    lines = [*heading(out, compared, latency, stages), *models(out, compared, latency), *channels(out),
             *trainings(out), *times(stages), *commands(stages)]
    new = out / ".report.md.new"
    new.write_text("\n".join(lines) + "\n")
    new.replace(out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

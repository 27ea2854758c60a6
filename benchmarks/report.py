"""The report of a `speedrun.sh`: `report.md` in its folder, from the files that the stages left there.

    python benchmarks/report.py runs/speedrun

Whatever is not there yet is left out, so a run that is under way has a report, too.
"""

import json
import sys
from pathlib import Path

STAGES = "stages"  # the folder of settings, order (the names), and NAME.done (commit, command), .seconds, .log, .failed
PUBLISHED = ("baseline", "uncorrelation", "ch_xor")
TRAININGS = (*PUBLISHED, "compact_student", "compact", "tiny_student", "tiny")
METRICS = {"content": ("content loss", ".3g"), "style": ("style loss", ".3g"), "ssim": ("SSIM", ".2f")}
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


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown; empty without rows."""
    if not rows:
        return []
    return ["", *(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))]


def duration(seconds: int) -> str:
    """As in 1:02:03, hours, minutes and seconds."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def brief(value: float) -> str:
    """Three digits, or all before the point where there are more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_margin(summary: dict, form: str, sign: str = "") -> str:
    """A mean with half of its interval, where it has one."""
    mean = format(summary["mean"], sign + form)
    if summary["interval"] is None:
        return mean
    return f"{mean} ± {format(summary['interval'][1] - summary['mean'], form.replace('.3g', '.2g'))}"


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
    measured = [metric for metric in METRICS if metric in compared["models"][0]["metrics"]]
    costs = {}  # by the folder's name and size
    sizes = latency["sizes"] if latency else {}
    for size, of_models in sizes.items():
        costs |= {(Path(path).name, size): values for path, values in of_models.items()}
    first = next(iter(sizes), None)
    titles = ["network", "iterations", "parameters", *([f"multiply-adds at {first}², 10⁹"] if first else []),
              *(f"a pair at {size}², ms" for size in sizes), *(METRICS[metric][0] for metric in measured)]
    rows, differences = [], []
    for model in compared["models"]:
        name = model["name"]
        cost = [brief(costs[name, first]["multiply_adds"] / 1e9)] if (name, first) in costs else [""] * bool(first)
        cost += [brief(costs[name, size]["pair_ms"]["median"]) if (name, size) in costs else "" for size in sizes]
        rows.append([name, str(model["iteration"]), f"{model['parameters']:,}", *cost,
                     *(with_margin(model["metrics"][metric], METRICS[metric][1]) for metric in measured)])
        if model["difference_from_first"]:
            differences.append([f"{name} − {compared['models'][0]['name']}", *[""] * (len(titles) - len(measured) - 1),
                                *(with_margin(model["difference_from_first"][metric], METRICS[metric][1], "+")
                                  for metric in measured)])
    pairs, settings = compared["pairs"], compared["settings"]
    note = (f"*{len(pairs)} held-out pairs with sides of {settings['cropsize']}; ± is half of the "
            f"{compared['interval']}. Latency: medians, all networks in turns.*")
    return ["", "## Networks", *table(titles, rows + differences), "", note,
            *figure(out, out / "compared" / "comparison.png", "Held-out pairs: content, style, and every network")]


def channels(out: Path) -> list[str]:
    """What pruning measured and changed."""
    reports = {name: read_json(out / f"{name}_pruned" / "report.json") for name in PUBLISHED}
    rows = [
        [name, f"{report['channels_zero_for_all']} of {report['channels_before']}",
         str(report["channels_zero_for_some"]),
         *(" to ".join(show(report[f"{key}_{when}"] / unit) for when in ("before", "after")) for key, unit, show in
           (("parameters", 1, "{:,.0f}".format), ("macs", 1e9, "{:.4g}".format), ("file_bytes", 2**20, "{:.2f}".format),
            ("latency_ms", 1, brief))),
         "" if report["max_pixel_difference"] is None else f"{report['max_pixel_difference']:.3g}",
         f"{report['content_pictures']} + {report['style_pictures']}"]
        for name, report in reports.items() if report
    ]
    if not rows:
        return []
    size = next(report["size_of_macs_and_latency"] for report in reports.values() if report)
    lines = ["", "## Channels that go off", *table(
        ["network", "off for all pictures", "off for some", "parameters", f"multiply-adds at {size}², 10⁹", "file, MiB",
         f"a pair at {size}², ms", "largest change of a colour value, of 255", "pictures"], rows)]
    for name in reports:
        for file, caption in FIGURES.items():
            lines += figure(out, out / f"{name}_pruned" / file, f"{name}: {caption}")
    return lines


def trainings(out: Path) -> list[str]:
    """Where every training stands."""
    titles = ["training", "iterations", "content loss", "style loss", "channels off for all of a batch", "for some",
              "loss against the teacher"]
    rows = []
    for name in TRAININGS:
        metrics = read_rows(out / name / "metrics.jsonl")
        if not metrics:
            continue
        last = metrics[-1]
        numbers = [last.get(key) for key in ("content", "style", "channels_off_for_all", "channels_off_for_some")]
        numbers.append(last.get("held_out_loss", last.get("loss")))
        rows.append([name, f"{last['iteration']:,}", *("" if value is None else f"{value:.3g}" for value in numbers)])
    if not rows:
        return []
    return ["", "## Trainings", *table(titles, rows), "", "*Means since the check before the last; the loss against "
            "the teacher is of held-out pictures.*",
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
    rows = [[name, duration(stage["seconds"]), stage["state"]] for name, stage in stages.items()]
    rows.append(["all", duration(sum(stage["seconds"] for stage in stages.values())), ""])
    return ["", "## Stages", *table(["stage", "time", "state"], rows)]


def commands(stages: dict[str, dict]) -> list[str]:
    lines = [stage["command"] for stage in stages.values() if stage["command"]]
    return ["", "## Commands", "", "```bash", *lines, "```"] if lines else []


def write_report(out: Path) -> Path:
    """Write `report.md` of the run in `out`. Raises OSError when it is no such folder."""
    compared = read_json(out / "compared" / "metrics.json")
    latency = read_latency(out / STAGES / "latency.log")
    stages = read_stages(out)
    lines = [*heading(out, compared, latency, stages), *models(out, compared, latency), *channels(out),
             *trainings(out), *times(stages), *commands(stages)]
    new = out / ".report.md.new"
    new.write_text("\n".join(lines) + "\n")
    return new.replace(out / "report.md")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not (Path(arguments[0]) / STAGES / "settings").is_file():
        print("error: the folder that speedrun.sh wrote to is needed: python benchmarks/report.py runs/speedrun",
              file=sys.stderr)
        return 2
    write_report(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a cut changed, in one or several networks: sizes, multiply-adds, latency, pictures that did not choose it."""

import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data import denormalize, normalize, to_pil
from network import StyleTransferNetwork, align, bottleneck_conv, conv_layers, level_statistics, resized
from painting.quality import INTERVAL, METRICS, Measurement, Meter, show_summary
from painting.stylizer import load_input
from pruning.plots import plot_curves, plot_l0_maps, plot_l2_curves, plot_panels
from pruning.responses import FOLDERS, Responses
from pruning.selection import Constants, Cuts
from utils import describe_device, progress_bar, time_in_turns, write_text_atomically
from weights import model_checkpoint

STRENGTHS = (1.0, 0.5)  # that changes are measured at, beside the one that is asked for
MEASURED = ("content", "style", "flat")  # of METRICS, for several networks
# Of channels that are cut: in the picture grid, as published, and at the points of the loss curves.
GRID_NUMBERS = (0, 100, 200, 300, 400, 470, 490, 500)
CURVE_NUMBERS = tuple(range(0, 501, 50))


def load_pair(pair: tuple[str, str], config, device: torch.device) -> list[Tensor]:
    """The content and the style picture at these paths, (1, 3, H, W) each, uint8."""
    return [load_input(Path(path), config, name).to(device) for path, name in zip(pair, FOLDERS)]


@torch.inference_mode()
def largest_change(before: StyleTransferNetwork, after: StyleTransferNetwork, content: Tensor, style: Tensor,
                   strength: float) -> float:
    """Largest difference of any colour value, 0..255, between the pictures of two networks, not rounded. content,
    style: (1, 3, H, W), uint8."""
    content, style = normalize(content), normalize(style)
    first, second = (denormalize(network(content, style, strength)) for network in (before, after))
    return (first - second).abs().max().item() * 255.0


def measure_changes(before: StyleTransferNetwork, after: StyleTransferNetwork, pairs: list[tuple[str, str]],
                    config) -> list[dict]:
    """The `largest_change` over the pairs, at the measured size and half of it, each strength; empty without pairs."""
    device = next(before.parameters()).device
    half = replace(config, imsize=max(1, config.imsize // 2), cropsize=max(1, config.cropsize // 2))
    strengths = sorted({*STRENGTHS, config.style_strength}, reverse=True)
    changes = []
    for sized in dict.fromkeys((config, half)) if pairs else ():
        loaded = [load_pair(pair, sized, device) for pair in pairs]
        changes += [{"imsize": sized.imsize, "cropsize": sized.cropsize, "style_strength": strength,
                     "max_pixel_difference": max(largest_change(before, after, *pair, strength) for pair in loaded)}
                    for strength in strengths]
    return changes


@torch.inference_mode()
def paint_with_cuts(network: StyleTransferNetwork, responses: Responses, content: Tensor, style: Tensor,
                    numbers: Iterable[int], strength: float) -> dict[int, Tensor]:
    """The network's pictures without its n weakest bottleneck channels, by n, for each n that it has: as
    `surgery.cut_bottleneck` has them, without encoding anew, since a channel that is zero feeds the decoder nothing.
    content, style: (1, 3, H, W), ImageNet-normalised, as is what returns."""
    aligned, *shallower = align(network.encode(content), *level_statistics(network.encode(style)), strength)
    weakest = torch.from_numpy(responses.weakest_first).to(aligned.device)
    return {number: resized(network.decoder(aligned.index_fill(1, weakest[:number], 0), *shallower), *content.shape[2:])
            for number in numbers if number < len(weakest)}


def paint_grid(network: StyleTransferNetwork, responses: Responses, config, path: Path) -> None:
    """Content, style, and the output after cutting the n weakest channels, for each n that the network has."""
    device = next(network.parameters()).device
    pair = [normalize(picture) for picture in load_pair((config.content, config.style), config, device)]
    outputs = paint_with_cuts(network, responses, *pair, config.prune_nums or GRID_NUMBERS, config.style_strength)
    panels = dict(zip(("Content", "Style"), pair)) | {f"Prune {number} channels": outputs[number] for number in outputs}
    plot_panels({title: to_pil(denormalize(picture)) for title, picture in panels.items()}, path)


@torch.inference_mode()
def measure_losses(network: StyleTransferNetwork, cut: StyleTransferNetwork, responses: Responses, meter: Meter,
                   config) -> dict:
    """The meter's metrics over the pairs that were set aside: "metrics" of the cut network, and as "curve" those of the
    network without its n weakest channels, for each n that it has, with n as "cut"."""
    values, numbers = [], sorted(config.prune_nums or CURVE_NUMBERS)
    for pair in progress_bar(len(responses.pairs), "measure losses", "pair", iterable=responses.pairs):
        content, style = load_pair(pair, config, meter.device)
        both = normalize(content), normalize(style)
        painted = paint_with_cuts(network, responses, *both, numbers, config.style_strength)
        outputs = [cut(*both, config.style_strength), *painted.values()]
        values.append(meter.measure(meter.open_content(content), meter.open_style(style), outputs).cpu())
    measurement = Measurement(torch.stack(values).numpy(), responses.pairs, ["cut", *map(str, painted)], meter.metrics)
    curve = [{"cut": number} | measurement.summary(place) for place, number in enumerate(painted, start=1)]
    return {"metrics": measurement.summary(0), "curve": curve}


def build_report(model_file: Path, before: StyleTransferNetwork, after: StyleTransferNetwork, cuts: Cuts,
                 constants: Constants, responses: Responses, meter: Meter | None, config) -> dict:
    """What the cut changed, as plain values for `report.json`; with a meter the losses, too."""
    size, device = config.report_size, next(before.parameters()).device
    pair = torch.randn(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        times = time_in_turns([lambda: before(*pair), lambda: after(*pair)], config.latency_runs, device)
    dtypes = torch.float32, torch.float16 if config.half else torch.float32
    report, layers = {"load_path": str(model_file)}, _layer_rows(before, after, constants, responses, size)
    for when, network, dtype, taken in zip(("before", "after"), (before, after), dtypes, times):
        file = io.BytesIO()
        torch.save(model_checkpoint(network, dtype), file)  # without a training run's optimiser state
        report |= {
            f"channels_{when}": network.config.bottleneck_width,
            f"parameters_{when}": sum(layer[f"parameters_{when}"] for layer in layers),
            f"macs_{when}": sum(layer[f"macs_{when}"] for layer in layers),
            f"file_bytes_{when}": file.tell(),
            f"latency_ms_{when}": statistics.median(taken) * 1000.0,
        }
    changes = measure_changes(before, after, responses.pairs, config)
    report |= {
        "max_pixel_difference": max((change["max_pixel_difference"] for change in changes), default=None),
        "changes": changes,
        "compared_pairs": len(responses.pairs),
        "pairs_set_aside": responses.pairs,
        "channels_zero_for_all": len(responses.off_for_all),
        "channels_zero_for_some": len(responses.off_for_some),
        "content_pictures": responses.contents,
        "style_pictures": len(responses.paths) - responses.contents,
        "size_of_macs_and_latency": size,
        "device": describe_device(device),
        "torch": torch.__version__,
        "cut_channels": sorted(cuts[bottleneck_conv(before.config)]),
        "prune_layers": "all" if config.every_layer else "bottleneck",
        **{name: getattr(config, name) for name in ("imsize", "cropsize", "latency_runs", "prune_macs", "prune_rank",
                                                    "round_to")},
        "layers": layers,
    }
    if meter is not None:
        report |= measure_losses(before, after, responses, meter, config)
    return report | {"column": _column(report)}


def _layer_rows(before: StyleTransferNetwork, after: StyleTransferNetwork, constants: Constants, responses: Responses,
                size: int) -> list[dict]:
    """A dictionary for each conv, in forward order; with None where its channels were not measured."""
    off = {bottleneck_conv(before.config): len(responses.off_for_all)}
    off |= {name: len(found.off) for name, found in responses.layers.items()}
    folded = {name: len(constants.get(name, {}).keys() & set(found.constant.tolist()))
              for name, found in responses.layers.items()}
    return [{"name": old.name, "kind": old.kind}
            | {f"{key}_{when}": getattr(layer, key) for when, layer in (("before", old), ("after", new))
               for key in ("width", "parameters", "macs")}
            | {"channels_off_for_all": off.get(old.name), "channels_constant_folded": folded.get(old.name)}
            for old, new in zip(conv_layers(before.config, size), conv_layers(after.config, size))]


def format_table(reports: dict[str, dict]) -> str:
    """The reports of one or more networks, by name, as Markdown: a column a network."""
    titles = dict.fromkeys(title for report in reports.values() for title in report["column"])
    lines = [["", *(name.replace("|", "\\|") for name in reports)], ["---"] * (1 + len(reports))]
    lines += [[title, *(report["column"].get(title, "") for report in reports.values())] for title in titles]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _column(report: dict) -> dict[str, str]:
    """What the table says of a network, by the title of the row: the report's "column"."""
    size = f"{report['size_of_macs_and_latency']}²"

    def change(key: str, unit: float, form: str, values: dict = report) -> str:
        before, after = (values[f"{key}_{when}"] for when in ("before", "after"))
        return f"{before / unit:{form}} to {after / unit:{form}} ({(after - before) / before:+.1%})"

    column = {
        "off for all pictures": f"{report['channels_zero_for_all']} of {report['channels_before']}",
        "off for some": str(report["channels_zero_for_some"]),
        "bottleneck channels": change("channels", 1, ".0f"),
        "parameters": change("parameters", 1, ",.0f"),
        f"multiply-adds at {size}, 10⁹": change("macs", 1e9, ".4g"),
        "model file, MiB": change("file_bytes", 2**20, ".2f"),
        f"a pair at {size}, ms": change("latency_ms", 1, ".1f"),
    }
    if report["prune_layers"] == "all":
        column |= {f"channels of {layer['name']}": change("width", 1, ".0f", layer) for layer in report["layers"]}
        for title, key in (("off", "off_for_all"), ("constant and folded away", "constant_folded")):
            column[f"{title}, in all layers"] = str(sum(row[f"channels_{key}"] or 0 for row in report["layers"]))
    for each in report["changes"]:
        title = f"largest change at imsize {each['imsize']}, strength {each['style_strength']:g}, of 255"
        column[title] = f"{each['max_pixel_difference']:.4f}"
    column |= {METRICS[metric]: show_summary(summary) for metric, summary in report.get("metrics", {}).items()}
    column["pictures measured"] = f"{report['content_pictures']} + {report['style_pictures']}"
    column["pairs set aside"] = str(report["compared_pairs"])
    column["times"] = f"medians of {report['latency_runs']}, {report['device']}, torch {report['torch']}"
    return column


def write_comparison(reports: dict[str, dict], responses: dict[str, Responses], meter: Meter, config,
                     folder: Path) -> None:
    """Write l0_maps.png, l2_curves.png, curves.png, curves.json, report.json and table.md of several networks, by name,
    into the folder. All were measured with the same pictures, and have the same pairs set aside."""
    plot_l0_maps(responses, folder / "l0_maps.png")
    plot_l2_curves(responses, folder / "l2_curves.png")
    plot_curves(reports, folder / "curves.png")
    about = {"interval": INTERVAL, "pairs": next(iter(responses.values())).pairs, "imsize": config.imsize,
             "cropsize": config.cropsize, "style_strength": config.style_strength, "vgg_weights": meter.vgg_origin}
    table, curves = format_table(reports), {name: report["curve"] for name, report in reports.items()}
    for name, content in (("curves", about | {"networks": curves}),
                          ("report", about | {"table": table.splitlines(), "networks": reports})):
        write_text_atomically(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text_atomically(folder / "table.md", table + "\n")

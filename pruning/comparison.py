"""Several networks beside each other: their maps, their losses while channels are cut, and a table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import normalize
from network import StyleTransferNetwork, adain, channel_statistics
from painting.quality import INTERVAL, METRICS, Measurement, Meter
from pruning.plots import plot_curves, plot_l0_maps
from pruning.report import load_pair
from pruning.responses import Responses
from utils import progress_bar, write_text_atomically

MEASURED = ("content", "style", "flat")  # of METRICS
CURVE_NUMBERS = tuple(range(0, 501, 50))  # of channels that are cut


@dataclass(frozen=True)
class Pruned:
    """A network and what its pruning gave: the cut network and the report of the cut."""

    name: str
    network: StyleTransferNetwork
    cut: StyleTransferNetwork
    responses: Responses
    report: dict


def compare_networks(pruned: Sequence[Pruned], meter: Meter, config, folder: Path) -> str:
    """Write l0_maps.png, curves.png, curves.json, report.json and table.md into the folder. Returns the table.

    All networks were measured with the same pictures, and have the same pairs set aside. config: a PruneConfig.
    """
    numbers = sorted(set(config.prune_nums or CURVE_NUMBERS))
    curves, losses = measure_losses(pruned, numbers, meter, config)
    titles = {metric: METRICS[metric] for metric in meter.metrics}
    plot_l0_maps({each.name: each.responses for each in pruned}, folder / "l0_maps.png")
    plot_curves(curves, {each.name: len(each.responses.off_for_all) for each in pruned}, titles, folder / "curves.png")
    about = {"interval": INTERVAL, "pairs": pruned[0].responses.pairs, "imsize": config.imsize,
             "cropsize": config.cropsize, "style_strength": config.style_strength, "vgg_weights": meter.vgg_origin}
    table = format_table(pruned, losses, titles)
    for name, content in (("curves.json", about | {"networks": curves}),
                          ("report.json", about | {"table": table.splitlines(), "networks": {
                              each.name: each.report | {"metrics": losses[each.name]} for each in pruned}})):
        write_text_atomically(folder / name, json.dumps(content, indent=1) + "\n")
    write_text_atomically(folder / "table.md", table + "\n")
    return table


@torch.inference_mode()
def measure_losses(
    pruned: Sequence[Pruned], numbers: Sequence[int], meter: Meter, config
) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Every metric of every network over the pairs that were set aside: for each number of its weakest channels cut, a
    dictionary with this number as "cut" and each metric's mean and interval; and for the network as it was cut, the
    metrics alone. Both by the network's name.

    A network without so many channels has no such number.
    """
    pairs, device = pruned[0].responses.pairs, meter.device
    variants = [(each, number) for each in pruned for number in (*numbers, None)
                if number is None or number < each.network.config.bottleneck_width]
    values = []
    with progress_bar(len(pairs), "measure losses", "pair") as bar:
        for pair in pairs:
            pictures = load_pair(pair, config, device)
            content, style = map(normalize, pictures)
            outputs = []
            for each in pruned:
                own = [number for other, number in variants if other is each and number is not None]
                outputs += [*paint_with_cuts(each, content, style, own, config.style_strength),
                            each.cut(content, style, config.style_strength)]
            measured = meter.open_content(pictures[0]), meter.open_style(pictures[1])
            values.append(meter.measure(*measured, outputs))
            bar.update()
    paths = [sorted({pair[kind] for pair in pairs}) for kind in range(2)]
    measurement = Measurement(torch.stack(values).numpy(), [tuple(map(list.index, paths, pair)) for pair in pairs],
                              [each.name for each, _ in variants], meter.metrics)
    curves, losses = {each.name: [] for each in pruned}, {}
    for place, (each, number) in enumerate(variants):
        if number is None:
            losses[each.name] = measurement.summary(place)
        else:
            curves[each.name].append({"cut": number} | measurement.summary(place))
    return curves, losses


def paint_with_cuts(
    pruned: Pruned, content: Tensor, style: Tensor, numbers: Sequence[int], strength: float
) -> list[Tensor]:
    """The network's pictures without its n weakest channels, for each n, in rising order.

    content, style: (1, 3, H, W), ImageNet-normalised. AdaIN treats channels one by one, so that the features of the
    others stay as they are, and a channel that is zero feeds the decoder nothing.
    """
    network = pruned.network
    aligned = adain(network.encode(content), *channel_statistics(network.encode(style)), strength)
    height, width = content.shape[2:]
    outputs = []
    for number in numbers:
        aligned[:, pruned.responses.weakest_first[:number]] = 0
        outputs.append(network.decoder(aligned)[:, :, :height, :width])
    return outputs


# -------------------------------------------------------------------------------------------------- table


def show_summary(summary: dict) -> str:
    """A metric's mean, and half of its interval where it has one."""
    half = "" if summary["interval"] is None else f" ± {summary['interval'][1] - summary['mean']:.2g}"
    return f"{summary['mean']:.4g}{half}"


def format_table(pruned: Sequence[Pruned], losses: dict[str, dict], titles: dict[str, str]) -> str:
    """A row a network, as Markdown. losses: of the networks as they were cut; titles: of the metrics."""
    size = pruned[0].report["size_of_macs_and_latency"]
    header = ["network", "off for all pictures", "off for some", "parameters", f"multiply-adds at {size} x {size}, 10⁹",
              "a pair, ms", *titles.values(), "largest change by the cut, of 255"]
    rows = [header, ["---"] * len(header)]
    for each in pruned:
        report = each.report
        changes = [format(report[f"{key}_before"] / unit, form) + " to " + format(report[f"{key}_after"] / unit, form)
                   for key, unit, form in (("parameters", 1, ",.0f"), ("macs", 1e9, ".1f"), ("latency_ms", 1, ".0f"))]
        rows.append([each.name, f"{report['channels_zero_for_all']} of {report['channels_before']}",
                     str(report["channels_zero_for_some"]), *changes,
                     *(show_summary(losses[each.name][metric]) for metric in titles),
                     f"{report['max_pixel_difference']:.3g}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

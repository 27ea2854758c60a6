"""What a cut changed: sizes, multiply-adds, latency, and the pictures of pairs that had no part in the choice."""

import io
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data import denormalize, normalize, to_pil
from network import StyleTransferNetwork, bottleneck_conv, conv_layers, count_macs, count_parameters
from painting.stylizer import Stylizer, load_input
from pruning.plots import plot_panels
from pruning.responses import FOLDERS, Responses
from pruning.selection import Selection
from pruning.surgery import cut_bottleneck
from utils import describe_device, time_in_turns
from weights import model_checkpoint

STRENGTHS = (1.0, 0.5)  # that changes are measured at, beside the one that is asked for


def load_pair(pair: tuple[str, str], config, device: torch.device) -> list[Tensor]:
    """The content and the style picture at these paths, (1, 3, H, W) each, uint8."""
    return [load_input(Path(path), config, name).to(device) for path, name in zip(pair, FOLDERS)]


@torch.inference_mode()
def largest_change(
    before: StyleTransferNetwork, after: StyleTransferNetwork, content: Tensor, style: Tensor, strength: float
) -> float:
    """Largest difference of any colour value, 0..255, between the pictures of two networks, not rounded.

    content, style: (1, 3, H, W), uint8.
    """
    content, style = normalize(content), normalize(style)
    first, second = (denormalize(network(content, style, strength)) for network in (before, after))
    return (first - second).abs().max().item() * 255.0


def measure_changes(
    before: StyleTransferNetwork, after: StyleTransferNetwork, pairs: list[tuple[str, str]], config
) -> list[dict]:
    """The largest change of a colour value over the pairs, as large as the measured pictures and half as large, for
    each strength; empty without pairs. config: a PruneConfig."""
    device = next(before.parameters()).device
    halves = {name: max(1, side // 2) for name in ("imsize", "cropsize") if (side := getattr(config, name)) is not None}
    strengths = sorted({*STRENGTHS, config.style_strength}, reverse=True)
    changes = []
    for sized in dict.fromkeys((config, replace(config, **halves))) if pairs else ():
        loaded = [load_pair(pair, sized, device) for pair in pairs]
        changes += [{"imsize": sized.imsize, "cropsize": sized.cropsize, "style_strength": strength,
                     "max_pixel_difference": max(largest_change(before, after, *pair, strength) for pair in loaded)}
                    for strength in strengths]
    return changes


@torch.inference_mode()
def time_pairs(networks: list[StyleTransferNetwork], size: int, runs: int) -> list[list[float]]:
    """Seconds of stylising one random pair of `size` x `size` pictures, `runs` times, for each network in turns."""
    device = next(networks[0].parameters()).device
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, size, size, generator=generator).to(device) for _ in range(2))
    return time_in_turns([lambda network=network: network(content, style) for network in networks], runs, device)


def paint_grid(network: StyleTransferNetwork, responses: Responses, numbers: list[int], config, path: Path) -> None:
    """Content, style, and the output after cutting the n weakest channels, for each n. config: a PruneConfig."""
    content, style = (load_input(Path(getattr(config, name)), config, name) for name in ("content", "style"))
    panels = [("Content", to_pil(content.float() / 255.0)), ("Style", to_pil(style.float() / 255.0))]
    for number in numbers:
        stylizer = Stylizer(cut_bottleneck(network, responses.weakest_first[:number]))
        panels.append((f"Prune {number} channels",
                       stylizer.stylize(content, style, strength=config.style_strength)))
    plot_panels(panels, path)


def build_report(
    before: StyleTransferNetwork, after: StyleTransferNetwork, selection: Selection, responses: Responses, config,
    model_file: Path,
) -> dict:
    """What the cut changed, as plain values for `report.json`. config: a PruneConfig."""
    size, networks = config.report_size, {"before": before, "after": after}
    layers = {when: conv_layers(network.config, size) for when, network in networks.items()}
    times = time_pairs([before, after], size, config.latency_runs)
    dtypes = {"before": torch.float32, "after": torch.float16 if config.half else torch.float32}
    changes = measure_changes(before, after, responses.pairs, config)
    report = {"load_path": str(model_file)}
    for (when, network), taken in zip(networks.items(), times):
        report |= {
            f"channels_{when}": network.config.bottleneck_width,
            f"parameters_{when}": count_parameters(network),
            f"macs_{when}": count_macs(network.config, size),
            f"file_bytes_{when}": _serialized_bytes(network, dtypes[when]),
            f"latency_ms_{when}": statistics.median(taken) * 1000.0,
        }
    return report | {
        "max_pixel_difference": max((change["max_pixel_difference"] for change in changes), default=None),
        "changes": changes,
        "compared_pairs": len(responses.pairs),
        "pairs_set_aside": responses.pairs,
        "channels_zero_for_all": len(responses.off_for_all),
        "channels_zero_for_some": len(responses.off_for_some),
        "content_pictures": responses.contents,
        "style_pictures": len(responses.paths) - responses.contents,
        "imsize": config.imsize,
        "cropsize": config.cropsize,
        "size_of_macs_and_latency": size,
        "latency_runs": config.latency_runs,
        "device": describe_device(next(before.parameters()).device),
        "torch": torch.__version__,
        "cut_channels": sorted(selection.cuts[bottleneck_conv(before.config)]),
        "prune_layers": "all" if config.every_layer else "bottleneck",
        "prune_macs": config.prune_macs,
        "prune_rank": config.prune_rank,
        "round_to": config.round_to,
        "layers": [  # a row a conv, in forward order; None where channels were not measured
            {"name": old.name, "kind": old.kind}
            | {f"{key}_{when}": getattr(layer, key) for when, layer in (("before", old), ("after", new))
               for key in ("width", "parameters", "macs")}
            | {"channels_off_for_all": selection.off.get(old.name),
               "channels_constant_folded": selection.folded.get(old.name)}
            for old, new in zip(layers["before"], layers["after"])
        ],
    }


def _serialized_bytes(network: StyleTransferNetwork, dtype: torch.dtype) -> int:
    """Size of the network's model file, without a training run's optimiser state."""
    buffer = io.BytesIO()
    torch.save(model_checkpoint(network, dtype), buffer)
    return buffer.tell()


def format_report(report: dict) -> str:
    """The report as a table for the terminal, with the width of every conv where all were open to cuts."""
    size = report["size_of_macs_and_latency"]
    lines = [f"{'':34}{'before':>12}{'after':>12}{'change':>9}"]

    def compare(title: str, key: str, unit: float, form: str, values: dict = report) -> None:
        before, after = (values[f"{key}_{when}"] for when in ("before", "after"))
        shown = "".join(f"{format(value / unit if unit > 1 else value, form):>12}" for value in (before, after))
        lines.append(f"{title:34}{shown}{(after - before) / before:>+9.1%}")

    compare("bottleneck channels", "channels", 1, "d")
    compare("parameters", "parameters", 1, ",d")
    compare(f"multiply-adds at {size} x {size}, 10^9", "macs", 1e9, ".2f")
    compare("model file, MiB", "file_bytes", 2**20, ".2f")
    compare(f"latency at {size} x {size}, ms", "latency_ms", 1, ".1f")
    if report["prune_layers"] == "all":
        for layer in report["layers"]:
            compare(f"channels of {layer['name']}", "width", 1, "d", layer)
        off, folded = (sum(layer[f"channels_{key}"] or 0 for layer in report["layers"])
                       for key in ("off_for_all", "constant_folded"))
        lines.append(f"in all layers: {off} channels off for everything measured, {folded} constant ones folded away")
    for change in report["changes"]:
        lines.append(f"largest change of a colour value in {report['compared_pairs']} pairs set aside, imsize "
                     f"{change['imsize']}, strength {change['style_strength']:g}: "
                     f"{change['max_pixel_difference']:.4f} of 255")
    lines.append(f"off for every one of {report['content_pictures']} + {report['style_pictures']} pictures: "
                 f"{report['channels_zero_for_all']} channels; for at least one: {report['channels_zero_for_some']}")
    lines.append(f"latency: median of {report['latency_runs']}, {report['device']}, torch {report['torch']}")
    return "\n".join(lines)

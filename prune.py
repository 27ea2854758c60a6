"""`--mode prune`: measure the channels, cut the inactive or least important ones out, report what that changes."""

import io
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import MAX_PIXELS, denormalize, normalize
from network import StyleTransferNetwork, bottleneck_conv, conv_layers, count_macs, count_parameters
from painting.stylizer import DEMO_CONTENT, DEMO_STYLE, load_input, open_model
from pruning.plots import plot_l0_map, plot_l2_curve, plot_prune_grid, plot_widths
from pruning.responses import Responses, find_folders, measure_responses
from pruning.selection import Selection, most_macs, rounded_width, select_by_magnitude, select_channels
from pruning.surgery import cut_bottleneck, cut_channels
from settings import count, count_or_zero, positive_fraction, setting
from utils import (
    UserError,
    allow_tf32,
    describe_device,
    make_folder,
    note,
    resolve_device,
    save_checkpoint,
    time_in_turns,
    write_text_atomically,
)
from weights import PRUNED_NAME, find_model_file, model_checkpoint

COMPARED_PAIRS = 8  # measured pairs that are stylised before and after the cut
PRUNED_LAYERS = ("bottleneck", "all")
PRUNE_RANKS = ("importance", "magnitude")
PUBLISHED_NUMS = (0, 100, 200, 300, 400, 470, 490, 500)


@dataclass(frozen=True)
class PruneConfig:
    """Every setting of prune mode, with its default. Sizes are those of the publication."""

    load_path: str | None = setting(needed=True)
    save_path: str | None = setting(needed=True)
    content_dir: str | None = setting(needed=True)
    style_dir: str | None = setting(needed=True)
    content: str = setting(str(DEMO_CONTENT), more="for the picture grid")
    style: str = setting(str(DEMO_STYLE), more="for the picture grid")
    backbone: str | None = None
    vgg_weights: str | None = setting(more="nothing else needs it")
    swap_max_pool: bool = False
    style_strength: float = 1.0
    imsize: int = 512
    cropsize: int = setting(512, more="cut from the centre")
    max_pixels: int = MAX_PIXELS
    holdout: float = setting(0.0, more="only those are taken, or with 0 all")
    prune_images: int = setting(1000, "number of pictures from each folder to measure the channels with", "pruning",
                                count)
    prune_layers: str = setting("bottleneck", "cut channels of the bottleneck alone, or of every layer", "pruning",
                                choices=PRUNED_LAYERS)
    prune_macs: float | None = setting(
        None, "cut the least important channels of every layer until this fraction of the multiply-adds is left",
        "pruning", positive_fraction, none="cut only what is off or constant")
    prune_rank: str = setting(
        "importance", "what --prune_macs cuts first: by importance, the channels that change the picture least for the "
        "multiply-adds saved; by magnitude, for comparison, those of the smallest weights, an equal share of every "
        "layer", "pruning", choices=PRUNE_RANKS)
    round_to: int = setting(
        1, "leave each layer a multiple of this many channels, or as many as before where that is less", "pruning",
        count)
    prune_num: int | None = setting(
        None, "cut this many channels of the bottleneck, the weakest first", "pruning", count_or_zero,
        none="all that are zero for every measured picture")
    prune_channels: tuple[int, ...] | None = setting(
        None, "cut the bottleneck channels with these numbers, counted from 0", "pruning", int, none="see --prune_num")
    prune_nums: tuple[int, ...] = setting(
        PUBLISHED_NUMS, "how many channels are cut in each picture of the picture grid", "pruning", count_or_zero)
    responses: str | None = setting(
        None, "responses.npz of an earlier pruning of the same model, to spare measuring again", "pruning")
    half: bool = setting(False, "save the weights in half precision, in half the space", "pruning")
    latency_runs: int = setting(9, "timed runs that each median latency is taken from", "pruning", count)
    report_size: int = setting(
        512, "side in pixels of the pictures that the report's multiply-adds and latencies are for", "pruning", count)
    gpu_no: int | None = None

    @property
    def every_layer(self) -> bool:
        return self.prune_layers == "all" or self.prune_macs is not None

    def check(self) -> None:
        """Raises UserError for what is missing or contradicts itself."""
        if self.report_size < 16 or self.report_size % 8:
            raise UserError(f"--report_size {self.report_size}: a multiple of 8, 16 or more, is needed")
        for flag in ("load_path", "save_path", "content_dir", "style_dir"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is needed in prune mode")
        if self.prune_num is not None and self.prune_channels is not None:
            raise UserError("--prune_num and --prune_channels: give one of the two")
        for flag in ("prune_num", "prune_channels"):
            if self.every_layer and getattr(self, flag) is not None:
                other = "--prune_layers all" if self.prune_macs is None else f"--prune_macs {self.prune_macs}"
                raise UserError(f"--{flag} and {other}: give one of the two, --{flag} is of the bottleneck alone")
        if self.prune_rank == "magnitude" and self.prune_macs is None:
            raise UserError("--prune_rank magnitude: how much is to be left, --prune_macs says")


# ------------------------------------------------------------------------------------------------ choice


def choose_channels(config: PruneConfig, responses: Responses) -> list[int]:
    """The bottleneck channels to cut: those named, the N weakest, or those zero for every picture.

    Without the strongest of them where the width that is left is to be a multiple of `round_to`.
    Raises UserError with the numbers when they cannot be cut.
    """
    width = responses.l2.shape[1]
    if config.prune_channels is not None:
        channels = list(config.prune_channels)
    elif config.prune_num is not None:
        if config.prune_num >= width:
            raise UserError(f"--prune_num {config.prune_num}: the network has {width} bottleneck channels, "
                            f"at most {width - 1} can be cut")
        channels = responses.weakest_first[: config.prune_num].tolist()
    else:
        channels = responses.always_zero.tolist()
        if len(channels) == width:
            raise UserError(f"all {width} bottleneck channels are zero for every measured picture: nothing would be "
                            "left; train with a smaller --channel_loss_weight or --l0_eps")
    cut = width - rounded_width(width - len(channels), width, config.round_to)
    going = [channel for channel in responses.weakest_first if channel in channels][:cut]
    return [channel for channel in channels if channel in going]


def _select(network: StyleTransferNetwork, responses: Responses, config: PruneConfig, macs: float | None) -> Selection:
    """What to cut: of every layer, `macs` multiply-adds at most where given, or of the bottleneck alone."""
    layers = conv_layers(network.config, config.report_size)
    if config.prune_rank == "magnitude":
        weights = {layer.name: network.get_submodule(layer.name).weight.detach() for layer in layers}
        magnitudes = {name: weight.abs().sum(dim=(1, 2, 3)).cpu().numpy() for name, weight in weights.items()}
        return select_by_magnitude(layers, magnitudes, responses.layers, macs, config.round_to)
    if config.every_layer:
        return select_channels(layers, responses.layers, macs, config.round_to, network.config.padding)
    bottleneck = bottleneck_conv(network.config)
    channels = choose_channels(config, responses)
    return Selection({bottleneck: channels}, {}, {bottleneck: len(responses.always_zero)}, {bottleneck: 0})


def grid_numbers(config: PruneConfig, width: int) -> list[int]:
    """The numbers of cut channels to show: those of the published ones that the network has, or others as they are.
    Raises UserError for one of those that cannot be cut."""
    too_large = [number for number in config.prune_nums if number >= width]
    if too_large and config.prune_nums != PUBLISHED_NUMS:
        raise UserError(f"--prune_nums {too_large[0]}: the network has {width} bottleneck channels, "
                        f"at most {width - 1} can be cut")
    return [number for number in config.prune_nums if number < width]


# ------------------------------------------------------------------------------------------------ report


def _serialized_bytes(network: StyleTransferNetwork, dtype: torch.dtype = torch.float32) -> int:
    """Size of the network's model file, without a training run's optimiser state."""
    buffer = io.BytesIO()
    torch.save(model_checkpoint(network, dtype), buffer)
    return buffer.tell()


@torch.inference_mode()
def largest_pixel_difference(
    before: StyleTransferNetwork, after: StyleTransferNetwork, pairs: list[tuple[torch.Tensor, torch.Tensor]],
    strength: float,
) -> float:
    """Largest difference of any colour value, 0..255, over the pairs' outputs; uint8 pictures, not rounded."""
    device = next(before.parameters()).device
    largest = 0.0
    for content, style in pairs:
        content, style = normalize(content.to(device)), normalize(style.to(device))
        outputs = [denormalize(network(content, style, strength)) for network in (before, after)]
        largest = max(largest, (outputs[0] - outputs[1]).abs().max().item() * 255.0)
    return largest


def _compared_pairs(responses: Responses, config: PruneConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Measured pictures, content with style, evenly spread over both folders. Raises UserError for one that cannot be
    read: kept responses may be of pictures that moved since."""
    contents, styles = responses.paths[: responses.contents], responses.paths[responses.contents :]
    pairs = []
    for number in range(min(COMPARED_PAIRS, max(len(contents), len(styles)))):
        picked = [paths[number * len(paths) // COMPARED_PAIRS] for paths in (contents, styles)]
        pairs.append(tuple(load_input(Path(path), config, "responses") for path in picked))
    return pairs


def _layer_rows(
    before: StyleTransferNetwork, after: StyleTransferNetwork, selection: Selection, size: int
) -> list[dict]:
    """A row a conv, in forward order; the numbers of channels are None where that was not measured."""
    return [
        {
            "name": old.name,
            "kind": old.kind,
            "width_before": old.width,
            "width_after": new.width,
            "parameters_before": old.parameters,
            "parameters_after": new.parameters,
            "macs_before": old.macs,
            "macs_after": new.macs,
            "channels_off_for_all": selection.off.get(old.name),
            "channels_constant_folded": selection.folded.get(old.name),
        }
        for old, new in zip(conv_layers(before.config, size), conv_layers(after.config, size))
    ]


@torch.inference_mode()
def time_pairs(networks: list[StyleTransferNetwork], size: int, runs: int) -> list[list[float]]:
    """Seconds of stylising one random pair of `size` x `size` pictures, `runs` times, for each network in turns."""
    device = next(networks[0].parameters()).device
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, size, size, generator=generator).to(device) for _ in range(2))
    return time_in_turns([lambda network=network: network(content, style) for network in networks], runs, device)


def build_report(
    before: StyleTransferNetwork, after: StyleTransferNetwork, selection: Selection, responses: Responses,
    pairs: list, config: PruneConfig, model_file: Path,
) -> dict:
    """What the cut changed, as plain values for `report.json`."""
    times = time_pairs([before, after], config.report_size, config.latency_runs)
    latency = [statistics.median(taken) * 1000.0 for taken in times]
    device = next(before.parameters()).device
    return {
        "load_path": str(model_file),
        "channels_before": before.config.bottleneck_width,
        "channels_after": after.config.bottleneck_width,
        "parameters_before": count_parameters(before),
        "parameters_after": count_parameters(after),
        "macs_before": count_macs(before.config, config.report_size),
        "macs_after": count_macs(after.config, config.report_size),
        "file_bytes_before": _serialized_bytes(before),
        "file_bytes_after": _serialized_bytes(after, torch.float16 if config.half else torch.float32),
        "latency_ms_before": latency[0],
        "latency_ms_after": latency[1],
        "max_pixel_difference": largest_pixel_difference(before, after, pairs, config.style_strength),
        "compared_pairs": len(pairs),
        "channels_zero_for_all": len(responses.always_zero),
        "channels_zero_for_some": len(responses.ever_zero),
        "content_pictures": responses.contents,
        "style_pictures": len(responses.paths) - responses.contents,
        "imsize": config.imsize,
        "cropsize": config.cropsize,
        "size_of_macs_and_latency": config.report_size,
        "latency_runs": config.latency_runs,
        "device": describe_device(device),
        "torch": torch.__version__,
        "cut_channels": sorted(selection.cuts[bottleneck_conv(before.config)]),
        "prune_layers": "all" if config.every_layer else "bottleneck",
        "prune_macs": config.prune_macs,
        "prune_rank": config.prune_rank,
        "round_to": config.round_to,
        "layers": _layer_rows(before, after, selection, config.report_size),
    }


def format_report(report: dict) -> str:
    """The report as a table for the terminal, with the width of every conv where all were open to cuts."""
    size = report["size_of_macs_and_latency"]
    rows = (
        ("bottleneck channels", "channels", 1, "d"),
        ("parameters", "parameters", 1, ",d"),
        (f"multiply-adds at {size} x {size}, 10^9", "macs", 1e9, ".2f"),
        ("model file, MiB", "file_bytes", 2**20, ".2f"),
        (f"latency at {size} x {size}, ms", "latency_ms", 1, ".1f"),
    )
    lines = [f"{'':34}{'before':>12}{'after':>12}{'change':>9}"]
    for title, key, unit, form in rows:
        before, after = report[f"{key}_before"], report[f"{key}_after"]
        shown = [format(value if unit == 1 else value / unit, form) for value in (before, after)]
        lines.append(f"{title:34}{shown[0]:>12}{shown[1]:>12}{(after - before) / before:>+9.1%}")
    if report["prune_layers"] == "all":
        for layer in report["layers"]:
            before, after = layer["width_before"], layer["width_after"]
            title = f"channels of {layer['name']}"
            lines.append(f"{title:34}{before:>12}{after:>12}{(after - before) / before:>+9.1%}")
        off, folded = (sum(layer[f"channels_{key}"] or 0 for layer in report["layers"])
                       for key in ("off_for_all", "constant_folded"))
        lines.append(f"in all layers: {off} channels off for everything measured, {folded} constant ones folded away")
    lines.append(f"largest pixel difference over {report['compared_pairs']} pairs: "
                 f"{report['max_pixel_difference']:.4f} of 255")
    lines.append(f"zero for every one of {report['content_pictures']} + {report['style_pictures']} pictures: "
                 f"{report['channels_zero_for_all']} channels; for at least one: {report['channels_zero_for_some']}")
    lines.append(f"latency: median of {report['latency_runs']}, {report['device']}, torch {report['torch']}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- mode


def prune(given: dict) -> int:
    """Run `--mode prune` with the flags given on the command line. Returns the exit code."""
    config = PruneConfig(**given)
    config.check()
    device = resolve_device(config.gpu_no)
    allow_tf32(False)
    model_file = find_model_file(Path(config.load_path))
    network, checkpoint = open_model(str(model_file), config.swap_max_pool, config.backbone, config.vgg_weights)
    network = network.to(device, memory_format=torch.channels_last)
    width = network.config.bottleneck_width
    # All that can be refused is refused before the long measurement.
    numbers = grid_numbers(config, width)
    choose_channels(config, Responses(np.ones((1, width), np.float32), [], 0))
    layers = conv_layers(network.config, config.report_size)
    macs = None if config.prune_macs is None else most_macs(layers, config.prune_macs, config.round_to)
    if config.prune_channels is not None:
        cut_bottleneck(network, config.prune_channels)
    for flag in ("content", "style"):
        load_input(Path(getattr(config, flag)), config, flag)
    folders = None if config.responses else find_folders(config)
    if config.responses:
        responses = Responses.load(config.responses, width)
        if config.every_layer:
            responses.check_layers(config.responses, layers[:-1])
        pairs = _compared_pairs(responses, config)
    folder = make_folder(config.save_path, "--save_path")
    if (folder / PRUNED_NAME).exists() and (folder / PRUNED_NAME).samefile(model_file):
        raise UserError(f"--save_path {folder}: would overwrite the model that --load_path names; choose another")

    if not config.responses:
        responses = measure_responses(network, config, folders)
        pairs = _compared_pairs(responses, config)
    responses.save(folder / "responses.npz")
    selection = _select(network, responses, config, macs)
    if not any(selection.cuts.values()):
        note("no channel is zero for every picture, so none is cut; --prune_num N cuts the N weakest, "
             "--prune_macs F the least important of all layers")
    pruned = cut_channels(network, selection.cuts, selection.constants)
    dtype = torch.float16 if config.half else torch.float32
    for parameter in pruned.parameters():  # the report is of the weights as they are written
        parameter.data = parameter.data.to(dtype).float()
    plot_l0_map(responses, folder / "l0_map.png")
    plot_l2_curve(responses, folder / "l2_curve.png")
    plot_prune_grid(network, responses, numbers, config, folder / "prune_grid.png")
    report = build_report(network, pruned, selection, responses, pairs, config, model_file)
    write_text_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
    if config.every_layer:
        plot_widths(report["layers"], config.report_size, folder / "widths.png")
    save_checkpoint(
        model_checkpoint(
            pruned,
            dtype=dtype,
            iteration=checkpoint.get("iteration"),
            vgg_weights=checkpoint.get("vgg_weights"),
            train_config=checkpoint.get("train_config"),
            pruned_channels=sorted(selection.cuts[bottleneck_conv(network.config)]),
            **({"pruned_layers": selection.cuts} if config.every_layer else {}),
        ),
        folder / PRUNED_NAME,
    )
    print(format_report(report))
    figures = "l0_map.png, l2_curve.png and prune_grid.png"
    if config.every_layer:
        figures = f"widths.png, {figures}"
    note(f"wrote {PRUNED_NAME}, report.json, responses.npz, {figures} to {folder}")
    return 0

"""`--mode prune`: measure the bottleneck channels, cut the inactive ones out, report what that changes."""

import io
import json
import random
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data import (
    MAX_PIXELS,
    FailedPictures,
    PictureError,
    denormalize,
    find_measured,
    normalize,
    prepare_picture,
    to_pil,
)
from evaluate import DEMO_CONTENT, DEMO_STYLE, encode_style, load_input, open_model, stylize_picture
from loss import L0_EPS, channel_norm, l0_norm
from network import (
    StyleTransferNetwork,
    count_macs,
    count_parameters,
    find_model_file,
    model_checkpoint,
)
from utils import (
    UserError,
    describe_device,
    make_folder,
    note,
    progress_bar,
    resolve_device,
    save_checkpoint,
    time_in_turns,
    write_atomically,
    write_text_atomically,
)

PRUNED_NAME = "pruned.pth"
REPORT_SIZE = 512  # pixels: side of the pictures that multiply-adds and latency are given for
COMPARED_PAIRS = 8  # measured pairs that are stylised before and after the cut
LOADING_CHUNK = 16  # pictures decoded ahead


@dataclass(frozen=True)
class PruneConfig:
    """Every setting of prune mode, with its default. Sizes are those of the publication."""

    load_path: str | None = None
    save_path: str | None = None
    content_dir: str | None = None
    style_dir: str | None = None
    content: str = str(DEMO_CONTENT)
    style: str = str(DEMO_STYLE)
    backbone: str | None = None
    swap_max_pool: bool = False
    style_strength: float = 1.0
    imsize: int = 512
    cropsize: int = 512
    max_pixels: int = MAX_PIXELS
    holdout: float = 0.0
    prune_images: int = 1000
    prune_num: int | None = None
    prune_channels: tuple[int, ...] | None = None
    prune_nums: tuple[int, ...] = (0, 100, 200, 300, 400, 470, 490, 500)
    responses: str | None = None
    half: bool = False
    latency_runs: int = 9
    gpu_no: int | None = None

    def check(self) -> None:
        """Raises UserError for what is missing or contradicts itself."""
        for flag in ("load_path", "save_path", "content_dir", "style_dir"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is needed in prune mode")
        if self.prune_num is not None and self.prune_channels is not None:
            raise UserError("--prune_num and --prune_channels: give one of the two")


# ------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Responses:
    """l2 norms of the bottleneck channels: l2 (n, C), rows in the order of `paths`, content before style."""

    l2: np.ndarray
    paths: list[str]
    contents: int

    @property
    def always_zero(self) -> np.ndarray:
        """Indices of the channels that are zero for every picture."""
        return np.flatnonzero((self.l2 == 0).all(axis=0))

    @property
    def ever_zero(self) -> np.ndarray:
        """Indices of the channels that are zero for at least one picture."""
        return np.flatnonzero((self.l2 == 0).any(axis=0))

    @property
    def weakest_first(self) -> np.ndarray:
        """Channel indices by their l2 norm summed over all pictures, smallest first."""
        return np.argsort(self.l2.sum(axis=0, dtype=np.float64), kind="stable")

    def save(self, path: Path) -> None:
        arrays = {"l2": self.l2, "l0": l0_norm(torch.from_numpy(self.l2), L0_EPS).numpy(),
                  "paths": np.array(self.paths), "contents": np.array(self.contents)}
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: Path, width: int) -> "Responses":
        """Raises UserError when the file is none, or was measured on a network of another width."""
        try:
            with np.load(path, allow_pickle=False) as file:
                responses = cls(file["l2"], [str(each) for each in file["paths"]], int(file["contents"]))
        # NumPy passes on what the zip reader, zlib and the array parser met in a damaged file.
        except Exception as error:
            raise UserError(f"--responses {path}: not a responses.npz of this tool ({type(error).__name__}: "
                            f"{error})") from error
        if responses.l2.ndim != 2 or len(responses.l2) != len(responses.paths):
            raise UserError(f"--responses {path}: not a responses.npz of this tool (l2 has shape "
                            f"{responses.l2.shape} for {len(responses.paths)} pictures)")
        if responses.l2.shape[1] != width:
            raise UserError(f"--responses {path}: measured on {responses.l2.shape[1]} channels, "
                            f"the network has {width}")
        return responses


def _load_ahead(paths: list[Path], config: PruneConfig) -> Iterator[tuple[Path, torch.Tensor | PictureError]]:
    """Decode pictures in threads, a chunk ahead of their use."""

    def load(path: Path):
        try:
            return prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
        except PictureError as error:
            return error

    with ThreadPoolExecutor() as pool:
        chunks = [paths[start : start + LOADING_CHUNK] for start in range(0, len(paths), LOADING_CHUNK)]
        pending = [pool.submit(load, path) for path in chunks[0]]
        for chunk, following in zip(chunks, [*chunks[1:], []]):
            ready, pending = pending, [pool.submit(load, path) for path in following]
            yield from zip(chunk, (future.result() for future in ready))


@torch.inference_mode()
def measure_responses(network: StyleTransferNetwork, config: PruneConfig) -> Responses:
    """The l2 norm of every bottleneck channel for up to `prune_images` pictures of each folder.

    A picture that cannot be used is skipped with its path logged. Raises UserError when over 10% of a
    folder's chosen pictures, or all of them, fail.
    """
    device = next(network.parameters()).device
    rows, used = [], []
    counts = []
    for folder, flag in ((config.content_dir, "--content_dir"), (config.style_dir, "--style_dir")):
        paths = find_measured(folder, flag, config.holdout)
        if len(paths) > config.prune_images:
            paths = sorted(random.Random(0).sample(paths, config.prune_images))
        failed = FailedPictures(folder, flag, len(paths))
        with progress_bar(len(paths), f"measure {flag[2:]}", "picture") as bar:
            for path, picture in _load_ahead(paths, config):
                bar.update()
                if isinstance(picture, PictureError):
                    failed.add(path, str(picture))
                    continue
                rows.append(channel_norm(network.encoder(network.pad(normalize(picture.to(device)))))[0].cpu())
                used.append(str(path))
        counts.append(len(paths) - len(failed.paths))
        if not counts[-1]:
            raise UserError(f"{flag} {folder}: none of {len(paths)} pictures can be used")
        note(failed.summary())
    return Responses(torch.stack(rows).numpy(), used, counts[0])


# ----------------------------------------------------------------------------------------------- surgery


def cut_bottleneck(network: StyleTransferNetwork, channels: Iterable[int]) -> StyleTransferNetwork:
    """A new network without the given bottleneck channels; `network` stays as it is.

    channels: indices into the encoder's last conv. Its filters go, and the decoder's first conv loses
    the inputs they fed; AdaIN treats channels one by one, so the others are untouched.
    Raises UserError for an index that is not there, twice the same, or when no channel would be left.
    """
    width = network.config.bottleneck_width
    channels = [int(channel) for channel in channels]
    unknown = [channel for channel in channels if not 0 <= channel < width]
    if unknown:
        raise UserError(f"channel {unknown[0]}: the network has {width} bottleneck channels, 0 to {width - 1}")
    if len(set(channels)) != len(channels):
        raise UserError(f"channel {max(channels, key=channels.count)} is named more than once")
    if len(channels) >= width:
        raise UserError(f"{len(channels)} channels to cut: the network has {width}, at most {width - 1} can go")
    kept = torch.ones(width, dtype=torch.bool)
    kept[channels] = False
    kept = kept.nonzero().flatten()

    widths = (*network.config.encoder_widths[:-1], len(kept))
    cut = StyleTransferNetwork(replace(network.config, encoder_widths=widths))
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    last_encoder_conv = list(network.encoder.state_dict())[-2].removesuffix(".weight")
    first_decoder_conv = list(network.decoder.state_dict())[0].removesuffix(".weight")
    kept = kept.to(state[f"encoder.{last_encoder_conv}.weight"].device)
    for name in (f"encoder.{last_encoder_conv}.weight", f"encoder.{last_encoder_conv}.bias"):
        state[name] = state[name][kept]
    state[f"decoder.{first_decoder_conv}.weight"] = state[f"decoder.{first_decoder_conv}.weight"][:, kept]
    cut.load_state_dict(state)
    cut.train(network.training)
    return cut.to(kept.device, memory_format=torch.channels_last)


def choose_channels(config: PruneConfig, responses: Responses) -> list[int]:
    """The channels to cut: those named, the N weakest, or those zero for every picture.

    Raises UserError with the numbers when they cannot be cut.
    """
    width = responses.l2.shape[1]
    if config.prune_channels is not None:
        return list(config.prune_channels)
    if config.prune_num is not None:
        if config.prune_num >= width:
            raise UserError(f"--prune_num {config.prune_num}: the network has {width} bottleneck channels, "
                            f"at most {width - 1} can be cut")
        return responses.weakest_first[: config.prune_num].tolist()
    zero = responses.always_zero.tolist()
    if len(zero) == width:
        raise UserError(f"all {width} bottleneck channels are zero for every measured picture: nothing would be "
                        "left; train with a smaller --channel_loss_weight or --l0_eps")
    return zero


def grid_numbers(config: PruneConfig, width: int, is_given: bool) -> list[int]:
    """The numbers of cut channels to show. Raises UserError for a given one that cannot be cut."""
    too_large = [number for number in config.prune_nums if number >= width]
    if too_large and is_given:
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
def measure_latency(networks: list[StyleTransferNetwork], size: int, runs: int) -> list[float]:
    """Median milliseconds of stylising one random pair of `size` x `size` pictures, for each network."""
    device = next(networks[0].parameters()).device
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, size, size, generator=generator).to(device) for _ in range(2))
    times = time_in_turns([lambda network=network: network(content, style) for network in networks], runs, device)
    return [statistics.median(taken) * 1000.0 for taken in times]


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
        outputs = [denormalize(net.stylize(content, net.style_code(style), strength)) for net in (before, after)]
        largest = max(largest, (outputs[0] - outputs[1]).abs().max().item() * 255.0)
    return largest


def _compared_pairs(responses: Responses, config: PruneConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Measured pictures that can still be read, content with style, evenly spread over both folders."""
    contents, styles = responses.paths[: responses.contents], responses.paths[responses.contents :]
    pairs = []
    for number in range(min(COMPARED_PAIRS, max(len(contents), len(styles)))):
        picked = [paths[number * len(paths) // COMPARED_PAIRS] for paths in (contents, styles)]
        pairs.append(tuple(load_input(Path(path), config, "responses") for path in picked))
    return pairs


def build_report(
    before: StyleTransferNetwork, after: StyleTransferNetwork, channels: list[int], responses: Responses,
    pairs: list, config: PruneConfig, model_file: Path,
) -> dict:
    """What the cut changed, as plain values for `report.json`."""
    latency = measure_latency([before, after], REPORT_SIZE, config.latency_runs)
    device = next(before.parameters()).device
    return {
        "load_path": str(model_file),
        "channels_before": before.config.bottleneck_width,
        "channels_after": after.config.bottleneck_width,
        "parameters_before": count_parameters(before),
        "parameters_after": count_parameters(after),
        "macs_before": count_macs(before.config, REPORT_SIZE),
        "macs_after": count_macs(after.config, REPORT_SIZE),
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
        "size_of_macs_and_latency": REPORT_SIZE,
        "latency_runs": config.latency_runs,
        "device": describe_device(device),
        "torch": torch.__version__,
        "cut_channels": sorted(channels),
    }


def format_report(report: dict) -> str:
    """The report as a table for the terminal."""
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
    lines.append(f"largest pixel difference over {report['compared_pairs']} pairs: "
                 f"{report['max_pixel_difference']:.4f} of 255")
    lines.append(f"zero for every one of {report['content_pictures']} + {report['style_pictures']} pictures: "
                 f"{report['channels_zero_for_all']} channels; for at least one: {report['channels_zero_for_some']}")
    lines.append(f"latency: median of {report['latency_runs']}, {report['device']}, torch {report['torch']}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- plots


def new_figure(width: float, height: float):
    """A matplotlib figure without pyplot: no display, no state left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_l0_map(responses: Responses, path: Path) -> None:
    """Pictures down, channels across; white: the channel responds to the picture, black: it is zero."""
    is_on = responses.l2 > 0
    figure = new_figure(9, 5)
    axes = figure.subplots()
    axes.imshow(is_on, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    styles = len(is_on) - responses.contents
    axes.axhline(responses.contents - 0.5, color="tab:red", linewidth=1)
    axes.set_yticks([responses.contents / 2, responses.contents + styles / 2],
                    [f"content\n({responses.contents})", f"style\n({styles})"])
    axes.set_xlabel("bottleneck channel")
    axes.set_title(f"zero (black) for every picture: {len(responses.always_zero)} of {is_on.shape[1]} channels, "
                   f"for at least one: {len(responses.ever_zero)}")
    figure.savefig(path)


def plot_l2_curve(responses: Responses, path: Path) -> None:
    """Summed l2 norm of the channels, weakest first; the order in which they are cut."""
    order = responses.weakest_first
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for name, rows in (("content", responses.l2[: responses.contents]), ("style", responses.l2[responses.contents :])):
        axes.plot(np.arange(1, len(order) + 1), rows.sum(axis=0)[order], linewidth=0.8, alpha=0.7, label=name)
    axes.plot(np.arange(1, len(order) + 1), responses.l2.sum(axis=0)[order], color="black", linewidth=1.5,
              label="both")
    zero = len(responses.always_zero)
    if zero:
        axes.axvline(zero, color="tab:red", linestyle="--", linewidth=1, label=f"{zero} channels are zero throughout")
    axes.set_xlim(0, len(order))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bottleneck channels, weakest first")
    axes.set_ylabel(f"l2 norm summed over {len(responses.l2)} pictures")
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_prune_grid(
    network: StyleTransferNetwork, responses: Responses, numbers: list[int], config: PruneConfig, path: Path
) -> None:
    """Content, style, and the output after cutting the n weakest channels, for each n."""
    content, style = (load_input(Path(getattr(config, flag)), config, flag) for flag in ("content", "style"))
    panels = [("Content", to_pil(content.float() / 255.0)), ("Style", to_pil(style.float() / 255.0))]
    for number in numbers:
        cut = cut_bottleneck(network, responses.weakest_first[:number])
        output = stylize_picture(cut, content, encode_style(cut, style), config.style_strength)
        panels.append((f"Prune {number} channels", output))
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(2.6 * columns, 2.9 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (title, picture) in zip(figure.axes, panels):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
    figure.savefig(path)


# -------------------------------------------------------------------------------------------------- mode


def prune(given: dict) -> int:
    """Run `--mode prune` with the flags given on the command line. Returns the exit code."""
    config = PruneConfig(**given)
    config.check()
    device = resolve_device(config.gpu_no)
    model_file = find_model_file(Path(config.load_path))
    network, checkpoint = open_model(str(model_file), config.swap_max_pool, config.backbone)
    network = network.to(device, memory_format=torch.channels_last)
    width = network.config.bottleneck_width
    # All that can be refused is refused before the long measurement.
    numbers = grid_numbers(config, width, is_given="prune_nums" in given)
    choose_channels(config, Responses(np.ones((1, width), np.float32), [], 0))
    if config.prune_channels is not None:
        cut_bottleneck(network, config.prune_channels)
    for flag in ("content", "style"):
        load_input(Path(getattr(config, flag)), config, flag)
    folder = make_folder(config.save_path, "--save_path")
    if (folder / PRUNED_NAME).exists() and (folder / PRUNED_NAME).samefile(model_file):
        raise UserError(f"--save_path {folder}: would overwrite the model that --load_path names; choose another")

    responses = Responses.load(config.responses, width) if config.responses else measure_responses(network, config)
    responses.save(folder / "responses.npz")
    channels = choose_channels(config, responses)
    if not channels:
        note("no channel is zero for every picture, so none is cut; --prune_num N cuts the N weakest")
    pruned = cut_bottleneck(network, channels)
    dtype = torch.float16 if config.half else torch.float32
    for parameter in pruned.parameters():  # the report is of the weights as they are written
        parameter.data = parameter.data.to(dtype).float()
    save_checkpoint(
        model_checkpoint(
            pruned,
            dtype=dtype,
            iteration=checkpoint.get("iteration"),
            vgg_weights=checkpoint.get("vgg_weights"),
            train_config=checkpoint.get("train_config"),
            pruned_channels=sorted(channels),
        ),
        folder / PRUNED_NAME,
    )
    plot_l0_map(responses, folder / "l0_map.png")
    plot_l2_curve(responses, folder / "l2_curve.png")
    plot_prune_grid(network, responses, numbers, config, folder / "prune_grid.png")
    pairs = _compared_pairs(responses, config)
    report = build_report(network, pruned, channels, responses, pairs, config, model_file)
    write_text_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
    print(format_report(report))
    note(f"wrote {PRUNED_NAME}, report.json, responses.npz, l0_map.png, l2_curve.png and prune_grid.png to {folder}")
    return 0

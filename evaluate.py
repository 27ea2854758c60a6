"""`--mode test`: stylise pictures with one or more networks, full or pruned."""

import hashlib
import json
import math
import os
import platform
import random
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from cost import count_parameters
from data import (
    MAX_PIXELS,
    OUTPUT_FORMATS,
    denormalize,
    find_measured,
    save_picture,
    to_pil,
)
from figures import Sheet, comparison_sheet, contact_sheet
from network import StyleTransferNetwork
from quality import INTERVAL, LOSS_METRICS, METRICS, MIN_SIDE, Measurement, Meter
from stylize import DEMO_CONTENT, DEMO_STYLE, check_margin, encode_style, load_input, open_model, stylize
from utils import (
    UserError,
    describe_device,
    make_folder,
    note,
    progress_bar,
    resolve_device,
    usable_cores,
    write_text_atomically,
)
from weights import COMPACT_MODEL, find_model_file

OUTPUT_NAME = "stylised"  # in the working folder, where --save_path is not given: with .png for one picture


@dataclass(frozen=True)
class TestConfig:
    """Every setting of test mode, with its default."""

    __test__ = False  # not a pytest class

    load_path: tuple[str, ...] = (str(COMPACT_MODEL),)
    content: str = str(DEMO_CONTENT)
    style: str = str(DEMO_STYLE)
    save_path: str | None = None  # None: OUTPUT_NAME
    holdout: float = 0.0
    backbone: str | None = None
    swap_max_pool: bool = False
    style_strength: float = 1.0
    margin: int = 0
    upsampling: str | None = None  # None: as the file says
    imsize: int | None = None
    cropsize: int | None = None
    max_pixels: int = MAX_PIXELS
    pairs: int | None = None  # None: every content with every style
    metrics: tuple[str, ...] | None = None  # (): all
    vgg_weights: str = "imagenet"
    style_loss: str = "meanstd"
    seed: int = 0
    gpu_no: int | None = None

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics to measure, in the order of METRICS."""
        if self.metrics is None:
            return ()
        return tuple(metric for metric in METRICS if metric in self.metrics or not self.metrics)

    @property
    def names_a_folder(self) -> bool:
        """Whether content or style is a folder of pictures."""
        return Path(self.content).is_dir() or Path(self.style).is_dir()

    @property
    def is_single(self) -> bool:
        """Whether one picture comes out: one pair by one model."""
        return not self.names_a_folder and len(self.load_path) == 1

    @property
    def output(self) -> Path:
        """The picture file or folder to write."""
        if self.save_path is not None:
            return Path(self.save_path)
        return Path(f"{OUTPUT_NAME}.png" if self.is_single and not self.measured else OUTPUT_NAME)

    def check(self) -> None:
        """Raises UserError for an empty path, or a margin that poolings do not divide."""
        check_margin(self.margin)
        for flag in ("content", "style", "save_path"):
            if getattr(self, flag) == "":
                raise UserError(f"--{flag} is empty; leave it out for the default")


# ------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class _Model:
    """A network to test: its name in tables and folders, its file, and what else the file says."""

    name: str
    file: Path
    network: StyleTransferNetwork
    checkpoint: dict

    def describe(self) -> dict:
        """Plain values for `metrics.json`."""
        return {
            "name": self.name,
            "file": str(self.file),
            "sha256": hashlib.sha256(self.file.read_bytes()).hexdigest(),
            "backbone": self.network.config.backbone,
            "bottleneck_channels": self.network.config.bottleneck_width,
            "parameters": count_parameters(self.network),
            "iteration": self.checkpoint.get("iteration"),
            "vgg_weights_in_training": self.checkpoint.get("vgg_weights"),
        }


def model_names(paths: Iterable[str]) -> list[str]:
    """A name for each path of a model, unique without regard to case: the name of the file (without .pth) or
    folder, led by as many folders above it as tell it from the others; as the last resort, by its number."""
    parts = [os.path.abspath(path).removesuffix(".pth").split(os.sep)[1:] for path in paths]
    depths = [1] * len(parts)
    for _ in range(max(map(len, parts))):
        names = ["-".join(each[-depth:]) for each, depth in zip(parts, depths)]
        counts = Counter(name.casefold() for name in names)
        if len(counts) == len(names):
            return names
        depths = [depth + (counts[name.casefold()] > 1) for depth, name in zip(depths, names)]
    return [f"{number}-{each[-1]}" for number, each in enumerate(parts, 1)]


def _open_models(config: TestConfig, device: torch.device) -> list[_Model]:
    """Every model of `--load_path`, on the device. Raises UserError for an unusable one, or the same twice."""
    models = []
    for path, name in zip(config.load_path, model_names(config.load_path)):
        network, checkpoint = open_model(path, config.swap_max_pool, config.backbone)
        network.use(config.upsampling)
        file = find_model_file(Path(path))
        if any(file.samefile(model.file) for model in models):
            raise UserError(f"--load_path {path}: this model is named twice")
        models.append(_Model(name, file, network.to(device, memory_format=torch.channels_last), checkpoint))
    return models


def _open_meter(config: TestConfig, models: list[_Model], device: torch.device) -> Meter | None:
    """What `--metrics` needs. Raises UserError when it cannot be had, or the models' losses have no common measure."""
    if not config.measured:
        return None
    backbone = models[0].network.config.backbone
    losses = [metric for metric in config.measured if metric in LOSS_METRICS]
    for model in models:
        if losses and model.network.config.backbone != backbone:
            raise UserError(f"--metrics {losses[0]}: {models[0].file} is a {backbone} network and {model.file} one of "
                            f"{model.network.config.backbone}; their losses are not comparable, name other metrics")
    meter = Meter(config.measured, backbone, config.vgg_weights, config.style_loss, config.seed, device)
    for model in models if losses else ():
        trained_with = model.checkpoint.get("vgg_weights")
        if trained_with != meter.vgg_origin:
            note(f"{model.name} was trained with VGG weights {trained_with or 'that its file does not name'}; "
                 f"its losses are measured with {meter.vgg_origin}")
        trained_style = (model.checkpoint.get("train_config") or {}).get("style_loss", config.style_loss)
        if trained_style != config.style_loss:
            note(f"{model.name} was trained with --style_loss {trained_style}; measured is {config.style_loss}")
    return meter


# ----------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class _Pictures:
    """The content or the style pictures, and a file-name part for each."""

    flag: str
    paths: list[Path]
    names: list[str]


def _find_inputs(path: str, flag: str, holdout: float) -> _Pictures:
    """The picture that `path` names, or those of a folder."""
    root = Path(path)
    if not root.is_dir():
        return _Pictures(flag, [root], _names(root.parent, [root]))
    paths = find_measured(root, f"--{flag}", holdout)
    return _Pictures(flag, paths, _names(root, paths))


def _names(root: Path, paths: list[Path]) -> list[str]:
    """A file-name part for each picture, unique among them: its path below `root`, without the suffix
    unless two pictures differ in nothing else."""
    stems = ["-".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}-{path.suffix[1:]}" for stem, path in zip(stems, paths)]


def choose_pairs(contents: int, styles: int, number: int | None, seed: int) -> list[tuple[int, int]]:
    """Content and style picture of each pair, by number, in order: all, or `number` different ones at random.

    Drawn pairs use every picture as often as any other of its kind, or once more. Raises UserError when there
    are not that many pairs.
    """
    if number is None:
        return [(content, style) for content in range(contents) for style in range(styles)]
    if number > contents * styles:
        raise UserError(f"--pairs {number}: {contents} content and {styles} style pictures make "
                        f"{contents * styles} pairs")
    generator = random.Random(seed)
    content_order, style_order = (generator.sample(range(count), count) for count in (contents, styles))
    # Both orders go round together; when they meet again where they began, one moves on by a place.
    round_length = math.lcm(contents, styles)
    return sorted((content_order[place % contents], style_order[(place + place // round_length) % styles])
                  for place in range(number))


def _check_pictures(pictures: _Pictures, used: Iterable[int], config: TestConfig) -> None:
    """Decode every picture once before the work begins. Raises UserError for one that cannot be used."""

    def check(number: int) -> None:
        height, width = load_input(pictures.paths[number], config, pictures.flag).shape[2:]
        if config.measured and min(height, width) < MIN_SIDE:
            raise UserError(f"--{pictures.flag} {pictures.paths[number]}: {width} x {height} pixels; "
                            f"--metrics needs {MIN_SIDE} or more on each side")

    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(check, sorted(set(used))):
            pass


# --------------------------------------------------------------------------------------------------- mode


def test(given: dict) -> int:
    """Run `--mode test` with the flags given on the command line. Returns the exit code."""
    config = TestConfig(**given)
    config.check()
    if not set(LOSS_METRICS) & set(config.measured):
        for flag in given.keys() & {"vgg_weights", "style_loss"}:
            note(f"--{flag} has no effect without --metrics content or style")
    device = resolve_device(config.gpu_no)
    contents, styles = (_find_inputs(getattr(config, flag), flag, config.holdout) for flag in ("content", "style"))
    pairs = choose_pairs(len(contents.paths), len(styles.paths), config.pairs, config.seed)
    save_path = config.output
    to_file = save_path.suffix.lower() in OUTPUT_FORMATS
    if to_file and (config.measured or not config.is_single):
        raise UserError(f"--save_path {save_path}: one file cannot hold the pictures of {len(pairs)} pair(s) by "
                        f"{len(config.load_path)} model(s){', and their metrics' if config.measured else ''}; "
                        "name a folder")
    models = _open_models(config, device)
    _check_pictures(contents, (content for content, _ in pairs), config)
    _check_pictures(styles, (style for _, style in pairs), config)
    folder = make_folder(save_path.parent if to_file else save_path, "--save_path")
    folders = [make_folder(folder / model.name, "--save_path") for model in models] if len(models) > 1 else [folder]
    meter = _open_meter(config, models, device)

    names = [model.name for model in models]
    sheets = []
    if len(models) > 1 or config.pairs is not None and not config.is_single:
        sheets.append(comparison_sheet(pairs, names))
    if config.names_a_folder and config.pairs is None:
        sheets.append(contact_sheet(pairs, names))
    files = {pair: f"{contents.names[pair[0]]}_{styles.names[pair[1]]}.png" for pair in pairs}
    if to_file:
        files = {pairs[0]: save_path.name}
    values = _stylize_pairs(models, pairs, contents, styles, config, sheets, meter,
                            {pair: [each / name for each in folders] for pair, name in files.items()})
    written = f"{len(pairs) * len(models)} pictures" if len(pairs) * len(models) > 1 else files[pairs[0]]
    for sheet in sheets:
        if sheet.save(folder):
            written += f", {sheet.name}"
    if meter is not None:
        measurement = Measurement(values.numpy(), pairs, names, meter.metrics)
        report = _report(measurement, models, contents, styles, config, meter)
        write_text_atomically(folder / "metrics.json", json.dumps(report, indent=1) + "\n")
        print(measurement.table())
        written += ", metrics.json"
    note(f"wrote {written} to {folder}")
    return 0


def _stylize_pairs(
    models: list[_Model], pairs: list[tuple[int, int]], contents: _Pictures, styles: _Pictures, config: TestConfig,
    sheets: list[Sheet], meter: Meter | None, files: dict[tuple[int, int], list[Path]],
) -> Tensor:
    """Stylise every pair with every model, write the pictures to `files`, place all pictures on the sheets.

    Returns what the meter measured, (pairs, models, metrics), float64, on the CPU; empty without a meter.
    """
    codes = {}
    for number in sorted({style for _, style in pairs}):
        style = load_input(styles.paths[number], config, "style")
        codes[number] = [encode_style(model.network, style, config.margin) for model in models]
        for sheet in sheets:
            sheet.place(to_pil(style.float() / 255.0), ("style", number))
    values = []
    with progress_bar(len(pairs) * len(models), "stylise", "picture") as bar:
        for number, same_content in groupby(pairs, key=lambda pair: pair[0]):
            content = load_input(contents.paths[number], config, "content")
            for sheet in sheets:
                sheet.place(to_pil(content.float() / 255.0), ("content", number))
            for pair in same_content:
                outputs = []
                for column, model in enumerate(models):
                    outputs.append(stylize(model.network, content, codes[pair[1]][column], config.style_strength,
                                           config.margin))
                    picture = to_pil(denormalize(outputs[-1]))
                    save_picture(picture, files[pair][column])
                    for sheet in sheets:
                        sheet.place(picture, (*pair, column))
                    bar.update()
                if meter is not None:
                    style = load_input(styles.paths[pair[1]], config, "style")
                    values.append(meter.measure(content, style, outputs))
                    for model, output in zip(models, outputs):
                        if not output.isfinite().all():
                            raise UserError(f"--load_path {model.file}: its picture of {contents.paths[number]} and "
                                            f"{styles.paths[pair[1]]} has values that are not finite")
    return torch.stack(values).cpu() if values else torch.empty(0)


def _report(
    measurement: Measurement, models: list[_Model], contents: _Pictures, styles: _Pictures, config: TestConfig,
    meter: Meter,
) -> dict:
    """All that was measured and how, as plain values for `metrics.json`."""
    packages = ("torch", "torchvision", "Pillow", "numpy", *(["stlpips-pytorch"] if meter.stlpips else []))
    return {
        "models": [
            model.describe() | {
                "metrics": measurement.summary(number),
                "difference_from_first": measurement.summary(number, minus=0) if number else None,
            }
            for number, model in enumerate(models)
        ],
        "interval": INTERVAL,
        "pairs": [
            {"content": str(contents.paths[content]), "style": str(styles.paths[style]),
             "metrics": measurement.of_pair(number)}
            for number, (content, style) in enumerate(measurement.pairs)
        ],
        "settings": asdict(config),
        "vgg_weights_of_losses": meter.vgg_origin,
        "device": describe_device(meter.device),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }

"""`--mode test`: stylise pictures with one or more networks, full or pruned."""

import hashlib
import json
import math
import os
import platform
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    is_searched,
    refuse_within,
    save_picture,
    to_pil,
)
from figures import COMPARISON, CONTACT_SHEET, Sheet, comparison_sheet, contact_sheet
from network import StyleTransferNetwork
from quality import INTERVAL, LOSS_METRICS, METRICS, MIN_SIDE, Measurement, Meter
from stylize import (
    DEMO_CONTENT,
    DEMO_STYLE,
    UnusablePicture,
    check_margin,
    encode_style,
    load_input,
    load_transparency,
    open_model,
    stylize,
    usable,
)
from utils import (
    UserError,
    allow_tf32,
    describe_device,
    make_folder,
    note,
    progress_bar,
    resolve_device,
    usable_cores,
    write_text_atomically,
)
from video import makes_video, stylize_video
from weights import COMPACT_MODEL, VGG_SOURCES, find_model_file, same_vgg

OUTPUT_NAME = "stylised"  # in the working folder, where --save_path is not given: with .png for one picture
METRICS_NAME = "metrics.json"
LONGEST_SUFFIX = 5  # letters and digits after the last dot of --save_path that are taken for a picture format
LONGEST_NAME = 180  # bytes of a picture's file name: file systems take 255, and a file in the making has a longer one


@dataclass(frozen=True)
class TestConfig:
    """Every setting of test mode, with its default."""

    __test__ = False  # not a pytest class

    load_path: tuple[str, ...] = (str(COMPACT_MODEL),)
    content: str = str(DEMO_CONTENT)
    style: str = str(DEMO_STYLE)
    content_dir: str | None = None  # as other implementations call content and style
    style_dir: str | None = None
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
    frame_rate: float = 25.0
    temporal_smoothing: float = 0.0

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics to measure, in the order of METRICS."""
        if self.metrics is None:
            return ()
        return tuple(metric for metric in METRICS if metric in self.metrics or not self.metrics)

    def input(self, kind: str) -> tuple[str, str]:
        """The path of the content or style, and the flag that it is of."""
        other = f"{kind}_dir"
        return (getattr(self, kind), kind) if getattr(self, other) is None else (getattr(self, other), other)

    @property
    def names_a_folder(self) -> bool:
        """Whether content or style is a folder or archive of pictures."""
        return any(is_searched(self.input(kind)[0]) for kind in ("content", "style"))

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

    @property
    def writes_a_file(self) -> bool:
        """Whether the output is a picture file: by its suffix, unless it is a folder already or ends in a slash."""
        if (self.save_path or "").endswith(("/", os.sep)) or self.output.is_dir():
            return False
        return self.output.suffix.lower() in OUTPUT_FORMATS

    def check(self) -> None:
        """Raises UserError for an empty path, a margin that poolings do not divide, or a save_path that looks like a
        picture file of a kind that is not written."""
        check_margin(self.margin)
        for flag in ("content", "style", "content_dir", "style_dir", "save_path"):
            if getattr(self, flag) == "":
                raise UserError(f"--{flag} is empty; leave it out for the default")
        if self.save_path is None or self.writes_a_file or self.save_path.endswith(("/", os.sep)):
            return
        # A folder may have a dot in its name: what begins with a digit (runs/v1.0) or is long is no picture format.
        name, suffix = self.output.name, self.output.suffix[1:].strip()
        looks_like_one = suffix[:1].isalpha() and suffix.isalnum() and len(suffix) <= LONGEST_SUFFIX
        if (looks_like_one or name.lower() in OUTPUT_FORMATS) and not self.output.is_dir():
            raise UserError(f"--save_path {self.save_path}: no picture format that can be written "
                            f"({' '.join(OUTPUT_FORMATS)}); for a folder of this name, end it with /")


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
        if not same_vgg(trained_with, meter.vgg_origin):
            note(f"{model.name} was trained with VGG weights {trained_with or 'that its file does not name'}; "
                 f"its losses are measured with {meter.vgg_origin}")
        trained_style = (model.checkpoint.get("train_config") or {}).get("style_loss", config.style_loss)
        if trained_style != config.style_loss:
            note(f"{model.name} was trained with --style_loss {trained_style}; measured is {config.style_loss}")
    return meter


# ----------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class _Pictures:
    """The content or the style pictures, and a file-name part for each. root: the folder that was named, if one was."""

    flag: str
    paths: list[Path]
    names: list[str]
    root: Path | None


def _find_inputs(path: str, flag: str, holdout: float) -> _Pictures:
    """The picture that `path` names, or those of a folder or archive."""
    root = Path(path)
    if not is_searched(root):
        return _Pictures(flag, [root], _names(root.parent, [root]), None)
    paths = find_measured(root, f"--{flag}", holdout)
    return _Pictures(flag, paths, _names(root, paths), root)


def _names(root: Path, paths: list[Path]) -> list[str]:
    """A file-name part for each picture, unique among them: its path below `root`, without the suffix
    unless two pictures differ in nothing else."""
    stems = ["-".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    counts = Counter(map(_folded, stems))
    return distinct([stem if counts[_folded(stem)] == 1 else f"{stem}-{path.suffix[1:]}"
                     for stem, path in zip(stems, paths)])


def _folded(name: str) -> str:
    """Equal for names that are one file on some file systems."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def distinct(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, those that are equal without regard to case, or `taken`, with a number of their own behind them."""
    counts = Counter(map(_folded, (*names, *taken)))
    used = set(counts)
    result = []
    for name in names:
        number, chosen = 1, name
        while counts[_folded(name)] > 1 and _folded(chosen) in used:
            chosen, number = f"{name}-{number}", number + 1
        used.add(_folded(chosen))
        result.append(chosen)
    return result


def _output_names(pairs: list[tuple[int, int]], contents: _Pictures, styles: _Pictures) -> dict[tuple[int, int], str]:
    """The file name of every pair's picture: no two alike, none that of a sheet, and short enough for a file system."""
    stems = []
    for content, style in pairs:
        stem = f"{contents.names[content]}_{styles.names[style]}"
        if len(os.fsencode(stem)) > LONGEST_NAME:
            kept = os.fsencode(stem)[: LONGEST_NAME - 20].decode(errors="ignore")
            stem = f"{kept}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:12]}"
        stems.append(stem)
    taken = [Path(name).stem for name in (COMPARISON, CONTACT_SHEET)]
    return dict(zip(pairs, (f"{stem}.png" for stem in distinct(stems, taken))))


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


def _unusable(pictures: _Pictures, used: Iterable[int], config: TestConfig) -> dict[int, str]:
    """Decode every picture once before the work begins. Returns what is wrong with those that cannot be used.

    Raises UserError where that is all of them, or the one that was named.
    """

    def reason(number: int) -> str | None:
        try:
            height, width = load_input(pictures.paths[number], config, pictures.flag).shape[2:]
        except UnusablePicture as error:
            return str(error)
        if config.measured and min(height, width) < MIN_SIDE:
            return (f"--{pictures.flag} {pictures.paths[number]}: {width} x {height} pixels; "
                    f"--metrics needs {MIN_SIDE} or more on each side")
        return None

    numbers = sorted(set(used))
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = {number: text for number, text in zip(numbers, pool.map(reason, numbers)) if text}
    # One that failed beside others may have lacked the memory that they took.
    found = {number: text for number in found if (text := reason(number))}
    if len(found) == len(numbers):
        first = next(iter(found.values()))
        if pictures.root is None:
            raise UserError(first)
        raise UserError(f"--{pictures.flag} {pictures.root}: none of {len(numbers)} pictures can be used ({first})")
    return found


def _without(pictures: _Pictures, numbers: Iterable[int]) -> tuple[_Pictures, dict[int, int]]:
    """The pictures without some, and the new number of each that is left."""
    left = [number for number in range(len(pictures.paths)) if number not in set(numbers)]
    kept = _Pictures(pictures.flag, [pictures.paths[number] for number in left],
                     [pictures.names[number] for number in left], pictures.root)
    return kept, {old: new for new, old in enumerate(left)}


# ---------------------------------------------------------------------------------------------- outputs


def _check_outputs(files: Iterable[Path], folders: Iterable[Path], contents: _Pictures, styles: _Pictures,
                   config: TestConfig) -> None:
    """Raises UserError where a file to write is one that is read, or a folder to write to belongs to one that is
    searched for pictures: the next call would stylise what this one wrote."""
    inputs = [(f"--{pictures.flag}", path) for pictures in (contents, styles) for path in pictures.paths]
    inputs += [("--load_path", find_model_file(Path(path))) for path in config.load_path]
    if config.measured and config.vgg_weights not in VGG_SOURCES:
        inputs.append(("--vgg_weights", Path(config.vgg_weights)))
    read = {_identity(path): f"{flag} {path}" for flag, path in inputs}
    for file in files:
        identity = _identity(file)
        if identity is not None and identity in read:
            raise UserError(f"--save_path {config.output}: {file} would overwrite {read[identity]}; name another")
    for pictures in (contents, styles):
        if pictures.root is None:
            continue
        for folder in folders:
            refuse_within(folder, pictures.root, f"--{pictures.flag}", pictures.paths)


def _identity(path: Path) -> tuple[int, int] | None:
    """Equal for two paths of one file, through links, too; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _write_report(report: dict, path: Path) -> None:
    """Write what was measured. Raises UserError, naming the file and the reason, when it cannot be written."""
    try:
        write_text_atomically(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


# --------------------------------------------------------------------------------------------------- mode


@dataclass
class _Skipped:
    """What could not be used, said at once and again at the end."""

    reasons: list[str] = field(default_factory=list)
    pairs: int = 0  # left out because of it

    def add(self, reason: str) -> None:
        note(f"skipped {reason}")
        self.reasons.append(reason)

    @contextmanager
    def unless_single(self, pictures: _Pictures):
        """Within the block, a picture of a folder that cannot be used is skipped; one named singly raises."""
        try:
            yield
        except UnusablePicture as error:
            if pictures.root is None:
                raise
            self.add(str(error))

    def summary(self) -> str:
        pictures, pairs = (f"{count} {name}{'s' * (count != 1)}"
                           for count, name in ((len(self.reasons), "picture"), (self.pairs, "pair")))
        return "\n".join((f"could not be used: {pictures}; left out: {pairs}",
                          *(f"  {reason}" for reason in self.reasons)))


def test(given: dict) -> int:
    """Run `--mode test` with the flags given on the command line. Returns the exit code: 1 where pictures of a folder
    could not be used."""
    config = TestConfig(**given)
    for kind in ("content", "style"):
        if kind in given and f"{kind}_dir" in given:
            raise UserError(f"--{kind} and --{kind}_dir: give one of the two, in test mode they mean the same")
    if makes_video(config):
        return stylize_video(config, given)
    config.check()
    for flag in given.keys() & {"frame_rate", "temporal_smoothing"}:
        note(f"--{flag} has no effect on pictures")
    if not set(LOSS_METRICS) & set(config.measured):
        for flag in given.keys() & {"vgg_weights", "style_loss"}:
            note(f"--{flag} has no effect without --metrics content or style")
    device = resolve_device(config.gpu_no)
    allow_tf32(False)
    contents, styles = (_find_inputs(*config.input(kind), config.holdout) for kind in ("content", "style"))
    pairs = choose_pairs(len(contents.paths), len(styles.paths), config.pairs, config.seed)
    save_path, to_file = config.output, config.writes_a_file
    if to_file and (config.measured or not config.is_single):
        raise UserError(f"--save_path {save_path}: one file cannot hold the pictures of {len(pairs)} pair(s) by "
                        f"{len(config.load_path)} model(s){', and their metrics' if config.measured else ''}; "
                        "name a folder")
    folder = save_path.parent if to_file else save_path
    names = model_names(config.load_path)
    folders = [folder / name for name in names] if len(names) > 1 else [folder]
    files = {pairs[0]: save_path.name} if to_file else _output_names(pairs, contents, styles)
    makers = {}
    if len(names) > 1 or config.pairs is not None and not config.is_single:
        makers[COMPARISON] = comparison_sheet
    if config.names_a_folder and config.pairs is None:
        makers[CONTACT_SHEET] = contact_sheet
    written = [each / name for each in folders for name in files.values()]
    written += [folder / name for name in (*makers, *([METRICS_NAME] if config.measured else []))]
    _check_outputs(written, [] if to_file else {folder, *folders}, contents, styles, config)

    models = _open_models(config, device)
    skipped = _Skipped()
    unusable = [_unusable(pictures, (pair[kind] for pair in pairs), config)
                for kind, pictures in enumerate((contents, styles))]
    for reason in (reason for reasons in unusable for reason in reasons.values()):
        skipped.add(reason)
    left = [pair for pair in pairs if pair[0] not in unusable[0] and pair[1] not in unusable[1]]
    if not left:
        raise UserError(f"none of {len(pairs)} pairs can be stylised (the first: {skipped.reasons[0]})")
    (contents, new_content), (styles, new_style) = (
        _without(pictures, reasons) for pictures, reasons in zip((contents, styles), unusable))
    files = {(new_content[content], new_style[style]): files[content, style] for content, style in left}
    meter = _open_meter(config, models, device)
    make_folder(folder, "--save_path")
    for each in folders:
        make_folder(each, "--save_path")

    sheets = [maker(list(files), names) for maker in makers.values()]
    values = _stylize_pairs(models, list(files), contents, styles, config, sheets, meter, skipped,
                            {pair: [each / name for each in folders] for pair, name in files.items()})
    if not values:
        raise UserError(f"nothing could be stylised (the first: {skipped.reasons[0]})")
    skipped.pairs = len(pairs) - len(values)
    pictures = len(values) * len(models)
    wrote = f"{pictures} pictures" if pictures > 1 else files[next(iter(values))]
    for sheet in sheets:
        if sheet.save(folder):
            wrote += f", {sheet.name}"
    if meter is not None:
        measurement = Measurement(torch.stack(list(values.values())).cpu().numpy(), list(values), names, meter.metrics)
        print(measurement.table())
        report = _report(measurement, models, contents, styles, config, meter, skipped)
        _write_report(report, folder / METRICS_NAME)
        wrote += f", {METRICS_NAME}"
    note(f"wrote {wrote} to {folder}")
    if not skipped.reasons:
        return 0
    note(skipped.summary())
    return 1


def _stylize_pairs(
    models: list[_Model], pairs: list[tuple[int, int]], contents: _Pictures, styles: _Pictures, config: TestConfig,
    sheets: list[Sheet], meter: Meter | None, skipped: _Skipped, files: dict[tuple[int, int], list[Path]],
) -> dict[tuple[int, int], Tensor | None]:
    """Stylise every pair with every model, write the pictures to `files`, place all pictures on the sheets.

    A picture of a folder that went away, or that there is too little memory for, is left out with all its pairs.
    Returns by pair what the meter measured, (models, metrics), float64; None without a meter. Raises UserError for an
    output that is not finite or cannot be written, and for what a picture that was named singly lacks.
    """
    codes = {}
    for number in sorted({style for _, style in pairs}):
        path = styles.paths[number]
        with skipped.unless_single(styles), usable(path, styles.flag):
            style = load_input(path, config, styles.flag)
            codes[number] = [encode_style(model.network, style, config.margin) for model in models]
            for sheet in sheets:
                sheet.place(to_pil(style.float() / 255.0), ("style", number))
    values = {}
    with progress_bar(len(pairs) * len(models), "stylise", "picture") as bar:
        for number, same_content in groupby(pairs, key=lambda pair: pair[0]):
            path = contents.paths[number]
            with skipped.unless_single(contents), usable(path, contents.flag):
                content = load_input(path, config, contents.flag)
                alpha = load_transparency(path, config, contents.flag)
                for sheet in sheets:
                    sheet.place(to_pil(content.float() / 255.0), ("content", number))
                for pair in (pair for pair in same_content if pair[1] in codes):
                    outputs = []
                    for column, model in enumerate(models):
                        output = stylize(model.network, content, codes[pair[1]][column], config.style_strength,
                                         config.margin)
                        if not output.isfinite().all():
                            raise UserError(f"--load_path {model.file}: its picture of {path} and "
                                            f"{styles.paths[pair[1]]} has values that are not finite")
                        picture = to_pil(denormalize(output))
                        save_picture(picture, files[pair][column], alpha)
                        for sheet in sheets:
                            sheet.place(picture, (*pair, column))
                        outputs.append(output)
                        bar.update()
                    style = None if meter is None else load_input(styles.paths[pair[1]], config, styles.flag)
                    values[pair] = None if meter is None else meter.measure(content, style, outputs)
    return values


def _report(
    measurement: Measurement, models: list[_Model], contents: _Pictures, styles: _Pictures, config: TestConfig,
    meter: Meter, skipped: _Skipped,
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
        "skipped": skipped.reasons,
        "pairs_left_out": skipped.pairs,
        "settings": asdict(config),
        "vgg_weights_of_losses": meter.vgg_origin,
        "device": describe_device(meter.device),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }

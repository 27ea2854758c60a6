"""`--mode test`: stylise pictures with one or more networks, full or pruned."""

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

import utils
from data import MAX_PIXELS, OUTPUT_FORMATS
from network import count_parameters
from painting.control import PRESERVED
from painting.many import Outcome, PairPainter
from painting.pairs import METRICS_NAME, OUTPUT_NAME, Plan, make_plan, note_learned_from
from painting.quality import INTERVAL, LOSS_METRICS, METRICS, Measurement, Meter
from painting.stylizer import DEMO_CONTENT, DEMO_STYLE, OpenedModel, common_backbone, make_stylizers, open_models
from painting.video import makes_video, stylize_video
from settings import amount, changed, count, fraction_below_1, rate, refuse, setting
from utils import UserError, note, process_rank, show
from weights import COMPACT_MODEL, same_vgg

SEVERAL = ("content", "style", "content_dir", "style_dir", "style_strength")  # one alone is reported as such
PATIENCE = timedelta(days=30)  # that a process has with others, which may have larger pictures to paint


@dataclass(frozen=True)
class TestConfig:
    """Every setting of test mode, with its default."""

    __test__ = False  # not a pytest class

    load_path: tuple[str, ...] = setting((str(COMPACT_MODEL),), more="several are compared")
    content: tuple[str, ...] = setting((str(DEMO_CONTENT),), more="also several, and folders or .zip archives of them, "
                                       "each painted in each style; or a video")
    style: tuple[str, ...] = setting((str(DEMO_STYLE),), more="also several, and folders or .zip archives of them")
    content_dir: tuple[str, ...] | None = setting(more="another name of --content")
    style_dir: tuple[str, ...] | None = setting(more="another name of --style")
    save_path: str | None = setting(
        more="also a picture file for one picture, or a video file for a video or a folder of its frames (without this "
        f"flag, several pictures go to {OUTPUT_NAME}/)", none=f"{OUTPUT_NAME}.png")
    skip_existing: bool = setting(False, "paint only pictures that are not there yet, or damaged, whatever painted the "
                                  "others; not with --metrics", "output")
    holdout: float = setting(0.0, more="only those are taken, or with 0 all")
    backbone: str | None = None
    swap_max_pool: bool = False
    style_strength: tuple[float, ...] = setting((1.0,), more="several are each painted, and side by side in a sheet")
    style_weights: tuple[float, ...] | None = setting(None, "mix all --style pictures to one style, in these shares, "
                                                      "one each", "stylising", amount, none="each style by itself")
    mask: str | None = setting(None, "where this picture of the content's aspect is white, the first of two --style "
                               "pictures is painted, where it is black the second", "stylising")
    preserve_color: str | None = setting(
        None, "keep the content's colours: luma paints the lightness alone, histogram gives the style the content's "
        "colours first", "stylising", choices=PRESERVED)
    style_size: int | None = setting(None, "resize style pictures so that their shorter sides have this many pixels: "
                                     "the scale of what is taken", "stylising", count, none="as --imsize says")
    tile: int | None = setting(
        None, "paint in tiles of this side in pixels: the same picture in less memory; 88 or more for most models",
        "stylising", count, none="only where the whole picture would not fit the free memory")
    upsampling: str | None = None  # None: as the file says
    imsize: int | None = None
    cropsize: int | None = setting(more="it is cut from the centre")
    max_pixels: int = MAX_PIXELS
    pairs: int | None = setting(more="with every picture used equally often, give or take one",
                                none="every content with every style")
    metrics: tuple[str, ...] | None = setting(
        None, "measure content loss, style loss, SSIM, ST-LPIPS or flat tiles, and write metrics.json; without a name, "
        "all", "output", choices=tuple(METRICS), nargs="*", none="nothing is measured")
    painted: tuple[str, ...] | None = setting(
        None, "pictures of the same pairs by other programs, to be measured, too: a name, and a folder with a picture "
        "CONTENT_STYLE or CONTENT__STYLE of each pair, of the content's size", "output", metavar="NAME=FOLDER")
    vgg_weights: str = "imagenet"
    style_loss: str = "meanstd"
    seed: int = setting(0, more="of --pairs and of --vgg_weights random")
    gpu_no: int | None = None
    amp: str = setting("off", more="auto is a decoder in float16 on GPUs, for models whose pictures it changes by at "
                       "most 3 of 255", choices=("auto", "off"))
    frame_rate: float = setting(25.0, "frames a second, or a fraction, of the video that a folder of frames becomes",
                                "stylising", rate)
    temporal_smoothing: float = setting(
        0.0, "less flicker in a video: the share, from 0 to below 1, that each painted frame takes of the one before, "
        "carried along with the motion; 0.8 is much", "stylising", fraction_below_1)

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics to measure, in the order of METRICS."""
        asked = () if self.metrics is None else self.metrics or METRICS
        return tuple(metric for metric in METRICS if metric in asked)

    def input(self, kind: str) -> tuple[tuple[str, ...], str]:
        """What is named as content or style, and the flag that names it."""
        other = f"{kind}_dir"
        return (getattr(self, kind), kind) if getattr(self, other) is None else (getattr(self, other), other)

    @property
    def strengths(self) -> list[str]:
        """`style_strength` in names, as short as tells each from any other: 0, 0.25, 1."""
        return [repr(strength + 0.0).removesuffix(".0") for strength in self.style_strength]

    @property
    def output(self) -> Path:
        """The file or folder to write, where it is named or one picture comes out."""
        return Path(f"{OUTPUT_NAME}.png" if self.save_path is None else self.save_path)

    @property
    def names_a_folder(self) -> bool:
        """Whether the output is a folder that is there already, or has a name that ends in a slash."""
        return (self.save_path or "").endswith("/") or self.output.is_dir()

    @property
    def writes_a_file(self) -> bool:
        """Whether the output is a picture file, by its suffix."""
        return not self.names_a_folder and self.output.suffix.lower() in OUTPUT_FORMATS

    def check(self) -> None:
        """Raises UserError for flags that exclude each other, or a picture format not written."""
        measures = self.metrics is not None
        # A folder may have a dot in its name: what begins with a digit (runs/v1.0) or is long is no format.
        has_format = re.fullmatch(r"\.[a-zA-Z]\w{,4}", self.output.suffix) and not makes_video(self)
        refuse({
            "content and --content_dir mean the same: give one of them": {"content", "content_dir"} <= changed(self),
            "style and --style_dir mean the same: give one of them": {"style", "style_dir"} <= changed(self),
            f"style_strength {' '.join(self.strengths)}: one is given twice":
                len(set(self.strengths)) < len(self.strengths),
            f"{'mask' if self.mask else 'style_weights'}: --metrics compares with one style picture; leave one out":
                (self.style_weights or self.mask) and measures,
            "mask: --cropsize cuts the content alone; cut both beforehand": self.mask and self.cropsize,
            "skip_existing: --metrics measures what is painted now; leave one out": self.skip_existing and measures,
            "painted: what others painted is measured only; --metrics is needed, too": self.painted and not measures,
            f"save_path {self.save_path}: no picture format that can be written ({' '.join(OUTPUT_FORMATS)}); for a "
            "folder of this name, end it with /": has_format and not self.writes_a_file and not self.names_a_folder,
        })


def _open_meter(config: TestConfig, plan: Plan, models: list[OpenedModel], device: torch.device) -> Meter:
    """What `--metrics` needs. Raises UserError when it cannot be had, or the models' losses have no common measure."""
    has_losses = not set(LOSS_METRICS).isdisjoint(config.measured)
    backbone = common_backbone(models, "metrics", ", name other metrics") if has_losses else ""
    meter = Meter(config.measured, backbone, config.vgg_weights, config.style_loss, config.seed, device)
    for model in models if has_losses else ():
        trained_with = model.checkpoint.get("vgg_weights")
        if not same_vgg(trained_with, meter.vgg_origin):
            note(f"{model.name} was trained with VGG weights {trained_with or 'that its file does not name'}; "
                 f"its losses are measured with {meter.vgg_origin}")
        trained_style = (model.checkpoint.get("train_config") or {}).get("style_loss", config.style_loss)
        if trained_style != config.style_loss:
            note(f"{model.name} was trained with --style_loss {trained_style}; measured is {config.style_loss}")
    contents, styles = map(set, zip(*plan.pairs))
    measured = [plan.contents.paths[number] for number in contents] + [plan.styles.paths[each] for each in styles]
    for model in models:
        note_learned_from(model.name, model.checkpoint, measured)
    return meter


def test(given: dict) -> int:
    """Run `--mode test` with the flags given on the command line. Returns the exit code: 1 where some of several
    pictures, or parts of a video, could not be used."""
    config = TestConfig(**given)
    config.check()
    is_video = makes_video(config)
    if is_video and process_rank() > 0:
        return 0  # one file, one process
    unused = ("holdout", "pairs", "skip_existing", "seed") if is_video else ("frame_rate", "temporal_smoothing")
    for flag in sorted(changed(config).intersection(unused)):
        note(f"--{flag} has no effect on {'a video' if is_video else 'pictures'}")
    device = utils.resolve_device(config.gpu_no, tf32=False)
    if is_video:
        return stylize_video(config, device)
    with utils.process_group(torch.device("cpu"), PATIENCE):  # what they tell each other lies in its memory
        plan, models, meter = make_plan(config), open_models(config), None
        if config.measured:  # hashed now: a run that still trains replaces its file
            models = [model._replace(sha256=hashlib.sha256(model.file.read_bytes()).hexdigest()) for model in models]
            meter = _open_meter(config, plan, models, device)
        outcome = PairPainter(config, plan, make_stylizers(config, models, device), meter).run()
        if not outcome.values:
            raise UserError(f"none of {len(plan.pairs)} pairs can be painted: {next(iter(outcome.unusable.values()))}")
        if process_rank() == 0:
            _report(config, plan, outcome, models, meter)
    return 1 if outcome.unusable else 0


def _report(config: TestConfig, plan: Plan, outcome: Outcome, models: list[OpenedModel], meter: Meter | None) -> None:
    """Write the sheets and metrics.json, print the table, and say what was written and what could not be used."""
    done = [pair for pair in plan.pairs if pair in outcome.values]
    left_out = len(plan.pairs) - len(done)
    new = [path for pair in done for path in plan.files[pair] if path not in outcome.kept]
    wrote = [new[0].name if len(new) == 1 else f"{len(new)} pictures"]
    wrote[0] += f" ({len(outcome.kept)} were there already)" if outcome.kept else ""
    for sheet in plan.sheets:
        sheet.save(plan.folder, outcome.shown)
        wrote.append(sheet.name)
    if meter is not None:
        values = torch.stack([outcome.values[pair] for pair in done]).numpy()
        measurement = Measurement(values, done, plan.columns, meter.metrics)
        show(measurement.table())
        metrics = _metrics(config, plan, measurement, models, meter)
        metrics |= {"skipped": [*outcome.unusable.values()], "pairs_left_out": left_out}
        utils.write_text_atomically(plan.folder / METRICS_NAME, json.dumps(metrics, indent=1) + "\n")
        wrote.append(METRICS_NAME)
    note(f"wrote {', '.join(wrote)} to {plan.folder}")
    if outcome.unusable:
        note("\n  ".join([f"could not be used: {len(outcome.unusable)} picture(s); left out: {left_out} pair(s)",
                          *outcome.unusable.values()]))


def _metrics(config: TestConfig, plan: Plan, measurement: Measurement, models: list[OpenedModel], meter: Meter) -> dict:
    """All that was measured and how, as plain values for `metrics.json`."""
    packages = ("torch", "torchvision", "Pillow", "numpy", *["stlpips-pytorch"] * ("stlpips" in meter.metrics))
    painters = [{
        "file": str(model.file),
        "sha256": model.sha256,
        "backbone": model.network.config.backbone,
        "bottleneck_channels": model.network.config.bottleneck_width,
        "parameters": count_parameters(model.network),
        "iteration": model.checkpoint.get("iteration"),
        "vgg_weights_in_training": model.checkpoint.get("vgg_weights"),
        "style_strength": strength,
    } for model, strength in product(models, config.style_strength)]
    painters += [{"painted": each.partition("=")[2]} for each in config.painted or ()]
    return {
        "models": [each | {
            "name": measurement.names[number],
            "metrics": measurement.summary(number),
            "difference_from_first": measurement.summary(number, minus=0) if number else None,
        } for number, each in enumerate(painters)],
        "interval": INTERVAL,
        "pairs": [{
            "content": str(plan.contents.paths[content]), "style": str(plan.styles.paths[style]),
            "metrics": {name: dict(zip(meter.metrics, values.tolist())) for name, values in zip(plan.columns, of_pair)},
        } for (content, style), of_pair in zip(measurement.pairs, measurement.values)],
        "settings": {name: value[0] if name in SEVERAL and value and len(value) == 1 else value
                     for name, value in asdict(config).items()},
        "vgg_weights_of_losses": meter.vgg_origin,
        "device": utils.describe_device(meter.device),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }

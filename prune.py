"""`--mode prune`: measure the channels, cut the inactive or least important ones out, report what that changes."""

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from data import MAX_PIXELS
from painting.pairs import note_learned_from
from painting.quality import MIN_SIDE, Meter
from painting.stylizer import DEMO_CONTENT, DEMO_STYLE, OpenedModel, common_backbone, load_input, open_models
from pruning.plots import plot_l0_maps, plot_l2_curves, plot_widths
from pruning.report import GRID_NUMBERS, MEASURED, build_report, format_table, paint_grid, write_comparison
from pruning.responses import Responses, choose_pictures, measure_responses
from pruning.selection import most_macs, select
from pruning.surgery import cut_bottleneck, cut_channels
from settings import check_needed, count, count_or_zero, positive_fraction, refuse, setting
from utils import UserError, make_folder, note, resolve_device, save_checkpoint, show, write_text_atomically
from weights import PRUNED_NAME, model_checkpoint


@dataclass(frozen=True)
class PruneConfig:
    """Every setting of prune mode, with its default. Sizes are those of the publication."""

    load_path: tuple[str, ...] | None = setting(more="several are pruned and compared", needed=True)
    save_path: str | None = setting(needed=True)
    content_dir: str | None = setting(needed=True)
    style_dir: str | None = setting(needed=True)
    content: str = setting(str(DEMO_CONTENT), more="for the picture grid")
    style: str = setting(str(DEMO_STYLE), more="for the picture grid")
    backbone: str | None = None
    swap_max_pool: bool = False
    style_strength: float = 1.0
    imsize: int = 512
    cropsize: int = setting(512, more="it is cut from the centre")
    max_pixels: int = MAX_PIXELS
    holdout: float = setting(0.0, more="only those are taken, or with 0 all")
    prune_images: int = setting(1000, "number of pictures from each folder to measure the channels with", "pruning",
                                count)
    prune_layers: str = setting("bottleneck", "cut channels of the bottleneck alone, or of every layer", "pruning",
                                choices=("bottleneck", "all"))
    prune_macs: float | None = setting(
        None, "cut the least important channels of every layer until this fraction of the multiply-adds is left",
        "pruning", positive_fraction, none="cut only what is off or constant")
    prune_rank: str = setting(
        "importance", "what --prune_macs cuts first: by importance, the channels that change the picture least for the "
        "multiply-adds saved; by magnitude, for comparison, those of the smallest weights, an equal share of every "
        "layer", "pruning", choices=("importance", "magnitude"))
    round_to: int = setting(
        1, "leave each layer a multiple of this many channels, or as many as before where that is less", "pruning",
        count)
    prune_num: int | None = setting(
        None, "cut this many channels of the bottleneck, the weakest first", "pruning", count_or_zero,
        none="all that are zero for every measured picture")
    prune_channels: tuple[int, ...] | None = setting(
        None, "cut the bottleneck channels with these numbers, counted from 0", "pruning", int, none="see --prune_num")
    prune_nums: tuple[int, ...] | None = setting(
        None, "how many channels are cut in each picture of the picture grid, and for several models at each point of "
        "the loss curves", "pruning", count_or_zero,
        none=f"{' '.join(map(str, GRID_NUMBERS))}; for curves 0 to 500 in fifties")
    pairs: int = setting(20, more="those set aside from choosing channels, at most a quarter of a folder or one "
                         "picture of it, to measure what a cut changes")
    vgg_weights: str = setting("bundled", more="it measures the losses of several models")
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
        check_needed(self, "prune")
        ways = {"prune_num": self.prune_num is not None, "prune_channels": self.prune_channels is not None,
                "prune_layers all or prune_macs": self.every_layer}
        asked = [way for way, is_asked in ways.items() if is_asked]
        are_several = len(self.load_path) > 1
        refuse({
            f"report_size {self.report_size}: a multiple of 8, 16 or more, is needed":
                self.report_size < 16 or self.report_size % 8,
            "responses: they are of one model, load_path names several": are_several and self.responses,
            f"cropsize {self.cropsize}: several models are compared, which takes {MIN_SIDE} or more":
                are_several and self.cropsize < MIN_SIDE,
            f"{' and '.join(asked)}: give one of the two": len(asked) > 1,
            "prune_rank magnitude: how much is to be left, prune_macs says":
                self.prune_rank == "magnitude" and self.prune_macs is None,
        })

    def folder_of(self, model: OpenedModel) -> Path:
        """Where the results of a model go: a folder of its own where there are several."""
        return Path(self.save_path, model.name) if len(self.load_path) > 1 else Path(self.save_path)


def check_models(models: list[OpenedModel], config: PruneConfig) -> None:
    """Raises UserError where the cuts that are asked for cannot be made, or would overwrite a model."""
    widths = [model.network.config.bottleneck_width for model in models]
    for name, numbers, width in (("prune_num", (config.prune_num or 0,), min(widths)),
                                 ("prune_nums", config.prune_nums or (), max(widths))):
        if max(numbers, default=0) >= width:
            raise UserError(f"{name} {max(numbers)}: the network has {width} bottleneck channels, at most {width - 1} "
                            "can be cut")
    for model in models:
        target = config.folder_of(model) / PRUNED_NAME
        if target.exists() and any(target.samefile(each.file) for each in models):
            raise UserError(f"save_path {config.save_path}: would overwrite a model that load_path names; choose "
                            "another")
        most_macs(model.network.config, config)
        cut_bottleneck(model.network, config.prune_channels or ())


def prune(given: dict) -> int:
    """Run `--mode prune` with the flags given on the command line. Returns the exit code."""
    config = PruneConfig(**given)
    config.check()
    device = resolve_device(config.gpu_no, tf32=False)
    # All that can be refused is refused before the long measurement.
    models = open_models(config)
    check_models(models, config)
    backbone = common_backbone(models, "load_path")  # the losses of several are compared
    meter = Meter(MEASURED, backbone, config.vgg_weights, "meanstd", 0, device) if len(models) > 1 else None
    for name in ("content", "style"):
        load_input(Path(getattr(config, name)), config, name)
    if config.responses:
        kept = Responses.load(config.responses, models[0].network.config, config.every_layer)
        measured, pairs = {"responses": kept.paths}, kept.pairs
        for path in chain(*pairs):
            load_input(Path(path), config, "responses")
    else:
        kept, (measured, pairs) = None, choose_pictures(config)
    if not pairs:
        reason = "no pictures were set aside: a folder has only one, or the responses are of an older version"
        if meter is not None:
            raise UserError("content_dir, style_dir: several models are compared by other pictures than those that are "
                            f"measured, but {reason}")
        note(f"what the cut changes is not measured, {reason}")
    folder = make_folder(config.save_path, "--save_path")

    paths, responses, reports = [*{*map(Path, chain(*measured.values(), *pairs))}], {}, {}
    for model in models:
        model.network.to(device, memory_format=torch.channels_last)
        note_learned_from(model.name, model.checkpoint, paths)
        responses[model.name] = kept or measure_responses(model.network, config, measured, pairs)
        reports[model.name] = prune_model(model, responses[model.name], meter, config)
    show(format_table(reports))
    if meter is not None:
        write_comparison(reports, responses, meter, config, folder)
        note(f"wrote l0_maps.png, curves.png, curves.json, report.json and table.md to {folder}")
    return 0


def prune_model(model: OpenedModel, responses: Responses, meter: Meter | None, config: PruneConfig) -> dict:
    """Cut a model, and write the cut one, its report and plots into its folder. Returns the report, with the losses
    where there is a meter."""
    folder, network = make_folder(config.folder_of(model), "--save_path"), model.network
    responses.save(folder / "responses.npz")
    cuts, constants = select(network, responses, config)
    if not any(cuts.values()) and config.prune_num != 0:
        note(f"{model.name}: no channel is off for every picture, so none is cut; --prune_num N cuts the N weakest, "
             "--prune_macs F the least important of all layers")
    dtype = torch.float16 if config.half else torch.float32
    cut = cut_channels(network, cuts, constants).to(dtype).float()  # the report is of the weights as they are written
    plot_l0_maps({model.name: responses}, folder / "l0_map.png")
    plot_l2_curves({model.name: responses}, folder / "l2_curve.png")
    paint_grid(network, responses, config, folder / "prune_grid.png")
    report = build_report(model.file, network, cut, cuts, constants, responses, meter, config)
    write_text_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
    origins = {name: model.checkpoint.get(name) for name in ("iteration", "vgg_weights", "train_config")}
    if config.every_layer:
        plot_widths(report, folder / "widths.png")
        origins["pruned_layers"] = cuts
    save_checkpoint(model_checkpoint(cut, dtype=dtype, pruned_channels=report["cut_channels"], **origins),
                    folder / PRUNED_NAME)
    note(f"wrote {PRUNED_NAME}, report.json, responses.npz and plots to {folder}")
    return report

"""Time this trainer's step against a plain one (`plain.py`), and the loader against the step.

    python benchmarks/train_step.py --compile                                # GPU, published settings
    python benchmarks/train_step.py --device cpu --cropsize 128 --imsize 256

All in one process and run; variants take turns, so that a change in the machine's speed meets all alike. The
step runs on random pictures that are on the device already, the loader on the folders. Last line: everything as JSON.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measure import peak_memory, spread, versions
from plain import PlainTrainer, plain_loader
from torch.utils.flop_counter import FlopCounterMode

from folders import find_pictures
from network import LossNetwork, NetworkConfig, build_from_vgg
from train import TrainConfig
from training.sampling import PictureCache, TrainingPictures, training_batches
from training.step import TransferTrainer
from utils import errors_in_one_line, resolve_device, time_in_turns
from weights import load_vgg

ROOT = Path(__file__).parent.parent
PUBLISHED = {
    "ch_xor": {},  # the defaults
    "baseline": dict(encoder_lr=0.0, channel_loss_weight=0.0, xor_loss_weight=0.0),
    "uncorrelation": dict(uncorrelation_loss_weight=50.0, channel_loss_weight=0.0, xor_loss_weight=0.0),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU when there is one")
    parser.add_argument("--settings", nargs="+", choices=PUBLISHED, default=["ch_xor", "baseline"])
    parser.add_argument("--imsize", type=int, default=512)
    parser.add_argument("--cropsize", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto", help="of this trainer's step")
    parser.add_argument("--compile", action="store_true", help="time this trainer's step with torch.compile as well")
    parser.add_argument("--default_format", action="store_true", help="time it in the default memory format as well")
    parser.add_argument("--bilinear", action="store_true", help="time it with bilinear upsampling as well")
    parser.add_argument("--turns", type=int, default=7, help="timed turns behind each median")
    parser.add_argument("--steps", type=int, help="steps a turn (default: 20 on a GPU, 1 on the CPU)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each loader and end-to-end measurement")
    parser.add_argument("--num_workers", type=int, default=8, help="of this trainer's loader")
    parser.add_argument("--content_dir", type=Path, default=ROOT / "imgs" / "content", help="default: bundled pictures")
    parser.add_argument("--style_dir", type=Path, default=ROOT / "imgs" / "style", help="likewise")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------- step


def build_steps(arguments: argparse.Namespace, config: TrainConfig, device: torch.device) -> dict[str, Callable]:
    """The variants by name, all from the same weights; each takes content and style, (B, 3, H, W), uint8."""
    vgg, _ = load_vgg(config.backbone, "random", config.seed)

    def trainer(changed: TrainConfig, upsampling: str = "nearest") -> TransferTrainer:
        torch.manual_seed(config.seed)
        network = replace(NetworkConfig.full(config.backbone), upsampling=upsampling)
        loss_network = LossNetwork(config.backbone, weights=vgg)
        return TransferTrainer(build_from_vgg(network, vgg), loss_network, changed, device)

    first = trainer(config)
    plain = PlainTrainer(first.network.state_dict(), vgg, config.weights, config.learning_rates, config.l0_eps, device)
    steps = {"plain": plain.step, "this trainer": first.step}
    if arguments.default_format:
        steps["this trainer, default format"] = in_default_format(trainer(config)).step
    if arguments.bilinear:
        steps["this trainer, bilinear"] = trainer(config, "bilinear").step
    if arguments.compile:
        steps["this trainer, compiled"] = trainer(replace(config, compile=True)).step
    return steps


def in_default_format(trainer: TransferTrainer) -> TransferTrainer:
    """The trainer with every convolution in torch's default memory format, NCHW, see `step.ForwardPass`."""
    trainer.forward_pass.to(memory_format=torch.contiguous_format)
    trainer.forward_pass.formats = dict.fromkeys(trainer.forward_pass.formats, torch.contiguous_format)
    return trainer


def measure_steps(
    arguments: argparse.Namespace, config: TrainConfig, steps: dict[str, Callable], device: torch.device
) -> dict[str, dict]:
    """Rate and peak memory of every variant, and its operations by torch's counter, two a multiply-add."""
    generator = torch.Generator().manual_seed(1)
    shape = (config.batch_size, 3, config.cropsize, config.cropsize)
    pair = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(2)]
    count = arguments.steps or (20 if device.type == "cuda" else 1)

    def repeat(step: Callable) -> None:
        for _ in range(count):
            step(*pair)

    times = time_in_turns([partial(repeat, step) for step in steps.values()], arguments.turns, device)
    results = {}
    for (name, step), seconds in zip(steps.items(), times):
        result = results[name] = {"seconds": spread([each / count for each in seconds])}
        result["iterations_per_second"] = 1.0 / result["seconds"]["median"]
        result["ratio"] = results["plain"]["seconds"]["median"] / result["seconds"]["median"]
        result["peak_mib"] = peak_memory(partial(step, *pair), device)
        with FlopCounterMode(display=False) as counter:  # what is compiled, it does not see: the same step as without
            steps["this trainer" if name == "this trainer, compiled" else name](*pair)
        result["teraflop_per_step"] = counter.get_total_flops() / 1e12
    return results


# ------------------------------------------------------------------------------------------------- loader


def open_loader(
    config: TrainConfig, paths: list, cache: PictureCache | None, workers: int | None, device: torch.device
) -> Iterator:
    """(content, style), endless: from this trainer's loader, or where workers is None from the plain one."""
    if workers is None:
        yield from zip(*(plain_loader(folder, config.imsize, config.cropsize, config.batch_size) for folder in paths))
    pictures = TrainingPictures(paths, config, cache)
    for content, style, _ in training_batches(pictures, range(10**9), config.batch_size, workers,
                                              device.type == "cuda"):
        yield content, style


def from_host(step: Callable, device: torch.device) -> Callable:
    """The step for pictures that are not on the device yet."""
    return lambda *pictures: step(*(each.to(device, non_blocking=True) for each in pictures))


def rate(batches: Iterator, use: Callable, seconds: float, warmup: int, device: torch.device) -> float:
    """Iterations a second of drawing a batch and calling `use` with it, over `seconds` and 3 iterations or more."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(warmup):
        use(*next(batches))
    wait()
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < seconds:
        use(*next(batches))
        count += 1
    wait()
    return count / (time.perf_counter() - start)


def measure_rates(
    arguments: argparse.Namespace, config: TrainConfig, device: torch.device, paths: list,
    variants: dict[str, tuple[int | None, PictureCache | None, Callable]],
) -> dict[str, float]:
    """Iterations a second with the pictures coming from files. variants: by name, the loader's workers and cache, see
    `open_loader`, and what its batches are for."""
    rates = {}
    for name, (workers, cache, use) in variants.items():
        batches = open_loader(config, paths, cache, workers, device)
        rates[name] = rate(batches, use, arguments.seconds, max(3, 4 * (workers or 0)), device)
        batches.close()
    return rates


# ------------------------------------------------------------------------------------------------- report


def print_steps(setting: str, results: dict[str, dict]) -> None:
    print(f"\n{setting}: step on random pictures\n{'':30}{'it/s':>9}{'ratio':>8}{'s, median':>11}{'min':>8}{'max':>8}"
          f"{'TFLOP':>8}{'MiB':>8}")
    for name, each in results.items():
        seconds = each["seconds"]
        print(f"{name:30}{each['iterations_per_second']:9.2f}{each['ratio']:8.2f}{seconds['median']:11.4f}"
              f"{seconds['min']:8.4f}{seconds['max']:8.4f}{each['teraflop_per_step']:8.3f}{each['peak_mib']:8.0f}")


def print_rates(title: str, rates: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, each in rates.items():
        print(f"{name:30}{each:9.2f}{each / rates['plain']:8.2f}")


@errors_in_one_line()
def main() -> None:
    arguments = parse_arguments()
    device = resolve_device({"cpu": -1, "cuda": 0, None: None}[arguments.device])
    base = TrainConfig(imsize=arguments.imsize, cropsize=arguments.cropsize, batch_size=arguments.batch_size,
                       amp=arguments.amp)
    report = versions(device) | {"steps": {}, "end_to_end": {}}
    print(f"{report['device']}, torch {report['torch']}, Python {report['python']}")
    paths = [find_pictures(getattr(arguments, name), f"--{name}") for name in ("content_dir", "style_dir")]
    with tempfile.TemporaryDirectory() as folder:
        cache = PictureCache(Path(folder))
        for path in (*paths[0], *paths[1]):
            cache.open(path, max(base.imsize, base.cropsize))
        workers = arguments.num_workers
        report["loader"] = measure_rates(arguments, base, device, paths, {
            "plain": (None, None, lambda *_: None), "this loader": (workers, None, lambda *_: None),
            "this loader, cached": (workers, cache, lambda *_: None)})
        print_rates(f"loader alone, batches/s ({workers} workers; plain: none)", report["loader"])
        for name in arguments.settings:
            config = replace(base, **PUBLISHED[name])
            steps = build_steps(arguments, config, device)  # once: compiling takes minutes
            report["steps"][name] = measure_steps(arguments, config, steps, device)
            print_steps(name, report["steps"][name])
            report["end_to_end"][name] = measure_rates(arguments, config, device, paths, {
                variant: (None if variant == "plain" else workers, cache, from_host(step, device))
                for variant, step in steps.items()})
            print_rates(f"{name}: pictures from files, iterations/s", report["end_to_end"][name])
            del steps
            gc.collect()
    print(json.dumps(report))


if __name__ == "__main__":
    main()

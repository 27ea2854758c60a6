"""Time this trainer's step against a plain one (`plain.py`), and the loader against the step.

    python benchmarks/train_step.py                                      # GPU, published settings
    python benchmarks/train_step.py --compile                            # with torch.compile
    python benchmarks/train_step.py --device cpu --cropsize 128 --imsize 256

All in one process and run; variants take turns, so that a change in the machine's speed meets all alike. The
step runs on random pictures that are on the device already; the loader on generated JPEGs, or on the folders
given. Last line: everything as JSON.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from measure import matrix_product_peak, peak_memory, print_json, spread, versions, write_pictures
from plain import PlainTrainer, plain_loader
from torch.utils.flop_counter import FlopCounterMode

from folders import find_pictures
from network import NetworkConfig, build_from_vgg
from train import TrainConfig
from training.sampling import PictureCache, TrainingPictures, training_batches
from training.step import TransferTrainer
from utils import autocast_dtype, errors_in_one_line, resolve_device, time_in_turns
from weights import load_vgg

PUBLISHED = {
    "ch_xor": {},  # the defaults
    "baseline": dict(encoder_lr=0.0, channel_loss_weight=0.0, xor_loss_weight=0.0),
    "uncorrelation": dict(uncorrelation_loss_weight=50.0, channel_loss_weight=0.0, xor_loss_weight=0.0),
}
CONTENT_SIZE, STYLE_SIZE = (640, 480), (1600, 1200)  # pixels: MSCOCO's usual size, and a painting's


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
    parser.add_argument("--content_dir", type=Path, help="default: 200 generated JPEGs of 640 x 480")
    parser.add_argument("--style_dir", type=Path, help="default: 200 generated JPEGs of 1600 x 1200")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------- step


def build_steps(arguments: argparse.Namespace, config: TrainConfig, device: torch.device) -> dict[str, Callable]:
    """The variants by name, all from the same weights; each takes content and style, (B, 3, H, W), uint8."""
    vgg, _ = load_vgg(config.backbone, "random", config.seed)

    def trainer(changed: TrainConfig, upsampling: str = "nearest") -> TransferTrainer:
        torch.manual_seed(config.seed)
        network = replace(NetworkConfig.full(config.backbone), upsampling=upsampling)
        return TransferTrainer(*build_from_vgg(network, vgg), changed, device)

    first = trainer(config)
    plain = PlainTrainer(first.network.state_dict(), vgg, config.weights, config.learning_rates, config.l0_eps, device)
    steps = {"plain": plain.step}
    steps["this trainer"] = first.step
    if arguments.default_format:
        steps["this trainer, default format"] = in_default_format(trainer(config)).step
    if arguments.bilinear:
        steps["this trainer, bilinear"] = trainer(config, "bilinear").step
    if arguments.compile:
        steps["this trainer, compiled"] = trainer(replace(config, compile=True)).step
    return steps


def in_default_format(trainer: TransferTrainer) -> TransferTrainer:
    """The trainer with every convolution in torch's default memory format, NCHW; see `step.conv_format`."""
    trainer.forward_pass.to(memory_format=torch.contiguous_format)
    trainer.forward_pass.formats = dict.fromkeys(trainer.forward_pass.formats, torch.contiguous_format)
    return trainer


def step_dtype(config: TrainConfig, device: torch.device) -> str:
    """The data type of the trainer's convolutions."""
    return str(autocast_dtype(config.amp, device) or torch.float32).removeprefix("torch.")


def operations(step: Callable, content: torch.Tensor, style: torch.Tensor) -> int:
    """Floating-point operations of one step, two a multiply-add, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        step(content, style)
    return counter.get_total_flops()


def measure_steps(
    arguments: argparse.Namespace, config: TrainConfig, steps: dict[str, Callable], device: torch.device,
    peaks: dict[str, float],
) -> dict[str, dict]:
    """Rate, operations and memory of every variant. peaks: FLOP/s of a matrix product by data type."""
    generator = torch.Generator().manual_seed(1)
    shape = (config.batch_size, 3, config.cropsize, config.cropsize)
    content, style = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(2))
    count = arguments.steps or (20 if device.type == "cuda" else 1)

    def turn(step: Callable) -> Callable:
        def run():
            for _ in range(count):
                step(content, style)

        return run

    times = time_in_turns([turn(step) for step in steps.values()], arguments.turns, device)
    results = {}
    for (name, step), seconds in zip(steps.items(), times):
        result = results[name] = {"seconds": spread([each / count for each in seconds])}
        result["iterations_per_second"] = 1.0 / result["seconds"]["median"]
        result["ratio"] = results["plain"]["seconds"]["median"] / result["seconds"]["median"]
        eager = steps["this trainer"] if name == "this trainer, compiled" else step
        result["teraflop_per_step"] = operations(eager, content, style) / 1e12
        result["teraflop_per_second"] = result["teraflop_per_step"] * result["iterations_per_second"]
        dtype = result["dtype"] = "float32" if name.startswith("plain") else step_dtype(config, device)
        result["share_of_peak"] = result["teraflop_per_second"] * 1e12 / peaks[dtype]
        memory = peak_memory(lambda step=step: step(content, style), device)
        result["peak_mib"] = None if memory is None else memory / 2**20
    return results


# ------------------------------------------------------------------------------------------------- loader


def rate(batches: Iterator, use: Callable, seconds: float, warmup: int, device: torch.device) -> float:
    """Iterations a second of drawing a batch and calling `use` with it, over `seconds` and 3 iterations or more."""
    for _ in range(warmup):
        use(*next(batches))
    _wait(device)
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < seconds:
        use(*next(batches))
        count += 1
    _wait(device)
    return count / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_batches(config: TrainConfig, paths: list, cache: PictureCache | None, workers: int, pin: bool) -> Iterator:
    """(content, style) from this trainer's loader, endless."""
    pictures = TrainingPictures(*paths, config.crop, config.seed, cache)
    loader = training_batches(pictures, range(10**9), config.batch_size, workers, pin)
    return ((content, style) for content, style, _ in loader)


def measure_loader(
    arguments: argparse.Namespace, config: TrainConfig, device: torch.device, paths: list, cache: PictureCache
) -> dict[str, float]:
    """Batches a second, content and style together, that nobody waits for."""
    workers, warmup = arguments.num_workers, 8 * max(1, arguments.num_workers)

    def ignore(*_batch) -> None:
        pass

    plain = zip(*(plain_loader(folder, config.imsize, config.cropsize, config.batch_size) for folder in paths))
    results = {"plain": rate(plain, ignore, arguments.seconds, 1, device)}
    pin = device.type == "cuda"
    for name, used in (("this loader", None), ("this loader, cached", cache)):
        batches = own_batches(config, paths, used, workers, pin)
        results[name] = rate(batches, ignore, arguments.seconds, warmup, device)
        batches.close()
    return results


def fill_cache(cache: PictureCache, config: TrainConfig, paths: list) -> dict:
    """Decode every picture into the cache; what that took."""
    start = time.perf_counter()
    pictures = [path for folder in paths for path in folder]
    for path in pictures:
        cache.open(path, config.crop.shorter_side)
    size = sum(file.stat().st_size for file in cache.folder.glob("*/*.npy"))
    seconds = time.perf_counter() - start
    return {"pictures": len(pictures), "mib_per_picture": size / len(pictures) / 2**20,
            "milliseconds_per_picture": 1000.0 * seconds / len(pictures)}


def measure_end_to_end(
    arguments: argparse.Namespace, config: TrainConfig, steps: dict[str, Callable], device: torch.device, paths: list,
    cache: PictureCache,
) -> dict[str, float]:
    """Iterations a second with the pictures coming from files: plain loader and step, this loader and step."""
    plain = zip(*(plain_loader(folder, config.imsize, config.cropsize, config.batch_size) for folder in paths))
    results = {}
    for name, step in steps.items():
        is_plain = name.startswith("plain")
        batches = plain if is_plain else own_batches(config, paths, cache, arguments.num_workers,
                                                     device.type == "cuda")

        def use(content, style, step=step, overlap=not is_plain):
            step(content.to(device, non_blocking=overlap), style.to(device, non_blocking=overlap))

        results[name] = rate(batches, use, arguments.seconds, 3, device)
        if not is_plain:
            batches.close()
    return results


# ------------------------------------------------------------------------------------------------- report


def print_steps(setting: str, results: dict[str, dict]) -> None:
    print(f"\n{setting}: step on random pictures")
    print(f"{'':30}{'it/s':>9}{'ratio':>8}{'s, median':>11}{'min':>8}{'max':>8}{'TFLOP':>8}{'TFLOP/s':>9}{'of peak':>9}"
          f"{'MiB':>8}")
    for name, each in results.items():
        seconds, memory = each["seconds"], each["peak_mib"]
        print(f"{name:30}{each['iterations_per_second']:9.2f}{each['ratio']:8.2f}{seconds['median']:11.4f}"
              f"{seconds['min']:8.4f}{seconds['max']:8.4f}{each['teraflop_per_step']:8.3f}"
              f"{each['teraflop_per_second']:9.3f}{each['share_of_peak']:9.1%}"
              f"{'unknown' if memory is None else format(memory, '.0f'):>8}")


def print_rates(title: str, rates: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, each in rates.items():
        print(f"{name:30}{each:9.2f}{each / rates['plain']:8.2f}")


@errors_in_one_line
def main() -> None:
    arguments = parse_arguments()
    device = resolve_device({"cpu": -1, "cuda": 0, None: None}[arguments.device])
    base = TrainConfig(imsize=arguments.imsize, cropsize=arguments.cropsize, batch_size=arguments.batch_size,
                       amp=arguments.amp)
    configs = {name: replace(base, **PUBLISHED[name]) for name in arguments.settings}
    peaks = {dtype: matrix_product_peak(device, getattr(torch, dtype))
             for dtype in sorted({"float32", step_dtype(base, device)})}
    report = versions(device) | {"matrix_product_flop_per_second": peaks, "steps": {}, "end_to_end": {}}
    print(f"{report['device']}, torch {report['torch']}, torchvision {report['torchvision']}, "
          f"Python {report['python']}; matrix product: "
          + ", ".join(f"{peak / 1e12:.2f} TFLOP/s in {dtype}" for dtype, peak in peaks.items()))

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = [
            find_pictures(arguments.content_dir, "--content_dir") if arguments.content_dir
            else write_pictures(folder / "content", 200, CONTENT_SIZE, 0),
            find_pictures(arguments.style_dir, "--style_dir") if arguments.style_dir
            else write_pictures(folder / "style", 200, STYLE_SIZE, 1),
        ]
        cache = PictureCache(folder / "cache")
        cache.folder.mkdir()
        report["cache"] = fill_cache(cache, base, paths)
        report["loader"] = measure_loader(arguments, base, device, paths, cache)
        print_rates(f"loader alone, batches/s ({arguments.num_workers} workers; plain: none)", report["loader"])
        for name, config in configs.items():
            steps = build_steps(arguments, config, device)  # once: compiling takes minutes
            report["steps"][name] = measure_steps(arguments, config, steps, device, peaks)
            print_steps(name, report["steps"][name])
            rates = report["end_to_end"][name] = measure_end_to_end(arguments, config, steps, device, paths, cache)
            print_rates(f"{name}: pictures from files, iterations/s", rates)
            del steps
            gc.collect()
    print_json(report)


if __name__ == "__main__":
    sys.exit(main())

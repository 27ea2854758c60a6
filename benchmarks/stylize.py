"""Latency and peak memory of stylising with one or more model files.

    python benchmarks/stylize.py model-store/compact.pth model-store/ch_xor_pruned.pth full-vgg19

A name `full-vgg19` or `full-vgg16` stands for the unpruned network with random weights: times do not depend
on the weights. Random pictures, one pair at a time, float32; the models take turns. Last line: JSON.

    python benchmarks/stylize.py model-store/compact.pth --megapixels 4 12 24 100 --runs 3

With --megapixels, large pictures (25 : 16) in a style that is encoded already: in one piece, where the memory is there,
and in tiles, each in a process of its own. Memory is what that process takes beyond itself, the input and the output.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from measure import peak_memory, print_json, spread, versions

from network import (
    BACKBONES,
    NetworkConfig,
    StyleTransferNetwork,
    adain,
    channel_statistics,
    count_macs,
    count_parameters,
)
from painting.stylizer import Stylizer
from painting.tiling import TILES, least_tile, memory_needed
from utils import UserError, errors_in_one_line, free_memory, resolve_device, time_in_turns
from weights import load_network


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model file, folder of a run or a pruning, full-vgg19 or full-vgg16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU when there is one")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides of the pictures, pixels")
    parser.add_argument("--megapixels", type=float, nargs="+", help="sizes of large pictures, in place of --sizes")
    parser.add_argument("--tile", type=int, default=TILES[0], help="side of the tiles of large pictures, pixels")
    parser.add_argument("--runs", type=int, default=15, help="timed runs behind each median")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the process of one large picture
    return parser.parse_args()


def open_network(name: str) -> StyleTransferNetwork:
    if name.removeprefix("full-") in BACKBONES:
        return StyleTransferNetwork(NetworkConfig.full(name.removeprefix("full-"))).eval()
    return load_network(Path(name))[0]


@torch.inference_mode()
def measure(networks: dict[str, StyleTransferNetwork], size: int, runs: int, device: torch.device) -> dict[str, dict]:
    """Milliseconds and MiB by model: of a pair, and of a content picture whose style code is at hand."""
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, size, size, generator=generator).to(device) for _ in range(2))
    codes = {name: channel_statistics(network.encode(style)) for name, network in networks.items()}
    pair = {name: lambda net=net: net(content, style) for name, net in networks.items()}
    single = {name: lambda name=name, net=net: net.decoder(adain(net.encode(content), *codes[name]))
              for name, net in networks.items()}
    times = time_in_turns([*pair.values(), *single.values()], runs, device)
    results = {}
    for name, pair_times, single_times in zip(networks, times, times[len(networks) :]):
        memory = peak_memory(pair[name], device)
        results[name] = {
            "pair_ms": spread(pair_times, 1e-3),
            "content_ms": spread(single_times, 1e-3),
            "peak_mib": None if memory is None else memory / 2**20,
            "multiply_adds": count_macs(networks[name].config, size),
        }
    return results


def measure_large(name: str, megapixels: float, tile: int, runs: int, device: torch.device) -> dict:
    """Seconds and MiB of one large picture by one model; tile: 0 for one piece. Called in a process of its own."""
    stylizer = Stylizer(open_network(name), device=device, tile=tile or 2**31)
    height = round((megapixels * 1e6 * 16 / 25) ** 0.5)
    width = round(megapixels * 1e6 / height)
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randint(0, 256, (1, 3, *size), generator=generator, dtype=torch.uint8)
                      for size in ((height, width), (512, 512)))
    code = stylizer.encode_style(style)
    memory = peak_memory(lambda: stylizer.paint_picture(content, code), device)
    (times,) = time_in_turns([lambda: stylizer.paint_picture(content, code)], runs, device, warmup=0)
    if memory is not None and device.type == "cpu":
        memory -= 4 * height * width  # Pillow's picture
    return {"width": width, "height": height, "seconds": spread(times),
            "peak_mib": None if memory is None else memory / 2**20}


def run_large(arguments: argparse.Namespace, device: torch.device) -> dict:
    """`measure_large` by model, size and way, each in a process of its own; prints them. None: not enough memory."""
    results = {}
    print(f"{'megapixels':>10}  {'model':42}{'tiles':>8}{'seconds':>24}{'MiB':>8}")
    for megapixels in arguments.megapixels:
        for name in arguments.models:
            for tile in (0, arguments.tile):
                need, free = memory_needed(open_network(name).config, megapixels * 1e6), free_memory(device)
                result, shown = None, f"{'-':>24}{'-':>8}"
                if tile or free is None or need < free:
                    command = [sys.executable, __file__, name, "--alone", "--megapixels", megapixels, "--tile", tile,
                               "--runs", arguments.runs, "--device", device.type]
                    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
                    result = json.loads(done.stdout)
                    times, memory = result["seconds"], result["peak_mib"]
                    seconds = f"{times['median']:.1f} ({times['min']:.1f} to {times['max']:.1f})"
                    shown = f"{seconds:>24}{'unknown' if memory is None else f'{memory:.0f}':>8}"
                results.setdefault(f"{megapixels:g}", {}).setdefault(name, {})["tiled" if tile else "whole"] = result
                print(f"{megapixels:>10g}  {name[-42:]:42}{tile or 'none':>8}{shown}", flush=True)
    return results


@errors_in_one_line
def main() -> None:
    arguments = parse_arguments()
    device = resolve_device({"cpu": -1, "cuda": 0, None: None}[arguments.device])
    if arguments.alone:
        print_json(measure_large(*arguments.models, *arguments.megapixels, arguments.tile, arguments.runs, device))
        return
    networks = {name: open_network(name).to(device, memory_format=torch.channels_last) for name in arguments.models}
    least = max(least_tile(network.config) for network in networks.values())
    if arguments.tile < least:
        raise UserError(f"--tile {arguments.tile}: {least} pixels or more are needed")
    report = versions(device) | {"parameters": {name: count_parameters(net) for name, net in networks.items()},
                                 "sizes": {}}
    print(f"{report['device']}, torch {report['torch']}, Python {report['python']}; median (least to greatest) of "
          f"{arguments.runs} runs")
    if arguments.megapixels:
        print_json(report | {"tile": arguments.tile, "megapixels": run_large(arguments, device)})
        return
    print(f"{'side':>5}  {'model':42}{'parameters':>11}{'10^9 MAC':>10}{'pair, ms':>28}{'content only, ms':>28}"
          f"{'MiB':>7}")
    for size in arguments.sizes:
        results = report["sizes"][str(size)] = measure(networks, size, arguments.runs, device)
        for name, each in results.items():
            times = [f"{t['median']:.1f} ({t['min']:.1f} to {t['max']:.1f})"
                     for t in (each["pair_ms"], each["content_ms"])]
            memory = "unknown" if each["peak_mib"] is None else f"{each['peak_mib']:.0f}"
            print(f"{size:>5}  {name[-42:]:42}{report['parameters'][name]:>11,}{each['multiply_adds'] / 1e9:>10.2f}"
                  f"{times[0]:>28}{times[1]:>28}{memory:>7}")
    print_json(report)


if __name__ == "__main__":
    sys.exit(main())

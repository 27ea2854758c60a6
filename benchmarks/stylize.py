"""Latency and peak memory of stylising with one or more model files.

    python benchmarks/stylize.py model-store/compact.pth model-store/ch_xor_pruned.pth full-vgg19

A name `full-vgg19` or `full-vgg16` stands for the unpruned network with random weights: times do not depend
on the weights. Random pictures, one pair at a time, float32; the models take turns. Last line: JSON.

    python benchmarks/stylize.py model-store/compact.pth --megapixels 4 12 24 100 --runs 3

With --megapixels, large pictures (25 : 16) in a style that is encoded already: in one piece, where the memory is there,
and in tiles. Memory is what painting takes beside the network, the input and the output.
"""

import argparse
import json
from pathlib import Path

import torch
from measure import benchmark_parser, peak_memory, show_spread, spread, versions

from network import NetworkConfig, StyleTransferNetwork, align, count_macs, count_parameters, level_statistics
from painting.stylizer import Stylizer
from painting.tiling import TILES, memory_needed
from utils import errors_in_one_line, free_memory, resolve_device, time_in_turns
from weights import load_network


def parse_arguments() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("models", nargs="+", help="model file, folder of a run or a pruning, full-vgg19 or full-vgg16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides of the pictures, pixels")
    parser.add_argument("--megapixels", type=float, nargs="+", help="sizes of large pictures, in place of --sizes")
    parser.add_argument("--tile", type=int, default=TILES[0], help="side of the tiles of large pictures, pixels")
    parser.add_argument("--runs", type=int, default=15, help="timed runs behind each median")
    return parser.parse_args()


def open_network(name: str) -> StyleTransferNetwork:
    if name in ("full-vgg19", "full-vgg16"):
        return StyleTransferNetwork(NetworkConfig.full(name.removeprefix("full-"))).eval()
    return load_network(Path(name))[0]


@torch.inference_mode()
def measure(networks: dict[str, StyleTransferNetwork], size: int, runs: int, device: torch.device) -> dict[str, dict]:
    """Milliseconds and MiB by model: of a pair, and of a content picture whose style code is at hand."""
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randn(1, 3, size, size, generator=generator).to(device) for _ in range(2))
    codes = {name: level_statistics(network.encode(style)) for name, network in networks.items()}
    pair = {name: lambda net=net: net(content, style) for name, net in networks.items()}
    single = {name: lambda name=name, net=net: net.decoder(*align(net.encode(content), *codes[name]))
              for name, net in networks.items()}
    times = time_in_turns([*pair.values(), *single.values()], runs, device)
    return {name: {"pair_ms": spread(pair_times, 1e-3), "content_ms": spread(single_times, 1e-3),
                   "peak_mib": peak_memory(pair[name], device),
                   "multiply_adds": count_macs(networks[name].config, size)}
            for name, pair_times, single_times in zip(networks, times, times[len(networks) :])}


def measure_large(
    network: StyleTransferNetwork, megapixels: float, tile: int | None, runs: int, device: torch.device
) -> dict | None:
    """Seconds and MiB of one large picture; tile: None for one piece, for which the memory may not be there (None)."""
    if tile is None and memory_needed(network.config, megapixels * 1e6) > free_memory(device):
        return None
    height = round((megapixels * 1e6 * 16 / 25) ** 0.5)
    width = round(megapixels * 1e6 / height)
    stylizer = Stylizer(network, device=device, tile=tile or 2**31)
    generator = torch.Generator().manual_seed(0)
    content, style = (torch.randint(0, 256, (1, 3, *size), generator=generator, dtype=torch.uint8)
                      for size in ((height, width), (512, 512)))
    code = stylizer.encode_style(style)
    memory = peak_memory(lambda: stylizer.paint_picture(content, code), device)
    memory -= 4 * height * width / 2**20 * (device.type == "cpu")  # Pillow's picture
    (times,) = time_in_turns([lambda: stylizer.paint_picture(content, code)], runs, device, warmup=0)
    return {"width": width, "height": height, "seconds": spread(times), "peak_mib": memory}


@errors_in_one_line()
def main() -> None:
    arguments = parse_arguments()
    device = resolve_device(arguments.gpu_no)
    networks = {name: open_network(name).to(device, memory_format=torch.channels_last) for name in arguments.models}
    report = versions(device) | {"parameters": {name: count_parameters(net) for name, net in networks.items()},
                                 "tile": arguments.tile, "sizes": {}, "megapixels": {}}
    print(f"{report['device']}, torch {report['torch']}, Python {report['python']}; median (least to greatest) of "
          f"{arguments.runs} runs")
    print(f"{'megapixels':>10}  {'model':42}{'tiles':>8}{'seconds':>24}{'MiB':>8}" if arguments.megapixels else
          f"{'side':>10}  {'model':42}{'parameters':>11}{'10^9 MAC':>10}{'pair, ms':>28}{'content, ms':>28}{'MiB':>7}")
    for megapixels in arguments.megapixels or ():
        of_size = report["megapixels"][f"{megapixels:g}"] = {name: {} for name in networks}
        for name, network in networks.items():
            for way, tile in (("whole", None), ("tiled", arguments.tile)):
                each = of_size[name][way] = measure_large(network, megapixels, tile, arguments.runs, device)
                shown = f"{show_spread(each['seconds']):>24}{each['peak_mib']:>8.0f}" if each else f"{'-':>24}{'-':>8}"
                print(f"{megapixels:>10g}  {name[-42:]:42}{tile or 'none':>8}{shown}", flush=True)
    for size in () if arguments.megapixels else arguments.sizes:
        of_size = report["sizes"][str(size)] = measure(networks, size, arguments.runs, device)
        for name, each in of_size.items():
            print(f"{size:>10}  {name[-42:]:42}{report['parameters'][name]:>11,}{each['multiply_adds'] / 1e9:>10.2f}"
                  f"{show_spread(each['pair_ms']):>28}{show_spread(each['content_ms']):>28}{each['peak_mib']:>7.0f}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

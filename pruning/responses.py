"""How strongly every channel of a network responds to pictures: measured, kept in a file, read again."""

import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import normalize
from folders import FailedPictures, find_measured
from loss import L0_EPS, channel_norm, l0_norm
from network import NetworkConfig, StyleTransferNetwork, align, conv_layers, level_statistics, pad_to_stride
from painting.pairs import choose_pairs
from painting.stylizer import load_input
from utils import UserError, note, progress_bar, write_atomically

DECODED_AT_ONCE = 16  # pictures
IMPORTANCE_PROBES = 32  # backward passes that a channel's importance is estimated with
FOLDERS = ("content_dir", "style_dir")  # the fields of a PruneConfig that name folders of pictures


@dataclass(frozen=True)
class LayerResponses:
    """What the channels of one conv do, after its ReLU, over everything measured.

    l2: (n, C), l2 norms for n pictures (encoder) or pairs (decoder). smallest, largest, mean: (C,), over every
    position of all of them; the bottleneck's mean is that of the decoder's input, over the pairs.
    importance: (C,), see `_estimate_importance`.
    """

    l2: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    mean: np.ndarray
    importance: np.ndarray

    @property
    def off(self) -> np.ndarray:
        """Indices of the channels that are exactly zero everywhere."""
        return np.flatnonzero((self.smallest == 0) & (self.largest == 0))

    @property
    def constant(self) -> np.ndarray:
        """Indices of the channels that have exactly one value other than zero everywhere."""
        return np.flatnonzero((self.smallest == self.largest) & (self.largest != 0))


@dataclass(frozen=True)
class Responses:
    """l2 norms of the bottleneck channels: l2 (n, C), rows in the order of `paths`, content before style.

    layers: the responses of every conv that can be cut, by name; empty where only the bottleneck was measured.
    pairs: paths of a content and a style picture each, which were set aside: they are not among those measured.
    """

    l2: np.ndarray
    paths: list[str]
    contents: int
    layers: dict[str, LayerResponses] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def off_for_all(self) -> np.ndarray:
        """Indices of the channels that are zero for every picture."""
        return np.flatnonzero((self.l2 == 0).all(axis=0))

    @property
    def off_for_some(self) -> np.ndarray:
        """Indices of the channels that are zero for at least one picture."""
        return np.flatnonzero((self.l2 == 0).any(axis=0))

    @property
    def weakest_first(self) -> np.ndarray:
        """Channel indices by their l2 norm summed over all pictures, smallest first."""
        return np.argsort(self.l2.sum(axis=0, dtype=np.float64), kind="stable")

    def save(self, path: Path) -> None:
        arrays = {"l2": self.l2, "l0": l0_norm(torch.from_numpy(self.l2), L0_EPS).numpy(), "contents": self.contents}
        arrays |= {name: np.array(list(getattr(self, name)), str) for name in ("paths", "pairs", "layers")}
        arrays |= {f"{name}.{key}": array for name, layer in self.layers.items() for key, array in vars(layer).items()}
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: Path, network: NetworkConfig, every_layer: bool = False) -> "Responses":
        """Read what `save` wrote; older files have no pairs. Raises UserError when the file is none, or was measured on
        other widths than the network's, or with `every_layer` on the bottleneck alone."""
        try:
            with np.load(path, allow_pickle=False) as file:
                layers = {str(name): LayerResponses(*(file[f"{name}.{each.name}"] for each in fields(LayerResponses)))
                          for name in file.get("layers", ())}
                pairs = [tuple(map(str, pair)) for pair in file.get("pairs", ())]
                found = cls(file["l2"], [str(each) for each in file["paths"]], int(file["contents"]), layers, pairs)
            for layer in conv_layers(network, size=0)[:-1] if every_layer else ():
                measured = layers[layer.name].l2.shape[1] if layer.name in layers else 0
                if measured != layer.width:
                    raise ValueError(f"{measured} channels of {layer.name} were measured, the network has "
                                     f"{layer.width}; prune_layers all and prune_macs need a file that they wrote")
            if found.l2.shape != (len(found.paths), network.bottleneck_width):
                raise ValueError(f"l2 has shape {found.l2.shape} for {len(found.paths)} pictures, the network has "
                                 f"{network.bottleneck_width} bottleneck channels")
        # NumPy passes on what the zip reader, zlib and the array parser met in a damaged file.
        except Exception as error:
            raise UserError(f"responses {path}: not the responses.npz of this network ({error})") from error
        return found


def choose_pictures(config) -> tuple[dict[str, list[Path]], list[tuple[str, str]]]:
    """Up to `prune_images` pictures of each folder to measure, by the name of its flag, and up to `pairs` pairs of
    others, set aside to see what a cut changes that they had no part in: at most a quarter of a folder or one picture,
    none where it has no other. Always the same ones of the same folders. Raises UserError for folders without pictures.
    """
    measured, aside = {}, []
    for name in FOLDERS:
        paths = find_measured(getattr(config, name), f"--{name}", config.holdout, config.save_path)
        order = random.Random(0).sample(paths, len(paths))
        wanted, kept = min(config.pairs, max(1, len(paths) // 4), len(paths) - 1), []
        while len(kept) < wanted and len(order) > 1:
            path = order.pop()
            try:
                load_input(path, config, name)
                kept.append(str(path))
            except UserError as error:
                note(f"skipped {error}")
        measured[name] = sorted(order[: config.prune_images])
        aside.append(kept)
    numbers = choose_pairs(*map(len, aside), min(config.pairs, len(aside[0]) * len(aside[1])), seed=0)
    return measured, [(aside[0][content], aside[1][style]) for content, style in numbers]


def _load(paths: list[Path], config, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every picture that can be used: its path, and its pixels, (1, 3, H, W), uint8; the others are noted. name: of the
    folder's flag. Raises UserError when over 10% of the pictures fail."""
    failed = FailedPictures(getattr(config, name), f"--{name}", len(paths))
    with ThreadPoolExecutor() as pool, progress_bar(len(paths), f"measure {name}", "picture") as bar:
        for start in range(0, len(paths), DECODED_AT_ONCE):
            chunk = paths[start : start + DECODED_AT_ONCE]
            for path, loading in [(path, pool.submit(load_input, path, config, name)) for path in chunk]:
                bar.update()
                try:
                    yield str(path), loading.result()
                except UserError as error:
                    failed.add(path, str(error))
    note(failed.summary())


@torch.inference_mode()
def measure_responses(network: StyleTransferNetwork, config, pictures: dict[str, list[Path]],
                      pairs: list[tuple[str, str]]) -> Responses:
    """The l2 norm of every bottleneck channel for each picture; with `config.every_layer` the responses of every conv
    that can be cut, those of the decoder while it paints content i in style i, the shorter list starting over, so that
    every picture occurs.

    pictures, pairs: of `choose_pictures`. Raises UserError when over 10% of the pictures of a folder fail.
    """
    summaries = {name: {} for name in FOLDERS}  # by picture
    codes, painted, contents = [], [], len(pictures["content_dir"])

    def paint(levels: list[Tensor], styles: Iterable[tuple[Tensor, Tensor]]) -> None:
        for code in styles:
            aligned = align(levels, *code, config.style_strength)
            painted.append(_summarise([aligned[0], *network.decoder.features(*aligned)[:-1]]))

    for name in reversed(FOLDERS):  # each content is painted in styles that are encoded already
        for number, (path, picture) in enumerate(_load(pictures[name], config, name)):
            features = _encode(network, picture, config.every_layer)
            summaries[name][path] = _summarise(features)
            if config.every_layer:
                levels = [features[conv] for conv in network.config.level_convs]
                if name == "style_dir":
                    codes.append(level_statistics(levels))
                else:
                    paint(levels, codes[number::contents] or [codes[number % len(codes)]])
    for unusable in range(number + 1, contents) if config.every_layer else ():
        paint(levels, codes[unusable::contents])  # in place of contents that cannot be used, the last one

    of_pictures = [summary for name in FOLDERS for summary in summaries[name].values()]
    encoder, decoder = ([torch.stack(conv) for conv in zip(*each)] for each in (of_pictures, painted))  # (n, 4, C)
    content_paths, style_paths = paths = [[*summaries[name]] for name in FOLDERS]
    layers = {}
    if config.every_layer:
        means = [found[:, 3].mean(dim=0) for found in encoder[:-1] + decoder]  # the bottleneck's: behind AdaIN
        most = max(map(len, paths))
        numbers = [place * most // IMPORTANCE_PROBES for place in range(IMPORTANCE_PROBES)]  # evenly spread
        probes = ([load_input(Path(each[number % len(each)]), config, name) for name, each in zip(FOLDERS, paths)]
                  for number in numbers)
        importance = _estimate_importance(network, probes, means, config.style_strength)
        for layer, found, *more in zip(conv_layers(network.config, size=0), encoder + decoder[1:], means, importance):
            values = found[:, 0], found[:, 1].amin(dim=0), found[:, 2].amax(dim=0), *more
            layers[layer.name] = LayerResponses(*(each.cpu().numpy() for each in values))
    return Responses(encoder[-1][:, 0].cpu().numpy(), content_paths + style_paths, len(content_paths), layers, pairs)


def _encode(network: StyleTransferNetwork, pictures: Tensor, every_layer: bool = True) -> list[Tensor]:
    """The features of the encoder's convs after their ReLUs, (B, C, H, W) each; of the bottleneck alone without
    `every_layer`. pictures: (B, 3, H, W), uint8."""
    weight = next(network.parameters())
    image = pad_to_stride(normalize(pictures.to(weight.device)).to(weight.dtype), network.config.stride)
    return network.encoder.features(image, convs=None if every_layer else network.config.level_convs[:1])


def _summarise(features: list[Tensor]) -> list[Tensor]:
    """The l2 norm, the smallest, the largest and the mean value of every channel, (4, C), of each (1, C, H, W)."""
    return [torch.stack([channel_norm(feature)[0], feature.amin(dim=(0, 2, 3)), feature.amax(dim=(0, 2, 3)),
                         feature.mean(dim=(0, 2, 3))]) for feature in features]


@torch.inference_mode(False)
def _estimate_importance(network: StyleTransferNetwork, pairs: Iterable[Sequence[Tensor]], means: list[Tensor],
                         strength: float) -> list[Tensor]:
    """How much the output changes when a channel is replaced by its mean: squared, to first order, (C,) for each conv;
    summed over the pixels and colours of the normalised output, averaged over the pairs.

    pairs: IMPORTANCE_PROBES content and style pictures of one size, (1, 3, H, W), uint8. means: (C,) for each conv.

    A channel f becomes mean + g * (f - mean), with the gate g = 1 to keep it and 0 to cut it (gates and their gradient:
    Molchanov et al., arXiv 1906.10771). The squared gradient of <v, output> by g, for random normal v, is the squared
    first-order change in the mean (Hutchinson's estimator), so that one backward pass serves all channels of all convs.
    By the chain rule that gradient is <d <v, output> / d f, f - mean>. Zero padding in the encoder makes the mean a
    worse substitute along the border, which is not counted.
    """
    generator = torch.Generator().manual_seed(0)
    importance = [torch.zeros_like(mean) for mean in means]
    for pair in progress_bar(IMPORTANCE_PROBES, "rank channels", "pair", iterable=pairs):
        with torch.enable_grad():
            encoded = _encode(network, torch.cat(pair))  # (2, C, H, W) each
            content_features, style_features = zip(*(encoded[conv].split(1) for conv in network.config.level_convs))
            aligned = align(content_features, *level_statistics(style_features), strength)
            *painted, output = network.decoder.features(*aligned)
            direction = torch.randn(output.shape, generator=generator).to(output.device)
            features = [*encoded[:-1], aligned[0], *painted]
            gradients = torch.autograd.grad((output * direction).sum(), features)
        for total, feature, mean, gradient in zip(importance, features, means, gradients):
            change = (gradient * (feature.detach() - mean[:, None, None])).sum(dim=(0, 2, 3))
            total += change.square() / IMPORTANCE_PROBES
    return importance

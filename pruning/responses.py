"""How strongly every channel of a network responds to pictures: measured, kept in a file, read again."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import FailedPictures, PictureError, find_measured, normalize, prepare_picture
from loss import L0_EPS, channel_norm, l0_norm
from network import (
    NetworkConfig,
    StyleTransferNetwork,
    adain,
    bottleneck_conv,
    channel_statistics,
    conv_layers,
)
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
        """Indices of the channels that have one value other than zero everywhere: largest equals smallest exactly."""
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
        for name, layer in self.layers.items():
            arrays |= {f"{name}.{key}": array for key, array in vars(layer).items()}
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: Path, network: NetworkConfig, every_layer: bool = False) -> "Responses":
        """Read what `save` wrote; older files have no pairs. Raises UserError when the file is none, or was measured on
        other widths than the network's, or with `every_layer` on the bottleneck alone."""
        try:
            with np.load(path, allow_pickle=False) as file:
                keys = [each.name for each in fields(LayerResponses)]
                layers = {str(name): LayerResponses(*(file[f"{name}.{key}"] for key in keys))
                          for name in file.get("layers", ())}
                pairs = [tuple(map(str, pair)) for pair in file.get("pairs", ())]
                found = cls(file["l2"], [str(each) for each in file["paths"]], int(file["contents"]), layers, pairs)
            if found.l2.ndim != 2 or len(found.l2) != len(found.paths):
                raise ValueError(f"l2 has shape {found.l2.shape} for {len(found.paths)} pictures")
        # NumPy passes on what the zip reader, zlib and the array parser met in a damaged file.
        except Exception as error:
            raise UserError(f"responses {path}: not a responses.npz of this tool ({type(error).__name__}: "
                            f"{error})") from error
        if found.l2.shape[1] != network.bottleneck_width:
            raise UserError(f"responses {path}: measured on {found.l2.shape[1]} channels, the network has "
                            f"{network.bottleneck_width}")
        if every_layer and not layers:
            raise UserError(f"responses {path}: holds the bottleneck only; prune_layers all and prune_macs need one "
                            "that was measured with them")
        for layer in conv_layers(network, size=0)[:-1] if every_layer else ():
            if layer.name not in layers:
                raise UserError(f"responses {path}: not measured on {layer.name}")
            for key, array in vars(layers[layer.name]).items():
                if array.ndim != (2 if key == "l2" else 1) or array.shape[-1] != layer.width:
                    raise UserError(f"responses {path}: {layer.name}.{key} has shape {array.shape}, the network has "
                                    f"{layer.width} channels there")
        return found


# ------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Pictures:
    """The pictures of a pruning, by the name of their folder's flag: those to measure, and pairs of others."""

    measured: dict[str, list[Path]]
    pairs: list[tuple[str, str]]


def choose_pictures(config) -> Pictures:
    """Up to `prune_images` pictures of each folder to measure, and up to `pairs` pairs of others, set aside to see what
    a cut changes that they had no part in: at most a quarter of a folder, none where it has one picture.

    config: a PruneConfig. Always the same ones of the same folders. Raises UserError for folders without pictures.
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
    return Pictures(measured, [(aside[0][content], aside[1][style]) for content, style in numbers])


def _load(paths: list[Path], config, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every picture that can be used: its path, and its pixels, (1, 3, H, W), uint8; the others are noted.

    name: of the folder's flag. Raises UserError when over 10% of the pictures, or all of them, fail.
    """
    def load(path: Path) -> Tensor | PictureError:
        try:
            return prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
        except PictureError as error:
            return error

    failed = FailedPictures(getattr(config, name), f"--{name}", len(paths))
    with ThreadPoolExecutor() as pool, progress_bar(len(paths), f"measure {name}", "picture") as bar:
        for start in range(0, len(paths), DECODED_AT_ONCE):
            chunk = paths[start : start + DECODED_AT_ONCE]
            for path, picture in zip(chunk, pool.map(load, chunk)):
                bar.update()
                if isinstance(picture, PictureError):
                    failed.add(path, str(picture))
                else:
                    yield str(path), picture
    if len(failed.paths) == len(paths):
        raise UserError(f"{name} {getattr(config, name)}: none of {len(paths)} pictures can be used")
    note(failed.summary())


# --------------------------------------------------------------------------------------------- measurement


@torch.inference_mode()
def measure_responses(network: StyleTransferNetwork, config, pictures: Pictures) -> Responses:
    """The l2 norm of every bottleneck channel for each picture; with `config.every_layer` the responses of every conv
    that can be cut, those of the decoder while it paints content i in style i, the shorter list starting over, so that
    every picture occurs.

    config: a PruneConfig. Raises UserError when over 10% of the pictures of a folder, or all of them, fail.
    """
    device, bottleneck = next(network.parameters()).device, bottleneck_conv(network.config)
    convs = [layer.name for layer in conv_layers(network.config, size=0) if layer.kind != "output"]
    rows, paths, codes, means = defaultdict(list), {name: [] for name in FOLDERS}, [], []

    def record(conv: str, feature: Tensor) -> None:
        values = feature.float().flatten(2)[0]  # (C, H*W)
        parts = (channel_norm(feature)[0], values.amin(dim=1), values.amax(dim=1), values.mean(dim=1))
        rows[conv].append(torch.stack(parts))  # (4, C)

    with watch(network, convs if config.every_layer else [bottleneck], record):
        for path, picture in _load(pictures.measured["style_dir"], config, "style_dir"):
            codes.append(channel_statistics(network.encode(normalize(picture.to(device)))))
            paths["style_dir"].append(path)
        contents = len(pictures.measured["content_dir"])
        for path, picture in _load(pictures.measured["content_dir"], config, "content_dir"):
            feature = network.encode(normalize(picture.to(device)))
            number = len(paths["content_dir"])
            paths["content_dir"].append(path)
            for code in (codes[number::contents] or [codes[number % len(codes)]]) if config.every_layer else ():
                aligned = adain(feature, *code, config.style_strength)
                means.append(aligned.mean(dim=(0, 2, 3)))
                network.decoder(aligned)

    styles = len(codes)
    stacked = {conv: torch.stack(rows[conv]) for conv in convs if conv in rows}  # (n, 4, C) each
    for conv in stacked:
        if conv.startswith("encoder"):
            stacked[conv] = stacked[conv].roll(-styles, dims=0)  # content before style
    layers = {}
    if config.every_layer:
        mean_of = {conv: found[:, 3].mean(dim=0) for conv, found in stacked.items()}
        mean_of[bottleneck] = torch.stack(means).mean(dim=0)
        importance = _estimate_importance(network, _probes(paths, config), mean_of, config.style_strength)
        layers = {conv: LayerResponses(*(each.cpu().numpy() for each in (
            found[:, 0], found[:, 1].amin(dim=0), found[:, 2].amax(dim=0), mean_of[conv], importance[conv])))
            for conv, found in stacked.items()}
    return Responses(stacked[bottleneck][:, 0].cpu().numpy(), paths["content_dir"] + paths["style_dir"],
                     len(paths["content_dir"]), layers, pictures.pairs)


@contextmanager
def watch(network: StyleTransferNetwork, convs: list[str], visit: Callable[[str, Tensor], Tensor | None]):
    """Within the block `visit(conv, feature)` gets the output of the ReLU after each of `convs`, (B, C, H, W).

    What it returns goes on in place of the output, unless that is None. The ReLUs are hooked, not the convs: the
    decoder fuses a conv with the upsampling before it and never calls it.
    """
    handles = []
    for conv in convs:
        block, _, index = conv.rpartition(".")
        relu = network.get_submodule(f"{block}.{int(index) + 1}")
        handles.append(relu.register_forward_hook(lambda _module, _inputs, output, conv=conv: visit(conv, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probes(paths: dict[str, list[str]], config) -> Iterator[tuple[Tensor, Tensor]]:
    """IMPORTANCE_PROBES of the measured pairs, evenly spread: a content and a style picture, (1, 3, H, W), uint8."""
    count = max(map(len, paths.values()))
    for place in range(IMPORTANCE_PROBES):
        number = place * count // IMPORTANCE_PROBES
        content, style = (load_input(Path(paths[name][number % len(paths[name])]), config, name) for name in FOLDERS)
        yield content, style


@torch.inference_mode(False)
def _estimate_importance(
    network: StyleTransferNetwork, pairs: Iterable[tuple[Tensor, Tensor]], means: dict[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """How much the output changes when a channel is replaced by its mean: squared, to first order, by conv, (C,).

    pairs: IMPORTANCE_PROBES content and style pictures, (1, 3, H, W), uint8. means: by conv, (C,).

    A channel f becomes mean + g * (f - mean), with the gate g = 1 to keep it and 0 to cut it (gates and their
    gradient: Molchanov et al., arXiv 1906.10771). J = d output / d g is the first-order change of the whole
    picture, and the squared gradient of <v, output> by g, for random normal v, is |J|^2 in the mean (Hutchinson's
    estimator): one backward pass serves all channels of all convs, in one unit. Summed over the pixels and colours
    of the normalised output, averaged over the pairs. That zero padding in the encoder makes the mean a
    worse substitute along the border is not in it.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    means = {name: mean.clone()[:, None, None] for name, mean in means.items()}  # (C, 1, 1)
    bottleneck = bottleneck_conv(network.config)
    importance = {name: torch.zeros(len(mean), device=device) for name, mean in means.items()}
    gates = {name: torch.ones_like(mean, requires_grad=True) for name, mean in means.items()}

    def gated(conv: str, feature: Tensor) -> Tensor:
        return torch.lerp(means[conv], feature, gates[conv])

    others = [conv for conv in means if conv != bottleneck]
    bar = progress_bar(IMPORTANCE_PROBES, "rank channels", "pair")
    with bar, watch(network, others, gated), torch.enable_grad():
        for content, style in pairs:
            features = [network.encode(normalize(each.to(device))) for each in (content, style)]
            aligned = adain(features[0], *channel_statistics(features[1]), strength)
            output = network.decoder(gated(bottleneck, aligned))
            direction = torch.randn(output.shape, generator=generator).to(device)
            for conv, gradient in zip(gates, torch.autograd.grad((output * direction).sum(), list(gates.values()))):
                importance[conv] += gradient.flatten().square() / IMPORTANCE_PROBES
            bar.update()
    return importance

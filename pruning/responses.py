"""How strongly every channel of a network responds to pictures: measured, kept in a file, read again."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import FailedPictures, PictureError, find_measured, normalize, prepare_picture
from loss import L0_EPS, channel_norm, l0_norm
from network import ConvLayer, StyleTransferNetwork, adain, bottleneck_conv, channel_statistics, conv_layers
from utils import UserError, note, progress_bar, write_atomically

LOADING_CHUNK = 16  # pictures decoded ahead
IMPORTANCE_PROBES = 32  # backward passes that a channel's importance is estimated with


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
    """

    l2: np.ndarray
    paths: list[str]
    contents: int
    layers: dict[str, LayerResponses] = field(default_factory=dict)

    @property
    def always_zero(self) -> np.ndarray:
        """Indices of the channels that are zero for every picture."""
        return np.flatnonzero((self.l2 == 0).all(axis=0))

    @property
    def ever_zero(self) -> np.ndarray:
        """Indices of the channels that are zero for at least one picture."""
        return np.flatnonzero((self.l2 == 0).any(axis=0))

    @property
    def weakest_first(self) -> np.ndarray:
        """Channel indices by their l2 norm summed over all pictures, smallest first."""
        return np.argsort(self.l2.sum(axis=0, dtype=np.float64), kind="stable")

    def save(self, path: Path) -> None:
        arrays = {"l2": self.l2, "l0": l0_norm(torch.from_numpy(self.l2), L0_EPS).numpy(),
                  "paths": np.array(self.paths), "contents": np.array(self.contents)}
        if self.layers:
            arrays["layers"] = np.array(list(self.layers))
        for name, layer in self.layers.items():
            arrays |= {f"{name}.{key}": array for key, array in vars(layer).items()}
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: Path, width: int) -> "Responses":
        """Raises UserError when the file is none, or was measured on a network of another width."""
        try:
            with np.load(path, allow_pickle=False) as file:
                keys = [each.name for each in fields(LayerResponses)]
                names = [str(name) for name in file["layers"]] if "layers" in file else []
                layers = {name: LayerResponses(*(file[f"{name}.{key}"] for key in keys))
                          for name in names}
                responses = cls(file["l2"], [str(each) for each in file["paths"]], int(file["contents"]), layers)
        # NumPy passes on what the zip reader, zlib and the array parser met in a damaged file.
        except Exception as error:
            raise UserError(f"--responses {path}: not a responses.npz of this tool ({type(error).__name__}: "
                            f"{error})") from error
        if responses.l2.ndim != 2 or len(responses.l2) != len(responses.paths):
            raise UserError(f"--responses {path}: not a responses.npz of this tool (l2 has shape "
                            f"{responses.l2.shape} for {len(responses.paths)} pictures)")
        if responses.l2.shape[1] != width:
            raise UserError(f"--responses {path}: measured on {responses.l2.shape[1]} channels, "
                            f"the network has {width}")
        return responses

    def check_layers(self, path: Path, wanted: list[ConvLayer]) -> None:
        """Raises UserError when these responses, of the file `path`, lack a conv of `wanted` or are of other widths."""
        if not self.layers:
            raise UserError(f"--responses {path}: holds the bottleneck only; --prune_layers all and --prune_macs need "
                            "one that was measured with them")
        for layer in wanted:
            if layer.name not in self.layers:
                raise UserError(f"--responses {path}: not measured on {layer.name}")
            for key, array in vars(self.layers[layer.name]).items():
                if array.ndim != (2 if key == "l2" else 1) or array.shape[-1] != layer.width:
                    raise UserError(f"--responses {path}: {layer.name}.{key} has shape {array.shape}, "
                                    f"the network has {layer.width} channels there")


# ------------------------------------------------------------------------------------------------ pictures


def _load_ahead(paths: list[Path], config) -> Iterator[tuple[Path, Tensor | PictureError]]:
    """Decode pictures in threads, a chunk ahead of their use."""

    def load(path: Path):
        try:
            return prepare_picture(path, config.imsize, config.cropsize, config.max_pixels)
        except PictureError as error:
            return error

    with ThreadPoolExecutor() as pool:
        chunks = [paths[start : start + LOADING_CHUNK] for start in range(0, len(paths), LOADING_CHUNK)]
        pending = [pool.submit(load, path) for path in chunks[0]]
        for chunk, following in zip(chunks, [*chunks[1:], []]):
            ready, pending = pending, [pool.submit(load, path) for path in following]
            yield from zip(chunk, (future.result() for future in ready))


def _load_again(paths: list[str], config) -> Iterator[Tensor]:
    """Pictures that could be used a moment ago. Raises UserError when one no longer can."""
    for path, picture in _load_ahead([Path(path) for path in paths], config):
        if isinstance(picture, PictureError):
            raise UserError(f"{path} changed while it was measured: {picture}")
        yield picture


# --------------------------------------------------------------------------------------------- measurement


def find_folders(config) -> dict[str, list[Path]]:
    """The pictures to measure, by the flag of their folder. config: a PruneConfig. Raises UserError as `find_measured`
    does."""
    return {flag: find_measured(folder, flag, config.holdout, config.save_path)
            for flag, folder in (("--content_dir", config.content_dir), ("--style_dir", config.style_dir))}


@torch.inference_mode()
def measure_responses(network: StyleTransferNetwork, config, folders: dict[str, list[Path]]) -> Responses:
    """The l2 norm of every bottleneck channel for up to `prune_images` pictures of each folder.

    config: a PruneConfig; folders: of `find_folders`. With `config.every_layer` the other layers are measured too, see
    `_measure_pairs`.
    A picture that cannot be used is skipped with its path logged. Raises UserError when over 10% of a
    folder's chosen pictures, or all of them, fail.
    """
    device = next(network.parameters()).device
    encoder_convs = [layer.name for layer in conv_layers(network.config, size=0) if layer.name.startswith("encoder")]
    statistics = defaultdict(list)
    watched = _watch(network, encoder_convs, _record_in(statistics)) if config.every_layer else nullcontext()
    rows, used = [], []
    style_codes = []
    counts = []
    with watched:
        for flag, paths in folders.items():
            folder = getattr(config, flag[2:])
            if len(paths) > config.prune_images:
                paths = sorted(random.Random(0).sample(paths, config.prune_images))
            failed = FailedPictures(folder, flag, len(paths))
            with progress_bar(len(paths), f"measure {flag[2:]}", "picture") as bar:
                for path, picture in _load_ahead(paths, config):
                    bar.update()
                    if isinstance(picture, PictureError):
                        failed.add(path, str(picture))
                        continue
                    feature = network.encode(normalize(picture.to(device)))
                    rows.append(channel_norm(feature)[0].cpu())
                    used.append(str(path))
                    if config.every_layer and flag == "--style_dir":
                        style_codes.append(channel_statistics(feature))
            counts.append(len(paths) - len(failed.paths))
            if not counts[-1]:
                raise UserError(f"{flag} {folder}: none of {len(paths)} pictures can be used")
            note(failed.summary())
    layers = {}
    if config.every_layer:
        layers = _measure_pairs(network, used[: counts[0]], used[counts[0] :], style_codes, statistics, config)
    return Responses(torch.stack(rows).numpy(), used, counts[0], layers)


@contextmanager
def _watch(network: StyleTransferNetwork, convs: list[str], visit: Callable[[str, Tensor], Tensor | None]):
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


def _record_in(statistics: dict[str, list[Tensor]]) -> Callable[[str, Tensor], None]:
    """A visitor that appends l2 norm, smallest, largest and mean of every channel, (4, C), to its conv's list."""

    def record(conv: str, feature: Tensor) -> None:
        values = feature.float().flatten(2)[0]  # (C, H*W)
        rows = (channel_norm(feature)[0], values.amin(dim=1), values.amax(dim=1), values.mean(dim=1))
        statistics[conv].append(torch.stack(rows))

    return record


def _measure_pairs(
    network: StyleTransferNetwork, contents: list[str], styles: list[str], style_codes: list, statistics: dict, config
) -> dict[str, LayerResponses]:
    """The responses of every conv that can be cut: what is recorded of the encoder, and the decoder's over pairs.

    Content i is paired with style i, the shorter list starting over, so that every picture occurs.
    statistics: what `_record_in` collected of the encoder; the decoder's are added.
    """
    device = next(network.parameters()).device
    layers = [layer for layer in conv_layers(network.config, size=0) if layer.kind != "output"]
    bottleneck = bottleneck_conv(network.config)
    decoder_convs = [layer.name for layer in layers if layer.kind == "decoder"]
    pairs = [(number % len(contents), number % len(styles)) for number in range(max(len(contents), len(styles)))]
    bottleneck_means = []
    bar = progress_bar(len(pairs), "measure pairs", "pair")
    with bar, _watch(network, decoder_convs, _record_in(statistics)):
        pictures = _load_again([contents[content] for content, _ in pairs], config)
        for (_, style), picture in zip(pairs, pictures):
            feature = network.encode(normalize(picture.to(device)))
            aligned = adain(feature, *style_codes[style], config.style_strength)
            bottleneck_means.append(aligned.mean(dim=(0, 2, 3)))
            network.decoder(aligned)
            bar.update()
    stacked = {name: torch.stack(rows) for name, rows in statistics.items()}  # (n, 4, C) each
    means = {name: rows[:, 3].mean(dim=0) for name, rows in stacked.items()}
    means[bottleneck] = torch.stack(bottleneck_means).mean(dim=0)

    probed = [pairs[place * len(pairs) // IMPORTANCE_PROBES] for place in range(IMPORTANCE_PROBES)]
    pictures = zip(_load_again([contents[content] for content, _ in probed], config),
                   _load_again([styles[style] for _, style in probed], config))
    importance = _estimate_importance(network, pictures, means, config.style_strength)
    return {
        name: LayerResponses(
            l2=rows[:, 0].cpu().numpy(),
            smallest=rows[:, 1].amin(dim=0).cpu().numpy(),
            largest=rows[:, 2].amax(dim=0).cpu().numpy(),
            mean=means[name].cpu().numpy(),
            importance=importance[name].cpu().numpy(),
        )
        for name, rows in stacked.items()
    }


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
    with bar, _watch(network, others, gated), torch.enable_grad():
        for content, style in pairs:
            features = [network.encode(normalize(each.to(device))) for each in (content, style)]
            aligned = adain(features[0], *channel_statistics(features[1]), strength)
            output = network.decoder(gated(bottleneck, aligned))
            direction = torch.randn(output.shape, generator=generator).to(device)
            for conv, gradient in zip(gates, torch.autograd.grad((output * direction).sum(), list(gates.values()))):
                importance[conv] += gradient.flatten().square() / IMPORTANCE_PROBES
            bar.update()
    return importance

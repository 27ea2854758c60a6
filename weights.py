"""Where weights are from: VGG sources, and model files in and out."""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from data import IMAGENET_MEAN, IMAGENET_STD
from network import BACKBONES, LossNetwork, NetworkConfig, StyleTransferNetwork, conv_layers
from utils import CHECKPOINT_FORMAT, CHECKPOINT_NAME, UserError, load_checkpoint

MODEL_STORE = Path(__file__).parent / "model-store"
BUNDLED_VGG19 = MODEL_STORE / "vgg19_features.pth"
COMPACT_MODEL = MODEL_STORE / "compact.pth"  # what test mode uses where no model is named
VGG_SOURCES = ("imagenet", "bundled", "random")
SAFETENSORS = ".safetensors"
STUDENT_NAME, PRUNED_NAME = "student.pth", "pruned.pth"  # what distill and prune mode write beside CHECKPOINT_NAME
# What torch puts before a tensor's name: DataParallel and DistributedDataParallel, torch.compile, sharding, activation
# checkpoints. No module of our networks is called so.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


# ---------------------------------------------------------------------------------------- VGG weights


def conv_indices(backbone: str) -> list[int]:
    """Index in torchvision's `vgg.features` of each conv that training needs, in order."""
    with torch.device("meta"):
        layers = LossNetwork(backbone).layers
    return [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]


def load_vgg(backbone: str, source: str, seed: int = 0) -> tuple[dict[str, Tensor], str]:
    """VGG weights up to the deepest tap of the loss network, for `--vgg_weights source`.

    source: imagenet, bundled, random, or the path of a .pth or .safetensors file with torchvision's keys
    (`features.N.weight`), or with those of an AdaIN program's vgg_normalised.pth. Returns the float32 tensors keyed
    `<N>.weight`, `<N>.bias`, and a line that says where they are from. Raises UserError when they cannot be had;
    nothing is ever replaced.
    """
    if source == "random":
        return _random_vgg(backbone, seed), f"random (He initialisation, zero-sum filters, seed {seed})"
    if source == "imagenet":
        weights, origin = _imagenet_vgg(backbone)
    else:
        path = BUNDLED_VGG19 if source == "bundled" else Path(source)
        if source == "bundled" and backbone != "vgg19":
            raise UserError(f"vgg_weights bundled: there are bundled weights for vgg19, not for {backbone}")
        if source == "bundled" and not path.exists():
            raise UserError(f"vgg_weights bundled: {path} is not there; use imagenet, random or a path")
        weights, origin = _read_vgg(path), f"{source} ({_digest(path)})"
        if _is_adain_vgg(weights):
            weights = fold_adain_vgg(weights)
    wanted = {f"features.{name}": tensor for name, tensor in LossNetwork(backbone).layers.state_dict().items()}
    _check_tensors(f"vgg_weights {source}", weights, wanted, f"a {backbone} file with torchvision's keys up to "
                   f"{list(wanted)[-1]}, or AdaIN's vgg_normalised.pth with {ADAIN_VGG_KEYS}, is needed")
    return {name.removeprefix("features."): weights[name].float() for name in wanted}, origin


def _read_vgg(path: Path) -> dict:
    is_safetensors = path.suffix == SAFETENSORS
    tensors = _read_safetensors(path, "vgg_weights")[0] if is_safetensors else load_checkpoint(path, "vgg_weights")
    if "29.weight" not in tensors and {"0.weight", "28.weight", "28.bias"} <= tensors.keys():
        # A copy of an AdaIN program's that numbers its last conv without the padding before it.
        tensors |= {f"29.{kind}": tensors.pop(f"28.{kind}") for kind in ("weight", "bias")}
    return tensors


def _digest(path: Path) -> str:
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def same_vgg(first: str | None, second: str | None) -> bool:
    """Whether two origins of `load_vgg` name the same weights: by the files' SHA-256, wherever they lay. Where an older
    run has none, by the words before it."""
    if first is None or second is None:
        return first == second
    digests = [re.search(r"sha256 (\w+)", origin) for origin in (first, second)]
    if all(digests):
        return digests[0][1] == digests[1][1]
    return first.split(", sha256")[0].rstrip(")") == second.split(", sha256")[0].rstrip(")")


def _random_vgg(backbone: str, seed: int) -> dict[str, Tensor]:
    """He initialisation with filters that sum to zero over their input channels, after the first conv.

    ReLU outputs are positive, so plain He filters pass on mostly a constant: nine layers deep, all pictures
    look alike and the zero padding's border stands out most. Zero-sum filters see what differs. The gain
    keeps activations of order one: the variance of a rectified unit normal is 1/2 - 1/(2 pi).
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in LossNetwork(backbone).layers.state_dict().items():
        if tensor.dim() == 1:
            weights[name] = torch.zeros_like(tensor)
            continue
        weight = torch.randn(tensor.shape, generator=generator)
        is_first = tensor.shape[1] == 3
        if not is_first:
            weight -= weight.mean(dim=1, keepdim=True)
        variance = 0.5 if is_first else 0.5 - 0.5 / math.pi
        weights[name] = weight / (variance * tensor[0].numel()) ** 0.5
    return weights


def _imagenet_vgg(backbone: str) -> tuple[dict[str, Tensor], str]:
    import torchvision.models

    entry = getattr(torchvision.models, f"{backbone.upper()}_Weights").IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(entry.url, file, hash_prefix=file.stem.rsplit("-")[-1], progress=True)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the download's hash is wrong
        raise UserError(
            f"vgg_weights imagenet: {file.name} is neither in {file.parent} nor could it be downloaded "
            f"({error}); put the file there, or use bundled, random or a path"
        ) from error
    # Not by torchvision's own loader: it would run code pickled in a file of that name.
    return load_checkpoint(file, flag="vgg_weights imagenet:"), f"imagenet (torchvision {entry}, {_digest(file)})"


def _read_safetensors(path: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what is written beside them. Raises UserError, naming `flag`, when it is none."""
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{flag} {path}: not a safetensors file ({error})") from error


def _check_tensors(source: str, found: dict, wanted: dict[str, Tensor], needed: str) -> None:
    """Raises UserError, with what is `needed`, for a tensor that is missing, of another shape or not finite."""
    for name, tensor in wanted.items():
        actual = found.get(name)
        if not isinstance(actual, Tensor):
            others = [str(each) for each in found if str(each).endswith(name)]
            raise UserError(f"{source}: no tensor {name}{f', but {others[0]}' if others else ''}; {needed}")
        if actual.shape != tensor.shape:
            raise UserError(f"{source}: {name} has shape {tuple(actual.shape)}, not {tuple(tensor.shape)}; {needed}")
        if not actual.isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not finite")


# ------------------------------------------------------------------------- weights of AdaIN programs

# The 3x3 convs in the files of pytorch-AdaIN, numbered as in nn.Sequential. Those of decoder.pth are our decoder's. In
# vgg_normalised.pth a 1x1 conv before them brings RGB of 0..1 to its own scale, and others may follow relu4_1.
ADAIN_DECODER = (1, 5, 8, 11, 14, 18, 21, 25, 28)
ADAIN_VGG = (2, 5, 9, 12, 16, 19, 22, 25, 29)
ADAIN_VGG_KEYS = f"a 1x1 conv called 0 and 3x3 convs {', '.join(map(str, ADAIN_VGG))}"


def _keys(indices: Iterable[int]) -> list[str]:
    return [f"{index}.{kind}" for index in indices for kind in ("weight", "bias")]


def _is_adain_vgg(tensors: dict) -> bool:
    if not all(isinstance(tensors.get(key), Tensor) for key in _keys((0, *ADAIN_VGG))):
        return False
    colours, first = (tensors["0.weight"].shape, tensors["0.bias"].shape), tensors["2.weight"].shape
    return colours == ((3, 3, 1, 1), (3,)) and first[1:] == (3, 3, 3)


def _is_adain_decoder(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() == set(_keys(ADAIN_DECODER)) and len(tensors["28.weight"]) == len(tensors["28.bias"]) == 3


def fold_adain_vgg(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The convs of a vgg_normalised.pth to relu4_1 by torchvision's keys, for ImageNet-normalised RGB: the first takes
    in the 1x1 conv and the normalisation. The function is the same where the encoder pads by reflection; a constant
    that the 1x1 conv adds does not end at the border as it would with zeros."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD))
    matrix, offset = tensors["0.weight"].double().flatten(1), tensors["0.bias"].double()  # (3, 3), (3,)
    weight, bias = tensors["2.weight"], tensors["2.bias"]  # (C, 3, 3, 3), (C,)
    shift = weight.double().sum(dim=(2, 3)) @ (matrix @ mean + offset)
    first = {"2.weight": torch.einsum("cihw,ij->cjhw", weight.double(), matrix * std).to(weight),
             "2.bias": (bias.double() + shift).to(bias)}
    return {f"features.{ours}": (tensors | first)[theirs]
            for ours, theirs in zip(_keys(conv_indices("vgg19")), _keys(ADAIN_VGG))}


def join_adain(decoder: dict[str, Tensor], vgg: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the network whose decoder is a decoder.pth and whose encoder is `vgg`, from `fold_adain_vgg`.
    The last conv takes in that our pictures are normalised and the decoder's are RGB of 0..1."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD))
    weight, bias = decoder["28.weight"], decoder["28.bias"]
    last = {"28.weight": (weight.double() / std.view(3, 1, 1, 1)).to(weight), "28.bias": ((bias - mean) / std).to(bias)}
    return ({name.replace("features", "encoder.layers.0"): tensor for name, tensor in vgg.items()}
            | {f"decoder.layers.0.{name}": tensor for name, tensor in (decoder | last).items()})


def _load_adain(source: str, decoder: dict[str, Tensor], vgg_weights: str | None) -> dict:
    """The checkpoint dictionary of a decoder.pth and the vgg_normalised.pth at `vgg_weights`. Raises UserError."""
    needed = f"its vgg_normalised.pth is needed, with {ADAIN_VGG_KEYS}"
    if vgg_weights in (None, *VGG_SOURCES):
        raise UserError(f"vgg_weights {vgg_weights or 'is missing'}: {source} is the decoder of an AdaIN program, "
                        f"{needed}")
    vgg = _read_vgg(Path(vgg_weights))
    if not _is_adain_vgg(vgg):
        raise UserError(f"vgg_weights {vgg_weights} is no encoder of {source}, {needed}")
    return {"state_dict": join_adain(decoder, fold_adain_vgg(vgg)),
            "vgg_weights": f"{vgg_weights} ({_digest(Path(vgg_weights))})"}


# ---------------------------------------------------------------------------------------- model files


def model_checkpoint(network: StyleTransferNetwork, dtype: torch.dtype = torch.float32, **more) -> dict:
    """The checkpoint dictionary of a network: plain types and tensors of `dtype`, enough to rebuild it."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    return {"format": CHECKPOINT_FORMAT, "config": network.config.to_dict(), "state_dict": tensors, **more}


# What a file says beside its tensors and configuration: test mode compares it with what it measures by.
ORIGINS = ("iteration", "vgg_weights", "train_config")


def pack_safetensors(network: StyleTransferNetwork, checkpoint: dict) -> bytes:
    """A model file in the safetensors format: `model_checkpoint` with all but the tensors as JSON in its metadata.

    checkpoint: what the network was loaded from; its ORIGINS go along.
    """
    from safetensors.torch import save

    origins = {name: checkpoint[name] for name in ORIGINS if checkpoint.get(name) is not None}
    values = model_checkpoint(network, **origins)
    return save(values.pop("state_dict"), {name: json.dumps(value) for name, value in values.items()})


def _read_model(path: Path, flag: str) -> dict:
    """The checkpoint dictionary of a model file, in torch's format or as `pack_safetensors` made it.

    A safetensors file without our metadata is taken for a bare state_dict. Raises UserError, naming `flag`.
    """
    if path.suffix != SAFETENSORS:
        return load_checkpoint(path, flag)
    tensors, metadata = _read_safetensors(path, flag)
    try:
        values = {name: json.loads(metadata[name]) for name in ("format", "config", *ORIGINS) if name in metadata}
    except ValueError as error:
        raise UserError(f"{flag} {path}: the metadata is no JSON ({error})") from error
    return {"state_dict": tensors, **values}


def find_model_file(path: Path, flag: str = "--load_path") -> Path:
    """`path` itself, or, when it is the folder of a run or a pruning, the model file in it."""
    path = Path(path)
    if path.is_dir():
        for name in (STUDENT_NAME, CHECKPOINT_NAME, PRUNED_NAME):  # the checkpoint of a student is no model file
            if (path / name).is_file():
                return path / name
        raise UserError(f"{flag} {path}: the folder holds neither {CHECKPOINT_NAME} nor {PRUNED_NAME} nor "
                        f"{STUDENT_NAME}")
    return path


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


def load_network(
    path: Path, swap_max_pool: bool = False, flag: str = "--load_path", vgg_weights: str | None = None
) -> tuple[StyleTransferNetwork, dict]:
    """Rebuild the network in a model file, full or pruned, on the CPU, in float32 and evaluation mode.

    Files of the original implementation hold only `state_dict`, or are a state_dict themselves: widths are read off
    the tensors, and `swap_max_pool` says that the encoder was trained with average pooling, which no tensor shows.
    Tensors may be named as in a wrapped network, see `unwrap_names`. The decoder.pth of an AdaIN program gets its
    encoder from the vgg_normalised.pth that `vgg_weights` names.
    Returns the network and the whole checkpoint dictionary. Raises UserError, naming `flag`, when it is
    no model.
    """
    path = find_model_file(path, flag)
    checkpoint = _read_model(path, flag)
    if "state_dict" not in checkpoint and _holds_tensors(checkpoint):
        checkpoint = {"state_dict": checkpoint}
    if not _holds_tensors(checkpoint.get("state_dict")):
        found = ", ".join(sorted(map(str, checkpoint))[:5]) or "nothing"
        raise UserError(f"{flag} {path}: no model (a dictionary with a state_dict of tensors is needed, or the "
                        f"state_dict itself; found {found})")
    state_dict = unwrap_names(f"{flag} {path}", checkpoint["state_dict"])
    is_adain = _is_adain_decoder(state_dict)
    if is_adain:
        checkpoint = _load_adain(f"{flag} {path}", state_dict, vgg_weights)
        state_dict = checkpoint["state_dict"]
    try:
        config = (NetworkConfig.from_dict(checkpoint["config"]) if "config" in checkpoint
                  else _config_from_tensors(state_dict, "avg" if swap_max_pool else "max"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{flag} {path}: no style-transfer network ({error})") from error
    if is_adain:
        config = replace(config, padding="reflect")
    if swap_max_pool and config.pooling != "avg":
        raise UserError(f"swap_max_pool: {path} was made with {config.pooling} pooling; leave the flag out")
    with torch.device("meta"):  # a file may claim any width: nothing is allocated before its tensors bear it out
        wanted = StyleTransferNetwork(config).state_dict()
    _check_tensors(f"{flag} {path}", state_dict, wanted, "its configuration says so")
    if extra := state_dict.keys() - wanted.keys():
        raise UserError(f"{flag} {path}: the tensor {min(extra)} belongs to no layer of this network")
    network = StyleTransferNetwork(config)
    network.load_state_dict(state_dict)
    return network.eval(), checkpoint


def load_teacher(
    path: Path, student: NetworkConfig, vgg_weights: str | None = None
) -> tuple[StyleTransferNetwork, dict]:
    """`load_network` of `--teacher`. Raises UserError when its bottleneck is not as large as the student's."""
    teacher, checkpoint = load_network(path, flag="--teacher", vgg_weights=vgg_weights)
    if teacher.config.stride != student.stride:
        raise UserError(f"teacher {path} is a {teacher.config.backbone} network, with a bottleneck of "
                        f"1/{teacher.config.stride} of the side; this {student.backbone} has 1/{student.stride}")
    return teacher, checkpoint


def _holds_tensors(value) -> bool:
    """Whether it is a dictionary of tensors, one at least."""
    return isinstance(value, dict) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def unwrap_names(source: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without WRAPPERS: of the whole network, of a part of it, several around each other.

    Raises UserError, naming `source`, when a tensor is there twice, with a wrapper and without.
    """
    names = {key: ".".join(part for part in str(key).split(".") if part not in WRAPPERS) for key in state_dict}
    first = {}
    for key, name in names.items():
        if first.setdefault(name, key) != key:
            raise UserError(f"{source}: prefixes are mixed, {first[name]} and {key} are one tensor of the network")
    return {name: state_dict[key] for key, name in names.items()}


def _config_from_tensors(state_dict: dict[str, Tensor], pooling: str) -> NetworkConfig:
    """Read backbone and widths off the conv tensors. Raises ValueError when they fit no backbone."""
    found = {name.removesuffix(".weight"): tensor.shape[0] for name, tensor in state_dict.items() if tensor.dim() == 4}
    for backbone in BACKBONES:
        config = NetworkConfig.full(backbone, pooling)
        convs = [layer.name for layer in conv_layers(config, size=0)]
        if found.keys() == set(convs):
            return config.with_widths([found[conv] for conv in convs])
    others = [name for name in found if not name.startswith(("encoder.layers.0.", "decoder.layers.0."))]
    raise ValueError(f"its {len(found)} convs, {(others or [*found, 'none'])[0]} among them, are those of neither "
                     f"{' nor '.join(BACKBONES)} nor AdaIN's decoder.pth, {', '.join(map(str, ADAIN_DECODER))}")

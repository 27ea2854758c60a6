"""Where weights are from: VGG sources, and model files in and out."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision.models
from torch import Tensor

from data import IMAGENET_MEAN, IMAGENET_STD
from network import BACKBONES, LossNetwork, NetworkConfig, StyleTransferNetwork, conv_layers
from utils import CHECKPOINT_FORMAT, CHECKPOINT_NAME, STDERR, UserError, load_checkpoint

RGB_MEAN, RGB_STD = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD))
MODEL_STORE = Path(__file__).parent / "model-store"
BUNDLED_VGG19 = MODEL_STORE / "vgg19_features.pth"
COMPACT_MODEL = MODEL_STORE / "compact.pth"  # what test mode uses where no model is named
VGG_SOURCES = ("imagenet", "bundled", "random")
SAFETENSORS = ".safetensors"
STUDENT_NAME, PRUNED_NAME = "student.pth", "pruned.pth"  # what distill and prune mode write beside CHECKPOINT_NAME
# What a file says beside its tensors and configuration: test mode compares it with what it measures by.
ORIGINS = ("iteration", "vgg_weights", "train_config")
# What torch puts before a tensor's name: DataParallel and DistributedDataParallel, torch.compile, sharding, activation
# checkpoints. No module of our networks is called so.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


# ---------------------------------------------------------------------------------------- VGG weights


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
        if source == "bundled" and backbone != "vgg19":
            raise UserError(f"vgg_weights bundled: there are bundled weights for vgg19, not for {backbone}")
        path = BUNDLED_VGG19 if source == "bundled" else Path(source)
        weights, origin = as_torchvision(_read_vgg(path)), f"{source} ({_digest(path)})"
    wanted = {f"features.{name}": tensor for name, tensor in LossNetwork(backbone).layers.state_dict().items()}
    _check_tensors(f"vgg_weights {source}", weights, wanted, f"a {backbone} file with torchvision's keys up to "
                   f"{list(wanted)[-1]}, or AdaIN's vgg_normalised.pth with {ADAIN_VGG_KEYS}, is needed")
    return {name.removeprefix("features."): weights[name].float() for name in wanted}, origin


def _read_vgg(path: Path) -> dict:
    content = _read_file(path, "vgg_weights")
    tensors = content["state_dict"] if _holds_tensors(content.get("state_dict")) else content
    if "29.weight" not in tensors and {"0.weight", "28.weight", "28.bias"} <= tensors.keys():
        # A copy of an AdaIN program's that numbers its last conv without the padding before it.
        tensors |= {f"29.{kind}": tensors.pop(f"28.{kind}") for kind in ("weight", "bias")}
    return tensors


def _digest(path: Path) -> str:
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def same_vgg(first: str | None, second: str | None) -> bool:
    """Whether two origins of `load_vgg` name the same weights: by the files' SHA-256, wherever they lay. Where an older
    run has none, by the words before it."""
    digests = [re.search(r"sha256 (\w+)", origin or "") for origin in (first, second)]
    if all(digests):
        return digests[0][1] == digests[1][1]
    words = [re.sub(r",? ?\(?sha256 \w+|\)$", "", origin or "") for origin in (first, second)]
    return words[0] == words[1]


def _random_vgg(backbone: str, seed: int) -> dict[str, Tensor]:
    """He initialisation with filters that sum to zero over their input channels, after the first conv.

    ReLU outputs are positive, so that plain He filters pass on mostly a constant: nine layers deep, all pictures look
    alike. The gain keeps activations of order one: the variance of a rectified unit normal is 1/2 - 1/(2 pi).
    """
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, tensor in LossNetwork(backbone).layers.state_dict().items():
        weights[name], variance = torch.zeros_like(tensor), 0.5
        if tensor.dim() == 4:
            weight = torch.randn(tensor.shape, generator=generator)
            if tensor.shape[1] > 3:
                weight -= weight.mean(dim=1, keepdim=True)
                variance -= 0.5 / math.pi
            weights[name] = weight / (variance * tensor[0].numel()) ** 0.5
    return weights


def _imagenet_vgg(backbone: str) -> tuple[dict[str, Tensor], str]:
    entry = getattr(torchvision.models, f"{backbone.upper()}_Weights").IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(entry.url, file, hash_prefix=file.stem.rsplit("-")[-1],
                                           progress=STDERR.isatty())
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the download's hash is wrong
        raise UserError(f"vgg_weights imagenet: {file.name} is neither in {file.parent} nor could it be downloaded "
                        f"({error}); put the file there, or use bundled, random or a path") from error
    # Not by torchvision's own loader: it would run code pickled in a file of that name.
    return load_checkpoint(file, flag="vgg_weights imagenet:"), f"imagenet (torchvision {entry}, {_digest(file)})"


def _read_file(path: Path, flag: str) -> dict:
    """The dictionary in a file of torch's format, or as `pack_safetensors` made it; tensors alone are its `state_dict`.
    Raises UserError, naming `flag`."""
    if path.suffix.lower() != SAFETENSORS:
        content = load_checkpoint(path, flag)
        return {"state_dict": content} if _holds_tensors(content) else content
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        values = {name: json.loads(metadata[name]) for name in ("config", *ORIGINS) if name in metadata}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{flag} {path}: not a safetensors file ({error})") from error
    except ValueError as error:
        raise UserError(f"{flag} {path}: the metadata is no JSON ({error})") from error
    return {"state_dict": tensors, **values}


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
VGG19 = (0, 2, 5, 7, 10, 12, 14, 16, 19)  # the same convs in torchvision's `vgg.features`
ADAIN_VGG_KEYS = f"a 1x1 conv called 0 and 3x3 convs {', '.join(map(str, ADAIN_VGG))}"


def _keys(indices: Iterable[int]) -> list[str]:
    return [f"{index}.{kind}" for index in indices for kind in ("weight", "bias")]


def _is_adain_vgg(tensors: dict) -> bool:
    if not _holds_tensors(tensors) or not set(_keys((0, *ADAIN_VGG))) <= tensors.keys():
        return False
    colours, offset, weight, bias = (tuple(tensors[key].shape) for key in _keys((0, 2)))
    return (colours, offset) == ((3, 3, 1, 1), (3,)) and weight == (*bias, 3, 3, 3)


def for_normalised_rgb(weight: Tensor, bias: Tensor, matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """A conv that takes ImageNet-normalised RGB where the given one takes matrix @ RGB + offset, RGB of 0..1. What its
    zero padding stands for changes; with padding by reflection the function is the same.

    weight: (C, 3, 3, 3); bias: (C,); matrix: (3, 3); offset: (3,).
    """
    exact, matrix = weight.double(), matrix.double()
    shift = exact.sum(dim=(2, 3)) @ (matrix @ RGB_MEAN + offset.double())
    return torch.einsum("cihw,ij->cjhw", exact, matrix * RGB_STD).to(weight), (bias.double() + shift).to(bias)


def as_torchvision(tensors: dict) -> dict:
    """The tensors by torchvision's keys; of a vgg_normalised.pth, the convs to relu4_1, for ImageNet-normalised RGB."""
    if not _is_adain_vgg(tensors):
        return tensors
    colours = tensors["0.weight"].flatten(1), tensors["0.bias"]
    first = dict(zip(_keys([2]), for_normalised_rgb(tensors["2.weight"], tensors["2.bias"], *colours)))
    return {f"features.{ours}": (tensors | first)[theirs] for ours, theirs in zip(_keys(VGG19), _keys(ADAIN_VGG))}


def join_adain(decoder: dict[str, Tensor], vgg: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the network whose decoder is a decoder.pth and whose encoder is `vgg`, by torchvision's keys.
    The last conv takes in that our pictures are normalised and the decoder's are RGB of 0..1."""
    weight, bias = decoder["28.weight"], decoder["28.bias"]
    last = {"28.weight": (weight.double() / RGB_STD.view(3, 1, 1, 1)).to(weight),
            "28.bias": ((bias - RGB_MEAN) / RGB_STD).to(bias)}
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
    return {"state_dict": join_adain(decoder, as_torchvision(vgg)),
            "vgg_weights": f"{vgg_weights} ({_digest(Path(vgg_weights))})"}


# ---------------------------------------------------------------------------------------- model files


def model_checkpoint(network: StyleTransferNetwork, dtype: torch.dtype = torch.float32, **more) -> dict:
    """The checkpoint dictionary of a network: plain types and tensors of `dtype`, enough to rebuild it."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    return {"format": CHECKPOINT_FORMAT, "config": asdict(network.config), "state_dict": tensors, **more}


def pack_safetensors(network: StyleTransferNetwork, checkpoint: dict) -> bytes:
    """A model file in the safetensors format: `model_checkpoint` with all but the tensors as JSON in its metadata.

    checkpoint: what the network was loaded from; its ORIGINS go along.
    """
    from safetensors.torch import save

    origins = {name: checkpoint[name] for name in ORIGINS if checkpoint.get(name) is not None}
    values = model_checkpoint(network, **origins)
    return save(values.pop("state_dict"), {name: json.dumps(value) for name, value in values.items()})


def find_model_file(path: Path, flag: str = "--load_path") -> Path:
    """`path` itself, or, when it is the folder of a run or a pruning, the model file in it."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = (STUDENT_NAME, CHECKPOINT_NAME, PRUNED_NAME)  # the checkpoint of a student is no model file
    for file in filter(Path.is_file, map(path.joinpath, names)):
        return file
    raise UserError(f"{flag} {path}: the folder holds neither {' nor '.join(names)}")


def model_names(paths: Iterable[str]) -> list[str]:
    """A name for each path of a model, unique without regard to case: the name of the file (without .pth) or folder,
    led by as many folders above it as tell all apart; as the last resort, by its number. Bytes of another encoding,
    which no table or plot can show, are signs for them."""
    shown = [os.fsencode(os.path.abspath(path)).decode(errors="replace") for path in paths]
    parts = [path.removesuffix(".pth").split(os.sep)[1:] for path in shown]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len({name.casefold() for name in names}) == len(names):
            return names
    return [f"{number}-{each[-1]}" for number, each in enumerate(parts, 1)]


def load_network(path: Path, swap_max_pool: bool = False, backbone: str | None = None, vgg_weights: str | None = None,
                 flag: str = "--load_path") -> tuple[StyleTransferNetwork, dict]:
    """The network in a model file, full or pruned, on the CPU, in float32 and evaluation mode, and the whole checkpoint
    dictionary. Raises UserError, naming `flag`, when it is no model, or not of the `backbone` that is asked for.

    Files of the original implementation hold only `state_dict`, or are a state_dict themselves: widths are read off
    the tensors, and `swap_max_pool` says that the encoder was trained with average pooling, which no tensor shows.
    The decoder.pth of an AdaIN program gets its encoder from the vgg_normalised.pth that `vgg_weights` names.
    """
    path = find_model_file(path, flag)
    checkpoint = _read_file(path, flag)
    if not _holds_tensors(checkpoint.get("state_dict")):
        found = ", ".join(sorted(map(str, checkpoint))[:5]) or "nothing"
        raise UserError(f"{flag} {path}: no model (a dictionary with a state_dict of tensors is needed, or the "
                        f"state_dict itself; found {found})")
    state_dict = unwrap_names(f"{flag} {path}", checkpoint["state_dict"])
    is_adain = (state_dict.keys() == set(_keys(ADAIN_DECODER))
                and len(state_dict["28.weight"]) == len(state_dict["28.bias"]) == 3)
    if is_adain:
        checkpoint = _load_adain(f"{flag} {path}", state_dict, vgg_weights)
        state_dict = checkpoint["state_dict"]
    try:
        config = (NetworkConfig(**checkpoint["config"]) if "config" in checkpoint else _config_from_tensors(
            state_dict, pooling="avg" if swap_max_pool else "max", padding="reflect" if is_adain else "zeros"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{flag} {path}: no style-transfer network ({error})") from error
    if backbone not in (None, config.backbone):
        raise UserError(f"backbone {backbone}: {path} is a {config.backbone} network")
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


def _holds_tensors(value) -> bool:
    """Whether it is a dictionary of tensors, one at least."""
    return isinstance(value, dict) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def unwrap_names(source: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without WRAPPERS. Raises UserError, naming `source`, when a tensor is there twice."""
    unwrapped = {}
    for key, tensor in state_dict.items():
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if name in unwrapped:
            raise UserError(f"{source}: prefixes are mixed, {key} is there twice, with and without them")
        unwrapped[name] = tensor
    return unwrapped


def _config_from_tensors(state_dict: dict[str, Tensor], pooling: str, padding: str) -> NetworkConfig:
    """Read backbone and widths off the conv tensors. Raises ValueError when they fit no backbone."""
    found = {name.removesuffix(".weight"): tensor.shape[0] for name, tensor in state_dict.items() if tensor.dim() == 4}
    for backbone in BACKBONES:
        config = replace(NetworkConfig.full(backbone, pooling), padding=padding)
        convs = [layer.name for layer in conv_layers(config, size=0)]
        if found.keys() == set(convs):
            return config.with_widths([found[conv] for conv in convs])
    others = [name for name in found if not name.startswith(("encoder.layers.0.", "decoder.layers.0."))]
    raise ValueError(f"its {len(found)} convs, {(others or [*found, 'none'])[0]} among them, are those of neither "
                     f"{' nor '.join(BACKBONES)} nor AdaIN's decoder.pth, {', '.join(map(str, ADAIN_DECODER))}")

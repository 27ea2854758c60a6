"""Where weights are from: VGG sources, and model files in and out."""

import hashlib
import math
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from cost import conv_layers
from network import BACKBONES, LossNetwork, NetworkConfig, StyleTransferNetwork
from utils import CHECKPOINT_FORMAT, CHECKPOINT_NAME, UserError, load_checkpoint

MODEL_STORE = Path(__file__).parent / "model-store"
BUNDLED_VGG19 = MODEL_STORE / "vgg19_features.pth"
COMPACT_MODEL = MODEL_STORE / "compact.pth"  # what test mode uses where no model is named
VGG_SOURCES = ("imagenet", "bundled", "random")


# ---------------------------------------------------------------------------------------- VGG weights


def conv_indices(backbone: str) -> list[int]:
    """Index in torchvision's `vgg.features` of each conv that training needs, in order."""
    with torch.device("meta"):
        layers = LossNetwork(backbone).layers
    return [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]


def load_vgg(backbone: str, source: str, seed: int = 0) -> tuple[dict[str, Tensor], str]:
    """VGG weights up to the deepest tap of the loss network, for `--vgg_weights source`.

    source: imagenet, bundled, random, or the path of a .pth or .safetensors file with torchvision's
    keys (`features.N.weight`). Returns the float32 tensors keyed `<N>.weight`, `<N>.bias`, and a line
    that says where they are from. Raises UserError when they cannot be had; nothing is ever replaced.
    """
    if source == "random":
        return _random_vgg(backbone, seed), f"random (He initialisation, zero-sum filters, seed {seed})"
    if source == "imagenet":
        weights, origin = _imagenet_vgg(backbone)
    else:
        path = BUNDLED_VGG19 if source == "bundled" else Path(source)
        if source == "bundled" and backbone != "vgg19":
            raise UserError(f"--vgg_weights bundled: there are bundled weights for vgg19, not for {backbone}")
        if source == "bundled" and not path.exists():
            raise UserError(f"--vgg_weights bundled: {path} is not there; use imagenet, random or a path")
        weights = _read_vgg_file(path)
        origin = f"{source} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]})"
    return _select_vgg(backbone, source, weights), origin


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
            f"--vgg_weights imagenet: {file.name} is neither in {file.parent} nor could it be downloaded "
            f"({error}); put the file there, or use --vgg_weights bundled, random or a path"
        ) from error
    # Not by torchvision's own loader: it would run code pickled in a file of that name.
    return load_checkpoint(file, flag="--vgg_weights imagenet:"), f"imagenet (torchvision {entry})"


def _read_vgg_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return load_checkpoint(path, flag="--vgg_weights")
    if not path.is_file():
        raise UserError(f"--vgg_weights {path}: no such file")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--vgg_weights {path}: not a safetensors file ({error})") from error


def _select_vgg(backbone: str, source: str, weights: dict) -> dict[str, Tensor]:
    """The tensors that the loss network needs, checked for presence, shape and finiteness."""
    selected = {}
    for name, wanted in LossNetwork(backbone).layers.state_dict().items():
        key = f"features.{name}"
        tensor = weights.get(key)
        if not isinstance(tensor, Tensor):
            raise UserError(
                f"--vgg_weights {source}: no tensor {key}; a {backbone} file with torchvision's keys up to "
                f"features.{conv_indices(backbone)[-1]} is needed, this one has {len(weights)} entries"
            )
        if tensor.shape != wanted.shape:
            raise UserError(
                f"--vgg_weights {source}: {key} has shape {tuple(tensor.shape)}, "
                f"{backbone} needs {tuple(wanted.shape)}"
            )
        if not tensor.isfinite().all():
            raise UserError(f"--vgg_weights {source}: {key} holds values that are not finite")
        selected[name] = tensor.float()
    return selected


# ---------------------------------------------------------------------------------------- model files


def model_checkpoint(network: StyleTransferNetwork, dtype: torch.dtype = torch.float32, **more) -> dict:
    """The checkpoint dictionary of a network: plain types and tensors of `dtype`, enough to rebuild it."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    return {"format": CHECKPOINT_FORMAT, "config": network.config.to_dict(), "state_dict": tensors, **more}


def find_model_file(path: Path, flag: str = "--load_path") -> Path:
    """`path` itself, or, when it is the folder of a run or a pruning, the model file in it."""
    path = Path(path)
    if path.is_dir():
        for name in (CHECKPOINT_NAME, "pruned.pth"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{flag} {path}: the folder holds neither {CHECKPOINT_NAME} nor pruned.pth")
    return path


def load_network(
    path: Path, swap_max_pool: bool = False, flag: str = "--load_path"
) -> tuple[StyleTransferNetwork, dict]:
    """Rebuild the network in a model file, full or pruned, on the CPU, in float32 and evaluation mode.

    Files of the original implementation hold only `state_dict`: widths are read off the tensors, and
    `swap_max_pool` says that the encoder was trained with average pooling, which no tensor shows.
    Returns the network and the whole checkpoint dictionary. Raises UserError, naming `flag`, when it is
    no model.
    """
    path = find_model_file(path, flag)
    checkpoint = load_checkpoint(path, flag)
    state_dict = checkpoint.get("state_dict")
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UserError(f"{flag} {path}: no model (a dictionary with a state_dict of tensors is needed)")
    try:
        if "config" in checkpoint:
            config = NetworkConfig.from_dict(checkpoint["config"])
        else:
            config = _config_from_tensors(state_dict, "avg" if swap_max_pool else "max")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{flag} {path}: no style-transfer network ({error})") from error
    if swap_max_pool and config.pooling != "avg":
        raise UserError(f"--swap_max_pool: {path} was made with max pooling; leave the flag out")
    with torch.device("meta"):  # a file may claim any width: nothing is allocated before its tensors bear it out
        wanted = StyleTransferNetwork(config).state_dict()
    _check_tensors(f"{flag} {path}", state_dict, wanted)
    network = StyleTransferNetwork(config)
    network.load_state_dict(state_dict)
    return network.eval(), checkpoint


def load_teacher(path: Path, student: NetworkConfig) -> tuple[StyleTransferNetwork, dict]:
    """`load_network` of `--teacher`. Raises UserError when its bottleneck is not as large as the student's."""
    teacher, checkpoint = load_network(path, flag="--teacher")
    if teacher.config.stride != student.stride:
        raise UserError(f"--teacher {path} is a {teacher.config.backbone} network, with a bottleneck of "
                        f"1/{teacher.config.stride} of the side; this {student.backbone} has 1/{student.stride}")
    return teacher, checkpoint


def _config_from_tensors(state_dict: dict[str, Tensor], pooling: str) -> NetworkConfig:
    """Read backbone and widths off the conv tensors. Raises ValueError when they fit no backbone."""
    found = {str(key).removesuffix(".weight"): tensor.shape[0] for key, tensor in state_dict.items()
             if tensor.dim() == 4}
    for backbone in BACKBONES:
        config = NetworkConfig.full(backbone, pooling)
        convs = [layer.name for layer in conv_layers(config, size=0)]
        if found.keys() == set(convs):
            return config.with_widths([found[conv] for conv in convs])
    counts = ", ".join(f"{sum(name.startswith(f'{part}.layers.0.') for name in found)} {part} convs"
                       for part in ("encoder", "decoder"))
    raise ValueError(f"found {counts} under <part>.layers.0.<n>, which is neither {' nor '.join(BACKBONES)}")


def _check_tensors(source: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key in wanted.keys() - found.keys():
        raise UserError(f"{source}: the tensor {key} is missing")
    for key in found.keys() - wanted.keys():
        raise UserError(f"{source}: the tensor {key} belongs to no layer of this network")
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(tensor.shape)}, "
                f"its configuration says {tuple(wanted[key].shape)}"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {key} holds values that are not finite")

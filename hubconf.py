"""`torch.hub.load(repository, "compact")`: the models of model-store/, each as a `Stylizer`."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

dependencies = ["torch", "torchvision", "PIL", "numpy", "tqdm", "psutil"]

# By its path: the program may have a package of its own by the name of ours.
_spec = spec_from_file_location("apart", Path(__file__).parent / "painting" / "apart.py")
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
with _module.apart():
    from painting.stylizer import Stylizer
    from weights import MODEL_STORE


def compact(**settings) -> Stylizer:
    """Narrow in every layer. settings: see `Stylizer`."""
    return Stylizer(MODEL_STORE / "compact.pth", **settings)


def tiny(**settings) -> Stylizer:
    """Narrower still. settings: see `Stylizer`."""
    return Stylizer(MODEL_STORE / "tiny.pth", **settings)


def baseline(**settings) -> Stylizer:
    """Full width. settings: see `Stylizer`."""
    return Stylizer(MODEL_STORE / "baseline.pth", **settings)


def ch_xor_pruned(**settings) -> Stylizer:
    """Full width, without the bottleneck channels that are off for every picture. settings: see `Stylizer`."""
    return Stylizer(MODEL_STORE / "ch_xor_pruned.pth", **settings)

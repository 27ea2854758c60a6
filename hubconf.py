"""`torch.hub.load(repository, "compact")`: the models of model-store/, each as a `Stylizer`."""

from painting.stylizer import Stylizer
from weights import MODEL_STORE

dependencies = ["torch", "torchvision", "PIL", "numpy", "tqdm"]


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

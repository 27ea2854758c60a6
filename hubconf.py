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


def _entry(name: str, about: str):
    def load(**settings) -> Stylizer:
        return Stylizer(MODEL_STORE / f"{name}.pth", **settings)

    load.__doc__ = f"{about} settings: see `Stylizer`."
    return load


compact = _entry("compact", "Narrow in every layer.")
tiny = _entry("tiny", "Narrower still.")
baseline = _entry("baseline", "Full width.")
ch_xor_pruned = _entry("ch_xor_pruned", "Full width, without the bottleneck channels that are off for every picture.")

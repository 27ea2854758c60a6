"""`torch.hub.load(repository, "compact")`: the models of model-store/, each as a `Stylizer`."""

from pathlib import Path
from runpy import run_path

dependencies = ["torch", "torchvision", "PIL", "numpy", "tqdm", "psutil"]

# By its path: the program may have a package of its own by the name of ours.
with run_path(str(Path(__file__).parent / "painting" / "apart.py"))["apart"]():
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
uncorrelation = _entry("uncorrelation", "Full width; bottleneck channels are off, many of them for some pictures only.")
ch_xor = _entry("ch_xor", "Full width; most of the bottleneck's channels are off for every picture.")
ch_xor_pruned = _entry("ch_xor_pruned", "`ch_xor` without these channels.")

"""stub"""
from dataclasses import dataclass
@dataclass(frozen=True)
class PruneConfig:
    load_path: str | None = None
def prune(given): raise NotImplementedError

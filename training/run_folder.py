"""The folder of a run: checkpoints, metrics.jsonl, and the wandb run beside them."""

import importlib.util
import json
import os
from contextlib import contextmanager
from pathlib import Path

from utils import (
    CHECKPOINT_NAME,
    UserError,
    is_first_process,
    load_checkpoint,
    make_folder,
    note,
    save_checkpoint,
    write_text_atomically,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".lock"


def compare_resumed(given: dict, stored: dict, fixed: tuple[str, ...]) -> None:
    """Say which flags given with --resume change a run's `stored` settings. Raises UserError for one in `fixed`."""
    for name, value in given.items():
        if name in fixed and value != stored[name]:
            raise UserError(f"--resume: the run has --{name} {stored[name]}, not {value}; start a new run for that")
        if name not in ("resume", "save_path", "gpu_no", "num_workers") and value != stored[name]:
            note(f"resuming with --{name} {value} (it was {stored[name]})")


class CheckpointFolder:
    """The checkpoints of one run: `check_point.pth` is the newest, numbered ones lie beside it.

    keep: how many numbered checkpoints stay (0: none, -1: all).
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = Path(folder)
        self.keep = keep

    @classmethod
    @contextmanager
    def of_run(cls, save_path: str, keep: int, is_resumed: bool):
        """The folder of `--save_path`, made where it is not there, and locked within the block. Raises UserError when
        another run writes to it, or when a new run would mix with one that it holds."""
        folder = cls(make_folder(save_path, "--save_path"), keep)
        with folder.locked():
            folder.refuse_another_run(is_resumed)
            yield folder

    @contextmanager
    def locked(self):
        """Within the block no other run can write to the folder; a kill ends it too. Of several processes the first
        holds the lock. Raises UserError when another run has it."""
        if fcntl is None or not is_first_process():
            yield
            return
        try:
            lock = open(self.folder / LOCK_NAME, "w")
        except OSError as error:
            raise UserError(f"--save_path {self.folder}: cannot be written to ({error.strerror})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"--save_path {self.folder}: another run is writing to it; wait for its end, or choose "
                                "another --save_path") from error
            except OSError:  # a file system without locks
                pass
            yield

    def refuse_another_run(self, is_resumed: bool) -> None:
        """Raises UserError when a new run would mix with one that the folder holds."""
        if not is_resumed and self.newest.exists():
            raise UserError(f"--save_path {self.folder}: holds a run already; --resume goes on with it, another "
                            "--save_path starts a new one")

    @classmethod
    def load_newest(cls, save_path: str | None) -> dict:
        """The newest checkpoint of the run in `--save_path`, for `--resume`. Raises UserError when there is none."""
        if not save_path:
            raise UserError("--resume: --save_path says which run to resume")
        newest = cls(Path(save_path), keep=0).newest
        if not newest.exists():
            raise UserError(f"--resume: {newest} is not there; leave --resume out to start a new run")
        return load_checkpoint(newest, flag="--resume")

    @property
    def newest(self) -> Path:
        return self.folder / CHECKPOINT_NAME

    @property
    def last_good(self) -> str:
        """For a run that fails: which checkpoint it left."""
        return (f"the last good checkpoint is {self.newest}" if self.newest.exists()
                else "no checkpoint was written yet")

    def numbered(self) -> list[Path]:
        """The numbered checkpoints, oldest first."""
        return sorted(self.folder.glob("check_point_[0-9]*.pth"))

    def save(self, checkpoint: dict, iteration: int) -> Path:
        """Write the checkpoint, make it the newest, drop numbered ones beyond `keep`."""
        if self.keep == 0:
            save_checkpoint(checkpoint, self.newest)
            return self.newest
        path = self.folder / f"check_point_{iteration:07d}.pth"
        save_checkpoint(checkpoint, path)
        temporary = self.folder / f".{CHECKPOINT_NAME}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)  # one file under two names: half the disk, half the writing
            os.replace(temporary, self.newest)
        except OSError:  # a file system without hard links
            save_checkpoint(checkpoint, self.newest)
        if self.keep > 0:
            for old in self.numbered()[: -self.keep]:
                old.unlink()
        return self.newest


# --------------------------------------------------------------------------------------------- metrics


class MetricFile:
    """`metrics.jsonl`: one JSON object a line, one line a check."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def truncate_after(self, iteration: int) -> None:
        """Drop lines past `iteration`: a killed run may have logged what its last checkpoint lacks."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # the half-written last line of a killed run
        write_text_atomically(self.path, "".join(kept))

    def append(self, row: dict) -> None:
        """Raises UserError when the file cannot be written to."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: the metrics cannot be written ({error.strerror})") from error


def wandb_key_is_configured() -> bool:
    """Whether wandb would find an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if not name or not Path(name).expanduser().is_file():
            continue
        try:
            return netrc.netrc(Path(name).expanduser()).authenticators(host) is not None
        except (netrc.NetrcParseError, OSError):
            return False
    return False


class WandbRun:
    """A wandb run that is never in the way: no prompt, and training goes on without the package."""

    def __init__(self, mode, project, name, notes, tags, config, folder, run_id=None) -> None:
        """mode: auto, online, offline or disabled. Raises UserError when `online` cannot be had."""
        self.run = None
        if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled" and mode == "auto":
            return
        if importlib.util.find_spec("wandb") is None:
            if mode == "online":
                raise UserError("--wb_mode online: the package wandb is not installed (pip install wandb)")
            note("wandb is not installed: metrics go to metrics.jsonl only")
            return
        import wandb

        if mode == "auto":
            wants_online = wandb_key_is_configured() and os.environ.get("WANDB_MODE") != "offline"
        else:
            wants_online = mode == "online"
            if wants_online and not wandb_key_is_configured():
                raise UserError("--wb_mode online: no wandb key is configured (wandb login, or WANDB_API_KEY)")
        arguments = dict(
            project=project, name=name, notes=notes, tags=tags, config=config, dir=str(folder), id=run_id,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        try:
            # resume="allow" makes a resumed training go on in the same online run.
            online = {"mode": "online", "resume": "allow"} if wants_online else {"mode": "offline"}
            self.run = wandb.init(**arguments, **online)
        except Exception as error:  # wandb passes on its service's, the network's and its server's errors
            if mode != "auto" or not wants_online:
                raise UserError(f"--wb_mode {mode}: wandb did not start ({error})") from error
            note(f"wandb could not go online ({type(error).__name__}): logging offline")
            self.run = wandb.init(**arguments, mode="offline")
        where = "online" if wants_online and not self.run.offline else "offline"
        note(f"wandb: {where}, run {self.run.id} in {self.run.dir}")

    @classmethod
    def none(cls) -> "WandbRun":
        """No run: what is logged goes nowhere."""
        return cls("disabled", None, None, None, None, None, None)

    @property
    def id(self) -> str | None:
        return self.run.id if self.run else None

    def log(self, values: dict, iteration: int, picture: Path | None = None) -> None:
        if self.run is None:
            return
        if picture is not None:
            import wandb

            values = {**values, "pictures": wandb.Image(str(picture))}
        self.run.log(values, step=iteration)

    def finish(self) -> None:
        if self.run is not None:
            self.run.finish()

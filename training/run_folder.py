"""The folder of a run: checkpoints, metrics.jsonl, and the wandb run beside them."""

import fcntl
import json
import netrc
import os
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

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

LOCK_NAME = ".lock"


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
            if not is_resumed and folder.newest.exists():
                raise UserError(f"--save_path {save_path}: holds a run already; --resume goes on with it, another "
                                "--save_path starts a new one")
            yield folder

    @contextmanager
    def locked(self):
        """Within the block no other run can write to the folder; a kill ends it too. Of several processes the first
        holds the lock. Raises UserError when another run has it."""
        if not is_first_process():
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

    @classmethod
    def load_newest(cls, save_path: str | None) -> dict:
        """The newest checkpoint of the run in `--save_path`, for `--resume`. Raises UserError when there is none."""
        if not save_path:
            raise UserError("--resume: --save_path says which run to resume")
        folder = cls(Path(save_path), keep=0)
        newest = folder.newest
        if not newest.exists():
            raise UserError(f"--resume: {newest} is not there; leave --resume out to start a new run")
        try:
            return load_checkpoint(newest, flag="--resume")
        except UserError as error:
            older = ", ".join(path.name for path in folder.numbered())
            if not older:
                raise
            raise UserError(f"{error}; copy one of the others that is whole over it to go on from there: {older}") \
                from error

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
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for name in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        file = Path(name).expanduser()
        if file.is_file():
            try:
                return netrc.netrc(file).authenticators(host) is not None
            except (netrc.NetrcParseError, OSError):
                return False
    return False


class WandbRun:
    """A wandb run that is never in the way: it asks nothing, and a training goes on without it."""

    def __init__(self, mode: str, folder: Path | None, run_id: str | None = None, **settings) -> None:
        """mode: auto, online, offline or disabled; settings: of wandb.init. Raises UserError when a run that was asked
        for by `online` or `offline` cannot be had."""
        self.run = None
        named = os.environ.get("WANDB_MODE")
        if mode == "disabled" or (mode == "auto" and named == "disabled"):
            return
        ways = [mode]
        if mode == "auto":
            ways = ["online", "offline"] if wandb_key_is_configured() and named != "offline" else ["offline"]
        elif mode == "online" and not wandb_key_is_configured():
            raise UserError("--wb_mode online: no wandb key is configured (wandb login, or WANDB_API_KEY)")
        for way in ways:
            try:
                import wandb

                self.run = wandb.init(
                    dir=str(folder), id=run_id, mode=way, **settings,
                    resume="allow" if way == "online" else None,  # a resumed training goes on in the same run
                    settings=wandb.Settings(console="off", silent=True, init_timeout=60),
                )
            except Exception as error:  # wandb passes on its service's, the network's and its server's errors
                reason = ("is not installed (pip install wandb)" if isinstance(error, ModuleNotFoundError)
                          else f"did not start {way} ({error})")
                if mode != "auto":
                    raise UserError(f"--wb_mode {mode}: wandb {reason}") from error
                note(f"wandb {reason}: metrics go to metrics.jsonl")
                if isinstance(error, ImportError):
                    return
            else:
                note(f"wandb: {'offline' if self.run.offline else 'online'}, run {self.run.id} in {self.run.dir}")
                return

    @property
    def id(self) -> str | None:
        return self.run.id if self.run else None

    def log(self, values: dict, iteration: int, picture: Path | None = None) -> None:
        """Where wandb fails, as when its process has ended, this says so, and nothing more is logged to it."""
        if self.run is None:
            return
        try:
            import wandb

            pictures = {} if picture is None else {"pictures": wandb.Image(str(picture))}
            self.run.log(values | pictures, step=iteration)
        except Exception as error:
            note(f"wandb failed ({error}): from here on metrics go to metrics.jsonl only")
            self.run = None

    def finish(self) -> None:
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:
            note(f"wandb did not end well ({error})")

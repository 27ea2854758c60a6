"""The folder of a run: checkpoints, metrics.jsonl, and the wandb run beside them."""

import fcntl
import json
import os
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import utils
from utils import CHECKPOINT_NAME, UserError, is_first_process, note, save_checkpoint

LOCK_NAME = ".lock"


class CheckpointFolder:
    """The checkpoints of one run: `check_point.pth` is the newest, numbered ones lie beside it, `keep` of them (-1:
    all)."""

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self.folder = Path(folder)
        self.newest = self.folder / CHECKPOINT_NAME
        self.keep = keep

    @classmethod
    @contextmanager
    def of_run(cls, save_path: str, keep: int, is_resumed: bool):
        """The folder of `--save_path`, made where it is not there. Within the block no other run can write to it.
        Raises UserError when another run does, or when a new run would mix with one that the folder holds."""
        folder = cls(utils.make_folder(save_path, "--save_path"), keep)
        with open(folder.folder / LOCK_NAME, "w") as lock:  # a kill lets go of it, too
            try:
                if is_first_process():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"--save_path {save_path}: another run is writing to it") from error
            except OSError:  # a file system without locks
                pass
            if not is_resumed and folder.newest.exists():
                raise UserError(f"--save_path {save_path}: holds a run already; --resume goes on with it")
            yield folder

    @classmethod
    def load_newest(cls, save_path: str | None) -> dict:
        """The newest checkpoint of the run in `--save_path`, for `--resume`. Raises UserError when there is none."""
        if not save_path:
            raise UserError("--resume: --save_path says which run to resume")
        folder = cls(save_path)
        if not folder.newest.exists():
            raise UserError(f"--resume: {folder.newest} is not there; leave --resume out to start a new run")
        try:
            return utils.load_checkpoint(folder.newest, flag="--resume")
        except UserError as error:
            older = ", ".join(path.name for path in folder.numbered()) or "none"
            raise UserError(f"{error}; to go on from an older one, copy it there: {older}") from error

    def numbered(self) -> list[Path]:
        """The numbered checkpoints, oldest first."""
        return sorted(self.folder.glob("check_point_[0-9]*.pth"))

    def save(self, checkpoint: dict, iteration: int) -> Path:
        """Write the checkpoint, make it the newest, drop numbered ones beyond `keep`."""
        save_checkpoint(checkpoint, self.newest)
        if self.keep:
            path = self.folder / f"check_point_{iteration:07d}.pth"
            path.unlink(missing_ok=True)
            try:
                os.link(self.newest, path)  # one file under two names: half the disk, half the writing
            except OSError:  # a file system without hard links
                save_checkpoint(checkpoint, path)
        for old in self.numbered()[: -self.keep] if self.keep > 0 else ():
            old.unlink()
        return self.newest


class MetricFile:
    """`metrics.jsonl`: one JSON object a line, one line a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def truncate_after(self, iteration: int) -> None:
        """Drop lines past `iteration`: a killed run may have logged what its last checkpoint lacks."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            with suppress(json.JSONDecodeError, KeyError):  # the half-written last line of a killed run
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line + "\n")
        utils.write_text_atomically(self.path, "".join(kept))

    def append(self, row: dict) -> None:
        """Raises UserError when the file cannot be written to."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: the metrics cannot be written ({error.strerror})") from error


def wandb_key_is_configured() -> bool:
    """Whether wandb would find an API key without asking for one."""
    from requests.utils import get_netrc_auth  # comes with wandb

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(server))


class WandbRun:
    """A wandb run that is never in the way: it asks nothing, and a training goes on without it."""

    def __init__(self, config, folder: Path, run_id: str | None) -> None:
        """config: of a mode, whose `wb_mode` is auto, online, offline or disabled. Raises UserError when a run that was
        asked for by `online` or `offline` cannot be had."""
        self.run, self.id, mode = None, run_id, config.wb_mode
        if not is_first_process() or "disabled" in (mode, mode == "auto" and os.environ.get("WANDB_MODE")):
            return
        try:
            import wandb

            has_key = wandb_key_is_configured()
            if mode == "online" and not has_key:
                raise UserError("has no key (wandb login, or WANDB_API_KEY)")
            is_online = mode == "online" or mode == "auto" and has_key and os.environ.get("WANDB_MODE") != "offline"
            self.run = wandb.init(
                dir=str(folder), id=run_id, mode="online" if is_online else "offline", config=asdict(config),
                resume="allow" if is_online else None,  # a resumed training goes on in the same run
                project=config.wb_project, name=config.wb_name, notes=config.wb_notes, tags=config.wb_tags,
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )
            self.id = self.run.id
            note(f"wandb: {'online' if is_online else 'offline'}, run {self.id} in {self.run.dir}")
        except Exception as error:  # wandb passes on its service's, the network's and its server's errors
            reason = "is not installed (pip install wandb)" if isinstance(error, ImportError) else error
            if mode != "auto":
                raise UserError(f"--wb_mode {mode}: wandb {reason}") from error
            note(f"wandb {reason}: metrics go to metrics.jsonl")

    def log(self, values: dict, iteration: int, picture: Path) -> None:
        """Where wandb fails, as when its process has ended, this says so, and nothing more is logged to it."""
        try:
            if self.run is not None:
                import wandb

                self.run.log(values | {"pictures": wandb.Image(str(picture))}, step=iteration)
        except Exception as error:
            note(f"wandb failed ({error}): from here on metrics go to metrics.jsonl only")
            self.run = None

    def finish(self) -> None:
        if self.run is not None:
            with suppress(Exception):  # the training is done, whatever wandb could not send
                self.run.finish()

"""The folder of a run: checkpoints, metrics.jsonl, and the wandb run beside them."""

import fcntl
import io
import json
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import utils
from utils import CHECKPOINT_NAME, UserError, note, numbered_checkpoints, process_rank, save_checkpoint


class CheckpointFolder:
    """The checkpoints of one run: `check_point.pth` is the newest; beside it lie `keep` numbered ones, all with -1."""

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
        with open(folder.folder / ".lock", "w") as lock:  # a kill lets go of it, too
            try:
                if process_rank() == 0:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"--save_path {save_path}: another run is writing to it") from error
            except OSError as error:  # a file system without locks
                note(f"--save_path {save_path}: cannot be locked ({error.strerror}): do not start a second run in it")
            if not is_resumed and folder.holds_run:
                raise UserError(f"--save_path {save_path}: holds a run already; --resume goes on with it")
            yield folder

    @classmethod
    def load_newest(cls, save_path: str | None) -> dict:
        """The newest checkpoint of the run in `--save_path`, for `--resume`. Raises UserError when there is none."""
        if not save_path:
            raise UserError("--resume: --save_path says which run to resume")
        folder = cls(save_path)
        if not folder.holds_run:
            raise UserError(f"--resume: {folder.newest} is not there; leave --resume out to start a new run")
        refusal = None
        for path in (folder.newest, *reversed(numbered_checkpoints(folder.folder))):
            try:
                checkpoint = utils.load_checkpoint(path, flag="--resume")
                if refusal:
                    note(f"{refusal}; going on from {path.name}")
                return checkpoint
            except UserError as error:
                refusal = refusal or error
                if "cannot be read" in str(error) or path.is_symlink() and not path.exists():
                    break  # a permission, or a disk that is not there: not the file
        raise refusal

    @property
    def holds_run(self) -> bool:
        """Whether a run has written here, even if of its newest checkpoint only a link to nothing is left."""
        return os.path.lexists(self.newest) or bool(numbered_checkpoints(self.folder))

    def save(self, checkpoint: dict, iteration: int) -> None:
        """Write the checkpoint, make it the newest, drop numbered ones beyond `keep`."""
        save_checkpoint(checkpoint, self.newest)
        if self.keep:
            path = self.folder / f"check_point_{iteration:07d}.pth"
            try:
                path.unlink(missing_ok=True)
                os.link(os.path.realpath(self.newest), path)  # one file, two names: half the disk, half the writing
            except OSError:  # a file system without hard links
                save_checkpoint(checkpoint, path)
        for old in numbered_checkpoints(self.folder)[: -self.keep] if self.keep > 0 else ():
            try:
                old.unlink()
            except OSError as error:  # open elsewhere, on a share
                note(f"{old}: an old checkpoint, cannot be deleted ({error.strerror})")


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines of a metrics.jsonl past `iteration`, which a killed run has logged behind its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # the half-written last line of a killed run, or damage
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
    utils.write_text_atomically(path, "".join(kept))


def append_metrics(path: Path, row: dict) -> None:
    """Add a line, a JSON object. Raises UserError when the file cannot be written to."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"{path}: the metrics cannot be written ({error.strerror})") from error


class WandbRun:
    """A wandb run that is never in the way: it asks nothing, and a training goes on without it."""

    def __init__(self, config, folder: Path, run_id: str | None) -> None:
        """config: of a mode. Raises UserError when what its `wb_mode` asks for, online or offline, cannot be had."""
        self.run, self.id, self.failure, mode = None, run_id, "", config.wb_mode
        if process_rank() > 0 or "disabled" in (mode, mode == "auto" and os.environ.get("WANDB_MODE")):
            return
        for each in (None, "offline") if mode == "auto" else (mode,):  # None: as wandb finds it configured
            with self._guarded():
                wandb = import_module("wandb")
                self.run = wandb.init(
                    dir=str(folder), id=self.id, mode=each, config=asdict(config),
                    resume="allow" if each != "offline" else None,  # a resumed training goes on in the same run
                    project=config.wb_project, name=config.wb_name, notes=config.wb_notes, tags=config.wb_tags,
                    settings=wandb.Settings(console="off", silent=True, init_timeout=60))
                self.id = self.run.id
                kind = each or next((way for way in ("disabled", "offline") if getattr(self.run, way, False)), "online")
                note(f"wandb: {kind}, run {self.id} in {self.run.dir}{self.failure and f'; online it {self.failure}'}")
                return
        if mode != "auto":
            raise UserError(f"--wb_mode {mode}: wandb {self.failure}")
        note(f"wandb {self.failure}: metrics go to metrics.jsonl")

    @contextmanager
    def _guarded(self):
        """Within the block wandb may raise what it will, errors of its process, the network, its server: `failure` says
        then what, and there is no run any more, which a line says where there was one."""
        stdin, sys.stdin = sys.stdin, io.StringIO()  # no terminal at which it could ask for a key
        try:
            yield
        except Exception as error:
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failure = "is not installed (pip install wandb)" if is_missing else f"failed ({reason})"
            if self.run is not None:
                note(f"wandb {self.failure}: from here on metrics go to metrics.jsonl only")
            self.run = None
        finally:
            sys.stdin = stdin

    def log(self, values: dict, iteration: int, picture: Path) -> None:
        """Where wandb fails, as when its process has ended, this says so, and nothing more is logged to it."""
        if self.run is not None:
            with self._guarded():
                self.run.log(values | {"pictures": import_module("wandb").Image(str(picture))}, step=iteration)

    def finish(self) -> None:
        """Have wandb send what it has; after a failure, let it go without a traceback when the program ends."""
        if self.run is not None:
            with self._guarded():
                self.run.finish()
        if self.run is None and self.failure:
            with suppress(SystemExit), self._guarded():
                import_module("wandb").teardown()

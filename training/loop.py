"""The training loop: resume, signals, sums of metrics, checkpoints."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace

import torch
from torch import Tensor

from folders import FailedPictures
from training.run_folder import CheckpointFolder, MetricFile, WandbRun
from training.sampling import PicturesByPosition, count_failures, shard_positions, training_batches
from utils import (
    CHECKPOINT_FORMAT,
    StopRequest,
    StopWhileWaiting,
    UserError,
    average_over_processes,
    catch_stop_signals,
    gather,
    is_first_process,
    note,
    note_of_process,
    process_count,
    process_rank,
    progress_bar,
    worker_count,
)

PATHS = ("content_dir", "style_dir", "save_path", "load_path", "teacher", "cache_dir")
STOP_INTERVAL = 16  # iterations on GPUs after which each process asks again whether another was told to stop


# ------------------------------------------------------------------------------------------- start, resume


def open_config(mode: str, kind: type, given: dict, fixed: Sequence[str]) -> tuple:
    """The settings of a run, and the newest checkpoint of the one that `--resume` goes on with, else None.

    kind: the mode's configuration; given: the flags on the command line, which change a resumed run's settings but for
    those in `fixed`. With `--resume auto` a run starts where there is none. Raises UserError when the settings make no
    sense, or when there is no such run.
    """
    config, checkpoint = kind(**given), None
    if config.resume == "auto" and not (config.save_path and CheckpointFolder(config.save_path, 0).newest.exists()):
        config = replace(config, resume=False)
    if config.resume:
        checkpoint = CheckpointFolder.load_newest(config.save_path)
        stored = checkpoint.get(f"{mode}_config")
        if not isinstance(stored, dict) or "optimizer" not in checkpoint:
            raise UserError(f"--resume: --save_path {config.save_path} holds no run of --mode {mode}; a network "
                            "alone is for --load_path")
        known = {field.name for field in fields(kind)}
        stored = asdict(kind()) | {  # a flag that is newer than the run stood at its default
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if name in known
        }
        stored["gpu_no"] = None  # of the machine that the run was on
        _say_changes(_with_absolute_paths(given), _with_absolute_paths(stored), fixed)
        config = kind(**stored | given | {"resume": True})
        _refuse_other_batches(checkpoint.get("processes"), stored["batch_size"], config.batch_size)
    config.check()
    return config, checkpoint


def _with_absolute_paths(settings: dict) -> dict:
    """The settings as they are stored: a run can be resumed from any folder."""
    paths = {name: settings[name] for name in PATHS if settings.get(name)}
    if os.path.isfile(settings.get("vgg_weights") or ""):  # else it is a word
        paths["vgg_weights"] = settings["vgg_weights"]
    return settings | {name: os.path.abspath(path) for name, path in paths.items()}


def _say_changes(given: dict, stored: dict, fixed: Sequence[str]) -> None:
    """Say which given flags change a run's `stored` settings. Raises UserError for one in `fixed`."""
    for name, value in given.items():
        if name in fixed and value != stored[name]:
            raise UserError(f"--resume: the run has --{name} {stored[name]}, not {value}; start a new run for that")
        if name not in ("resume", "save_path", "gpu_no", "num_workers") and value != stored[name]:
            note(f"resuming with --{name} {value} (it was {stored[name]})")


def _refuse_other_batches(processes: int | None, batch_size: int, new_batch_size: int) -> None:
    """Raises UserError where another number of processes makes the batches of all together smaller or larger.

    processes: those that the run had, None where an older checkpoint does not say.
    """
    pictures, now = batch_size * (processes or 0), process_count()
    if processes not in (None, now) and now * new_batch_size != pictures:
        raise UserError(f"--resume: {processes} processes of --batch_size {batch_size} trained this run, now there are "
                        f"{now} of {new_batch_size}: start {processes}, or give a --batch_size that makes {pictures} "
                        "pictures together")


def is_finished(config, checkpoint: dict | None) -> bool:
    """Whether a resumed run has done its iterations, which is said."""
    if checkpoint is None or checkpoint["iteration"] < config.max_iter:
        return False
    note(f"the run in {config.save_path} has done its {checkpoint['iteration']} iterations; a larger --max_iter goes "
         "on")
    return True


# ------------------------------------------------------------------------------------------------- metrics


class MetricSums:
    """Means of a run's metrics since the last checkpoint, and the first iteration at which each was not finite.

    Both stay on the device: reading them costs a synchronisation, so the loop does that seldom.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.counts = torch.zeros(len(names), device=device)
        self.latest = torch.zeros(len(names), device=device)
        self.first_bad = torch.full((len(names),), -1, device=device, dtype=torch.int64)
        self._zero = torch.zeros((), device=device)
        self._present: dict[frozenset, Tensor] = {}  # one mask for each set of measured terms

    def add(self, metrics: dict[str, Tensor], iteration: int) -> None:
        names = frozenset(metrics)
        if names not in self._present:
            self._present[names] = torch.tensor([name in names for name in self.names], device=self.sums.device)
        present = self._present[names]
        values = torch.stack([metrics.get(name, self._zero) for name in self.names])
        self.sums += values
        self.counts += present
        self.latest = torch.where(present, values, self.latest)
        self.first_bad.masked_fill_(~values.isfinite() & (self.first_bad < 0), iteration)

    def raise_if_bad(self) -> None:
        """Raises UserError naming the first term that was not finite, and its iteration."""
        bad = {name: at for name, at in zip(self.names, self.first_bad.tolist()) if at >= 0}
        if not bad:
            return
        name = min(bad, key=bad.get)  # the earliest; of equals the first, and terms stand before their total
        term = name if name == "loss" else f"{name} loss"
        raise UserError(f"iteration {bad[name]}: the {term} is not finite, a lower --lr, --encoder_lr or loss weight "
                        "may help")

    def show(self, names: tuple[str, ...]) -> str:
        """The latest values of some metrics, for the progress bar."""
        values = dict(zip(self.names, self.latest.tolist()))
        return ", ".join(f"{name} {values[name]:.4g}" for name in names)

    def means(self) -> dict[str, float]:
        """The means over all iterations since `clear`, and over all processes (each must call this)."""
        return dict(zip(self.names, (average_over_processes(self.sums) / self.counts).tolist()))

    def clear(self) -> None:
        self.sums.zero_()
        self.counts.zero_()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; of several processes each must call this."""
        sums = average_over_processes(self.sums).cpu()
        return {"names": list(self.names), "sums": sums, "counts": self.counts.cpu()}

    def restore(self, state: dict) -> None:
        """Put back `state`; metrics that it lacks stay without a value."""
        names = state.get("names", self.names)  # an older run's file has no names; they stand in the same order
        for own, stored in ((self.sums, state["sums"]), (self.counts, state["counts"])):
            values = dict(zip(names, stored.tolist()))
            own.copy_(torch.tensor([values.get(name, 0.0) for name in self.names]))


# ---------------------------------------------------------------------------------------------------- loop


class Run:
    """A training from its first or its next iteration to the last; `loop` is the training.

    What it trains, a `TransferTrainer` or a `Distiller`, has a `device`, the names of the `metrics` that a step returns
    and of those `shown` beside the progress bar, and does
    begin(iteration): set what changes from step to step, as the learning rates, for an iteration, counted from 1;
    step(*batch, all_terms): a step of the optimiser, whose metrics stay on the device, some only with `all_terms`;
    report(folder, iteration): write what shows how far the run is; returns what joins the metrics, and a picture's path
    or None;
    state() and restore(checkpoint): what a checkpoint needs beside the settings; the weights are its `state_dict`.
    """

    def __init__(
        self, mode: str, config, trainer, folder: CheckpointFolder, pictures: PicturesByPosition,
        tallies: Sequence[FailedPictures], wandb_run: WandbRun, checkpoint: dict | None,
    ) -> None:
        """config: of the mode; tallies: of each folder of pictures; checkpoint: from `open_config`."""
        self.mode, self.config, self.trainer, self.folder = mode, config, trainer, folder
        self.pictures, self.tallies, self.wandb_run = pictures, tallies, wandb_run
        self.picture_counts = [len(paths) for paths in pictures.folders]
        self.iteration = self.samples_seen = 0  # samples: by all processes together, where in the data the run is
        self.metrics = MetricFile(folder.folder / "metrics.jsonl")
        self.sums = MetricSums(trainer.device, trainer.metrics)
        if checkpoint is not None:
            self._restore(checkpoint)
        if is_first_process():
            self.metrics.truncate_after(self.iteration)

    def _restore(self, checkpoint: dict) -> None:
        if checkpoint["picture_counts"] != self.picture_counts:
            note(f"the folders changed: {self.picture_counts} pictures to learn from, {checkpoint['picture_counts']} "
                 "before; other pictures will be drawn than without the interruption")
        self.trainer.restore(checkpoint)
        self.iteration, self.samples_seen = checkpoint["iteration"], checkpoint["samples_seen"]
        self.sums.restore(checkpoint["metric_sums"])

    def loop(self) -> int:
        """The iterations that are left. Returns the exit code: 0, or 128 + the signal that stopped it."""
        try:
            return self._loop()
        except (UserError, RuntimeError) as error:
            # A worker's end is raised wherever this process is, so also where other errors are translated.
            reason = self._reason_of(error) or self._reason_of(error.__cause__)
            if reason is None and not isinstance(error, UserError):
                raise
            raise UserError(f"{reason or error}; {self.folder.last_good}{self._how_to_go_on()}") from error
        finally:
            self.wandb_run.finish()
            for tally in self.tallies:
                note_of_process(tally.summary())

    def _reason_of(self, error: BaseException | None) -> str | None:
        """What a library's error says of the processes that work for this one, in words; None for another error."""
        if "DataLoader worker" in str(error):
            return (f"--num_workers {worker_count(self.config.num_workers)}: a process that decodes pictures was "
                    "killed, as a rule because memory was short; fewer need less")
        if process_count() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            return f"iteration {self.iteration + 1}: another process of this run has ended"
        return None

    def _how_to_go_on(self) -> str:
        if not self.folder.newest.exists():
            return ""
        return f", go on with: python main.py --mode {self.mode} --resume --save_path {self.config.save_path}"

    def _loop(self) -> int:
        config, device = self.config, self.trainer.device
        positions = shard_positions(
            self.samples_seen, config.max_iter - self.iteration, config.batch_size, process_rank(), process_count()
        )
        batches = training_batches(
            self.pictures, positions, config.batch_size, worker_count(config.num_workers), device.type == "cuda"
        )
        bar = progress_bar(config.max_iter, self.mode, "it", initial=self.iteration)
        shown = time.perf_counter()
        is_due = stopping = False
        with catch_stop_signals() as stop, bar, closing(batches):
            while self.iteration < config.max_iter and not stopping:
                batch = self._next_batch(batches, stop)
                if batch is None:
                    break
                self.iteration += 1
                is_due = self.iteration % config.check_iter == 0 or self.iteration == config.max_iter
                self.trainer.begin(self.iteration)
                self.sums.add(self.trainer.step(*batch, all_terms=is_due), self.iteration)
                self.samples_seen += config.batch_size * process_count()
                # Asking the others costs a round trip, so at the speed of a GPU not at every iteration.
                may_stop = (process_count() == 1 or device.type == "cpu" or is_due
                            or self.iteration % STOP_INTERVAL == 0)
                stopping = may_stop and any(gather(bool(stop)))
                if device.type == "cpu" or is_due or stopping or time.perf_counter() - shown > 1.0:
                    self.sums.raise_if_bad()
                    shown = time.perf_counter()
                    bar.set_postfix_str(self.sums.show(self.trainer.shown), refresh=False)
                if is_due:
                    self.checkpoint()
                bar.update()
            if self.iteration == config.max_iter:
                return 0
            if not is_due:
                self.save()
        note(f"stopped after iteration {self.iteration}, saved{self._how_to_go_on()}")
        return 128 + stop.signal_number if stop else 0  # as a shell has it; 0 where another process was told to stop

    def _next_batch(self, batches: Iterator[tuple], stop: StopRequest) -> list[Tensor] | None:
        """The pictures of the next batch, on the device; None where a stop signal ended the wait for them."""
        if process_count() > 1:  # one that left on its own would have the others wait for it
            *batch, failures = next(batches)
        else:
            try:
                with stop.while_waiting():
                    *batch, failures = next(batches)
            except StopWhileWaiting:
                return None
        count_failures(failures, self.tallies)
        return [pictures.to(self.trainer.device, non_blocking=True) for pictures in batch]

    def checkpoint(self) -> None:
        """Every `check_iter` iterations: metrics, what the trainer reports, a checkpoint."""
        means = self.sums.means()
        self.sums.clear()
        if is_first_process():
            more, picture = self.trainer.report(self.folder.folder, self.iteration)
            self.metrics.append({"iteration": self.iteration, **means, **more})
            self.wandb_run.log({**means, **more}, self.iteration, picture)
        self.save()
        for tally in self.tallies:
            tally.add_other_processes()

    def save(self) -> None:
        """Write the checkpoint. Raises UserError, and writes nothing, when a weight is not finite."""
        metric_sums = self.sums.state()
        if not is_first_process():
            return
        state = self.trainer.state()
        if not all(tensor.isfinite().all() for tensor in state["state_dict"].values()):
            raise UserError(f"iteration {self.iteration}: a weight is not finite, so no checkpoint was written; a "
                            "lower learning rate may help")
        settings = {name: list(value) if isinstance(value, tuple) else value
                    for name, value in _with_absolute_paths(asdict(self.config)).items()}
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "iteration": self.iteration,
            f"{self.mode}_config": settings,
            **state,
            "metric_sums": metric_sums,
            "samples_seen": self.samples_seen,
            "processes": process_count(),
            "picture_counts": self.picture_counts,
            "wandb_id": self.wandb_run.id,
        }
        self.folder.save(checkpoint, self.iteration)

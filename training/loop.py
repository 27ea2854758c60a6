"""A training from its start or its last checkpoint to its end: settings, loop, signals, metrics, checkpoints."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import chain

import torch
from torch import Tensor

import utils
from folders import FailedPictures, open_folder, split_holdout
from training.run_folder import CheckpointFolder, WandbRun, append_metrics, truncate_metrics
from training.sampling import PictureCache, TrainingPictures, count_failures, training_batches
from utils import UserError, make_folder, note, process_count, process_rank
from weights import VGG_SOURCES

PATHS = ("content_dir", "style_dir", "save_path", "load_path", "teacher", "cache_dir", "vgg_weights")
STOP_INTERVAL = 16  # iterations on GPUs after which each process asks again whether another was told to stop


def run_training(mode: str, kind: type, given: dict, fixed: Sequence[str], build: Callable, dataset: type) -> int:
    """Run a mode that trains with the flags `given` on the command line. Returns the exit code.

    kind: the mode's configuration; fixed: the settings that a resumed run keeps. build(config, device, checkpoint)
    makes the trainer, see `Run`; dataset: `TrainingPictures` or a subclass.
    """
    config, checkpoint = open_config(mode, kind, given, fixed)
    device = utils.resolve_device(config.gpu_no)
    with utils.process_group(device):
        if checkpoint is not None and checkpoint["iteration"] >= config.max_iter:
            note(f"this run has done its {checkpoint['iteration']} iterations; a larger --max_iter goes on")
            return 0
        paths, tallies = zip(*(open_folder(getattr(config, flag), f"--{flag}", config.max_pixels, config.save_path)
                               for flag in ("content_dir", "style_dir") if getattr(config, flag)))
        trainer = build(config, device, checkpoint)
        with CheckpointFolder.of_run(config.save_path, config.keep_checkpoints, checkpoint is not None) as folder:
            learned, held_out = zip(*(split_holdout(each, config.holdout, tally.where)
                                      for each, tally in zip(paths, tallies)))
            cache = config.cache_dir and PictureCache(make_folder(config.cache_dir, "--cache_dir"), config.max_pixels)
            pictures = dataset(learned, config, cache)
            trainer.show(pictures, held_out, tallies)
            note(f"training on {utils.describe_device(device)}, {'bfloat16' if trainer.amp_dtype else 'float32'}; "
                 + " and ".join(f"{len(each)} pictures of {tally.where}" for each, tally in zip(learned, tallies)))
            return Run(mode, config, trainer, folder, pictures, tallies, checkpoint).loop()


def open_config(mode: str, kind: type, given: dict, fixed: Sequence[str]) -> tuple:
    """The settings of a run, and the newest checkpoint of the one that `--resume` goes on with, else None. Raises
    UserError when the settings make no sense, or when there is no such run; `--resume auto` then starts one."""
    config, checkpoint = kind(**given), None
    if config.resume == "auto" and not (config.save_path and CheckpointFolder(config.save_path).holds_run):
        config = replace(config, resume=False)
    if config.resume:
        checkpoint = CheckpointFolder.load_newest(config.save_path)
        stored = checkpoint.get(f"{mode}_config")
        if not isinstance(stored, dict) or not {"optimizer", "iteration"} <= checkpoint.keys():
            raise UserError(f"--resume: --save_path {config.save_path} holds no run of --mode {mode}")
        # A flag that is newer than the run stood at its default; the GPU was of the machine that the run was on.
        known = asdict(kind())
        stored = known | {name: tuple(value) if isinstance(value, list) else value
                          for name, value in stored.items() if name in known} | {"gpu_no": None}
        for name, value in _with_absolute_paths(given).items():
            if name in fixed and value != stored[name]:
                raise UserError(f"--resume: the run has --{name} {stored[name]}, not {value}; start a new run for that")
            if name not in ("resume", "save_path", "gpu_no", "num_workers") and value != stored[name]:
                note(f"resuming with --{name} {value} (it was {stored[name]})")
        config = kind(**stored | given | {"resume": True})
        processes, now = checkpoint.get("processes"), process_count()  # an older checkpoint does not say
        if processes not in (None, now) and now * config.batch_size != processes * stored["batch_size"]:
            raise UserError(f"--resume: {processes} processes of --batch_size {stored['batch_size']} trained this run, "
                            f"now there are {now} of {config.batch_size}: their pictures together must stay as many")
    config.check()
    return config, checkpoint


def _with_absolute_paths(settings: dict) -> dict:
    """The settings as they are stored: a run can be resumed from any folder."""
    return settings | {name: os.path.abspath(settings[name]) for name in PATHS
                       if settings.get(name) and not (name == "vgg_weights" and settings[name] in VGG_SOURCES)}


class MetricSums:
    """Sums of a run's metrics since the last checkpoint, scalars on the device: reading them makes a step wait."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor], iteration: int) -> None:
        self.latest, self.iteration = metrics, iteration
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def show(self, names: Sequence[str]) -> str:
        """The latest values of some metrics, for the progress bar. Raises UserError naming all that are not finite."""
        are_finite = torch.stack([*self.sums.values()]).isfinite().tolist()
        if bad := [name for name, is_finite in zip(self.sums, are_finite) if not is_finite]:
            raise UserError(f"iteration {self.iteration}: not finite: {', '.join(bad)}; a lower --lr may help")
        values = torch.stack([self.latest[name] for name in names]).tolist()
        return ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values))

    def means(self) -> dict[str, float]:
        """The means over the iterations, and over all processes (each must call this)."""
        state = self.state()
        return dict(zip(state["names"], (state["sums"] / state["counts"]).tolist()))

    def state(self) -> dict:
        """For a checkpoint: sums are the means over all processes (each must call this)."""
        sums = torch.tensor(utils.gather([value.item() for value in self.sums.values()])).mean(dim=0)
        return {"names": list(self.sums), "sums": sums, "counts": torch.tensor([*self.counts.values()])}

    def restore(self, state: dict, device: torch.device) -> None:
        """Put back `state`; that of the oldest runs has no names, and is left."""
        for name, value, count in zip(state.get("names", ()), state["sums"].to(device), state["counts"].tolist()):
            if count:
                self.sums[name], self.counts[name] = value, int(count)


class Run:
    """A training from its first or its next iteration to the last; `loop` is the training.

    Its trainer is a `TransferTrainer` or a `Distiller`: begin(iteration) sets what changes from step to step, counted
    from 1; step(*batch, all_terms) returns metrics, some only with `all_terms`, of which `shown` go beside the progress
    bar; report(folder, iteration) writes what shows how far the run is, and returns what joins the metrics, and a
    picture's path or None; state() and restore(checkpoint) are what a checkpoint needs beside the settings.
    """

    def __init__(self, mode: str, config, trainer, folder: CheckpointFolder, pictures: TrainingPictures,
                 tallies: Sequence[FailedPictures], checkpoint: dict | None) -> None:
        """config: of the mode; tallies: of each folder of pictures; checkpoint: from `open_config`."""
        self.mode, self.config, self.trainer, self.folder = mode, config, trainer, folder
        self.pictures, self.tallies, self.sums = pictures, tallies, MetricSums()
        self.picture_counts = [len(paths) for paths in pictures.folders]
        self.workers = min(8, utils.usable_cores()) if config.num_workers is None else config.num_workers
        self.iteration = self.samples_seen = 0  # samples: by all processes together, where in the data the run is
        if checkpoint is not None:
            if checkpoint["picture_counts"] != self.picture_counts:
                note(f"the folders changed: {self.picture_counts} pictures to learn from, before "
                     f"{checkpoint['picture_counts']}; the order of pictures is another one")
            trainer.restore(checkpoint)
            trainer.optimizer.load_state_dict(checkpoint["optimizer"])
            self.iteration, self.samples_seen = checkpoint["iteration"], checkpoint["samples_seen"]
            self.sums.restore(checkpoint["metric_sums"], trainer.device)
        self.metrics_path = folder.folder / "metrics.jsonl"
        if process_rank() == 0:
            truncate_metrics(self.metrics_path, self.iteration)
        self.wandb_run = WandbRun(config, folder.folder, checkpoint and checkpoint["wandb_id"])
        self.go_on = f"go on with: python main.py --mode {mode} --resume --save_path {config.save_path}"

    def loop(self) -> int:
        """The iterations that are left. Returns the exit code: 0, or 128 + the signal that stopped it."""
        try:
            return self._loop()
        except Exception as error:
            # A worker's end is raised wherever this process is, so also where other errors are translated.
            reason = self._reason_of(error) or self._reason_of(error.__cause__)
            if reason is None and not isinstance(error, UserError):
                raise
            last = f"the last good checkpoint is {self.folder.newest}, {self.go_on}"
            raise UserError(f"{reason or error}; "
                            f"{last if self.folder.newest.exists() else 'no checkpoint was written yet'}") from error
        finally:
            self.wandb_run.finish()
            for tally in self.tallies:
                utils.note_of_process(tally.summary())

    def _reason_of(self, error: BaseException | None) -> str | None:
        """What a library's error says, in words, that the user can put right; None for another error."""
        if "DataLoader worker" in str(error):
            return f"--num_workers {self.workers}: a process that decodes pictures was killed; fewer need less memory"
        if process_count() > 1 and isinstance(error, RuntimeError) and (
                isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            return f"iteration {self.iteration + 1}: another process of this run has ended"
        # torch.compile passes on what its backends raise: no compiler, no Triton, a GPU too old for it.
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return f"--compile: torch.compile failed ({str(error).strip().splitlines()[0]})"
        return None

    def _loop(self) -> int:
        config, trainer, processes = self.config, self.trainer, process_count()
        on_cpu = trainer.device.type == "cpu"
        together = config.batch_size * processes  # pictures of an iteration: each process takes its batch of them
        first = self.samples_seen + process_rank() * config.batch_size
        starts = range(first, first + (config.max_iter - self.iteration) * together, together)
        positions = chain.from_iterable(range(start, start + config.batch_size) for start in starts)
        batches = training_batches(self.pictures, positions, config.batch_size, self.workers, pin_memory=not on_cpu)
        bar = utils.progress_bar(config.max_iter, self.mode, "it", initial=self.iteration)
        shown, is_due, stopping = time.perf_counter(), False, False
        with utils.catch_stop_signals() as stop, bar, closing(batches):
            while self.iteration < config.max_iter and not stopping:
                try:
                    batch = self._next_batch(batches, stop)
                except SystemExit:
                    break
                self.iteration += 1
                self.samples_seen += together
                is_due = self.iteration % config.check_iter == 0 or self.iteration == config.max_iter
                trainer.begin(self.iteration)
                self.sums.add(trainer.step(*batch, all_terms=is_due), self.iteration)
                # Asking the others costs a round trip, so at the speed of a GPU not at every iteration.
                asks = processes == 1 or on_cpu or is_due or self.iteration % STOP_INTERVAL == 0
                stopping = asks and any(utils.gather(bool(stop)))
                if on_cpu or is_due or stopping or time.perf_counter() - shown > 1.0:
                    bar.set_postfix_str(self.sums.show(trainer.shown), refresh=False)
                    shown = time.perf_counter()
                if is_due:
                    self.checkpoint()
                bar.update()
            if self.iteration == config.max_iter:
                return 0
            if not is_due:
                self.save()
        note(f"stopped after iteration {self.iteration}, saved, {self.go_on}")
        return 128 + stop.signal_number if stop else 0  # as a shell has it; 0 where another process was told to stop

    def _next_batch(self, batches: Iterator[tuple], stop: utils.StopRequest) -> list[Tensor]:
        """The pictures of the next batch, on the device. Raises SystemExit where a stop signal ends the wait; not
        among several processes: the others would wait for the one that left."""
        stop.ends = process_count() == 1
        try:
            stop.end()  # for a signal from before
            *batch, failures = next(batches)
        finally:
            stop.ends = False
        count_failures(failures, self.tallies)
        return [pictures.to(self.trainer.device, non_blocking=True) for pictures in batch]

    def checkpoint(self) -> None:
        """Every `check_iter` iterations: metrics, what the trainer reports, a checkpoint."""
        means, self.sums = self.sums.means(), MetricSums()
        if process_rank() == 0:
            more, picture = self.trainer.report(self.folder.folder, self.iteration)
            append_metrics(self.metrics_path, {"iteration": self.iteration, **means, **more})
            self.wandb_run.log(means | more, self.iteration, picture)
        self.save()
        for tally in self.tallies:
            tally.add_other_processes()

    def save(self) -> None:
        """Write the checkpoint. Raises UserError, and writes nothing, when a weight is not finite."""
        metric_sums = self.sums.state()
        if process_rank() > 0:
            return
        state = self.trainer.state()
        if not all(tensor.isfinite().all() for tensor in state["state_dict"].values()):
            raise UserError(f"iteration {self.iteration}: a weight is not finite; a lower --lr may help")
        self.folder.save(state | {
            "format": utils.CHECKPOINT_FORMAT, "iteration": self.iteration,
            f"{self.mode}_config": _with_absolute_paths(asdict(self.config)),
            "optimizer": self.trainer.optimizer.state_dict(), "metric_sums": metric_sums,
            "samples_seen": self.samples_seen, "processes": process_count(), "picture_counts": self.picture_counts,
            "wandb_id": self.wandb_run.id,
        }, self.iteration)

"""What every row stands on: bad-input errors, lines on stderr, processes, device and memory, signals, and files that
survive a kill."""

import errno
import io
import os
import secrets
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import psutil
import torch
from torch import Tensor, distributed
from tqdm import tqdm

CHECKPOINT_NAME = "check_point.pth"
CHECKPOINT_FORMAT = 1


class UserError(ValueError):
    """Something the user can put right: one line with what was got, what is needed, which flag or path."""


@contextmanager
def errors_in_one_line():
    """Around the `main` of a script: where it raises UserError, the message goes to stderr, and the exit code is 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=STDERR)
        raise SystemExit(2) from error


def lacks_memory(error: Exception) -> bool:
    """Whether it says that the memory of the machine or of the GPU is too small."""
    # numpy and Pillow raise MemoryError, torch a RuntimeError, the system an OSError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in ("DefaultCPUAllocator", "out of memory", "bad_alloc", "calculation overflowed",
                                        "can't start new thread", "could not create a primitive",
                                        os.strerror(errno.ENOMEM)))


def import_extra(module: str, extra: str, wanted_by: str):
    """A module of a package that only an extra of pyproject.toml brings. Raises UserError where it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{wanted_by}: {error}; in the toolkit's folder: pip install '.[{extra}]'") from error


class _Stream:
    """sys.stdout or sys.stderr, whichever is there when something is said. A program may have none (a service), one of
    its own with `write` alone, or one that has been closed, whose reader has ended, or that lacks a letter: nothing of
    that may cost what was computed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str):  # tqdm asks for more, and does without
        return getattr(getattr(sys, self._name), attribute)

    def write(self, text: str) -> None:
        with suppress(Exception):
            encoding = getattr(self, "encoding", None) or "utf-8"
            getattr(sys, self._name).write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        with suppress(Exception):
            getattr(sys, self._name).flush()

    def isatty(self) -> bool:
        with suppress(Exception):
            return getattr(sys, self._name).isatty()
        return False


STDOUT, STDERR = _Stream("stdout"), _Stream("stderr")
show = partial(print, file=STDOUT)


class _Bar(tqdm):
    """Without the thread and the lock between processes that tqdm would leave in the program that imports this one."""

    monitor_interval = 0


_Bar.set_lock(threading.RLock())


def note(message: str) -> None:
    """Print one line on stderr, above a progress bar where there is one; of several processes, the first does."""
    if process_rank() == 0:
        _Bar.write(message, file=STDERR)


def note_of_process(message: str) -> None:
    """`note` of every process: of several, each line tells whose it is."""
    _Bar.write(f"rank {process_rank()}: {message}" if process_count() > 1 else message, file=STDERR)


def progress_bar(total: int, description: str, unit: str, hidden: bool = False, **more) -> tqdm:
    """A tqdm bar that redraws twice a second on a terminal, and every half minute into a log file."""
    return _Bar(file=STDERR, total=total, desc=description, unit=unit, dynamic_ncols=True,
                mininterval=0.5 if STDERR.isatty() else 30.0, disable=hidden or process_rank() > 0, **more)


# ------------------------------------------------------------------------------------------ processes


def process_rank() -> int:
    """This process's number among those that torchrun started, 0 without torchrun."""
    return int(os.environ.get("RANK") or 0)


def process_count() -> int:
    """How many processes torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_processes() -> None:
    """Raises UserError where a scheduler or a notebook has left WORLD_SIZE or RANK behind: the process would wait for
    others that nobody started, or write nothing, without a word."""
    missing = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing and (process_count() > 1 or process_rank() > 0):
        raise UserError(f"the environment says that this is process {process_rank()} of {process_count()}, but has no "
                        f"{', '.join(sorted(missing))}, which torchrun sets, too; for one process: unset WORLD_SIZE "
                        "RANK; for several: start with torchrun")


@contextmanager
def process_group(device: torch.device, patience: timedelta | None = None):
    """Within the block the processes of torchrun talk to each other; without torchrun nothing happens.

    patience: how long one waits for the others, None: as torch does, 10 or 30 minutes.
    """
    if process_count() == 1:
        yield
        return
    # Tensors on the CPU always go by gloo: the stop flag does, also where gradients go by NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, processes = next(distributed.rendezvous("env://"))
    # After a restart torchrun's store still has the addresses of the processes that ended (torch 2.14). The count of
    # restarts is the same for all only on one machine.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=patience)
    # After an error the group ends with the process, which says why before the others see that it has gone.
    yield
    distributed.destroy_process_group()


def gather_with_gradient(rows: Tensor) -> Tensor:
    """The rows of all processes, (n * processes, ...), in the order of their numbers. rows: (n, ...).

    A loss of them is one number, which each process differentiates by its own rows alone: their gradient is scaled up,
    so that the average that DistributedDataParallel takes over the processes becomes a sum.
    """
    processes = process_count()
    if processes == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(processes)]
    distributed.all_gather(gathered, rows.detach())
    gathered[process_rank()] = rows.detach() + processes * (rows - rows.detach())
    return torch.cat(gathered)


def gather(value) -> list:
    """The value of every process, in the order of their numbers; each must call this. value: plain types, pictures, and
    tensors on the CPU. Raises UserError when one of the processes has ended."""
    if process_count() == 1:
        return [value]
    values = [None] * process_count()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise UserError("another process of this run has ended; its own line says why") from error
    return values


# --------------------------------------------------------------------------------------------- device


def resolve_device(gpu_no: int | None, tf32: bool = True) -> torch.device:
    """The device of `--gpu_no`: -1 is the CPU; None is a GPU where there is one, for each process of torchrun another.

    A GPU becomes torch's current one, so that nothing is put on another. Raises UserError when it is not there. tf32:
    whether float32 convolutions on it may round their inputs to 10 bits, as training does, whose mixed precision rounds
    more. Matrix products never may: they are the losses' Gram matrices and correlations.
    """
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32, False
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu_no is None:
        gpu_no = (int(os.environ["LOCAL_RANK"]) if process_count() > 1 else 0) if count else -1
    if not -1 <= gpu_no < count:
        raise UserError(f"gpu_no {gpu_no}: this machine has {count} usable CUDA GPU(s), counted from 0; -1 is the CPU")
    if gpu_no == -1:
        return torch.device("cpu")
    torch.cuda.set_device(gpu_no)
    return torch.device("cuda", gpu_no)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device. On the CPU: what the machine, `ulimit -v` and `ulimit -d`,
    and the control groups leave, the least of them."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    process, left = psutil.Process(), [psutil.virtual_memory().available]
    used = process.memory_info()
    for limit, taken in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
        if (most := process.rlimit(limit)[0]) != psutil.RLIM_INFINITY:
            left.append(most - taken)
    # Version 2 and 1: the limit (from "high" on a job is slowed down), what is taken, and the part of it that files
    # take, which makes way, without files in memory.
    for limit, taken, before in (("memory.max", "memory.current", ""), ("memory.high", "memory.current", ""),
                                 ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")):
        for group in _control_groups("memory"):
            with suppress(OSError, ValueError):  # no such file, or no limit ("max")
                parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                files = int(parts.get("file", parts.get("total_cache", 0))) - int(parts.get(f"{before}shmem", 0))
                left.append(int((group / limit).read_text()) - int((group / taken).read_text()) + files)
    return max(0, min(left))


def usable_cores() -> int:
    """The cores that this process may use: by its affinity, and by the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0))
    for group in _control_groups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # of version 2, of version 1
            with suppress(OSError, ValueError):  # no such file, or no quota ("max", -1)
                quota, period = map(int, " ".join((group / name).read_text() for name in files).split())
                cores = min(cores, max(1, quota // period)) if quota > 0 else cores
    return cores


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, of version 2 and 1, and of those above: a container's,
    a job's under SLURM or systemd."""
    listed = Path("/proc/self/cgroup")  # which not every container shows
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):  # of version 2, of version 1: cpu,cpuacct, say
            for name in {controllers, controllers and controller}:  # either may name the folder
                folder = Path(f"/sys/fs/cgroup/{name}{group}")
                yield from (folder, *folder.parents)


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The data type of mixed precision for `--amp`, or None for float32 throughout.

    `auto` is bfloat16 where it is faster than float32: on GPUs of compute capability 8.0 or newer, and on CPUs with AMX
    or, from AMD, with AVX512-BF16. Others take longer in it, up to 60 times (see docs/performance.md).
    """
    if device.type == "cuda":
        is_fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = _cpu_says("flags").split()
        is_fast = "amx_tile" in flags or "avx512_bf16" in flags and _cpu_says("vendor_id") == "AuthenticAMD"
    return torch.bfloat16 if amp == "bf16" or amp == "auto" and is_fast else None


def _cpu_says(name: str) -> str:
    """What a line of Linux's /proc/cpuinfo says of the first core; empty where there is no such line or file."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
    return ""


def describe_device(device: torch.device) -> str:
    """The device's name as a person would write it beside a measurement."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_says('model name') or 'CPU'}, {torch.get_num_threads()} threads"


def time_in_turns(calls: list[Callable], turns: int, device: torch.device, warmup: int = 2) -> list[list[float]]:
    """Seconds that each call took in each turn, `calls` x `turns`, after `warmup` turns that do not count.

    The calls take turns, so that a change in the machine's speed meets all alike.
    """
    times = [[] for _ in calls]
    for turn in range(-warmup, turns):
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                taken.append(time.perf_counter() - start)
    return times


# -------------------------------------------------------------------------------------------- signals


# Of schedulers, systemd, docker stop, and terminals that are closed; Ctrl-C is the first.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class StopRequest:
    """Remembers that one of STOP_SIGNALS came, so that a loop can finish its step and save."""

    signal_number: int | None = None
    ends: bool = False  # whether it raises SystemExit, too: set while a loop waits for what may never come

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def end(self) -> None:
        if self and self.ends:
            raise SystemExit(128 + self.signal_number)  # as a shell has it


@contextmanager
def catch_stop_signals(only=None, ends: bool = False):
    """Within the block the first of STOP_SIGNALS only sets the yielded StopRequest; Ctrl-C after it acts at once. Of
    the others, schedulers and shells send several. In a program's main thread; signals that are ignored stay so, as
    nohup has it, and with `only` all but those that have this handler do. ends: see StopRequest."""
    request, ctrl_c = StopRequest(ends=ends), signal.getsignal(signal.SIGINT)

    def remember(number, _frame):
        if not request:
            request.signal_number = number
            signal.signal(signal.SIGINT, ctrl_c or signal.SIG_DFL)
            request.end()

    with ExitStack() as block:
        for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None) and only in (before, None):
                block.callback(signal.signal, number, signal.signal(number, remember))
        yield request


def tidy_end():
    """Within the block the first of STOP_SIGNALS ends the program as an exception does, so that what was half-written
    goes; not where they are caught already, nor among several processes, which would wait for each other's end."""
    return catch_stop_signals(signal.SIG_DFL, ends=True) if process_count() == 1 else nullcontext()


# --------------------------------------------------------------------------------------------- files


# What shares and file systems in user space say that cannot do it, and not that a disk fails or is full.
NOT_SYNCED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
NOT_RENAMED = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY, errno.EEXIST, *NOT_SYNCED)  # over an open file


@contextmanager
def replacing(path: Path, durable: bool = False):
    """A temporary file beside `path`, open for writing, that becomes `path` at the end of the block.

    A kill at any moment leaves either the old file or the new one, never half of one; with `durable`, a crash of the
    machine does, too, where the file system can. A link stays, and what it leads to is written. Raises OSError that
    names `path`.
    """
    named, path, old = path, Path(os.path.realpath(path)), None
    if path.is_symlink():  # its end was not found
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(named))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                _sync(file)
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in NOT_RENAMED or path.is_dir():
                raise
            if path.exists() and path.stat().st_nlink > 1:
                path.unlink()  # its other names keep what it held
            path.touch()
            with open(path, "r+b") as old, open(temporary, "rb") as new:  # where this is refused, nothing is lost yet
                shutil.copyfileobj(new, old)
                old.truncate()
                if durable:
                    _sync(old)
            temporary.unlink()
        if durable:  # the rename itself is only on the disk once the folder is, of which a share may know nothing
            with suppress(OSError), ExitStack() as block:
                folder = os.open(path.parent, os.O_RDONLY)
                block.callback(os.close, folder)
                os.fsync(folder)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(named)  # a write does not say whose it was
            error.filename2 = old and str(temporary)
        if old is None:  # else the old one is half overwritten, and the new one whole
            temporary.unlink(missing_ok=True)
        raise


def _sync(file: BinaryIO) -> None:
    """Have the disk hold a file, where its file system can be asked for that."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NOT_SYNCED:
            raise


def write_atomically(path: Path, write: Callable, durable: bool = False) -> None:
    """Put what `write(file)` writes into `path`, see `replacing`.

    `write` gets memory, not the file: libraries do not pass on why a disk took no more of theirs.
    """
    content = io.BytesIO()
    write(content)
    with replacing(path, durable) as file:
        file.write(content.getbuffer())


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda file: file.write(text.encode()))


def missing(path: Path) -> str:
    """What there is in place of a file that cannot be opened because it is not there."""
    return f"no such file: it is a link to {os.readlink(path)}" if os.path.islink(path) else "no such file"


def make_folder(path: Path, flag: str) -> Path:
    """Create `path` as a folder, parents included. Raises UserError naming `flag` when that cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = missing(path) if os.path.islink(path) and not os.path.exists(path) else error.strerror
        raise UserError(f"{flag} {path}: a folder is needed, and cannot be made ({reason})") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path}: the folder cannot be written to")
    return path


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder that are named by their iteration, oldest first."""
    return sorted(folder.glob("check_point_[0-9]*.pth"), key=lambda path: (len(path.name), path.name))


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a dictionary of plain types and tensors to `path`, see `replacing`. Raises UserError when it cannot."""
    try:
        write_atomically(path, lambda file: torch.save(checkpoint, file), durable=True)
    except OSError as error:
        kept = "; the one before is untouched" if Path(path).exists() else ""
        kept = f"; it is whole in {error.filename2}" if error.filename2 else kept
        raise UserError(f"{path}: the checkpoint cannot be written ({error.strerror}){kept}") from error


def load_checkpoint(path: Path, flag: str = "--load_path") -> dict:
    """Read a checkpoint to the CPU. Code pickled in the file is refused, never run.

    Raises UserError, naming `flag`, when the file is missing, unreadable, no checkpoint, or holds code.
    """
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: {missing(path)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the zip reader, the unpickler or a tensor's constructor met
        reason = f"no model file, or a damaged one ({type(error).__name__})"
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # this one comes of reading before the beginning
            reason = f"cannot be read ({error.strerror or error})"
        elif "Unsupported" in str(error) and "GLOBAL" in str(error):
            reason = "carries pickled code or objects other than tensors and plain types; nothing in it was run"
        older = numbered_checkpoints(Path(path).parent)
        if older and Path(path).name == CHECKPOINT_NAME:
            reason += f"; an older one is {older[-1].name}"
        raise UserError(f"{flag} {path}: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{flag} {path}: holds a {type(checkpoint).__name__}, a dictionary is needed")
    return checkpoint

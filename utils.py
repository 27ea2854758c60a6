"""Process plumbing: bad-input errors, device, seed, signals, checkpoint files, metric logging."""

import ctypes
import os
import pickle
import random
import secrets
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

CHECKPOINT_NAME = "check_point.pth"
CHECKPOINT_FORMAT = 1


class UserError(ValueError):
    """Something the user can put right: one line with what was got, what is needed, which flag or path.

    `main.py` prints the message on stderr and exits with code 2.
    """


def lacks_memory(error: Exception) -> bool:
    """Whether it says that the memory of the machine or of the GPU is too small."""
    # numpy and Pillow raise MemoryError, torch a RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in ("DefaultCPUAllocator", "out of memory", "bad_alloc"))


def note(message: str) -> None:
    """Print one line on stderr, above a progress bar where there is one; of several processes, the first does."""
    if is_first_process():
        tqdm.write(message, file=sys.stderr)


def note_of_process(message: str) -> None:
    """`note` of every process: of several, each line tells whose it is."""
    tqdm.write(f"rank {process_rank()}: {message}" if process_count() > 1 else message, file=sys.stderr)


def progress_bar(total: int, description: str, unit: str, hidden: bool = False, **more) -> tqdm:
    """A tqdm bar that redraws twice a second on a terminal, and every half minute into a log file."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, mininterval=interval,
                disable=hidden or not is_first_process(), **more)


# ------------------------------------------------------------------------------------------ processes


def process_rank() -> int:
    """This process's number among those that torchrun started, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def process_count() -> int:
    """How many processes torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    return process_rank() == 0


def check_processes() -> None:
    """Raises UserError where WORLD_SIZE or RANK tells of several processes that torchrun did not start: a scheduler
    or a notebook can leave them behind, and each would wait for the others, or write nothing, without a word."""
    alone = {"WORLD_SIZE": "1", "RANK": "0"}
    left = {name: os.environ[name] for name in alone if os.environ.get(name, alone[name]) != alone[name]}
    missing = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if name not in os.environ]
    if left and missing:
        found = " and ".join(f"{name}={value}" for name, value in left.items())
        names = " ".join(name for name in alone if name in os.environ)
        raise UserError(f"the environment has {found}, but not {', '.join(missing)}, which torchrun sets, too; for "
                        f"one process: unset {names}; for several: start with torchrun")


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
    distributed.init_process_group(backend, store=store, rank=rank, world_size=processes,
                                   timeout=patience)
    ends_here = True
    try:
        yield
    except UserError:
        ends_here = False  # but with the process: it says why before the others see that it has gone
        raise
    finally:
        if ends_here:
            distributed.destroy_process_group()


def gather_with_gradient(rows: Tensor) -> Tensor:
    """The rows of all processes, (n * processes, ...), in the order of their numbers. rows: (n, ...).

    DistributedDataParallel averages gradients over the processes. A loss of the gathered rows is one number
    that each process differentiates by its own rows only, so their gradient is scaled up to make the
    average a sum.
    """
    processes = process_count()
    if processes == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(processes)]
    distributed.all_gather(gathered, rows.detach())
    gathered[process_rank()] = rows.detach() + processes * (rows - rows.detach())
    return torch.cat(gathered)


def average_over_processes(values: Tensor) -> Tensor:
    """The mean of `values` over all processes; each must call this."""
    if process_count() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values / process_count()


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; each must call this."""
    if process_count() == 1:
        return flag
    shared = torch.tensor(int(flag))
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return bool(shared)


def share(items: list) -> list:
    """This process's part of the items, in order: as many as any other's, or one more or less."""
    rank, count = process_rank(), process_count()
    return items[len(items) * rank // count : len(items) * (rank + 1) // count]


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


def usable_cores() -> int:
    """The cores that this process may use: by its affinity, and by the quota of its control group (Linux)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups of version 2, or no quota ("max")
        pass
    return cores


def worker_count(asked: int | None) -> int:
    """The processes that decode pictures: as asked, or one a usable core, at most 8."""
    return asked if asked is not None else min(8, usable_cores())


# --------------------------------------------------------------------------------------------- device


def resolve_device(gpu_no: int | None) -> torch.device:
    """The device of `--gpu_no`: None picks GPU 0 when there is one, else the CPU; -1 is the CPU.

    On the CPU, freed memory stays with the process from here on, see `keep_freed_memory`.
    A GPU becomes torch's current one, so that nothing is put on another. Raises UserError when a GPU is asked for that
    is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu_no is None and count and process_count() > 1:
        gpu_no = int(os.environ["LOCAL_RANK"])  # torchrun: one GPU a process
    if gpu_no is None:
        gpu_no = 0 if count else -1
        if not count and torch.backends.mps.is_available():
            note("Apple's GPU (MPS) is not supported: the CPU computes")
    if gpu_no == -1:
        keep_freed_memory()
        return torch.device("cpu")
    if gpu_no < -1:
        raise UserError(f"--gpu_no {gpu_no}: expected -1 for the CPU, or the number of a GPU")
    if gpu_no >= count:
        raise UserError(f"--gpu_no {gpu_no}: this machine has {count} usable CUDA GPU(s); use -1 for the CPU")
    torch.cuda.set_device(gpu_no)
    return torch.device("cuda", gpu_no)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 convolutions and matrix products on a GPU may round their inputs to TF32's 10 bits.

    Training may: its mixed precision rounds more. Pictures and measurements are computed in full float32; torch alone
    would round convolutions.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


# glibc's mallopt parameters, and its own defaults for them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_THRESHOLD, _MMAP_MAX = 128 * 1024, 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """Let malloc keep freed memory for its next use, instead of giving large blocks back to the kernel.

    A feature map is tens of MiB: given back and asked for anew at every layer, its pages must be mapped
    and zeroed each time, which can take longer than the layer's arithmetic. The price: the process stays
    as large as its peak. `keep=False` restores malloc's default. Returns whether malloc (glibc's) took it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = (2**31 - 1, 0) if keep else (_TRIM_THRESHOLD, _MMAP_MAX)
    return bool(mallopt(_M_TRIM_THRESHOLD, trim_threshold) and mallopt(_M_MMAP_MAX, mmap_max))


def release_freed_memory() -> None:
    """Give the kernel what malloc (glibc's) keeps, see `keep_freed_memory`: blocks of many sizes leave gaps between
    them, and the process grows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device; None where that cannot be told (the CPU without Linux).

    On the CPU: what the machine, the control group (version 2) and `ulimit -v` leave, the least of them, and what
    malloc has been given back and keeps.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        left = [_kibibytes("/proc/meminfo", "MemAvailable:")]
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            left.append(limit - _kibibytes("/proc/self/status", "VmSize:"))
    except (OSError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(files["file"])  # files in memory make way
        left.append(int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError, KeyError):  # no control groups of version 2, or no limit ("max")
        pass
    return max(0, min(left)) + _kept_by_malloc()


def _kibibytes(path: str, name: str) -> int:
    """The bytes of a line "name  number kB"."""
    (line,) = [line for line in Path(path).read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]


def _kept_by_malloc() -> int:
    """Bytes that glibc's malloc holds and nobody uses, see `keep_freed_memory`; 0 where it does not tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallocInfo
    return mallinfo().fordblks


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The data type of mixed precision for `--amp`, or None for float32 throughout.

    `auto` is bfloat16 where the device computes in it: GPUs of compute capability 8.0 or newer, CPUs with AMX or
    AVX512-BF16. Other CPUs run bfloat16 convolutions 10 to 60 times slower than float32, so `auto` leaves it off there.
    """
    if amp == "off":
        return None
    if amp == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return torch.bfloat16 if any(supported() for supported in asked if supported is not None) else None


def describe_device(device: torch.device) -> str:
    """The device's name as a person would write it beside a measurement."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads"


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


# ------------------------------------------------------------------------------- seed and random state


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict:
    """The random state of torch, as plain tensors for a checkpoint.

    Pictures are drawn by position (see `sampling.TrainingPictures`), so torch's generators are the only
    random state that a run carries along.
    """
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = [torch.cuda.get_rng_state()]  # of the run's own GPU: asking others would put a context there
    return state


def restore_random_state(state: dict) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized() and len(state.get("cuda", [])) == 1:  # an older run's file has one for every GPU
        torch.cuda.set_rng_state(state["cuda"][0])


# -------------------------------------------------------------------------------------------- signals


class StopRequest:
    """Remembers that SIGINT or SIGTERM came, so that a loop can finish its step and save."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, as a shell reports them."""
        return 128 + self.signal_number


@contextmanager
def catch_stop_signals():
    """Within the block SIGINT and SIGTERM only set the yielded StopRequest; a second one acts at once."""
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number, _frame):
        request.signal_number = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, remember)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    A kill at any moment leaves either the old file or the new one, never half of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write does not say whose it was
        raise
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    # The rename itself is only durable once the folder's entry is on the disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda file: file.write(text.encode()))


def make_folder(path: Path, flag: str) -> Path:
    """Create `path` as a folder, parents included. Raises UserError naming `flag` when that cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{flag} {path}: a file is in the way, a folder is needed") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: the folder cannot be made ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path}: the folder cannot be written to")
    return path


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a dictionary of plain types and tensors to `path` atomically. Raises UserError when it cannot."""
    try:
        write_atomically(path, lambda file: torch.save(checkpoint, file))
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise UserError(f"{path}: the checkpoint cannot be written ({error}); the last one is untouched") from error


def load_checkpoint(path: Path, flag: str = "--load_path") -> dict:
    """Read a checkpoint to the CPU. Code pickled in the file is refused, never run.

    Raises UserError, naming `flag`, when the file is missing, unreadable, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file")
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder, a model file (.pth) is needed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) and "GLOBAL" in str(error):
            raise UserError(
                f"{flag} {path}: the file carries pickled code or objects other than tensors and plain "
                "types; it was refused and nothing in it was run"
            ) from error
        raise UserError(f"{flag} {path}: not a model file (torch cannot read it)") from error
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error
    # torch.load passes on whatever the zip reader, the unpickler or a tensor constructor met in a
    # damaged file, and documents no closed list of it.
    except Exception as error:
        kind = "a damaged model file" if zipfile.is_zipfile(path) else "not a model file"
        raise UserError(f"{flag} {path}: {kind} (torch cannot read it: {type(error).__name__})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{flag} {path}: holds a {type(checkpoint).__name__}, a dictionary is needed")
    return checkpoint

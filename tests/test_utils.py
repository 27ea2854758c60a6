"""Files that survive a kill, device, memory, signals, processes."""

import errno
import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from helpers import CPU, limit_file_system, user_error
from PIL import Image

import utils
from data import save_picture
from exporting.webpage import write_page
from pruning.plots import plot_l0_maps
from pruning.responses import Responses
from training.run_folder import append_metrics
from training.sampling import PictureCache

# -------------------------------------------------------------------------------------------------- files


def test_written_file_holds_what_was_written(tmp_path):
    path = tmp_path / "file.bin"
    utils.write_atomically(path, lambda file: file.write(b"first"))
    with utils.replacing(path) as file:
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"  # whole while the new one is written
    assert path.read_bytes() == b"second"
    utils.write_text_atomically(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode() and os.listdir(tmp_path) == ["file.bin"]


def test_links_are_followed_and_those_without_an_end_are_named(tmp_path):
    (tmp_path / "there").mkdir()
    for name, target in (("new", "there/new.bin"), ("nothing", "nowhere/a.bin"), ("circle", "circle")):
        (tmp_path / name).symlink_to(target)
    utils.write_text_atomically(tmp_path / "new", "text")
    assert (tmp_path / "new").is_symlink() and (tmp_path / "there" / "new.bin").read_text() == "text"
    for path, target in ((tmp_path / "nothing", "nowhere/a.bin"), (tmp_path / "circle", "circle")):
        with pytest.raises(OSError) as caught:
            utils.write_text_atomically(path, "text")
        assert caught.value.filename == str(path) and path.is_symlink()
        for function in (utils.load_checkpoint, utils.make_folder):
            assert f"no such file: it is a link to {target}" in user_error(function, path, "--save_path")


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad"), KeyboardInterrupt()])
def test_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.bin"
    for before in ([], ["file.bin"]):
        with pytest.raises(type(error)), utils.replacing(path) as file:
            file.write(b"half of the n")
            raise error
        assert os.listdir(tmp_path) == before
        path.write_bytes(b"old")
    assert path.read_bytes() == b"old"


WRITERS = {
    "checkpoint": lambda path: utils.save_checkpoint({"weights": torch.zeros(10_000)}, path),
    "picture": lambda path: save_picture(Image.effect_noise((200, 100), 60).convert("RGB"), path.with_suffix(".png")),
    "cached picture": lambda path: PictureCache(path.parent)._write(np.zeros((100, 100, 3), np.uint8), path),
    "array": lambda path: utils.write_atomically(path, lambda file: np.savez(file, zeros=np.zeros(10_000))),
    "plot": lambda path: plot_l0_maps({"a": Responses(np.random.default_rng(0).random((90, 90)) - 0.5, [], 45)}, path),
    "text": lambda path: utils.write_text_atomically(path, "text " * 10_000),
    "metrics": lambda path: append_metrics(path, {"loss": "1" * 30_000}),
    "page": lambda path: write_page(path.parent / "page", {"index.html": b"x" * 30_000}),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])  # while it is written; when it is opened
def test_what_the_disk_refuses_is_said_with_the_reason(tmp_path, monkeypatch, capsys, kind, number):
    """By an error, as `main` words it, or on stderr, whichever call meets it; nothing is left behind."""
    real = open

    class Refusing(io.FileIO):
        def write(self, content):
            raise OSError(number, os.strerror(number))

    def refuse(path, mode="r", *more, **named):
        if not str(path).startswith(str(tmp_path)) or mode[0] not in "wa":
            return real(path, mode, *more, **named)
        if number == errno.EACCES:
            raise OSError(number, os.strerror(number))
        file = io.BufferedWriter(Refusing(path, mode[0]))
        return file if "b" in mode else io.TextIOWrapper(file)

    for module in ("builtins", "io"):  # paths write by io's
        monkeypatch.setattr(f"{module}.open", refuse)
    said = ""
    try:
        WRITERS[kind](tmp_path / "file")
    except utils.UserError as error:
        said = str(error)
    except OSError as error:
        said = f"{error.filename}: {error.strerror}"
    said += capsys.readouterr().err.strip()
    assert str(tmp_path) in said and os.strerror(number) in said and len(said.splitlines()) == 1
    assert "untouched" not in said  # there was none before
    assert f"{tmp_path}/." not in said  # a file in the making
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("number, whole, said", [
    (errno.ENOSPC, 1, "(No space left on device); the one before is untouched"),
    (errno.ETXTBSY, 2, "(No such file or directory); it is whole in {tmp}/.check_point.pth."),  # half overwritten
])
def test_a_checkpoint_that_cannot_be_written_costs_none(tmp_path, monkeypatch, number, whole, said):
    path = tmp_path / "check_point.pth"
    utils.save_checkpoint({"iteration": 1}, path)
    limit_file_system(monkeypatch, ("os.replace",), number)
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: os.listdir("/no/such"))
    message = user_error(utils.save_checkpoint, {"iteration": 2}, path)
    assert message.startswith(f"{path}: the checkpoint cannot be written {said.replace('{tmp}', str(tmp_path))}")
    (newest,) = [*tmp_path.glob(".*")] or [path]
    assert utils.load_checkpoint(newest) == {"iteration": whole} and len(os.listdir(tmp_path)) == whole


@pytest.mark.parametrize("durable", [False, True])
def test_only_what_is_durable_waits_for_the_disk(tmp_path, monkeypatch, durable):
    """The file, and then its folder."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    utils.write_atomically(tmp_path / "a.bin", lambda file: file.write(b"content"), durable)
    assert [Path(each).suffix for each in synced] == [".tmp", ""] * durable
    assert (tmp_path / "a.bin").read_bytes() == b"content"


# ------------------------------------------------------------------------------------------------- device


@pytest.mark.parametrize("gpus, asked, desired", [
    (0, None, "cpu"), (0, -1, "cpu"), (2, -1, "cpu"), (2, None, "cuda:0"), (2, 0, "cuda:0"), (2, 1, "cuda:1"),
    (0, 0, None), (0, 1, None), (2, 2, None), (2, 99, None), (2, -2, None), (0, -3, None),
])
def test_the_gpu_that_is_asked_for_becomes_the_current_one_or_is_refused(monkeypatch, gpus, asked, desired):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if desired is None:
        message = user_error(utils.resolve_device, asked)
        assert f"gpu_no {asked}" in message and "-1 is the CPU" in message
    else:
        assert utils.resolve_device(asked) == torch.device(desired)
        assert chosen == [torch.device(desired).index] * desired.startswith("cuda")


@pytest.mark.parametrize("flags, vendor, capability, is_faster", [
    ("sse2 amx_tile", "GenuineIntel", None, True), ("avx512_bf16", "AuthenticAMD", None, True),
    ("avx512_bf16", "GenuineIntel", None, False), ("sse2", "AuthenticAMD", None, False), ("", "", None, False),
    ("", "", (7, 5), False), ("", "", (8, 0), True), ("", "", (9, 0), True),
])
def test_auto_takes_bfloat16_where_it_is_faster(monkeypatch, flags, vendor, capability, is_faster):
    device = CPU if capability is None else torch.device("cuda", 0)
    monkeypatch.setattr("utils._cpu_says", {"flags": flags, "vendor_id": vendor}.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.autocast_dtype("auto", device) == (torch.bfloat16 if is_faster else None)
    assert utils.autocast_dtype("off", device) is None and utils.autocast_dtype("bf16", device) == torch.bfloat16


# ------------------------------------------------------------------------------------------------ memory

OWN, JOB = "/sys/fs/cgroup/user.slice/run-r1.scope", "/sys/fs/cgroup/memory/slurm/job_7"
GROUPS = {
    "version 2": {"/proc/self/cgroup": "1:name=systemd:/\n0::/user.slice/run-r1.scope\n", f"{OWN}/memory.max": "3000",
                  f"{OWN}/memory.current": "500", f"{OWN}/memory.stat": "anon 400\nfile 100\ninactive_file 90\n"},
    "above": {"/proc/self/cgroup": "0::/user.slice/run-r1.scope\n", f"{OWN}/memory.max": "max",
              "/sys/fs/cgroup/user.slice/memory.max": "3000", "/sys/fs/cgroup/user.slice/memory.current": "500",
              "/sys/fs/cgroup/user.slice/memory.stat": "file 100\n"},
    "slowed down from": {"/proc/self/cgroup": "0::/user.slice/run-r1.scope\n", f"{OWN}/memory.high": "3000",
                         f"{OWN}/memory.max": "4000", f"{OWN}/memory.current": "500",
                         f"{OWN}/memory.stat": "file 150\nshmem 50\n"},
    "version 1": {"/proc/self/cgroup": "4:memory:/slurm/job_7\n0::/\n", f"{JOB}/memory.limit_in_bytes": "3000",
                  f"{JOB}/memory.usage_in_bytes": "500",
                  f"{JOB}/memory.stat": "cache 90\nshmem 7\ntotal_cache 120\ntotal_shmem 20\n"},
}


def test_a_container_need_not_show_its_processor(monkeypatch):
    pretend_files(monkeypatch, {})
    assert utils.describe_device(CPU).startswith("CPU, ") and utils.autocast_dtype("auto", CPU) is None


def pretend_files(monkeypatch, files: dict[str, str]) -> None:
    def read_text(path):
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr("utils.Path.read_text", read_text)


@pytest.mark.parametrize("kind", GROUPS)
def test_a_job_has_the_memory_that_its_control_group_leaves(monkeypatch, kind):
    """Of systemd, SLURM or a container; files in memory make way."""
    pretend_files(monkeypatch, GROUPS[kind])
    assert utils.free_memory(CPU) == 2600


CPU_JOB = "/sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs"


@pytest.mark.parametrize("files, desired", [
    ({f"{OWN}/cpu.max": "max 100000"}, 6), ({f"{OWN}/cpu.max": "250000 100000"}, 2),
    ({f"{OWN}/cpu.max": "max 100000", "/sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    ({f"{CPU_JOB}_quota_us": "300000", f"{CPU_JOB}_period_us": "100000"}, 3),
    ({f"{CPU_JOB}_quota_us": "-1", f"{CPU_JOB}_period_us": "100000"}, 6),
])
def test_a_job_has_the_cores_that_its_control_group_leaves(monkeypatch, files, desired):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(6)))
    groups = "3:cpuacct,cpu:/slurm/job_7\n0::/user.slice/run-r1.scope\n"
    pretend_files(monkeypatch, files | {"/proc/self/cgroup": groups})
    assert utils.usable_cores() == desired


@pytest.mark.parametrize("limit", [psutil.RLIMIT_AS, psutil.RLIMIT_DATA])
def test_a_process_has_the_memory_that_ulimit_leaves(monkeypatch, limit):
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(vms=500, data=500))
    monkeypatch.setattr(psutil.Process, "rlimit", lambda _, each: (3000 if each == limit else psutil.RLIM_INFINITY, 0))
    assert utils.free_memory(CPU) == 2500


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_program_that_is_told_to_end_leaves_nothing_half_written(tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as caught, utils.tidy_end(), utils.replacing(tmp_path / "video.mp4") as file:
            file.write(b"half")
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)  # schedulers send several
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert caught.value.code == 128 + number and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_first_signal_is_remembered_and_ctrl_c_acts_then(number):
    acted, numbers = [], {signal.SIGINT, number}
    before = {each: signal.signal(each, lambda *arguments: acted.append(arguments[0])) for each in numbers}
    try:
        with pytest.raises(ZeroDivisionError), utils.catch_stop_signals() as request:
            assert not request
            os.kill(os.getpid(), number)
            assert request and request.signal_number == number and acted == []
            for each in (number, signal.SIGINT):  # schedulers and shells send several
                os.kill(os.getpid(), each)
                assert set(acted) <= {signal.SIGINT} and request.signal_number == number
            assert acted and not acted.clear()
            raise ZeroDivisionError
        os.kill(os.getpid(), number)  # the handler is back, after an error, too
        assert acted == [number]
        signal.signal(number, signal.SIG_IGN)  # nohup, or a job in the background of a script
        with utils.catch_stop_signals() as request:
            os.kill(os.getpid(), number)
            assert not request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# ------------------------------------------------------------------------------------------ processes


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("given, is_refused", [
    ({}, False), ({"WORLD_SIZE": "1", "RANK": "0"}, False), ({"WORLD_SIZE": "", "RANK": ""}, False), (TORCHRUN, False),
    ({"WORLD_SIZE": "2"}, True), ({"RANK": "1"}, True), ({"WORLD_SIZE": "2", "RANK": "0"}, True),
    ({"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "10.0.0.1"}, True),
])
def test_left_over_variables_of_torchrun_are_refused(monkeypatch, given, is_refused):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
        if name in given:
            monkeypatch.setenv(name, given[name])
    if not is_refused:
        utils.check_processes()
        return
    message = user_error(utils.check_processes)
    assert f"has no {', '.join(sorted(TORCHRUN.keys() - given.keys()))}, which torchrun sets" in message

"""What goes wrong around a training: workers that die, data that does not come, runs that meet, resuming elsewhere."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from helpers import ROOT, read_metrics, refusal, user_error, words
from torch.testing import assert_close

import data
from evaluate import test as stylise
from train import train
from training import sampling
from training.run_folder import LOCK_NAME, CheckpointFolder
from training.sampling import _Batch, collate, training_batches
from utils import usable_cores, worker_count
from weights import BUNDLED_VGG19, same_vgg


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "check_point.pth", weights_only=True)["state_dict"]


def assert_same_weights(actual, desired) -> None:
    for name, tensor in weights_of(desired).items():
        assert_close(weights_of(actual)[name], tensor, rtol=0, atol=0, msg=name)


# ------------------------------------------------------------------------------------------------ workers


def test_batches_go_through_the_pipe_and_not_through_shared_memory():
    picture = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    batch = _Batch([(picture, picture + 1, []), (picture + 2, picture, [(0, "a.jpg", "broken")])])
    sent = ForkingPickler.dumps(batch)
    assert len(sent) > sum(array.nbytes for array in batch.pictures)
    actual, desired = ForkingPickler.loads(sent).unpack(), collate([
        (picture, picture + 1, []), (picture + 2, picture, [(0, "a.jpg", "broken")])])
    assert torch.equal(actual[0], desired[0]) and torch.equal(actual[1], desired[1]) and actual[2] == desired[2]


class Slow(torch.utils.data.Dataset):
    """Pictures that come as fast as positions until `hangs_at`, then never."""

    def __init__(self, hangs_at: int) -> None:
        self.hangs_at = hangs_at

    def __getitem__(self, position: int):
        if position >= self.hangs_at:
            threading.Event().wait()
        return torch.full((3, 4, 4), position, dtype=torch.uint8), []


def test_a_stop_ends_the_wait_for_data():
    asked = []

    def stop() -> bool:
        asked.append(time.perf_counter())
        return len(asked) == 2

    batches = training_batches(Slow(2), range(8), 2, 1, False, stop)
    first, failures = next(batches)
    assert first[:, 0, 0, 0].tolist() == [0, 1] and failures == []
    assert list(batches) == [] and len(asked) == 2
    assert not multiprocessing.active_children()


def test_the_end_of_the_batches_ends_the_workers():
    batches = training_batches(Slow(2), range(8), 2, 2, False)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    start = time.perf_counter()
    batches.close()
    assert time.perf_counter() - start < 10 and not any(worker.is_alive() for worker in workers)


def hang(monkeypatch, after: int) -> None:
    """Training pictures from position `after` on never come."""
    real = sampling.TrainingPictures.__getitem__

    def picture(self, position):
        if position >= after:
            threading.Event().wait()
        return real(self, position)

    monkeypatch.setattr(sampling.TrainingPictures, "__getitem__", picture)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_while_waiting_for_data_saves_and_stops(small, tmp_path, monkeypatch, capsys, number, code):
    hang(monkeypatch, after=2 * small["batch_size"])
    settings = small | {"save_path": str(tmp_path / "run"), "num_workers": 1, "max_iter": 6, "check_iter": 6}
    timer = threading.Timer(3.0, os.kill, (os.getpid(), number))
    timer.start()
    assert train(settings) == code
    timer.cancel()
    assert "stopped after iteration 2, saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert train({"save_path": str(tmp_path / "run"), "resume": True}) == 0
    assert train(small | {"save_path": str(tmp_path / "whole"), "max_iter": 6, "check_iter": 6}) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_worker_ends_the_run_in_one_line(small, tmp_path, monkeypatch, killed):
    """What the kernel does when memory is short. The last checkpoint is good, the rest of the workers goes."""
    hang(monkeypatch, after=4 * small["batch_size"])
    settings = small | {"save_path": str(tmp_path / "run"), "num_workers": 2, "max_iter": 20, "check_iter": 2}

    def kill() -> None:
        while not (tmp_path / "run" / "check_point.pth").exists():
            time.sleep(0.1)
        os.kill(multiprocessing.active_children()[killed].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    start = time.perf_counter()
    message = user_error(train, settings)
    thread.join()
    assert time.perf_counter() - start < 60
    assert "--num_workers 2: a process that decodes pictures was killed" in message
    assert "check_point.pth, go on with: python main.py --mode train --resume --save_path" in message
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert train({"save_path": str(tmp_path / "run"), "resume": True, "max_iter": 6, "num_workers": 0}) == 0


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root and unshare")
def test_a_small_dev_shm_is_enough(small, tmp_path):
    settings = small | {"save_path": tmp_path / "run", "num_workers": 4, "max_iter": 4, "batch_size": 8, "cropsize": 64,
                        "imsize": 64}
    command = " ".join([sys.executable, str(ROOT / "main.py"), "--mode", "train", *words(settings)])
    mounted = f"mount -t tmpfs -o size=256k tmpfs /dev/shm || exit 77; {command}"
    result = subprocess.run(["unshare", "-m", "bash", "-c", mounted], text=True, capture_output=True, timeout=200)
    if result.returncode in (1, 77) and "training on" not in result.stderr:
        pytest.skip(f"no file system of its own here: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(tmp_path / "run")) >= 1


def test_worker_counts_follow_the_cores_of_this_process(monkeypatch):
    assert worker_count(0) == 0 and worker_count(5) == 5
    for cores, desired in ((1, 1), (6, 6), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, cores=cores: set(range(cores)))
        monkeypatch.setattr("utils.Path.read_text", lambda _self: "max 100000\n")
        assert worker_count(None) == desired
    monkeypatch.setattr("utils.Path.read_text", lambda _self: "250000 100000\n")
    assert usable_cores() == 2
    monkeypatch.setattr("utils.Path.read_text", lambda _self: "50000 100000\n")
    assert usable_cores() == 1


def test_a_skipped_picture_is_said_by_the_process_that_met_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    failed = data.FailedPictures(Path("photos"), "--content_dir", 100)
    failed.add(Path("photos/a.jpg"), "photos/a.jpg: the file is empty")
    assert capsys.readouterr().err == "rank 1: skipped photos/a.jpg: the file is empty\n"


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("before, after", [
    ({"encoder_lr": 0.0}, {"encoder_lr": 1e-5, "decoder_lr": 0.0}),
    ({"decoder_lr": 0.0}, {"encoder_lr": 0.0, "decoder_lr": 1e-5}),
    ({"encoder_lr": 0.0}, {"encoder_lr": 1e-5}),
    ({}, {"encoder_lr": 0.0}),
])
@pytest.mark.parametrize("names", [True, False])
def test_other_parts_are_not_resumed(small, tmp_path, before, after, names):
    """With the names that a checkpoint has now, and by the shapes alone that older ones have."""
    train(small | before | {"save_path": str(tmp_path), "max_iter": 1})
    if not names:
        checkpoint = torch.load(tmp_path / "check_point.pth", weights_only=True)
        del checkpoint["optimized"]
        torch.save(checkpoint, tmp_path / "check_point.pth")
    good = weights_of(tmp_path)
    again = {"save_path": str(tmp_path), "resume": True, "max_iter": 2}
    assert "freezes or thaws a part" in user_error(train, again | after)
    assert all(torch.equal(tensor, good[name]) for name, tensor in weights_of(tmp_path).items())
    assert train(again) == 0


def test_a_run_is_resumed_from_another_folder(small, tmp_path, monkeypatch):
    for kind in ("content", "style"):
        shutil.copytree(small[f"{kind}_dir"], tmp_path / kind)
    shutil.copy(BUNDLED_VGG19, tmp_path / "vgg.pth")
    monkeypatch.chdir(tmp_path)
    settings = small | {"content_dir": "content", "style_dir": "style", "vgg_weights": "vgg.pth", "save_path": "run"}
    train(settings | {"max_iter": 1})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train({"save_path": "../run", "resume": True, "max_iter": 2, "content_dir": "../content"}) == 0


def test_vgg_weights_are_known_by_what_is_in_the_file(small, tmp_path, capsys):
    shutil.copy(BUNDLED_VGG19, tmp_path / "copy.pth")
    settings = small | {"save_path": str(tmp_path / "run"), "vgg_weights": "bundled"}
    train(settings | {"max_iter": 1})
    again = {"save_path": str(tmp_path / "run"), "resume": True}
    assert train(again | {"max_iter": 2, "vgg_weights": str(tmp_path / "copy.pth")}) == 0
    assert "VGG weights" in user_error(train, again | {"max_iter": 3, "vgg_weights": "random"})


@pytest.mark.parametrize("first, second, desired", [
    ("bundled (sha256 00aa)", "/a/b.pth (sha256 00aa)", True),
    ("bundled (sha256 00aa)", "bundled (sha256 00ab)", False),
    ("imagenet (torchvision X)", "imagenet (torchvision X, sha256 00aa)", True),
    ("imagenet (torchvision X)", "imagenet (torchvision Y, sha256 00aa)", False),
    ("random (He initialisation, seed 0)", "random (He initialisation, seed 0)", True),
    ("random (He initialisation, seed 0)", "random (He initialisation, seed 1)", False),
    (None, None, True),
    (None, "bundled (sha256 00aa)", False),
])
def test_origins_of_the_same_weights(first, second, desired):
    assert same_vgg(first, second) == same_vgg(second, first) == desired


def test_the_gpu_of_a_run_does_not_bind_its_resumption(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    checkpoint = torch.load(tmp_path / "check_point.pth", weights_only=True)
    checkpoint["train_config"]["gpu_no"] = 7
    torch.save(checkpoint, tmp_path / "check_point.pth")
    assert train({"save_path": str(tmp_path), "resume": True, "max_iter": 2}) == 0


def test_resume_auto_starts_and_goes_on(small, tmp_path, capsys):
    settings = small | {"save_path": str(tmp_path / "run"), "resume": "auto", "check_iter": 2}
    assert train(settings | {"max_iter": 2}) == 0
    assert train(settings | {"max_iter": 4}) == 0
    assert train(settings | {"max_iter": 4}) == 0 and "has done its 4 iterations" in capsys.readouterr().err
    train(small | {"save_path": str(tmp_path / "whole"), "max_iter": 4, "check_iter": 2})
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- the GPU


def test_training_may_use_tf32_and_pictures_are_exact(small, tmp_path):
    train(small | {"save_path": str(tmp_path / "run"), "max_iter": 1})
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    picture = str(next(Path(small["content_dir"]).iterdir()))
    stylise({"load_path": (small["load_path"],), "content": (picture,), "style": (picture,), "gpu_no": -1,
             "save_path": str(tmp_path / "out.png")})
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# ---------------------------------------------------------------------------------------------- two runs


def test_a_second_run_in_the_folder_is_refused(small, tmp_path):
    with CheckpointFolder.of_run(str(tmp_path), 0, is_resumed=False):
        for more in ({}, {"resume": "auto"}):
            assert "another run is writing to it" in user_error(train, small | {"save_path": str(tmp_path)} | more)
    assert train(small | {"save_path": str(tmp_path), "max_iter": 1}) == 0


def test_a_kill_releases_the_folder(small, tmp_path):
    script = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from training.run_folder import CheckpointFolder\n"
              f"with CheckpointFolder.of_run({str(tmp_path)!r}, 0, False): print('held', flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n" and (tmp_path / LOCK_NAME).exists()
    assert "another run is writing to it" in user_error(train, small | {"save_path": str(tmp_path)})
    holder.kill()
    holder.wait()
    assert train(small | {"save_path": str(tmp_path), "max_iter": 1}) == 0


# ----------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("name", ["responses.npz", "report.json"])  # the first and the last that is written
def test_full_disk_while_pruning_is_one_line(small, tmp_path, monkeypatch, capsys, name):
    real = os.replace

    def no_space(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", no_space)
    flags = {"mode": "prune", "gpu_no": -1, "load_path": small["load_path"], "content_dir": small["content_dir"],
             "style_dir": small["style_dir"], "imsize": 24, "cropsize": 24, "report_size": 16, "latency_runs": 1,
             "prune_nums": 0, "save_path": tmp_path / "out"}
    line = refusal(capsys, *words(flags))
    assert f"out/{name}: " in line and "No space left on device" in line
    assert not list((tmp_path / "out").glob(".*.tmp"))

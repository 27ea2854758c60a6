"""Training pictures: crops that depend on seed and position alone, the cache, and the workers that draw them."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CONTENT_DIR, STYLE_DIR, user_error, write_map, write_picture
from PIL import Image
from torch.testing import assert_close

from data import PictureError
from folders import FailedPictures, find_pictures
from train import TrainConfig, train
from training import sampling
from training.loop import Run
from training.run_folder import CheckpointFolder
from training.sampling import PictureCache, TrainingPictures, count_failures, training_batches

MANY = 10**9
CONFIG = TrainConfig(imsize=30, cropsize=16, max_pixels=MANY, seed=1)


def make_pictures(folder, contents: int = 5, styles: int = 3, config: TrainConfig = CONFIG):
    """Content pictures have blue 0, 1, ..., style pictures 100, 101, ...; 40 x 30 pixels, so that nothing is
    resized and every pixel tells its column, row and picture."""
    content = [write_map(folder / "content" / f"{number}.png", number=number) for number in range(contents)]
    style = [write_map(folder / "style" / f"{number}.png", number=100 + number) for number in range(styles)]
    return TrainingPictures((content, style), config)


def describe(crop: torch.Tensor) -> tuple[int, int, int]:
    """(picture, left, top) of a crop, which must be one window of one picture."""
    red, green, blue = crop[:, 0, 0].tolist()
    left, top = red // 5, green // 7
    assert (crop[0] == 5 * torch.arange(left, left + crop.shape[2])[None, :]).all()
    assert (crop[1] == 7 * torch.arange(top, top + crop.shape[1])[:, None]).all()
    assert (crop[2] == blue).all()
    return blue, left, top


def test_crops_are_windows_inside_the_picture(tmp_path):
    pictures = make_pictures(tmp_path)
    drawn = [pictures[position] for position in range(60)]
    assert all(crop.dtype == torch.uint8 and crop.shape == (3, 16, 16) for sample in drawn for crop in sample[:2])
    assert not any(failures for _, _, failures in drawn)
    numbers, lefts, tops = (set(each) for each in zip(*(describe(crop) for sample in drawn for crop in sample[:2])))
    # 120 draws of 25 and 15 places: all of them nearly always, both ends among them with this seed.
    assert numbers == {0, 1, 2, 3, 4, 100, 101, 102} and lefts <= set(range(25)) and tops == set(range(15))
    assert len(lefts) > 20 and {0, 24} <= lefts


def test_number_of_workers_changes_nothing(tmp_path):
    positions = range(6, 18)
    alone, shared = (list(training_batches(make_pictures(tmp_path), positions, 4, workers, pin_memory=False))
                     for workers in (0, 2))
    assert len(alone) == len(shared) == 3
    pictures = make_pictures(tmp_path)
    for number, (actual, desired) in enumerate(zip(shared, alone)):
        assert actual[0].shape == actual[1].shape == (4, 3, 16, 16)
        for kind in range(2):
            assert_close(actual[kind], desired[kind], rtol=0, atol=0)
            by_hand = torch.stack([pictures[position][kind] for position in positions[4 * number : 4 * number + 4]])
            assert_close(actual[kind], by_hand, rtol=0, atol=0)


def test_every_epoch_visits_every_picture_once_in_its_own_order(tmp_path):
    """And content and style independently."""
    pictures = make_pictures(tmp_path, contents=5, styles=5)
    drawn = [[describe(pictures[position][kind]) for position in range(30)] for kind in range(2)]
    for crops, first in zip(drawn, (0, 100)):
        epochs = [tuple(number - first for number, _, _ in crops[start : start + 5]) for start in range(0, 30, 5)]
        assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(epochs)) > 3
    assert [number for number, *_ in drawn[0]] != [number - 100 for number, *_ in drawn[1]]
    assert [place for _, *place in drawn[0]] != [place for _, *place in drawn[1]]


def test_picture_that_breaks_later_is_replaced_and_reported_once(tmp_path, capsys):
    pictures = make_pictures(tmp_path, contents=12)
    before = [describe(pictures[position][0]) for position in range(12)]
    broken = pictures.folders[0][2]
    broken.write_text("overwritten during the run")
    for position in range(12):
        content, _, failures = pictures[position]
        if before[position][0] != 2:
            assert describe(content) == before[position] and failures == []
            continue
        assert describe(content)[0] != 2 and torch.equal(pictures[position][0], content)
        assert {(number, path) for number, path, _ in failures} == {(0, str(broken))}
        assert all(str(broken) in reason for _, _, reason in failures)
    tallies = (FailedPictures(tmp_path / "content", "--content_dir", 12), FailedPictures(tmp_path, "--style_dir", 3))
    for _, _, failures in training_batches(pictures, range(24), 4, 0, pin_memory=False):
        count_failures(failures, tallies)
    assert tallies[0].paths == {str(broken)} and tallies[1].paths == set()
    assert [str(broken) in line for line in capsys.readouterr().err.splitlines()] == [True]


def test_folder_that_went_away_stops_the_run(tmp_path, capsys):
    pictures = make_pictures(tmp_path, contents=200)
    shutil.rmtree(tmp_path / "content")
    _, _, failures = pictures[0]
    tallies = tuple(FailedPictures(tmp_path, flag, 10_000) for flag in ("--content_dir", "--style_dir"))
    assert len(failures) == sampling.MAX_DRAWS
    assert "cannot be used" in user_error(count_failures, failures, tallies)


def test_centered_crops_of_resized_pictures(tmp_path):
    pictures = make_pictures(tmp_path, config=replace(CONFIG, cencrop=True))
    assert {describe(pictures[position][0])[1:] for position in range(10)} == {(12, 7)}
    image = Image.new("RGB", (60, 40), "black")  # with a white right half; resized to 30 x 20, 20 columns are taken
    image.paste("white", (30, 0, 60, 40))
    image.save(tmp_path / "halves.png")
    config = TrainConfig(imsize=20, cropsize=20, cencrop=True)
    crop, _ = TrainingPictures([[tmp_path / "halves.png"]], config)[0]
    assert crop.shape == (3, 20, 20) and (crop[:, :, :8] < 5).all() and (crop[:, :, 12:] > 250).all()


def test_mixed_pictures_take_the_folders_in_turn(monkeypatch):
    seen = []
    monkeypatch.setattr(sampling.MixedPictures, "_cut", lambda self, path, generator: seen.append(path))
    pictures = sampling.MixedPictures([find_pictures(folder, "") for folder in (CONTENT_DIR, STYLE_DIR)], CONFIG)
    for position in range(16):
        pictures[position]
    assert [path.parent for path in seen] == [CONTENT_DIR, STYLE_DIR] * 8
    assert len(set(seen)) == 16  # an epoch shows each picture once


@pytest.fixture
def cache(tmp_path) -> PictureCache:
    (tmp_path / "cache").mkdir()
    return PictureCache(tmp_path / "cache")


def test_cached_crops_are_the_same_pixels(tmp_path, cache, monkeypatch):
    """In the run that fills the cache and in the next, which decodes nothing; JPEGs too, which are decoded reduced."""
    paths = []
    for number, size in enumerate([(90, 60), (33, 47), (400, 300), (12, 200)]):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        paths.append(tmp_path / f"{number}.{('jpg', 'png')[number % 2]}")
        Image.fromarray(noise).save(paths[-1])
    for config in (TrainConfig(imsize=24, cropsize=16), TrainConfig(imsize=16, cropsize=40, cencrop=True)):
        desired = [TrainingPictures([paths], config)[position][0] for position in range(8)]
        with monkeypatch.context() as patch:
            for load in (sampling.load_picture, None):
                patch.setattr(sampling, "load_picture", load)
                cached = TrainingPictures([paths], config, PictureCache(cache.folder))
                assert all(torch.equal(cached[position][0], desired[position]) for position in range(8))


@pytest.mark.parametrize("change", ["content", "time"])
def test_changed_picture_is_decoded_anew_and_the_old_one_dropped(tmp_path, cache, change):
    path = write_picture(tmp_path / "picture.png", (20, 20), (10, 20, 30))
    assert cache.open(path, 16)[0, 0].tolist() == [10, 20, 30]
    other = cache.open(write_picture(tmp_path / "other.png", (20, 20), (1, 1, 1)), 16)
    before = os.stat(path)
    if change == "content":  # a longer file
        write_map(path, (20, 20), number=77)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:  # as long, at another time
        write_picture(path, (20, 20), (10, 20, 77))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert cache.open(path, 16)[0, 0, 2] == 77
    assert len(list(cache.folder.glob("*/*.npy"))) == 2 and other[0, 0].tolist() == [1, 1, 1]


def test_sizes_and_limits_do_not_mix(tmp_path, cache):
    path = write_picture(tmp_path / "picture.png", (40, 20))
    assert cache.open(path, 10).shape == (10, 20, 3) and cache.open(path, 16).shape == (16, 32, 3)
    for limit, each, said in ((100, path, "--max_pixels 100"), (MANY, tmp_path / "none.png", "none.png")):
        with pytest.raises(PictureError, match=said):
            PictureCache(cache.folder, limit).open(each, 10)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_cache_file_is_made_anew_and_nothing_is_flushed(tmp_path, cache, monkeypatch, damage):
    """A plain rename is all that pictures need."""
    monkeypatch.setattr(os, "fsync", None)  # what cannot be called
    path = write_map(tmp_path / "picture.png", (30, 20))
    desired = np.array(cache.open(path, 16))
    file = cache.file_of(path, 16)
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "empty": b"", "text": b"no array" * 100}[damage])
    assert np.array_equal(cache.open(path, 16), desired)
    assert file.read_bytes() == whole and list(file.parent.iterdir()) == [file]


def test_full_disk_is_said_once_and_training_pictures_go_on(tmp_path, cache, monkeypatch, capsys):
    def no_space(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampling, "write_atomically", no_space)
    plain = make_pictures(tmp_path)
    pictures = TrainingPictures(plain.folders, plain.config, cache)
    for position in range(6):
        assert torch.equal(pictures[position][0], plain[position][0])
    assert capsys.readouterr().err.count("--cache_dir") == 1


def test_batches_go_through_the_pipe_and_not_through_shared_memory():
    picture = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    *arrays, failures = sampling._as_arrays([(picture, []), (picture + 1, [(0, "a.jpg", "broken")])])
    assert len(ForkingPickler.dumps(arrays)) > sum(array.nbytes for array in arrays)
    assert (arrays[0][1] == picture.numpy() + 1).all() and failures == [(0, "a.jpg", "broken")]


def test_the_end_of_the_batches_ends_workers_that_hang_and_no_other_process(tmp_path, monkeypatch):
    hang(monkeypatch, after=2)
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    other.start()
    before = {*multiprocessing.active_children()}  # also what other tests have left
    batches = training_batches(make_pictures(tmp_path), range(8), 2, 1, False)
    next(batches)
    (worker,) = {*multiprocessing.active_children()} - before
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # a scheduler's reach all: the main one is not done
        os.kill(worker.pid, number)
    worker.join(0.5)
    assert worker.is_alive()
    batches.close()
    worker.join(60)
    assert not worker.is_alive() and other.is_alive()
    other.kill()


def hang(monkeypatch, after: int) -> None:
    """Training pictures from position `after` on never come; that a worker hangs is seen sooner than torch does."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    real = TrainingPictures.__getitem__

    def picture(self, position):
        if position >= after:
            threading.Event().wait()
        return real(self, position)

    monkeypatch.setattr(TrainingPictures, "__getitem__", picture)


@contextmanager
def once_saved(folder: Path, act):
    """Within the block, `act` is called as soon as the run in the folder has its first checkpoint."""
    def wait() -> None:
        while not (folder / "check_point.pth").exists():
            time.sleep(0.1)
        act()

    thread = threading.Thread(target=wait, daemon=True)  # the run may fail before
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("number, code, workers", [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1)])
def test_signal_while_waiting_for_data_saves_and_stops(small, tmp_path, monkeypatch, capsys, number, code, workers):
    hang(monkeypatch, after=8)  # those before are shown at checkpoints, or seen in four iterations
    settings = small | {"save_path": str(tmp_path / "run"), "num_workers": workers, "max_iter": 6, "check_iter": 4}
    with once_saved(tmp_path / "run", lambda: os.kill(os.getpid(), number)):
        assert train(settings) == code
    assert "stopped after iteration 4, saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert train({"save_path": str(tmp_path / "run"), "resume": True}) == 0


def test_killed_worker_ends_the_run_in_one_line(small, tmp_path, monkeypatch):
    """What the kernel does when memory is short. The last checkpoint is good."""
    hang(monkeypatch, after=4 * small["batch_size"])
    settings = small | {"save_path": str(tmp_path / "run"), "num_workers": 2, "max_iter": 20, "check_iter": 2}
    before = {*multiprocessing.active_children()}

    def kill_a_worker() -> None:
        ({*multiprocessing.active_children()} - before).pop().kill()

    with once_saved(tmp_path / "run", kill_a_worker):
        message = user_error(train, settings)
    assert "--num_workers 2: a process that decodes pictures was killed" in message
    assert "check_point.pth, go on with: python main.py --mode train --resume --save_path" in message


@pytest.mark.parametrize("cores, asked, desired", [(1, None, 1), (6, None, 6), (64, None, 8), (6, 0, 0), (2, 5, 5)])
def test_worker_counts_follow_the_cores_of_this_process(monkeypatch, tmp_path, cores, asked, desired):
    monkeypatch.setattr("utils.usable_cores", lambda: cores)
    config = SimpleNamespace(num_workers=asked, save_path="", wb_mode="disabled")
    run = Run("train", config, None, CheckpointFolder(tmp_path), SimpleNamespace(folders=[]), [], None)
    assert run.workers == desired

"""What a run keeps in its folder: checkpoints and metrics; the wandb run beside them."""

import errno
import os
import sys
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from helpers import limit_file_system, read_metrics, user_error, write_picture

from train import TrainConfig
from training.run_folder import CheckpointFolder, WandbRun, append_metrics, truncate_metrics
from utils import load_checkpoint, numbered_checkpoints


@pytest.mark.parametrize("keep, desired, lacks", [
    (-1, [10, 20, 30, 10**7], ()), (0, [], ()), (1, [10**7], ()), (2, [30, 10**7], ()), (9, [10, 20, 30, 10**7], ()),
    (2, [30, 10**7], ("os.link",)), (2, [30, 10**7], ("os.replace",)),
    (2, [30, 10**7], ("os.link", "os.fsync", "os.replace", "fcntl.flock")),
])
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EACCES])
def test_numbered_checkpoints_kept(tmp_path, monkeypatch, capsys, keep, desired, lacks, number):
    """Also on a share without hard links, synchronised folders, renames over a file that is there, or locks."""
    limit_file_system(monkeypatch, lacks, number)
    with CheckpointFolder.of_run(str(tmp_path), keep, is_resumed=False) as folder:
        for iteration in (10, 20, 30, 10**7):  # the last has more digits than fit the names
            folder.save({"iteration": iteration}, iteration)
            assert load_checkpoint(folder.newest) == {"iteration": iteration}
    names = [f"check_point_{iteration:07}.pth" for iteration in desired]
    assert sorted(os.listdir(tmp_path)) == sorted([".lock", "check_point.pth", *names])
    assert [load_checkpoint(path)["iteration"] for path in numbered_checkpoints(tmp_path)] == desired
    said = f"cannot be locked ({os.strerror(number)}): do not start a second run in it"
    assert (said in capsys.readouterr().err) == ("fcntl.flock" in lacks)


@pytest.mark.parametrize("left, said", [(0.5, "a damaged one"), (0.99, "a damaged one"), (0, "a damaged one"),
                                        (None, "no such file")])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path, capsys, left, said):
    """left: the share of the newest that is. Of one on another disk that is not there nothing is known."""
    folder = CheckpointFolder(tmp_path, keep=-1)
    for iteration in (1, 2, 3):
        folder.save({"iteration": iteration, "weights": torch.zeros(10_000)}, iteration)
    whole = folder.newest.read_bytes()
    folder.newest.unlink()
    numbered_checkpoints(tmp_path)[-1].write_bytes(b"cut short")
    if left is not None:
        folder.newest.write_bytes(whole[: int(left * len(whole))])
    assert CheckpointFolder.load_newest(str(tmp_path))["iteration"] == 2 and folder.holds_run
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder.newest}: " in line and said in line and line.endswith("going on from check_point_0000002.pth")
    folder.newest.unlink(missing_ok=True)
    folder.newest.symlink_to("/not/mounted/check_point.pth")
    assert "it is a link to /not/mounted" in user_error(CheckpointFolder.load_newest, str(tmp_path))
    folder.newest.unlink()
    folder.newest.symlink_to(tmp_path / "scratch.pth")  # to be followed; numbered ones are files of their own
    for iteration in (4, 5):
        folder.save({"iteration": iteration}, iteration)
    assert folder.newest.is_symlink() and load_checkpoint(numbered_checkpoints(tmp_path)[-2])["iteration"] == 4


@pytest.mark.parametrize("half", ['{"iteration": 7, "tot', '{"iteration', "{", '{"iteration": 7', '{"total": 3}', "\n",
                                  "\0" * 99, "[1]\nnull\n", '{"iteration": "a"}', "\udcff\udcfe"])
def test_metrics_are_appended_and_truncated(tmp_path, half):
    """A killed run may have left half of a line, a broken disk anything."""
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert os.listdir(tmp_path) == []
    rows = [{"iteration": iteration, "total": iteration / 3} for iteration in (5, 10, 15, 20)]
    for row in rows:
        append_metrics(path, row)
    assert read_metrics(tmp_path) == rows
    truncate_metrics(path, 10)
    with open(path, "a", errors="surrogateescape") as file:
        file.write(half)
    truncate_metrics(path, 6)
    assert read_metrics(tmp_path) == rows[:1]
    path.write_text(path.read_text().rstrip())
    truncate_metrics(path, 5)
    append_metrics(path, rows[1])
    assert read_metrics(tmp_path) == rows[:2]


# ------------------------------------------------------------------------------------------------- wandb


def wandb_run(folder, mode: str = "auto") -> WandbRun:
    return WandbRun(TrainConfig(wb_mode=mode), folder, None)


def test_wandb_finds_its_own_settings(tmp_path, monkeypatch, capsys):
    """The server of a settings file, the key of a netrc that names its port; it refuses, so the run is offline, and
    takes what is logged."""
    wandb, asked = pytest.importorskip("wandb"), []

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode())
            self.send_error(401)

        def log_message(self, *_):
            pass

    for name in [name for name in os.environ if name.startswith("WANDB")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever).start()
        host = f"127.0.0.1:{server.server_port}"
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = http://{host}\n")
        (tmp_path / ".netrc").write_text(f"machine {host}\n  login user\n  password {'0123456789' * 4}\n")
        (tmp_path / ".netrc").chmod(0o600)
        wandb.teardown()  # what it has read before
        try:
            run = wandb_run(tmp_path)
            run.log({"layer_widths": [3, 4], "loss": 1.0}, 1, write_picture(tmp_path / "picture.png"))
            run.finish()
        finally:
            wandb.teardown()
            server.shutdown()
    errors = capsys.readouterr().err
    assert asked[0] == f"api:{'0123456789' * 4}" and list((tmp_path / "wandb").glob(f"offline-run-*/*{run.id}.wandb"))
    assert f"wandb: offline, run {run.id} in {tmp_path}" in errors and "wandb failed" not in errors


@pytest.mark.parametrize("module, said", [
    ("raise ModuleNotFoundError(name='wandb')", "is not installed (pip install wandb)"),
    ("", "failed (module 'wandb' has no attribute 'init')"),  # a folder of that name
    ("raise AttributeError('`np.float_` was removed')", "failed (`np.float_` was removed)"),
    ("Settings = dict\ndef init(**_): raise RuntimeError('Could not determine\\nhome directory')",
     "failed (Could not determine home directory)"),
    ("Settings = dict\ndef init(**_): raise ConnectionError", "failed (ConnectionError)"),
    ("Settings = dict\ndef init(**_): input()", "failed (EOF when reading a line)"),  # it asks for a key
])
def test_a_wandb_that_cannot_start_is_said_in_a_line(tmp_path, monkeypatch, capsys, module, said):
    (tmp_path / "wandb").with_suffix(".py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    del sys.modules["wandb"]
    run = wandb_run(tmp_path)
    run.log({"loss": 1.0}, 1, tmp_path / "picture.png")
    run.finish()
    assert capsys.readouterr().err == f"wandb {said}: metrics go to metrics.jsonl\n"
    assert user_error(wandb_run, tmp_path, "offline") == f"--wb_mode offline: wandb {said}"

"""What a run keeps in its folder: checkpoints and metrics; whether wandb has a key."""

import os

import pytest
from helpers import read_metrics, user_error

from training.run_folder import CheckpointFolder, MetricFile, wandb_key_is_configured
from utils import load_checkpoint


@pytest.mark.parametrize("keep, desired, has_links", [
    (-1, [10, 20, 30, 1000], True), (0, [], True), (1, [1000], True), (2, [30, 1000], True), (2, [30, 1000], False),
    (9, [10, 20, 30, 1000], True),
])
def test_numbered_checkpoints_kept(tmp_path, monkeypatch, keep, desired, has_links):
    """Also on a file system without hard links."""
    def refuse(*_):
        raise OSError("not supported")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, keep)
    for iteration in (10, 20, 30, 1000):
        assert folder.save({"iteration": iteration}, iteration) == tmp_path / "check_point.pth"
        assert load_checkpoint(folder.newest) == {"iteration": iteration}
    names = [f"check_point_{iteration:07}.pth" for iteration in desired]
    assert sorted(os.listdir(tmp_path)) == sorted(["check_point.pth", *names])
    assert [load_checkpoint(path)["iteration"] for path in folder.numbered()] == desired


def test_a_damaged_newest_checkpoint_names_the_older_ones(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save({"iteration": 1}, 1)
    folder.newest.unlink()
    folder.newest.write_bytes(b"cut short")
    message = user_error(CheckpointFolder.load_newest, str(tmp_path))
    assert str(folder.newest) in message and message.endswith("check_point_0000001.pth")


@pytest.mark.parametrize("half", ['{"iteration": 7, "tot', '{"iteration', "{", '{"iteration": 7', '{"total": 3}', "\n"])
def test_metrics_are_appended_and_truncated(tmp_path, half):
    """A killed run may have left half of a line."""
    metrics = MetricFile(tmp_path / "metrics.jsonl")
    metrics.truncate_after(3)
    assert os.listdir(tmp_path) == []
    rows = [{"iteration": iteration, "total": iteration / 3} for iteration in (5, 10, 15, 20)]
    for row in rows:
        metrics.append(row)
    assert read_metrics(tmp_path) == rows
    metrics.truncate_after(10)
    with open(metrics.path, "a") as file:
        file.write(half)
    metrics.truncate_after(6)
    assert read_metrics(tmp_path) == rows[:1]
    metrics.path.write_text(metrics.path.read_text().rstrip())
    metrics.truncate_after(5)
    metrics.append(rows[1])
    assert read_metrics(tmp_path) == rows[:2]


@pytest.mark.parametrize("name, host, variables, desired", [
    ("none", "", {}, False),
    ("none", "", {"WANDB_API_KEY": "0123456789abcdef"}, True),
    (".netrc", "api.wandb.ai", {}, True),
    ("_netrc", "api.wandb.ai", {}, True),
    (".netrc", "wandb.example.org", {}, False),
    (".netrc", "wandb.example.org", {"WANDB_BASE_URL": "https://wandb.example.org/api"}, True),
    ("elsewhere", "api.wandb.ai", {}, False),
    ("elsewhere", "api.wandb.ai", {"NETRC": "~/elsewhere"}, True),
    (".netrc", "nonsense {{{ here", {}, False),
])
def test_wandb_key_in_the_environment_or_in_netrc(tmp_path, monkeypatch, name, host, variables, desired):
    for variable in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / name).write_text(f"machine {host}\n  login user\n  password 0123456789abcdef\n")
    (tmp_path / name).chmod(0o600)
    assert wandb_key_is_configured() == desired

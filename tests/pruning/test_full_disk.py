"""A disk that fills up while a network is pruned."""

import errno
import os
from pathlib import Path

import pytest
from helpers import refusal, words


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

"""Training: resume, refusals, signals, wandb, metrics. Small crops, random VGG, CPU."""

import json
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    REPORTING_MAIN,
    SMALL_TRAINING,
    make_trainer,
    random_batch,
    read_metrics,
    refusal,
    small_network,
    stop_after,
    user_error,
    words,
    write_model,
    write_picture,
)
from torch.testing import assert_close

import loss as losses
from data import normalize
from main import main
from network import NetworkConfig, StyleTransferNetwork, adain, channel_statistics
from pruning.surgery import cut_bottleneck
from train import TrainConfig, build_trainer, train
from training import step as transfer_module
from training.loop import MetricSums
from training.step import METRICS
from utils import UserError
from weights import load_network

# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("check_iter", [1, 4])
def test_resumed_run_equals_uninterrupted_run(small, tmp_path, check_iter):
    """3 + 3 iterations give the losses and weights of 6, also when a check spans the interruption."""
    settings = small | {"check_iter": check_iter, "shift_loss_weight": 30.0}
    train(settings | {"save_path": str(tmp_path / "whole"), "max_iter": 6})
    train(settings | {"save_path": str(tmp_path / "halves"), "max_iter": 3, "num_workers": 1})
    train({"save_path": str(tmp_path / "halves"), "resume": True, "max_iter": 6})

    whole, halves = load_network(tmp_path / "whole")[0], load_network(tmp_path / "halves")[0]
    for (name, desired), actual in zip(whole.state_dict().items(), halves.state_dict().values()):
        assert_close(actual, desired, rtol=0, atol=0, msg=name)
    desired = {row["iteration"]: row for row in read_metrics(tmp_path / "whole")}
    actual = {row["iteration"]: row for row in read_metrics(tmp_path / "halves")}
    if check_iter == 1:
        assert actual == desired
        assert [row["iteration"] for row in read_metrics(tmp_path / "halves")] == [1, 2, 3, 4, 5, 6]
    assert actual[6]["iteration"] == desired[6]["iteration"] == 6


def test_interruption_inside_a_check_interval_keeps_its_sums(small, tmp_path, monkeypatch):
    """A stop after iteration 3 of a check interval of 6: the mean over all 6 is that of the whole run."""
    settings = small | {"check_iter": 6, "max_iter": 6}
    train(settings | {"save_path": str(tmp_path / "whole")})

    stop_after(3, monkeypatch)
    assert train(settings | {"save_path": str(tmp_path / "halves")}) == 143
    monkeypatch.undo()
    assert torch.load(tmp_path / "halves" / "check_point.pth", weights_only=True)["iteration"] == 3
    assert train({"save_path": str(tmp_path / "halves"), "resume": True}) == 0
    assert read_metrics(tmp_path / "halves") == read_metrics(tmp_path / "whole")


def test_resume_drops_metrics_past_the_checkpoint(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 2})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 3, "content": 99.0}) + "\n" + '{"iteration": 4, "con')
    train({"save_path": str(tmp_path), "resume": True, "max_iter": 3})
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[2]["content"] != 99.0


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="check_point.pth is not there"):
        train({"save_path": str(tmp_path), "resume": True})


def test_resume_with_another_network_is_refused(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    with pytest.raises(UserError, match="--backbone vgg19, not vgg16"):
        train({"save_path": str(tmp_path), "resume": True, "backbone": "vgg16"})


def test_a_finished_run_is_not_overwritten(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    before = (tmp_path / "check_point.pth").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        train(small | {"save_path": str(tmp_path), "max_iter": 1})
    assert (tmp_path / "check_point.pth").read_bytes() == before


def test_pruned_network_trains_on(small, tmp_path):
    """A pruned file is a start like any other; its widths stay."""
    pruned = write_model(tmp_path / "pruned.pth", cut_bottleneck(small_network(width=8), range(3)))
    train(small | {"load_path": str(pruned), "save_path": str(tmp_path / "on"), "max_iter": 2})
    assert load_network(tmp_path / "on")[0].config.encoder_widths == (*(8,) * 8, 5)


def test_upsampling_is_the_files_unless_another_is_asked_for(small, tmp_path):
    train(small | {"save_path": str(tmp_path / "a"), "max_iter": 1, "upsampling": "bilinear"})
    train({"save_path": str(tmp_path / "a"), "resume": True, "max_iter": 2})
    for name, more, desired in (("b", {}, "bilinear"), ("c", {"upsampling": "nearest"}, "nearest")):
        train(small | {"load_path": str(tmp_path / "a"), "save_path": str(tmp_path / name), "max_iter": 1} | more)
        assert load_network(tmp_path / name)[0].config.upsampling == desired
    assert load_network(tmp_path / "a")[0].config.upsampling == "bilinear"
    assert cut_bottleneck(load_network(tmp_path / "a")[0], range(3)).config.upsampling == "bilinear"
    with pytest.raises(UserError, match="--upsampling"):
        train({"save_path": str(tmp_path / "a"), "resume": True, "upsampling": "nearest", "max_iter": 3})


def test_pooling_is_the_files_unless_another_is_asked_for(small, tmp_path):
    train(small | {"save_path": str(tmp_path / "a"), "max_iter": 1, "pooling": "blur"})
    train({"save_path": str(tmp_path / "a"), "resume": True, "max_iter": 2})
    for name, more, desired in (("b", {}, "blur"), ("c", {"pooling": "max"}, "max"), ("d", {"pooling": "avg"}, "avg")):
        train(small | {"load_path": str(tmp_path / "a"), "save_path": str(tmp_path / name), "max_iter": 1} | more)
        assert load_network(tmp_path / name)[0].config.pooling == desired
    network = load_network(tmp_path / "a")[0]
    assert cut_bottleneck(network, range(3)).config.pooling == network.config.pooling == "blur"
    assert "--pooling" in user_error(train, {"save_path": str(tmp_path / "a"), "resume": True, "pooling": "max",
                                             "max_iter": 3})
    message = user_error(train, small | {"save_path": str(tmp_path / "e"), "swap_max_pool": True, "pooling": "blur"})
    assert "--swap_max_pool" in message and "--pooling blur" in message and not (tmp_path / "e").exists()


def test_new_weights_keep_the_widths_alone(tmp_path):
    """He initialisation: every conv anew, of the variance that keeps the signal's size; the seed decides."""
    full = NetworkConfig.full()
    narrow = StyleTransferNetwork(replace(full, encoder_widths=(*full.encoder_widths[:-1], 200)))
    start = str(write_model(tmp_path / "narrow.pth", narrow))
    config = TrainConfig(**SMALL_TRAINING | {"load_path": start, "new_weights": True, "save_path": "x"})
    networks = [build_trainer(config, CPU, None).network for _ in range(2)]
    assert networks[0].config == narrow.config
    for name, actual in networks[0].state_dict().items():
        assert torch.equal(actual, networks[1].state_dict()[name])
        if name.endswith("bias"):
            assert not actual.any()
            continue
        assert not torch.equal(actual, narrow.state_dict()[name])
        gain = 1.0 if actual.shape[0] == 3 else 2.0
        assert actual.std().item() == pytest.approx((gain / actual[0].numel()) ** 0.5, rel=0.1)


@pytest.mark.parametrize("change, needed", [
    ({"new_weights": True}, "--load_path says"),
    ({"new_weights": True, "load_path": "m.pth", "encoder_lr": 0.0}, "would stay so"),
])
def test_new_weights_that_make_no_sense_are_refused(change, needed):
    with pytest.raises(UserError, match=needed):
        TrainConfig(**SMALL_TRAINING | {"save_path": "x"} | change).check()


# --------------------------------------------------------------------------------- signals, kill, bad losses


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_resume(small, tmp_path, monkeypatch, capsys, number, code):
    folder = tmp_path / "run"
    settings = small | {"save_path": folder, "max_iter": 9, "check_iter": 9, "num_workers": 1}
    with monkeypatch.context() as patch:
        stop_after(2, patch, number)
        assert main(["--mode", "train", *words(settings)]) == code
    errors = capsys.readouterr().err
    assert f"python main.py --mode train --resume --save_path {folder}" in errors and "Traceback" not in errors
    assert torch.load(folder / "check_point.pth", weights_only=True)["iteration"] == 2
    assert train({"save_path": str(folder), "resume": True, "max_iter": 3}) == 0


def test_kill_leaves_a_good_checkpoint(small, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(REPORTING_MAIN), "--mode", "train"]
    command += words(small | {"save_path": folder, "max_iter": 5000})
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for iteration in process.stdout:
            if int(iteration) == 3:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    _, checkpoint = load_network(folder)
    assert checkpoint["iteration"] >= 2
    assert train({"save_path": str(folder), "resume": True, "max_iter": checkpoint["iteration"] + 1}) == 0


def test_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 1})
    good = (tmp_path / "check_point.pth").read_bytes()
    # A rate this large makes iteration 2's weights, and so iteration 3's losses, overflow.
    with pytest.raises(UserError, match=r"iteration \d+: (the \w+ loss|a weight) is not finite"):
        train({"save_path": str(tmp_path), "resume": True, "max_iter": 9, "check_iter": 9, "decoder_lr": 1e30})
    assert (tmp_path / "check_point.pth").read_bytes() == good


def test_compile_without_a_compiler_is_one_line(small, tmp_path, monkeypatch, capsys):
    """The step is cut short to its first loss: what is compiled does not matter where nothing can be."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer_module.TransferLosses, "forward",
                        lambda self, content, style, all_terms, move: ({"content": content.sin().sum()}, {}))
    with inductor.patch({"cpp.cxx": ("/no/compiler",)}):
        line = refusal(capsys, "--mode", "train",
                       *words(small | {"save_path": tmp_path, "max_iter": 1, "compile": True}))
    assert "error: --compile: torch.compile failed" in line and "/no/compiler" in line


def test_first_term_that_is_not_finite_is_named():
    sums = MetricSums(CPU, METRICS)
    good = {name: torch.tensor(1.0) for name in METRICS}
    sums.add(good, 6)
    sums.raise_if_bad()
    sums.add(good | {"style": torch.tensor(float("nan")), "total": torch.tensor(float("nan"))}, 7)
    sums.add({name: torch.tensor(float("inf")) for name in METRICS}, 8)
    with pytest.raises(UserError, match="iteration 7: the style loss is not finite"):
        sums.raise_if_bad()


# ------------------------------------------------------------------------------------------------ the step


def test_frozen_encoder_does_not_change():
    trainer = make_trainer(encoder_lr=0.0)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.step(*random_batch())
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder"), name


def test_rates_rise_stay_and_fall():
    config = TrainConfig(max_iter=8, warmup_iter=2, decay_iter=3)
    assert [config.rate_share(iteration) for iteration in range(1, 9)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert {TrainConfig(max_iter=8).rate_share(iteration) for iteration in range(1, 9)} == {1.0}
    with pytest.raises(UserError, match="--warmup_iter 5 and --decay_iter 4"):
        TrainConfig(**SMALL_TRAINING, save_path="x", max_iter=8, warmup_iter=5, decay_iter=4).check()


def test_run_learns_at_the_rates_of_its_iterations(small, tmp_path):
    """The last of 4 iterations has a quarter of the rates; a step at a quarter of them is one at rates that small."""
    settings = small | {"save_path": str(tmp_path / "run"), "max_iter": 4}
    train(settings | {"warmup_iter": 1, "decay_iter": 3})
    rates = [group["lr"] for group in torch.load(tmp_path / "run/check_point.pth")["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.25 * 5e-5, 0.25 * 1e-3])
    scheduled = make_trainer(small_network(), warmup_iter=4)
    plain = make_trainer(small_network(), encoder_lr=5e-5 / 4, decoder_lr=1e-3 / 4)
    scheduled.begin(1)
    for trainer in (scheduled, plain):
        trainer.step(*random_batch())
    for actual, desired in zip(scheduled.network.parameters(), plain.network.parameters()):
        assert torch.equal(actual, desired)


def test_shared_features_give_the_same_losses():
    """A frozen encoder that equals the loss network is computed once; the terms stay what they were."""
    shared, separate = make_trainer(encoder_lr=0.0), make_trainer(encoder_lr=0.0)
    assert shared.losses.encoder_is_loss_network
    separate.losses.encoder_is_loss_network = False
    desired, actual = separate.step(*random_batch(), all_terms=True), shared.step(*random_batch(), all_terms=True)
    for name in METRICS:
        assert_close(actual[name], desired[name], rtol=1e-5, atol=1e-7, msg=name)


def test_trained_encoder_is_not_taken_for_the_loss_network():
    assert not make_trainer().losses.encoder_is_loss_network


def test_step_matches_the_definition():
    """Total and gradients against the formulas of the method, written out with separate passes."""
    weights = dict(uncorrelation_loss_weight=50.0, channel_loss_weight=100.0, xor_loss_weight=5.0)
    trainer, plain = make_trainer(**weights), make_trainer(**weights)
    content, style = random_batch()
    terms, _ = trainer.losses(normalize(content), normalize(style), all_terms=False)
    sum(trainer.config.weights[name] * term for name, term in terms.items()).backward()

    content, style = normalize(content), normalize(style)
    encoder, decoder, vgg = plain.network.encoder, plain.network.decoder, plain.losses.loss_network
    content_feature, style_feature = encoder(content), encoder(style)
    output_features = vgg(decoder(adain(content_feature, *channel_statistics(style_feature))))
    norm = losses.channel_norm(torch.cat([content_feature, style_feature]))
    desired = {
        "content": losses.content_loss(output_features, vgg(content)),
        "style": losses.style_loss(output_features, vgg(style)),
        "uncorrelation": 0.5 * (losses.uncorrelation_loss(content_feature) + losses.uncorrelation_loss(style_feature)),
        "channel": losses.channel_loss(norm),
        "xor": losses.xor_loss(norm),
    }
    for name, term in desired.items():
        assert_close(terms[name], term, rtol=1e-4, atol=1e-7, msg=name)
    total = desired["content"] + 100 * desired["style"] + 50 * desired["uncorrelation"]
    (total + 100 * desired["channel"] + 5 * desired["xor"]).backward()
    for (name, actual), wanted in zip(trainer.network.named_parameters(), plain.network.parameters()):
        error = (actual.grad - wanted.grad).norm() / wanted.grad.norm()
        assert error < 1e-4, (name, error)


def test_shift_loss_of_the_step():
    """Against two separate passes: a photograph, and the same moved, in the style of the same pictures."""
    trainer, plain = (make_trainer(shift_loss_weight=30.0, encoder_lr=rate) for rate in (5e-5, 0.0))
    for frozen in (trainer, plain):  # a frozen encoder is the loss network
        frozen.begin(3)
    content, style = random_batch(32)
    step = trainer.step(content, style)
    network = make_trainer().network
    rows, columns = trainer.move.tolist()
    outputs = [network(normalize(picture), normalize(style))
               for picture in (content, losses.moved(content, trainer.move))]
    inner = (..., slice(6, 18), slice(6, 18))  # of 32 x 32 pixels, a quarter of 24 at each border, and a stride
    desired = (outputs[0][..., rows:, columns:][inner] - outputs[1][inner]).square().mean()
    assert desired > 0
    for actual in (step, plain.step(content, style)):
        assert_close(actual["shift"], desired, rtol=1e-4, atol=0)
    without = make_trainer().step(content, style)
    assert "shift" not in without
    assert_close(step["total"], without["total"] + 30.0 * desired, rtol=1e-4, atol=0)


def test_shift_loss_takes_every_move_in_turn():
    trainer = make_trainer(small_network(), shift_loss_weight=1.0)
    moves = []
    for iteration in range(1, 64):
        trainer.begin(iteration)
        moves.append(tuple(trainer.move.tolist()))
    assert set(moves) == {(rows, columns) for rows in range(8) for columns in range(8)} - {(0, 0)}


def test_shift_loss_makes_paint_follow():
    """A few dozen steps on one batch."""
    trainer = make_trainer(small_network(), shift_loss_weight=1000.0)
    steps = []
    for iteration in range(1, 64):
        trainer.begin(iteration)
        steps.append(trainer.step(*random_batch())["shift"].item())
    assert sum(steps[-10:]) < 0.5 * sum(steps[:10])


def test_weight_zero_is_logged_but_gives_no_gradient():
    trainer = make_trainer(channel_loss_weight=0.0, xor_loss_weight=0.0, uncorrelation_loss_weight=0.0)
    step = trainer.step(*random_batch())
    assert not {"channel", "xor", "uncorrelation"} & step.keys() and step["nonzero_channels"] > 0
    check = trainer.step(*random_batch(), all_terms=True)
    assert_close(check["total"], check["content"] + 100 * check["style"])
    assert check["channel"] > 0


def test_channel_and_xor_losses_switch_channels_off():
    """A few dozen steps on one batch: channels go off, and for all pictures alike."""
    trainer = make_trainer(channel_loss_weight=1e4, xor_loss_weight=500.0, encoder_lr=1e-4)
    start = trainer.step(*random_batch())
    for _ in range(25):
        end = trainer.step(*random_batch())
    assert end["nonzero_channels"] < start["nonzero_channels"] - 20
    assert end["channels_off_for_all"] > start["channels_off_for_all"] + 10


def test_vgg16_and_average_pooling_train(tmp_path):
    settings = {"backbone": "vgg16", "swap_max_pool": True, "style_loss": "gram", "max_iter": 2}
    train(SMALL_TRAINING | settings | {"save_path": str(tmp_path)})
    network, _ = load_network(tmp_path)
    assert (network.config.backbone, network.config.pooling) == ("vgg16", "avg")


# ------------------------------------------------------------------------------------------- what is written


def test_every_check_writes_metrics_grid_and_checkpoint(small, tmp_path):
    train(small | {"save_path": str(tmp_path), "max_iter": 5, "check_iter": 2, "keep_checkpoints": 2})
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    assert all(set(METRICS) <= row.keys() for row in rows)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["iteration_0000002.png", "iteration_0000004.png", "iteration_0000005.png"]
    models = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert models == ["check_point.pth", "check_point_0000004.pth", "check_point_0000005.pth"]


def read_wandb_records(path: Path) -> list:
    """Records of a .wandb file: a 7-byte header, then a LevelDB log of 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_wandb_offline_holds_the_logged_values(small, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests: auto is offline
    train(small | {"save_path": str(tmp_path / "run"), "max_iter": 2, "wb_mode": "auto", "wb_name": "trial",
                   "wb_tags": ("channel loss", "xor loss"), "wb_notes": "a note"})
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records, deadline = [], time.monotonic() + 60.0
    while not any(record.WhichOneof("record_type") == "exit" for record in records):  # wandb's own process writes
        assert time.monotonic() < deadline
        time.sleep(0.1)
        records = read_wandb_records(file)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert run.display_name == "trial" and list(run.tags) == ["channel loss", "xor loss"] and run.notes == "a note"
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    rows = read_metrics(tmp_path / "run")
    assert [row["_step"] for row in history] == [1, 2]
    for actual, desired in zip(history, rows):
        for name in METRICS:
            assert actual[name] == pytest.approx(desired[name]), name
        assert actual["pictures._type"] == "image-file"


def test_training_without_wandb_says_so_once(small, tmp_path, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    assert train(small | {"save_path": str(tmp_path), "max_iter": 2, "wb_mode": "auto"}) == 0
    assert capsys.readouterr().err.count("wandb is not installed") == 1
    with pytest.raises(UserError, match="wandb is not installed"):
        train(small | {"save_path": str(tmp_path / "other"), "max_iter": 2, "wb_mode": "online"})


def test_cached_run_equals_run_without_a_cache(small, tmp_path):
    settings = small | {"max_iter": 3}
    train(settings | {"save_path": str(tmp_path / "plain")})
    for name in ("first", "second"):  # fills the cache, then uses it
        train(settings | {"save_path": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), "num_workers": 1})
        assert read_metrics(tmp_path / name) == read_metrics(tmp_path / "plain")
    assert list((tmp_path / "cache").glob("??/*.npy"))


def test_broken_pictures_are_skipped_logged_once_and_counted(small, tmp_path, capsys):
    folder = tmp_path / "content"
    for number in range(11):
        write_picture(folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    train(small | {"content_dir": str(folder), "save_path": str(tmp_path / "run"), "max_iter": 8})
    errors = capsys.readouterr().err
    assert errors.count("broken.jpg") == 1
    assert f"--content_dir {folder}: 12 pictures, 1 skipped" in errors

"""The training step: it learns what the plain one learns, and what makes it fast does what it says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, EVERY_TERM, METRICS, make_trainer, random_batch, random_vgg, read_pixels, small_network
from plain import PlainTrainer
from torch.testing import assert_close

import loss as losses
from data import normalize
from train import TrainConfig

OFF = dict(style_loss_weight=0.0, uncorrelation_loss_weight=0.0, channel_loss_weight=0.0, xor_loss_weight=0.0)
WEIGHTS = {"content": OFF, "all": EVERY_TERM} | {
    name.removesuffix("_loss_weight"): OFF | {name: weight} for name, weight in EVERY_TERM.items()
}
# With a frozen encoder, no other term has a gradient beyond these.
CASES = [(name, 1e-5) for name in WEIGHTS] + [("content", 0.0), ("all", 0.0)]


def one_step_each(dtype: torch.dtype, **settings) -> tuple[dict, dict, float]:
    """The losses of the fast and the plain step from the same weights, and the largest relative difference of a
    gradient. The picture is noise: max pooling meets no ties."""
    fast = make_trainer(dtype=dtype, decoder_lr=1e-4, l0_eps=1.0, **settings)
    config = fast.config
    plain = PlainTrainer(fast.network.state_dict(), random_vgg(), config.weights, config.learning_rates, config.l0_eps,
                         CPU, dtype)
    actual, desired = fast.step(*random_batch()), plain.step(*random_batch())
    errors = []
    for part, rate in config.learning_rates.items():
        for mine, theirs in zip(getattr(fast.network, part).parameters(), getattr(plain, part).parameters()):
            if rate:
                errors.append(((mine.grad - theirs.grad).norm() / theirs.grad.norm()).item())
            else:
                assert mine.grad is None and torch.equal(mine, theirs)
    return {name: actual[name].item() for name in desired}, desired, max(errors)


@pytest.mark.parametrize("terms, encoder_lr", CASES)
def test_fast_step_equals_plain_step(terms, encoder_lr):
    actual, desired, error = one_step_each(torch.float64, encoder_lr=encoder_lr, **WEIGHTS[terms])
    assert actual == pytest.approx(desired, rel=1e-9)
    assert error < 1e-9


@pytest.mark.parametrize("amp, loss_error, gradient_error", [("off", 1e-3, 0.2), ("bf16", 0.1, 0.9)])
def test_fast_step_is_near_the_plain_step_in_lower_precision(amp, loss_error, gradient_error):
    """Where rounding puts a ReLU's input on the other side of zero, many gradients move."""
    actual, desired, error = one_step_each(torch.float32, amp=amp, encoder_lr=1e-5, **EVERY_TERM)
    assert actual == pytest.approx(desired, rel=loss_error)
    assert 0 < error < gradient_error


def test_the_bottleneck_alone_learns_as_it_does_among_all_layers():
    """With `encoder_layers`: the other layers stay; its gradient and the decoder's are those of the whole step."""
    whole, alone = (make_trainer(dtype=torch.float64, decoder_lr=1e-4, encoder_lr=1e-5, encoder_layers=layers,
                                 **EVERY_TERM) for layers in ("all", "bottleneck"))
    before = {name: tensor.clone() for name, tensor in alone.network.state_dict().items()}
    for trainer in (whole, alone):
        trainer.step(*random_batch())
    desired = dict(whole.network.named_parameters())
    for name, actual in alone.network.named_parameters():
        if name.startswith(("decoder", "encoder.layers.0.19")):
            assert (actual.grad - desired[name].grad).norm() < 1e-9 * desired[name].grad.norm()
            assert not torch.equal(actual, before[name])
        else:
            assert actual.grad is None and torch.equal(actual, before[name]) and desired[name].grad is not None


@pytest.mark.parametrize("settings, layers", [
    ({"encoder_lr": 0.0}, 21), ({"encoder_lr": 0.0, "backbone": "vgg16"}, 16), ({"encoder_layers": "bottleneck"}, 19),
])
def test_shared_features_give_the_same_losses(settings, layers):
    """What is frozen of an encoder and equals the loss network is computed once; the terms stay what they were."""
    shared, separate = (make_trainer(dtype=torch.float64, **settings) for _ in range(2))
    assert shared.forward_pass.shared_layers == layers and make_trainer().forward_pass.shared_layers == 0
    separate.forward_pass.shared_layers = 0
    desired, actual = (trainer.step(*random_batch(), all_terms=True) for trainer in (separate, shared))
    for name in METRICS:
        assert_close(actual[name], desired[name], rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("layers", ["bottleneck", "decoder"])
def test_shallower_levels_of_the_step_are_the_networks(layers):
    """The picture and the channels that the losses see are those of the network's own forward pass."""
    network = small_network(adain_levels=3)
    trainer = make_trainer(network, dtype=torch.float64, compact_layers=layers, channel_loss_weight=0.0,
                           xor_loss_weight=0.0)
    images = [normalize(pictures).double() for pictures in random_batch(32)]
    with torch.no_grad():
        target, output = trainer.forward_pass.loss_network(images[0])[-1], network(*images)
        desired = losses.content_loss(trainer.forward_pass.loss_network(output)[-1:], [target])
        bottleneck = torch.cat([network.encode(image)[0] for image in images])
    step = trainer.step(*random_batch(32))
    assert_close(step["content"], desired, rtol=1e-9, atol=0)
    assert step["channels_off_for_all"] == (bottleneck == 0).all(dim=3).all(dim=2).all(dim=0).sum()


def test_rates_rise_stay_and_fall():
    config = TrainConfig(max_iter=8, warmup_iter=2, decay_iter=3)
    assert [config.rate_share(iteration) for iteration in range(1, 9)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert {TrainConfig(max_iter=8).rate_share(iteration) for iteration in range(1, 9)} == {1.0}


def test_rates_that_never_rise_to_what_was_asked_for_are_said(capsys):
    for warmup, decay, said in ((400, 400, ""), (0, 800, ""), (800, 800, "at most 50% of"),
                                (0, 1599, "at most 50% of")):
        make_trainer(small_network(), warmup_iter=warmup, decay_iter=decay, max_iter=800)
        err = capsys.readouterr().err
        assert said in err and bool(said) == bool(err)


def test_a_step_at_a_share_of_the_rates_is_one_at_rates_that_small():
    scheduled = make_trainer(small_network(), warmup_iter=4)
    plain = make_trainer(small_network(), encoder_lr=5e-5 / 4, decoder_lr=1e-3 / 4)
    scheduled.begin(1)
    for trainer in (scheduled, plain):
        trainer.step(*random_batch())
    for actual, desired in zip(scheduled.network.parameters(), plain.network.parameters()):
        assert torch.equal(actual, desired)


def test_weight_zero_is_measured_at_a_check_but_gives_no_gradient():
    trainer = make_trainer(small_network(), channel_loss_weight=0.0, xor_loss_weight=0.0, uncorrelation_loss_weight=0.0)
    step = trainer.step(*random_batch())
    assert not {"channel", "xor", "uncorrelation"} & step.keys() and step["nonzero_channels"] > 0
    check = trainer.step(*random_batch(), all_terms=True)
    assert_close(check["total"], check["content"] + 100 * check["style"])
    assert check["channel"] > 0


def test_channel_and_xor_losses_switch_channels_off():
    """A dozen steps on one batch: channels go off, and for all pictures alike."""
    trainer = make_trainer(channel_loss_weight=1e4, xor_loss_weight=500.0, encoder_lr=2e-4)
    start = trainer.step(*random_batch())
    for _ in range(12):
        end = trainer.step(*random_batch())
    assert end["nonzero_channels"] < start["nonzero_channels"] - 20
    assert end["channels_off_for_all"] > start["channels_off_for_all"] + 10


def test_shift_loss_of_the_step():
    """Against two separate passes: a photograph, and the same moved, in the style of the same pictures."""
    trainer, frozen = (make_trainer(shift_loss_weight=30.0, encoder_lr=rate, dtype=torch.float64)
                       for rate in (5e-5, 0.0))  # a frozen encoder is the loss network
    for each in (trainer, frozen):
        each.begin(3)
    content, style = random_batch(32)
    rows, columns = trainer.move.tolist()
    step = trainer.step(content, style)
    network = make_trainer(dtype=torch.float64).network
    outputs = [network(normalize(picture).double(), normalize(style).double())
               for picture in (content, losses.moved(content, trainer.move))]
    inner = (..., slice(6, 18), slice(6, 18))  # of 32 x 32 pixels, a quarter of 24 at each border, and a stride
    desired = (outputs[0][..., rows:, columns:][inner] - outputs[1][inner]).square().mean()
    assert desired > 0
    for actual in (step, frozen.step(content, style)):
        assert_close(actual["shift"], desired, rtol=1e-9, atol=0)
    without = make_trainer(dtype=torch.float64).step(content, style)
    assert "shift" not in without
    assert_close(step["total"], without["total"] + 30.0 * desired, rtol=1e-9, atol=0)


def test_shift_loss_takes_every_move_in_turn():
    trainer = make_trainer(small_network(), shift_loss_weight=1.0)
    moves = []
    for iteration in range(1, 64):
        trainer.begin(iteration)
        moves.append(tuple(trainer.move.tolist()))
    assert set(moves) == {(rows, columns) for rows in range(8) for columns in range(8)} - {(0, 0)}


def test_sample_is_a_grid_of_content_style_and_output(tmp_path, monkeypatch):
    """Two columns, three rows of 8 x 8 with 4 pixels of white around each."""
    trainer = make_trainer(small_network())
    content, style, output = (torch.full((2, 3, 8, 8), value, dtype=torch.uint8) for value in (10, 120, 240))
    monkeypatch.setattr(trainer.network, "forward", lambda content, style: normalize(output))
    trainer.shown_pictures, trainer.dead_units = (content, style), SimpleNamespace(count=lambda network: {})
    desired = np.full((3 * 12 + 4, 2 * 12 + 4, 3), 255)
    for row, value in enumerate((10, 120, 240)):
        for left in (4, 16):
            desired[4 + 12 * row : 12 + 12 * row, left : left + 8] = value
    assert (read_pixels(trainer.report(tmp_path, 7)[1]) == desired).all()

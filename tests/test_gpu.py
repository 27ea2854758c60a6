"""What only a GPU shows: no host synchronisation in a step, CUDA graphs, the fast step against the plain one."""

import pytest
import torch
from helpers import EVERY_TERM, ROOT, SMALL_TRAINING, make_trainer, random_batch, random_vgg
from plain import PlainTrainer

from train import TrainConfig, train
from training.loop import MetricSums
from training.sampling import TrainingPictures, training_batches
from training.step import TransferTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)
EVERY_LAYER = dict(compact_layers="all", compact_cost="macs", target_macs=0.5, l0_eps="relative:0.1",
                   shift_loss_weight=30.0)


def gpu_trainer(**settings) -> TransferTrainer:
    settings = dict(amp="auto", encoder_lr=1e-5, decoder_lr=1e-4, l0_eps=1.0) | EVERY_TERM | settings
    return make_trainer(device=GPU, **settings)


def batches(count: int) -> list[list[torch.Tensor]]:
    return [[pictures.to(GPU) for pictures in random_batch(64, seed=number)] for number in range(count)]


@pytest.mark.parametrize("more", [{}, EVERY_LAYER], ids=["bottleneck", "every layer"])
@pytest.mark.parametrize("compiled", [False, True])
def test_step_never_waits_for_the_gpu(compiled, more):
    trainer = gpu_trainer(compile=compiled, **more)
    sums = MetricSums()
    pictures = batches(6)
    for number, pair in enumerate(pictures[:4], 1):  # caches, compilation, graphs
        sums.add(trainer.step(*pair), number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, pair in enumerate(pictures[4:], 5):
            sums.add(trainer.step(*pair), number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("more", [{}, EVERY_LAYER], ids=["bottleneck", "every layer"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_compiled_steps_equal_eager_steps(amp, more):
    """Over 20 steps with two of all terms, so that graphs are replayed between eager work."""
    eager, compiled = gpu_trainer(amp=amp, **more), gpu_trainer(amp=amp, compile=True, **more)
    for number, pair in enumerate(batches(20)):
        desired, actual = (trainer.step(*pair, all_terms=number % 8 == 7) for trainer in (eager, compiled))
        for name, value in desired.items():
            near = 2.0 if "channels" in name else 1e-3  # a count may change by a channel at its edge
            assert actual[name].item() == pytest.approx(value.item(), rel=0.05, abs=near), (name, number)


def test_fast_step_equals_plain_step():
    fast = make_trainer(device=GPU, dtype=torch.float64, decoder_lr=1e-4, encoder_lr=1e-5, l0_eps=1.0, **EVERY_TERM)
    config = fast.config
    plain = PlainTrainer(fast.network.state_dict(), random_vgg(), config.weights, config.learning_rates, config.l0_eps,
                         GPU, torch.float64)
    (pair,) = batches(1)
    actual, desired = fast.step(*pair), plain.step(*pair)
    assert {name: actual[name].item() for name in desired} == pytest.approx(desired, rel=1e-9)


def test_run_on_the_gpu_resumes(tmp_path):
    settings = SMALL_TRAINING | dict(num_workers=2, gpu_no=0, amp="auto", check_iter=2, compile=True,
                                     save_path=str(tmp_path / "run"))
    assert train(settings | {"max_iter": 4}) == 0
    assert train({"save_path": settings["save_path"], "resume": True, "max_iter": 6}) == 0


def test_batches_are_pinned():
    paths = sorted((ROOT / "imgs" / "content").glob("*.jpg"))
    pictures = TrainingPictures((paths, paths), TrainConfig(imsize=40, cropsize=32))
    content, style, _ = next(training_batches(pictures, range(4), 2, 1, pin_memory=True))
    assert content.is_pinned() and style.is_pinned()

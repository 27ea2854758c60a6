"""The losses, against reference values and explicit loops."""

import numpy as np
import pytest
import torch
from helpers import REFERENCE
from torch.testing import assert_close

import loss as losses
from loss import L0_EPS, channel_loss, channel_norm, content_loss, shift_loss, style_loss, uncorrelation_loss, xor_loss
from network import adain, channel_statistics


def wave(shape, k: float, scale: float, relu: bool = True) -> torch.Tensor:
    values = (np.sin(np.arange(np.prod(shape), dtype=np.float64) * k) * scale).astype(np.float32).reshape(shape)
    return torch.from_numpy(values).relu() if relu else torch.from_numpy(values)


@pytest.fixture(scope="module")
def layers() -> dict[str, torch.Tensor]:
    """The features of reference_values.json, as its `how` builds them."""
    values = REFERENCE["loss"]
    batch, channels, height, width = values["shape"]
    k_feature, k_target = values["k_feature"], values["k_target"]
    feature = wave(values["shape"], k_feature, 3.0)
    for picture, channel in values["dead"]:
        feature[picture, channel] = 0
    deeper = (batch, channels + 2, 2 * height, 2 * width)
    return {
        "feature": feature,
        "target": wave(values["shape"], k_target, 3.0),
        "feature2": wave(deeper, 1.3 * k_target, 2.0),
        "target2": wave(deeper, 0.7 * k_feature, 2.0),
    }


REFERENCE_LOSSES = {
    "content": lambda f: content_loss([f["feature2"], f["feature"]], [f["target2"], f["target"]]),  # the deepest alone
    "style_two_layers": lambda f: style_loss([f["feature"], f["feature2"]], [f["target"], f["target2"]]),
    "uncorrelation": lambda f: uncorrelation_loss(f["feature"]),
    "channel": lambda f: channel_loss(channel_norm(f["feature"])),
    "xor": lambda f: xor_loss(channel_norm(f["feature"])),
    "channel_eps1": lambda f: channel_loss(channel_norm(f["feature"]), eps=1.0),
    "xor_eps1": lambda f: xor_loss(channel_norm(f["feature"]), eps=1.0),
}


@pytest.mark.parametrize("name", REFERENCE_LOSSES)
def test_reference_values(layers, name):
    actual = REFERENCE_LOSSES[name](layers)
    desired = torch.tensor(REFERENCE["loss"][name])
    assert actual.shape == ()
    assert_close(actual, desired, rtol=1e-5, atol=0)


def test_meanstd_by_hand():
    """Means 2 and 0, unbiased deviations 2 and 0: (4 + 4) for one layer; of two layers, one alike, 8 / 2 / 2."""
    feature = torch.tensor([0.0, 2.0, 4.0]).reshape(1, 1, 1, 3)
    target = torch.zeros(1, 1, 2, 4)
    alike = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert_close(style_loss([feature], [target]), torch.tensor(8.0))
    assert_close(style_loss([alike, feature], [alike, target]), torch.tensor(2.0))


def test_style_gram_against_explicit_sum(layers):
    desired = 0.0
    for feature, target in (("feature", "target"), ("feature2", "target2")):
        f, t = (layers[name].double().numpy().reshape(*layers[name].shape[:2], -1) for name in (feature, target))
        gram = [np.einsum("bip,bjp->bij", each, each) / each.shape[2] for each in (f, t)]
        desired += ((gram[0] - gram[1]) ** 2).mean()
    desired = desired / 2 / 2
    actual = style_loss([layers["feature"], layers["feature2"]], [layers["target"], layers["target2"]], "gram")
    assert_close(actual, torch.tensor(desired, dtype=torch.float32), rtol=1e-5, atol=0)


PATTERNS = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])  # mean-free, orthogonal


def as_feature(channels: torch.Tensor, pictures: int = 1) -> torch.Tensor:
    return channels[None].repeat(pictures, 1, 1).reshape(pictures, len(channels), 2, 2)


@pytest.mark.parametrize("channels, share", [
    (torch.stack([PATTERNS[0], 2 * PATTERNS[0] + 3]), 1.0),  # correlated
    (torch.stack([PATTERNS[0], 5 - 0.5 * PATTERNS[0]]), 1.0),  # anti-correlated counts alike
    (PATTERNS + 2, 0.0),
    (torch.stack([PATTERNS[0], PATTERNS[1], -PATTERNS[0] + 1]), 2 / 6),  # 1 of 3 pairs
    (torch.stack([PATTERNS[0], PATTERNS[0], torch.zeros(4)]), 2 / 6),  # a dead channel correlates with nothing
    (torch.stack([PATTERNS[0], PATTERNS[0], torch.full((4,), 0.5)]), 2 / 6),  # nor does a constant one
])
def test_uncorrelation_of_planted_channels(channels, share):
    for pictures in (1, 3):
        actual = uncorrelation_loss(as_feature(channels, pictures))
        desired = torch.tensor(share * pictures)  # a sum over the batch
        assert_close(actual, desired, rtol=1e-4, atol=1e-6)


def test_uncorrelation_of_two_constant_channels_with_rounded_mean():
    """The mean of 35 times 0.1 or 3.3 is not exact in float32; that must not look like a correlation."""
    feature = torch.stack([torch.full((5, 7), 0.1), torch.full((5, 7), 3.3)])[None]
    assert_close(uncorrelation_loss(feature), torch.tensor(0.0), rtol=0, atol=1e-4)


def test_channel_loss_gradient_is_exact_up_to_large_norms():
    norms = torch.tensor([[1e-6, 1e-5, 1e-3, 0.1, 1.0, 10.0, 74.0, 76.0, 300.0, 1e3, 3e3, 1e4]])
    norm = norms.clone().requires_grad_()
    channel_loss(norm).backward()
    exact = norms.double()
    desired = L0_EPS / (exact + L0_EPS) ** 2 / norms.numel()
    assert_close(norm.grad.double(), desired, rtol=1e-5, atol=0)


def explicit_xor(norm: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, over all pairs, in float64. l0_i - l0_j = eps (a_i - a_j) / ((a_i + eps) (a_j + eps)), which
    keeps the difference of channels whose l0 rounds to 1."""
    pictures, channels = norm.shape
    total = norm.new_zeros(())
    for i in range(pictures):
        for j in range(i + 1, pictures):
            for c in range(channels):
                total = total + (eps * (norm[i, c] - norm[j, c]) / ((norm[i, c] + eps) * (norm[j, c] + eps))).abs()
    return total / (channels * pictures * (pictures - 1) / 2)


def random_norms(pictures: int, seed: int) -> torch.Tensor:
    return torch.rand(pictures, 5, generator=torch.Generator().manual_seed(seed)) * 4


XOR_CASES = {
    "two pictures": (random_norms(2, 0), 1.0),
    "odd number": (random_norms(5, 1), L0_EPS),
    "some off": (random_norms(6, 3) * (random_norms(6, 4) > 2), 0.1),
    "ties": (random_norms(6, 5).round(), 1.0),
    "saturated": (100.0 + 9900.0 * random_norms(5, 6) / 4, L0_EPS),
    "saturated ties": (torch.tensor([[1e4, 0.0, 1e4], [1e4, 0.0, 900.0], [1e4, 1e4, 900.0], [1e4, 3.0, 1e4]]), L0_EPS),
    "equal": (torch.tensor([[1e4, 2.5, 0.0]]).repeat(8, 1), L0_EPS),
}


@pytest.mark.parametrize("case", XOR_CASES)
def test_xor_against_all_pairs(case):
    values, eps = XOR_CASES[case]
    norm, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    actual, desired = xor_loss(norm, eps), explicit_xor(exact, eps)
    # The sum cancels equal terms; what it leaves of them is float32 rounding of values up to 1.
    largest = float((eps / (values + eps)).max())
    assert_close(actual.double(), desired, rtol=1e-5, atol=1e-7 * largest)
    actual.backward()
    desired.backward()
    # In units of the slope of l0 a gradient is a count of pairs, 0 among equal norms.
    slope = eps / (values.double() + eps) ** 2
    assert_close(norm.grad.double() / slope, exact.grad / slope, rtol=1e-5, atol=1e-6)
    equal = (values == values[0]).all(dim=0)
    assert not norm.grad[:, equal].any()  # a rest of 1e-7 each would be moved along by Adam all the same


def test_channels_that_are_off_stay_off():
    feature = wave((2, 4, 3, 3), 0.37, 3.0)
    feature[:, 1] = 0
    feature.requires_grad_()
    norm = channel_norm(feature)
    (channel_loss(norm) + xor_loss(norm)).backward()
    assert_close(feature.grad[:, 1], torch.zeros(2, 3, 3), rtol=0, atol=0)
    assert feature.grad[:, 0].abs().max() > 0


def test_moved_by_hand():
    image = torch.arange(12.0).view(1, 1, 3, 4)  # rows 0 1 2 3, 4 5 6 7 and 8 9 10 11
    assert losses.moved(image, torch.tensor([1, 2]))[0, 0].tolist() == [[6, 7, 7, 7], *[[10, 11, 11, 11]] * 2]
    assert torch.equal(losses.moved(image, torch.tensor([0, 0])), image)


@pytest.mark.parametrize("size, move", [((16, 16), (7, 7)), ((128, 40), (7, 0)), ((128, 40), (0, 1))])
def test_shift_loss_of_paint_that_follows_is_zero(size, move):
    """Whatever the border shows, where the two pictures differ."""
    rows, columns = move
    scene = wave((2, 3, size[0] + 7, size[1] + 7), 0.37, 1.0)
    still, follows = (scene[:, :, top : top + size[0], left : left + size[1]]
                      for top, left in ((0, 0), (rows, columns)))
    edge = torch.zeros(size)
    edge[:2], edge[-8:], edge[:, :2], edge[:, -8:] = 1.0, 1.0, 1.0, 1.0
    assert shift_loss(still, follows + edge, torch.tensor(move), 8) == 0
    assert_close(shift_loss(still, follows + 0.5, torch.tensor(move), 8), torch.tensor(0.25))
    assert shift_loss(still, still, torch.tensor(move), 8) > 0.01


def test_shift_loss_by_hand():
    """Of 16 x 16 pixels at a stride of 8, the inner 4 x 4 count, in three colours; one differs, in one colour, by 6."""
    output = torch.zeros(1, 3, 16, 16, requires_grad=True)
    moved_output = torch.zeros(1, 3, 16, 16)
    moved_output[0, 1, 3, 4] = 6.0
    shift_loss(output, moved_output, torch.tensor([2, 1]), 8).backward()
    assert_close(shift_loss(output, moved_output, torch.tensor([2, 1]), 8), torch.tensor(36.0 / 48.0))
    assert output.grad.nonzero().tolist() == [[0, 1, 5, 5]]


TARGET = wave((3, 4, 6, 6), 0.53, 3.0)
ALL_LOSSES = {
    "content": lambda f: content_loss([f], [TARGET]),
    "style meanstd": lambda f: style_loss([f], [TARGET], "meanstd"),
    "style gram": lambda f: style_loss([f], [TARGET], "gram"),
    "uncorrelation": uncorrelation_loss,
    "channel": lambda f: channel_loss(channel_norm(f)),
    "xor": lambda f: xor_loss(channel_norm(f)),
    "adain of content": lambda f: adain(f, *channel_statistics(TARGET)).square().mean(),
    "adain of style": lambda f: adain(TARGET, *channel_statistics(f)).square().mean(),
    "adain of both": lambda f: adain(f, *channel_statistics(f.flip(0)), 0.5).square().mean(),
}


KINDS = {"dead": ((slice(None), 1, 0.0),), "dead for one picture": ((0, 1, 0.0),), "constant": ((slice(None), 2, 0.7),),
         "dead and constant": ((slice(None), 1, 0.0), (slice(None), 2, 0.7), (1, 3, 0.0)),
         "all dead": ((slice(None), slice(None), 0.0),), "all constant": ((slice(None), slice(None), 0.7),)}


def feature_with(kind: str) -> torch.Tensor:
    feature = wave((3, 4, 6, 6), 0.37, 3.0)
    for pictures, channels, value in KINDS[kind]:
        feature[pictures, channels] = value
    return feature


def test_channel_statistics_and_their_gradients_are_torchs():
    results = []
    for statistics in (channel_statistics, lambda f: torch.std_mean(f, dim=(2, 3), keepdim=True)[::-1]):
        feature = feature_with("dead for one picture").double().requires_grad_()
        mean, std = statistics(feature)
        (mean.square() + std).sum().backward()
        results.append((mean, std, feature.grad))
    for actual, expected in zip(*results):
        assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_value_and_gradient_are_finite(name):
    for kind in KINDS:
        feature = feature_with(kind).requires_grad_()
        loss = ALL_LOSSES[name](feature)
        loss.backward()
        assert loss.isfinite() and feature.grad.isfinite().all(), kind


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_bfloat16_features_give_float32_losses(name):
    """What bfloat16 cannot hold is in the features; nothing more is lost in the loss. Float64 stays what it is."""
    feature = feature_with("dead")
    actual = ALL_LOSSES[name](feature.bfloat16())
    assert actual.dtype == torch.float32 and ALL_LOSSES[name](feature.double()).dtype == torch.float64
    assert_close(actual, ALL_LOSSES[name](feature.bfloat16().float()), rtol=1e-6, atol=0)
    assert_close(actual, ALL_LOSSES[name](feature), rtol=2e-2, atol=1e-6)

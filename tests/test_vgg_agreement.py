"""The benchmark of VGG weights: distorted copies, distances, the share of equal votes; without ST-LPIPS itself."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import vgg_agreement  # noqa: E402

from data import find_pictures  # noqa: E402

CONTENT_DIR = ROOT / "imgs" / "content"


def test_triplets_are_deterministic_and_distorted():
    paths = find_pictures(CONTENT_DIR, "")
    triplets = vgg_agreement.make_triplets(paths, 10, 32, seed=0)
    assert triplets.shape == (10, 3, 3, 32, 32) and triplets.dtype == torch.uint8
    assert torch.equal(triplets, vgg_agreement.make_triplets(paths, 10, 32, seed=0))
    assert torch.equal(triplets[0, 0], triplets[8, 0])  # 8 pictures in turn
    assert not torch.equal(triplets[0, 1], triplets[8, 1]) and not torch.equal(triplets[0, 1], triplets[0, 2])


@pytest.mark.parametrize("kind", ["blur", "noise", "jpeg", "warp", "shift_colors"])
def test_every_distortion_grows_with_its_strength(kind):
    picture = vgg_agreement.make_triplets(find_pictures(CONTENT_DIR, ""), 1, 64, seed=0)[0, 0]
    changes = []
    for strength in (0.05, 0.95):
        copy = getattr(vgg_agreement, kind)(picture, strength, torch.Generator().manual_seed(0))
        assert copy.shape == picture.shape and copy.dtype == torch.uint8
        changes.append(float((copy.float() - picture.float()).abs().mean()))
    assert 0 < changes[0] < changes[1]


def test_distances_are_zero_for_equal_pictures_only():
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    triplet = torch.stack([picture, picture, 255 - picture])[None]
    for distance in (vgg_agreement.PixelDistance(), vgg_agreement.FeatureDistance("random")):
        actual = distance(triplet)
        assert actual.shape == (1, 2) and actual[0, 1] > 0.01
        assert_close(actual[0, 0], torch.tensor(0.0))


def test_agreement_by_hand():
    """Pictures in turn: of 2, the first is always right, the second never."""
    result = vgg_agreement.agreement(np.array([True, False] * 10), 2)
    assert result == {"agreement": 0.5, "low": 0.0, "high": 1.0}
    assert vgg_agreement.agreement(np.ones(7, bool), 3) == {"agreement": 1.0, "low": 1.0, "high": 1.0}


def test_what_a_distance_minds_by_hand():
    """Rows go kind by kind, picture by picture; here the distance is written into the pictures."""
    kinds = len(vgg_agreement.KINDS)
    amounts = torch.tensor([[1, 3], [2, 2], [0, 0], [0, 4], [6, 2]])  # of both copies: means 2, 2, 0, 2, 4
    singles = torch.zeros(2 * kinds, 3, 3, 4, 4, dtype=torch.uint8)
    singles[:, 1:] = torch.cat([amounts, amounts])[:, :, None, None, None].byte()

    class Written(torch.nn.Module):
        def forward(self, triplets):
            return triplets[:, 1:].float().mean(dim=(2, 3, 4))

    actual = vgg_agreement.minds(Written(), singles, torch.device("cpu"))
    assert actual == {"blur": 1.0, "noise": 1.0, "JPEG": 0.0, "warp": 1.0, "colours": 2.0}


def test_single_distortions_go_kind_by_kind():
    paths = find_pictures(CONTENT_DIR, "")[:2]
    singles = vgg_agreement.make_single_distortions(paths, 32, seed=0)
    assert singles.shape == (2 * len(vgg_agreement.KINDS), 3, 3, 32, 32)
    for row, (picture, first, second) in enumerate(singles):
        assert torch.equal(picture, singles[row // 5 * 5, 0]) and not torch.equal(picture, first)
        kind = list(vgg_agreement.KINDS)[row % 5]
        assert torch.equal(first, second) == (kind in ("blur", "JPEG"))  # the two that draw nothing


def test_last_line_is_json(monkeypatch, capsys):
    monkeypatch.setattr(vgg_agreement, "ShiftTolerantLpips", lambda trunk: vgg_agreement.PixelDistance())
    code = vgg_agreement.main(f"--content_dir {CONTENT_DIR} --holdout 1 --triplets 6 --size 32 --gpu_no -1".split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and result["triplets"] == 6 and result["pictures"] == 8
    assert result["results"]["pixels"]["agreement"] == 1.0
    assert 0 <= result["results"]["random"]["agreement"] <= 1

"""Which objects boxes learn, and which boxes are drawn by chance."""

import pytest
import torch
from torch import Tensor

from trimask.engine.model.matching import ANCHORS, BACKGROUND, IGNORED, OBJECTS, PROPOSALS, match, random_keys, sample

# Of a box (0, 0, 10, 10): (0, 0, 10, h) has an IoU of h / 10.
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 7], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60]])
LIMITS = {"foreground": 0.7, "background": 0.3, "allow_low_quality_matches": False, "crowd_threshold": None}


def matched(objects: Tensor, real: list[bool], crowd: list[bool], **options) -> list[int]:
    rows = BOXES, objects, torch.tensor(real), torch.tensor(crowd)
    return match(*(x[None] for x in rows), **{**LIMITS, **options})[0].tolist()


def test_thresholds_are_those_of_the_paper() -> None:
    """From .7 on foreground, below .3 background."""
    objects = torch.tensor([[80.0, 80, 90, 90], [0, 0, 10, 10]])
    assert matched(objects, [True] * 2, [False] * 2) == [1, 1, IGNORED, BACKGROUND, BACKGROUND]
    assert matched(objects, [True, False], [False] * 2) == [BACKGROUND] * 5


def test_an_objects_best_boxes_are_foreground() -> None:
    """Ties too; an object without overlap has none."""
    objects = torch.tensor([[50.0, 50, 60, 52], [0, 0, 10, 2], [90, 90, 95, 95]])
    assert matched(objects, [True] * 3, [False] * 3, allow_low_quality_matches=True) == [
        BACKGROUND,
        BACKGROUND,
        IGNORED,
        1,
        0,
    ]
    twice = torch.tensor([[0.0, 0, 10, 6]])  # IoU 6/10, 6/7, 5/6, 1/3, 0
    assert matched(twice, [True], [False], foreground=0.99, allow_low_quality_matches=True)[:3] == [IGNORED, 0, IGNORED]


def test_a_crowd_hides_background_alone() -> None:
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 60, 56]])
    found = matched(objects, [True, False], [False, True], crowd_threshold=0.5)
    assert found == [0, 0, IGNORED, IGNORED, IGNORED]  # the last by 6/10
    found = matched(objects, [True, False], [False, True], crowd_threshold=0.6)
    assert found == [0, 0, IGNORED, IGNORED, BACKGROUND]


def test_keys_are_distinct_and_depend_on_seed_and_row_alone(seed: int) -> None:
    seeds = torch.tensor([seed, seed + 1, seed + (1 << 32), -1])
    keys, other = random_keys(seeds, (ANCHORS, 100_000), (PROPOSALS, 300))
    assert keys.min() >= 0
    assert keys.max() < 1 << 32
    assert all(len(row.unique()) == len(row) for row in keys)
    assert torch.equal(random_keys(seeds[1:2], (500, 70))[0], keys[1:2, 500:570])
    assert torch.equal(random_keys(seeds, (PROPOSALS, 300))[0], other)
    kinds = random_keys(seeds[:1], *((first, 10_000) for first in (ANCHORS, PROPOSALS, OBJECTS)))
    assert len(torch.cat(kinds, 1).unique()) == 30_000
    # Neighbouring seeds are as good as any: correlations have a standard deviation of 1 / sqrt(100,000).
    assert (torch.corrcoef(keys.double()) - torch.eye(4)).abs().max() < 6 * 100_000**-0.5
    bits = (keys[..., None] >> torch.arange(32)) & 1
    assert (bits.double().mean(1) - 0.5).abs().max() < 6 * 0.5 * 100_000**-0.5


@pytest.mark.parametrize(
    ("foreground", "background", "chosen"), [(5, 100, (4, 6)), (2, 100, (2, 8)), (5, 3, (4, 3)), (0, 0, (0, 0))]
)
def test_a_sample_is_filled_up_by_the_background(foreground: int, background: int, chosen: tuple[int, int]) -> None:
    matches = torch.tensor([[3] * foreground + [BACKGROUND] * background + [IGNORED] * 30])
    found = sample(matches, 10, 4, *random_keys(torch.tensor([1]), (0, matches.shape[1])))
    assert found.index.shape == (1, min(10, matches.shape[1]))
    assert found.foreground.sum() == chosen[0]
    assert found.there.sum() == sum(chosen)
    assert found.foreground[0, : chosen[0]].all()
    rows = found.index[found.there]
    assert (matches[0, rows[: chosen[0]]] == 3).all()
    assert (matches[0, rows[chosen[0] :]] == BACKGROUND).all()
    assert len(rows.unique()) == len(rows)


def test_every_box_is_drawn_as_often(seed: int) -> None:
    """Of 6 and 18, 2 and 6 each: a third. 4 sigma of 6000 draws, of 24 boxes, fail once in 700 runs; 6, never."""
    matches = torch.tensor([[0] * 6 + [BACKGROUND] * 18]).expand(6000, -1)
    found = sample(matches, 8, 2, *random_keys(seed + torch.arange(6000), (0, 24)))
    often = torch.bincount(found.index.flatten(), minlength=24) / 6000
    assert (often - 1 / 3).abs().max() < 6 * (2 / 9 / 6000) ** 0.5

"""Good images with defects of which all is known."""

import numpy as np
import pytest

from rad.data.defects import DEFECTS
from rad.data.twins import defective_twins


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(90, 160, (2, 64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("number", range(2 * len(DEFECTS)))
def test_both_twins_differ_from_their_image_where_the_mask_is(images, number):
    twins = defective_twins(*images, number)
    assert len(twins) == 2
    for twin, mask in twins:
        assert twin.dtype == np.uint8 and twin.shape == images[0].shape and mask.shape == (64, 64)
        assert mask.any() and not mask.all()
        assert (twin[mask] != images[0][mask]).any()
    drawn, mask = twins[0]
    assert (drawn[~mask] == images[0][~mask]).all()


def test_they_follow_from_the_number_and_the_seed(images):
    first, again, other, seeded = (
        defective_twins(*images, number, seed) for number, seed in ((3, 0), (3, 0), (4, 0), (3, 1))
    )
    for (twin, mask), (same, same_mask) in zip(first, again, strict=True):
        assert (twin == same).all() and (mask == same_mask).all()
    assert any((twin != changed).any() for (twin, _), (changed, _) in zip(first, other, strict=True))
    assert any((twin != changed).any() for (twin, _), (changed, _) in zip(first, seeded, strict=True))


def test_where_nothing_can_be_drawn_the_mask_is_empty():
    tiny = np.full((16, 16, 3), 128, np.uint8)
    (drawn, mask), _ = defective_twins(tiny, tiny, 0)
    assert (drawn == tiny).all() and not mask.any()

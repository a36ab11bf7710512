"""Artificial defects, and the discriminator that learns from them."""

import itertools

import numpy as np
import pytest
import torch

from rad.data.pasting import artificial_batches, paste_defects
from rad.models.discriminator import RADDiscriminator

SIDE = 64


def stripes(count: int = 8) -> list[np.ndarray]:
    """Grey stripes with a little noise."""
    rng = np.random.default_rng(0)
    pattern = 120 + 30 * np.sin(np.arange(SIDE) / 3)
    images = pattern[None, None, :, None] + rng.normal(0, 4, (count, SIDE, SIDE, 1))
    return list(np.repeat(images, 3, axis=3).clip(0, 255).astype(np.uint8))


def pasted(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A good image, the same with artificial defects, and their mask."""
    image, other = (x.astype(np.float32) for x in stripes(2))
    return image, *paste_defects(image, other, np.random.default_rng(seed))


def test_the_mask_is_where_the_image_changed():
    for seed in range(40):
        image, changed, mask = pasted(seed)
        assert changed.shape == image.shape and changed.dtype == np.float32 and mask.dtype == bool
        assert 0 <= changed.min() and changed.max() <= 255
        change = np.abs(changed - image).mean(2)
        if mask.any():
            assert change[mask].mean() > 2 * change[~mask].mean() and change[mask].mean() > 1.5


def test_most_images_get_a_defect_that_can_be_seen():
    assert np.mean([pasted(seed)[2].any() for seed in range(60)]) > 0.6


def test_defects_are_small_and_large():
    areas = [pasted(seed)[2].mean() for seed in range(80)]
    assert sum(0 < area < 0.02 for area in areas) > 10 and sum(area > 0.1 for area in areas) > 10


def test_grey_images_stay_grey():
    for seed in range(30):
        changed = pasted(seed)[1]
        np.testing.assert_allclose(changed[..., 0], changed[..., 1], atol=1e-3)


def test_batches_depend_on_the_seed_and_their_number_alone():
    images, names = stripes(), ["a"] * 4 + ["b"] * 4
    first, again = ([*itertools.islice(artificial_batches(images, names, 4, seed=1), 2)] for _ in range(2))
    for n, (x_0, mask) in enumerate(first):
        assert x_0.shape == (4, 3, SIDE, SIDE) and -1 <= x_0.min() and x_0.max() <= 1
        assert torch.equal(x_0, again[n][0]) and torch.equal(mask, again[n][1])
    assert not torch.equal(first[0][0], first[1][0])


def test_logits_have_the_grid_of_the_finest_stage_that_is_read():
    model = RADDiscriminator(stage_channels=(4, 6), widths=(8, 16)).eval()
    stages = [torch.randn(2, channels, 32 // 2**i, 32 // 2**i) for i, channels in enumerate((3, 4, 6))]
    assert model(stages).shape == (2, 16, 16)
    assert torch.equal(model(stages), model([torch.full_like(stages[0], 9.0), *stages[1:]]))


def test_one_width_for_each_stage():
    with pytest.raises(ValueError, match="of one length"):
        RADDiscriminator(stage_channels=(4, 6), widths=(8,))


def test_learns_to_find_what_stands_out():
    """Where the features are raised; the loss falls and new images are marked."""
    rng = torch.Generator().manual_seed(0)

    def batches():
        while True:
            stages = [torch.randn(4, 4, 16, 16, generator=rng), torch.randn(4, 6, 8, 8, generator=rng)]
            mask = torch.zeros(4, 16, 16)
            mask[:, 4:8, 8:12] = 1
            stages[0] = stages[0] + 3 * mask[:, None]
            yield stages, mask

    torch.manual_seed(0)
    model, losses = RADDiscriminator(stage_channels=(4, 6), widths=(8, 8)), []
    model.fit(batches(), 60, learning_rate=1e-2, progress=losses.append)
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    stages, mask = next(batches())
    logits = model(stages)
    assert logits[mask == 1].mean() > logits[mask == 0].mean() + 2
    assert not model.training


@pytest.mark.parametrize("num_steps", [1, 4, 20, 21])
def test_any_number_of_steps(num_steps):
    model, losses = RADDiscriminator(stage_channels=(4,), widths=(8,)), []
    batches = itertools.repeat(([torch.randn(2, 4, 8, 8)], torch.ones(2, 8, 8)))
    model.fit(batches, num_steps, progress=losses.append)
    assert len(losses) == num_steps and np.isfinite(losses).all()

"""Another camera changes the picture, never the part."""

import numpy as np
import pytest
import torch

from rad.data.camera import change_camera, through_another_camera


@pytest.fixture
def picture():
    """A smooth picture with some texture, float32 [64, 64, 3] in [0, 255]."""
    y, x = np.mgrid[:64, :64] / 64
    waves = np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(6 * x * y)], axis=2)
    return (120 + 60 * waves + np.random.default_rng(0).normal(0, 2, (64, 64, 3))).astype(np.float32)


def test_views_differ_from_the_picture_a_little_and_from_each_other(picture):
    views = [change_camera(picture, np.random.default_rng(seed)) for seed in range(20)]
    for view in views:
        assert view.dtype == np.float32 and view.shape == picture.shape and 0 <= view.min() and view.max() <= 255
        assert 0.1 < np.abs(view - picture).mean() < 20
    assert len({view.tobytes() for view in views}) == 20
    assert np.array_equal(views[3], change_camera(picture, np.random.default_rng(3)))


def test_exposure_is_at_most_a_tenth_off(picture):
    """Gain and gamma of 5 % each, on the mean of the whole picture."""
    means = [change_camera(picture, np.random.default_rng(seed)).mean() / picture.mean() for seed in range(50)]
    assert 0.9 < min(means) < 0.97 and 1.03 < max(means) < 1.1


def test_some_views_are_out_of_focus_and_others_noisy(picture):
    def roughness(image):
        return np.abs(np.diff(image, axis=0)).mean()

    rough = [roughness(change_camera(picture, np.random.default_rng(seed))) for seed in range(50)]
    assert min(rough) < 0.8 * roughness(picture) and max(rough) > 1.1 * roughness(picture)


def test_what_is_grey_stays_grey(picture):
    grey = np.repeat(picture[..., :1], 3, axis=2)
    for seed in range(20):
        view = change_camera(grey, np.random.default_rng(seed))
        assert (view == view[..., :1]).all()


def test_an_input_of_the_networks_is_changed_likewise(picture):
    x_0 = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1
    view = through_another_camera(x_0, np.random.default_rng(0))
    expected = torch.from_numpy(change_camera(picture, np.random.default_rng(0))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(view, expected, rtol=0, atol=0.02)  # compression may round another way
    assert view.shape == x_0.shape and view.abs().max() <= 1


def test_a_small_photo_is_changed_at_its_own_size(picture):
    """What is made at half the size is coarser; pictures of any shape keep theirs."""
    x_0 = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1

    def fine(seed, size):
        change = through_another_camera(x_0, np.random.default_rng(seed), size) - x_0
        return (change[:, 1:] - change[:, :-1]).abs().mean() / change.std()

    assert np.mean([fine(seed, (32, 32)) < fine(seed, (640, 480)) for seed in range(20)]) > 0.8
    same = [through_another_camera(x_0, np.random.default_rng(1), size) for size in (None, (64, 64), (640, 480))]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert through_another_camera(x_0, np.random.default_rng(1), (20, 50)).shape == x_0.shape
    assert change_camera(picture[:30], np.random.default_rng(0)).shape == (30, 64, 3)

"""Photos of the same part are told from photos of different ones."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, shift
from skimage import data

from rad import RADImageProcessor
from rad.data.duplicates import aligned_difference, check_different, fingerprint, same_parts, sketch

WHOLE = {name: np.asarray(getattr(data, name)(), np.float32) for name in ("brick", "gravel", "grass")}


def part(number: int, name: str = "gravel") -> np.ndarray:
    """A crop of a photograph, [256, 256]: no two overlap by more than a half."""
    top, left = 128 * (number % 3), 128 * (number // 3)
    return WHOLE[name][top : top + 256, left : left + 256]


def moved(pixels: np.ndarray) -> np.ndarray:
    return shift(pixels, (3.4, -2.7), order=3, mode="nearest")


def saved_again(pixels: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file), np.float32)


def of_a_burst(pixels: np.ndarray) -> np.ndarray:
    return gaussian_filter(1.04 * pixels, 0.5) + np.random.default_rng(0).normal(0, 2, pixels.shape)


def sketches_of(pictures: list[np.ndarray]) -> torch.Tensor:
    photos = [Image.fromarray(picture.clip(0, 255).astype(np.uint8)) for picture in pictures]
    return sketch(RADImageProcessor(256).preprocess(photos)[0])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("change", [np.copy, moved, saved_again, of_a_burst])
def test_a_part_is_known_again_and_others_are_not(name, change):
    pictures = [part(i, name) for i in range(9)] + [change(part(i, name)) for i in (0, 4, 8)]
    pairs = {tuple(sorted(pair)) for pair in same_parts(sketches_of(pictures))}
    assert pairs == {(0, 9), (4, 10), (8, 11)}


def test_photos_are_laid_over_each_other_to_a_fraction_of_a_pixel():
    smooth = gaussian_filter(np.random.default_rng(0).normal(0, 100, (160, 160)), 2.0)
    pair = np.stack([smooth, shift(smooth, (2.5, -1.25), order=5)])[:, 16:144, 16:144]
    sketches = torch.from_numpy(pair).float()
    window = torch.hann_window(128, periodic=False).sqrt()
    spectra = torch.fft.rfft2(sketches * window[:, None] * window)
    (found,) = aligned_difference(sketches, spectra, torch.tensor([0]), torch.tensor([1]))
    assert found < 0.1 * sketches.std() < (sketches[0] - sketches[1]).square().mean().sqrt()


def test_a_burst_is_one_part_link_by_link():
    """Each photo differs from the next by little, and the last from the first by more."""
    sketches = sketches_of(
        [part(i) for i in range(6)] + [shift(part(2), (0, 3 * k), mode="nearest") for k in range(4)]
    )
    parts = check_different(range(1, 11), sketches, ["nut"] * 10, 5)
    assert parts == [0, 1, 2, 3, 4, 5, 2, 2, 2, 2]


def test_categories_do_not_mix_and_copies_that_show_little_are_copies():
    flat = [np.full((256, 256), 99.0), np.full((256, 256), 99.0)]
    flat[0][:, 0] = flat[1][:, 0] = 100
    pictures = [*(part(i) for i in range(5)), *(part(i) for i in range(5)), *flat]
    prints = [fingerprint(np.repeat(picture[..., None], 3, axis=2)) for picture in pictures]
    names = ["nut"] * 5 + ["bolt"] * 5 + ["sheet"] * 2
    assert check_different(prints, sketches_of(pictures), names, 1) == [*range(10), 10, 10]


def test_one_part_in_all_photos_is_refused():
    pictures = [part(0) + np.random.default_rng(i).normal(0, 1.0, (256, 256)) for i in range(12)]
    with pytest.raises(
        ValueError, match="'nut' has 12 good images, 11 of which are copies of others or show the same"
    ):
        check_different(range(1, 13), sketches_of(pictures), ["nut"] * 12, 5)


def test_few_photos_are_no_parts_in_common():
    assert same_parts(torch.zeros(1, 128, 128)) == []


def test_a_fit_holds_photos_of_a_part_out_together(small_pipeline_without_normality, good_images):
    """Scores are those of a fit in which no photo of the part has a part: about as high as without the copies."""
    pipeline, rng = small_pipeline_without_normality, np.random.default_rng(0)
    again = [
        Image.fromarray((np.asarray(x) + rng.integers(0, 3, (64, 64, 1))).clip(0, 255).astype(np.uint8))
        for x in good_images
    ]
    options = {"gaussian_channels": 16, "num_views": 0, "weights": {"mahalanobis": 1}, "image_weights": {"global": 1}}
    alone = pipeline.with_normality(None).fit_normality(good_images, **options).normality
    with pytest.warns(UserWarning, match="12 of 24 good images are copies of others or show the same part"):
        both = pipeline.with_normality(None).fit_normality(good_images + again, **options).normality
    assert both.config.num_scores == 24 and both.num_different == 12
    assert both.default_rate == alone.default_rate == 0.1 and both.p_value_resolution == alone.p_value_resolution
    fresh = [pipeline.with_normality(model)(again).scores["global"].mean() for model in (alone, both)]
    assert fresh[1] < fresh[0] + 1e-6  # they serve the fit

"""Training a discriminator on a pipeline's good images, and what comes of it in the pipeline."""

import numpy as np
import pytest
import torch
from discriminator import fit_discriminator

from rad import RADPipeline


@pytest.fixture
def with_discriminator(small_pipeline_without_normality, good_images) -> RADPipeline:
    """After two steps."""
    pipe = small_pipeline_without_normality
    fit_discriminator(pipe, good_images, num_steps=2, batch_size=4)
    pipe.fit_normality(good_images, gaussian_channels=16, weights={"mahalanobis": 0.5, "discriminator": 0.5})
    return pipe


def test_its_map_and_score_come_with_the_others(with_discriminator, good_images, tmp_path):
    image = good_images[0]
    output = with_discriminator(image, score_type="discriminator")
    np.testing.assert_array_equal(output.anomaly_map, output.maps["discriminator"])
    assert "discriminator" in output.scores
    assert "discriminator" not in with_discriminator(image, mode="paper").maps

    with_discriminator.save_pretrained(tmp_path)
    loaded = RADPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    found, expected = loaded(image).maps["discriminator"], output.maps["discriminator"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_one_image_or_other_categories_are_refused(small_pipeline_without_normality, good_images):
    with pytest.raises(ValueError, match="at least two images"):
        fit_discriminator(small_pipeline_without_normality, good_images[:1])
    with pytest.raises(ValueError, match="1 categories were given for 2 images"):
        fit_discriminator(small_pipeline_without_normality, good_images[:2], categories=["a"])


def test_the_callers_generator_stays_as_it_was(small_pipeline_without_normality, good_images):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted = fit_discriminator(small_pipeline_without_normality, good_images, num_steps=1, batch_size=2, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert fitted is small_pipeline_without_normality


def test_what_is_trained_depends_on_the_seed_alone(small_pipeline_without_normality, good_images):
    def trained(seed: int) -> torch.Tensor:
        small_pipeline_without_normality.register_modules(discriminator=None)
        torch.rand(7)  # whatever else was drawn
        fit_discriminator(small_pipeline_without_normality, good_images, num_steps=2, batch_size=2, seed=seed)
        return small_pipeline_without_normality.discriminator.out.weight.detach().clone()

    first = trained(1)
    assert torch.equal(first, trained(1)) and not torch.equal(first, trained(2))

"""Restoration by denoising and by RAN's gradient: what changes, what stays, and what is said of the result."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import new_pipeline
from PIL import Image

from rad import RADPipeline, RADScheduler, RADUNet2DModel, pipeline_restoration

SPOT = (slice(20, 36), slice(24, 40))  # rows and columns


def with_spot(image: Image.Image) -> Image.Image:
    pixels = np.array(image)
    pixels[SPOT] = [250, 40, 40]
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def denoising(good_images) -> RADPipeline:
    """A fitted pipeline whose network predicts x_0. Shared: a test must not change it."""
    networks = new_pipeline((), good_images).components
    networks |= {"scheduler": RADScheduler(prediction_type="sample")}
    networks |= {"unet": RADUNet2DModel.from_config(networks["unet"].config, wiener=True).eval()}
    pipeline = RADPipeline(**networks, resolution=64).fit_normality(good_images, gaussian_channels=16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def knowing(denoising, good_images) -> RADPipeline:
    """A pipeline whose network predicts the first good image, whatever it sees; `knowing.seen` has its inputs."""
    pipeline = copy.deepcopy(denoising)
    x_0, _ = pipeline.image_processor.preprocess([good_images[0]])
    forward, pipeline.seen = pipeline.unet.forward, []

    def knows(x_t, t, labels=None):
        pipeline.seen.append((x_t.clone(), t))
        return replace(forward(x_t, t, labels), sample=x_0.expand_as(x_t).clone())

    pipeline.unet.forward = knows
    return pipeline


def test_a_network_that_knows_the_good_image_gives_it_back(knowing, good_images):
    restored = knowing.restore(with_spot(good_images[0]))
    difference = np.asarray(restored.images[0], int) - np.asarray(good_images[0], int)
    assert np.abs(difference).max() <= 1
    assert not restored.is_anomalous[0] and restored.p_value[0] > 0.01
    assert len(restored.intermediates[0]) == len(restored.distances[0]) == 21  # a round was enough
    assert restored.distances[0][-1] < restored.distances[0][0]


def test_what_is_sampled_is_noised_as_each_timestep_says(knowing, good_images):
    """Where x0_hat is right, x_t is distributed as q(x_t | x_0): of its mean and deviation, down to the last step."""
    knowing.seen.clear()
    knowing.restore(good_images[0], keep_normal=False)
    x_0 = knowing.image_processor.preprocess([good_images[0]])[0].double().numpy()
    sampled = [(x_t, int(t[0])) for x_t, t in knowing.seen if len(t) == 1]
    assert [t for _, t in sampled][:5] == [401] * 5 and sampled[-1][1] == 0 and len(sampled) == 4 + 18
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for x_t, t in sampled:
        noise = (x_t.double().numpy() - np.sqrt(abar[t]) * x_0) / np.sqrt(1 - abar[t])
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05, t


@pytest.fixture
def blind(knowing, good_images):
    """A network that finds nothing wrong with the image with a spot."""
    bad = with_spot(good_images[0])
    pixels = torch.from_numpy(np.array(bad)).permute(2, 0, 1)[None] / 127.5 - 1
    forward = knowing.unet.forward
    knowing.unet.forward = lambda *args: replace(forward(*args), sample=pixels.expand_as(args[0]).clone())
    knowing.seen.clear()
    return knowing


def test_a_restoration_that_fails_says_so(blind, good_images, monkeypatch):
    """In three rounds nothing gets better, and the image stays as it was."""
    monkeypatch.setitem(pipeline_restoration.ROUNDS, "denoising", [("denoising", 0.0)] * 3)
    bad = with_spot(good_images[0])
    restored = blind.restore(bad, false_alarm_rate=0.05)
    assert restored.is_anomalous[0] and restored.p_value[0] <= 0.05
    assert np.array_equal(np.asarray(restored.images[0]), np.asarray(bad)) and len(restored.distances[0]) == 1
    assert sum(len(t) == 1 for _, t in blind.seen) == 3 * 22  # each round's two estimates see two draws each


def test_the_gradient_finishes_what_the_network_does_not_remove(blind, good_images, monkeypatch):
    monkeypatch.setitem(pipeline_restoration.RESTORATION_STEPS, "gradient", 12)
    by_distance = {"weights": {"mahalanobis": 1.0}, "image_weights": {"mahalanobis": 1.0}}
    blind.fit_normality(good_images, gaussian_channels=16, **by_distance)  # what the gradient lowers decides
    restored = blind.restore(with_spot(good_images[0]), false_alarm_rate=0.05)
    (p_value,) = blind(with_spot(good_images[0])).p_value
    assert restored.p_value[0] > p_value and len(restored.distances[0]) in (13, 25)  # one round of it, or both
    assert restored.distances[0][-1] < restored.distances[0][0]


@pytest.mark.parametrize("num_steps", [1, 3, 4, 7])
def test_as_many_steps_as_asked_for(knowing, good_images, num_steps):
    restored = knowing.restore(with_spot(good_images[0]), num_steps=num_steps)
    assert len(restored.distances[0]) == num_steps + 1


def test_each_image_of_a_batch_is_sampled_as_alone(knowing, good_images):
    images = [with_spot(good_images[0]), good_images[3], with_spot(good_images[5]).resize((90, 70))]
    together = knowing.restore(images, batch_size=3, seed=4)
    for i, image in enumerate(images):
        alone = knowing.restore(image, seed=4)
        np.testing.assert_allclose(together.distances[i], alone.distances[0], rtol=1e-3, atol=1e-3)
        difference = np.asarray(together.images[i], int) - np.asarray(alone.images[0], int)
        assert together.images[i].size == image.size and np.abs(difference).max() <= 2


def test_the_method_follows_from_what_the_network_predicts(knowing, pipeline, good_images):
    image = with_spot(good_images[0])
    for one, method in ((knowing, "denoising"), (pipeline, "gradient")):
        own, named = one.restore(image, num_steps=4), one.restore(image, num_steps=4, method=method)
        assert np.array_equal(np.asarray(own.images[0]), np.asarray(named.images[0]))
    with pytest.raises(ValueError, match="method must be one of denoising, gradient, got 'inpainting'"):
        pipeline.restore(image, method="inpainting")
    with pytest.raises(ValueError, match="false_alarm_rate"):
        pipeline.restore(image, false_alarm_rate=0)


def test_what_comes_out_is_inspected_as_any_image(pipeline, good_images):
    restored = pipeline.restore([with_spot(good_images[0]), good_images[1]], num_steps=5, false_alarm_rate=0.2)
    again = pipeline([steps[-1] for steps in restored.intermediates], false_alarm_rate=0.2)
    # Tiny p-values magnify rounding: half a per cent of a score is 8 % of a p-value of 1e-8
    np.testing.assert_allclose(np.log(restored.p_value), np.log(again.p_value), rtol=0.01)
    assert np.array_equal(restored.is_anomalous, restored.p_value <= 0.2)


# -- RAN's gradient ---------------------------------------------------------------------------------------------------


def test_restoring_lowers_the_distance_and_keeps_the_rest(pipeline, good_images):
    pixels = np.array(good_images[0])
    pixels[20:36, 24:40] = [250, 40, 40]
    image = Image.fromarray(pixels)
    restored = pipeline.restore(image, num_steps=10)
    distances = restored.distances[0]
    assert restored.images[0].size == image.size
    assert len(restored.intermediates[0]) == len(distances) <= 11
    assert distances[-1] < distances[0]
    after = np.asarray(restored.images[0])
    assert np.array_equal(after[50:, :10], pixels[50:, :10])  # far from the defect nothing changes
    assert not np.array_equal(after[20:36, 24:40], pixels[20:36, 24:40])


def test_restoration_stops_at_once_on_a_typical_good_image(pipeline, good_images):
    distances = [pipeline.restore(image, num_steps=2).distances[0] for image in good_images[:6]]
    assert any(len(d) == 1 and d[0] <= 0 for d in distances)


def test_images_are_restored_together_as_each_alone(pipeline, good_images):
    """Each stops on its own: one that is typical at once, the others later."""
    typical = next(image for image in good_images if pipeline(image).scores["mahalanobis"][0] <= 0)
    pixels = np.array(good_images[0])
    pixels[20:36, 24:40] = [250, 40, 40]
    images = [Image.fromarray(pixels), typical, Image.fromarray(pixels[::-1]).resize((80, 50))]
    together = pipeline.restore(images, num_steps=6, batch_size=2)
    assert [len(distances) for distances in together.distances] == [7, 1, 7]
    for i, image in enumerate(images):
        alone = pipeline.restore(image, num_steps=6)
        np.testing.assert_allclose(together.distances[i], alone.distances[0], rtol=1e-3, atol=1e-3)
        difference = np.asarray(together.images[i], int) - np.asarray(alone.images[0], int)
        assert together.images[i].size == image.size and np.abs(difference).max() <= 2
        assert len(together.intermediates[i]) == len(together.distances[i])


def test_more_may_change_where_more_pixels_count_as_odd(pipeline, good_images):
    image = good_images[0].copy()
    image.paste((250, 40, 40), (24, 20, 40, 36))
    few, many = (pipeline.restore(image, num_steps=1, pixel_rate=rate) for rate in (1e-4, 0.9))
    changed = [(np.asarray(output.images[0]) != np.asarray(image)).mean() for output in (few, many)]
    assert changed[0] < changed[1]
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        pipeline.restore(image, pixel_rate=0.0)


def test_restoration_score_is_the_mahalanobis_image_score(pipeline, good_images):
    restored = pipeline.restore(good_images[2], num_steps=1)
    expected = pipeline(good_images[2]).scores["mahalanobis"][0]
    np.testing.assert_allclose(restored.distances[0][0], expected, rtol=1e-4, atol=1e-4)


def test_keep_normal_can_be_turned_off(pipeline, good_images):
    pixels = np.array(good_images[0])
    pixels[20:36, 24:40] = [250, 40, 40]
    restored = pipeline.restore(Image.fromarray(pixels), num_steps=3, keep_normal=False)
    assert not np.array_equal(np.asarray(restored.images[0])[50:, :10], pixels[50:, :10])

"""What users do with RADPipeline: score, decide, restore, refit, save and load."""

import json
import multiprocessing
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scipy.ndimage import label

from rad import RADPipeline, RADScheduler, RADUNet2DModel
from rad.data.camera import through_another_camera
from rad.image_processor import resize_map, to_pil
from rad.models.evidence import SCORE_TYPES
from rad.pipeline_fitting import mirror, mirror_sources, spread, texture_of, with_defects
from rad.pipeline_output import find_regions
from rad.scheduler_rad import antithetic_noise

TIMESTEPS = [20, 201, 401]


def maps_of(output):
    return [output.maps[name][0] for name in ("fused", "pixel", "feature", "residual", "mahalanobis", "rgb")]


def test_scores_do_not_depend_on_the_batch(pipeline, good_images):
    alone = pipeline(good_images[1], batch_size=1)
    batch = pipeline(good_images[:5], batch_size=5)
    moved = pipeline([good_images[3], good_images[2], good_images[1]], batch_size=2)
    for position, output in ((1, batch), (2, moved)):
        np.testing.assert_allclose(alone.score[0], output.score[position], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(alone.anomaly_map[0], output.anomaly_map[position], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(alone.maps["pixel"][0], output.maps["pixel"][position], rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(pipeline, good_images):
    first, second = pipeline(good_images[0]), pipeline(good_images[0], seed=0)
    refitted = pipeline.with_normality(pipeline.normality).fit_normality(good_images, seed=1, gaussian_channels=16)
    other = refitted(good_images[0], seed=1)
    assert np.array_equal(first.anomaly_map, second.anomaly_map)
    assert not np.array_equal(first.maps["pixel"], other.maps["pixel"])
    assert np.array_equal(first.maps["mahalanobis"], other.maps["mahalanobis"])  # no noise enters it


def test_maps_have_the_size_of_each_input(pipeline, good_images):
    wide = good_images[0].resize((90, 50))
    output = pipeline([good_images[0], wide])
    assert [m.shape for m in output.anomaly_map] == [good_images[0].size[::-1], (50, 90)]
    assert [m.shape for m in output.mask] == [m.shape for m in output.anomaly_map]
    assert output.anomaly_map[0].dtype == np.float32 and output.mask[0].dtype == bool


def test_maps_of_another_size_are_the_same_maps(pipeline, good_images):
    """At the normality model's own size nothing is lost: resized later they are what the pipeline gives at once."""
    wide = good_images[0].resize((90, 50))
    size = pipeline.normality.config.map_size
    own, output = pipeline(wide, map_size=(size, size)), pipeline(wide)
    assert own.anomaly_map.shape == own.mask.shape == (1, size, size)
    for name in ("fused", "pixel", "rgb"):
        resized = resize_map(torch.from_numpy(own.maps[name]), [(50, 90)])[0]
        assert np.array_equal(resized, output.maps[name][0])
    assert own.score == output.score


def test_a_defect_is_found_where_it_is(pipeline, good_images):
    pixels = np.array(good_images[0])
    pixels[20:36, 24:40] = [250, 40, 40]
    output = pipeline(Image.fromarray(pixels))
    assert output.is_anomalous[0] and output.p_value[0] <= 0.01 and output.score[0] > output.threshold
    peak = np.unravel_index(output.anomaly_map[0].argmax(), output.anomaly_map[0].shape)
    assert 12 <= peak[0] < 44 and 16 <= peak[1] < 48
    left, top, right, bottom = output.regions[0][0].box
    assert left < 40 and right > 24 and top < 36 and bottom > 20
    assert output.mask[0].sum() == sum(region.area for region in output.regions[0])


def test_good_images_have_no_mask_and_mostly_pass(pipeline, good_images):
    output = pipeline(good_images, false_alarm_rate=0.05)
    assert output.is_anomalous.mean() <= 0.3
    assert not output.mask[~output.is_anomalous].any()
    assert all(not regions for regions, bad in zip(output.regions, output.is_anomalous, strict=True) if not bad)


def test_decision_follows_the_false_alarm_rate(pipeline, good_images):
    strict, loose = (pipeline(good_images, false_alarm_rate=rate) for rate in (0.001, 0.5))
    assert strict.threshold > loose.threshold and strict.pixel_threshold > loose.pixel_threshold
    for output, rate in ((strict, 0.001), (loose, 0.5)):
        assert np.array_equal(output.is_anomalous, output.p_value <= rate)
        assert np.array_equal(output.is_anomalous, output.score > output.threshold)


def test_few_good_images_decide_at_the_rate_that_they_can_tell(pipeline, good_images):
    """Twelve of them: 10 %."""
    output, asked = pipeline(good_images), pipeline(good_images, false_alarm_rate=0.1)
    assert pipeline.normality.default_rate == 0.1
    assert output.threshold == asked.threshold and np.array_equal(output.is_anomalous, asked.is_anomalous)
    restored = [pipeline.restore(good_images[0], num_steps=2, **rate) for rate in ({}, {"false_alarm_rate": 0.1})]
    assert restored[0].is_anomalous[0] == restored[1].is_anomalous[0]


@pytest.mark.parametrize("score_type", ["fused", "mahalanobis"])
@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_an_output_is_decided_again_as_the_pipeline_would_have(pipeline, good_images, score_type, output_type):
    images = [good_images[0], good_images[1].resize((90, 50))]
    output = pipeline(images, score_type=score_type, output_type=output_type)
    for rate in (0.001, 0.3, 0.9):
        decision, again = output.decide(rate), pipeline(images, score_type=score_type, false_alarm_rate=rate)
        for name in ("p_value", "is_anomalous", "threshold", "pixel_threshold"):
            assert np.array_equal(getattr(decision, name), again[name])
        assert decision.interval == again.false_alarm_interval and decision.regions == again.regions
        assert all(np.array_equal(*pair) for pair in zip(decision.mask, again.mask, strict=True))
    with pytest.raises(ValueError, match="false_alarm_rate must lie between 0 and 1, got 1"):
        output.decide(1)
    with pytest.raises(ValueError, match="Scores of paper mode know no false-alarm rate"):
        pipeline(good_images[0], mode="paper").decide(0.1)


def test_an_output_can_be_decided_again_elsewhere(pipeline, good_images):
    """It takes along what it needs, and not the network."""
    output = pipeline(good_images[:2])
    content = pickle.dumps(output)
    assert len(content) < 1e6
    again = pickle.loads(content).decide(0.3)
    assert np.array_equal(again.p_value, output.p_value) and again.regions == output.decide(0.3).regions


def test_maps_and_scores_have_the_names_of_the_registry(pipeline, good_images):
    for mode in ("calibrated", "paper"):
        output = pipeline(good_images[0], mode=mode)
        known = [name for name, score in SCORE_TYPES.items() if mode == "calibrated" or score.in_paper]
        assert [name for name in SCORE_TYPES if name in output.maps] == [
            name for name in known if SCORE_TYPES[name].has_map and name != "discriminator"
        ]
        assert set(output.scores) == set(known) - {"discriminator"}
        assert output.anomaly_map is output.maps["fused"]


def test_a_call_takes_memory_for_one_map_of_each_large_photo_and_not_for_all(pipeline, good_images):
    """The others are resized when they are asked for."""
    photos = [image.resize((1000, 800)) for image in good_images[:4]]
    pipeline(photos[0])  # what is kept from call to call is not this one's
    tracemalloc.start()
    output = pipeline(photos)
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert highest < 3 * output.anomaly_map.nbytes
    assert len(output.maps) == 6 and output.maps["rgb"].shape == (4, 800, 1000)
    np.testing.assert_allclose(output.maps["rgb"][2], pipeline(photos[2]).maps["rgb"][0], atol=1e-4)


def test_maps_are_still_read_by_their_former_names(pipeline, good_images):
    output = pipeline(good_images[0])
    for name in ("pixel", "feature", "residual", "mahalanobis", "rgb", "discriminator"):
        with pytest.warns(FutureWarning, match=f"use maps\\['{name}'\\]"):
            found = getattr(output, f"{name}_map")
        assert found is None if name not in output.maps else np.array_equal(found, output.maps[name])


@pytest.mark.parametrize("score_type", ["pixel", "feature", "residual", "mahalanobis", "rgb"])
def test_each_score_alone_can_decide(pipeline, good_images, score_type):
    fused, alone = pipeline(good_images[0]), pipeline(good_images[0], score_type=score_type)
    assert np.array_equal(alone.anomaly_map, fused.maps[score_type])
    assert alone.score[0] == fused.scores[score_type][0]


def test_paper_mode_is_ran_to_the_letter(pipeline, good_images):
    """A = mean over t of alpha z(s_t) + (1 - alpha) s^f_t with per-image z; score: mean of the 64 largest."""
    output = pipeline(good_images[0], mode="paper", num_noise_samples=1)
    processor, scheduler = pipeline.image_processor, pipeline.scheduler
    x_0, _ = processor.preprocess(good_images[0])
    std = pipeline.feature_extractor.channel_std.view(1, -1, 1, 1)
    expected = torch.zeros_like(x_0[:, 0])
    with torch.no_grad():
        features = pipeline.feature_extractor(x_0)
        for t in TIMESTEPS:
            noise = torch.randn(1, *x_0.shape[1:], generator=torch.Generator().manual_seed(t))
            timestep = torch.tensor([t])
            x_t = scheduler.add_noise(x_0, noise, timestep)
            predicted = pipeline.unet(x_t, timestep)
            kl, _ = scheduler.kl_score(x_0, x_t, predicted.sample, predicted.variance, timestep)
            kl = kl.mean(1)
            error = ((predicted.features - features) * std).square().mean(1)
            error = torch.nn.functional.interpolate(error[:, None], x_0.shape[-2:], mode="bilinear")[:, 0]
            expected += (0.5 * (kl - kl.mean()) / kl.std() + 0.5 * error) / 3
    np.testing.assert_allclose(output.anomaly_map[0], expected[0].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(output.score[0], expected.flatten().topk(64).values.mean(), rtol=1e-4)
    assert output.p_value is None and output.mask is None and "mahalanobis" not in output.maps


def test_the_residual_is_what_the_prediction_of_features_leaves_on_average(pipeline, good_images):
    """Over timesteps and draws; the map of it is the calibrated distance of their Gaussian."""
    processor, scheduler, normality = pipeline.image_processor, pipeline.scheduler, pipeline.normality
    x_0, sizes = processor.preprocess(good_images[:2])
    with torch.no_grad():
        features = pipeline.feature_extractor(x_0)
        evidence = pipeline.measure(x_0, timesteps=TIMESTEPS, draws=2)
        kl, error, rgb, residuals = evidence.kl, evidence.error, evidence.rgb, evidence.residuals
        expected = torch.zeros_like(features)
        for t in TIMESTEPS:
            noise = torch.randn(1, *x_0.shape[1:], generator=torch.Generator().manual_seed(t))
            for mirrored in (noise, -noise):
                x_t = scheduler.add_noise(x_0, mirrored.repeat(2, 1, 1, 1), torch.tensor([t, t]))
                expected += (features - pipeline.unet(x_t, torch.tensor([t, t])).features) / 6
    assert kl.shape == rgb.shape == (2, 3, *x_0.shape[-2:]) and error.shape == (2, 3, *features.shape[-2:])
    torch.testing.assert_close(residuals, expected, rtol=1e-4, atol=1e-4)
    distance = normality.distance(residuals, [0, 0], "residual")[:, None]
    assert distance.shape[-1] == features.shape[-1] // 2
    z = torch.nn.functional.interpolate(distance, (16, 16), mode="bilinear")[:, 0] - normality.location[0, -2]
    z = z / normality.scale[0, -2] / normality.map_scale[0, 3]
    normality.register_to_config(num_noise_samples=2)  # as if it had been fitted so
    try:
        output = pipeline(good_images[:2])
    finally:
        normality.register_to_config(num_noise_samples=1)
    np.testing.assert_allclose(output.maps["residual"], np.stack(resize_map(z, sizes)), rtol=1e-3, atol=1e-3)


def test_the_denoising_step_made_visible_is_that_of_the_score(two_category_pipeline, two_category_images):
    """Each timestep is what `measure` gives, and its pictures are what the scheduler and U-Net make."""
    pipeline, image = two_category_pipeline, two_category_images[0][-1]
    steps = pipeline.denoise(image)
    x_0, _ = pipeline.image_processor.preprocess(image)
    labels, t = torch.tensor([1]), torch.tensor([201])
    with torch.no_grad():
        evidence = pipeline.measure(x_0, ["gravel"], TIMESTEPS)
        kl, error, rgb = evidence.kl, evidence.error, evidence.rgb
        noise = torch.randn(1, *x_0.shape[1:], generator=torch.Generator().manual_seed(201))
        x_t = pipeline.scheduler.add_noise(x_0, noise, t)
        output = pipeline.unet(x_t, t, labels)
        _, x0_hat = pipeline.scheduler.kl_score(x_0, x_t, output.sample, output.variance, t)
    assert steps.timesteps == TIMESTEPS
    for ours, expected in ((steps.pixel_map, kl), (steps.feature_map, error), (steps.rgb_map, rgb)):
        np.testing.assert_allclose(ours, expected[0].numpy(), rtol=1e-3, atol=1e-4)
    for ours, expected in ((steps.x_t, x_t), (steps.x0_hat, x0_hat)):
        expected = np.asarray(to_pil(expected)[0], int)
        assert np.abs(np.asarray(ours[1], int) - expected).max() <= 1
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(steps.noise_levels, np.sqrt(1 - np.cumprod(1 - betas)[TIMESTEPS]), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": []}, "Give one image, not a list of 0"),
        ({"timesteps": []}, "The list of timesteps is empty"),
        ({"timesteps": [21]}, "respaced timesteps"),
        ({"class_labels": "nut"}, "There is no category 'nut'"),
    ],
)
def test_denoise_refuses_in_one_sentence(pipeline, good_images, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.denoise(**({"image": good_images[0]} | arguments))


def test_antithetic_draws_are_mirrored(pipeline):
    noise = antithetic_noise(3, 20, 3, torch.zeros(1, 3, 8, 8))
    assert torch.equal(noise[1], -noise[0]) and not torch.equal(noise[2], noise[0])


def test_categories_are_guessed_and_can_be_named(two_category_pipeline, two_category_images):
    images, names = two_category_images
    assert two_category_pipeline(images).category == names
    output = two_category_pipeline(images[0], class_labels=names[-1])
    assert output.category == [names[-1]]
    with pytest.raises(ValueError, match="no category 'bottle'"):
        two_category_pipeline(images[0], class_labels="bottle")


def test_without_statistics_the_networks_own_categories_count(two_category_pipeline, two_category_images):
    """They are checked, and used by the U-Net."""
    images, _ = two_category_images
    bare = two_category_pipeline.with_normality(None)
    with pytest.raises(ValueError, match="There is no category 'bottle'; this pipeline knows brick, gravel"):
        bare(images[0], mode="paper", class_labels="bottle")
    with pytest.raises(ValueError, match="2 class_labels were given for 1 images"):
        bare(images[0], mode="paper", class_labels=["brick", "brick"])
    named, numbered, other, unknown = (
        bare(images[0], mode="paper", class_labels=labels) for labels in ("gravel", 1, "brick", None)
    )
    assert named.category == ["gravel"] and unknown.category is None
    expected = two_category_pipeline(images[0], mode="paper", class_labels="gravel")
    for output in (named, numbered):
        assert np.array_equal(output.maps["pixel"], expected.maps["pixel"])
    for output in (other, unknown):
        assert not np.array_equal(output.maps["pixel"], expected.maps["pixel"])
    assert bare.categories == two_category_pipeline.categories == ["brick", "gravel"]


def test_a_twin_can_be_fitted_while_the_pipeline_stays(pipeline, good_images):
    normality, before = pipeline.normality, pipeline(good_images[0])
    twin = pipeline.with_normality(normality)
    assert twin.fit_normality(good_images[:6], gaussian_channels=8, seed=3, num_noise_samples=2) is twin
    assert pipeline.normality is normality and twin.normality is not normality and twin.unet is pipeline.unet
    assert np.array_equal(pipeline(good_images[0]).anomaly_map, before.anomaly_map)
    assert twin.normality.config.seed == 3 and twin.normality.config.num_noise_samples == 2
    assert np.array_equal(twin(good_images[0]).score, twin(good_images[0], seed=3, num_noise_samples=2).score)
    again = twin.with_normality(twin.normality).fit_normality(good_images[:6]).normality
    assert again.config.seed == 3 and again.config.num_noise_samples == 2  # as the present ones, unless told otherwise
    with pytest.raises(ValueError, match="The list of timesteps is empty"):
        twin.fit_normality(good_images[:6], timesteps=[])


@pytest.mark.parametrize("component", ["unet", "normality"])
def test_what_is_not_finite_is_neither_saved_nor_loaded(pipeline, tmp_path, component):
    pipeline.save_pretrained(tmp_path / "good")
    twin = RADPipeline.from_pretrained(tmp_path / "good")
    name, values = list(getattr(twin, component).state_dict().items())[0]
    values.view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match=f"is not saved: {name} of {component} is not finite"):
        twin.save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    getattr(twin, component).save_pretrained(tmp_path / "good" / component)
    with pytest.raises(OSError, match=f"good is refused: {name} of {component} is not finite"):
        RADPipeline.from_pretrained(tmp_path / "good")


def test_short_chains_have_default_timesteps(small_pipeline_without_normality, good_images):
    """RAN's 5, 50 and 100 of 250 stand where they would; also in restoration, whose step is 8 of 250."""
    networks = small_pipeline_without_normality.components
    scheduler = RADScheduler(num_train_timesteps=40, beta_end=0.5, num_respaced_timesteps=10)
    pipeline = RADPipeline(**networks | {"scheduler": scheduler}, resolution=64).fit_normality(good_images[:6])
    assert list(pipeline.normality.config.timesteps) == scheduler.default_timesteps == [0, 9, 17]
    assert np.isfinite(pipeline(good_images[7]).score).all()
    assert pipeline.restore(good_images[7], num_steps=5, keep_normal=False).images


def test_offloading_is_refused_in_one_sentence(pipeline):
    for enable in (pipeline.enable_model_cpu_offload, pipeline.enable_sequential_cpu_offload):
        with pytest.raises(NotImplementedError, match="does not offload to the CPU: .* pipe.to"):
            enable()


def test_what_is_saved_tells_no_local_paths(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "of-somebody" / "model")
    loaded = RADPipeline.from_pretrained(tmp_path / "of-somebody" / "model")
    loaded.save_pretrained(tmp_path / "published")
    written = [path.read_text() for path in (tmp_path / "published").rglob("*.json")]
    assert len(written) == 5
    assert not any("of-somebody" in text or "_name_or_path" in text for text in written)


def test_a_pipeline_folder_comes_before_an_embedded_model_of_its_name(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mtd").mkdir()  # of data, say
    assert RADPipeline.load("mtd").normality.config.categories == ["magnetic_tile"]
    pipeline.save_pretrained(tmp_path / "mtd")
    assert RADPipeline.load("mtd").normality.config.categories == ["object"]


def test_save_and_load_are_bit_exact_and_safetensors_only(pipeline, good_images, tmp_path):
    before = pipeline(good_images[0])
    pipeline.save_pretrained(tmp_path)
    files = [path.suffix for path in tmp_path.rglob("*") if path.is_file()]
    assert set(files) == {".json", ".safetensors", ".py"}
    loaded = RADPipeline.from_pretrained(tmp_path)
    after = loaded(good_images[0])
    for first, second in zip(maps_of(before), maps_of(after), strict=True):
        assert np.array_equal(first, second)
    assert before.p_value == after.p_value and before.threshold == after.threshold


def test_half_precision_files_load_as_float32_and_give_the_same_numbers_again(pipeline, good_images, tmp_path):
    pipeline.save_pretrained(tmp_path / "full")
    half = RADPipeline.from_pretrained(tmp_path / "full")
    for component in (half.unet, half.feature_extractor, half.normality):
        component.half()
    half.save_pretrained(tmp_path / "half")
    loaded = RADPipeline.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.float32}
    loaded.save_pretrained(tmp_path / "again")
    again = RADPipeline.from_pretrained(tmp_path / "again")
    assert np.array_equal(loaded(good_images[0]).anomaly_map, again(good_images[0]).anomaly_map)


@pytest.mark.parametrize("component", ["unet", "feature_extractor", "normality"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "no config"])
def test_a_missing_or_damaged_file_is_named(pipeline, tmp_path, component, damage):
    pipeline.save_pretrained(tmp_path)
    weights = next((tmp_path / component).glob("*.safetensors"))
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "garbage":
        weights.write_bytes(b"not a safetensors file")
    else:
        (tmp_path / component / "config.json").unlink()
    with pytest.raises(OSError, match=component) as error:
        RADPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value).strip()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(OSError, match="model_index.json"):
        RADPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(OSError, match="not valid JSON"):
        RADPipeline.from_pretrained(tmp_path)


def test_unknown_embedded_model():
    with pytest.raises(ValueError, match="synthetic, mtd"):
        RADPipeline.from_embedded("bottle")


def test_a_fit_chooses_its_weights_unless_they_are_given(pipeline, good_images):
    given = {"weights": {"mahalanobis": 1.0}, "image_weights": {"global": 1.0}}
    kept = pipeline.with_normality(pipeline.normality).fit_normality(good_images[:8], gaussian_channels=8, **given)
    chosen = kept.with_normality(kept.normality).fit_normality(good_images[:8], gaussian_channels=8)
    for name, weights in given.items():
        assert dict(kept.normality.config[name]) == weights
        assert dict(chosen.normality.config[name]) != weights  # those of another product do not stay
    for config in (kept.normality.config, chosen.normality.config):
        assert {kind: counts["of"] for kind, counts in config.found.items()} == {"drawn": 8, "pasted": 8}


def test_defects_for_the_choice_leave_the_rest_of_the_picture_as_it_is():
    """An image of more than 8 bits keeps its own values where nothing was drawn."""
    x_0, texture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    twins, masks = with_defects(x_0, texture, 0)
    assert twins.shape == (2, 3, 64, 64) and masks.shape == (2, 64, 64) and masks.flatten(1).any(1).all()
    assert torch.equal(twins[0].masked_fill(masks[0] > 0, 0), x_0.masked_fill(masks[0] > 0, 0))
    assert ((twins - x_0).abs().amax(1) > 0).flatten(1).any(1).all()


def test_defects_are_put_on_scored_images_of_each_category_evenly():
    assert spread(["a"] * 10, 4, 48) == [6, 7, 8, 9]
    many = spread(["a"] * 1000, 500, 48)
    assert len(many) == len(set(many)) == 48 and many[0] == 500 and many[-1] == 999
    few_of_one = spread(["a"] * 1000 + ["b"] * 5, 1005, 48)
    assert len(few_of_one) == 48 and sum(i >= 1000 for i in few_of_one) == 5
    assert len(spread([str(i // 2) for i in range(200)], 200, 48)) == 48


def test_texture_comes_from_the_same_category_and_fold():
    names = ["a", "b"] * 120
    for image in range(20, 240):
        other = texture_of(image, names, 220, range(len(names)))
        assert other != image and other >= 20 and names[other] == names[image]
        places = [[i for i in range(20, 240) if names[i] == names[image]].index(i) for i in (image, other)]
        assert places[0] % 5 == places[1] % 5
    assert texture_of(0, ["a"] * 12, 12, range(12)) == 1  # few are held out one by one: there is none of its fold
    assert texture_of(11, ["a"] * 12, 12, range(12)) == 0
    assert texture_of(0, ["a"] * 12, 12, [0, 0, *range(10)]) == 3  # the first two and the third show the same part


def test_some_images_of_each_category_are_mirrored_in_three_ways():
    names = ["a"] * 100 + ["b"] * 5
    sources = mirror_sources(names)
    assert len(sources) == 25 and {100, 101, 102, 103, 104} < sources and sources == mirror_sources(names)
    views = mirror(torch.arange(12.0).view(1, 3, 4))
    assert [view[0, 0, 0].item() for view in views] == [3, 8, 11] and views.shape == (3, 1, 3, 4)


def test_mirrored_copies_and_views_enter_the_fit(small_pipeline_without_normality, good_images):
    """The mean of features is that of six images, of their six views through another camera, and, as 20 images, of
    their mirrored copies, these through another camera too."""
    pipeline = small_pipeline_without_normality
    pipeline.fit_normality(good_images[:6])
    x_0, _ = pipeline.image_processor.preprocess(good_images[:6])
    views = [through_another_camera(x, np.random.default_rng([1, i])) for i, x in enumerate(x_0)]
    rngs = [np.random.default_rng([2, i]) for i in range(6)]
    copies = [through_another_camera(one, rng) for x, rng in zip(x_0, rngs, strict=True) for one in mirror(x)]
    with torch.no_grad():
        parts = [pipeline.feature_extractor(x) for x in (x_0, torch.stack(views), torch.stack(copies))]
        own, views, copies = (pipeline.normality.project(x).mean(0) for x in parts)
    expected = (6 * own + 6 * views + 20 * copies) / 32
    torch.testing.assert_close(pipeline.normality.feature_mean[0], expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(pipeline.normality.feature_mean[0], own, rtol=1e-2, atol=1e-2)


def test_a_fit_without_views_knows_the_images_and_mirrored_ones_alone(small_pipeline_without_normality, good_images):
    pipeline = small_pipeline_without_normality
    pipeline.fit_normality(good_images[:6], num_views=0)
    x_0, _ = pipeline.image_processor.preprocess(good_images[:6])
    with torch.no_grad():
        parts = [pipeline.feature_extractor(x) for x in (x_0, torch.cat([mirror(x) for x in x_0]))]
        own, copies = (pipeline.normality.project(x).mean(0) for x in parts)
    expected = (6 * own + 20 * copies) / 26
    torch.testing.assert_close(pipeline.normality.feature_mean[0], expected, rtol=1e-2, atol=1e-2)


def test_views_are_made_at_the_photos_own_size(small_pipeline_without_normality, good_images):
    """Also of several batches, and where photos come resized and their sizes are told."""
    pipeline, small = small_pipeline_without_normality, [image.resize((20, 24)) for image in good_images]
    enlarged = [pipeline.image_processor.resize(image)[0] for image in small]
    means = [
        pipeline.fit_normality(images, batch_size=5, gaussian_channels=8, **sizes).normality.feature_mean.clone()
        for images, sizes in ((small, {}), (enlarged, {"sizes": [(24, 20)] * 12}), (enlarged, {}))
    ]
    assert torch.equal(means[0], means[1]) and not torch.allclose(means[0], means[2], atol=1e-2)
    with pytest.raises(ValueError, match="3 sizes were given for 12 images"):
        pipeline.fit_normality(small, sizes=[(24, 20)] * 3)


def test_fit_normality_refits_on_other_products(small_pipeline_without_normality, good_images):
    pipeline = small_pipeline_without_normality
    with pytest.raises(ValueError, match="fit_normality"):
        pipeline(good_images[0])
    pipeline.fit_normality(good_images[:8])
    assert pipeline(good_images[9]).category == ["object"]
    pipeline.fit_normality(good_images[:8], categories=["tile"] * 8)
    assert pipeline(good_images[9]).category == ["tile"]
    with pytest.raises(ValueError, match="has 4 good images; it needs at least 5"):
        pipeline.fit_normality(good_images[:4])
    with pytest.raises(ValueError, match="categories were given"):
        pipeline.fit_normality(good_images[:4], categories=["tile"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode must be"),
        ({"score_type": "l2"}, "score_type must be"),
        ({"mode": "paper", "score_type": "mahalanobis"}, "in paper mode"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate"),
        ({"false_alarm_rate": 1.5}, "false_alarm_rate"),
        ({"timesteps": [20]}, "Calibrated scores are fitted to"),
        ({"mode": "paper", "timesteps": [21]}, "respaced timesteps"),
        ({"num_noise_samples": 0}, "num_noise_samples"),
        ({"num_noise_samples": 2}, "Calibrated scores are fitted to the num_noise_samples 1, got 2"),
        ({"seed": 1}, "Calibrated scores are fitted to the seed 0, got 1"),
        ({"output_type": "jpg"}, "output_type"),
        ({"batch_size": 0}, "batch_size"),
        ({"map_size": (0, 4)}, "map_size must be"),
        ({"class_labels": ["object", "object"]}, "2 class_labels were given for 1 images"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(pipeline, good_images, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(good_images[0], **arguments)


@pytest.mark.parametrize(("image", "message"), [([], "empty"), (np.full((64, 64, 3), np.nan), "NaN"), (None, "image")])
def test_bad_images_are_refused(pipeline, image, message):
    with pytest.raises(ValueError, match=message):
        pipeline(image)


def test_tensors_on_request(pipeline, good_images):
    output = pipeline(good_images[0], output_type="pt")
    assert isinstance(output.anomaly_map, torch.Tensor) and isinstance(output.score, torch.Tensor)


def test_find_regions_agrees_with_the_mask():
    rng = np.random.default_rng(0)
    mask, values = rng.random((40, 50)) > 0.8, rng.random((40, 50))
    regions = find_regions(mask, values)
    assert len(regions) == label(mask, np.ones((3, 3)))[1]
    assert [r.peak for r in regions] == sorted((r.peak for r in regions), reverse=True)
    assert sum(r.area for r in regions) == mask.sum()
    left, top, right, bottom = regions[0].box
    assert values[top:bottom, left:right].max() >= regions[0].peak
    assert find_regions(np.zeros((4, 4), bool), np.zeros((4, 4))) == []


def test_model_index_names_our_classes(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_rad", "RADPipeline"]
    assert index["unet"] == ["component_rad", "RADUNet2DModel"]
    assert index["resolution"] == 64


# Compiled networks, and children


def test_a_compiled_network_is_saved_as_what_it_was(pipeline, good_images, tmp_path):
    compiled = pipeline.with_normality(pipeline.normality)
    compiled.unet = torch.compile(compiled.unet)
    compiled.normality.half()
    compiled.save_pretrained(tmp_path)
    assert compiled.normality.location.dtype == torch.half, "saving changes what is saved"
    compiled.normality.float()
    with safe_open(tmp_path / "normality" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("location").dtype == torch.half
    loaded = RADPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is RADUNet2DModel and not isinstance(compiled.unet, RADUNet2DModel)
    assert loaded(good_images[0]).score[0] == pytest.approx(pipeline(good_images[0]).score[0], rel=1e-4)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_after_the_model_was_used_scores_too(pipeline, good_images):
    """ZeroGPU forks so; the parent's threads, for which torch would wait, are not there."""
    expected, context = pipeline(good_images[0]).score[0], multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(pipeline(good_images[0]).score[0]), daemon=True)
    child.start()
    try:
        assert answers.get(timeout=60) == pytest.approx(expected, abs=1e-4)
    finally:
        child.kill()

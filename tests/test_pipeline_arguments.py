"""What may be given to the pipeline: Python's, NumPy's and torch's images, numbers and lists, as with diffusers."""

import copy
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from rad import RADPipeline
from rad.image_processor import overlay
from rad.pipeline_arguments import as_integer, as_list, as_seed, check_labels
from rad.pipeline_loading import EMBEDDED_DIR
from rad.scheduler_rad import antithetic_noise


@pytest.fixture(scope="module")
def files(good_images, tmp_path_factory) -> list[Path]:
    """Three good images as files."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, good_images, strict=False):
        image.save(path)
    return paths


def pixels_of(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def column(paths):
    """What a user of `datasets` has."""
    return Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", ImageFeature())["image"]


def written(value) -> str:
    """A parameter in its test's name: as in any other process, so without addresses."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


class Pipe(io.BytesIO):
    """A file that can be read once."""

    def seekable(self):
        return False

    def seek(self, *args):
        raise io.UnsupportedOperation("seek")


def pictures(paths) -> list[Image.Image]:
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.copy())
    return images


SEVERAL = {
    "list": pictures,
    "tuple": lambda paths: tuple(pictures(paths)),
    "iterator": lambda paths: iter(pictures(paths)),
    "map": lambda paths: map(np.asarray, pictures(paths)),
    "column": column,
    "array [B, H, W, 3]": lambda paths: pixels_of(pictures(paths)),
    "float array": lambda paths: pixels_of(pictures(paths)) / 255,
    "array of paths": lambda paths: np.array(paths, dtype=object),
    "array of names": lambda paths: np.array([str(path) for path in paths]),
    "tensor [B, 3, H, W]": lambda paths: torch.from_numpy(pixels_of(pictures(paths))).permute(0, 3, 1, 2),
    "float tensor": lambda paths: torch.from_numpy(pixels_of(pictures(paths))).permute(0, 3, 1, 2).float() / 255,
    "paths": list,
    "names": lambda paths: [str(path) for path in paths],
    "files": lambda paths: [io.BytesIO(path.read_bytes()) for path in paths],
    "pipes": lambda paths: [Pipe(path.read_bytes()) for path in paths],
    "bytes": lambda paths: [path.read_bytes() for path in paths],
    "bytearrays": lambda paths: [bytearray(path.read_bytes()) for path in paths],
    "folder entries": lambda paths: sorted(os.scandir(paths[0].parent), key=lambda entry: entry.name),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_images_come_as_users_have_them(pipeline, files, kind):
    x_0, _ = pipeline.image_processor.preprocess(as_list(SEVERAL[kind](files)))
    expected, _ = pipeline.image_processor.preprocess(files)
    torch.testing.assert_close(x_0, expected, rtol=0, atol=0.02 if "float" in kind else 0)


@pytest.mark.parametrize("kind", SEVERAL)
def test_one_image_stays_one(files, kind):
    """An array [H, W, 3], bytes and an open file are sequences or iterators too."""
    assert len(as_list(next(iter(SEVERAL[kind](files[:1]))))) == 1


def test_a_batch_is_scored_as_its_images_are(pipeline, good_images):
    expected = pipeline(good_images[:2])
    for batch in (pixels_of(good_images[:2]), iter(good_images[:2])):
        output = pipeline(batch, batch_size=np.int64(2))
        assert np.array_equal(output.score, expected.score)
    grey = pixels_of(good_images[:2])[..., :1]
    for batch in (grey, torch.from_numpy(grey).permute(0, 3, 1, 2)):
        assert len(pipeline(batch).score) == 2


def test_files_are_read_again_where_pictures_are_needed(pipeline, files):
    """Restoration and pictures of heat need the original after it has been scored."""
    content = files[0].read_bytes()
    for file in (io.BytesIO(content), Pipe(content)):
        assert pipeline.restore(file, num_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 3, 64, 64), np.uint8), r"shape \[3, 64, 64\], but must be \[H, W\]"),
        (torch.zeros(2, 64, 64, 3), r"shape \[64, 64, 3\], but must be \[1, H, W\] or \[3, H, W\]"),
        (np.zeros((2, 2, 64, 64, 3), np.uint8), "must be"),
        (np.zeros((0, 64, 64, 3), np.uint8), "list of images is empty"),
        (iter([]), "list of images is empty"),
        ({"image": 1}, "dict is not an image"),
        ({1, 2}, "set is not an image"),
        (3, "int is not an image"),
        ([None], "NoneType is not an image"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(pipeline, image, message):
    with pytest.raises(ValueError, match=message):
        pipeline(image)


INTEGERS = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])]


@pytest.mark.parametrize("value", INTEGERS, ids=written)
def test_integers_of_all_kinds(value):
    assert as_integer(value, "n", 1) == 3 and type(as_integer(value, "n", 1)) is int


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 3.0, "3", None, [3], torch.tensor(3.0), 0], ids=written
)
def test_all_else_is_no_integer(value):
    message = "n must be at least 1, got 0" if type(value) is int else "n must be a whole number, got"
    with pytest.raises(ValueError, match=message):
        as_integer(value, "n", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"timesteps": np.array([20, 201, 401])},
        {"timesteps": torch.tensor([20, 201, 401])},
        {"timesteps": (np.int32(20), torch.tensor(201), 401)},
        {"class_labels": np.int64(0)},
        {"class_labels": torch.tensor([0])},
        {"class_labels": np.array(["object"])},
        {"class_labels": ("object",)},
        {"num_noise_samples": np.uint8(1)},
        {"batch_size": torch.tensor(2)},
        {"false_alarm_rate": np.float64(0.1)},  # the default of a dozen good images
        {"false_alarm_rate": np.array(0.1)},
        {"seed": np.int64(0)},
        {"seed": np.uint32(0)},
        {"generator": torch.Generator().manual_seed(0)},
        {"map_size": np.array([64, 64])},
        {"map_size": torch.tensor([64, 64])},
        {"map_size": [np.int64(64), 64]},
    ],
    ids=written,
)
def test_numbers_of_numpy_and_torch_are_python_s(pipeline, good_images, arguments):
    output, expected = pipeline(good_images[0], **arguments), pipeline(good_images[0])
    assert np.array_equal(output.anomaly_map, expected.anomaly_map)
    assert output.threshold == expected.threshold and output.category == expected.category


def test_rates_of_single_precision(pipeline, good_images):
    output = pipeline(good_images[0], false_alarm_rate=np.float32(0.01))
    assert output.threshold == pytest.approx(output.decide(torch.tensor(0.01)).threshold)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": 2**64}, f"seed must be from {-(2**63)} to {2**64 - 1}, got {2**64}"),
        ({"seed": np.random.default_rng(0)}, "seed must be a whole number"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "must be one torch.Generator, .* not list"),
        ({"generator": 0}, "must be one torch.Generator, .* not int"),
        ({"generator": torch.Generator().manual_seed(0), "seed": 0}, "seed or a generator, not both"),
        ({"generator": torch.Generator().manual_seed(7)}, "fitted to the seed 0, got 7"),
        ({"timesteps": [20.5]}, "Each of the timesteps must be a whole number"),
        ({"timesteps": "20"}, "Each of the timesteps must be a whole number"),
        ({"timesteps": torch.tensor([20.0, 201.0, 401.0])}, "Each of the timesteps must be a whole number"),
        ({"class_labels": True}, "There is no category True"),
        ({"class_labels": 0.0}, "There is no category 0.0"),
        ({"class_labels": torch.tensor([1])}, "There is no category 1"),
        ({"class_labels": -1}, "There is no category -1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"map_size": 64}, "map_size must be a height and a width"),
        ({"map_size": (10**7, 10**7)}, "Each side of map_size must be from 1 to 10000"),
        ({"map_size": (64.5, 64)}, "Each side of map_size must be a whole number"),
        ({"false_alarm_rate": "0.01"}, "false_alarm_rate must lie between 0 and 1"),
        ({"false_alarm_rate": float("nan")}, "false_alarm_rate must lie between 0 and 1"),
        ({"false_alarm_rate": np.array([0.1, 0.2])}, "false_alarm_rate must lie between 0 and 1"),
        ({"false_alarm_rate": True}, "false_alarm_rate must lie between 0 and 1"),
        ({"output_type": "latent"}, "output_type must be 'np', 'pt' or 'pil'"),
        ({"output_type": "pil", "mode": "paper"}, "paper mode knows none"),
    ],
    ids=written,
)
def test_arguments_are_refused_in_one_sentence(pipeline, good_images, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(good_images[0], **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), np.int64(2**62), np.uint64(2**64 - 1)])
def test_every_seed_of_torch_is_a_seed(pipeline, good_images, seed):
    """Torch's generator itself takes seeds that are alike in their lower 32 bits for the same."""
    first, second = (pipeline(good_images[0], mode="paper", seed=seed).score for _ in range(2))
    alike = pipeline(good_images[0], mode="paper", seed=int(seed) % 2**32).score
    assert np.array_equal(first, second) and np.array_equal(first, alike)


def test_the_noise_of_a_seed_is_what_it_was():
    like = torch.zeros(1, 3, 4, 4)
    for seed, timestep in ((0, 20), (7, 401), (-3, 20), (12345678, 0)):
        expected = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed * 1_000_003 + timestep))
        assert torch.equal(antithetic_noise(seed, timestep, 1, like), expected)


def test_a_generator_stands_for_its_seed_and_is_left_alone(pipeline, good_images):
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    first, second = (pipeline(good_images[0], mode="paper", generator=generator) for _ in range(2))
    expected = pipeline(good_images[0], mode="paper", seed=5)
    assert np.array_equal(first.score, expected.score) and np.array_equal(second.score, expected.score)
    assert torch.equal(generator.get_state(), state)
    assert as_seed(None, generator) == 5 and as_seed(None) is None
    steps = pipeline.denoise(good_images[0], generator=generator)
    assert np.array_equal(steps.pixel_map, pipeline.denoise(good_images[0], seed=5).pixel_map)


def test_a_fit_takes_what_scoring_takes(pipeline, good_images, tmp_path):
    """And what it stores is saved as plain numbers."""
    twin = pipeline.with_normality(pipeline.normality).fit_normality(
        pixels_of(good_images[:6]),
        categories="tile",
        timesteps=torch.tensor([20, 201]),
        generator=torch.Generator().manual_seed(2**63 - 1),
        batch_size=np.int64(3),
        num_noise_samples=np.int64(2),
        gaussian_channels=np.int64(8),
        top_k=np.int32(16),
        context=np.float32(0.5),
    )
    twin.save_pretrained(tmp_path)
    loaded = RADPipeline.from_pretrained(tmp_path)
    config = loaded.normality.config
    assert config.seed == 2**63 - 1 and config.num_noise_samples == 2 and list(config.timesteps) == [20, 201]
    assert loaded.categories == ["tile"]
    assert np.array_equal(loaded(good_images[7]).score, twin(good_images[7], seed=2**63 - 1).score)


@pytest.mark.parametrize(
    ("categories", "message"),
    [(["a"] * 3, "3 categories were given for 4 images"), ([0, 0, 1, 1], "Each of categories must be a name, got 0")],
)
def test_categories_of_a_fit_are_checked(pipeline, good_images, categories, message):
    with pytest.raises(ValueError, match=message):
        pipeline.fit_normality(good_images[:4], categories=categories)


def test_an_argument_that_nobody_has_is_named(pipeline, good_images):
    with pytest.raises(TypeError, match=r"fit_normality\(\) got an unexpected keyword argument 'top_n'; .* top_k"):
        pipeline.fit_normality(good_images[:6], top_n=3)


def test_labels_of_all_kinds():
    known = ["nut", "screw"]
    for labels in (["screw", 0], np.array([1, 0]), torch.tensor([1, 0]), (np.int64(1), "nut"), [torch.tensor(1), 0]):
        assert check_labels(labels, 2, known) == ["screw", "nut"]
    for label in (1, np.int8(1), torch.tensor(1), np.array(1), "screw", np.str_("screw")):
        assert check_labels(label, 2, known) == ["screw", "screw"]


# -- what comes back --------------------------------------------------------------------------------------------------


def test_a_tuple_on_request(pipeline, good_images):
    output, values = pipeline(good_images[0]), pipeline(good_images[0], return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(output.keys())
    assert np.array_equal(values[0], output.anomaly_map) and np.array_equal(values[1], output.score)
    found = pipeline.restore(good_images[0], num_steps=1, return_dict=False)
    assert len(found) == 5 and all(len(values) == 1 for values in found)
    assert pipeline.denoise(good_images[0], return_dict=False)[0] == [20, 201, 401]


def test_restoring_takes_a_seed_or_a_generator(pipeline, good_images):
    seeded = pipeline.restore(good_images[0], num_steps=1, seed=7)
    drawn = pipeline.restore(good_images[0], num_steps=1, generator=torch.Generator().manual_seed(7))
    assert np.array_equal(pixels_of(seeded.images), pixels_of(drawn.images))
    with pytest.raises(ValueError, match="a seed or a generator, not both"):
        pipeline.restore(good_images[0], num_steps=1, seed=7, generator=torch.Generator())


@pytest.mark.parametrize("map_size", [None, (32, 48)])
def test_pictures_on_request(pipeline, good_images, map_size):
    """Heat over each image, and its mask; all else is numbers, and is decided again."""
    image = good_images[0].resize((90, 50))
    image.paste((250, 40, 40), (24, 20, 40, 36))
    output = pipeline([image, good_images[1]], output_type="pil", map_size=map_size)
    numbers = pipeline([image, good_images[1]], map_size=map_size)
    height, width = numbers.anomaly_map[0].shape
    expected = overlay(image.resize((width, height)), numbers.anomaly_map[0], *pipeline.normality.heat_range())
    assert np.array_equal(np.asarray(output.anomaly_map[0]), np.asarray(expected))
    assert output.mask[0].mode == "L" and np.array_equal(np.asarray(output.mask[0]) > 0, numbers.mask[0])
    assert all(np.array_equal(*pair) for pair in zip(output.maps["fused"], numbers.maps["fused"], strict=True))
    assert output.decide(0.2).regions == numbers.decide(0.2).regions


def test_restored_pictures_as_numbers(pipeline, good_images):
    images = pipeline.restore(good_images[:2], num_steps=1).images
    arrays = pipeline.restore(good_images[:2], num_steps=1, output_type="np").images
    tensors = pipeline.restore(good_images[:2], num_steps=1, output_type="pt").images
    assert arrays.dtype == np.float32 and np.array_equal((arrays * 255).round(), pixels_of(images))
    assert torch.equal(tensors, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    sizes = pipeline.restore([good_images[0], good_images[1].resize((90, 50))], num_steps=1, output_type="np").images
    assert [image.shape for image in sizes] == [(64, 64, 3), (50, 90, 3)]
    steps = pipeline.denoise([good_images[0]], output_type="pt")
    assert steps.x_t.shape == steps.x0_hat.shape == (3, 3, 64, 64)


# -- where it is called -----------------------------------------------------------------------------------------------


def test_everything_works_in_inference_mode(pipeline, good_images, tmp_path):
    """Also what is loaded, fitted and moved there is used elsewhere afterwards."""
    expected = pipeline.restore(good_images[0], num_steps=2, keep_normal=False)
    with torch.inference_mode():
        restored = pipeline.restore(good_images[0], num_steps=2, keep_normal=False)
        pipeline.save_pretrained(tmp_path)
        loaded = RADPipeline.from_pretrained(tmp_path).to("cpu", torch.float32)
        loaded.set_progress_bar_config(disable=True)
        x_0, _ = loaded.image_processor.preprocess(good_images[:1])
        score = loaded(x_0 / 2 + 0.5).score
        assert loaded.measure(x_0).kl.isfinite().all()
        loaded.fit_normality(good_images[:6], gaussian_channels=8)
        loaded.restore(good_images[0], num_steps=1)
    np.testing.assert_allclose(score, pipeline(good_images[0]).score, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(restored.distances[0], expected.distances[0], rtol=1e-4)
    assert loaded.restore(good_images[0], num_steps=1).images
    loaded.fit_normality(good_images[:6])


def test_a_tilde_is_the_home_folder(pipeline, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipeline.save_pretrained("~/models/brick")
    assert (tmp_path / "models" / "brick" / "model_index.json").is_file()
    for load in (RADPipeline.load, RADPipeline.from_pretrained):
        assert load("~/models/brick").categories == load(Path("~/models/brick")).categories == ["object"]


# -- precision --------------------------------------------------------------------------------------------------------


def dtypes(pipeline) -> dict[str, torch.dtype]:
    return {name: part.dtype for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize(
    "argument", [{"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}, {"dtype": {"unet": torch.bfloat16}}]
)
def test_only_the_network_is_loaded_in_low_precision(argument):
    """And without a warning: warnings are errors in tests."""
    loaded = RADPipeline.from_embedded("mtd", **argument)
    low = dtypes(loaded)
    assert low.pop("unet") == loaded.dtype == torch.bfloat16 and set(low.values()) == {torch.float32}
    assert torch.equal(loaded.normality.score_location, RADPipeline.from_embedded("mtd").normality.score_location)


def test_types_are_refused_in_one_sentence(pipeline):
    twin = copy.deepcopy(pipeline)
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.bfloat16, torch.float16, got"):
        twin.to(torch.float16, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.bfloat16, torch.float16, got"):
        RADPipeline.from_embedded("mtd", torch_dtype="half")
    with pytest.raises(ValueError, match="got torch.int8"):
        twin.to(dtype=torch.int8)
    with pytest.raises(ValueError, match="Give dtype or torch_dtype, not both"):
        RADPipeline.from_embedded("mtd", dtype=torch.float16, torch_dtype=torch.float16)


@pytest.mark.parametrize("arguments", [(torch.bfloat16,), ("cpu", torch.bfloat16)])
def test_the_network_moves_to_low_precision_and_back(pipeline, arguments):
    twin = copy.deepcopy(pipeline)
    low = dtypes(twin.to(*arguments))
    assert low.pop("unet") == torch.bfloat16 and set(low.values()) == {torch.float32}
    assert twin.to("cpu") is twin and twin.unet.dtype == torch.bfloat16
    assert twin.to(dtype=torch.float32).unet.dtype == torch.float32


def test_the_networks_classes_keep_statistics_precise_whoever_loads_them(pipeline):
    """diffusers alone loads each part in the type that it is told."""
    parts = copy.deepcopy(pipeline).components
    for name in ("unet", "feature_extractor", "normality"):
        parts[name].half()
    low = dtypes(RADPipeline(**parts, resolution=64))
    assert low.pop("unet") == torch.float16 and set(low.values()) == {torch.float32}


def test_low_precision_moves_scores_by_no_more_than_is_said():
    """Here on a picture that comes with the package; where bfloat16 is emulated even that takes long."""
    precise, low = (RADPipeline.from_embedded("synthetic", dtype=dtype) for dtype in (None, torch.bfloat16))
    example = EMBEDDED_DIR / "examples" / "hex_nut_scratch.png"
    expected, output = precise(example), low(example)
    assert np.abs(output.score - expected.score).max() < 0.05
    assert np.array_equal(output.is_anomalous, expected.is_anomalous)
    for scores, truth in ((output.scores, expected.scores), (output.maps, expected.maps)):
        for key, values in scores.items():
            assert np.abs(values - truth[key]).max() < 0.25, key
    assert not np.array_equal(output.maps["pixel"], expected.maps["pixel"])


def test_low_precision_restores_denoises_and_fits(pipeline, good_images):
    twin = copy.deepcopy(pipeline).to(torch.bfloat16)
    assert twin.restore(good_images[0], num_steps=5, keep_normal=False).images
    assert np.isfinite(twin.denoise(good_images[0]).pixel_map).all()
    assert np.isfinite(twin.fit_normality(good_images[:6])(good_images[7]).score).all()


def test_float16_is_refused_on_the_cpu(pipeline, good_images):
    twin = copy.deepcopy(pipeline).to(torch.float16)
    for look in (twin, twin.restore, twin.denoise, twin.fit_normality):
        with pytest.raises(ValueError, match="float16 takes many times as long .* use pipe.to"):
            look(good_images[:6] if look == twin.fit_normality else good_images[0])


# -- few and odd good images ------------------------------------------------------------------------------------------


def plain(count):
    return [Image.new("RGB", (64, 64), (20 * i, 9, 9)) for i in range(count)]


@pytest.mark.parametrize(
    ("pick", "categories", "message"),
    [
        (
            lambda good: good[:1] * 12,
            None,
            "12 good images, 11 of which are copies of others or show the same part; it needs at least 5",
        ),
        (lambda good: good[:4] * 3, None, "12 good images, 8 of which are copies"),
        (lambda good: [Image.new("RGB", (64, 64))] * 10, None, "10 of 10 good images are of one colour"),
        (lambda good: plain(10), None, "10 of 10 good images are of one colour"),
        (lambda good: good[:9] + plain(1), None, r"1 of 10 good images are of one colour"),
        (lambda good: good[:2], None, "'object' has 2 good images; it needs at least 5"),
        (lambda good: good[:4], None, "'object' has 4 good images; it needs at least 5"),
        (lambda good: good[:7], ["nut"] * 6 + ["tile"], "'tile' has 1 good images; it needs at least 5"),
        (lambda good: good[:6] + good[:1] * 5, ["nut"] * 6 + ["tile"] * 5, "'tile' has 5 good images, 4 of which"),
    ],
)
def test_few_and_odd_good_images_are_refused_in_one_sentence(pipeline, good_images, pick, categories, message):
    twin = pipeline.with_normality(pipeline.normality)
    with pytest.raises(ValueError, match=message) as error:
        twin.fit_normality(pick(good_images), categories=categories)
    assert "\n" not in str(error.value) and twin.normality is pipeline.normality


def test_five_good_images_give_a_model_that_works(pipeline, good_images):
    twin = pipeline.with_normality(None).fit_normality(good_images[:5], gaussian_channels=16)
    bad = good_images[6].copy()
    bad.paste((250, 40, 40), (20, 20, 44, 44))
    output = twin([good_images[6], bad])
    assert np.isfinite(output.score).all() and output.score[1] > output.score[0] + 1 and output.p_value[1] < 0.2


def test_copies_among_enough_good_images_are_told(pipeline, good_images):
    twin = pipeline.with_normality(None)
    with pytest.warns(UserWarning, match="2 of 8 good images are copies of others") as told:
        twin.fit_normality(good_images[:6] + good_images[:2])
    assert told[0].filename == __file__
    assert np.isfinite(twin(good_images[7]).score).all()


def test_images_that_are_nearly_alike_give_a_model(pipeline, good_images):
    rng = np.random.default_rng(0)
    alike = [Image.fromarray(rng.integers(0, 2, (64, 64, 3), dtype=np.uint8)) for _ in range(6)]
    twin = pipeline.with_normality(None).fit_normality(alike)
    scores = twin([good_images[0], alike[0]]).score
    assert np.isfinite(scores).all() and scores[0] > scores[1] + 10


def test_autocast_around_it_changes_nothing(pipeline, good_images):
    expected = pipeline(good_images[:2])
    with torch.autocast("cpu", torch.bfloat16):
        found = pipeline(good_images[:2])
        restored = pipeline.restore(good_images[0], num_steps=1)
    assert np.array_equal(found.score, expected.score)
    assert np.array_equal(restored.distances[0], pipeline.restore(good_images[0], num_steps=1).distances[0])

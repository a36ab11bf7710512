"""Photos of 12 bits in 16-bit files, from the fit to the verdict: they are worth no less than those of 8 bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import train
from accelerate.state import AcceleratorState, GradientState
from conftest import texture
from PIL import Image

from rad import RADPipeline
from rad.data import AnomalyDataset, Sample
from rad.data.drawn import DrawnDefects
from rad.page import inspection, product, visitors
from rad.visualization import results_figure


def in_12_bits(image: Image.Image, seed: int = 0) -> np.ndarray:
    """What a camera of 12 bits would have seen where one of 8 bits saw this, grey."""
    levels = np.asarray(image.convert("L"), np.uint16)
    return levels * 16 + np.random.default_rng(seed).integers(0, 16, levels.shape, dtype=np.uint16)


def with_a_patch(image: Image.Image, level: int = 235) -> Image.Image:
    image = image.copy()
    image.paste((level,) * 3, (20, 24, 34, 40))
    return image


@pytest.fixture(scope="module")
def photos(good_images, tmp_path_factory) -> dict[int, list[Path]]:
    """The good images in files of 8 and of 12 bits."""
    folder = tmp_path_factory.mktemp("photos")
    files = {8: [], 12: []}
    for i, image in enumerate(good_images):
        grey = image.convert("L")
        for bits, picture in ((8, grey), (12, Image.fromarray(in_12_bits(image, i)))):
            (folder / f"{bits}").mkdir(exist_ok=True)
            files[bits].append(folder / f"{bits}" / f"{i:02}.png")
            picture.save(files[bits][-1])
    return files


@pytest.fixture(scope="module")
def fitted(pipeline, photos) -> dict[int, RADPipeline]:
    """The same networks, fitted to the photos of 8 and of 12 bits."""
    return {
        bits: pipeline.with_normality(None).fit_normality(files, gaussian_channels=16)
        for bits, files in photos.items()
    }


def test_scores_of_12_and_8_bits_agree(fitted):
    fresh = [texture("brick", seed) for seed in range(100, 108)]
    fresh += [with_a_patch(texture("brick", seed), 120 + 12 * (seed % 10)) for seed in range(108, 116)]
    by_bits = [
        fitted[8]([image.convert("L") for image in fresh]),
        fitted[12]([in_12_bits(image, seed) for seed, image in enumerate(fresh)]),
    ]
    for name in ("fused", "mahalanobis", "feature"):
        assert np.corrcoef([output.scores[name] for output in by_bits])[0, 1] > 0.98
    decisions = [output.decide(0.03).is_anomalous.tolist() for output in by_bits]  # at 1 % one lies on the threshold
    assert decisions[1] == decisions[0]


def test_the_range_is_kept_with_the_model(fitted, photos, tmp_path):
    darkest = min(np.asarray(Image.open(path)).max() for path in photos[12])
    assert tuple(fitted[12].normality.config.pixel_range) == (0, 4095)
    assert fitted[12].normality.config.darkest_peak == darkest
    assert tuple(fitted[8].normality.config.pixel_range) == (0, 255)
    fitted[12].save_pretrained(tmp_path / "model")
    loaded = RADPipeline.from_pretrained(tmp_path / "model")
    assert loaded.image_processor.pixel_range == (0, 4095) and loaded.image_processor.darkest_peak == darkest
    assert np.array_equal(loaded(photos[12][0]).anomaly_map, fitted[12](photos[12][0]).anomaly_map)


def test_a_picture_of_another_range_is_not_judged(fitted, photos):
    with pytest.raises(ValueError, match=r"00.png has 16-bit pixels with values up to .* the range 0 to 255"):
        fitted[8](photos[12][0])
    with pytest.raises(ValueError, match=r"00.png has 8-bit pixels with values up to .* the range 0 to 4,095"):
        fitted[12]([photos[12][1], photos[8][0]])
    with pytest.raises(ValueError, match="16-bit pixels"):
        RADPipeline.from_embedded("mtd")(photos[12][0])
    with pytest.raises(ValueError, match="11 images have 8-bit pixels and 1 have 16-bit ones"):
        fitted[8].with_normality(None).fit_normality([*photos[8][1:], photos[12][0]])


def test_a_range_may_be_given(pipeline, photos):
    given = pipeline.with_normality(None).fit_normality(photos[12], gaussian_channels=16, pixel_range=(64, 16383))
    assert tuple(given.normality.config.pixel_range) == (64, 16383)
    assert given.normality.config.darkest_peak == min(np.asarray(Image.open(path)).max() for path in photos[12])
    with pytest.raises(ValueError, match="the darkest with values up to"):
        given(np.asarray(Image.open(photos[12][0])) // 8)
    with pytest.raises(ValueError, match="pixel_range must be black and white"):
        pipeline.with_normality(None).fit_normality(photos[12], pixel_range=(9, 9))


def test_restored_and_pictured(fitted, photos):
    bad = in_12_bits(with_a_patch(texture("brick", 3)))
    fixed = fitted[12].restore(bad, num_steps=5).images[0]
    shown = np.asarray(fixed.convert("L"), np.float64)
    assert np.abs(shown - bad / 16)[:16].mean() < 3  # what was normal, at the brightness that it has
    fitted[12](np.asarray(fixed, np.float32) / 255)
    picture = np.asarray(results_figure(fitted[12], [bad], restore=False).convert("L"))
    assert np.percentile(picture[20:-20, :300], 90) > 100


def test_drawn_defects_leave_the_other_pixels_all_their_bits(photos):
    for bits, white in ((8, 255), (12, 4095)):
        drawn = DrawnDefects(AnomalyDataset([Sample(path, "brick") for path in photos[bits]]), 4)
        for i in range(1, 8, 2):
            good, bad = np.asarray(Image.open(drawn[i - 1].image)), drawn[i].image
            assert bad.dtype == good.dtype and bad.max() <= white
            same = (bad == good[..., None]).all(2)
            assert not same[np.asarray(drawn[i].mask) > 0].all() and same.mean() > 0.3


def test_the_page_fits_and_inspects_them(photos, page_model, monkeypatch, tmp_path):
    token = product.fit([str(path) for path in photos[12]], "tile", page_model, "visitor")
    assert tuple(visitors.product(token).normality.config.pixel_range) == (0, 4095)
    found = inspection.score(str(photos[12][0]), token, "")
    assert np.asarray(found.view).max() > 100  # as bright as it is
    with pytest.raises(ValueError, match="8-bit pixels"):
        inspection.score(str(photos[8][0]), token, "")
    with pytest.raises(ValueError, match="the range 0 to 255"):
        inspection.score(str(photos[12][0]), page_model, "")


@pytest.mark.parametrize("cached", [True, False])
def test_training_on_them(photos, small_pipeline_without_normality, tmp_path, caplog, cached):
    small_pipeline_without_normality.unet.save_pretrained(tmp_path / "unet")
    flags = "--resolution 64 --crop_size 32 --train_batch_size 4 --max_train_steps 1 --mixed_precision no".split()
    flags += ["--discriminator_steps", "1", "--num_validation_images", "1", "--init_from", str(tmp_path / "unet")]
    flags += ["--train_data_dir", str(photos[12][0].parent), "--output_dir", str(tmp_path / "model")]
    flags += [] if cached else ["--no-cache_images"]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with caplog.at_level("INFO", logger="rad.train"):
        train.main(train.parse_args(flags))
    assert "Pixels of 16-bit images are read as 0 to 4,095" in caplog.text
    settings = json.loads((tmp_path / "model" / "normality" / "config.json").read_text())
    assert settings["pixel_range"] == [0, 4095]
    assert RADPipeline.from_pretrained(tmp_path / "model")(photos[12][0]).score.shape == (1,)

"""Pictures to the networks' input, in the range of their pixel values, and maps and pictures back."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from rad.image_processor import RADImageProcessor, find_pixel_range, heat, overlay, resize_map, to_pil

processor = RADImageProcessor(resolution=32)


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def test_refuses_an_empty_list():
    with pytest.raises(ValueError, match="The list of images is empty"):
        processor.preprocess([])


# Into the model's input and back


def test_preprocess_gives_minus_one_to_one_and_the_original_sizes():
    black, white = np.zeros((20, 30), np.uint8), np.full((50, 10, 3), 255, np.uint8)
    x, sizes = processor.preprocess([black, white])
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.float32
    assert (x[0] == -1).all() and (x[1] == 1).all()
    assert sizes == [(20, 30), (50, 10)]


def test_preprocess_keeps_pixels_and_channels_at_its_own_resolution():
    pixels = noise(32, 32, 3)
    x, _ = processor.preprocess(pixels)
    assert np.array_equal(x[0].permute(1, 2, 0).numpy(), pixels.astype(np.float32) / 127.5 - 1)


def test_preprocess_resizes_with_antialiasing():
    checkers = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    assert processor.preprocess(checkers)[0].abs().max() < 0.02  # without antialiasing: -1 and 1


def test_a_tensor_does_not_depend_on_its_neighbours():
    images = [noise(40, 50, 3), noise(33, 20), noise(64, 64, 3)]
    alone = torch.cat([processor.preprocess(image)[0] for image in images])
    assert torch.equal(processor.preprocess(images)[0], alone)
    assert torch.equal(processor.preprocess(images[::-1])[0].flip(0), alone)


def test_resize_map_is_bilinear_between_pixel_centres():
    (resized,) = resize_map(torch.tensor([[[0.0, 1.0]]]), [(3, 4)])
    assert resized.dtype == np.float32
    assert np.allclose(resized, [[0, 0.25, 0.75, 1]] * 3)


def test_resize_map_gives_each_its_size_and_does_not_depend_on_the_batch():
    maps, sizes = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)), [(20, 30), (64, 10), (32, 32)]
    resized = resize_map(maps, sizes)
    for m, size, r in zip(maps, sizes, resized, strict=True):
        assert r.shape == size
        assert np.array_equal(r, resize_map(m[None], [size])[0])
    assert np.array_equal(resized[2], maps[2].numpy())


def test_to_pil_undoes_preprocess():
    pixels = noise(32, 32, 3)
    (image,) = to_pil(processor.preprocess(pixels)[0])
    assert np.array_equal(np.asarray(image), pixels)


def test_to_pil_clamps_and_resizes():
    images = to_pil(torch.stack([torch.full((3, 8, 8), -2.0), torch.full((3, 8, 8), 2.0)]), [(5, 9), (20, 3)])
    assert [image.size for image in images] == [(9, 5), (3, 20)]
    assert np.asarray(images[0]).max() == 0 and np.asarray(images[1]).min() == 255


def test_the_way_back_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="with B sizes"):
        resize_map(torch.zeros(2, 4, 4), [(4, 4)])
    with pytest.raises(ValueError, match="with B sizes"):
        to_pil(torch.zeros(1, 3, 4, 4), [(4, 4), (4, 4)])
    with pytest.raises(ValueError, match=r"must be \[B, 3, S, S\]"):
        to_pil(torch.zeros(3, 4, 4))


# Ranges of pixel values


@pytest.mark.parametrize("white", [1023, 4095, 16383, 65535])
def test_pictures_of_more_bits_keep_them(white):
    pixels = (np.arange(32 * 32).reshape(32, 32) * (white // 1023)).astype(np.uint16)
    x, _ = RADImageProcessor(32, (0, white)).preprocess(pixels)
    assert np.abs(x[0, 0].double().numpy() - (pixels / white * 2 - 1)).max() < 1e-6
    assert len(np.unique(x[0, 1])) == 1024


def test_floats_keep_their_precision():
    pixels = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    x, _ = processor.preprocess(pixels)
    assert np.abs(x[0, 2].numpy() - (2 * pixels - 1)).max() < 1e-6


@pytest.mark.parametrize("white", [255, 4095])
def test_resizing_in_float_equals_that_of_8_bits_to_its_rounding(white):
    pixels = 60 + noise(70, 45, 3) // 2  # no overshoot, which is cut off between the two axes
    expected, _ = processor.preprocess(pixels)
    x, sizes = RADImageProcessor(32, (0, white)).preprocess((pixels / 255 * white).round().astype(np.uint16))
    assert sizes == [(70, 45)]
    assert (x - expected).abs().max() <= 1.6 / 127.5


def test_processing_again_changes_nothing():
    for image, white in ((noise(50, 40), 255), (noise(50, 40).astype(np.uint16) * 16, 4095)):
        own = RADImageProcessor(32, (0, white))
        resized, size = own.resize(image)
        assert size == (50, 40) and resized.shape == (32, 32, 3)
        assert np.array_equal(own.resize(resized)[0], resized)
        assert torch.equal(own.preprocess(resized)[0], own.preprocess(image)[0])


def test_black_and_white_may_lie_anywhere():
    own = RADImageProcessor(2, (64, 1023))
    x, _ = own.preprocess(np.array([[0, 64], [543, 1023]], np.uint16))
    assert torch.allclose(x[0, 0], torch.tensor([[-1, -1], [2 * 479 / 959 - 1, 1]]), atol=1e-6)


PEAKS = {
    "8 bits": ([None, None], (0, 255), 0),
    "10 bits": ([900, 1023, 300], (0, 1023), 300),
    "12 bits": ([1024, 700], (0, 4095), 700),
    "14 bits": ([16383], (0, 16383), 16383),
    "16 bits": ([16384, 12_000], (0, 65535), 12_000),
    "8 and 16 bits": ([None, 60_000], (0, 65535), 60_000),
    "8 bits in 16": ([None, 255, 0], (0, 255), 0),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_range_is_found(name):
    peaks, expected, darkest = PEAKS[name]
    assert find_pixel_range(peaks) == (expected, darkest)


def test_pictures_of_two_kinds_have_no_range():
    with pytest.raises(ValueError, match="1 images have 8-bit pixels and 2 have 16-bit ones with values up to 4,000"):
        find_pixel_range([None, 4000, 200])


@pytest.mark.parametrize(
    ("peaks", "message"),
    [
        (
            [1000, 4000, 990, 3900],
            "Of 4 images with 16-bit pixels the darkest 2 reach 1,000, all others 3,900 or more",
        ),
        ([4095] * 3 + [60000], "the darkest 3 reach 4,095, all others 60,000"),
        ([255] * 3 + [1023], "the darkest 3 reach 255"),
        ([800, 2000, 16000, 15000], "the darkest 2 reach 2,000"),
        ([1023] * 10 + [1400] * 10, "the darkest 10 reach 1,023, all others 1,400"),
        ([900] + [1023] * 10 + [1100, 1500, 4000], "the darkest 11 reach 1,023"),
    ],
)
def test_pictures_of_two_cameras_have_no_range(peaks, message):
    with pytest.raises(ValueError, match=message):
        find_pixel_range(peaks)
    assert find_pixel_range(peaks, (0, 65535)) == ((0, 65535), min(peaks))


def picture(peak: int, dtype=np.uint16) -> np.ndarray:
    pixels = np.zeros((4, 4), dtype)
    pixels[1, 1] = peak
    return pixels


@pytest.mark.parametrize(
    ("pixel_range", "darkest", "image", "brightest"),
    [
        ((0, 255), 0, picture(51, np.uint8), 51),
        ((0, 255), 0, picture(52_428), 0.8),  # uses its full scale, as 8-bit pictures do
        ((0, 255), 0, picture(204), 0.8),
        ((0, 255), 0, picture(1, np.float32), 1),
        ((0, 65535), 60_000, picture(51, np.uint8), 51),
        ((0, 4095), 3000, picture(4095), 1),
        ((0, 4095), 3000, picture(1365), 1 / 3),  # dark, but no 10-bit picture
        ((0, 4095), 900, picture(819), 0.2),  # as good pictures are
        ((0, 4095), 3000, picture(1, np.float32), 1),
        ((15, 235), 0, picture(235, np.uint8), 1),
        (None, 0, picture(13_107), 0.2),
    ],
)
def test_pictures_of_the_models_range_are_taken(pixel_range, darkest, image, brightest):
    assert RADImageProcessor(4, pixel_range, darkest).resize(image)[0].max() == pytest.approx(brightest)


@pytest.mark.parametrize(
    ("pixel_range", "darkest", "image", "words"),
    [
        ((0, 255), 0, picture(4000), "16-bit pixels with values up to 4,000, .* the range 0 to 255: convert"),
        ((0, 255), 0, picture(1000), "16-bit pixels with values up to 1,000"),
        ((0, 4095), 3000, picture(4096), "values up to 4,096, .* the range 0 to 4,095: convert"),
        ((0, 4095), 3000, picture(1000), "0 to 4,095, the darkest with values up to 3,000: convert"),
        ((0, 4095), 3000, picture(0), "the darkest with values up to 3,000: convert"),
        ((0, 65535), 60_000, picture(4000), "values up to 4,000, .* 0 to 65,535, the darkest"),
        ((0, 4095), 0, picture(255, np.uint8), "8-bit pixels with values up to 255, .* 0 to 4,095: convert"),
        ((16, 235), 0, picture(240, np.uint8), "8-bit pixels with values up to 240, .* 16 to 235: convert"),
    ],
)
def test_pictures_of_another_range_are_refused(pixel_range, darkest, image, words):
    with pytest.raises(ValueError, match=f"The array has {words}|{words}"):
        RADImageProcessor(4, pixel_range, darkest).resize(image)


@pytest.mark.parametrize(
    "pixel_range", [(5, 5), (-1, 255), (0, 65536), (0,), (0, 1, 2), (255, 0), 4095, "12", (0.5, 4095)]
)
def test_a_range_that_is_none_is_refused(pixel_range):
    with pytest.raises(
        ValueError, match="pixel_range must be black and white, whole numbers with 0 <= black < white <= 65535"
    ):
        RADImageProcessor(4, pixel_range)


# Overlays


def test_overlay_is_transparent_below_vmin_and_inferno_at_vmax():
    image = Image.new("RGB", (4, 1), (10, 100, 200))
    out = np.asarray(overlay(image, np.array([[-5.0, 1.0, 3.0, 9.0]]), vmin=1, vmax=3, opacity=0.5))
    top = (np.array([10, 100, 200]) + 255 * np.array(colormaps["inferno"](1.0)[:3])) / 2
    assert out[0, :2].tolist() == [[10, 100, 200]] * 2
    assert np.abs(out[0, 2:] - top).max() <= 0.5 + 1e-3


def test_the_layer_of_heat_over_an_image_is_the_overlay():
    image = Image.new("RGB", (5, 1), (10, 100, 200))
    values = np.array([[-5.0, 1.0, 1.5, 2.5, 9.0]])
    layer = heat(values, vmin=1, vmax=3)
    assert layer.mode == "RGBA" and np.asarray(layer)[0, [0, 1, 4], 3].tolist() == [0, 0, 255]
    over = Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
    expected = np.asarray(overlay(image, values, 1, 3, opacity=1.0), int)
    assert np.abs(np.asarray(over, int) - expected).max() <= 2  # of 255: the layer has 8 bits


@pytest.mark.parametrize(
    ("heat", "vmin", "vmax", "message"),
    [
        (np.zeros((4, 2)), 0, 1, r"must be finite and \(2, 4\) as the image"),
        (np.full((2, 4), np.nan), 0, 1, "must be finite"),
        (np.zeros((2, 4)), 1, 1, "must be below vmax"),
        (np.zeros((2, 4)), -np.inf, 1, "both finite"),
    ],
)
def test_overlay_refuses(heat, vmin, vmax, message):
    with pytest.raises(ValueError, match=message):
        overlay(Image.new("RGB", (4, 2)), heat, vmin, vmax)

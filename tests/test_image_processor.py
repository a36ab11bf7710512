"""Every kind of image that is accepted, by its pixel values, and every kind that is refused, by its sentence."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from rad import image_reader
from rad.image_processor import RADImageProcessor, heat, overlay, resize_map, to_pil

processor = RADImageProcessor(resolution=32)


def decode(image) -> np.ndarray:
    image = image_reader.decode(image)
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def opened(path) -> tuple[str, str]:
    with Image.open(path) as image:
        return image.format, image.mode


def png(path, width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]):
    """A PNG written by hand: what Pillow cannot write, and headers that promise too much."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    )
    return path


# Accepted files and PIL images


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_files_keep_their_pixels(tmp_path, suffix):
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / f"part.{suffix}", lossless=True)
    assert np.array_equal(decode(tmp_path / f"part.{suffix}"), pixels)
    assert np.array_equal(decode(str(tmp_path / f"part.{suffix}")), pixels)


def test_jpeg(tmp_path):
    Image.new("RGB", (16, 8), (200, 100, 50)).save(tmp_path / "part.jpg", quality=95)
    assert np.abs(decode(tmp_path / "part.jpg") - np.array([200, 100, 50])).max() <= 2


def test_the_callers_image_is_left_alone():
    image = Image.fromarray(noise(4, 4, 3))
    image_reader.decode(image).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(image), noise(4, 4, 3))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_rotation_is_applied_once(tmp_path, suffix):
    image = Image.new("RGB", (24, 16), "black")
    image.paste("white", (0, 0, 8, 16))  # left as stored; orientation 6 turns it clockwise, so that left goes up
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / f"part.{suffix}", exif=exif)
    with Image.open(tmp_path / f"part.{suffix}") as unloaded:
        decoded = [decode(tmp_path / f"part.{suffix}"), decode(unloaded)]
    for pixels in decoded:
        assert pixels.shape == (24, 16, 3)
        assert pixels[:6].min() > 240 and pixels[10:].max() < 15
    assert processor.preprocess(tmp_path / f"part.{suffix}")[1] == [(24, 16)]


def test_exif_rotation_of_16_bit(tmp_path):
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(values).save(tmp_path / "part.tiff", exif=exif)
    assert np.array_equal(decode(tmp_path / "part.tiff")[..., 0], np.round(values[::-1, ::-1] / 257))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_by_the_full_range(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 1000], [32768, 65406, 65407, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"part.{suffix}")
    expected = np.array([[0, 0, 1, 1, 4], [128, 254, 255, 255, 255]])
    assert np.array_equal(decode(tmp_path / f"part.{suffix}"), expected[..., None].repeat(3, 2))


def test_16_bit_big_endian_tiff(tmp_path):
    image = Image.frombytes("I;16B", (2, 1), b"\x01\x01\xff\xff")
    image.save(tmp_path / "part.tiff")
    assert opened(tmp_path / "part.tiff") == ("TIFF", "I;16B")
    assert decode(tmp_path / "part.tiff")[0, :, 0].tolist() == [1, 255]


def test_mode_i_is_scaled_by_the_16_bit_range():
    assert decode(Image.fromarray(np.array([[0, 257, 65535]], np.int32)))[0, :, 0].tolist() == [0, 1, 255]


def test_16_bit_rgb_png_is_read_by_its_upper_8_bits(tmp_path):
    path = png(tmp_path / "part.png", 1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0x0100, 0x80FF, 0xFFFF))
    assert decode(path).tolist() == [[[1, 128, 255]]]


def test_16_bit_grey_png_with_a_transparent_value(tmp_path):
    path = png(tmp_path / "part.png", 2, 1, 16, 0, b"\0" + struct.pack(">HH", 1000, 2570), (b"tRNS", b"\x03\xe8"))
    assert decode(path)[0, :, 0].tolist() == [255, 10]


def test_mode_f_in_0_1(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "part.tiff")
    assert decode(tmp_path / "part.tiff")[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 8))
    image.save(tmp_path / "part.tiff")
    pixels = decode(tmp_path / "part.tiff")
    assert pixels[0, 0].tolist() == [0, 255, 255] and pixels[0, 15].tolist() == [0, 0, 0]
    image.save(tmp_path / "part.jpg", quality=95)
    pixels = decode(tmp_path / "part.jpg").astype(int)
    assert np.abs(pixels[0, 0] - [0, 255, 255]).max() <= 3 and pixels[0, 15].max() <= 3


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp"])
def test_palette(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / f"part.{suffix}")
    assert decode(tmp_path / f"part.{suffix}").tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_palette_with_transparency_is_composited_over_white(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "part.png", transparency=bytes([0, 255, 51]))
    assert decode(tmp_path / "part.png").tolist() == [[[255, 255, 255], [200, 100, 50], [204, 204, 204]]]


def test_rgb_png_with_a_transparent_colour(tmp_path):
    path = png(tmp_path / "part.png", 2, 1, 8, 2, b"\0\x01\x02\x03\x04\x05\x06", (b"tRNS", b"\0\x01\0\x02\0\x03"))
    assert decode(path).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_alpha_is_composited_over_white(tmp_path, suffix):
    pixels = np.array([[[100, 0, 0, 0], [100, 0, 200, 255], [0, 100, 0, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"part.{suffix}", lossless=True, exact=True)
    assert decode(tmp_path / f"part.{suffix}").tolist() == [[[255, 255, 255], [100, 0, 200], [204, 224, 204]]]


def test_grey_with_alpha(tmp_path):
    Image.fromarray(np.array([[[0, 0], [7, 255], [0, 51]]], np.uint8)).save(tmp_path / "part.png")
    assert decode(tmp_path / "part.png")[0, :, 1].tolist() == [255, 7, 204]


def test_one_channel(tmp_path):
    pixels = noise(4, 5)
    Image.fromarray(pixels).save(tmp_path / "part.png")
    assert np.array_equal(decode(tmp_path / "part.png"), pixels[..., None].repeat(3, 2))


def test_one_bit(tmp_path):
    Image.fromarray(np.array([[True, False, True]])).save(tmp_path / "part.png")
    assert opened(tmp_path / "part.png") == ("PNG", "1")
    assert decode(tmp_path / "part.png")[0, :, 2].tolist() == [255, 0, 255]


def test_the_main_picture_of_an_mpo_is_taken(tmp_path):
    preview = Image.new("RGB", (8, 8), "black")
    Image.new("RGB", (16, 8), "white").save(
        tmp_path / "part.jpg", format="MPO", save_all=True, append_images=[preview]
    )
    assert opened(tmp_path / "part.jpg") == ("MPO", "RGB")
    assert decode(tmp_path / "part.jpg").shape == (8, 16, 3) and decode(tmp_path / "part.jpg").min() > 250


# Accepted arrays and tensors


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 7, 255], np.uint8), [0, 7, 255]),
        (np.array([0, 257, 65535], np.uint16), [0, 1, 255]),
        (np.array([0, 257, 65535], ">u2"), [0, 1, 255]),
        (np.array([False, True, True]), [0, 255, 255]),
        (np.array([0, 0.25, 1], np.float16), [0, 64, 255]),
        (np.array([0, 0.25, 1], np.float32), [0, 64, 255]),
        (np.array([0, 0.25, 1], np.float64), [0, 64, 255]),
    ],
)
def test_values_of_arrays(values, expected):
    assert decode(values[None])[0, :, 0].tolist() == expected
    assert decode(values[None, :, None].repeat(3, 2))[0, :, 2].tolist() == expected


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.bool, torch.float16, torch.bfloat16, torch.float64]
)
def test_values_of_tensors(dtype):
    top = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    values = torch.tensor([[[0, top]], [[top, 0]], [[top, top]]]).to(dtype)
    assert decode(values).tolist() == [[[0, 255, 255], [255, 0, 255]]]
    assert decode(values[:1]).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_shapes_of_arrays():
    pixels = noise(4, 6, 3)
    assert np.array_equal(decode(pixels), pixels)
    assert np.array_equal(decode(pixels[:, ::-1]), pixels[:, ::-1])
    assert np.array_equal(decode(pixels[..., 0]), pixels[..., :1].repeat(3, 2))
    assert np.array_equal(decode(pixels[..., :1]), pixels[..., :1].repeat(3, 2))
    assert decode(np.array([[[0, 100, 0, 51]]], np.uint8)).tolist() == [[[204, 224, 204]]]


def test_a_tensor_that_requires_grad():
    assert decode(torch.ones(3, 2, 2, requires_grad=True)).min() == 255


# Refused


def refuse(image, message, error=ValueError):
    with pytest.raises(error, match=message) as info:
        processor.preprocess(image)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "content", [b"not an image", b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe"]
)
def test_refuses_what_is_not_an_image(tmp_path, content):
    (tmp_path / "part.png").write_bytes(content)
    refuse(tmp_path / "part.png", "part.png is not an image, or not one of the formats PNG, JPEG")


def test_refuses_other_formats(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "part.tga")
    refuse(tmp_path / "part.tga", "part.tga is not an image, or not one of the formats")
    with Image.open(tmp_path / "part.tga") as image:
        refuse(image, "format TGA, which is not one of PNG")


@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp", "gif", "ppm"])
def test_refuses_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"part.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(path, rf"part\.{suffix} (is truncated or damaged|is not an image|cannot be read)")


def test_refuses_damaged_pixels(tmp_path):
    path = tmp_path / "part.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    content = bytearray(path.read_bytes())
    content[200:300] = bytes(100)
    path.write_bytes(content)
    refuse(path, "part.png is truncated or damaged and cannot be decoded")


@pytest.mark.parametrize(
    "image", [Image.new("RGB", (0, 4)), Image.new("L", (4, 0)), np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 0)]
)
def test_refuses_zero_sized_images(image):
    refuse(image, r"(0 x 4|4 x 0) pixels, but each side must have 1 to 10,000 pixels")


def test_refuses_a_zero_sized_file(tmp_path):
    refuse(png(tmp_path / "part.png", 0, 4, 8, 2, b""), "part.png is not an image")


@pytest.mark.parametrize(("width", "height"), [(10_001, 1), (1, 10_001)])
def test_refuses_more_than_10_000_pixels_a_side(tmp_path, width, height):
    message = f"{width} x {height} pixels, but each side must have 1 to 10,000"
    refuse(Image.new("L", (width, height)), message)
    refuse(np.zeros((height, width), np.uint8), message)
    refuse(torch.zeros(1, height, width), message)
    # No pixel data: had it been decoded, it would be called truncated.
    refuse(png(tmp_path / "part.png", width, height, 8, 2, b""), f"part.png is {message}")


def test_10_000_pixels_a_side_are_accepted():
    assert decode(np.zeros((1, 10_000), np.uint8)).shape == (1, 10_000, 3)


@pytest.mark.parametrize("side", [50_000, 9_900])
def test_refuses_what_pillow_takes_for_a_decompression_bomb(tmp_path, side):
    path = png(tmp_path / "part.png", side, side, 1, 0, b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        refuse(path, "part.png has too many pixels: each side must have 1 to 10,000")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_refuses_more_than_one_frame(tmp_path, suffix):
    path = tmp_path / f"part.{suffix}"
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    refuse(path, f"part.{suffix} has more than one frame: give a single frame")
    with Image.open(path) as image:
        refuse(image, "The PIL image has more than one frame")
        assert image_reader.decode(image.copy()).size == (8, 8)


def test_refuses_a_missing_path(tmp_path):
    refuse(tmp_path / "part.png", "no image file at .*part.png", FileNotFoundError)
    refuse(tmp_path, "no image file at", FileNotFoundError)


def test_refuses_urls():
    refuse("https://example.com/part.png", "https://example.com/part.png is a URL")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_nan_and_inf(value):
    pixels = np.full((4, 4, 3), 0.5, np.float32)
    pixels[1, 2, 0] = value
    refuse(pixels, "The array has NaN or infinite values")
    refuse(torch.from_numpy(pixels).permute(2, 0, 1), "The tensor has NaN or infinite values")
    refuse(Image.fromarray(pixels[..., 0]), "The PIL image has NaN or infinite values")


@pytest.mark.parametrize(("value", "shown"), [(-0.5, "-0.5 to 0"), (1.5, "0 to 1.5"), (255.0, "0 to 255")])
def test_refuses_floats_outside_0_1(value, shown):
    pixels = np.zeros((4, 4), np.float32)
    pixels[0, 0] = value
    refuse(pixels, f"The array has values from {shown}: floats must lie in")
    refuse(torch.from_numpy(pixels)[None], f"The tensor has values from {shown}")
    refuse(Image.fromarray(pixels), f"The PIL image has values from {shown}")


@pytest.mark.parametrize("value", [-1, 65536])
def test_refuses_integers_outside_16_bits(value):
    refuse(Image.fromarray(np.full((2, 2), value, np.int32)), "outside the 16-bit range")


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (3, 8, 8), (1, 4, 4, 3), ()])
def test_refuses_arrays_of_other_shapes(shape):
    refuse(np.zeros(shape, np.uint8), r"has the shape .*, but must be \[H, W\]")


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (4, 4, 4), (1, 3, 4, 4)])
def test_refuses_tensors_of_other_shapes(shape):
    refuse(torch.zeros(shape), r"has the shape .*, but must be \[1, H, W\] or \[3, H, W\]")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint32, np.complex64, object])
def test_refuses_other_number_types(dtype):
    refuse(np.zeros((4, 4), dtype), "is of the type .*, but must be bool, uint8, uint16 or float")


def test_refuses_an_integer_tensor():
    refuse(torch.zeros(3, 4, 4, dtype=torch.int64), "The tensor is of the type int64")


def test_refuses_modes_with_no_clear_meaning():
    refuse(Image.new("LAB", (4, 4)), "pixel mode LAB, which is not one of")


@pytest.mark.parametrize("image", [None, 3, b"part.png", [None], [["part.png"]]])
def test_refuses_what_is_no_image_at_all(image):
    refuse(image, "is not an image: give a PIL image, a file path, a NumPy array or a tensor")


def test_refuses_an_empty_list():
    refuse([], "The list of images is empty")


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

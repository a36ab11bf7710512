"""Every kind of image that is accepted, by its pixel values, and every kind that is refused, by its sentence."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
import tifffile
import torch
from PIL import Image

from rad import image_reader
from rad.data.summary import look_at
from rad.image_processor import RADImageProcessor
from rad.image_reader import peak, read

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
def test_16_bit_grey_that_uses_its_full_scale(tmp_path, suffix):
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


def test_16_bit_grey_png_with_a_transparent_value(tmp_path):
    path = png(tmp_path / "part.png", 2, 1, 16, 0, b"\0" + struct.pack(">HH", 1000, 2570), (b"tRNS", b"\x03\xe8"))
    assert np.asarray(read(path))[0, :, 0].tolist() == [65535, 2570]


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
    refuse(content, "The picture is not an image, or not one of the formats PNG, JPEG")
    refuse(io.BytesIO(content), "The file is not an image, or not one of the formats PNG, JPEG")
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


@pytest.mark.parametrize("image", [None, 3, [None], [["part.png"]]])
def test_refuses_what_is_no_image_at_all(image):
    refuse(image, "is not an image: give a PIL image, a file's path, bytes or open file, a NumPy array or a tensor")


def test_refuses_an_empty_list():
    refuse([], "The list of images is empty")


# 16 bits


COLOURS = np.array([[[0, 100, 4095], [1, 2, 3]]], np.uint16)


def deep_file(path, kind: str):
    """COLOURS in a file of a kind."""
    if kind == "png":
        return png(path, 2, 1, 16, 2, b"\0" + COLOURS.astype(">u2").tobytes())
    planes = {"planes": {"planarconfig": "separate"}, "compressed": {"compression": "lzw"}}.get(kind, {})
    pixels = COLOURS.transpose(2, 0, 1) if kind == "planes" else COLOURS
    tifffile.imwrite(path, pixels, photometric="rgb", **planes)
    return path


@pytest.mark.parametrize("peak_value", [200, 255, 256, 1023, 1024, 4095, 16383, 16384, 65535])
def test_a_16_bit_picture_is_shown_in_the_first_range_that_holds_it(peak_value):
    white = min(w for w in (255, 1023, 4095, 16383, 65535) if w >= peak_value)
    pixels = np.array([[0, peak_value // 2, peak_value]], np.uint16)
    assert decode(pixels)[0, :, 0].tolist() == np.round(pixels[0].astype(np.float64) * 255 / white).tolist()


def test_a_range_may_be_given_to_show_a_picture_in():
    pixels = np.array([[0, 64, 1000, 2000]], np.uint16)
    shown = np.asarray(image_reader.decode(pixels, (64, 1023)))[0, :, 0]
    assert shown.tolist() == [0, 0, round(936 * 255 / 959), 255]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_the_numbers_of_16_bit_grey_stay_as_they_are(tmp_path, suffix):
    values = np.array([[0, 1, 1000, 4095]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"part.{suffix}")
    for source in (tmp_path / f"part.{suffix}", (tmp_path / f"part.{suffix}").read_bytes(), values):
        pixels = read(source)
        assert pixels.dtype == np.uint16 and pixels.tolist() == values[..., None].tolist()


@pytest.mark.parametrize("kind", ["png", "tiff", "planes", "compressed"])
def test_the_numbers_of_16_bit_colour_stay_as_they_are(tmp_path, kind):
    path = deep_file(tmp_path / f"part.{'png' if kind == 'png' else 'tif'}", kind)
    with Image.open(path) as opened_image:
        for source in (path, path.read_bytes(), opened_image):
            pixels = read(source)
            assert pixels.dtype == np.uint16 and pixels.tolist() == COLOURS.tolist()
    assert decode(path).tolist() == [[[0, 6, 255], [0, 0, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bit_colour_is_turned_as_8_bit_is(tmp_path, orientation):
    pixels = noise(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "shallow.tif", exif=exif)
    tags = [(0x0112, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "deep.tif", pixels.astype(np.uint16) * 257, photometric="rgb", extratags=tags)
    assert np.array_equal(decode(tmp_path / "deep.tif"), decode(tmp_path / "shallow.tif"))


def test_16_bit_colour_over_white(tmp_path):
    pixels = np.array([[[1000, 0, 0, 0], [1000, 2000, 3000, 65535]]], np.uint16)
    tifffile.imwrite(tmp_path / "part.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    assert read(tmp_path / "part.tif").tolist() == [[[65535] * 3, [1000, 2000, 3000]]]
    pixels = np.array([[[1000, 0], [1000, 65535]]], np.uint16)
    tifffile.imwrite(tmp_path / "grey.tif", pixels, photometric="minisblack", extrasamples=["unassalpha"])
    assert read(tmp_path / "grey.tif").tolist() == [[[65535] * 3, [1000] * 3]]


def test_float_colour_and_pages(tmp_path):
    pixels = np.array([[[0, 0.25, 1]]], np.float32)
    tifffile.imwrite(tmp_path / "part.tif", pixels, photometric="rgb")
    assert read(tmp_path / "part.tif").tolist() == pixels.tolist()
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((2, 4, 4, 3), np.uint16), photometric="rgb")
    refuse(tmp_path / "pages.tif", "more than one")


def test_damaged_16_bit_colour(tmp_path):
    for kind in ("png", "compressed"):
        path = deep_file(tmp_path / f"part.{'png' if kind == 'png' else 'tif'}", kind)
        path.write_bytes(path.read_bytes()[: -30 if kind == "png" else -8])
        refuse(path, "cannot be (decoded|read)|not an image")


def test_16_bit_colour_of_other_formats_is_refused(tmp_path):
    (tmp_path / "part.ppm").write_bytes(b"P6\n2 1\n4095\n" + COLOURS.astype(">u2").tobytes())
    refuse(tmp_path / "part.ppm", "part.ppm is a PPM of 16-bit colour, which is read of PNG and TIFF files only")


def test_a_declared_maximum_is_the_full_scale(tmp_path):
    (tmp_path / "part.pgm").write_bytes(b"P5\n2 1\n4095\n" + np.array([4095, 0], ">u2").tobytes())
    assert read(tmp_path / "part.pgm").tolist() == [[[65535], [0]]]


@pytest.mark.parametrize(("module", "kind"), [("tifffile", "tiff"), ("imagecodecs", "png")])
def test_16_bit_colour_names_the_extra(tmp_path, monkeypatch, module, kind):
    path = deep_file(tmp_path / f"part.{kind}", kind)
    monkeypatch.setitem(sys.modules, module, None)
    refuse(path, r"has pixels of 16-bit colour: reading it needs `pip install tifffile imagecodecs`")


def test_heic(tmp_path, monkeypatch):
    image = Image.new("RGB", (64, 48), (200, 10, 10))
    image.paste((10, 10, 200), (0, 0, 64, 24))
    pillow_heif.from_pillow(image).save(tmp_path / "part.heic", quality=90)
    pixels = decode(tmp_path / "part.heic").astype(int)
    assert pixels.shape == (48, 64, 3) and np.abs(pixels - np.asarray(image)).mean() < 8
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refuse(tmp_path / "part.heic", r"part.heic is a HEIC picture: reading it needs `pip install pillow-heif`")


def test_the_peak_of_16_bit_pictures_alone(tmp_path):
    deep = np.array([[3, 700]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(noise(4, 4)).save(tmp_path / "shallow.png")
    shallow = [tmp_path / "shallow.png", noise(4, 4), Image.fromarray(noise(4, 4)), deep.astype(np.float32) / 1000]
    assert [peak(image) for image in (tmp_path / "deep.png", deep, Image.fromarray(deep))] == [700] * 3
    assert peak(deep_file(tmp_path / "colour.png", "png")) == 4095
    assert [peak(image) for image in shallow] == [None] * 4


def test_only_the_header_of_8_bit_files_is_read_for_it(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "part.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "part.png").read_bytes()[:200])
    assert peak(tmp_path / "part.png") is None
    refuse(tmp_path / "part.png", "truncated or damaged")


# Bytes, files and home folders


def test_bytes_and_open_files(tmp_path):
    pixels = noise(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "part.png")
    content = (tmp_path / "part.png").read_bytes()
    with (tmp_path / "part.png").open("rb") as file:
        for source in (content, io.BytesIO(content), file):
            assert np.array_equal(decode(source), pixels)


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(noise(4, 4)).save(tmp_path / "part.png")
    assert decode("~/part.png").shape == (4, 4, 3)


# TIFFs in which white is 0, and TIFFs with thumbnails


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_a_tiff_in_which_white_is_0_is_turned(tmp_path, dtype):
    white = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    pixels = (np.linspace(0, 1, 12).reshape(3, 4) * white).astype(dtype)
    tifffile.imwrite(tmp_path / "black.tif", pixels, photometric="minisblack")
    tifffile.imwrite(tmp_path / "white.tif", (white - pixels).astype(dtype), photometric="miniswhite")
    one, other = (np.asarray(read(tmp_path / name)) for name in ("black.tif", "white.tif"))
    assert np.allclose(one, other, atol=1e-6 if white == 1 else 0)


def test_12_bits_in_which_white_is_0_have_their_own_black(tmp_path):
    pixels = np.array([[0, 5, 4095]], np.uint16)
    tifffile.imwrite(tmp_path / "white.tif", pixels, photometric="miniswhite", bitspersample=12)
    assert read(tmp_path / "white.tif")[..., 0].tolist() == [[4095, 4090, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("says_so", [True, False])
def test_a_tiff_with_a_thumbnail_is_read(tmp_path, dtype, colours, first, says_so):
    rng = np.random.default_rng(0)
    pixels = np.sort(rng.integers(0, np.iinfo(dtype).max, (32, 24, colours)[: 1 + colours // 1]).astype(dtype), axis=0)
    small = pixels[::4, ::4]
    kind = {"photometric": "rgb" if colours == 3 else "minisblack"}
    pages = [(pixels, {}), (small, {"subfiletype": 1} if says_so else {})]
    with tifffile.TiffWriter(tmp_path / "part.tif") as writer:
        for page, tags in reversed(pages) if first else pages:
            writer.write(page, **kind, **tags)
    tifffile.imwrite(tmp_path / "alone.tif", pixels, **kind)
    assert np.array_equal(read(tmp_path / "part.tif"), read(tmp_path / "alone.tif"))


def test_a_tiff_of_two_different_pages_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for size in ((32, 24), (8, 6), (16, 6)):
        with tifffile.TiffWriter(tmp_path / "part.tif") as writer:
            writer.write(rng.integers(0, 256, (32, 24)).astype(np.uint8))
            writer.write(rng.integers(0, 256, size).astype(np.uint8))
        refuse(tmp_path / "part.tif", "more than one frame")


def test_a_12_bit_picture_behind_a_thumbnail_of_8_bits_is_one_of_12_bits(tmp_path):
    pixels = np.linspace(0, 4095, 64 * 48).reshape(64, 48).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "part.tif") as writer:
        writer.write((pixels[::8, ::8] // 16).astype(np.uint8))
        writer.write(pixels)
    assert np.array_equal(read(tmp_path / "part.tif")[..., 0], pixels)
    assert peak(tmp_path / "part.tif") == 4095
    assert look_at(tmp_path / "part.tif") == ((48, 64), "16-bit grey", 4095)


def test_the_page_that_is_decoded_is_the_one_that_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(image_reader, "MAX_SIDE", 100)
    with tifffile.TiffWriter(tmp_path / "wide.tif") as writer:
        writer.write(np.zeros((4, 4), np.uint8), subfiletype=1)
        writer.write(np.zeros((4, 101), np.uint8))
    refuse(tmp_path / "wide.tif", "frame|101 x 4 pixels")
    with tifffile.TiffWriter(tmp_path / "many.tif") as writer:
        for _ in range(40):
            writer.write(np.zeros((4, 4), np.uint8), subfiletype=1)
    refuse(tmp_path / "many.tif", "more than one frame")


def test_of_a_picture_that_the_caller_has_decoded_no_other_page_is_taken(tmp_path):
    with tifffile.TiffWriter(tmp_path / "part.tif") as writer:
        writer.write(np.zeros((32, 24), np.uint8))
        writer.write(np.zeros((8, 6), np.uint8), subfiletype=1)
    with Image.open(tmp_path / "part.tif") as image:
        image.load()
        refuse(image, "more than one frame")


def test_opacity_stays_where_white_is_0(tmp_path):
    pixels = np.array([[[200, 255], [55, 255]]], np.uint8)
    tifffile.imwrite(tmp_path / "white.tif", pixels, photometric="miniswhite", extrasamples=["unassalpha"])
    assert np.asarray(read(tmp_path / "white.tif"))[..., 0].tolist() == [[55, 200]]

"""Masks, whatever they are encoded in and called: read where the meaning is plain, else refused; none vanishes."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rad.data import AnomalyDataset, Sample
from rad.data.listing import images_under
from rad.data.masks import MaskFinder, resize_mask, upright_size

SIZE = (24, 32)
TRUTH = np.zeros(SIZE, bool)
TRUTH[4:14, 6:18] = True
TRUTH[20, 3:30] = True  # a scratch one pixel wide
SECOND = np.zeros(SIZE, bool)  # part of it is another kind of defect
SECOND[4:14, 6:10] = True
SECOND[20, 3:9] = True
RED, WHITE = (255, 0, 0), (255, 255, 255)


def grey(high: float, low: float = 0, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(TRUTH, high, low).astype(dtype))


def kinds(first: float, second: float, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(SECOND, second, np.where(TRUTH, first, 0)).astype(dtype))


def five_kinds() -> Image.Image:
    mask = np.where(TRUTH, 255, 0).astype(np.uint8)
    mask[4:14, 6:18] = np.repeat([40, 90, 140, 200], 3)
    return Image.fromarray(mask)


def with_thin_kind() -> Image.Image:
    """The scratch is of a kind of its own, and faint."""
    mask = np.where(TRUTH, 255, 0).astype(np.uint8)
    mask[20, 3:30] = 100
    return Image.fromarray(mask)


def with_dark_blue() -> Image.Image:
    mask = np.where(TRUTH[..., None], (255, 255, 0), 0).astype(np.uint8)
    mask[20, 3:30] = (0, 0, 120)
    return Image.fromarray(mask)


def with_noise() -> Image.Image:
    """What lossy compression leaves, kept in a lossless file."""
    mask = np.where(TRUTH, 255, 0).astype(np.uint8)
    mask[15:18, 6:18] = 2
    mask[1:4, 20:28] = 1
    mask[6:10, 8:14] = 254
    return Image.fromarray(mask)


def colours(bad: tuple[int, ...], good: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(TRUTH[..., None], bad, good).astype(np.uint8))


def palette(*used: tuple[int, int, int], bad: int = 1, good: int = 0) -> Image.Image:
    image = Image.fromarray(np.where(TRUTH, bad, good).astype(np.uint8), "L").convert("P")
    image.putdata(np.where(TRUTH, bad, good).ravel().tolist())
    image.putpalette([value for colour in used for value in colour])
    return image


def with_opacity(image: Image.Image, *opacity: int) -> Image.Image:
    """Of each index of a palette."""
    image.info["transparency"] = bytes(opacity)
    return image


def with_fringe(high: float, dtype: type = np.uint8) -> Image.Image:
    """Edges that fade: values right and left of the block, of which those above the middle are in it."""
    mask = np.where(TRUTH, high, 0).astype(np.float64)
    mask[4:14, 5] = high * np.linspace(0.02, 0.45, 10)
    mask[4:14, 6] = high * np.linspace(0.55, 0.98, 10)
    return Image.fromarray(mask.astype(dtype))


LA = Image.merge("LA", (Image.new("L", SIZE[::-1]), grey(255)))
ENCODINGS: dict[str, tuple[Image.Image, str, str | None]] = {  # image, suffix, and the rule that is told
    "0 and 255": (grey(255), ".png", None),
    "0 and 1": (grey(1), ".png", "larger of two"),
    "0 and 2": (grey(2), ".png", "larger of two"),
    "0 and 100": (grey(100), ".png", "larger of two"),
    "3 and 250": (grey(250, 3), ".png", "larger of two"),
    "1 bit": (Image.fromarray(TRUTH), ".png", None),
    "1 bit TIFF": (Image.fromarray(TRUTH), ".tif", None),
    "kinds 1 and 2": (kinds(1, 2), ".png", "each value but 0"),
    "kinds 2 and 1": (kinds(2, 1), ".png", "each value but 0"),
    "kinds 85 and 255": (kinds(85, 255), ".png", "each value but 0"),
    "kinds 1 and 255": (kinds(1, 255), ".png", "each value but 0"),
    "kinds 200 and 60": (kinds(200, 60), ".bmp", "each value but 0"),
    "a thin kind": (with_thin_kind(), ".png", "each value but 0"),
    "a thin kind of a dark colour": (with_dark_blue(), ".png", "each value but 0"),
    "noise near black and white": (with_noise(), ".png", None),
    "five kinds": (five_kinds(), ".png", "solid areas"),
    "faded edges": (with_fringe(255), ".png", None),
    "faded edges of 90": (with_fringe(90), ".png", "above the middle"),
    "16 bits, 0 and 1": (grey(1, dtype=np.uint16), ".png", "larger of two"),
    "16 bits, 0 and 255": (grey(255, dtype=np.uint16), ".png", None),
    "16 bits, 0 and 4095": (grey(4095, dtype=np.uint16), ".tif", "larger of two"),
    "16 bits, 0 and 65535": (grey(65535, dtype=np.uint16), ".png", "larger of two"),
    "16 bits, faded edges": (with_fringe(65535, np.uint16), ".tif", "above the middle"),
    "16 bits, kinds": (kinds(3, 7, np.uint16), ".png", "each value but 0"),
    "32 bits, 0 and 1": (grey(1, dtype=np.int32), ".tif", "larger of two"),
    "float, 0 and 1": (grey(1, dtype=np.float32), ".tif", "larger of two"),
    "float, 0 and 0.3": (grey(0.3, dtype=np.float32), ".tiff", "larger of two"),
    "float, 0 and 255": (grey(255, dtype=np.float32), ".tif", None),
    "float, faded edges": (with_fringe(1, np.float32), ".tif", "above the middle"),
    "float to 255, faded edges": (with_fringe(255, np.float32), ".tif", None),
    "RGB, white on black": (colours(WHITE, (0, 0, 0)), ".png", None),
    "RGB, 0 and 1": (colours((1, 1, 1), (0, 0, 0)), ".png", "larger of two"),
    "red on black": (colours(RED, (0, 0, 0)), ".png", "colours on black"),
    "dark blue on black": (colours((0, 0, 64), (0, 0, 0)), ".png", "colours on black"),
    "red on white": (colours(RED, WHITE), ".png", "colours on white"),
    "RGBA, white on black": (colours((*WHITE, 255), (0, 0, 0, 255)), ".png", None),
    "RGBA, red on black": (colours((*RED, 255), (0, 0, 0, 255)), ".png", "colours on black"),
    "RGBA, alpha alone, of black": (colours((0, 0, 0, 255), (0, 0, 0, 0)), ".png", "not transparent"),
    "RGBA, alpha alone, of white": (colours((*WHITE, 255), (*WHITE, 0)), ".png", "not transparent"),
    "RGBA, half transparent red": (colours((*RED, 128), (0, 0, 0, 0)), ".png", "not transparent"),
    "RGBA, all transparent": (colours((*WHITE, 0), (0, 0, 0, 0)), ".png", None),
    "LA, alpha alone": (LA, ".png", "not transparent"),
    "LA, opaque": (colours((255, 255), (0, 255)), ".png", None),
    "palette of VOC": (palette((0, 0, 0), (128, 0, 0)), ".png", "palette but black"),
    "palette, white at 0, black at 1": (palette(WHITE, (0, 0, 0), bad=0, good=1), ".png", None),
    "palette of colours without black": (palette((68, 1, 84), (253, 231, 37)), ".png", "every index of the palette"),
    "palette of one colour": (palette((0, 0, 0), (0, 0, 0)), ".png", "every index of the palette"),
    "palette, 0 and 255 as they are": (palette(*((i, i, i) for i in range(256)), bad=255), ".png", None),
    "palette, 0 and 1 as they are": (palette(*((i, i, i) for i in range(256))), ".png", "larger of two"),
    "palette with a clear index": (with_opacity(palette(WHITE, WHITE), 0, 255), ".png", "not transparent"),
    "palette, all of it opaque": (with_opacity(palette(RED, (0, 255, 0)), 255, 255), ".png", "every index"),
    "GIF": (palette((0, 0, 0), WHITE), ".gif", None),
    "WEBP": (colours(WHITE, (0, 0, 0)), ".webp", None),
    "WEBP, 0 and 1": (colours((1, 1, 1), (0, 0, 0)), ".webp", "larger of two"),
    "PGM": (grey(255), ".pgm", None),
    "PPM": (colours(RED, (0, 0, 0)), ".ppm", "colours on black"),
    "BMP": (grey(255), ".bmp", None),
}


def dataset_of(
    folder: Path, mask: Image.Image, suffix: str = ".png", image: tuple[int, int] = SIZE, **how
) -> AnomalyDataset:
    Image.new("L", image[::-1], 128).save(folder / "image.png")
    mask.save(folder / f"mask{suffix}", **how)
    return AnomalyDataset([Sample(folder / "image.png", "nut", "crack", folder / f"mask{suffix}")])


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_marks_the_same_pixels(tmp_path, name):
    image, suffix, rule = ENCODINGS[name]
    how = {"lossless": True} if suffix == ".webp" else {}
    mask = dataset_of(tmp_path, image, suffix, **how).read_mask(0)
    assert np.array_equal(mask.pixels, TRUTH)
    assert any(rule in told for told in mask.rules) if rule else not mask.rules


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize(("bad", "good"), [(255, 0), (WHITE, (0, 0, 0)), (RED, (0, 0, 0)), (RED, WHITE)])
def test_what_compression_leaves_around_a_mask_is_no_defect(tmp_path, bad, good, suffix):
    large = np.zeros((96, 128), bool)
    large[20:60, 30:90] = True
    values = np.where(large[..., None], bad, good).astype(np.uint8)
    mask = Image.fromarray(values if values.shape[-1] > 1 else values[..., 0])
    found = dataset_of(tmp_path, mask, suffix, (96, 128), quality=75).mask(0)
    # Colour has half the resolution
    assert not (found != large)[:18].any() and (found != large).mean() < 0.02


@pytest.mark.parametrize("high", [255, 1])
def test_an_empty_mask_is_none_whatever_it_is_called(tmp_path, high):
    dataset = dataset_of(tmp_path, Image.new("L", SIZE[::-1]))
    assert dataset.mask(0) is None and not dataset.read_mask(0).pixels.any()


def gradient() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8))


@pytest.mark.parametrize(("first", "second"), [(255, 100), (255, 60), (RED, (0, 0, 100))])
def test_compression_hides_no_darker_kind(tmp_path, first, second):
    large = np.zeros((64, 64, 3), np.uint8)
    large[8:24, 8:40], large[40:56, 16:48] = first, second
    found = dataset_of(tmp_path, Image.fromarray(large), ".jpg", (64, 64), quality=75).mask(0)
    assert found[9:23, 9:39].all() and found[41:55, 17:47].all() and found.mean() < 0.3


def bottle(background: int) -> Image.Image:
    """A colour photograph of a round part before a background of one value."""
    y, x = np.mgrid[:96, :96] - 48
    rng = np.random.default_rng(0)
    part = np.array([120, 80, 40]) + 40 * np.sin(x / 9)[..., None] + rng.normal(0, 6, (96, 96, 3))
    picture = np.where((np.hypot(x, y) < 40)[..., None], part, background)
    return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("background", [0, 255])
def test_a_colour_photograph_is_no_mask(tmp_path, background, suffix):
    with pytest.raises(ValueError, match="different colours, as a photograph"):
        dataset_of(tmp_path, bottle(background), suffix, (96, 96)).mask(0)


def test_a_faint_line_is_a_defect_beside_bright_ones_with_soft_edges(tmp_path):
    y, x = np.mgrid[:64, :64] - 32
    mask = (255 * (22 - np.hypot(x, y)).clip(0, 5) / 5).round().astype(np.uint8)  # edges of many greys
    mask[60, 4:60] = 100
    found = dataset_of(tmp_path, Image.fromarray(mask), ".png", (64, 64)).read_mask(0)
    assert found.pixels[60, 4:60].all() and "faint lines are defects" in found.rules
    assert np.array_equal(found.pixels[:58], mask[:58] > 127)


REFUSED: dict[str, tuple[Callable[[], Image.Image], str, str]] = {
    "two values of which none is black": (
        lambda: grey(200, 100),
        ".png",
        "no background, its values go from 100 to 200",
    ),
    "1 and 2": (lambda: grey(2, 1), ".png", "no background, its values go from 1 to 2"),
    "one grey": (lambda: grey(90, 90), ".png", "is 90 everywhere"),
    "a photograph": (gradient, ".png", "different values, as a photograph"),
    "colours of which none is black": (
        lambda: colours(RED, (0, 0, 255)),
        ".png",
        "has the colours .0, 0, 255. and .255",
    ),
    "a palette that starts with a colour beside white": (
        lambda: palette(RED, WHITE, bad=0, good=1),
        ".png",
        "index 0 is not black, and white",
    ),
    "a JPEG of 1": (lambda: grey(1, 1), ".jpg", "values up to 1 that lossy compression"),
    "a JPEG of 0 and 9": (lambda: grey(9), ".jpg", "values up to 12 that lossy compression"),
    "negative values": (lambda: grey(1, -1, np.int32), ".tif", "negative values, down to -1"),
    "NaN": (lambda: grey(np.nan, 0, np.float32), ".tif", "NaN or infinite"),
    "infinite values": (lambda: grey(np.inf, 0, np.float32), ".tif", "NaN or infinite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_whose_meaning_is_not_plain_is_refused(tmp_path, name):
    image, suffix, message = REFUSED[name]
    dataset = dataset_of(tmp_path, image(), suffix)
    with pytest.raises(
        ValueError, match=rf"^The mask mask\{suffix} of .*image.png .*{message}.*: expected 0 for good"
    ):
        dataset.mask(0)


def test_sixteen_bit_colour_that_pillow_cuts_to_nothing_is_refused(tmp_path):
    dataset = dataset_of(tmp_path, grey(255))
    rows = np.repeat(TRUTH[..., None], 3, -1).astype(">u2").reshape(SIZE[0], -1)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", *SIZE[::-1], 16, 2, 0, 0, 0)
    for name, part in ((b"IHDR", header), (b"IDAT", zlib.compress(content)), (b"IEND", b"")):
        png += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    (tmp_path / "mask.png").write_bytes(png)
    with pytest.raises(ValueError, match="16 bits a colour, of which the upper 8 are read"):
        dataset.mask(0)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0", b"", None])
def test_a_damaged_or_missing_mask_is_named(tmp_path, content):
    dataset = dataset_of(tmp_path, grey(255))
    (tmp_path / "mask.png").unlink() if content is None else (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"The mask mask\.png of .*image\.png cannot be read"):
        dataset.mask(0)


def test_a_mask_of_several_pages_is_refused(tmp_path):
    dataset = dataset_of(tmp_path, grey(255), ".tif", save_all=True, append_images=[grey(255)])
    with pytest.raises(ValueError, match="cannot be read .*2 pages"):
        dataset.mask(0)


def test_a_threshold_that_is_given_is_taken(tmp_path):
    dataset = dataset_of(tmp_path, with_fringe(255))
    sample = dataset.samples[0]
    for threshold in (0, 250):
        found = AnomalyDataset([Sample(sample.image, "nut", "crack", sample.mask, threshold)]).mask(0)
        assert np.array_equal(found, np.asarray(with_fringe(255)) > threshold)
    dark = AnomalyDataset([Sample(sample.image, "nut", "crack", LA, 0)])  # alpha alone
    assert np.array_equal(dark.mask(0), TRUTH)


# Size


@pytest.mark.parametrize(("image", "mask"), [(SIZE, (48, 64)), ((1000, 1333), (256, 341)), ((192, 256), (3005, 4000))])
def test_a_mask_of_its_images_shape_may_be_smaller_or_larger(tmp_path, image, mask):
    left = np.zeros(mask, bool)
    left[:, : mask[1] // 2] = True
    found = dataset_of(tmp_path, Image.fromarray(left), image=image).mask(0, (6, 8))
    assert found[:, :4].all() and not found[:, 5:].any()


@pytest.mark.parametrize("size", [(32, 24), (24, 24), (48, 32)])
def test_a_mask_of_another_shape_than_its_image_is_refused(tmp_path, size):
    dataset = dataset_of(tmp_path, Image.new("L", size[::-1]))
    with pytest.raises(ValueError, match=f"mask.png of .* has {size[1]} x {size[0]} pixels, the image 32 x 24"):
        dataset.mask(0)


def test_a_mask_lies_on_its_image_as_it_is_looked_at(tmp_path):
    dataset = dataset_of(tmp_path, grey(255))
    turned = Image.new("L", SIZE)  # lies on its side in the file
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(dataset.mask(0), TRUTH)
    assert AnomalyDataset([Sample(tmp_path / "image.png", "nut")]).mask(0).shape == SIZE


def test_the_mask_of_a_good_image_has_the_size_asked_for(tmp_path):
    Image.new("L", (8, 6)).save(tmp_path / "image.png")
    assert AnomalyDataset([Sample(tmp_path / "image.png", "nut")]).mask(0, size=(3, 5)).shape == (3, 5)


def test_parts_of_a_mask_are_united(tmp_path):
    dataset = dataset_of(tmp_path, grey(1))
    kinds(0, 1).save(tmp_path / "one.png")
    grey(255).save(tmp_path / "two.png")
    both = AnomalyDataset(
        [Sample(dataset.samples[0].image, "nut", "crack", (tmp_path / "one.png", tmp_path / "two.png"))]
    )
    assert np.array_equal(both.mask(0), TRUTH) and both.read_mask(0).rules == ("the larger of two values is defect",)


def footprint(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shrunk by the area of defect in each new pixel, in float64."""
    weights = []
    for own, length in zip(mask.shape, size, strict=True):
        edges = np.arange(length + 1) * own / length
        places = np.arange(own)
        overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
        weights.append(overlap.clip(0))
    return weights[0] @ mask.astype(np.float64) @ weights[1].T > 1e-9


@pytest.mark.parametrize("size", [(256, 256), (100, 333), (1, 1), (7, 500), (499, 3)])
@pytest.mark.parametrize("share", [0.0003, 0.05, 0.9])
def test_a_shrunk_pixel_is_defect_if_any_part_of_it_is(size, share):
    mask = np.random.default_rng(size[0]).random((500, 500)) < share
    assert np.array_equal(resize_mask(mask, size), footprint(mask, size))


def test_no_thin_defect_vanishes():
    scratch = np.zeros((4000, 4000), bool)
    scratch[1234:1237] = True
    assert resize_mask(scratch, (256, 256)).any(0).all()
    spots, rng = np.zeros((2048, 2448), bool), np.random.default_rng(0)
    places = [(100 * (i // 8) + int(rng.integers(50)), 300 * (i % 8) + int(rng.integers(100))) for i in range(40)]
    for y, x in places:
        spots[y : y + 2, x : x + 2] = True
    small = resize_mask(spots, (256, 256))
    assert all(small[y * 256 // 2048, x * 256 // 2448] for y, x in places)


def test_masks_grow_by_nearest_neighbour():
    """Blocks grow to blocks, with no soft edges that would widen them."""
    mask = np.random.default_rng(0).random((6, 8)) < 0.5
    assert np.array_equal(resize_mask(mask, (18, 16)), mask.repeat(3, 0).repeat(2, 1))
    odd = np.random.default_rng(0).random((7, 9)) < 0.5  # so that no new pixel's centre lies between two old ones
    nearest = np.asarray(Image.fromarray(odd).resize((20, 12), Image.Resampling.NEAREST))
    assert np.array_equal(resize_mask(odd, (12, 20)), nearest) and np.array_equal(resize_mask(mask, (6, 8)), mask)


# Names


def find_mask(folder: Path, stem: str) -> Path | None:
    image = folder.parent / "images" / f"{stem}.png"
    return MaskFinder(images_under(folder), [image], folder.parent)(image)


@pytest.mark.parametrize(
    "name",
    [
        "007_mask.png",
        "007_gt.png",
        "007_MASK.png",
        "007_label.tif",
        "007-mask.bmp",
        "007.mask.png",
        "007 Mask.PNG",
        "mask_007.png",
        "GT-007.jpeg",
        "007.png",
        "007.JPG",
        "007.TIFF",
        "007.pgm",
        "007_GroundTruth.gif",
        "007_ground_truth.webp",
        "007_segmentation.png",
        "007_lbl.jfif",
        "Maske_007.dib",
        "007_掩码.png",
    ],
)
def test_a_mask_is_found_by_its_images_name(tmp_path, name):
    for other in ("0071_mask.png", "1007_mask.png", "007_photo.png", "007_mask.txt", "._007_mask.png"):
        (tmp_path / other).touch()
    assert find_mask(tmp_path, "007") is None
    (tmp_path / name).touch()
    assert find_mask(tmp_path, "007") == tmp_path / name


def test_of_several_masks_the_plainest_name_goes_first(tmp_path):
    names = ["a_mask.png", "a_mask.jpg", "a_gt.png", "mask_a.png", "a.png", "A_mask.png"]
    for name in names:
        (tmp_path / name).touch()
    for name in names[:-1]:
        if name != "a_mask.png":
            (tmp_path / "A_mask.png").unlink(missing_ok=True)
        assert find_mask(tmp_path, "a") == tmp_path / name
        (tmp_path / name).unlink()
    assert find_mask(tmp_path, "a") is None


def test_letters_of_either_case_tell_two_images_apart(tmp_path):
    for name in ("a_mask.png", "A_mask.png"):
        (tmp_path / name).touch()
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("the file system does not tell them apart")
    assert [find_mask(tmp_path, stem).name for stem in "aA"] == ["a_mask.png", "A_mask.png"]


def test_the_mask_of_a_picture_that_pillow_does_not_know(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (16, 8))).save(tmp_path / "part.heic")
    assert upright_size(tmp_path / "part.heic") == (8, 16)

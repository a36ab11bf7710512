"""What a test set can be measured by: figures, or one sentence in their place."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rad.data import AnomalyDataset, Sample
from rad.evaluation import measure
from rad.metrics import IMAGE_METRICS, PIXEL_METRICS
from rad.truths import Truth, read_truths, survey

SIZE = 8


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.new("RGB", (SIZE, SIZE), "gray").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def mask(share: float) -> Image.Image:
    """White on black, that share of the rows."""
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[: round(share * SIZE)] = 255
    return Image.fromarray(pixels)


def a_set(photo: Path, category: str, images: str) -> list[Sample]:
    """Images by a letter each: good, masked, empty mask, no mask, all over defective."""
    masks = {"g": None, "m": mask(0.25), "e": mask(0), "n": None, "a": mask(1)}
    return [Sample(photo, category, "good" if kind == "g" else "dent", masks[kind]) for kind in images]


IMAGE, PIXEL = set(IMAGE_METRICS), set(PIXEL_METRICS)
NO_DEFECT = "nut: image AUROC, AP and F1, pixel AUROC, AP, F1 and AUPRO not defined: no defective image."


@pytest.mark.parametrize(
    ("images", "missing", "told"),
    [
        ("gm", set(), []),
        ("ggmmen", set(), []),
        ("ggg", IMAGE | PIXEL, [NO_DEFECT]),
        ("g", IMAGE | PIXEL, [NO_DEFECT]),
        ("mm", IMAGE, ["nut: image AUROC, AP and F1 not defined: no good image."]),
        (
            "nn",
            IMAGE | PIXEL,
            [
                "nut: image AUROC, AP and F1 not defined: no good image.",
                "nut: pixel AUROC, AP, F1 and AUPRO not defined: no defective image with a mask.",
            ],
        ),
        ("gn", PIXEL, ["nut: pixel AUROC, AP, F1 and AUPRO not defined: no defective image with a mask."]),
        ("ge", PIXEL, ["nut: pixel AUROC, AP, F1 and AUPRO not defined: no defective image with a mask."]),
        ("ga", set(), []),
        (
            "a",
            IMAGE | PIXEL,
            [
                "nut: image AUROC, AP and F1 not defined: no good image.",
                "nut: pixel AUROC, AP, F1 and AUPRO not defined: no pixel that is good.",
            ],
        ),
    ],
)
def test_a_set_is_measured_or_said_why_not(photo, images, missing, told):
    dataset = AnomalyDataset(a_set(photo, "nut", images))
    seen = survey(dataset, range(len(dataset)))
    assert set(seen.undefined().get("nut", {})) == missing
    assert [sentence for sentence in seen.sentences() if "not defined" in sentence] == told

    truths = read_truths(dataset, range(len(dataset)), SIZE)
    rng = np.random.default_rng(0)
    found = measure(truths, rng.random(len(truths)), rng.random((len(truths), SIZE, SIZE)))
    assert set(found) == (IMAGE | PIXEL) - missing
    assert np.isfinite(list(found.values())).all()


def test_masks_are_counted_by_category(photo):
    dataset = AnomalyDataset(a_set(photo, "nut", "ggmmmen") + a_set(photo, "bolt", "gm"))
    seen = survey(dataset, range(len(dataset)))
    assert seen.counts() == {
        "bolt": {"good": 1, "defective": 1, "masks": 1, "empty masks": 0, "no masks": 0},
        "nut": {"good": 2, "defective": 5, "masks": 3, "empty masks": 1, "no masks": 1},
    }
    assert seen.sentences() == [
        "4 of 6 defective images have a mask that is used, 1 an empty one, 1 none.",
        "nut: 3 of 5 defective images have a mask that is used, 1 an empty one, 1 none.",
    ]


def test_one_category_may_lack_what_another_has(photo):
    dataset = AnomalyDataset(a_set(photo, "nut", "gm") + a_set(photo, "bolt", "g"))
    seen = survey(dataset, range(len(dataset)))
    seen.check()
    assert list(seen.undefined()) == ["bolt"]


def test_masks_that_cover_most_are_warned_about(photo):
    samples = [*a_set(photo, "nut", "gm"), *(Sample(photo, "nut", "dent", mask(0.75)) for _ in range(2))]
    notes = survey(AnomalyDataset(samples), range(4)).notes()
    assert notes == [
        "2 masks cover more than half of their images, as inverted ones do: they were taken as they are, bright for "
        "defect."
    ]


def test_how_masks_were_read_is_said_once(photo):
    odd = Image.fromarray(np.eye(SIZE, dtype=np.uint8))
    dataset = AnomalyDataset([Sample(photo, "nut"), *(Sample(photo, "nut", "dent", odd) for _ in range(3))])
    assert survey(dataset, range(4)).notes() == ["3 masks read by the rule: the larger of two values is defect."]


def test_nothing_to_measure_is_refused(photo):
    seen = survey(AnomalyDataset(a_set(photo, "nut", "gg")), range(2))
    with pytest.raises(ValueError, match=r"Nothing can be measured on these images\. nut: .* no defective image\.$"):
        seen.check()
    seen.check(decides=True)  # false alarms can be counted


def test_masks_that_cannot_be_read_are_all_told(photo, tmp_path):
    (tmp_path / "mask.png").write_bytes(b"no mask")
    samples = [Sample(photo, "nut"), *(Sample(photo, "nut", "dent", tmp_path / "mask.png") for _ in range(3))]
    with pytest.raises(ValueError, match=r"^The mask mask\.png of .*photo\.png cannot be read .* 2 others\.$"):
        survey(AnomalyDataset(samples), range(4)).check()


def test_images_are_checked_too_where_asked(photo):
    def refuse(image):
        raise ValueError("of another range")

    assert survey(AnomalyDataset(a_set(photo, "nut", "g")), range(1), refuse).errors == ("of another range",)


def test_a_truth_knows_its_label():
    assert Truth(0, "nut", "good", np.zeros((2, 2), bool)).label == 0
    assert Truth(0, "nut", "dent", None).label == 1

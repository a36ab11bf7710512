"""Figures of the page, by what is drawn in them."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from rad import visualization
from rad.visualization import (
    encode_map,
    restoration_sheet,
    results_figure,
    score_figure,
    title_of,
    verdict_picture,
)

GOOD = np.linspace(-2.0, 2.0, 41)
SPACE = "{http://www.w3.org/2000/svg}"


def words(figure: str) -> str:
    return " ".join("".join(text.itertext()) for text in ElementTree.fromstring(figure).iter(f"{SPACE}text"))


def test_a_figure_is_sound_and_takes_the_colour_of_the_text_around_it():
    figure = score_figure(GOOD, 1.9, 0.05, [0.5], 'Scores of "<parts>" & more')
    root = ElementTree.fromstring(figure)
    assert root.get("role") == "img" and root.get("aria-label") == 'Scores of "<parts>" & more'
    assert "currentColor" in figure and "#000000" not in figure
    assert "41 good images" in words(figure) and "alarm, 5 % of good ones" in words(figure)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5], "picture without alarm"),
        ([2.5], "picture with alarm"),
        ([0.5, 1.0, 2.5], "2 x picture without alarm 1 x picture with alarm"),
        ([99.0], "(99, beyond the right edge)"),
        ([0.0, 99.0, 98.0], "(2 beyond the right edge)"),
    ],
)
def test_scores_stand_on_their_side_of_the_alarm(scores, expected):
    found = words(score_figure(GOOD, 1.9, 0.05, scores, ""))
    assert expected in found
    assert ("beyond" in found) == ("beyond" in expected)


def test_marks_stand_where_their_scores_lie():
    """In the same figure, a score half way between two others is drawn half way between them."""
    figure = score_figure(GOOD, 1.9, 0.05, [-1.0, 0.0, 1.0], "")
    places = [
        float(x) for x in re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)" y="[\d.]+" style="fill: #009e73', figure)
    ]
    assert len(places) == 4, "three marks and one in the legend"
    low, middle, high = sorted(places[:3])
    assert middle - low == pytest.approx(high - middle, rel=1e-3)


def test_no_scores_and_equal_scores_make_figures_too():
    assert "picture" not in words(score_figure(GOOD, 1.9, 0.05, [], ""))
    assert "<svg" in score_figure(np.zeros(10), 0.0, 0.05, [0.0], "")


def test_maps_as_numbers_of_16_bits():
    encoded = np.asarray(encode_map(np.array([[-9.0, -8.0, 0.0, 1.0, 2.5, 55.0, 60.0]])))
    assert encoded.dtype == np.uint16
    assert encoded.tolist() == [[0, 0, 8192, 9216, 10752, 64512, 65535]]


def test_a_value_has_one_colour_whatever_else_the_map_holds():
    image, shown = Image.new("RGB", (64, 64), (90, 90, 90)), []
    for largest in (3.0, 50.0):
        values = np.full((64, 64), 3.0, np.float32)
        values[:8, :8], values[-8:] = largest, 1.0
        pixels = np.asarray(verdict_picture(image, values, np.zeros((64, 64), bool), 2.0, False, (1.0, 5.0), side=64))
        shown.append(pixels[:, 68:])
    assert np.array_equal(shown[0][16:, 16:], shown[1][16:, 16:])
    assert (shown[0][-4:] == 90).all() and (shown[0][32, 32] != 90).any()  # where the range starts there is no heat


def test_without_statistics_the_colours_span_the_images_own_values():
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    picture = verdict_picture(Image.new("RGB", (64, 64)), values, np.zeros((64, 64), bool), None, False, side=64)
    heat = np.asarray(picture)[:, 68:].sum(axis=2)
    assert (heat[:30] == 0).all() and heat[-1, -1] > heat[48, 32] > 0


def test_a_results_figure_claims_no_rarer_p_value_than_the_good_images_bear_out(
    two_category_pipeline, two_category_images, part, monkeypatch
):
    figures, (images, names) = [], two_category_images
    monkeypatch.setattr(visualization, "_render", figures.append)
    results_figure(two_category_pipeline, [images[0], part], [names[0], "gravel"], restore=False)
    good, bad = (axis.texts[0].get_text() for axis in figures[0].axes[1::2])
    assert bad == "defect, p < 0.0083"  # of 12 good images
    assert re.fullmatch(r"good, p = [\d.]+", good)


def test_titles_are_the_registrys():
    assert title_of("pixel") == "KL" and title_of("global") == "whole image" and title_of("truth") == "truth"


def test_a_sheet_shows_each_image_beside_what_it_became():
    pairs = [(Image.new("RGB", (50, 40), (i, 0, 0)), Image.new("RGB", (50, 40), (0, i, 0))) for i in range(1, 6)]
    sheet = restoration_sheet(pairs, ["found"] * 5, side=30, num_columns=2)
    assert sheet.size == (2 * 70 + 10, 3 * 60 + 10)
    for i in range(5):
        x, y = 10 + i % 2 * 70 + 15, 10 + i // 2 * 60 + 15
        assert sheet.getpixel((x, y)) == (i + 1, 0, 0) and sheet.getpixel((x + 30, y)) == (0, i + 1, 0)
    long = Image.new("RGB", (100, 400), "grey")
    long.paste((255, 0, 0), (0, 390, 100, 400))  # a defect at its end
    reds = np.asarray(restoration_sheet([(long, long)], ["found"], side=80)).astype(int) @ [1, -1, 0]
    assert reds.max() > 100
    assert restoration_sheet(pairs[:1], ["found"], side=30).size == (80, 70)

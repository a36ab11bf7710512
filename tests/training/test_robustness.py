"""False alarms through another camera, as the command counts them."""

import json

import numpy as np
import pytest
import robustness
from PIL import Image


@pytest.fixture
def photos(good_images, tmp_path):
    for number, image in enumerate(good_images[:3]):
        path = tmp_path / "photos" / "test" / "good" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    bad = tmp_path / "photos" / "test" / "hole" / "0.png"
    bad.parent.mkdir()
    Image.new("RGB", (64, 64), "red").save(bad)
    return tmp_path / "photos"


def test_alarms_are_those_of_the_changed_pictures(pipeline, photos, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--data_dir", str(photos), "--output", str(tmp_path / "out.json")]
    table = robustness.main(robustness.parse_args(flags))
    assert list(table) == list(robustness.CHANGES)
    images = [Image.open(photos / "test" / "good" / f"{i}.png").convert("RGB") for i in range(3)]
    for name in ("as they are", "JPEG, quality 60", "out of focus (0.7 pixels)"):
        p_values = pipeline([robustness.CHANGES[name](image) for image in images]).p_value
        assert table[name]["0.1"] == pytest.approx(np.mean(p_values <= 0.1))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == {"images": 3, "alarms": table}
    assert "| JPEG, quality 95 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in robustness.CHANGES if name != "as they are"])
def test_changes_are_small_and_keep_grey_pictures_grey(good_images, name):
    image = good_images[0].convert("L").convert("RGB")
    before, after = (np.asarray(one, float) for one in (image, robustness.CHANGES[name](image)))
    assert after.shape == before.shape and 0 < np.abs(after - before).mean() < 30
    assert (after == after[..., :1]).all() or "WebP" in name


def test_a_folder_without_good_test_images_is_refused(good_images, tmp_path):
    for name in ("train/good/0.png", "test/hole/0.png"):
        (tmp_path / "brick" / name).parent.mkdir(parents=True)
        good_images[0].save(tmp_path / "brick" / name)
    with pytest.raises(ValueError, match="no good test images"):
        robustness.main(robustness.parse_args(["--data_dir", str(tmp_path), "--dataset_format", "mvtec"]))

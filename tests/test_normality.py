"""What good images look like: distances against plain NumPy, and scores, p-values and thresholds on fresh draws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rad import NormalityModel
from rad.models.normality import SCORE_TYPES, stack_raw_maps

CHANNELS, GRID, DIRECTIONS, MAP, TIMESTEPS = 6, 4, 4, 8, (20, 201)
CONFIG = {"gaussian_channels": DIRECTIONS, "timesteps": TIMESTEPS, "top_k": 8}
COUNT = 100


class GoodImages:
    """Draws of good images: features and raw maps whose mean and deviation differ from position to position."""

    def __init__(self, seed: int, offset: float = 0.0):
        self.rng = np.random.default_rng(seed)
        mixing = np.random.default_rng(7).standard_normal((CHANNELS, CHANNELS)) / CHANNELS**0.5 + np.eye(CHANNELS)
        layout = np.random.default_rng(8)
        self.mixing = mixing
        self.mean = layout.normal(offset, 3.0, (CHANNELS, GRID, GRID))
        self.location = layout.uniform(1, 5, (3 * len(TIMESTEPS), MAP, MAP))
        self.deviation = layout.uniform(0.5, 1.5, (3 * len(TIMESTEPS), MAP, MAP))

    def features(self, count: int) -> torch.Tensor:
        noise = self.rng.standard_normal((count, CHANNELS, GRID, GRID))
        return torch.from_numpy(np.einsum("cd,ndhw->nchw", self.mixing, noise) + self.mean).float()

    def raw_maps(self, count: int) -> torch.Tensor:
        noise = self.rng.standard_normal((count, *self.location.shape))
        return torch.from_numpy(self.location + self.deviation * noise).float()


def score(model: NormalityModel, features: torch.Tensor, raw_maps: torch.Tensor, label: int = 0):
    """Calibrated maps and image scores of each type, as the pipeline makes them."""
    labels = [label] * len(features)
    distance = model.distance(features, labels)[:, None]
    distance = F.interpolate(distance, (MAP, MAP), mode="bilinear")
    maps = model.calibrate(torch.cat([raw_maps, distance], dim=1), labels)
    return maps, {name: model.image_scores(values, labels, name) for name, values in maps.items()}


@pytest.fixture(scope="module")
def good() -> GoodImages:
    return GoodImages(seed=0)


@pytest.fixture(scope="module")
def fitted_on(good) -> tuple[torch.Tensor, torch.Tensor]:
    return good.features(COUNT), good.raw_maps(COUNT)


@pytest.fixture(scope="module")
def model(fitted_on) -> NormalityModel:
    return NormalityModel.fit(fitted_on[0], [0] * COUNT, fitted_on[1], ["tile"], **CONFIG)


@pytest.fixture(scope="module")
def fresh(model) -> tuple[dict, dict]:
    """Maps and scores of 500 good images that the model has not seen."""
    images = GoodImages(seed=1)
    return score(model, images.features(500), images.raw_maps(500))


# Gaussian of features


def shrunk_covariances(x: np.ndarray, blocks: int) -> np.ndarray:
    """Covariances [blocks, blocks, P, P] of features [N, P, g, g], loop by loop.

    Residuals of all positions of a block; their mean over blocks counts as P more observations; 0.01 I is added.
    """
    count, channels, size, _ = x.shape
    side = size // blocks
    residuals = x - x.mean(0)
    covariances = np.zeros((blocks, blocks, channels, channels))
    for i in range(blocks):
        for j in range(blocks):
            for row in range(i * side, (i + 1) * side):
                for column in range(j * side, (j + 1) * side):
                    for residual in residuals[:, :, row, column]:
                        covariances[i, j] += np.outer(residual, residual) / (count * side**2)
    shared = covariances.mean((0, 1))
    weight = count * side**2
    return (weight * covariances + channels * shared) / (weight + channels) + 0.01 * np.eye(channels)


@pytest.mark.parametrize("blocks", [4, 2, 1])
def test_distance_is_mahalanobis_and_so_is_its_gradient(good, fitted_on, blocks):
    features, raw_maps = fitted_on[0][:30], fitted_on[1][:30]
    model = NormalityModel.fit(features, [0] * 30, raw_maps, ["tile"], gaussian_blocks=blocks, **CONFIG)
    assert list(model.config.pooled) == [False]
    basis = model.projection.double().numpy()
    x = np.einsum("nchw,cp->nphw", features.double().numpy(), basis)
    covariances = shrunk_covariances(x, blocks)

    fresh = good.features(3).requires_grad_()
    distance = model.distance(fresh, [0, 0, 0])
    distance.sum().backward()
    residuals = np.einsum("nchw,cp->nphw", fresh.detach().double().numpy(), basis) - x.mean(0)
    for n, row, column in np.ndindex(3, GRID, GRID):
        residual = residuals[n, :, row, column]
        solved = np.linalg.solve(covariances[row * blocks // GRID, column * blocks // GRID], residual)
        expected = np.sqrt(residual @ solved)
        assert distance[n, row, column].item() == pytest.approx(expected, rel=1e-3)
        np.testing.assert_allclose(
            fresh.grad[n, :, row, column], basis @ solved / expected, rtol=1e-2, atol=1e-3 * np.abs(solved).max()
        )


def test_pooled_distance_is_that_of_one_gaussian_for_all_positions():
    features = torch.randn(40, CHANNELS, GRID, GRID) * torch.linspace(0.5, 2, CHANNELS).view(-1, 1, 1)
    raw_maps = GoodImages(0).raw_maps(40)
    model = NormalityModel.fit(features, [0] * 40, raw_maps, ["grass"], **CONFIG)
    assert list(model.config.pooled) == [True]
    x = np.einsum("nchw,cp->nhwp", features.double().numpy(), model.projection.double().numpy())
    flat = x.reshape(-1, DIRECTIONS)
    covariance = np.cov(flat.T, bias=True) + 0.01 * np.eye(DIRECTIONS)
    residuals = x[:2] - flat.mean(0)
    expected = np.sqrt(np.einsum("nhwp,pq,nhwq->nhw", residuals, np.linalg.inv(covariance), residuals))
    np.testing.assert_allclose(model.distance(features[:2], [0, 0]), expected, rtol=1e-3)


def test_projection_is_orthonormal(model):
    np.testing.assert_allclose(model.projection.T @ model.projection, np.eye(DIRECTIONS), atol=1e-5)


def test_distance_on_good_images_is_about_the_root_of_the_directions(model):
    squares = model.distance(GoodImages(seed=2).features(300), [0] * 300).square()
    assert squares.mean().item() == pytest.approx(DIRECTIONS, rel=0.15)


def test_the_gradient_at_the_mean_is_finite(model):
    features = torch.einsum("phw,cp->chw", model.mean[0], model.projection)[None].requires_grad_()
    model.distance(features, [0]).sum().backward()
    assert features.grad.isfinite().all()


def test_distance_grows_with_the_step_from_the_mean(model, good):
    centre = torch.einsum("phw,cp->chw", model.mean[0], model.projection)[None]
    step = torch.randn(1, CHANNELS, GRID, GRID)
    distances = torch.cat([model.distance(centre + scale * step, [0]) for scale in (1.0, 2.0, 4.0)])
    torch.testing.assert_close(distances[1:], 2 * distances[:-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("moving", [False, True])
def test_objects_that_move_get_one_gaussian_for_all_positions(moving):
    """An edge down the image: at the same place in each, or anywhere."""
    rng = np.random.default_rng(0)
    features = 0.3 * rng.standard_normal((40, CHANNELS, 8, 8))
    for image in features:
        edge = np.zeros((8, 8))
        edge[:, 3:5] = 2.0
        image += np.roll(edge, rng.integers(8) if moving else 0, axis=1)
    raw_maps = GoodImages(0).raw_maps(40)
    model = NormalityModel.fit(torch.from_numpy(features).float(), [0] * 40, raw_maps, ["nut"], **CONFIG)
    assert list(model.config.pooled) == [moving]


# Held out


def test_scores_behind_thresholds_are_held_out():
    """With few images the Gaussian fits those it saw too well: thresholds from them would call fresh ones bad."""
    good = GoodImages(seed=3)
    features, raw_maps = good.features(15), good.raw_maps(15)
    model = NormalityModel.fit(features, [0] * 15, raw_maps, ["tile"], **CONFIG)
    seen = score(model, features, raw_maps)[1]["mahalanobis"]
    fresh = score(model, good.features(300), good.raw_maps(300))[1]["mahalanobis"]
    assert abs(fresh.mean().item()) < 0.8
    assert seen.mean().item() < fresh.mean().item() - 1.0


def test_only_the_last_images_are_scored(fitted_on):
    model = NormalityModel.fit(fitted_on[0], [0] * COUNT, fitted_on[1][:30], ["tile"], **CONFIG)
    assert model.config.num_scores == 30 and model.good_scores.shape == (len(SCORE_TYPES), 30)
    mean = model.project(fitted_on[0]).mean(0)
    torch.testing.assert_close(model.mean[0], mean, rtol=1e-3, atol=1e-3)  # the Gaussian is of all


# Calibrated maps and scores


@pytest.mark.parametrize("name", SCORE_TYPES)
def test_good_maps_have_about_unit_deviation(fresh, name):
    maps = fresh[0][name]
    assert maps.shape == (500, MAP, MAP)
    assert maps.std().item() == pytest.approx(1.0, abs=0.15)
    assert maps.mean().item() == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("name", SCORE_TYPES)
def test_good_image_scores_have_about_zero_mean_and_unit_deviation(fresh, name):
    scores = fresh[1][name]
    assert scores.mean().item() == pytest.approx(0.0, abs=0.35)
    assert scores.std().item() == pytest.approx(1.0, abs=0.3)


def test_the_fused_map_is_the_weighted_sum(model, fresh):
    maps = fresh[0]
    weighted = sum(
        w * maps[name] for w, name in zip(model.config.weights, ("pixel", "feature", "mahalanobis"), strict=True)
    )
    ratio = weighted / maps["fused"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, model.map_scale[0, 0].item()), rtol=1e-2, atol=1e-3)


def test_a_defect_stands_out_where_it_is(model):
    images = GoodImages(seed=4)
    features, raw_maps = images.features(1), images.raw_maps(1)
    features[:, :, 1, 2] += 8.0
    raw_maps[:, :, 2:4, 4:6] += 8.0
    maps, scores = score(model, features, raw_maps)
    for name in SCORE_TYPES:
        row, column = np.unravel_index(maps[name][0].argmax().item(), (MAP, MAP))
        assert 1 <= row <= 4 and 3 <= column <= 6, name
        assert model.p_value(scores[name], name)[0] < 0.01, name


def test_scores_do_not_depend_on_the_batch(model):
    images = GoodImages(seed=5)
    features, raw_maps = images.features(4), images.raw_maps(4)
    together = score(model, features, raw_maps)[1]["fused"]
    alone = torch.cat([score(model, features[i : i + 1], raw_maps[i : i + 1])[1]["fused"] for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_raw_maps_are_stacked_on_one_grid():
    kl, error, rgb, distance = (
        torch.rand(2, 2, 16, 16),
        torch.rand(2, 2, 4, 4),
        torch.rand(2, 2, 16, 16),
        torch.rand(2, 4, 4),
    )
    stacked = stack_raw_maps(kl, error, rgb, 8, distance)
    assert stacked.shape == (2, 7, 8, 8) and stack_raw_maps(kl, error, rgb, 8).shape == (2, 6, 8, 8)
    torch.testing.assert_close(stacked[:, :2], F.avg_pool2d(kl, 2))
    torch.testing.assert_close(stacked[:, 4:6], F.avg_pool2d(rgb, 2))
    torch.testing.assert_close(stacked[:, 2:4], F.interpolate(error, (8, 8), mode="bilinear"))
    torch.testing.assert_close(stacked[:, 6:], F.interpolate(distance[:, None], (8, 8), mode="bilinear"))


# p-values and thresholds


@pytest.mark.parametrize("name", SCORE_TYPES)
def test_p_values_fall_as_scores_rise(model, name):
    scores = torch.cat([torch.linspace(-20, 20, 2001), model.good_scores[SCORE_TYPES.index(name)]]).sort().values
    p = model.p_value(scores, name)
    assert (p.diff() <= 0).all() and p.min() > 0 and p.max() == 1
    assert (model.p_value(torch.tensor([-1e6, 1e6]), name) > 0).all()


@pytest.mark.parametrize("name", SCORE_TYPES)
def test_the_false_alarm_rate_is_as_stated(model, fresh, name):
    """At 10 %: three deviations of 100 calibration and 500 fresh images are (.03**2 + .013**2)**.5 * 3 = .10."""
    alarms = (model.p_value(fresh[1][name], name) <= 0.1).double().mean().item()
    assert 0.02 <= alarms <= 0.2


def test_p_values_of_good_images_are_about_uniform(model, fresh):
    p = model.p_value(fresh[1]["fused"])
    for rate in (0.25, 0.5, 0.75):
        assert (p <= rate).double().mean().item() == pytest.approx(rate, abs=0.17)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9])
def test_the_p_value_of_a_threshold_is_its_rate(model, rate):
    threshold = torch.tensor([model.score_threshold(rate)], dtype=torch.float64)
    assert model.p_value(threshold).item() == pytest.approx(rate, abs=1 / 101 + 1e-6 if rate >= 0.1 else 1e-6)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9])
def test_thresholds_and_p_values_decide_alike(model, fresh, rate):
    scores = torch.cat([fresh[1]["fused"], model.good_scores[0]])
    assert torch.equal(model.p_value(scores) <= rate, scores.double() > model.score_threshold(rate))


def test_score_thresholds_fall_with_the_rate(model):
    thresholds = [model.score_threshold(rate) for rate in np.logspace(-6, -0.01, 300)]
    assert (np.diff(thresholds) <= 0).all()


@pytest.mark.parametrize("name", SCORE_TYPES)
def test_pixel_thresholds_fall_with_the_rate_and_hold_on_fresh_pixels(model, fresh, name):
    rates = np.append(np.logspace(-5, 0, 200), 1.0)
    thresholds = [model.pixel_threshold(rate, name) for rate in rates]
    assert (np.diff(thresholds) <= 0).all()
    for rate in (0.01, 0.1, 0.5):
        exceeded = (fresh[0][name] > model.pixel_threshold(rate, name)).double().mean().item()
        assert rate / 2 <= exceeded <= rate * 1.5


def test_one_score_is_enough_for_thresholds():
    """Two images are the fewest: everything stays finite."""
    good = GoodImages(seed=6)
    model = NormalityModel.fit(good.features(2), [0, 0], good.raw_maps(2), ["tile"], **CONFIG)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    p = model.p_value(torch.linspace(-5, 50, 100))
    assert (p.diff() <= 0).all() and (p > 0).all()
    assert np.isfinite([model.score_threshold(rate) for rate in (0.001, 0.1, 0.5)]).all()


# Categories


@pytest.fixture(scope="module")
def two_categories() -> tuple[NormalityModel, list[GoodImages]]:
    draws = [GoodImages(seed=10, offset=-1.0), GoodImages(seed=11, offset=1.0)]
    features = torch.stack([d.features(20) for d in draws], dim=1).flatten(0, 1)  # in turn
    raw_maps = torch.stack([d.raw_maps(20) for d in draws], dim=1).flatten(0, 1)
    raw_maps[1::2] = 3 * raw_maps[1::2] + 5
    return NormalityModel.fit(features, [0, 1] * 20, raw_maps, ["nut", "tile"], **CONFIG), draws


def test_classify_picks_the_category(two_categories):
    model, draws = two_categories
    assert model.classify(draws[0].features(10)) == [0] * 10
    assert model.classify(draws[1].features(10)) == [1] * 10
    mixed = torch.cat([draws[1].features(1), draws[0].features(1)])
    assert model.classify(mixed) == [1, 0]


def test_each_category_has_its_own_units(two_categories):
    model, draws = two_categories
    for label, images in enumerate(draws):
        raw_maps = images.raw_maps(200) if label == 0 else 3 * images.raw_maps(200) + 5
        maps, scores = score(model, images.features(200), raw_maps, label)
        assert maps["fused"].std().item() == pytest.approx(1.0, abs=0.3)
        assert scores["fused"].mean().item() == pytest.approx(0.0, abs=0.6)


def test_a_batch_may_mix_categories(two_categories):
    model, draws = two_categories
    features = torch.cat([draws[0].features(1), draws[1].features(1)])
    mixed = model.distance(features, [0, 1])
    torch.testing.assert_close(mixed[0], model.distance(features[:1], [0])[0])
    torch.testing.assert_close(mixed[1], model.distance(features[1:], [1])[0])


# Refusals and files


def test_a_category_with_one_image_is_refused(fitted_on):
    features, raw_maps = fitted_on[0][:5], fitted_on[1][:5]
    with pytest.raises(ValueError, match="'tile' has 1 good images to calibrate on; it needs at least 2"):
        NormalityModel.fit(features, [0, 0, 0, 0, 1], raw_maps, ["nut", "tile"], **CONFIG)


def test_an_unknown_score_type_is_refused(model):
    with pytest.raises(ValueError):
        model.p_value(torch.zeros(1), "l2")


def test_save_and_load_are_bit_exact_in_half_precision(fitted_on, tmp_path):
    model = NormalityModel.fit(fitted_on[0], [0] * COUNT, fitted_on[1], ["tile"], **CONFIG).half()
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = NormalityModel.from_pretrained(tmp_path)
    assert loaded.config.pooled == list(model.config.pooled) and list(loaded.config.categories) == ["tile"]
    saved, restored = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert saved.keys() == restored.keys()
    for name, buffer in saved.items():
        assert torch.equal(buffer.float(), restored[name].float()), name
    assert torch.equal(loaded.distance(fitted_on[0], [0] * COUNT), model.float().distance(fitted_on[0], [0] * COUNT))


def test_half_precision_changes_little(model, fitted_on, tmp_path):
    model.save_pretrained(tmp_path)
    rounded = NormalityModel.from_pretrained(tmp_path).half().float()
    scores = score(model, *fitted_on)[1]["fused"]
    torch.testing.assert_close(score(rounded, *fitted_on)[1]["fused"], scores, rtol=0.02, atol=0.05)


def test_one_category_at_the_default_sizes_is_under_10_mb(tmp_path):
    NormalityModel(num_scores=1000).half().save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10e6

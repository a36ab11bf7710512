"""What good images look like: distances against plain NumPy, and scores, p-values and thresholds on fresh draws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rad import NormalityModel
from rad.models.normality import SCORE_TYPES, stack_raw_maps

CHANNELS, SIDE, GRID, DIRECTIONS, MAP, TIMESTEPS = 6, 8, 4, 4, 8, (20, 201)
CONFIG = {"gaussian_channels": DIRECTIONS, "timesteps": TIMESTEPS, "top_k": 8}
COUNT = 100


class GoodImages:
    """Draws of good images: features, residuals and raw maps with a mean and a deviation at each position."""

    def __init__(self, seed: int, offset: float = 0.0):
        self.rng = np.random.default_rng(seed)
        layout = np.random.default_rng(8)
        self.mixing = layout.standard_normal((2, CHANNELS, CHANNELS)) / CHANNELS**0.5 + np.eye(CHANNELS)
        self.mean = layout.normal(offset, 3.0, (CHANNELS, SIDE, SIDE))
        self.location = layout.uniform(1, 5, (3 * len(TIMESTEPS), MAP, MAP))
        self.deviation = layout.uniform(0.5, 1.5, (3 * len(TIMESTEPS), MAP, MAP))

    def _draw(self, count: int, mixing: np.ndarray) -> np.ndarray:
        return np.einsum("cd,ndhw->nchw", mixing, 2 * self.rng.standard_normal((count, CHANNELS, SIDE, SIDE)))

    def features(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self._draw(count, self.mixing[0]) + self.mean).float()

    def residuals(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self._draw(count, self.mixing[1]) + 0.2 * self.mean).float()

    def raw_maps(self, count: int) -> torch.Tensor:
        noise = self.rng.standard_normal((count, *self.location.shape))
        return torch.from_numpy(self.location + self.deviation * noise).float()

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.features(count), self.residuals(count), self.raw_maps(count)


def fit(features, residuals, raw_maps, labels=None, categories=("tile",), **config) -> NormalityModel:
    labels = [0] * len(features) if labels is None else labels
    return NormalityModel.fit(features, residuals, labels, raw_maps, list(categories), **CONFIG | config)


def score(model: NormalityModel, features, residuals, raw_maps, label: int = 0):
    """Calibrated maps and image scores of each type, as the pipeline makes them."""
    labels = [label] * len(features)
    distances = [model.distance(residuals, labels, residual=True), model.distance(features, labels)]
    distances = F.interpolate(torch.stack(distances, dim=1), (MAP, MAP), mode="bilinear")
    maps = model.calibrate(torch.cat([raw_maps, distances], dim=1), labels)
    return maps, {name: model.image_scores(values, labels, name) for name, values in maps.items()}


@pytest.fixture(scope="module")
def fitted_on() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return GoodImages(seed=0).draw(COUNT)


@pytest.fixture(scope="module")
def model(fitted_on) -> NormalityModel:
    return fit(*fitted_on)


@pytest.fixture(scope="module")
def fresh(model) -> tuple[dict, dict]:
    """Maps and scores of 500 good images that the model has not seen."""
    return score(model, *GoodImages(seed=1).draw(500))


# Gaussians


def projected(model: NormalityModel, features: torch.Tensor) -> np.ndarray:
    """Features averaged over the cells of the Gaussians' grid, in their directions, [N, P, g, g], float64."""
    x = features.detach().double().numpy()
    cells = x.reshape(len(x), CHANNELS, GRID, SIDE // GRID, GRID, SIDE // GRID).mean((3, 5))
    return np.einsum("nchw,cp->nphw", cells, model.projection.double().numpy())


def shrunk_covariances(x: np.ndarray, blocks: int) -> np.ndarray:
    """Covariances [blocks, blocks, P, P] of features [N, P, g, g], loop by loop.

    The mean over all blocks counts as ten more images; 0.01 I is added.
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
    return (count * covariances + 10 * covariances.mean((0, 1))) / (count + 10) + 0.01 * np.eye(channels)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("blocks", [4, 2, 1])
def test_distance_is_mahalanobis_and_so_is_its_gradient(fitted_on, blocks, residual):
    draws = [x[:30] for x in fitted_on]
    model = fit(*draws, gaussian_blocks=blocks)
    assert list(model.config.pooled) == [False]
    x = projected(model, draws[int(residual)])
    covariances = shrunk_covariances(x, blocks)

    fresh = GoodImages(seed=2).draw(3)[int(residual)].requires_grad_()
    distance = model.distance(fresh, [0, 0, 0], residual=residual)
    distance.sum().backward()
    deviations = projected(model, fresh) - x.mean(0)
    basis = model.projection.double().numpy()
    for n, row, column in np.ndindex(3, GRID, GRID):
        deviation = deviations[n, :, row, column]
        solved = np.linalg.solve(covariances[row * blocks // GRID, column * blocks // GRID], deviation)
        expected = np.sqrt(deviation @ solved)
        assert distance[n, row, column].item() == pytest.approx(expected, rel=1e-3)
        gradient = basis @ solved / expected / 4  # each of the four features of a cell
        actual = fresh.grad[n, :, 2 * row + 1, 2 * column]
        np.testing.assert_allclose(actual, gradient, rtol=1e-2, atol=1e-3 * np.abs(gradient).max())


def test_pooled_distance_is_that_of_one_gaussian_for_all_positions():
    features, residuals = torch.randn(2, 40, CHANNELS, SIDE, SIDE) * torch.linspace(1, 4, CHANNELS).view(-1, 1, 1)
    model = fit(features, residuals, GoodImages(0).raw_maps(40))
    assert list(model.config.pooled) == [True]
    x = projected(model, features).transpose(0, 2, 3, 1)
    flat = x.reshape(-1, DIRECTIONS)
    covariance = np.cov(flat.T, bias=True) + 0.01 * np.eye(DIRECTIONS)
    deviations = x[:2] - flat.mean(0)
    expected = np.sqrt(np.einsum("nhwp,pq,nhwq->nhw", deviations, np.linalg.inv(covariance), deviations))
    np.testing.assert_allclose(model.distance(features[:2], [0, 0]), expected, rtol=1e-3)


def test_projection_is_orthonormal(model):
    np.testing.assert_allclose(model.projection.T @ model.projection, np.eye(DIRECTIONS), atol=1e-5)


def test_distance_on_good_images_is_about_the_root_of_the_directions(model):
    squares = model.distance(GoodImages(seed=2).features(300), [0] * 300).square()
    assert squares.mean().item() == pytest.approx(DIRECTIONS, rel=0.15)


def features_at_the_mean(model: NormalityModel) -> torch.Tensor:
    cells = torch.einsum("phw,cp->chw", model.mean[0, 0], model.projection)
    return cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[None]


def test_the_gradient_at_the_mean_is_finite(model):
    features = features_at_the_mean(model).requires_grad_()
    model.distance(features, [0]).sum().backward()
    assert features.grad.isfinite().all()


def test_distance_is_proportional_to_the_step_from_the_mean(model):
    centre, step = features_at_the_mean(model), torch.randn(1, CHANNELS, SIDE, SIDE)
    distances = torch.cat([model.distance(centre + scale * step, [0]) for scale in (1.0, 2.0, 4.0)])
    torch.testing.assert_close(distances[1:], 2 * distances[:-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("moving", [False, True])
def test_objects_that_move_get_one_gaussian_for_all_positions(moving):
    """An edge down the image: at the same place in each, or anywhere."""
    rng = np.random.default_rng(0)
    features = 0.3 * rng.standard_normal((40, CHANNELS, SIDE, SIDE))
    for image in features:
        edge = np.zeros((SIDE, SIDE))
        edge[:, 3:5] = 2.0
        image += np.roll(edge, rng.integers(SIDE) if moving else 0, axis=1)
    residuals = 0.3 * torch.randn(40, CHANNELS, SIDE, SIDE)
    model = fit(torch.from_numpy(features).float(), residuals, GoodImages(0).raw_maps(40), categories=["nut"])
    assert list(model.config.pooled) == [moving]


# Held out


@pytest.mark.parametrize("name", ["residual", "mahalanobis"])
def test_scores_behind_thresholds_are_held_out(name):
    """Of few images a Gaussian fits those it saw too well: thresholds from them would call fresh ones bad."""
    good = GoodImages(seed=3)
    few = good.draw(10)
    model = fit(*few, gaussian_channels=CHANNELS)
    seen, fresh = (score(model, *draws)[1][name].mean().item() for draws in (few, good.draw(300)))
    assert abs(fresh) < 1.0
    assert seen < fresh - 1.5


def test_deviations_behind_thresholds_are_held_out():
    """The same for location and deviation of the raw maps, which are those of six images here."""
    good = GoodImages(seed=3)
    draws = good.draw(6)
    model = fit(*draws)
    z = (draws[2] - model.location[0, :-2]) / model.scale[0, :-2]
    assert z.square().mean() < 1.02  # in their own units the images deviate by 1 at most
    # held out they deviate by more, which the scale of the combined maps has taken in
    assert model.map_scale[0, 1:3].min() > z.unflatten(1, (3, -1)).mean(2).std() * 1.02


def test_only_the_last_images_are_scored(fitted_on):
    features, residuals, raw_maps = fitted_on
    model = fit(features, residuals, raw_maps[:30])
    assert model.config.num_scores == 30 and model.good_scores.shape == (len(SCORE_TYPES), 30)
    mean = projected(model, features).mean(0)
    np.testing.assert_allclose(model.mean[0, 0], mean, rtol=1e-3, atol=1e-3)  # the Gaussian is of all


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
        w * maps[name]
        for w, name in zip(model.config.weights, ("pixel", "feature", "residual", "mahalanobis"), strict=True)
    )
    ratio = weighted / maps["fused"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, model.map_scale[0, 0].item()), rtol=1e-2, atol=1e-3)


def test_a_defect_stands_out_where_it_is(model):
    draws = GoodImages(seed=4).draw(1)
    for values in draws:
        values[:, :, 2:4, 4:6] += 8.0
    maps, scores = score(model, *draws)
    for name in SCORE_TYPES:
        row, column = np.unravel_index(maps[name][0].argmax().item(), (MAP, MAP))
        assert 1 <= row <= 4 and 3 <= column <= 6, name
        assert model.p_value(scores[name], name)[0] < 0.01, name


def test_scores_do_not_depend_on_the_batch(model):
    draws = GoodImages(seed=5).draw(4)
    together = score(model, *draws)[1]["fused"]
    alone = torch.cat([score(model, *(x[i : i + 1] for x in draws))[1]["fused"] for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_raw_maps_are_stacked_on_one_grid():
    """KL and RGB difference enter by their logs, after averaging."""
    kl, rgb = torch.rand(2, 2, 2, 16, 16)
    kl[0, 0, :2, :2] = 0.0
    error = torch.rand(2, 2, 4, 4)
    distances = torch.rand(2, 2, 4, 4)
    stacked = stack_raw_maps(kl, error, rgb, 8, *distances)
    assert torch.equal(stack_raw_maps(kl, error, rgb, 8), stacked[:, :6])
    torch.testing.assert_close(stacked[:, :2], F.avg_pool2d(kl, 2).clamp_min(1e-6).log())
    torch.testing.assert_close(stacked[:, 2:4], F.interpolate(error, (8, 8), mode="bilinear"))
    torch.testing.assert_close(stacked[:, 4:6], F.avg_pool2d(rgb, 2).log())
    torch.testing.assert_close(stacked[:, 6:], F.interpolate(distances.transpose(0, 1), (8, 8), mode="bilinear"))
    assert stacked.isfinite().all()


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
    model = fit(*GoodImages(seed=6).draw(2))
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    p = model.p_value(torch.linspace(-5, 50, 100))
    assert (p.diff() <= 0).all() and (p > 0).all()
    assert np.isfinite([model.score_threshold(rate) for rate in (0.001, 0.1, 0.5)]).all()


# Categories


@pytest.fixture(scope="module")
def two_categories() -> tuple[NormalityModel, list[GoodImages]]:
    images = [GoodImages(seed=10, offset=-1.0), GoodImages(seed=11, offset=1.0)]
    draws = [torch.stack(x, dim=1).flatten(0, 1) for x in zip(*(i.draw(20) for i in images), strict=True)]  # in turn
    draws[2][1::2] = 3 * draws[2][1::2] + 5
    return fit(*draws, labels=[0, 1] * 20, categories=["nut", "tile"]), images


def test_classify_picks_the_category(two_categories):
    model, (nuts, tiles) = two_categories
    assert model.classify(nuts.features(10)) == [0] * 10
    assert model.classify(tiles.features(10)) == [1] * 10
    assert model.classify(torch.cat([tiles.features(1), nuts.features(1)])) == [1, 0]


def test_each_category_has_its_own_units(two_categories):
    model, images = two_categories
    for label, good in enumerate(images):
        features, residuals, raw_maps = good.draw(200)
        maps, scores = score(model, features, residuals, 3 * raw_maps + 5 if label else raw_maps, label)
        assert maps["fused"].std().item() == pytest.approx(1.0, abs=0.3)
        assert scores["fused"].mean().item() == pytest.approx(0.0, abs=0.6)


def test_a_batch_may_mix_categories(two_categories):
    model, images = two_categories
    features = torch.cat([good.features(1) for good in images])
    mixed = model.distance(features, [0, 1])
    torch.testing.assert_close(mixed[0], model.distance(features[:1], [0])[0])
    torch.testing.assert_close(mixed[1], model.distance(features[1:], [1])[0])


def test_several_categories_share_covariances_among_neighbours(model, two_categories):
    assert model.config.gaussian_blocks == GRID and two_categories[0].config.gaussian_blocks == GRID // 2


# Refusals and files


def test_a_category_with_one_image_is_refused(fitted_on):
    draws = [x[:5] for x in fitted_on]
    with pytest.raises(ValueError, match="'tile' has 1 good images to calibrate on; it needs at least 2"):
        fit(*draws, labels=[0, 0, 0, 0, 1], categories=["nut", "tile"])


def test_an_unknown_score_type_is_refused(model):
    with pytest.raises(ValueError):
        model.p_value(torch.zeros(1), "l2")


def test_save_and_load_are_bit_exact_in_half_precision(fitted_on, tmp_path):
    features = fitted_on[0][:20]
    model = fit(*(x[:20] for x in fitted_on)).half()
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = NormalityModel.from_pretrained(tmp_path)
    assert list(loaded.config.pooled) == list(model.config.pooled) and list(loaded.config.categories) == ["tile"]
    saved, restored = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert saved.keys() == restored.keys()
    for name, buffer in saved.items():
        assert torch.equal(buffer.float(), restored[name].float()), name
    assert torch.equal(loaded.distance(features, [0] * 20), model.float().distance(features, [0] * 20))


def test_half_precision_changes_little(model, fitted_on, tmp_path):
    model.save_pretrained(tmp_path)
    rounded = NormalityModel.from_pretrained(tmp_path).half().float()
    scores = score(model, *fitted_on)[1]["fused"]
    torch.testing.assert_close(score(rounded, *fitted_on)[1]["fused"], scores, rtol=0.02, atol=0.05)


def test_one_category_at_the_default_sizes_is_under_10_mb(tmp_path):
    NormalityModel(num_scores=1000).half().save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10e6

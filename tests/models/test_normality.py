"""What good images look like: distances against plain NumPy, and scores, p-values and thresholds on fresh draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import new_pipeline, texture
from draws import CHANNELS, MAP, SIDE, TIMESTEPS, GoodImages, summarise
from processes import run_twice
from scipy.spatial.distance import mahalanobis
from scipy.stats import beta
from skimage.measure import block_reduce
from sklearn.covariance import LedoitWolf

from rad import NormalityModel
from rad.models import fitting
from rad.models.evidence import SCORE_TYPES, Evidence
from rad.models.false_alarms import default_rate_of, rate_note, score_threshold_at
from rad.models.fitting import Mirrored, Views
from rad.models.gaussian import Moments, fit_gaussian, num_folds

DIRECTIONS = 4
GRIDS = {"feature": SIDE // 2, "residual": SIDE // 4}
MAPS = tuple(name for name, score_type in SCORE_TYPES.items() if score_type.has_map)
CONFIG = {
    "gaussian_channels": DIRECTIONS,
    "gaussian_size": SIDE // 2,
    "gaussian_block": 1,
    "timesteps": TIMESTEPS,
    "top_k": 8,
}
COUNT = 100


def fit(features, residuals, raw_maps, labels=None, categories=("tile",), **config) -> NormalityModel:
    """On all images, or on the share and with the sums of one of several processes."""
    labels = [0] * len(features) if labels is None else labels
    processes = {name: config.pop(name) for name in ("share", "reduce", "mirrored", "views") if name in config}
    if "views" in processes:  # their rows are the last ones
        labels = labels[: len(labels) - len(processes["views"].sources)]
    discriminator = raw_maps.shape[1] > 3 * len(TIMESTEPS)
    model = NormalityModel(**CONFIG | {"discriminator": discriminator} | config)
    fitted = model.fit(features, residuals, summarise(features), labels, raw_maps, list(categories), **processes)
    assert fitted is model  # in place
    return model


def score(model: NormalityModel, features, residuals, raw_maps, label: int = 0):
    """Calibrated maps and image scores of each type, as the pipeline makes them."""
    labels = [label] * len(features)
    distances = [model.distance(residuals, labels, "residual"), model.distance(features, labels)]
    distances = [F.interpolate(d[:, None], (MAP, MAP), mode="bilinear") for d in distances]
    distance = model.global_distance(summarise(features), labels)
    return model.judge(torch.cat([raw_maps, *distances], dim=1), distance, labels)


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


def projected(model: NormalityModel, features: torch.Tensor, kind: str = "feature") -> np.ndarray:
    """Features averaged over the cells of a Gaussian's grid, in its directions, [N, P, g, g], float64."""
    x, grid = features.detach().double().numpy(), GRIDS[kind]
    cells = x.reshape(len(x), CHANNELS, grid, SIDE // grid, grid, SIDE // grid).mean((3, 5))
    return np.einsum("nchw,cp->nphw", cells, model.projection.double().numpy())


def shrunk_covariances(x: np.ndarray, side: int) -> np.ndarray:
    """Covariances [blocks, blocks, P, P] of features [N, P, g, g] in blocks of side x side, loop by loop.

    The mean over all blocks counts as ten more images; 0.01 I is added.
    """
    count, channels, size, _ = x.shape
    blocks = size // side
    residuals = x - x.mean(0)
    covariances = np.zeros((blocks, blocks, channels, channels))
    for i in range(blocks):
        for j in range(blocks):
            for row in range(i * side, (i + 1) * side):
                for column in range(j * side, (j + 1) * side):
                    for residual in residuals[:, :, row, column]:
                        covariances[i, j] += np.outer(residual, residual) / (count * side**2)
    return (count * covariances + 10 * covariances.mean((0, 1))) / (count + 10) + 0.01 * np.eye(channels)


@pytest.mark.parametrize("kind", ["feature", "residual"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_distance_is_mahalanobis_and_so_is_its_gradient(fitted_on, block, kind):
    draws = [x[:30] for x in fitted_on]
    model = fit(*draws, gaussian_block=block)
    index, grid = list(GRIDS).index(kind), GRIDS[kind]
    cell = SIDE // grid
    x = projected(model, draws[index], kind)
    covariances = shrunk_covariances(x, block)

    fresh = GoodImages(seed=2).draw(3)[index].requires_grad_()
    distance = model.distance(fresh, [0, 0, 0], kind)
    assert distance.shape == (3, grid, grid)
    distance.sum().backward()
    deviations = projected(model, fresh, kind) - x.mean(0)
    basis = model.projection.double().numpy()
    for n, row, column in np.ndindex(3, grid, grid):
        deviation = deviations[n, :, row, column]
        solved = np.linalg.solve(covariances[row // block, column // block], deviation)
        expected = np.sqrt(deviation @ solved)
        assert distance[n, row, column].item() == pytest.approx(expected, rel=1e-3)
        gradient = basis @ solved / expected / cell**2  # shared by all features of a cell
        actual = fresh.grad[n, :, cell * row + cell - 1, cell * column]
        np.testing.assert_allclose(actual, gradient, rtol=1e-2, atol=1e-3 * np.abs(gradient).max())


def test_the_residual_gaussian_is_of_the_averaged_residuals(model, fitted_on):
    """In 4 x 4 cells, and of nothing else: SciPy's distance under the covariances of the averages."""
    basis = model.projection.double().numpy()
    averaged, fresh = (
        block_reduce(x.double().numpy(), (1, 1, 4, 4), np.mean).transpose(2, 3, 0, 1) @ basis  # [4, 4, N, P]
        for x in (fitted_on[1], GoodImages(seed=2).residuals(3))
    )
    covariances = np.stack([[np.cov(cell.T, bias=True) for cell in row] for row in averaged])
    covariances = (COUNT * covariances + 10 * covariances.mean((0, 1))) / (COUNT + 10) + 0.01 * np.eye(DIRECTIONS)
    expected = np.zeros((3, 4, 4))
    for n, row, column in np.ndindex(expected.shape):
        inverse = np.linalg.inv(covariances[row, column])
        expected[n, row, column] = mahalanobis(fresh[row, column, n], averaged[row, column].mean(0), inverse)
    actual = model.distance(GoodImages(seed=2).residuals(3), [0, 0, 0], "residual")
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


def test_projection_is_orthonormal(model):
    np.testing.assert_allclose(model.projection.T @ model.projection, np.eye(DIRECTIONS), atol=1e-5)


@pytest.mark.parametrize("kind", ["feature", "residual"])
def test_distance_on_good_images_is_about_the_root_of_the_directions(model, kind):
    good = GoodImages(seed=2)
    fresh = good.features(300) if kind == "feature" else good.residuals(300)
    squares = model.distance(fresh, [0] * 300, kind).square()
    assert squares.mean().item() == pytest.approx(DIRECTIONS, rel=0.15)


def features_at_the_mean(model: NormalityModel, kind: str) -> torch.Tensor:
    cells, side = getattr(model, f"{kind}_mean")[0], SIDE // GRIDS[kind]
    cells = torch.einsum("phw,cp->chw", cells, model.projection)
    return cells.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)[None]


@pytest.mark.parametrize("kind", ["feature", "residual"])
def test_the_gradient_at_the_mean_is_finite(model, kind):
    features = features_at_the_mean(model, kind).requires_grad_()
    model.distance(features, [0], kind).sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["feature", "residual"])
def test_distance_is_proportional_to_the_step_from_the_mean(model, kind):
    centre, step = features_at_the_mean(model, kind), torch.randn(1, CHANNELS, SIDE, SIDE)
    distances = torch.cat([model.distance(centre + scale * step, [0], kind) for scale in (1.0, 2.0, 4.0)])
    torch.testing.assert_close(distances[1:], 2 * distances[:-1], rtol=1e-3, atol=1e-3)


# Held out


@pytest.mark.parametrize("block", [1, 2])
def test_subtracting_the_moments_of_a_fold_leaves_it_out(block):
    """As if fitted to the others, in float64, though the mean is a thousand times the deviation."""
    x = 1000 + torch.randn(13, DIRECTIONS, 4, 4) * torch.linspace(0.5, 2, DIRECTIONS).view(-1, 1, 1)
    fold = torch.arange(13) % 5
    total = Moments.of(x, lambda part: part, block)
    for k in range(5):
        mean, whitening = fit_gaussian(total.less(Moments.of(x[fold == k], lambda part: part, block)))
        rest = x[fold != k].double().numpy()
        covariances = shrunk_covariances(rest, block).reshape(-1, DIRECTIONS, DIRECTIONS)
        np.testing.assert_allclose(mean, rest.mean(0), rtol=1e-6)
        precisions = whitening.mT.double() @ whitening.double()
        np.testing.assert_allclose(precisions, np.linalg.inv(covariances), rtol=1e-4, atol=1e-5)


def test_mirrored_copies_count_as_twenty_images_in_the_features_gaussian(fitted_on):
    """As if each of the 18 copies were there 20 / 18 times; nothing else than the features' Gaussian knows of them."""
    draws, copies = [x[:12] for x in fitted_on], GoodImages(seed=4, offset=0.5).features(18)
    model = fit(*draws, mirrored=Mirrored(copies, [i for i in range(6) for _ in range(3)]))
    x, mirrored = (projected(model, values).transpose(2, 3, 0, 1) for values in (draws[0], copies))  # [g, g, N, P]
    weights = np.repeat([1, 20 / 18], [12, 18])
    both = np.concatenate([x, mirrored], axis=2)
    mean = np.average(both, axis=2, weights=weights)
    np.testing.assert_allclose(model.feature_mean[0].permute(1, 2, 0), mean, rtol=1e-3, atol=1e-3)
    covariances = np.stack([[np.cov(cell.T, aweights=weights, bias=True) for cell in row] for row in both])
    covariances = (32 * covariances + 10 * covariances.mean((0, 1))) / (32 + 10) + 0.01 * np.eye(DIRECTIONS)
    fresh = GoodImages(seed=2).features(1)
    deviation = projected(model, fresh).transpose(2, 3, 0, 1)[:, :, 0] - mean
    solved = np.linalg.solve(covariances, deviation[..., None])[..., 0]
    expected = np.sqrt((deviation * solved).sum(-1))
    np.testing.assert_allclose(model.distance(fresh, [0])[0], expected, rtol=1e-3)
    assert torch.equal(model.residual_mean, fit(*draws).residual_mean)


def test_a_mirrored_copy_is_held_out_with_its_image(fitted_on):
    """Else an image would be judged by what saw it, turned: here a copy is the image itself, far from all others."""
    draws = [x[:12].clone() for x in fitted_on]
    draws[0][3] += 40
    alone = fit(*draws).good_scores[MAPS.index("mahalanobis"), -1]
    mirrored = fit(*draws, mirrored=Mirrored(draws[0][[3]], [3])).good_scores[MAPS.index("mahalanobis"), -1]
    assert mirrored > 0.9 * alone


def viewed(draws, sources, changed=0.0):
    """Good images, and rows of their views, which differ from them by `changed` in every feature and raw map."""
    rows = [
        torch.cat([part, part[sources] + change]) for part, change in zip(draws, (changed, 0, changed), strict=True)
    ]
    return rows, Views(sources, list(range(len(sources))), len(sources))


def test_views_count_in_the_gaussians_as_often_as_they_are(fitted_on):
    """As if they were images, up to twenty; nobody takes them for further images."""
    draws = [part[:12] for part in fitted_on]
    rows, views = viewed(draws, [0, 1, 2, 3], 0.5)
    model, as_images = fit(*rows, views=views), fit(*rows)
    assert model.config.num_scores == 12 and model.good_scores.shape[1] == 12
    for kind in GRIDS:
        torch.testing.assert_close(model.get_buffer(f"{kind}_mean"), as_images.get_buffer(f"{kind}_mean"))
    torch.testing.assert_close(model.global_mean, as_images.global_mean)


def test_a_view_is_held_out_with_its_image(fitted_on):
    """Else an image would be judged by what saw it: here a view is the image itself, far from all others."""
    draws = [part[:12].clone() for part in fitted_on]
    draws[0][3] += 40
    alone = fit(*draws).good_scores[MAPS.index("mahalanobis"), -1]
    rows, views = viewed(draws, [3])
    # Units know both: in those, one of two odd ones is less odd than a single one
    assert fit(*rows, views=views).good_scores[MAPS.index("mahalanobis"), -1] > 0.5 * alone


def test_thresholds_hold_for_images_and_for_views(fitted_on):
    """Views that are odd raise thresholds, so that others like them pass; those that are not hardly move them."""
    draws = [part[:60] for part in fitted_on]
    same, odd = (fit(*rows, views=views) for rows, views in (viewed(draws, list(range(60)), x) for x in (0, 3)))
    fresh = GoodImages(seed=3).draw(200)
    rates = [np.mean(model.p_value(score(model, *fresh)[1]["fused"]).numpy() <= 0.1) for model in (same, odd)]
    assert rates[1] < 0.04 < rates[0]
    changed = [part + change for part, change in zip(fresh, (3, 0, 3), strict=True)]
    alarms = [np.mean(model.p_value(score(model, *changed)[1]["fused"]).numpy() <= 0.1) for model in (same, odd)]
    assert alarms[1] < 0.2 < 0.9 < alarms[0]


@pytest.mark.parametrize(("count", "folds"), [(5, 5), (12, 12), (20, 20), (60, 20), (99, 20), (100, 5), (700, 5)])
def test_few_images_are_held_out_one_by_one(count, folds):
    assert num_folds(count) == folds


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
    features, residuals, raw_maps = GoodImages(seed=3).draw(6)
    raw_maps += 2 * torch.randn(6, raw_maps.shape[1], 1, 1)  # each image lies high or low as a whole
    model, positioned = fit(features, residuals, raw_maps), 3 * len(TIMESTEPS)
    z = (raw_maps[:, :positioned] - model.location[0, :positioned]) / model.scale[0, :positioned]
    assert z.square().mean() < 1.02  # in their own units the images deviate by 1 at most
    # held out they deviate by more, which the scale of the combined maps has taken in
    seen = z.unflatten(1, (3, -1)).mean(2).transpose(0, 1).flatten(1).std(1)
    held_out = model.map_scale[0, [MAPS.index(name) for name in ("pixel", "feature", "rgb")]]
    assert (held_out > 1.05 * seen).all()


def test_only_the_last_images_are_scored(fitted_on):
    features, residuals, raw_maps = fitted_on
    model = fit(features, residuals, raw_maps[:30])
    assert model.config.num_scores == 30 and model.good_scores.shape == (len(SCORE_TYPES), 30)
    for kind, x in (("feature", features), ("residual", residuals)):  # the Gaussians are of all
        mean = projected(model, x, kind).mean(0)
        np.testing.assert_allclose(model.get_buffer(f"{kind}_mean")[0], mean, rtol=1e-3, atol=1e-3)


# Calibrated maps and scores


@pytest.mark.parametrize("name", MAPS)
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
    weighted = sum(weight * maps[name] for name, weight in model.config.weights.items())
    ratio = weighted / maps["fused"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, model.map_scale[0, 0].item()), rtol=1e-2, atol=1e-3)


def test_the_fused_image_score_has_weights_of_its_own(fitted_on):
    """The fused map here is one part, the fused score that of another."""
    model = fit(*fitted_on, weights={"mahalanobis": 1.0}, image_weights={"feature": 1.0})
    maps, scores = score(model, *GoodImages(seed=1).draw(50))
    torch.testing.assert_close(maps["fused"], maps["mahalanobis"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores["fused"], scores["feature"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores["fused"], scores["mahalanobis"], atol=0.5)


def test_the_fused_image_score_is_of_the_weighted_sum(fitted_on):
    """Up to its unit it is the mean of the sum's largest values plus the weighted global score; the threshold's scores
    are made alike."""
    names = ("pixel", "feature", "residual", "mahalanobis", "discriminator", "global")
    weights = dict(zip(names, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    model = fit(*fitted_on, image_weights=weights)
    maps, scores = score(model, *GoodImages(seed=1).draw(50))
    weighted = sum(weights[name] * maps[name].double().numpy() for name in names[:-1])
    largest = np.sort(weighted.reshape(50, -1))[:, -CONFIG["top_k"] :].mean(1) + 0.6 * scores["global"].numpy()
    slope, offset = np.polyfit(largest, scores["fused"].double().numpy(), 1)
    assert slope == pytest.approx(1 / model.score_scale[0, 0].item(), rel=1e-3)
    np.testing.assert_allclose(scores["fused"], slope * largest + offset, atol=1e-3)
    assert model.good_scores[0].mean().item() == pytest.approx(0.0, abs=0.01)  # units are held out, fold by fold
    assert model.good_scores[0].std().item() == pytest.approx(1.0, abs=0.05)


def test_context_adds_the_mean_over_the_neighbourhood(fitted_on):
    """Over as much of a 9 x 9 window as lies on the map; the other maps and the image score do without."""
    draws = GoodImages(seed=1).draw(5)
    plain, model = fit(*fitted_on), fit(*fitted_on, context=2.0)
    (without, scores_without), (maps, scores) = score(plain, *draws), score(model, *draws)
    parts = sum(weight * maps[name].double().numpy() for name, weight in model.config.weights.items())
    expected = np.zeros_like(parts)
    for n, row, column in np.ndindex(parts.shape):
        window = parts[n, max(row - 4, 0) : row + 5, max(column - 4, 0) : column + 5]
        expected[n, row, column] = parts[n, row, column] + 2.0 * window.mean()
    np.testing.assert_allclose(maps["fused"] * model.map_scale[0, 0], expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(maps["fused"], without["fused"], atol=0.1)
    for name in set(MAPS) - {"fused"}:
        torch.testing.assert_close(maps[name], without[name])
    torch.testing.assert_close(scores["fused"], scores_without["fused"])


def test_locations_and_deviations_are_averaged_over_neighbours_and_drawn_to_all_positions(model, fitted_on):
    """Moments over 3 x 3 positions, those of all positions counting as ten more images; distances and logits
    share theirs."""
    raw = fitted_on[2][:, :-1].double().numpy()
    moments = np.stack([raw.mean(0), (raw**2).mean(0)])
    mixed = np.zeros_like(moments)
    for row, column in np.ndindex(MAP, MAP):
        window = moments[..., max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        mixed[..., row, column] = (COUNT * window.mean((-2, -1)) + 10 * moments.mean((-2, -1))) / (COUNT + 10)
    np.testing.assert_allclose(model.location[0, :-3], mixed[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(model.scale[0, :-3], np.sqrt(mixed[1] - mixed[0] ** 2), rtol=1e-2)
    for buffer in (model.location[0, -3:], model.scale[0, -3:]):
        assert torch.equal(buffer, buffer[:, :1, :1].expand_as(buffer))
    assert model.location[0, -2:].mean().item() == pytest.approx(DIRECTIONS**0.5, rel=0.15)


def test_a_defect_stands_out_where_it_is(model):
    draws = GoodImages(seed=4).draw(1)
    for values in draws:
        values[:, :, 4:8, 8:12] += 8.0
    maps, scores = score(model, *draws)
    for name in MAPS:
        row, column = np.unravel_index(maps[name][0].argmax().item(), (MAP, MAP))
        assert 3 <= row <= 8 and 7 <= column <= 12, name
        assert model.p_value(scores[name], name)[0] < 0.01, name


def test_scores_do_not_depend_on_the_batch(model):
    draws = GoodImages(seed=5).draw(4)
    together = score(model, *draws)[1]["fused"]
    alone = torch.cat([score(model, *(x[i : i + 1] for x in draws))[1]["fused"] for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def evidence_of(**given: torch.Tensor) -> Evidence:
    """Of two images at two timesteps; what is not given is random."""
    shapes = {
        "kl": (2, 2, 16, 16),
        "error": (2, 2, 4, 4),
        "raw_error": (2, 2, 4, 4),
        "rgb": (2, 2, 16, 16),
        "summaries": (2, CHANNELS),
    }
    shapes |= {"features": (2, CHANNELS, SIDE, SIDE), "residuals": (2, CHANNELS, SIDE, SIDE), "logits": (2, 8, 8)}
    shapes |= {"x_t": (2, 2, 3, 16, 16), "x0_hat": (2, 2, 3, 16, 16)}
    return Evidence(**{name: torch.rand(shape) for name, shape in shapes.items()} | given, categories=["tile"] * 2)


def test_raw_maps_are_stacked_on_one_grid(model):
    """KL and RGB difference enter by their logs, after averaging; logits and then the two distances come last."""
    kl = torch.rand(2, 2, 16, 16)
    kl[0, 0, :2, :2] = 0.0
    evidence = evidence_of(kl=kl)
    stacked = evidence.stack(8)
    assert stacked.shape == (2, 7, 8, 8) and stacked.isfinite().all()
    without = evidence_of(kl=kl, error=evidence.error, rgb=evidence.rgb, logits=None)
    assert torch.equal(without.stack(8), stacked[:, :6])
    torch.testing.assert_close(stacked[:, :2], F.avg_pool2d(kl, 2).clamp_min(1e-6).log())
    torch.testing.assert_close(stacked[:, 2:4], F.interpolate(evidence.error, (8, 8), mode="bilinear"))
    torch.testing.assert_close(stacked[:, 4:6], F.avg_pool2d(evidence.rgb, 2).log())
    torch.testing.assert_close(stacked[:, 6], evidence.logits)
    raw = model.raw_maps(evidence, [0, 0])
    assert raw.shape == (2, 9, MAP, MAP) and torch.equal(raw[:, :7], evidence.stack(MAP))
    distances = model.distance(evidence.residuals, [0, 0], "residual"), model.distance(evidence.features, [0, 0])
    for channel, distance in zip(raw[:, 7:].split(1, dim=1), distances, strict=True):
        torch.testing.assert_close(channel, F.interpolate(distance[:, None], (MAP, MAP), mode="bilinear"))


def test_channels_say_where_each_score_stands_among_the_raw_maps(model):
    raw = model.raw_maps(evidence_of(logits=torch.full((2, 8, 8), 7.0)), [0, 0])
    assert list(model.channels) == ["pixel", "feature", "rgb", "discriminator", "residual", "mahalanobis"]
    assert (raw[:, model.channels["discriminator"]] == 7.0).all()
    assert sorted(i for span in model.channels.values() for i in range(9)[span]) == list(range(9))


def test_evidence_is_judged_by_all_scores(model):
    """Also those that need more than a map: the fused and the global one."""
    evidence = evidence_of()
    maps, scores = model(evidence, [0, 0])
    assert tuple(maps) == MAPS and tuple(scores) == tuple(SCORE_TYPES)
    assert all(values.shape == (2,) and values.isfinite().all() for values in scores.values())
    distance = model.global_distance(evidence.summaries, [0, 0])
    expected = (distance - model.score_location[0, -1]) / model.score_scale[0, -1]
    torch.testing.assert_close(scores["global"], expected)
    alone = model.distance_score(model.distance(evidence.features, [0, 0]), [0, 0])
    torch.testing.assert_close(alone, scores["mahalanobis"])


def test_without_a_discriminator_all_else_is_the_same(fitted_on):
    features, residuals, raw_maps = fitted_on
    weights = {"pixel": 0.05, "feature": 0.25, "residual": 0.35, "mahalanobis": 0.35}
    model = fit(features, residuals, raw_maps, weights=weights)
    without = fit(features, residuals, raw_maps[:, :-1], weights=weights | {"discriminator": 7.0})
    draws = GoodImages(seed=6).draw(4)
    (maps, scores), (plain, plain_scores) = score(model, *draws), score(without, *draws[:2], draws[2][:, :-1])
    assert without.score_types == MAPS[:-1] and set(plain) == set(maps) - {"discriminator"}
    for name in plain:
        torch.testing.assert_close(plain[name], maps[name])
        torch.testing.assert_close(plain_scores[name], scores[name])


def test_without_a_discriminator_its_score_is_refused(fitted_on):
    """Not answered for another one, whose row would stand in its place."""
    model = fit(fitted_on[0], fitted_on[1], fitted_on[2][:, :-1])
    questions = (
        lambda: model.p_value(torch.zeros(1), "discriminator"),
        lambda: model.score_threshold(0.1, "discriminator"),
        lambda: model.false_alarm_interval(0.1, "discriminator"),
        lambda: model.held_out_alarms(0.1, "discriminator"),
        lambda: model.pixel_threshold(0.1, "discriminator"),
        lambda: model.heat_range("discriminator"),
        lambda: model.decide({}, {}, 0.1, "discriminator"),
    )
    for question in questions:
        with pytest.raises(ValueError, match="score_type must be one of fused, .*, got 'discriminator'"):
            question()
    with pytest.raises(ValueError, match="got 'global'"):
        model.pixel_threshold(0.1, "global")  # which has no map


@pytest.mark.parametrize(
    ("argument", "weights"),
    [("weights", {"rgb": 1.0}), ("weights", {"global": 1.0}), ("image_weights", {"l2": 1.0}), ("weights", (1.0, 0.5))],
)
def test_weights_of_other_names_are_refused(argument, weights):
    with pytest.raises(ValueError, match=f"^{argument} must give numbers to some of the names pixel, feature"):
        NormalityModel(**{argument: weights})


def test_settings_saved_before_weights_had_names_are_read(model, fitted_on, tmp_path):
    """Lists in a fixed order, and for each category whether it was pooled, which is read by nothing."""
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("weights", "image_weights"):
        order = ["pixel", "feature", "residual", "mahalanobis", "discriminator", "global"]
        settings[name] = [settings[name][part] for part in order if part in settings[name]]
    settings["pooled"] = [False]
    del settings["num_noise_samples"], settings["seed"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = NormalityModel.from_pretrained(tmp_path)
    assert dict(loaded.config.weights) == dict(model.config.weights)
    assert dict(loaded.config.image_weights) == dict(model.config.image_weights)
    draws = [x[:5] for x in fitted_on]
    assert torch.equal(score(loaded, *draws)[1]["fused"], score(model, *draws)[1]["fused"])


def test_scores_left_out_do_not_count(fitted_on):
    """Also all maps in the image score, which then is that of the image as a whole; but not all in the map."""
    draws = GoodImages(seed=1).draw(20)
    _, scores = score(fit(*fitted_on, image_weights={"global": 1.0}), *draws)
    torch.testing.assert_close(scores["fused"], scores["global"], rtol=1e-3, atol=1e-3)
    for weights in ({}, {"discriminator": 1.0}):
        with pytest.raises(ValueError, match="weights must name a score that has a map here"):
            fit(fitted_on[0], fitted_on[1], fitted_on[2][:, :-1], weights=weights)
    with pytest.raises(ValueError, match="The raw maps must be 7 of each image, got 6"):
        fit(fitted_on[0], fitted_on[1], fitted_on[2][:, :-1], discriminator=True)


def test_a_second_fit_forgets_the_first(fitted_on):
    """Sizes that nobody asked for follow from what is fitted to; the others stay."""
    draws = [x[:20] for x in fitted_on]
    model = NormalityModel(timesteps=TIMESTEPS, discriminator=True, gaussian_channels=3)
    for categories, blocks in ((["tile"], 256), (["nut", "tile"], 16), (["tile"], 256)):
        labels = [i % len(categories) for i in range(20)]
        assert model.fit(*draws[:2], summarise(draws[0]), labels, draws[2], categories) is model
        assert model.feature_whitening.shape[:2] == (len(categories), blocks)
        assert model.projection.shape[1] == 3 and list(model.config.categories) == categories


# The image as a whole


def test_the_global_distance_is_mahalanobis_with_one_covariance_of_all_categories():
    """In units of each category's deviation, shrunk by scikit-learn's Ledoit-Wolf; 0.01 I is added."""
    labels = np.array([0, 1] * 15)
    draws = [
        torch.cat([GoodImages(0).draw(15)[i], GoodImages(1, 4.0).draw(15)[i]])[np.argsort(labels).argsort()]
        for i in range(3)
    ]
    model = fit(*draws, labels=labels.tolist(), categories=["nut", "tile"])
    x = summarise(draws[0]).double().numpy()
    z = np.zeros_like(x)
    for k in range(2):
        z[labels == k] = (x[labels == k] - x[labels == k].mean(0)) / x[labels == k].std(0)
    inverse = np.linalg.inv(LedoitWolf(assume_centered=True).fit(z).covariance_ + 0.01 * np.eye(CHANNELS))
    expected = [mahalanobis(row, np.zeros(CHANNELS), inverse) for row in z]
    np.testing.assert_allclose(model.global_distance(torch.from_numpy(x), labels.tolist()), expected, rtol=1e-3)


def test_an_image_odd_as_a_whole_is_found_by_the_global_score(model):
    """Features a little off everywhere: no position stands out as much as their mean does."""
    draws = GoodImages(seed=4).draw(20)
    draws[0].add_(0.4)
    scores = score(model, *draws)[1]
    assert scores["global"].min() > 3 and scores["global"].mean() > 3 * scores["mahalanobis"].mean()
    assert (model.p_value(scores["global"], "global") < 0.01).all()


# p-values and thresholds


@pytest.mark.parametrize("name", MAPS)
def test_p_values_fall_as_scores_rise(model, name):
    scores = torch.cat([torch.linspace(-20, 20, 2001), model.good_scores[MAPS.index(name)]]).sort().values
    p = model.p_value(scores, name)
    assert (p.diff() <= 0).all() and p.min() > 0 and p.max() == 1
    assert (model.p_value(torch.tensor([-1e6, 1e6]), name) > 0).all()


@pytest.mark.parametrize("name", MAPS)
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


FEW = [(5, 0.2), (9, 0.1), (18, 0.1), (19, 0.05), (49, 0.02), (98, 0.02), (99, 0.01)]


@pytest.mark.parametrize(("count", "rate"), FEW)
def test_the_default_rate_is_the_smallest_that_so_many_good_images_tell(count, rate):
    assert default_rate_of(count) == rate
    assert (rate_note(rate, count) == "") == (count >= 99)
    assert rate_note(0.001, count) == ""  # who asks for less knows


def test_what_an_alarm_at_one_percent_takes_is_told():
    assert rate_note(0.1, 12) == "An alarm at 1% takes 99 good images held out, 87 more."


def test_score_thresholds_fall_with_the_rate(model):
    thresholds = [model.score_threshold(rate) for rate in np.logspace(-6, -0.01, 300)]
    assert (np.diff(thresholds) <= 0).all()


@pytest.mark.parametrize("name", MAPS)
def test_pixel_thresholds_fall_with_the_rate_and_hold_on_fresh_pixels(model, fresh, name):
    rates = np.append(np.logspace(-5, 0, 200), 1.0)
    thresholds = [model.pixel_threshold(rate, name) for rate in rates]
    assert (np.diff(thresholds) <= 0).all()
    for rate in (0.01, 0.1, 0.5):
        exceeded = (fresh[0][name] > model.pixel_threshold(rate, name)).double().mean().item()
        assert rate / 2 <= exceeded <= rate * 1.5


@pytest.mark.parametrize("name", MAPS)
def test_no_more_good_images_have_a_region_than_the_rate_says(model, fresh, name):
    """The largest value of a fresh good image's map lies above the threshold of peaks; fewer than the rate, since
    statistics that an image is held out of judge it more harshly."""
    peaks, good = fresh[0][name].amax((1, 2)), model.good_peaks[MAPS.index(name)].double()
    shares = [(peaks > score_threshold_at(rate, good)).double().mean() for rate in (0.05, 0.2, 0.5)]
    assert shares[0] <= 0.1 and 0.01 < shares[1] < 0.4 and 0.05 < shares[2] < 0.8


def test_one_score_is_enough_for_thresholds():
    """Two images are the fewest: everything stays finite."""
    model = fit(*GoodImages(seed=6).draw(2))
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    p = model.p_value(torch.linspace(-5, 50, 100))
    assert (p.diff() <= 0).all() and (p > 0).all()
    assert np.isfinite([model.score_threshold(rate) for rate in (0.001, 0.1, 0.5)]).all()


@pytest.mark.parametrize(("count", "rate", "high"), [(10, 0.01, 0.308), (30, 0.01, 0.116)])
def test_few_good_images_leave_a_wide_interval(count, rate, high):
    """Clopper and Pearson's, from the beta distribution's quantiles: none of 10 or 30 above."""
    model = fit(*GoodImages(seed=6).draw(count))
    assert not (model.good_scores[0] >= model.score_threshold(rate)).any()
    assert model.false_alarm_interval(rate) == pytest.approx((0.0, high), abs=1e-3)
    above = int((model.good_scores[0] >= model.score_threshold(0.3)).sum())
    expected = beta.ppf(0.025, above, count - above + 1), beta.ppf(0.975, above + 1, count - above)
    assert above > 0 and model.false_alarm_interval(0.3) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.3])
def test_held_out_alarms_are_those_of_each_image_judged_by_the_others(rate):
    """Each score's rank among the others, and beyond their tail's start the exponential one, in plain NumPy."""
    model = fit(*GoodImages(seed=6).draw(30))
    scores, alarms = model.good_scores[0].double().numpy(), 0
    for i, score in enumerate(scores):
        others = np.delete(scores, i)
        tail = max(len(others) // 10, 6)  # of few the upper tenth is too small for a mean
        start, excess = others[-tail - 1], others[-tail:].mean() - others[-tail - 1]
        p = (1 + (others >= score).sum()) / (1 + len(others))
        if score > start:
            p = (tail + 1) / (len(others) + 1) * np.exp(-(score - start) / max(excess, 1e-3))
        alarms += p <= rate
    assert model.held_out_alarms(rate) == alarms
    if rate == 0.3:
        assert 5 <= alarms <= 13  # of 30, whose p-values are about uniform


def test_thresholds_hold_on_fresh_images_of_several_categories():
    """What is held out is also held out of the units that make categories comparable: else the tail is too thin."""
    alarms, rates = np.zeros(3), (0.01, 0.05, 0.1)
    for seed in range(3):
        images = [GoodImages(100 * seed + k, offset=k) for k in range(4)]
        draws = [torch.cat(x) for x in zip(*(i.draw(25) for i in images), strict=True)]
        model = fit(*draws, labels=np.repeat(range(4), 25).tolist(), categories=list("abcd"), gaussian_block=4)
        for label, good in enumerate(images):
            fresh = score(model, *good.draw(100), label)[1]["fused"]
            alarms += [(model.p_value(fresh) <= rate).sum().item() for rate in rates]
    for count, rate in zip(alarms, rates, strict=True):
        assert 0.4 * rate < count / 1200 < 1.8 * rate, (rate, count / 1200)


# Categories


@pytest.fixture(scope="module")
def two_categories() -> tuple[NormalityModel, list[GoodImages]]:
    images = [GoodImages(seed=10, offset=-1.0), GoodImages(seed=11, offset=1.0)]
    draws = [torch.stack(x, dim=1).flatten(0, 1) for x in zip(*(i.draw(20) for i in images), strict=True)]  # in turn
    draws[2][1::2] = 3 * draws[2][1::2] + 5
    return fit(*draws, labels=[0, 1] * 20, categories=["nut", "tile"], gaussian_block=None), images


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
    for kind in GRIDS:
        mixed = model.distance(features, [0, 1], kind)
        torch.testing.assert_close(mixed[0], model.distance(features[:1], [0], kind)[0])
        torch.testing.assert_close(mixed[1], model.distance(features[1:], [1], kind)[0])


def test_several_categories_share_covariances_among_positions(model, two_categories):
    for kind, grid in GRIDS.items():
        assert model.get_buffer(f"{kind}_mean").shape[-2:] == (grid, grid)
        assert model.get_buffer(f"{kind}_whitening").shape[:2] == (1, grid**2)
    assert two_categories[0].feature_whitening.shape[1] == 16 and two_categories[0].residual_whitening.shape[1] == 4


@pytest.mark.parametrize(("side", "block"), [(8, 1), (16, 1), (32, 2)])
def test_by_default_the_grid_is_the_features_and_has_16_x_16_covariances_at_most(fitted_on, side, block):
    features, residuals = (F.interpolate(x[:10], (side, side)) for x in fitted_on[:2])
    model = fit(features, residuals, fitted_on[2][:10], gaussian_size=None, gaussian_block=None)
    assert (model.config.gaussian_size, model.config.gaussian_block) == (side, block)
    assert model.feature_whitening.shape[1] == min(side, 16) ** 2


@pytest.mark.parametrize("block", [1, 4])
def test_distances_under_a_shared_covariance_are_judged_by_position(block):
    features, residuals, raw_maps = GoodImages(seed=3).draw(30)
    features[..., -2:] = features.mean(0)[..., -2:] + 2 * (features - features.mean(0))[..., -2:]  # more at the right
    model = fit(features, residuals, raw_maps, gaussian_block=block)
    for maps in (model.location, model.scale):
        assert bool(maps[0, -1].std() > 1e-3) == (block == 4)


# Several processes


def buffers_of_fits(rank: int = 0, accelerator: Accelerator | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """Of fits to 13 images of two categories, the last 7 scored, by one process or by this one of two.

    A process holds every other image, or one holds all and the other none, or the pipeline shares them.
    """
    features, residuals, raw_maps = GoodImages(seed=12).draw(13)
    labels = [0, 1, 1] * 4 + [0]

    def fit_share(share: slice) -> NormalityModel:
        scored = [i for i in range(13)[share] if i >= 6]
        reduce = accelerator.reduce if accelerator else lambda part: part
        draws = features[share], residuals[share], raw_maps[scored]
        return fit(*draws, labels, ["nut", "tile"], share=share, reduce=reduce)

    images, names = [texture("brick", seed) for seed in range(11)], list("abbaababbab")
    pipeline = new_pipeline(("a", "b"), images)
    pipeline.fit_normality(
        images[:6], images[6:], names[:6], names[6:], batch_size=2, gaussian_channels=16, accelerator=accelerator
    )
    models = {
        "every other": fit_share(slice(rank, None, 2) if accelerator else slice(None)),
        "all or none": fit_share(slice(0) if rank else slice(None)),
        "pipeline": pipeline.normality,
    }
    config = pipeline.normality.config  # each process chooses weights, all the same
    found = [count for counts in config.found.values() for count in counts.values()]
    chosen = torch.tensor([*config.weights.values(), *config.image_weights.values(), *found], dtype=torch.float32)
    buffers = {name: dict(model.named_buffers()) for name, model in models.items()}
    return buffers | {"chosen": {"weights": chosen}}


def run_process(rank: int, folder: Path) -> None:
    """One of two."""
    accelerator = Accelerator(cpu=True)
    torch.save(buffers_of_fits(rank, accelerator), folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="has 1 good images"):  # on both
        fit(*GoodImages(0).draw(1 - rank), labels=[0], share=slice(rank, None, 2), reduce=accelerator.reduce)
    accelerator.end_training()


def test_two_processes_fit_what_one_does(tmp_path):
    run_twice(run_process, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, expected in buffers_of_fits().items():
        tolerance = 2e-3 if name == "pipeline" else 1e-5  # the pipeline rounds to half precision
        for buffer, values in expected.items():
            assert torch.equal(both[0][name][buffer], both[1][name][buffer]), (name, buffer)
            torch.testing.assert_close(both[0][name][buffer], values, rtol=tolerance, atol=tolerance)


def test_one_process_with_an_accelerator_fits_as_without(small_pipeline_without_normality, good_images):
    pipeline = small_pipeline_without_normality
    pipeline.fit_normality(good_images, gaussian_channels=16)
    without = dict(pipeline.normality.named_buffers())
    pipeline.fit_normality(good_images, gaussian_channels=16, accelerator=Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests make accelerators of their own
    for name, buffer in pipeline.normality.named_buffers():
        assert torch.equal(buffer, without[name]), name


def test_features_may_be_averaged_down_before(fitted_on, model):
    features, residuals, raw_maps = fitted_on
    averaged = fit(F.avg_pool2d(features, 2), F.avg_pool2d(residuals, 4), raw_maps, gaussian_size=SIDE // 2)
    for buffer, expected in zip(averaged.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-4)


# Refusals and files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"categories": ["a"] * 7}, "7 categories were given for 6 images"),
        (
            {"categories": ["a"] * 7, "holdout_images": 2, "holdout_categories": ["a"]},  # eight names, eight images
            "7 categories were given for 6 images",
        ),
        (
            {"categories": ["a"] * 6, "holdout_images": 2, "holdout_categories": ["a"]},
            "1 holdout_categories were given for 2 holdout_images",
        ),
        ({"categories": ["a"] * 6, "holdout_images": 2}, "0 holdout_categories were given for 2 holdout_images"),
        ({"gaussian_size": 6, "gaussian_block": 2}, "gaussian_block 2 must divide both grids"),
    ],
)
def test_bad_arguments_of_fit_normality_are_named(pipeline, good_images, arguments, message):
    if "holdout_images" in arguments:
        arguments = arguments | {"holdout_images": good_images[6 : 6 + arguments["holdout_images"]]}
    with pytest.raises(ValueError, match=message):
        pipeline.fit_normality(good_images[:6], **arguments)


def test_fit_normality_takes_the_size_of_the_grid(small_pipeline_without_normality, good_images):
    small_pipeline_without_normality.fit_normality(good_images[:5], gaussian_size=2, gaussian_channels=16)
    assert small_pipeline_without_normality.normality.feature_mean.shape == (1, 16, 2, 2)


def test_a_category_with_one_image_is_refused(fitted_on):
    draws = [x[:5] for x in fitted_on]
    with pytest.raises(ValueError, match="'tile' has 1 good images; it needs at least 2"):
        fit(*draws, labels=[0, 0, 0, 0, 1], categories=["nut", "tile"])


def test_a_single_held_out_image_is_refused(fitted_on):
    features, residuals, raw_maps = (x[:8] for x in fitted_on)
    with pytest.raises(ValueError, match="'tile' has 1 good images held out; it needs at least 2"):
        fit(features, residuals, raw_maps[7:])


def test_statistics_that_are_not_finite_are_refused(fitted_on):
    features, residuals, raw_maps = (x[:8].clone() for x in fitted_on)
    raw_maps[3, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="give no finite statistics"):
        fit(features, residuals, raw_maps)


def test_a_score_that_is_not_finite_is_refused(fitted_on):
    """Of a model that was saved with such statistics."""
    model = fit(*(x[:8] for x in fitted_on))
    model.score_location[0, 0] = torch.inf
    raw = torch.zeros(1, model.location.shape[1], *model.location.shape[2:])
    with pytest.raises(ValueError, match="scores are not finite"):
        model.judge(raw, torch.zeros(1), [0])


def test_half_precision_keeps_what_would_overflow(fitted_on, tmp_path):
    model = fit(*(x[:8] for x in fitted_on))
    model.score_location[0, 0] = 1e6
    model.half().save_pretrained(tmp_path)
    loaded = NormalityModel.from_pretrained(tmp_path)
    assert loaded.score_location[0, 0] == 1e6 and loaded.good_scores.dtype == torch.float32
    assert model.location.dtype == torch.half


def test_an_unknown_score_type_is_refused(model):
    with pytest.raises(ValueError):
        model.p_value(torch.zeros(1), "l2")


def test_save_and_load_are_bit_exact_in_half_precision(fitted_on, tmp_path):
    draws = [x[:20] for x in fitted_on]
    model = fit(*draws).half()
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = NormalityModel.from_pretrained(tmp_path)
    assert list(loaded.config.categories) == ["tile"]
    saved, restored = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert saved.keys() == restored.keys()
    for name, buffer in saved.items():
        assert torch.equal(buffer.float(), restored[name].float()), name
    model.float()
    for kind, x in zip(GRIDS, draws[:2], strict=True):
        assert torch.equal(loaded.distance(x, [0] * 20, kind), model.distance(x, [0] * 20, kind))


def test_half_precision_changes_little(model, fitted_on, tmp_path):
    model.save_pretrained(tmp_path)
    rounded = NormalityModel.from_pretrained(tmp_path).half().float()
    scores = score(model, *fitted_on)[1]["fused"]
    torch.testing.assert_close(score(rounded, *fitted_on)[1]["fused"], scores, rtol=0.02, atol=0.05)


def test_one_category_at_the_default_sizes_is_under_10_mb(tmp_path):
    NormalityModel(num_scores=1000).half().save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10e6


# Backbones with more channels than a covariance has room for


def test_of_very_many_summaries_evenly_picked_ones_are_kept(fitted_on, tmp_path, monkeypatch):
    """Those picked alone give the same distances; what is saved is as small, and loads."""
    monkeypatch.setattr(fitting, "MAX_SUMMARIES", 3)
    model, every = fit(*fitted_on), summarise(fitted_on[0])
    assert model.config.num_summaries == 3 < every.shape[1]
    assert model.global_whitening.shape == (6,)
    kept = every[:, [0, every.shape[1] // 3, 2 * every.shape[1] // 3]]
    labels = [0] * len(every)
    distance = model.global_distance(every, labels)
    assert torch.equal(distance, model.global_distance(kept, labels))
    model.save_pretrained(tmp_path)
    assert torch.equal(NormalityModel.from_pretrained(tmp_path).global_distance(every, labels), distance)

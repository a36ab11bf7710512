"""What a product is judged by: weights that evidence chooses, and what is told of them."""

import numpy as np
import pytest
import torch
from draws import GoodImages, summarise

from rad import NormalityModel
from rad.metrics import image_auroc
from rad.models.evidence import weighted_sum
from rad.models.fusion import COST, KINDS, STEPS, Look, Twins, choose_weights, climb, judged_by, kinds_of
from rad.models.normality import IMAGE_WEIGHTS, MAP_WEIGHTS

SIDE, NUM_GOOD = 16, 24


def top_mean(maps):
    return maps.flatten(1).topk(8, dim=1).values.mean(1)


def evidence(telling, num_good=NUM_GOOD, outlying=0.0, seed=0):
    """Looks at good images and at their twins, in which the telling scores rise by so much where the defect is."""
    rng = torch.Generator().manual_seed(seed)
    names = [name for name in MAP_WEIGHTS if name != "discriminator"]
    number = 2 * num_good
    masks = torch.zeros(number, SIDE, SIDE)
    for i in range(number):
        row, column = torch.randint(SIDE - 4, (2,), generator=rng).tolist()
        masks[i, row : row + 4, column : column + 3] = 1

    def maps(count):
        return {name: torch.randn(count, SIDE, SIDE, generator=rng) for name in names}

    good = Look(maps(num_good), torch.randn(num_good, generator=rng))
    bad = Look(maps(number), torch.randn(number, generator=rng) + outlying)
    for name, rise in telling.items():
        bad.maps[name].add_(rise * masks)
    sources = [i // 2 for i in range(number)]
    twins = Twins(masks, sources, list(range(number)), number)
    return good.pick(torch.tensor(sources)), bad, twins


def choose(looks, **priors):
    priors = priors or {"weights": MAP_WEIGHTS, "image_weights": IMAGE_WEIGHTS}
    return choose_weights(*looks, priors, top_mean, lambda part: part)


@pytest.mark.parametrize("name", ["pixel", "feature", "mahalanobis"])
def test_a_product_is_judged_by_what_tells_its_defects(name):
    weights = choose(evidence({name: 4.0}), weights=MAP_WEIGHTS)["weights"]
    assert set(weights) == set(MAP_WEIGHTS) and weights["discriminator"] == 0  # there is none here
    others = [weight for other, weight in weights.items() if other != name]
    assert weights[name] > 0 and max(others) <= 0.25 * weights[name]


def test_scores_that_err_in_different_places_are_fused():
    weights = choose(evidence({"pixel": 2.0, "feature": 2.0}), weights=MAP_WEIGHTS)["weights"]
    assert 0.4 < weights["pixel"] / weights["feature"] < 2.5


@pytest.mark.parametrize(("telling", "outlying"), [({}, 2.0), ({"mahalanobis": 2.0}, 0.0), ({"feature": 2.0}, 1.0)])
def test_the_image_score_tells_defects_at_least_as_well_as_any_part_and_the_prior(telling, outlying):
    looks = evidence(telling, outlying=outlying)
    chosen = choose(looks, image_weights=IMAGE_WEIGHTS)["image_weights"]

    def auroc(weights):
        good, bad = (
            top_mean(weighted_sum(x.maps, weights)) + weights.get("global", 0) * x.outlying for x in looks[:2]
        )
        return image_auroc(torch.cat([bad, good]).numpy(), np.repeat([1, 0], [len(bad), len(good)]))

    parts = [auroc({name: 1.0}) for name in (*looks[0].maps, "global")]
    assert auroc(chosen) >= max(*parts, auroc(IMAGE_WEIGHTS)) - 0.03


def test_of_few_twins_the_prior_stays():
    good, bad, twins = evidence({"pixel": 4.0}, num_good=3)
    chosen = choose((good, bad, twins))
    assert chosen == {"weights": MAP_WEIGHTS, "image_weights": IMAGE_WEIGHTS}
    unseen = Twins(torch.zeros_like(twins.masks), twins.sources, twins.numbers, twins.total)
    assert choose((good, bad, unseen)) == chosen


def test_defects_that_do_not_show_do_not_count():
    """Those of the last good image: whatever their maps are, the choice is the same."""
    good, bad, twins = evidence({"pixel": 3.0, "feature": 1.0})
    chosen = choose((good, bad, twins), weights=MAP_WEIGHTS)
    twins.masks[-2:] = 0
    hidden = choose((good, bad, twins), weights=MAP_WEIGHTS)
    for values in bad.maps.values():
        values[-2:] += 100
    assert choose((good, bad, twins), weights=MAP_WEIGHTS) == hidden
    assert hidden["weights"]["pixel"] > 0 and chosen["weights"]["pixel"] > 0


def test_processes_with_a_share_each_see_what_one_sees_of_all():
    good, bad, twins = evidence({"pixel": 3.0})
    parts, half = [], len(twins.numbers) // 2
    for of in (list(range(half)), list(range(half, 2 * half))):
        parts.append((good.pick(torch.tensor(of)), bad.pick(torch.tensor(of)), of))
    reduced = [
        sum(look.gather(numbers, 2 * half, lambda part: part).maps["pixel"] for _, look, numbers in parts),
        bad.gather(twins.numbers, twins.total, lambda part: part).maps["pixel"],
    ]
    torch.testing.assert_close(*reduced)


def test_climbing_ends_where_no_step_is_better():
    peak = np.array([2.0, 0.0, 0.5])

    def objective(weights):
        return -float(np.square(np.array(list(weights.values())) - peak).sum())

    names, start = ("a", "b", "c"), np.array([1.0, 1.0, 1.0])
    assert climb(objective, names, start, pull=0.0).tolist() == peak.tolist()
    assert climb(objective, names, start, pull=1e6).tolist() == start.tolist()
    useless = climb(lambda weights: weights["a"], names, start, pull=0.0)
    assert useless.tolist() == [max(STEPS), 0, 0]
    assert climb(lambda weights: 0.5 * COST * (weights["b"] > 0), names, start, pull=0.0)[1] == 0  # not worth its cost


def refit(draws, sources=None, changed=0.0, **kwargs):
    """On draws and on twins of some of them, which differ from them by `changed` in every feature and raw map."""
    model = NormalityModel(gaussian_channels=4, timesteps=(20, 201), top_k=8, discriminator=True)
    features, residuals, raw_maps = draws
    labels, twins = [0] * len(features), None
    if sources is not None:
        masks = torch.zeros(len(sources), *raw_maps.shape[-2:])
        masks[:, 2:5, 2:5] = 1
        twins = Twins(masks, sources, list(range(len(sources))), len(sources))
        features = torch.cat([features, features[sources] + changed])
        residuals = torch.cat([residuals, residuals[sources]])
        raw_maps = torch.cat([raw_maps, raw_maps[sources] + changed])
    return model.fit(features, residuals, summarise(features), labels, raw_maps, ["tile"], twins=twins, **kwargs)


@pytest.fixture(scope="module")
def draws():
    return GoodImages(seed=0).draw(40)


def test_twins_enter_no_statistic(draws):
    sources = [i // 2 for i in range(40)]
    with_twins = refit(draws, sources, 5.0, chosen=())
    without = refit(draws)
    assert dict(with_twins.config.weights) == dict(without.config.weights) == MAP_WEIGHTS
    for (name, buffer), other in zip(with_twins.named_buffers(), without.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-5, atol=1e-5, msg=name)


def test_a_twin_is_judged_as_the_good_image_that_it_was(draws):
    """Exact copies score what these score held out: as many of them are found as there are false alarms."""
    sources = [i for i in range(40) for _ in KINDS]
    model = refit(draws, sources, chosen=())
    for counts in model.config.found.values():
        assert counts["of"] == 40
        for rate in (0.05, 0.1):
            assert counts[f"{rate:g}"] == (model.p_value(model.good_scores[0]) <= rate).sum()
    plain = refit(draws, sources, 20.0, chosen=())
    assert all(counts["0.05"] == 40 for counts in plain.config.found.values())


def test_a_fit_chooses_what_it_is_asked_for_alone(draws):
    model = refit(draws, [i // 2 for i in range(40)], 2.0, chosen=("image_weights",))
    assert dict(model.config.weights) == MAP_WEIGHTS
    assert dict(model.config.image_weights) != IMAGE_WEIGHTS


def test_kinds_take_turns():
    seen = torch.tensor([True, True, False, True])
    assert [of.tolist() for of in kinds_of(seen)] == [[True, False, False, False], [False, True, False, True]]


def test_what_a_model_judges_by_is_told():
    config = {
        "weights": {"pixel": 0.5, "mahalanobis": 2.0, "feature": 0.0, "discriminator": 1.0},
        "image_weights": {"global": 0.3, "mahalanobis": 1.0},
        "discriminator": False,
        "num_scores": 30,
        "num_different": None,
        "found": {"drawn": {"of": 30, "0.01": 9, "0.05": 21, "0.1": 25}, "pasted": {"of": 0, "0.01": 0, "0.05": 0}},
    }
    assert judged_by(config) == [
        "Weights in the map: Mahalanobis 2, KL 0.5.",
        "Weights in the image score: Mahalanobis 1, whole image 0.3.",
        "Of defects put on its own good images it finds 21 of 30 drawn ones at a false-alarm rate of 5%.",
    ]
    assert len(judged_by(config | {"found": None})) == 2


def test_evidence_that_is_not_finite_is_told_of_in_the_same_words(draws):
    broken = tuple(part.clone() for part in draws)
    broken[2][3, 0] = float("nan")
    for sources in (None, [0, 0, 1, 1]):
        with pytest.raises(ValueError, match="These good images give no finite statistics"):
            refit(broken, sources)


def test_a_second_fit_starts_where_the_first_did(draws):
    sources = [i // 2 for i in range(40)]
    model = refit(draws, sources, 2.0)
    features, residuals, raw_maps = draws
    chosen = dict(model.config.weights)
    model.fit(features, residuals, summarise(features), [0] * 40, raw_maps, ["tile"])
    assert model.config.found is None and dict(model.config.weights) == chosen

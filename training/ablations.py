"""The ablations: each yields what a choice in the score makes of images' raw maps."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from raw_maps import RawMaps, numbers_of_draws

from rad.models.evidence import FUSED, GLOBAL, SCORE_TYPES
from rad.models.normality import NormalityModel

PIXELS = (1, 4, 16, 64, 256, 1024)  # of the map, in the image score
UNET = ("pixel", "feature", "rgb")  # scores of the U-Net, with a raw map at each timestep

# (setting, is it the default, [(maps [N, h, w] or None, scores [N]) for each seed])
Rows = Iterator[tuple[tuple[str, ...], bool, list[tuple[torch.Tensor | None, torch.Tensor]]]]


@dataclass
class Evaluation:
    """One of the two sets that settings are measured on.

    Attributes:
        images, good: All raw maps but those of several draws, of the images and of the good ones that give statistics.
        draws, good_draws: Raw maps of several draws, of some of the images and of the same good ones.
        normality: Fitted to images that are not measured on; on the CPU.
        timesteps: All that were scored, ascending.
    """

    images: RawMaps
    good: RawMaps
    draws: RawMaps
    good_draws: RawMaps
    normality: NormalityModel
    timesteps: list[int]


def top_mean(maps: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the `count` largest values of each map, [N]."""
    return maps.flatten(1).topk(min(count, maps[0].numel())).values.mean(1)


def fit_statistics(x: RawMaps, maps: torch.Tensor, categories: list[str], timesteps: list[int]) -> NormalityModel:
    """Statistics of good images' KL, feature error and RGB maps [N, 3 T, m, m], as the pipeline fits them.

    The Gaussians, which are not asked for, are made as small as they can be.
    """
    features, residuals = x.load("features"), x.load("residuals")
    summaries = features.mean((2, 3))  # in the place of the extractor's
    model = NormalityModel(timesteps=timesteps, gaussian_size=2, gaussian_channels=min(8, features.shape[1]))
    model.fit(features, residuals, summaries, x.labels, maps, categories)
    return model.half().float()  # saved in half precision, as the pipeline's own


def deviations(model: NormalityModel, maps: torch.Tensor, labels: list[int], name: str) -> torch.Tensor:
    """A score's maps, of raw maps [N, M, m, m], in units of good images' deviation at each position, [N, T, m, m]."""
    channels = model.channels[name]
    return (maps[:, channels] - model.location[labels, channels]) / model.scale[labels, channels]


def of_images(x: Evaluation) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What `NormalityModel.judge` takes."""
    return x.images.load("raw"), x.images.load("global"), x.images.labels


def ablate_score(x: Evaluation) -> Rows:
    maps, scores = x.normality.judge(*of_images(x))
    for name in scores:
        yield (SCORE_TYPES[name].title,), name == FUSED, [(maps.get(name), scores[name])]


def ablate_weights(x: Evaluation) -> Rows:
    normality, top_k, given = copy.deepcopy(x.normality), x.normality.config.top_k, of_images(x)

    def settings(weights: dict[str, float]) -> dict[str, dict[str, float]]:
        """The default first."""
        found = {f"as they are: {', '.join(f'{weight:g}' for weight in weights.values())}": weights}
        for name, weight in weights.items():
            if weight and (name == GLOBAL or name in normality.score_types):
                found[f"without {SCORE_TYPES[name].title}"] = weights | {name: 0.0}
        return found | {"all 1": dict.fromkeys(weights, 1.0)}

    of_map = settings(dict(normality.config.weights))
    for setting, weights in of_map.items():
        normality.register_to_config(weights=weights)
        fused = normality.judge(*given)[0][FUSED]
        yield ("the map", setting), setting == next(iter(of_map)), [(fused, top_mean(fused, top_k))]
    of_score = settings(dict(normality.config.image_weights))
    for setting, weights in of_score.items():
        normality.register_to_config(weights=x.normality.config.weights, image_weights=weights)
        scores = normality.judge(*given)[1][FUSED]
        yield ("the image score", setting), setting == next(iter(of_score)), [(None, scores)]


def ablate_timesteps(x: Evaluation) -> Rows:
    own, top_k = list(x.normality.config.timesteps), x.normality.config.top_k

    def at_all_timesteps(maps: RawMaps) -> torch.Tensor:
        """KL, feature error and RGB difference at all timesteps, [N, 3 T, m, m]."""
        raw, order = maps.load("raw"), list(own)
        parts = torch.stack([raw[:, x.normality.channels[name]] for name in UNET], dim=1)
        if x.timesteps != sorted(own):
            parts = torch.cat([parts, maps.load("further").unflatten(1, (3, -1))], dim=2)
            order += [t for t in x.timesteps if t not in own]
        return parts[:, :, [order.index(t) for t in x.timesteps]].flatten(1, 2)

    categories = x.normality.config.categories
    model = fit_statistics(x.good, at_all_timesteps(x.good), categories, x.timesteps)
    raw = at_all_timesteps(x.images)
    settings = {str(t): [t] for t in x.timesteps}
    settings[" + ".join(map(str, own))] = own
    if x.timesteps != sorted(own):
        settings["all"] = x.timesteps
    for name in UNET[:2]:
        z = deviations(model, raw, x.images.labels, name)
        for setting, timesteps in settings.items():
            maps = z[:, [x.timesteps.index(t) for t in timesteps]].mean(1)
            yield (SCORE_TYPES[name].title, setting), timesteps == own, [(maps, top_mean(maps, top_k))]


def ablate_draws(x: Evaluation, max_draws: int, num_seeds: int, default: int) -> Rows:
    own = list(x.normality.config.timesteps)
    for draws in numbers_of_draws(max_draws):
        # 1. Statistics of good images under as many draws; those of the distances stay
        good = x.good_draws.load(f"{draws}-0")
        good = torch.cat([good[:, x.normality.channels[name]] for name in UNET], dim=1)
        fitted = fit_statistics(x.good, good, x.normality.config.categories, own)
        normality = copy.deepcopy(x.normality)
        for name in UNET:
            to, source = normality.channels[name], fitted.channels[name]
            normality.location[:, to] = fitted.location[:, source]
            normality.scale[:, to] = fitted.scale[:, source]
            to, source = normality.score_types.index(name), fitted.score_types.index(name)
            for buffer in ("map_scale", "score_location", "score_scale"):
                normality.get_buffer(buffer)[:, to] = fitted.get_buffer(buffer)[:, source]
        # 2. The scores of each seed
        distance, labels = x.draws.load("global"), x.draws.labels
        found = [normality.judge(x.draws.load(f"{draws}-{seed}"), distance, labels) for seed in range(num_seeds)]
        for name in (FUSED, *UNET[:2]):
            variants = [(maps[name], scores[name]) for maps, scores in found]
            yield (SCORE_TYPES[name].title, str(draws)), draws == default, variants


def ablate_normalisation(x: Evaluation) -> Rows:
    top_k, (by_position, _) = x.normality.config.top_k, x.normality.judge(*of_images(x))
    good_labels = torch.tensor(x.good.labels)
    for name in UNET[:2]:
        raw, good = (maps.load("raw")[:, x.normality.channels[name]] for maps in (x.images, x.good))
        of_category = [good[good_labels == label] for label in range(len(x.normality.config.categories))]
        location = torch.stack([maps.mean((0, 2, 3)) for maps in of_category])[x.images.labels][..., None, None]
        scale = torch.stack([maps.std((0, 2, 3)) for maps in of_category])[x.images.labels][..., None, None]
        settings = {
            "none": raw.mean(1),
            "each image (RAN)": ((raw - raw.mean((2, 3), keepdim=True)) / raw.std((2, 3), keepdim=True)).mean(1),
            "good images": ((raw - location) / scale).mean(1),
            "good images, each position": by_position[name],
        }
        for setting, maps in settings.items():
            default = maps is by_position[name]
            yield (SCORE_TYPES[name].title, setting), default, [(maps, top_mean(maps, top_k))]


def ablate_whitening(x: Evaluation) -> Rows:
    own, top_k, channels = list(x.normality.config.timesteps), x.normality.config.top_k, x.normality.channels

    def unscaled(maps: RawMaps) -> torch.Tensor:
        """The maps of the U-Net with the error of raw channels in its place, [N, 3 T, m, m]."""
        raw = maps.load("raw")
        parts = {name: raw[:, channels[name]] for name in UNET} | {"feature": maps.load("raw_channels")}
        return torch.cat(list(parts.values()), dim=1)

    model = fit_statistics(x.good, unscaled(x.good), x.normality.config.categories, own)
    raw = unscaled(x.images)
    settings = {
        ("raw", "none"): x.images.load("raw_channels").mean(1),
        ("standardised", "none"): x.images.load("raw")[:, channels["feature"]].mean(1),
        ("raw", "good images"): deviations(model, raw, x.images.labels, "feature").mean(1),
        ("standardised", "good images"): x.normality.judge(*of_images(x))[0]["feature"],
    }
    for setting, maps in settings.items():
        yield setting, setting == ("standardised", "good images"), [(maps, top_mean(maps, top_k))]


def ablate_alpha(x: Evaluation) -> Rows:
    ran = {name: x.images.load(f"ran_{name}") for name in ("pixel", "feature")}
    ways = {
        "each image (RAN)": (ran, 64),
        "good images": (x.normality.judge(*of_images(x))[0], x.normality.config.top_k),
    }
    for alpha in (i / 10 for i in range(11)):
        for way, (maps, top_k) in ways.items():
            fused = alpha * maps["pixel"] + (1 - alpha) * maps["feature"]
            yield (way, f"{alpha:g}"), False, [(fused, top_mean(fused, top_k))]


def ablate_image_score(x: Evaluation) -> Rows:
    given, default = of_images(x), x.normality.config.top_k
    fused = x.normality.judge(*given)[0][FUSED]
    num_pixels, normality = fused[0].numel(), copy.deepcopy(x.normality)
    counts = sorted({*PIXELS, default, num_pixels})
    for count in [count for count in counts if count <= num_pixels]:
        setting = {1: "1 (max)", num_pixels: f"{count} (mean)"}.get(count, str(count))
        yield ("the anomaly map", setting), False, [(None, top_mean(fused, count))]
        normality.register_to_config(top_k=count)
        scores = normality.judge(*given)[1][FUSED]
        yield ("the image score's own map", setting), count == default, [(None, scores)]


@dataclass(frozen=True)
class Ablation:
    """A table: its title, the question it answers, the columns of a setting, what yields its rows, and whether the
    last column is a quantity."""

    title: str
    question: str
    columns: tuple[str, ...]
    rows: Callable[..., Rows]
    sweep: bool


ABLATIONS = {
    "score": Ablation(
        "Score",
        "How good is each score alone, and what does fusing them give?",
        ("score",),
        ablate_score,
        False,
    ),
    "weights": Ablation(
        "Weights",
        "What does each map add to the fused map, and each to the image score? The weights are those of "
        "{weights}; the image score has one more, of the whole image's score.",
        ("of", "weights"),
        ablate_weights,
        False,
    ),
    "timesteps": Ablation(
        "Timesteps",
        "How much noise? One timestep by itself, the model's together, and all together, in units of good images' "
        "deviation at each position.",
        ("score", "timestep of 1000"),
        ablate_timesteps,
        True,
    ),
    "draws": Ablation(
        "Noise draws",
        "What does averaging noise draws at each timestep bring? Two draws are an antithetic pair. Means over noise "
        "seeds ± their standard deviation; the last columns give the standard deviation of an image's score over "
        "seeds, in units of the deviation between good images.",
        ("score", "draws at each timestep"),
        ablate_draws,
        True,
    ),
    "normalisation": Ablation(
        "Normalisation",
        "A score's z-score within each image, as RAN takes it, or against good images, with one mean and deviation "
        "for all positions or one for each.",
        ("score", "normalised by"),
        ablate_normalisation,
        False,
    ),
    "whitening": Ablation(
        "Channel scale",
        "Feature error of the extractor's raw channels, which RAN weighs equally, or of channels scaled to unit "
        "deviation, as it is and against good images at each position.",
        ("channels", "normalised by"),
        ablate_whitening,
        False,
    ),
    "alpha": Ablation(
        "Alpha",
        "RAN's A = alpha z(KL) + (1 - alpha) feature error: to the letter, with each image's own z-score and raw "
        "channels, and with both scores in units of good images' deviation at each position.",
        ("z-score against", "alpha"),
        ablate_alpha,
        True,
    ),
    "image_score": Ablation(
        "Image score",
        "Over how many of a map's largest values should the image score be the mean? Of the anomaly map, and of the "
        "map with the weights of the image score. Maps have {map_size} x {map_size} values.",
        ("map", "largest values"),
        ablate_image_score,
        True,
    ),
}

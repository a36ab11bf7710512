"""The model card of a pipeline on the Hub."""

from collections.abc import Mapping

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .models.fusion import judged_by

TASK = "image-segmentation"
TAGS = ["anomaly-detection", "anomaly-localization", "defect-detection", "industrial-inspection", "diffusion"]
METRICS = {  # how the Hub calls the kind of metric, and its name in the card
    "image_auroc": ("roc_auc", "image AUROC"),
    "pixel_auroc": ("roc_auc", "pixel AUROC"),
    "pixel_ap": ("average_precision", "pixel AP"),
    "aupro": ("aupro", "AUPRO (FPR <= 0.3)"),
}
USAGE = (
    "from rad import RADPipeline  # or, without the package: from diffusers import DiffusionPipeline\n"
    "\n"
    'pipe = RADPipeline.from_pretrained("{repo_id}")  # or DiffusionPipeline, with trust_remote_code=True\n'
    'out = pipe("part.jpg", false_alarm_rate=0.01)\n'
    "out.is_anomalous[0], out.p_value[0]  # is it bad, and how often does a good part look this odd\n"
    "out.anomaly_map[0], out.mask[0], out.regions[0]  # where\n"
    'pipe.restore("part.jpg").images[0]  # what a good one would look like'
)


def create_model_card(
    pipeline: DiffusionPipeline,
    repo_id: str | None = None,
    title: str | None = None,
    metrics: Mapping[str, Mapping[str, float | str]] | None = None,
    training: str | Mapping[str, object] | None = None,
    summary: str | None = None,
    denoising: str | None = None,
    picture: str | None = None,
    caption: str = "From left to right: input, anomaly map with the regions that raise the alarm, restored.",
    license: str = "apache-2.0",
    datasets: list[str] | None = None,
    base_model: str | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """A card for a `RADPipeline`; what the pipeline knows about itself is read from it.

    Args:
        pipeline: With its normality, if it has been fitted.
        repo_id: "user/repo", for the lines that show how to load it.
        title: By default the repository's name.
        metrics: For each data set, by its name, the values measured on its test split; "image_auroc", "pixel_auroc",
            "pixel_ap" and "aupro" are known, others keep their names. They also become the `model-index`; a text in
            place of a value, why there is none, does not.
        training: How it was trained: Markdown, or facts by name such as {"Command": "...", "Steps": 3500}.
        summary: Of the data that it was trained on: Markdown, as from `rad.data.summary`.
        denoising: How well its network denoises: Markdown, as from `rad.denoising`.
        picture: File name in the repository of a picture of real results, as from `results_figure`.
        caption: What it shows.
        license, datasets, base_model, tags: Metadata of the Hub; the tags are added to the usual ones.

    Returns:
        The card; `card.save("README.md")` writes it.
    """
    title = title or (repo_id or "RAD").split("/")[-1]
    metrics = metrics or {}
    results = [
        EvalResult(
            task_type=TASK,
            task_name="Anomaly localization",
            dataset_type=name.lower().replace(" ", "-"),
            dataset_name=name,
            dataset_split="test",
            metric_type=METRICS.get(metric, (metric, metric))[0],
            metric_name=METRICS.get(metric, (metric, metric))[1],
            metric_value=value,
        )
        for name, values in metrics.items()
        for metric, value in values.items()
        if not isinstance(value, str)
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=license,
        tags=TAGS + (tags or []),
        base_model=base_model,
        datasets=datasets,
        model_name=title,
        eval_results=results or None,
    )

    paragraphs = [f"# {title}", _introduction(pipeline)]
    if picture:
        paragraphs.append(f"![Real results, described below]({picture})\n\n*{caption}*")
    paragraphs.append(
        "## How to use it\n\n```python\n" + USAGE.format(repo_id=repo_id or "folder-or-hub-id") + "\n```"
    )
    if metrics:
        paragraphs.append("## Measured\n\n" + _table(metrics))
    if training:
        facts = isinstance(training, Mapping)
        text = "\n".join(f"- {name}: {value}" for name, value in training.items()) if facts else training
        paragraphs.append("## How it was trained\n\n" + text)
    if pipeline.normality is not None:
        told = "\n".join(f"- {sentence}" for sentence in judged_by(pipeline.normality.config))
        paragraphs.append(f"## What it judges by\n\n{told}")
    if summary:
        paragraphs.append("## Data\n\n" + summary)
    if denoising:
        paragraphs.append(
            "## Denoising\n\nGood images, held out if any are, beside their best Gaussian blur.\n\n" + denoising
        )
    paragraphs.append(_use_and_limits(pipeline))
    return ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(paragraphs) + "\n")


def _introduction(pipeline: DiffusionPipeline) -> str:
    parameters = sum(p.numel() for p in pipeline.unet.parameters()) / 1e6
    text = (
        "Finds defects in photos of parts, having seen good parts only: *Removing Anomalies as Noises for Industrial "
        "Defect Localization* (Lu et al., ICCV 2023) as a diffusers pipeline. A U-Net of "
        f"{parameters:.1f} M parameters, frozen features of `{pipeline.feature_extractor.config.backbone}`, "
        f"images at {pipeline.config.resolution} x {pipeline.config.resolution} pixels"
    )
    if pipeline.normality is None:
        return text + ". It has no statistics of good images yet: `pipe.fit_normality(good_images)` comes first."
    config = pipeline.normality.config
    return (
        f"{text}, timesteps {', '.join(map(str, config.timesteps))} of "
        f"{pipeline.scheduler.config.num_train_timesteps}. Knows: {', '.join(config.categories)}."
    )


def _table(metrics: Mapping[str, Mapping[str, float | str]]) -> str:
    columns = list(dict.fromkeys(metric for values in metrics.values() for metric in values))
    lines = ["| data | " + " | ".join(METRICS.get(m, (m, m))[1] for m in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, values in metrics.items():
        cells = [values.get(m, "") for m in columns]
        cells = [cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _use_and_limits(pipeline: DiffusionPipeline) -> str:
    limits = ["Thresholds hold for photos taken like the good ones: same camera, light and pose."]
    if pipeline.normality is not None:
        config = pipeline.normality.config
        low, high = pipeline.normality.false_alarm_interval(0.01)
        shared = f", shared by {len(config.categories)} categories" if len(config.categories) > 1 else ""
        limits.append(
            f"They rest on {config.num_scores} held-out good photos{shared}: set to 1 %, the false-alarm rate is "
            f"between {low:.1%} and {high:.1%} (95 % confidence); rates far below {1 / config.num_scores:.1%} are "
            "extrapolated, not observed."
        )
    limits.append(
        f"Photos are resized to {pipeline.config.resolution} x {pipeline.config.resolution} pixels: defects of a few "
        "pixels in large photos are lost."
    )
    limits.append("A restored picture is a guess at a good part, not evidence of what lies under a defect.")
    return (
        "## Intended use\n\nVisual inspection of the products named above, or of others after "
        "`pipe.fit_normality(good_images)`: to point a person to odd parts and places. Not for deciding alone where a "
        "missed defect can hurt someone, nor for medical images or pictures of people.\n\n## Limits\n\n"
        + "\n".join(f"- {limit}" for limit in limits)
    )

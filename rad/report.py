"""The report of an evaluation: its tables as Markdown, and one HTML file that needs nothing beside itself."""

import base64
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .data import AnomalyDataset
from .data.dataset import evenly
from .evaluation import Record
from .image_reader import decode
from .models.evidence import SCORE_TYPES
from .models.false_alarms import p_value_text
from .truths import EMPTY, MASKED, NONE, undefined_sentences
from .visualization import (
    curve_figures,
    histogram_figure,
    maps_figure,
    restoration_figure,
    sweep_figure,
    title_of,
    verdict_picture,
)

NUM_PICTURED = 4  # of each sort in a category
LEGEND = "The image, and its map as heat: the truth dashed in white, the mask found in cyan."

COLUMNS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "aupro": "AUPRO",
    "aupro_0.05": "AUPRO, FPR ≤ 0.05",
}
MVTEC_AD = frozenset(
    "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood "
    "zipper".split()
)
# RAN's tables 1 and 2: pixel AUROC and PRO (FPR <= 0.3) in percent, mean over MVTec-AD's 15 categories
PUBLISHED = {
    "one model for each category": {
        "SPADE": (96.0, 91.7),
        "PaDiM": (97.8, 92.8),
        "CFlow": (98.6, 94.6),
        "DRAEM": (97.3, 93.0),
        "UniAD": (97.0, 91.1),
        "RAN": (96.7, 93.7),
    },
    "one model for all categories": {
        "PaDiM": (90.5, 85.3),
        "DRAEM": (89.4, 82.2),
        "UniAD": (97.0, 91.1),
        "RAN": (96.0, 93.0),
    },
}


@dataclass(frozen=True)
class Table:
    """A heading, a note, the names of the columns and the cells, all as plain text."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]

    @property
    def has_values(self) -> bool:
        """Whether there is anything beside the names of rows and columns."""
        return bool(self.rows) and len(self.columns) > 1

    def to_markdown(self) -> str:
        """The table in Markdown; names from files cannot start anything in it."""
        lines = (
            [f"## {_plain(self.title)}", "", _plain(self.note), ""] if self.note else [f"## {_plain(self.title)}", ""]
        )
        cells = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(lines + ["| " + " | ".join(map(_plain, row)) + " |" for row in cells])

    def to_html(self, level: int = 2) -> str:
        """The table in HTML; the first column is each row's heading."""
        head = "".join(f"<th scope=col>{escape(name)}</th>" for name in self.columns)
        rows = "".join(
            f"<tr><th scope=row>{escape(row[0])}</th>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        table = f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        return f"<h{level}>{escape(self.title)}</h{level}>{note}{table}"


@dataclass(frozen=True)
class Picture:
    """A picture for the report, and the words below it, also read out in its place.

    Attributes:
        lossless: PNG for drawings, JPEG for photographs.
    """

    image: Image.Image
    caption: str
    lossless: bool = True

    def to_html(self) -> str:
        """A figure with the picture inside the page."""
        buffer, kind = io.BytesIO(), "png" if self.lossless else "jpeg"
        if self.lossless:
            self.image.quantize(128).save(buffer, "png", optimize=True)
        else:
            self.image.save(buffer, "jpeg", quality=85)
        source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        size = f"width={self.image.width} height={self.image.height}"
        caption = escape(self.caption)
        return f'<figure><img src="{source}" alt="{caption}" {size}><figcaption>{caption}</figcaption></figure>'


def metrics_table(title: str, note: str, first: str, rows: dict[str, dict[str, float | None]]) -> Table:
    """A row for each name; columns that no row has are left out, a dash stands where one has none."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows.values())]
    cells = [[k, *("-" if row.get(n) is None else f"{row[n]:.3f}" for n in names)] for k, row in rows.items()]
    return Table(title, note, [first, *(COLUMNS[name] for name in names)], cells)


def summary_tables(results: dict[str, Any]) -> list[Table]:
    """Of all categories together: scores, categories, decisions and, where asked for, the published table."""
    tables, scores = [images_table(results)], results["scores"]
    note = f"{results['num_good']} good and {results['num_anomalous']} defective images"
    if len(results["categories"]) > 1:
        note += f"; mean over {len(results['categories'])} categories"
        note += " or, of each metric, those that define it" if results["truth"]["undefined"] else ""
    note += "."
    if results["published"]:
        tables.append(published_table(results))
    tables.append(
        metrics_table("Scores", note, "score", {title_of(name): score["mean"] for name, score in scores.items()})
    )
    if len(results["categories"]) > 1:
        tables.append(metrics_table("Categories", "The fused score.", "category", scores["fused"]["categories"]))
    if results["thresholds"]:
        tables.append(decisions_table("Decisions", scores["fused"]["decisions"]["all"], results))
    return [table for table in tables if table.has_values]


def images_table(results: dict[str, Any]) -> Table:
    """What there was to measure on, and what could not be."""
    truth, kinds = results["truth"], ["good", "defective", MASKED, EMPTY, NONE]
    note = "Defective images without a mask, or with an empty one, count at image level only."
    unread = truth.get("unreadable", [])
    left_out = [f"Left out, because they cannot be read: {len(unread)} images or masks. {unread[0]}"] if unread else []
    told = [note, *left_out, *truth["notes"], *undefined_sentences(truth["undefined"])]
    cells = [[category, *(str(own[kind]) for kind in kinds)] for category, own in truth["counts"].items()]
    return Table("Images", " ".join(told), ["category", *kinds], cells)


def defects_table(results: dict[str, Any], category: str) -> Table:
    """A row for each kind of defect of a category."""
    note = "Images of this kind against the good ones, fused score. A dash: of this kind there are no masks."
    return metrics_table("Kinds of defect", note, "defect", results["scores"]["fused"]["defects"][category])


def decisions_table(title: str, rows: list[dict[str, Any]], results: dict[str, Any]) -> Table:
    """False alarms at each requested rate beside what chance allows, and what is found."""
    few = " or ".join(map(str, sorted({t["num_scores"] for t in results["thresholds"].values()})))
    note = (
        "If the requested rate holds, the number of false alarms lies in the interval with a probability of 95 % or "
        "more (binomial). The last but one column also counts in that thresholds themselves rest on "
        f"{few} good images (beta-binomial)."
    )
    columns = ["requested rate", "false alarms", "95 % interval", "inside", "thresholds counted in", "defective found"]
    cells = []
    for row in rows:
        by_chance = ["-"] * 3  # without good images
        if row["num_good"]:
            (low, high), (wide_low, wide_high) = row["interval"], row["interval_few"]
            by_chance = [f"{low} to {high}", "yes" if row["inside"] else "NO", f"{wide_low} to {wide_high}"]
        alarms, found = (
            f"{count} of {total}" + (f" ({count / total:.1%})" if total else "")
            for count, total in ((row["false_alarms"], row["num_good"]), (row["found"], row["num_bad"]))
        )
        cells.append([f"{row['false_alarm_rate']:.3g}", alarms, *by_chance, found])
    return Table(title, note, columns, cells)


def published_table(results: dict[str, Any]) -> Table:
    """RAN's table 1 or 2, published rows and then ours."""
    rows = [
        [name, f"{auroc:.1f}", f"{pro:.1f}", "published, MVTec-AD"]
        for name, (auroc, pro) in PUBLISHED[results["published"]].items()
    ]
    mean, names = results["scores"]["fused"]["mean"], set(results["categories"])
    same = names == MVTEC_AD and not results["arguments"]["pasted_defects"]
    data = "this run, MVTec-AD" if same else "this run, OTHER DATA"
    ours = [mean["pixel_auroc"], mean["aupro"]]
    ours = ["-" if value is None else f"{100 * value:.1f}" for value in ours]
    note = f"Pixel AUROC and PRO (FPR ≤ 0.3) in percent, {results['published']}, mean over categories."
    if not same:
        note += (
            " The published rows are of the test images of MVTec-AD's 15 categories and this run is not, so its row "
            "cannot be compared with theirs."
        )
    elif results["arguments"]["max_test_samples"]:
        note += " This run took some of the test images only."
    number = 1 + list(PUBLISHED).index(results["published"])
    rows.append([f"ours, {results['arguments']['mode']} mode", *ours, data])
    return Table(f"Beside RAN's table {number}", note, ["method", "pixel AUROC", "PRO", "measured on"], rows)


def to_markdown(results: dict[str, Any]) -> str:
    """All tables."""
    tables = summary_tables(results)
    for category in results["categories"]:
        table = defects_table(results, category)
        if table.has_values:
            tables.append(Table(f"{table.title}: {category}", table.note, table.columns, table.rows))
    return "\n\n".join(table.to_markdown() for table in tables) + "\n"


def to_html(results: dict[str, Any], sections: dict[str, dict[str, list[Picture]]], figures: Iterable[Picture]) -> str:
    """The report as one page.

    Args:
        results: As in results.json.
        sections: For each category groups of pictures by their headings.
        figures: The paper's.
    """
    parts = [table.to_html() for table in summary_tables(results)]
    shown = [p.to_html() if p.lossless else f"<div class=wide>{p.to_html()}</div>" for p in figures]
    if shown:
        parts.append("<h2>Figures as the paper's</h2>" + "".join(shown))
    for number, (category, groups) in enumerate(sections.items()):
        table = defects_table(results, category)
        inside = [table.to_html(3)] if table.has_values else []
        decisions = results["scores"]["fused"]["decisions"].get("categories", {}).get(category)
        if decisions and len(sections) > 1:
            inside.append(decisions_table("Decisions", decisions, results).to_html(3))
        for heading, pictures in groups.items():
            inside.append(f"<h3>{escape(heading)}</h3>")
            gallery = "".join(picture.to_html() for picture in pictures)
            if pictures[0].lossless:
                inside.append(f"<div class='gallery plots'>{gallery}</div>")
            else:
                inside.append(f"<p>{LEGEND}</p><div class=gallery>{gallery}</div>")
        is_open = " open" if number == 0 else ""
        parts.append(f"<details{is_open}><summary>{escape(category)}</summary>{''.join(inside)}</details>")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    model = escape(str(results["arguments"]["model"]))
    settings = escape(json.dumps(results["arguments"], indent=2))
    return f"""<!DOCTYPE html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation of {model}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>Evaluation of {model}</h1>
<p>{escape(results["data"])}, {escape(results["arguments"]["mode"])} mode, {results["seconds_per_image"]:.2f} s
an image on {escape(results["device"])}; {escape(versions)}.</p></header>
<main>
{"".join(parts)}
<details><summary>Arguments</summary><pre>{settings}</pre></details>
</main>
</body>
</html>
"""


def draw_category(
    dataset: AnomalyDataset,
    records: list[Record],
    curves: dict[str, dict[str, np.ndarray]],
    thresholds: dict[str, Any] | None,
    false_alarm_rate: float,
) -> dict[str, list[Picture]]:
    """What the report shows of a category: curves, score histogram, and the images that say most.

    Args:
        curves: From `rad.metrics.pixel_curves` for each score type.
        thresholds: The category's in results.json; None in paper mode.
        false_alarm_rate: Of the verdicts.
    """
    labels = np.array([record.label for record in records])
    scores = {name: np.array([record.scores[name] for record in records]) for name in records[0].scores}
    rate = f"{false_alarm_rate:g}"
    groups = {}
    if len(set(labels.tolist())) == 2:
        groups["Curves"] = [Picture(drawn, title) for title, drawn in curve_figures(scores, labels, curves).items()]
    threshold = thresholds and thresholds["fused"]["image"][rate]
    good, bad = (scores["fused"][labels == label] for label in (0, 1))
    drawn = histogram_figure(good, bad, threshold, false_alarm_rate)
    groups["Scores of good and defective images"] = [Picture(drawn, "Histogram of the fused image scores.")]

    def picture(record: Record) -> Picture:
        source, verdict, alarm = dataset.samples[record.index].image, "", False
        name = "/".join(source.parts[-2:]) if isinstance(source, Path) else f"image {record.index}"
        if thresholds:
            alarm = record.p_values["fused"] <= false_alarm_rate
            verdict = ("false alarm", "found")[record.label] if alarm else ("passed", "missed")[record.label]
            verdict = f"{verdict}, {p_value_text(record.p_values['fused'], thresholds['p_value_resolution'])}, "
        drawn = verdict_picture(
            decode(dataset[record.index].image),
            record.map("fused"),
            record.mask(),
            thresholds and thresholds["fused"]["pixel"][rate],
            alarm,
            thresholds and thresholds["fused"]["heat_range"],
        )
        return Picture(drawn, f"{name} ({record.defect}): {verdict}score {record.scores['fused']:.2f}", lossless=False)

    ranked = sorted(records, key=lambda record: record.scores["fused"])
    for heading, label, order in (
        ("Good images that look worst", 0, ranked[::-1]),
        ("Defective images that look best", 1, ranked),
        ("Clearest defects", 1, ranked[::-1]),
    ):
        shown = [record for record in order if record.label == label][:NUM_PICTURED]
        if shown:
            groups[heading] = [picture(record) for record in shown]
    return groups


def draw_figures(
    dataset: AnomalyDataset,
    records: list[Record],
    paper_records: list[Record],
    sweep: dict[str, dict[str, float]],
    restored: list[tuple[list[Image.Image], np.ndarray]],
) -> dict[str, Picture]:
    """RAN's figures 1, 5, 6 and 7 on these images, by file name.

    Args:
        sweep: Metrics for each alpha.
        restored: The images after each step, and their distances to good ones, for each restored image.
    """
    bad = [record for record in records if record.label and record.has_mask]
    shown = [bad[i] for i in evenly(len(bad), 5)]
    in_paper_mode = {record.index: record for record in paper_records}
    figures = {}
    if shown:
        pictures = [decode(dataset[record.index].image) for record in shown]
        names = [name for name in SCORE_TYPES if name in shown[0].scores and SCORE_TYPES[name].has_map]
        names = sorted(names, key=lambda name: (name == "fused", name != "rgb", name))  # RAN's order: RGB first
        columns = {"truth": [record.mask() for record in shown]}
        columns |= {name: [record.map(name) for record in shown] for name in names}
        drawn = maps_figure(pictures, columns)
        figures["methods"] = Picture(drawn, "Score types side by side, as RAN's figure 1.", lossless=False)
        names = [name for name in ("image_auroc", "pixel_auroc", "aupro") if sweep["0"].get(name) is not None]
        lines = {COLUMNS[name]: [row[name] for row in sweep.values()] for name in names}
        if lines:
            drawn = sweep_figure([float(alpha) for alpha in sweep], lines)
            figures["alpha_sweep"] = Picture(drawn, "The weight of KL in paper mode, as RAN's figure 5.")
        paper = [in_paper_mode[record.index] for record in shown]
        columns = {"truth": [record.mask() for record in paper]}
        columns |= {name: [record.map(name) for record in paper] for name in ("pixel", "feature", "fused")}
        drawn = maps_figure(pictures, columns)
        caption = "KL, feature error and their fusion in paper mode, as RAN's figure 6."
        figures["kl_and_fused"] = Picture(drawn, caption, lossless=False)
    if restored:
        drawn = restoration_figure(*zip(*restored, strict=True))
        caption = "Restoration step by step and the distance to good images, as RAN's figure 7."
        figures["restoration"] = Picture(drawn, caption, lossless=False)
    return figures


def _plain(text: str) -> str:
    """For Markdown: one line, no HTML, no end of a cell, no link or other mark."""
    return " ".join(re.sub(r"([\\|`*_\[\]])", r"\\\1", escape(text, quote=False)).split())


STYLE = """
:root { color-scheme: light dark; --line: #c8ccd2; --soft: #f3f4f6; --dim: #5a6270; }
@media (prefers-color-scheme: dark) { :root { --line: #444b55; --soft: #22262c; --dim: #a6adb8; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5em 0 .2em; }
h2 { font-size: 1.25rem; margin: 1.8em 0 .3em; }
h3 { font-size: 1.05rem; margin: 1.6em 0 .3em; }
h1, summary, figcaption, tbody th { overflow-wrap: anywhere; }
p, figcaption { color: var(--dim); margin: .2em 0 .6em; max-width: 75ch; }
.wide { overflow-x: auto; }
.wide img { min-width: 620px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .35em .8em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; min-width: 8em; padding-left: 0; }
thead th { color: var(--dim); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody tr:hover { background: var(--soft); }
figure { margin: .6em 0; }
img { max-width: 100%; height: auto; border-radius: 4px; background: #fff; display: block; }
figcaption { font-size: .85rem; margin: .3em 0; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 14px; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.gallery figure { margin: 0; min-width: 0; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .6em 1em; margin: 1.5em 0; }
summary { font-size: 1.25rem; font-weight: 700; cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; }
"""

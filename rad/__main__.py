"""Scores one picture from the command line: `python -m rad part.png --output heatmap.png`. Many at once, from files,
folders, archives and URLs: `python -m rad predict --help`.

Exit status: 0 for a good part, 3 for a defect, 2 for an error; 1 is Python's own, where it could not even start.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

from rad import RADPipeline, command
from rad.data.summary import describe
from rad.files import whole
from rad.image_processor import overlay
from rad.image_reader import decode
from rad.models.false_alarms import p_value_text, rate_note
from rad.pipeline_arguments import rate_of
from rad.pipeline_loading import EMBEDDED_MODELS


def main() -> int:
    """Returns the exit status."""
    if sys.argv[1:2] == ["predict"]:
        return command.main(command.parse_args(sys.argv[2:], "python -m rad predict"))
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m rad", description=__doc__, formatter_class=raw)
    parser.add_argument("image", help="The picture to inspect.")
    parser.add_argument("--model", default="synthetic", help=f"Folder, Hub id or one of {', '.join(EMBEDDED_MODELS)}.")
    parser.add_argument("--category", help="What the picture shows; by default the pipeline finds out.")
    parser.add_argument(
        "--false_alarm_rate", type=float, help="On good parts; by default 1 %%, or what so few can tell."
    )
    parser.add_argument("--output", default="heatmap.png", help="Where the heatmap over the picture goes.")
    args = parser.parse_args()

    pipeline = RADPipeline.load(args.model)
    pipeline.set_progress_bar_config(disable=True)
    start = time.monotonic()
    rate = rate_of(args.false_alarm_rate, pipeline.normality)
    output = pipeline(args.image, class_labels=args.category, false_alarm_rate=rate)
    seconds = time.monotonic() - start

    image = decode(args.image, pipeline.image_processor.pixel_range)
    path = Path(args.output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        overlay(image, output.anomaly_map[0], *pipeline.normality.heat_range()).save(partial)
    low, high = output.false_alarm_interval
    verdict, count = "DEFECT" if output.is_anomalous[0] else "good", len(output.regions[0])
    odds = p_value_text(float(output.p_value[0]), pipeline.normality.p_value_resolution)
    print(
        f"{args.image}: {verdict} ({output.category[0]}, {count} region{'s' * (count != 1)}). Good parts look as odd "
        f"as this in a share {odds} of cases; the alarm is set to {rate:.2%} (on "
        f"{pipeline.normality.config.num_scores} good parts, which leave it between {low:.1%} and {high:.1%}, "
        f"95 % confidence). {seconds:.1f} s."
    )
    if note := rate_note(rate, pipeline.normality.num_different):
        print(note)
    print(f"Read: {describe(Path(args.image))}. Heatmap: {path.resolve()}")
    return 3 if output.is_anomalous[0] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:  # argparse's own errors have the status 2 too
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except Exception:  # no sentence of ours: all of it
        traceback.print_exc()
    sys.exit(2)

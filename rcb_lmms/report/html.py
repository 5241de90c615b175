"""`rcb report`: what a folder of runs says, as one HTML file that needs no server and no network."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.lab.checkpoint import is_lab
from rcb_lmms.report import charts
from rcb_lmms.report.collect import Benchmark, Measured, collect
from rcb_lmms.report.flips import Cost, flips, model_label, run_label
from rcb_lmms.report.gallery import Gallery
from rcb_lmms.report.summary import Setting, group, model_of, summary_table, version_notes
from rcb_lmms.report.tables import LEGEND, readable, row_names

# Together with answers and records, a file stays below 15 MB.
MOST_IMAGE_BYTES = 8_000_000
MOST_SAMPLES = 1500
MOST_LETTERS = 3_500_000
STAGES = {
    "open": "opening images",
    "tower": "vision tower",
    "choose": "choosing",
    "pack": "packing",
    "encode": "vision tower, choosing, packing",
    "prefill": "prefill",
    "decode": "decoding",
    "generate": "language model",
    "rest": "calibration and the rest",
}
# What records note now, and what they noted before.
NOTED = (("open", "tower", "choose", "pack", "prefill", "decode"), ("open", "encode", "generate"))


def write_report(results: Path, out: Path, folders: Sequence[Path] = ()) -> Path:
    """Write the report of all runs below a folder.

    Args:
        results: a folder of runs, as for `collect`.
        out: the file.
        folders: where the runs' data sets lie, if not where they were made; without them the report has no images.

    Raises:
        UserError: no run that can be used, a folder that is not there, or a file that cannot be written.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(
                wanted=f"the runs' data sets in {folder}",
                found="no such folder",
                allowed="the folder in which the runs were made, or one with the same data sets",
                next_step="--data FOLDER, or leave it out: the report is then written without images",
            )
    runs, excluded = collect(results)
    models = _models(runs)
    # A quickstart's data lies beside its runs.
    guesses = [Path(results) / "data", Path(results).parent / "data", Path.cwd()]
    gallery = Gallery([*map(Path, folders)], guesses, MOST_IMAGE_BYTES)
    data, spent = flips(models, gallery, MOST_SAMPLES, MOST_LETTERS)
    page = _template().render(
        title="/".join(Path(results).resolve().parts[-2:]),
        models=[_model(settings, spent) for settings in tqdm(models, "tables and charts", unit="model")],
        several=len(models) > 1,
        laboratory=all(is_lab(str(run.arguments.get("pretrained"))) for run in runs),
        legend=LEGEND,
        data=_script(data),
        notes=[*_left_out(data, gallery), *data["notes"]],
        excluded=[(str(entry.path), entry.reason) for entry in excluded],
        versions=version_notes((run.path, run.record) for run in runs),
        records=_records(models),
    )
    return write_atomic(out, page.encode("utf-8", "replace"))


def _models(runs: Sequence[Measured]) -> list[list[Setting]]:
    """Settings by model: methods are compared on one model."""
    found: dict[tuple, list[Measured]] = {}
    for run in runs:
        found.setdefault(model_of(run), []).append(run)
    return [group(own) for own in found.values()]


def _template() -> Any:
    loader = PackageLoader("rcb_lmms.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html.jinja")


def _script(data: dict[str, Any]) -> str:
    """Data as JSON inside a script element, which nothing in it can end."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _left_out(data: dict[str, Any], gallery: Gallery) -> list[str]:
    found = [
        f"{own['label']}: {own['hidden']} of the {own['hidden'] + len(own['samples'])} samples on which runs differ "
        "are not listed; the counts have all"
        for own in data["benchmarks"]
        if own["hidden"]
    ]
    if gallery.left_out:
        found.append(f"{gallery.left_out} images found no room beside the {len(gallery.images)} that are shown")
    return found


def _model(settings: Sequence[Setting], spent: dict[tuple[int, str], list[Cost]]) -> Any:
    """What the page says of one model."""
    table = summary_table([run for setting in settings for run in setting.runs])
    text = readable(table)
    spent_in = [_stages(setting) for setting in settings]
    stages = [stage for stage in STAGES if any(stage in own for own in spent_in)]
    return {
        "label": model_label(settings[0].first),
        "columns": list(text.columns),
        "rows": text.astype(str).values.tolist(),
        "charts": [_charts(table, task, benchmark) for task, benchmark in table.attrs["benchmarks"].items()],
        "legend": [(charts.legend_mark(number), label) for number, label in enumerate(_labels(table))],
        "stages": {stage: STAGES[stage] for stage in stages},
        "costs": _costs(settings, spent_in, stages),
        "ledger": _ledger(settings, table.attrs["benchmarks"], spent),
    }


def _labels(table: pd.DataFrame) -> list[str]:
    """Series of the charts: one for each method and its options."""
    named = zip(table["method"], row_names(table), strict=True)
    return list(dict.fromkeys(name for method, name in named if method != "none"))


def _charts(table: pd.DataFrame, task: str, benchmark: Benchmark) -> dict[str, Any]:
    """Scores of one task over tokens and over seconds."""
    numbers = table.assign(name=row_names(table), seconds=1 / table["questions_per_second"].astype(float))
    quantities = {
        "layer_average_tokens": "visual tokens per decoder layer (log scale)",
        "seconds": "seconds per question (log scale)",
    }
    drawn = [
        charts.scatter(
            f"{benchmark.heading} over {label}",
            _series(numbers, task, benchmark, quantity),
            label,
            "accuracy, % (95% interval)" if benchmark.unit == 100 else "score (95% interval)",
        )
        for quantity, label in quantities.items()
    ]
    return {"label": benchmark.label, "charts": [chart for chart in drawn if chart]}


def _series(numbers: pd.DataFrame, task: str, benchmark: Benchmark, quantity: str) -> list[charts.Series]:
    found = {label: charts.Series(label, []) for label in _labels(numbers)}
    levels = []
    for _, row in numbers.dropna(subset=[f"{task}_accuracy", quantity]).iterrows():
        mean, low, high = (benchmark.unit * row[f"{task}_{name}"] for name in ("accuracy", "low", "high"))
        told = f"{row['name']} {row['budget']}: {mean:.1f} [{low:.1f}, {high:.1f}] at {row[quantity]:.4g}"
        point = charts.Point(row[quantity], mean, low, high, told.replace("none :", "unpruned:"))
        if row["method"] == "none":
            levels.append(charts.Series("unpruned", level=point))
        else:
            found[row["name"]].points.append(point)
    return [*found.values(), *levels]


def _costs(
    settings: Sequence[Setting], found: Sequence[dict[str, float]], stages: Sequence[str]
) -> list[dict[str, Any]]:
    """Milliseconds of each stage per question, averaged over seeds; what records do not say is blank."""
    longest = max((sum(own.values()) for own in found if own), default=0)
    return [
        {
            "label": _label(setting),
            "stages": [own.get(stage) for stage in stages],
            "shares": {stage: 100 * own[stage] / longest for stage in stages if stage in own} if longest else {},
            "total": 1000 / setting.speed if setting.speed else None,
            "gflops": None if (flops := setting.mean("prefill_tflops")) is None else 1000 * flops,
        }
        for setting, own in zip(settings, found, strict=True)
    ]


def _label(setting: Setting) -> str:
    name = "unpruned" if setting.first.method == "none" else setting.first.method
    return ", ".join(part for part in (name, setting.budget, setting.options) if part)


def _stages(setting: Setting) -> dict[str, float]:
    totals = [run.record["totals"] for run in setting.runs]
    noted = [{stage: f"seconds_{stage}" for stage in stages} for stages in NOTED]
    names = next((names for names in noted if all({*names.values()} <= own.keys() for own in totals)), None)
    # A run that was resumed did not spend its time on all of its questions.
    known = names and all(own.get("questions") and "seconds" in own for own in totals)
    if not known or any(own.get("resumed_questions") for own in totals):
        return {}
    found = {
        stage: 1000 * statistics.fmean(own[name] / own["questions"] for own in totals) for stage, name in names.items()
    }
    whole = 1000 * statistics.fmean(own["seconds"] / own["questions"] for own in totals)
    return found | {"rest": max(0.0, whole - sum(found.values()))}


def _ledger(
    settings: Sequence[Setting],
    benchmarks: dict[str, Benchmark],
    spent: dict[tuple[int, str], list[Cost]],
) -> list[dict[str, Any]]:
    """Asked and retained visual tokens of each setting and task, over the samples of all seeds."""
    found = []
    for setting in settings:
        for task in setting.tasks:
            costs = [cost for run in setting.runs for cost in spent.get((id(run), task), [])]
            if not costs:
                continue
            kept = [cost.kept for cost in costs]
            calibration = setting.first.record["calibrations"].get(task, {})
            found.append(
                {
                    "label": _label(setting),
                    "task": benchmarks[task].label,
                    "asked": calibration.get("target", setting.first.target),
                    "native": statistics.fmean(cost.native for cost in costs),
                    "mean": statistics.fmean(kept),
                    "low": min(kept),
                    "median": statistics.median(kept),
                    "high": max(kept),
                    "histogram": charts.histogram(kept, (0, max(cost.native for cost in costs))),
                }
            )
    return found


def _records(models: Sequence[Sequence[Setting]]) -> list[tuple[str, str, str]]:
    return [
        (
            run_label(run, len(models) > 1),
            str(run.path),
            json.dumps(run.record, indent=1, ensure_ascii=False, default=str),
        )
        for settings in models
        for setting in settings
        for run in setting.runs
    ]

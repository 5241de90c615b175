"""What runs answered to the same samples, as data for a page: every answer, and the samples on which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from rcb_lmms.report.agreement import plain
from rcb_lmms.report.collect import Measured
from rcb_lmms.report.gallery import Gallery, NoPictures
from rcb_lmms.report.summary import Setting, benchmarks_of, model_of, told, unpruned_of

# Letters of a question or an answer that the page holds.
MOST_LETTERS = 1000
# What documents and scores call a sample's category.
_CATEGORIES = ("category", "sub_category", "question_type", "data_type", "type", "l2-category")


@dataclass(frozen=True)
class Cost:
    """What a sample's visual tokens were, before and after pruning, and which stayed (see `LedgerRow.kept`)."""

    native: int
    kept: int
    which: tuple[str, ...]


def costs(row: dict[str, Any]) -> Cost | None:
    """The visual tokens of a logged sample; `None` for a model of another package."""
    counts = (row.get("token_counts") or [None])[0] or {}
    if "visual_native" not in counts or "visual_kept" not in counts:
        return None
    return Cost(counts["visual_native"], counts["visual_kept"], tuple(counts.get("kept", ())))


def run_label(run: Measured, several_models: bool) -> str:
    """A run in a list: its method and what tells it from others of that method."""
    shown = [told(name, text) for name, text in sorted(run.arguments.items()) if name != "pretrained"]
    name = "unpruned" if run.method == "none" else run.method
    return ", ".join([name, *shown, *([model_label(run)] if several_models else [])])


def model_label(run: Measured) -> str:
    """The model behind a run: its family, its checkpoint, and whether it sees tiles."""
    pretrained, family, split = model_of(run)
    views = {"True": "tiles", "False": "base view"}.get(str(split), "")
    return " ".join(str(part) for part in (family, pretrained, views) if part) or run.record["model"]


def flips(
    models: Sequence[Sequence[Setting]], gallery: Gallery, most_samples: int, most_letters: int
) -> tuple[dict[str, Any], dict[tuple[int, str], list[Cost]]]:
    """The page's data, and what every sample of a run (by its `id`) and a task cost.

    The data is `runs`, by name; `benchmarks`, with every run's `answers` and `marks` and the `samples` on which runs
    differ, by their place; `kept`, what a sample's `tokens` name; `pictures` and `images` (see `Gallery`); `notes`.

    Args:
        models: the settings of each model; runs of different models share no benchmark.
        gallery: takes the images.
        most_samples: of all benchmarks together, those that differ most first.
        most_letters: of their texts and kept tokens.
    """
    runs = [run for settings in models for setting in settings for run in setting.runs]
    numbers = {id(run): number for number, run in enumerate(runs)}
    benchmarks = [
        _benchmark(settings, task, label, numbers)
        for settings in models
        for task, label in _tasks(settings, len(models) > 1)
    ]
    _keep_most_differing(benchmarks, most_samples)
    kept: dict[str, int] = {}
    notes: Counter[str] = Counter()
    spent: dict[tuple[int, str], list[Cost]] = {}
    for own in benchmarks:
        _add_samples(own, runs, gallery, kept, notes, spent, most_letters // len(benchmarks))
    data = {
        "runs": [run_label(run, len(models) > 1) for run in runs],
        "benchmarks": benchmarks,
        "kept": list(kept),
        "pictures": gallery.pictures,
        "images": gallery.images,
        "notes": [f"{_counted(count)} without images: {reason}" for reason, count in notes.items()],
    }
    return data, spent


def _tasks(settings: Sequence[Setting], several: bool) -> list[tuple[str, str]]:
    runs = [run for setting in settings for run in setting.runs]
    model = f", {model_label(runs[0])}" if several else ""
    return [(task, shown.label + model) for task, shown in benchmarks_of(runs).items()]


def _benchmark(settings: Sequence[Setting], task: str, label: str, numbers: dict[int, int]) -> dict[str, Any]:
    """One benchmark's answers; `answers` of a run name, for each sample, which of the sample's texts it gave."""
    own = [(setting, run) for setting in settings for run in setting.runs if task in run.scores]
    texts: list[dict[str, int]] = [{} for _ in own[0][1].scores[task].answers]
    shown: list[list[str]] = [[] for _ in texts]
    entries = []
    for setting, run in own:
        scores, answers = run.scores[task], []
        for sample, answer in enumerate(scores.answers):
            key = plain(answer)
            if key not in texts[sample]:
                texts[sample][key] = len(texts[sample])
                shown[sample].append(_short(answer))
            answers.append(texts[sample][key])
        unpruned = unpruned_of(setting, settings)
        reference = unpruned.first if unpruned is not None and task in unpruned.first.scores else None
        entries.append(
            {
                "run": numbers[id(run)],
                "reference": None if reference is None or reference is run else numbers[id(reference)],
                "answers": answers,
                "marks": [int(mark == 1) for mark in scores.marks] if scores.judged else None,
            }
        )
    count = len(texts)
    differing = [
        sample
        for sample in range(count)
        if len(texts[sample]) > 1 or len({entry["marks"][sample] for entry in entries if entry["marks"]}) > 1
    ]
    return {
        "task": task,
        "label": label,
        "count": count,
        "runs": entries,
        "differing": differing,
        "hidden": 0,
        "texts": shown,
    }


def _keep_most_differing(benchmarks: Sequence[dict[str, Any]], most: int) -> None:
    """Leave the samples with the most runs against the majority, and say how many others there are."""

    def minority(own: dict[str, Any], sample: int) -> int:
        votes = Counter(entry["answers"][sample] for entry in own["runs"])
        return len(own["runs"]) - max(votes.values())

    # Benchmarks take turns, so that a large one leaves room for the others.
    ordered = [
        (turn, number, sample)
        for number, own in enumerate(benchmarks)
        for turn, sample in enumerate(sorted(own["differing"], key=lambda sample: -minority(own, sample)))
    ]
    chosen = sorted(ordered)[:most]
    for number, own in enumerate(benchmarks):
        listed = [sample for _, owner, sample in chosen if owner == number]
        own["hidden"] = len(own["differing"]) - len(listed)
        own["differing"] = listed


def _add_samples(
    own: dict[str, Any],
    runs: Sequence[Measured],
    gallery: Gallery,
    kept: dict[str, int],
    notes: Counter[str],
    spent: dict[tuple[int, str], list[Cost]],
    most_letters: int,
) -> None:
    """Questions, targets, kept tokens and pictures of the listed samples, and the costs of all."""
    task, ranked = own["task"], own.pop("differing")
    wanted, texts, found = set(ranked), own.pop("texts"), {}
    rows: dict[int, list[tuple[Measured, str, dict[str, Any], Cost | None]]] = {sample: [] for sample in ranked}
    for entry in own["runs"]:
        run = runs[entry["run"]]
        for sample, (part, row) in enumerate(rows_of(run, task)):
            if (cost := costs(row)) is not None:
                spent.setdefault((id(run), task), []).append(cost)
            if sample in wanted:
                found.setdefault(sample, _sample(part, row, texts[sample], part != task))
                rows[sample].append((run, part, row, cost))
    listed = _that_fit(ranked, found, rows, most_letters)
    own["hidden"] += len(ranked) - len(listed)
    own["samples"] = {}
    for sample in tqdm(sorted(listed), f"images of {task}", unit="sample"):
        shown = own["samples"][sample] = found[sample] | {"tokens": {}, "pictures": {}}
        for entry, (*_, cost) in zip(own["runs"], rows[sample], strict=True):
            if cost is not None:
                which = kept.setdefault(" ".join(cost.which), len(kept))
                shown["tokens"][entry["run"]] = [cost.native, cost.kept, which]
        try:
            shown["pictures"] = _pictures(gallery, task, rows[sample], own["runs"])
        except NoPictures as error:
            notes[str(error)] += 1
        _, part, row, _ = rows[sample][0]
        shown["question"] = shown["question"] or _short(gallery.questions.get((part, row["doc_id"]), ""))


def _that_fit(ranked: Sequence[int], found: dict[int, dict], rows: dict[int, list], most_letters: int) -> list[int]:
    """The first samples whose texts and kept tokens have no more letters together."""
    listed, letters = [], 0
    for sample in ranked:
        own = found[sample]
        letters += sum(map(len, (own["question"], own["target"], own["category"], *own["texts"])))
        letters += sum(30 + sum(map(len, cost.which)) for *_, cost in rows[sample] if cost is not None)
        if letters > most_letters:
            break
        listed.append(sample)
    return listed


def rows_of(run: Measured, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A task's logged samples in the order of `Scores.answers`, each with the part of a group that it belongs to."""
    source = run.sources[task]
    for part in source.parts(task):
        for row in source.rows(part):
            yield part, row


def _sample(part: str, row: dict[str, Any], texts: list[str], is_part: bool) -> dict[str, Any]:
    doc = row.get("doc") or {}
    own = {name: value for scored in row.values() if isinstance(scored, dict) for name, value in scored.items()} | doc
    category = part if is_part else next((own[name] for name in _CATEGORIES if own.get(name) is not None), "")
    asked = row.get("arguments")
    question = doc.get("question") or (asked[0] if isinstance(asked, list) and asked else "")
    return {
        "id": f"{part} {row['doc_id']}" if is_part else row["doc_id"],
        "question": _short(question),
        "target": _short(_target(row.get("target"))),
        "category": str(category),
        "texts": texts,
    }


def _target(value: Any) -> str:
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def _counted(count: int) -> str:
    return f"{count} sample" if count == 1 else f"{count} samples"


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"


def _pictures(
    gallery: Gallery,
    task: str,
    rows: Sequence[tuple[Measured, str, dict[str, Any], Cost | None]],
    entries: Sequence[dict[str, Any]],
) -> dict[int, list[int]]:
    """Pictures by run: those of one preprocessing share theirs.

    Raises:
        NoPictures: not one run's.
    """
    found: dict[int, list[int]] = {}
    problem = NoPictures("no run of this package")
    shared: dict[str | None, list[int]] = {}
    # A packing that cuts padding off has fewer tokens before pruning; all views have the most that a run saw.
    native = max((cost.native for *_, cost in rows if cost is not None), default=0)
    for (run, part, row, cost), entry in zip(rows, entries, strict=True):
        if cost is None:
            continue
        seen = run.record["resolved"].get("preprocess")
        try:
            if seen not in shared:
                shared[seen] = gallery.show(run.sources[task], part, row, native)
            found[entry["run"]] = shared[seen]
        except NoPictures as error:
            problem = error
    if not found:
        raise problem
    return found

"""What changed between a golden file and now: findings, each of which is a regression, and notes, which are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest

from rcb_lmms.regress.declaration import Tolerance
from rcb_lmms.regress.golden import COUNTS, Golden, Sample, differences
from rcb_lmms.regress.kept import KeptSet, ranges
from rcb_lmms.report.statistics import mcnemar, paired_p

# How far a fitted threshold may move by rounding: ten times what float32 cosines differ between CPUs.
THRESHOLD = 1e-5
# Aggregated metrics are sums of the same numbers, perhaps in another order.
METRIC = 1e-9
SHOWN = 10  # lines of a kind
# Counts that follow kept sets: they move with every token that flips near the cut.
FOLLOWING = ("input_tokens", "visual_kept", "visual_layer_average")


@dataclass
class Report:
    """One case held against its golden file.

    Attributes:
        findings: regressions, by what moved, each a few lines of text.
        notes: what changed within the tolerance, or explains what did not.
    """

    case: str
    samples: int
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(golden: Golden, now: Golden, tolerance: Tolerance) -> Report:
    """Hold a case against its golden file.

    Raises:
        UserError: the documents' media changed, so that results cannot be compared.
    """
    golden.check_data(now)
    report = Report(golden.case, len(golden.samples))
    current = {(sample.task, sample.name): sample for sample in now.samples}
    pairs = [(sample, current[sample.task, sample.name]) for sample in golden.samples]
    _settings(golden, now, report)
    _prompts(pairs, report)
    flips = _tokens(pairs, report)
    _calibrations(golden, now, flips, report)
    _same_answers(pairs, report)
    _changed_answers(pairs, tolerance, report)
    _score_shift(pairs, tolerance, report)
    _metrics(golden, now, pairs, report)
    return report


def _settings(golden: Golden, now: Golden, report: Report) -> None:
    """Resolved arguments that both know, so that a new option is no regression; versions explain, and are noted."""
    both = golden.resolved.keys() & now.resolved.keys()
    changed = differences(*({name: own.resolved[name] for name in both} for own in (golden, now)))
    report.findings += [f"resolved argument {line}" for line in changed]
    libraries = [line for line in differences(golden.versions, now.versions) if not line.startswith("commit")]
    report.notes += [f"version of {line}" for line in libraries]


def _prompts(pairs: list[tuple[Sample, Sample]], report: Report) -> None:
    changed = [(old, new) for old, new in pairs if old.prompt != new.prompt]
    if changed:
        old, new = changed[0]
        rewritten = old.question != new.question
        texts = f"{old.question!r}\n    now {new.question!r}" if rewritten else "in the chat template"
        report.findings.append(f"prompts of {len(changed)} samples changed; the first: {old.task} {texts}")


def _tokens(pairs: list[tuple[Sample, Sample]], report: Report) -> int:
    """Kept sets and counts; returns how many tokens flipped near the cut, which is no finding."""
    moved, counted, forgiven = [], [], 0
    for old, new in pairs:
        lines, near = kept_difference(old, new)
        forgiven += near
        moved += [(old, lines)] if lines else []
        counts = count_difference(old, new, near)
        counted += [(old, counts)] if counts else []
    for title, found in (("kept sets", moved), ("token counts", counted)):
        if found:
            lines = [f"  {_name(sample)}: {'; '.join(own)}" for sample, own in found]
            report.findings.append("\n".join([f"{title} of {len(found)} samples changed", *_first(lines)]))
    if forgiven:
        report.notes.append(f"{forgiven} tokens within rounding of the cut were decided the other way")
    return forgiven


def kept_difference(old: Sample, new: Sample) -> tuple[list[str], int]:
    """Differences between two kept sets in words, and how many tokens flipped of those that may."""
    if [part.native for part in old.kept] != [part.native for part in new.kept]:
        return [f"{_natives(old)} visual tokens before pruning, now {_natives(new)}"], 0
    lines, forgiven = [], 0
    for view, (before, now) in enumerate(zip(old.kept, new.kept, strict=True)):
        flipped = before.kept ^ now.kept
        if flipped <= before.near:
            forgiven += len(flipped)
            continue
        where = f"view {view}: " if len(old.kept) > 1 else ""
        lines.append(where + _exchanged(before, now))
    return lines, forgiven


def _exchanged(before: KeptSet, now: KeptSet) -> str:
    dropped, added = ranges(before.kept - now.kept), ranges(now.kept - before.kept)
    parts = [f"no longer kept {dropped}"] * bool(dropped) + [f"newly kept {added}"] * bool(added)
    return f"{len(before.kept)} -> {len(now.kept)} kept, " + ", ".join(parts)


def count_difference(old: Sample, new: Sample, forgiven: int) -> list[str]:
    """Counts that moved by more than the tokens that flipped near the cut account for."""
    return [
        f"{name} {old.counts[name]:g} -> {new.counts[name]:g}"
        for name in COUNTS
        if abs(old.counts[name] - new.counts[name]) > (forgiven if name in FOLLOWING else 0)
    ]


def _calibrations(golden: Golden, now: Golden, flips: int, report: Report) -> None:
    for task in sorted({*golden.calibrations, *now.calibrations}):
        before, after = golden.calibrations.get(task, {}), now.calibrations.get(task, {})
        # Where a token flipped near the cut, the fit may have stopped at its neighbour: its position is then another.
        free = {"ties", "achieved"} if flips else set()
        report.findings += [
            f"calibration of {task}: {name} {before.get(name)} -> {after.get(name)}"
            for name in sorted({*before, *after} - free)
            if not math.isclose(before.get(name, math.inf), after.get(name, -math.inf), rel_tol=0, abs_tol=THRESHOLD)
        ]


def _same_answers(pairs: list[tuple[Sample, Sample]], report: Report) -> None:
    """An answer that did not change is scored as before, on any machine."""
    changed = [(old, new) for old, new in pairs if old.answer == new.answer and old.scores != new.scores]
    lines = [
        f"  {_name(old)}: answer {old.answer!r}: " + ", ".join(differences(old.scores, new.scores))
        for old, new in changed
    ]
    if changed:
        report.findings.append("\n".join([f"scores of {len(changed)} unchanged answers changed", *_first(lines)]))


def _changed_answers(pairs: list[tuple[Sample, Sample]], tolerance: Tolerance, report: Report) -> None:
    changed = [(old, new) for old, new in pairs if old.answer != new.answer]
    if not changed:
        return
    p = flips_p(len(changed), len(pairs), tolerance.flips)
    allowed = p >= tolerance.alpha
    reason = f"p = {p:.2g} at a rate of {tolerance.flips:g}, alpha {tolerance.alpha:g}"
    title = f"{len(changed)} of {len(pairs)} answers changed ({'within' if allowed else 'beyond'} tolerance: {reason})"
    lines = [line for old, new in changed for line in _flip(old, new)]
    (report.notes if allowed else report.findings).append("\n".join([title, *lines]))


def flips_p(changed: int, asked: int, rate: float) -> float:
    """Probability of so many changed answers, or more, if each changes with probability `rate` (exact binomial)."""
    return float(binomtest(changed, asked, rate, alternative="greater").pvalue)


def _flip(old: Sample, new: Sample) -> Iterator[str]:
    lines, near = kept_difference(old, new)
    kept = "; ".join(lines) or (f"{near} tokens near the cut" if near else "the same tokens kept")
    yield f"  {_name(old)}: {old.question.splitlines()[0] if old.question else ''}"
    yield f"    wanted {old.target!r}, golden {old.answer!r}, now {new.answer!r}; {kept}"


def _score_shift(pairs: list[tuple[Sample, Sample]], tolerance: Tolerance, report: Report) -> None:
    """Per task and metric, whether scores went up or down more than chance would have them."""
    for task in dict.fromkeys(old.task for old, _ in pairs):
        own = [(old, new) for old, new in pairs if old.task == task]
        tested = set()
        for metric in sorted({metric for old, _ in own for metric in old.scores}):
            both = tuple(
                (old.scores[metric], new.scores[metric])
                for old, new in own
                if metric in old.scores and metric in new.scores
            )
            # Several metrics of a task often carry one and the same score per sample.
            if both and both not in tested and (p := shift_p(*zip(*both, strict=True))) < tolerance.alpha:
                before, after = (math.fsum(scores) / len(both) for scores in zip(*both, strict=True))
                report.findings.append(
                    f"{task} {metric}: mean {before:.4f} -> {after:.4f} over {len(both)} samples "
                    f"(p = {p:.2g}, alpha {tolerance.alpha:g})"
                )
            tested.add(both)


def shift_p(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """Two-sided p of a difference between scores of the same samples; McNemar's exact test for scores of 0 and 1."""
    first, second = np.array(before), np.array(after)
    if np.isin(np.concatenate([first, second]), (0, 1)).all():
        return mcnemar(first, second)
    return paired_p([(first, second, np.arange(len(first)))])


def _metrics(golden: Golden, now: Golden, pairs: list[tuple[Sample, Sample]], report: Report) -> None:
    """Aggregated metrics: exact for tasks none of whose answers changed, else what moved is told."""
    for task in golden.metrics:
        same = all(old.answer == new.answer for old, new in pairs if old.task == task)
        before, after = golden.metrics[task], now.metrics[task]
        moved = [
            f"{task} {name}: {before.get(name)} -> {after.get(name)}"
            for name in sorted({*before, *after})
            if not math.isclose(before.get(name, math.inf), after.get(name, -math.inf), rel_tol=METRIC, abs_tol=METRIC)
        ]
        (report.findings if same else report.notes).extend(moved)


def _natives(sample: Sample) -> str:
    return "+".join(str(part.native) for part in sample.kept) or "no"


def _name(sample: Sample) -> str:
    return f"{sample.task} {sample.name}"


def _first(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"  and {len(lines) - SHOWN} more"]

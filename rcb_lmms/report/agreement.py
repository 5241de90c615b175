"""How often two runs answer alike, and what the samples on which downsampling fails say of a method.

An accuracy hides flips: a method that loses ten right answers and gains ten others has the accuracy of one that changed
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from rcb_lmms.report.reading import Scores


@dataclass(frozen=True)
class Agreement:
    """Two runs on the same samples; averages over seeds need not be whole.

    Attributes:
        samples: that both answered.
        same: of them, with the same answer, case and spaces apart.
        judged: samples of tasks in which an answer is right or wrong; captions, which are more or less good, are not.
        right_to_wrong: of these, that the first run got right and the second wrong.
        wrong_to_right: the other way round.
    """

    samples: float
    same: float
    judged: float
    right_to_wrong: float
    wrong_to_right: float

    def shares(self, prefix: str = "") -> dict[str, float | None]:
        """`agreement` of all samples, `right_to_wrong` and `wrong_to_right` of the judged ones, 0 to 1."""
        return {
            f"{prefix}agreement": self.same / self.samples,
            f"{prefix}right_to_wrong": self.right_to_wrong / self.judged if self.judged else None,
            f"{prefix}wrong_to_right": self.wrong_to_right / self.judged if self.judged else None,
        }


def plain(answer: str) -> str:
    """An answer without what does not make it another one: case and spaces."""
    return " ".join(answer.split()).casefold()


def agreement(before: Scores, after: Scores) -> Agreement:
    """What changes from one run's answers to another's.

    Raises:
        ValueError: runs over different samples.
    """
    if before.documents != after.documents:
        raise ValueError("runs over different samples")
    same = sum(plain(one) == plain(two) for one, two in zip(before.answers, after.answers, strict=True))
    if not (before.judged and after.judged):
        return Agreement(len(before.answers), same, 0, 0, 0)
    was, is_now = before.marks == 1, after.marks == 1
    scored = int((~np.isnan(before.marks)).sum())
    return Agreement(len(was), same, scored, int((was & ~is_now).sum()), int((~was & is_now).sum()))


def summed(parts: Iterable[Agreement]) -> Agreement:
    """Several tasks together, sample by sample."""
    return Agreement(*map(sum, zip(*map(astuple, parts), strict=True)))


def averaged(parts: Sequence[Agreement]) -> Agreement:
    """Several seeds on the same samples, on average."""
    return Agreement(*(value / len(parts) for value in astuple(summed(parts))))


def hard_samples(unpruned: Scores, downsampled: Scores, runs: Sequence[Scores]) -> tuple[int, float]:
    """The samples of a task that the unpruned model gets right and downsampling to the same budget gets wrong.

    On these an image's details count, so that choosing tokens can do better than making the image smaller (VTC-Bench,
    arXiv 2510.07143; in its code both groups hold only what the unpruned model gets right).

    Returns:
        their number, and how many of them a method answers rightly, averaged over its runs, one per seed.
    """
    if not all(own.judged for own in (unpruned, downsampled, *runs)):
        return 0, 0.0
    chosen = (unpruned.marks == 1) & (downsampled.marks != 1)
    return int(chosen.sum()), sum(int((own.marks[chosen] == 1).sum()) for own in runs) / len(runs)


def agreement_columns(
    runs: Sequence[Mapping[str, Scores]],
    unpruned: Mapping[str, Scores] | None,
    downsampled: Mapping[str, Scores] | None,
) -> dict[str, float | None]:
    """What answers have in common with the unpruned model's, as columns.

    Args:
        runs: scores by task of one method and budget, one for each seed.
        unpruned: likewise; `None` if it is not there, or is what `runs` are.
        downsampled: of the control at the same budget, likewise.

    Returns:
        `agreement`, `right_to_wrong` and `wrong_to_right` (see `Agreement.shares`) over the samples of all tasks that
        the unpruned model has too, and the same by task as `<task>_agreement`, ...; `hard_accuracy` over
        `hard_samples`. Missing runs leave out what needs them.
    """
    tasks = [task for task in unpruned or {} if all(task in run for run in runs)]
    by_task = {task: averaged([agreement(unpruned[task], run[task]) for run in runs]) for task in tasks}
    if not by_task:
        return {}
    columns = summed(by_task.values()).shares()
    parts = [
        hard_samples(unpruned[task], downsampled[task], [run[task] for run in runs])
        for task in tasks
        if task in (downsampled or {})
    ]
    if count := sum(samples for samples, _ in parts):
        columns |= {"hard_accuracy": sum(right for _, right in parts) / count, "hard_samples": count}
    for task, own in by_task.items():
        columns |= own.shares(f"{task}_")
    return columns

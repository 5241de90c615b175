"""Matched budgets: the parameter with which a method retains as many tokens as asked, on the average of a data set.

The threshold for any budget is an order statistic of the pooled scores, each image weighted by how often it is asked
about: no search loop, and no language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError

if TYPE_CHECKING:
    from rcb_lmms.calibration.scores import Scores
    from rcb_lmms.pruners.base import Pruner

QUANTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Calibration:
    """What was asked and what was achieved, in tokens per view (or image) averaged over the questions of a data set.

    Attributes:
        method: registry name.
        target: mean retained tokens asked for.
        achieved: mean with the fitted parameter, on the data it was fitted on.
        fitted: the parameter (`threshold` and `ties`, or `scale`, or `tokens`).
        std, quantiles: of retained tokens over the views (`QUANTILES` percent).
        native: mean visual tokens before pruning.
        views: how many different ones.
        questions: about each image, added up: one about three images counts three times.
        data_hash: of the images and their weights.
        per: `view` or `image`: what all these numbers are counted over.
        unreadable: documents that could not be read and count for nothing here.
    """

    method: str
    target: float
    achieved: float
    fitted: dict[str, float]
    std: float
    quantiles: list[float]
    native: float
    views: int
    questions: float
    data_hash: str
    per: str = "view"
    unreadable: int = 0


def fit(pruner: Pruner, scores: Scores, target: float) -> tuple[Pruner, Calibration]:
    """The method fitted to a mean of `target` retained tokens per view (or image), and the record of it.

    Args:
        pruner: a method that can be fitted to a mean.
        scores: of a whole data set, with the method's evidence.
        target: tokens per view, or per image if the scores are; averaged over the questions.

    Raises:
        UserError: the target exceeds what the views hold, lies under what the method keeps of every view whatever the
            parameter, or is an exact count that some image cannot have.
    """
    native = scores.native
    if not 0 < target <= native * (1 + 1e-9):
        raise UserError(
            wanted=f"a mean of {target:g} retained tokens per {scores.per}",
            found=f"{scores.per}s with {native:g} visual tokens on average",
            allowed=f"means above 0, up to {native:g}",
            next_step="lower the budget, or use the unpruned entry",
        )
    parts = scores.parts
    flat = [part for image in scores.images for part in image.evidence]
    # The method is fitted over the parts it decides on: single views also where images are asked for, if it cannot
    # compare them.
    shares = float((scores.weights @ scores.spent) / (scores.weights @ parts))
    check_least(pruner, target * shares)
    fitted = pruner.fit(flat, np.repeat(scores.weights, parts).tolist(), target * shares)
    if fitted.budget.kind == "tokens":
        _check_count(fitted, scores)
    return fitted, measure(fitted, scores, target)


def measure(pruner: Pruner, scores: Scores, target: float) -> Calibration:
    """What a fitted method retains of these images, as the record of a calibration for `target`."""
    parts, weights = scores.parts, scores.weights
    counts = np.array([pruner.retained(part) for image in scores.images for part in image.evidence], dtype=float)
    if scores.per == "image":
        counts = np.add.reduceat(counts, np.cumsum(parts) - parts)
    else:
        weights = np.repeat(weights, parts)
    achieved = float(np.average(counts, weights=weights))
    return Calibration(
        method=pruner.name,
        target=target,
        achieved=achieved,
        fitted=parameters(pruner),
        std=float(np.sqrt(np.average((counts - achieved) ** 2, weights=weights))),
        quantiles=[float(quantile) for quantile in np.percentile(counts, QUANTILES)],
        native=scores.native,
        views=sum(image.views for image in scores.images),
        questions=float(scores.weights.sum()),
        data_hash=scores.data_hash,
        per=scores.per,
        unreadable=len(scores.errors),
    )


def check_least(pruner: Pruner, target: float) -> None:
    """Refuse a mean under what the method keeps of every view whatever its parameter.

    Raises:
        UserError: naming both.
    """
    if pruner.least > target:
        floor = f"min_keep={pruner.least}" if hasattr(pruner, "min_keep") else f"{pruner.least} tokens"
        raise UserError(
            wanted=f"a mean of {target:g} retained tokens from {pruner.name}",
            found=f"{floor}, which stay of every view whatever the budget",
            allowed=f"means from {pruner.least}",
            next_step=f"min_keep={int(target)} or less" if hasattr(pruner, "min_keep") else f"keep={pruner.least}",
        )


def _check_count(pruner: Pruner, scores: Scores) -> None:
    """Refuse, before the first answer, a count that is too small for an image of many views or too large for another.

    Raises:
        UserError: saying which counts every image can have.
    """
    count, times = int(pruner.budget.value), scores.spent
    # A budget of an image is shared by its views.
    times = np.array([image.views for image in scores.images]) if scores.per == "image" else np.ones_like(times)
    natives = [image.native // (1 if scores.per == "image" else image.views) for image in scores.images]
    least = [pruner.least * int(own) for own in times]
    others = sum(not low <= count <= high for low, high in zip(least, natives, strict=True))
    if others:
        low, high, views = max(least), min(natives), [image.views for image in scores.images]
        raise UserError(
            wanted=f"{count} tokens of every {scores.per} from {pruner.name}",
            found=f"{others} of {len(times)} images that cannot have so many: {min(views)} to {max(views)} views, each "
            f"of which keeps {pruner.least} tokens at least",
            allowed=f"counts from {low} to {high}" if low <= high else "no count, since the images differ too much",
            next_step=f"keep={low}, or per=view" if low <= high else "per=view, or a method that meets a mean",
        )


def parameters(pruner: Pruner) -> dict[str, float]:
    """What `fit` sets: a threshold with its ties, a count, or a scale."""
    if pruner.budget is not None and pruner.budget.kind == "threshold":
        return {"threshold": pruner.budget.value, "ties": pruner.budget.ties}
    if pruner.budget is not None and pruner.budget.kind == "tokens":
        return {"tokens": pruner.budget.value}
    return {"scale": pruner.scale}


def with_parameters(pruner: Pruner, fitted: Mapping[str, float]) -> Pruner:
    """The inverse of `parameters`: a pruner as it came out of `fit`."""
    if "threshold" in fitted:
        return replace(pruner, budget=Budget.threshold(fitted["threshold"], int(fitted["ties"])))
    if "tokens" in fitted:
        return replace(pruner, budget=Budget.tokens(int(fitted["tokens"])))
    return replace(pruner, budget=Budget.adaptive(), scale=fitted["scale"])

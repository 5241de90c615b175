"""Matched budgets: one vision-only pass, and the parameter with which a method retains as many tokens as another.

The threshold for any budget is an order statistic of the pooled scores, each image weighted by how often it is asked
about: no search loop, and no language model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.pruners.base import Pruner, VisualTokens, check_needs
from rcb_lmms.pruners.views import choose_views, joined
from rcb_lmms.resources import cache_dir

if TYPE_CHECKING:
    import numpy as np

    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.families.images import Visual

# Raised when the same scores give another parameter than before: what was remembered under another rule is not used.
RULE = 2


@dataclass
class ScorePass:
    """What one pass over images and videos leaves behind, one entry for each; mergeable between processes.

    Attributes:
        evidence: per name and image, an `(e,)` array for each part of it that the method decides on its own: what
            `Pruner.fit` reads, or a baseline's count.
        weights: how often each image stands in a question.
        natives: visual tokens of each image, all its views together.
        views: of each image.
        per: `view` or `image`: what a budget is spent on, and so what means are taken over.
    """

    evidence: dict[str, list[list[np.ndarray]]] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    natives: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    per: str = "view"

    def merge(self, others: Iterable[ScorePass]) -> ScorePass:
        """This pass and `others` as one; every process merges in the same order and gets the same result."""
        merged = ScorePass(per=self.per)
        for part in (self, *others):
            for name, groups in part.evidence.items():
                merged.evidence.setdefault(name, []).extend(groups)
            merged.weights += part.weights
            merged.natives += part.natives
            merged.views += part.views
        return merged

    @property
    def spent(self) -> list[int]:
        """How often each image spends the budget."""
        return self.views if self.per == "view" else [1] * len(self.views)

    def mean(self, counts: Iterable[float]) -> float:
        """Mean per view (or image) over the questions, of counts per image."""
        import numpy as np

        weights = np.asarray(self.weights, dtype=float)
        return float(weights @ np.fromiter(counts, float) / (weights @ self.spent))

    def baseline(self, name: str) -> float:
        """A baseline's mean retained tokens per view (or image)."""
        return self.mean(float(sum(counts[0] for counts in group)) for group in self.evidence[name])


def score_pass(
    encoder: ImageEncoder,
    methods: Mapping[str, Pruner],
    baselines: Mapping[str, Pruner],
    visuals: Iterable[Visual],
    weights: Mapping[str, float],
) -> ScorePass:
    """Run images and videos through the vision tower once and keep what calibration needs of them.

    Args:
        encoder: filled for the union of the pruners' needs.
        methods: whose evidence is kept, under these names, to be fitted.
        baselines: whose retained tokens are counted, under these names, to be matched.
        visuals: opened images and videos, each once.
        weights: how often each of them stands in a question, by key.
    """
    import numpy as np

    result = ScorePass({name: [] for name in (*methods, *baselines)}, per=encoder.per)
    for batch in encoder.batches(visuals):
        for visual, views in zip(batch, encoder.views(batch), strict=True):
            for name, pruner in methods.items():
                result.evidence[name].append(evidence_of(pruner, views, encoder.per))
            for name, pruner in baselines.items():
                kept = sum(map(len, choose_views(pruner, views, encoder.per)))
                result.evidence[name].append([np.array([kept], dtype=np.float32)])
            result.weights.append(weights[visual.key])
            result.natives.append(sum(map(len, views)))
            result.views.append(len(views))
    return result


def evidence_of(pruner: Pruner, views: Sequence[VisualTokens], per: str) -> list[np.ndarray]:
    """What `fit` reads of one image: an array for each part that `select` decides on its own."""
    import numpy as np

    for view in views:
        check_needs(view, pruner)
    together = per == "image" and len(views) > 1
    parts = [joined(views)] if together and pruner.pools_views else views
    found = [pruner.evidence(part) for part in parts]
    if found[0] is None:  # counts are exact: one for each time that a budget is spent
        return [np.empty(0, dtype=np.float32)] * (1 if together else len(views))
    return [array.float().cpu().numpy() for array in found]


@dataclass(frozen=True)
class Calibration:
    """What was asked and what was achieved, in tokens per view (or image) averaged over the questions of a data set.

    Attributes:
        method: registry name.
        target: mean retained tokens asked for.
        achieved: mean with the fitted parameter, on the data it was fitted on.
        fitted: the parameter (`threshold` and `ties`, or `scale`).
        std, quantiles: of retained tokens over the views (quantiles 0, 5, 25, 50, 75, 95, 100 percent).
        native: mean visual tokens before pruning.
        views: how many different ones.
        questions: about each image, added up: one about three images counts three times.
        data_hash: of the images and their weights.
        per: `view` or `image`: what all these numbers are counted over.
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


def data_hash(weights: Mapping[str, float]) -> str:
    """Names a data set by its images' content keys and how often each is asked about, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(weights.items())).encode()).hexdigest()


def fit(pruner: Pruner, scores: ScorePass, name: str, target: float, data: str) -> tuple[Pruner, Calibration]:
    """The method fitted to a mean of `target` retained tokens per view (or image), and the record of it.

    Args:
        pruner: a method with a threshold or a scale.
        scores: of a whole data set.
        name: under which `scores` holds the method's evidence.
        target: tokens per view, or per image if the scores are; averaged over the questions.
        data: hash of the data set, for the record.

    Raises:
        UserError: the target exceeds what the views hold, or is an exact count that some image cannot have.
    """
    import numpy as np

    native = scores.mean(scores.natives)
    if not 0 < target <= native:
        raise UserError(
            wanted=f"a mean of {target:g} retained tokens per {scores.per}",
            found=f"{scores.per}s with {native:g} visual tokens on average",
            allowed=f"means above 0, up to {native:g}",
            next_step="lower keep, or use the unpruned entry",
        )
    groups = scores.evidence[name]
    parts = np.array([len(group) for group in groups])
    flat = [array for group in groups for array in group]
    weights = np.asarray(scores.weights, dtype=float)
    # The method is fitted over the parts it decides on; PruMerge decides view by view also where images are asked for.
    shares = float((weights @ scores.spent) / (weights @ parts))
    fitted = pruner.fit(flat, np.repeat(weights, parts).tolist(), target * shares)
    if fitted.budget.kind == "tokens":
        _check_count(fitted, scores)
    counts = np.array([fitted.retained(array) for array in flat], dtype=float)
    if scores.per == "image":
        counts = np.add.reduceat(counts, np.cumsum(parts) - parts)
    else:
        weights = np.repeat(weights, parts)
    achieved = float(np.average(counts, weights=weights))
    record = Calibration(
        method=pruner.name,
        target=target,
        achieved=achieved,
        fitted=parameters(fitted),
        std=float(np.sqrt(np.average((counts - achieved) ** 2, weights=weights))),
        quantiles=[float(q) for q in np.percentile(counts, [0, 5, 25, 50, 75, 95, 100])],
        native=native,
        views=sum(scores.views),
        questions=float(sum(scores.weights)),
        data_hash=data,
        per=scores.per,
    )
    return fitted, record


def _check_count(pruner: Pruner, scores: ScorePass) -> None:
    """Refuse, before the first answer, a count that is too small for an image of many views or too large for another.

    Raises:
        UserError: saying which counts every image can have.
    """
    count, whole = int(pruner.budget.value), scores.per == "image"
    times = [views if whole else 1 for views in scores.views]
    least = [pruner.least * own for own in times]
    most = [native * own // views for native, own, views in zip(scores.natives, times, scores.views, strict=True)]
    others = sum(not low <= count <= high for low, high in zip(least, most, strict=True))
    if others:
        low, high = max(least), min(most)
        raise UserError(
            wanted=f"{count} tokens of every {scores.per} from {pruner.name}",
            found=f"{others} of {len(times)} images that cannot have so many: {min(scores.views)} to "
            f"{max(scores.views)} views, each of which keeps {pruner.least} tokens at least",
            allowed=f"counts from {low} to {high}" if low <= high else "no count, since the images differ too much",
            next_step=f"keep={low}, or per=view" if low <= high else "per=view, or a method that meets a mean",
        )


def parameters(pruner: Pruner) -> dict[str, float]:
    """What `fit` sets: a threshold with its ties, or a scale."""
    if pruner.budget is not None and pruner.budget.kind == "threshold":
        return {"threshold": pruner.budget.value, "ties": pruner.budget.ties}
    if pruner.budget is not None and pruner.budget.kind == "tokens":
        return {"tokens": pruner.budget.value}
    return {"scale": pruner.scale}


def with_parameters(pruner: Pruner, fitted: Mapping[str, float]) -> Pruner:
    """The inverse of `parameters`: a pruner as it came out of `fit`."""
    from rcb_lmms.budget import Budget

    if "threshold" in fitted:
        return replace(pruner, budget=Budget.threshold(fitted["threshold"], int(fitted["ties"])))
    if "tokens" in fitted:
        return replace(pruner, budget=Budget.tokens(int(fitted["tokens"])))
    return replace(pruner, budget=Budget.adaptive(), scale=fitted["scale"])


def cached(key: Mapping[str, Any]) -> Calibration | None:
    """A calibration made before for the same model, codebook, preprocessing, task, data and target."""
    path = _cache_path(key)
    if not path.exists():
        return None
    try:
        return Calibration(**json.loads(path.read_text())["calibration"])
    except (ValueError, KeyError, TypeError):
        return None  # a damaged file is as good as none: the pass is run again and replaces it


def remember(key: Mapping[str, Any], calibration: Calibration) -> Path:
    """Store a calibration under its key."""
    return write_atomic(_cache_path(key), json.dumps({"key": dict(key), "calibration": asdict(calibration)}, indent=1))


def _cache_path(key: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps({**key, "rule": RULE}, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "calibration" / f"{name}.json"

"""Matched budgets: one vision-only pass, and the parameter with which a method retains as many tokens as another.

The threshold for any budget is an order statistic of the pooled scores, each view weighted by how often it is asked
about: no search loop, and no language model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.engine.encoding import ImageEncoder, select
from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.pruners.base import Pruner, check_needs
from rcb_lmms.resources import cache_dir

if TYPE_CHECKING:
    import numpy as np

    from rcb_lmms.families.images import Visual


@dataclass
class ScorePass:
    """What one pass over the images leaves behind, per view; mergeable between processes.

    Attributes:
        evidence: per name, one `(e,)` array per view: what `Pruner.fit` reads, or a baseline's count.
        weights: questions asked about each view.
        natives: visual tokens of each view.
    """

    evidence: dict[str, list[np.ndarray]] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    natives: list[int] = field(default_factory=list)

    def merge(self, others: Iterable[ScorePass]) -> ScorePass:
        """This pass and `others` as one; every process merges in the same order and gets the same result."""
        merged = ScorePass()
        for part in (self, *others):
            for name, arrays in part.evidence.items():
                merged.evidence.setdefault(name, []).extend(arrays)
            merged.weights += part.weights
            merged.natives += part.natives
        return merged

    def mean(self, counts: Iterable[float]) -> float:
        """Weighted mean over views."""
        import numpy as np

        return float(np.average(np.fromiter(counts, float), weights=self.weights))


def score_pass(
    encoder: ImageEncoder,
    methods: Mapping[str, Pruner],
    baselines: Mapping[str, Pruner],
    visuals: Iterable[Visual],
    weights: Mapping[str, float],
) -> ScorePass:
    """Run images through the vision tower once and keep what calibration needs of them.

    Args:
        encoder: filled for the union of the pruners' needs.
        methods: whose evidence is kept, under these names, to be fitted.
        baselines: whose retained tokens are counted, under these names, to be matched.
        visuals: opened images and videos, each once.
        weights: questions asked about each of them, by key.
    """
    import numpy as np

    result = ScorePass({name: [] for name in (*methods, *baselines)})
    batch: list[Visual] = []

    def flush() -> None:
        for visual, views in zip(batch, encoder.views(batch), strict=True):
            for view in views:
                for name, pruner in methods.items():
                    check_needs(view, pruner)
                    result.evidence[name].append(pruner.evidence(view).float().cpu().numpy())
                for name, pruner in baselines.items():
                    (selection,) = select(pruner, [view])
                    result.evidence[name].append(np.array([len(selection)], dtype=np.float32))
                result.weights.append(weights[visual.key])
                result.natives.append(len(view))
        batch.clear()

    for visual in visuals:
        batch.append(visual)
        if len(batch) >= encoder.batch_size:
            flush()
    if batch:
        flush()
    return result


@dataclass(frozen=True)
class Calibration:
    """What was asked and what was achieved, in tokens per view averaged over the questions of a data set.

    Attributes:
        method: registry name.
        target: mean retained tokens asked for.
        achieved: mean with the fitted parameter, on the data it was fitted on.
        fitted: the parameter (`threshold` and `ties`, or `scale`).
        std, quantiles: of retained tokens over the views (quantiles 0, 5, 25, 50, 75, 95, 100 percent).
        native: mean visual tokens before pruning.
        views, questions: how many.
        data_hash: of the images and their weights.
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


def data_hash(weights: Mapping[str, float]) -> str:
    """Names a data set by its images' content keys and how often each is asked about, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(weights.items())).encode()).hexdigest()


def fit(pruner: Pruner, scores: ScorePass, name: str, target: float, data: str) -> tuple[Pruner, Calibration]:
    """The method fitted to a mean of `target` retained tokens per view, and the record of it.

    Args:
        pruner: a method with a threshold or a scale.
        scores: of a whole data set.
        name: under which `scores` holds the method's evidence.
        target: tokens per view, averaged over the questions.
        data: hash of the data set, for the record.

    Raises:
        UserError: the target exceeds what the views hold.
    """
    import numpy as np

    native = scores.mean(scores.natives)
    if not 0 < target <= native:
        raise UserError(
            wanted=f"a mean of {target:g} retained tokens per view",
            found=f"views with {native:g} visual tokens on average",
            allowed=f"means above 0, up to {native:g}",
            next_step="lower keep, or use the unpruned entry",
        )
    evidence = scores.evidence[name]
    fitted = pruner.fit(evidence, scores.weights, target)
    counts = np.array([fitted.retained(array) for array in evidence], dtype=float)
    achieved = scores.mean(counts)
    record = Calibration(
        method=pruner.name,
        target=target,
        achieved=achieved,
        fitted=parameters(fitted),
        std=float(np.sqrt(scores.mean((counts - achieved) ** 2))),
        quantiles=[float(q) for q in np.percentile(counts, [0, 5, 25, 50, 75, 95, 100])],
        native=native,
        views=len(counts),
        questions=float(sum(scores.weights)),
        data_hash=data,
    )
    return fitted, record


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
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "calibration" / f"{name}.json"


def calibrate_images(
    pretrained: str,
    paths: Sequence[Path],
    *,
    keep: float = 64,
    match: str | None = None,
    codebook: str | None = None,
    preprocess: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """RCB's threshold for a mean of `keep` tokens per view, or for a baseline's mean, over image files.

    Raises:
        UserError: an unreadable image, a missing codebook, or a budget the images cannot meet.
    """
    from rcb_lmms.budget import Budget
    from rcb_lmms.families import default_codebook, load_family
    from rcb_lmms.pruners import make_pruner

    family = load_family(pretrained, preprocess=preprocess, device=device, dtype=dtype)
    pruner = make_pruner("rcb", codebook=codebook or default_codebook(family.name, pretrained))
    pruner.codebook.check_width(family.width, pretrained)
    baselines = {} if match is None else {"baseline": make_pruner(match, budget=Budget.adaptive())}
    needs = pruner.needs.union(*(baseline.needs for baseline in baselines.values()))
    weights: dict[str, float] = {}

    def distinct() -> Iterator[Visual]:
        for path in paths:
            if (visual := family.open(path)).key not in weights:
                weights[visual.key] = 1.0
                yield visual

    scores = score_pass(ImageEncoder(family, needs), {"method": pruner}, baselines, distinct(), weights)
    if match is not None:
        keep = scores.mean(float(counts[0]) for counts in scores.evidence["baseline"])
    return asdict(fit(pruner, scores, "method", keep, data_hash(weights))[1])

"""`rcb calibrate --tasks`: on each benchmark the thresholds at which RCB retains as many tokens as the baselines do."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rcb_lmms.budget import Budget, layer_average, rank_for_layer_average
from rcb_lmms.calibration.cuts import Cut, find_cuts
from rcb_lmms.calibration.fitting import data_hash
from rcb_lmms.calibration.score_files import ScoredImages
from rcb_lmms.errors import UserError
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.base import Pruner
from rcb_lmms.pruners.rcb import check_target

if TYPE_CHECKING:
    from rcb_lmms.calibration.passes import TaskScores

MEASURED = ("prumerge", "prumerge_plus")
CONVENTIONS = ("tokens", "layer_average")
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
FASTV_LAYER = 2


@dataclass(frozen=True)
class Baseline:
    """What RCB is to retain as many tokens as.

    Attributes:
        name: as given; the key in the file of thresholds.
        method: of the registry.
        tokens: per view (or image), if the method retains exactly so many; `None` if it decides image by image.
        layer: FastV's; layers before it see every token.
        convention: of `tokens`: those behind FastV's layer, or FastV's average over the layers.
    """

    name: str
    method: str
    tokens: float | None = None
    layer: int = 0
    convention: str = "tokens"

    @classmethod
    def parse(cls, text: str) -> Baseline:
        """`prumerge`, `random:64`, `fastv:rank=144`, `fastv:layer_average=171:layer=3`.

        Raises:
            UserError: no such baseline, or one without its number.
        """
        method, *parts = text.strip().split(":")
        given = dict(part.split("=", 1) if "=" in part else ("rank", part) for part in parts)
        allowed = {"rank", "layer_average", "layer"} if method == "fastv" else {"rank"}
        known = method in (*MEASURED, "fastv", "random")
        if not known or set(given) - allowed or {"rank", "layer_average"} <= set(given):
            raise _unknown(text)
        layer = int(_number(text, given.pop("layer"))) if "layer" in given else FASTV_LAYER * (method == "fastv")
        if not given and method not in MEASURED:
            raise _unknown(text)
        tokens = _number(text, next(iter(given.values()))) if given else None
        if method not in MEASURED and "rank" in given:
            Budget.tokens(tokens)  # refuses a count that is no whole number
        return cls(text.strip(), method, tokens, layer, "layer_average" if "layer_average" in given else "tokens")

    @property
    def pruner(self) -> Pruner | None:
        """The method whose tokens are to be counted; `None` where their number is known."""
        return make_pruner(self.method, budget=Budget.adaptive()) if self.tokens is None else None

    def targets(self, images: ScoredImages, layers: int) -> tuple[float, float]:
        """Mean tokens per view (or image) by the two conventions: after pruning, and averaged over `layers` layers.

        Raises:
            UserError: more tokens than the images have, or a layer average that the full layers alone exceed.
        """
        native = images.native
        tokens = images.baseline(self.name) if self.tokens is None else self.tokens
        check_target(tokens, native, f"the mean over the images, for {self.name}")
        if not self.layer:
            return tokens, tokens
        rank = rank_for_layer_average(
            tokens if self.convention == "layer_average" else layer_average(tokens, native, self.layer, layers),
            native,
            self.layer,
            layers,
        )
        return float(rank), layer_average(rank, native, self.layer, layers)


def parse_baselines(match: str) -> list[Baseline]:
    """Baselines separated by commas, each once.

    Raises:
        UserError: one of them is unknown.
    """
    return [Baseline.parse(text) for text in dict.fromkeys(match.split(","))]


def _unknown(text: str) -> UserError:
    return UserError(
        wanted=f"match={text}",
        found="no such baseline, or one without its number of tokens",
        allowed="prumerge, prumerge_plus, each also with :TOKENS; fastv:rank=TOKENS, fastv:layer_average=TOKENS, both "
        "also with :layer=N; random:TOKENS",
        next_step="--match prumerge,prumerge_plus,fastv:rank=144,random:64",
    )


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise _unknown(text) from None
    if not 0 < number < float("inf"):
        raise _unknown(text)
    return number


@dataclass(frozen=True)
class Fit:
    """A threshold and what it does; tokens per view (or image), averaged over the questions."""

    target: float
    threshold: float
    ties: int
    achieved: float
    std: float
    quantiles: dict[int, float]


def fit_many(images: ScoredImages, targets: Sequence[float], min_keep: int) -> list[Fit]:
    """For each target the threshold whose mean is nearest to it, as `fitting.fit` has it in memory."""
    cuts = find_cuts(images.chunks, [target * images.spent for target in targets], min_keep)
    spreads = distributions(images, cuts, min_keep)
    return [
        Fit(target, cut.threshold, cut.ties, *spread)
        for target, cut, spread in zip(targets, cuts, spreads, strict=True)
    ]


def distributions(
    images: ScoredImages, cuts: Sequence[Cut], min_keep: int
) -> list[tuple[float, float, dict[int, float]]]:
    """Mean, standard deviation and quantiles of retained tokens over views (or images), for each cut."""
    parts = np.array([len(image.parts) for _, image in images.images])
    counts = np.concatenate([[chunk.retained(cut, min_keep) for cut in cuts] for chunk in images.chunks()], axis=1)
    weights = images.weights
    if images.per == "image":
        counts = np.add.reduceat(counts, np.cumsum(parts) - parts, axis=1)
    else:
        weights = np.repeat(weights, parts)
    found = []
    for row in counts.astype(np.float64):
        mean = float(np.average(row, weights=weights))
        std = float(np.sqrt(np.average((row - mean) ** 2, weights=weights)))
        found.append((mean, std, dict(zip(QUANTILES, map(float, np.percentile(row, QUANTILES)), strict=True))))
    return found


def held_out(keys: set[str], share: float) -> set[str]:
    """That share of the images, chosen by their content alone, so by everybody alike.

    Raises:
        UserError: one of the two parts would be empty.
    """
    order = sorted(keys, key=lambda key: hashlib.sha256(f"held out {key}".encode()).digest())
    chosen = set(order[: round(share * len(keys))])
    if not 0 < len(chosen) < len(keys):
        raise UserError(
            wanted=f"a share of {share:g} of the images held out",
            found=f"{len(keys)} different images",
            allowed="shares between 0 and 1 that leave images in both parts",
            next_step="--holdout 0.5",
        )
    return chosen


def match_benchmark(
    scores: dict[str, TaskScores], baselines: Sequence[Baseline], layers: int, min_keep: int, holdout: float | None
) -> tuple[dict[str, Any], ScoredImages]:
    """The record of one benchmark of one or more tasks, and the images that its thresholds were fitted to.

    Raises:
        UserError: a baseline retains more tokens than the images have, or too few images to hold some out.
    """
    every = joined(own.images for own in scores.values())
    keys = {image.key for _, image in every.images}
    apart = held_out(keys, holdout) if holdout is not None else set()
    images = every.subset(keys - apart)
    weights = sum((own.weights for own in scores.values()), Counter())
    views = sum(image.views for _, image in every.images)
    record = {
        "data_hash": data_hash(weights),
        "tasks": {name: data_hash(own.weights) for name, own in scores.items()},
        "documents": sum(own.documents for own in scores.values()),
        "unreadable": sum(len(own.errors) for own in scores.values()),
        "images": len(keys),
        "views": views,
        "views_per_document": float(every.weights @ [image.views for _, image in every.images])
        / sum(own.documents for own in scores.values()),
        "native": every.native,
        "baselines": fits(images, baselines, layers, min_keep),
    }
    if apart:
        record["held_out_images"] = len(apart)
        _add_gaps(record["baselines"], every.subset(apart), baselines, layers, min_keep)
    return record, images


def fits(images: ScoredImages, baselines: Sequence[Baseline], layers: int, min_keep: int) -> dict[str, Any]:
    """For each baseline, and under each convention, the fitted threshold as a record."""
    targets = {baseline.name: baseline.targets(images, layers) for baseline in baselines}
    distinct = sorted({target for both in targets.values() for target in both})
    fitted = dict(zip(distinct, fit_many(images, distinct, min_keep), strict=True))
    return {
        name: {convention: asdict(fitted[target]) for convention, target in zip(CONVENTIONS, both, strict=True)}
        for name, both in targets.items()
    }


def _add_gaps(
    records: dict[str, Any], images: ScoredImages, baselines: Sequence[Baseline], layers: int, min_keep: int
) -> None:
    """Add what the thresholds achieve on held-out images, and by how much that misses what was calibrated."""
    for baseline in baselines:
        targets = baseline.targets(images, layers)
        rows = [records[baseline.name][convention] for convention in CONVENTIONS]
        cuts = [Cut(row["threshold"], row["ties"]) for row in rows]
        for row, target, (mean, _, _) in zip(rows, targets, distributions(images, cuts, min_keep), strict=True):
            row["held_out"] = {
                "baseline": target,
                "achieved": mean,
                "gap": mean - row["achieved"],
                "gap_to_baseline": mean - target,
            }


def match_globally(
    benchmarks: dict[str, ScoredImages], baselines: Sequence[Baseline], layers: int, min_keep: int
) -> dict[str, Any]:
    """One threshold per budget over all benchmarks, each of which counts the same whatever its size.

    Each record's `by_benchmark` says how many tokens that one threshold retains where.
    """
    records = fits(joined(images.scaled() for images in benchmarks.values()), baselines, layers, min_keep)
    rows = [row for both in records.values() for row in both.values()]
    cuts = [Cut(row["threshold"], row["ties"]) for row in rows]
    means = {name: distributions(images, cuts, min_keep) for name, images in benchmarks.items()}
    for index, row in enumerate(rows):
        row["by_benchmark"] = {name: own[index][0] for name, own in means.items()}
    return records


def for_terminal(record: dict[str, Any]) -> str:
    """The thresholds as a table; tokens per view (or image)."""
    from tabulate import tabulate

    rows = []
    for name, own in [*record["benchmarks"].items(), ("all", {"baselines": record["global"]})]:
        for baseline, both in own["baselines"].items():
            for convention, row in both.items():
                gap = row.get("held_out", {}).get("gap")
                spread = [row[part] for part in ("target", "achieved", "std")]
                rows.append([name, baseline, convention, *spread, row["threshold"], row["ties"], gap])
    heads = ["benchmark", "baseline", "convention", "target", "achieved", "std", "threshold", "ties", "gap"]
    formats = (*[""] * 3, *[".2f"] * 3, ".6f", "", "+.2f")
    return tabulate(rows, heads, floatfmt=formats)


def joined(parts: Any) -> ScoredImages:
    """All images as one."""
    first, *others = parts
    for other in others:
        first = first.joined(other)
    return first


def default_out(pretrained: str) -> Path:
    """Where the thresholds of a model are written."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in Path(pretrained).name)
    return Path("eval_configs") / "thresholds" / f"{name}.yaml"

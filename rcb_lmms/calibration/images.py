"""`rcb calibrate --images`: a threshold for image files, each asked about once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.calibration.fitting import data_hash, fit, score_pass
from rcb_lmms.engine.encoding import ImageEncoder

if TYPE_CHECKING:
    from rcb_lmms.families.images import Visual


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
    **own: Any,
) -> dict[str, Any]:
    """RCB's threshold for a mean of `keep` tokens per view, or for a baseline's mean, over image files.

    Options that only some families have (`split`) are passed on to `load_family`.

    Raises:
        UserError: an unreadable image, a missing codebook, or a budget the images cannot meet.
    """
    from rcb_lmms.budget import Budget
    from rcb_lmms.families import default_codebook, load_family
    from rcb_lmms.pruners import make_pruner

    family = load_family(pretrained, preprocess=preprocess, device=device, dtype=dtype, **own)
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
        keep = scores.baseline("baseline")
    return asdict(fit(pruner, scores, "method", keep, data_hash(weights))[1])

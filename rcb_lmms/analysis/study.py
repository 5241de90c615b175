"""The codebook study (paper 5.4, Table 3): what each threshold and more images contribute, from stored statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rcb_lmms.budget import Budget
from rcb_lmms.codebook import Codebook
from rcb_lmms.codebook.build import read_manifest, threshold
from rcb_lmms.codebook.probe import ImageStatistics
from rcb_lmms.codebook.settings import BuildSettings
from rcb_lmms.errors import UserError
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.base import VisualTokens

# Values that every token passes. The names are those of the configuration of Table 3.
WITHOUT = {"tau_prob": 2.0, "tau_jsd": 1e9, "tau_out": 10**6, "tau_in": 0}
SHARES = (0.8, 0.6, 0.4, 0.2)
# Table 3's row of fewer images, 100 of 500.
TABLE_SHARE, TABLE_NAME = 0.2, "100-images"
KEPT = Budget.ratio(1 / 9)


@dataclass(frozen=True)
class Variant:
    """A codebook made with one rule left out, or from fewer images.

    Attributes:
        name: of its file; Table 3's rows read the files of their names.
        label: what was changed.
        codebook: the prototypes; `None` where no token passes.
        settings: under which it was made.
        images: how many it was made from.
    """

    name: str
    label: str
    codebook: Codebook | None
    settings: BuildSettings
    images: int


def ablate(stats: str | Path, settings: BuildSettings, shares: Sequence[float] = SHARES) -> list[Variant]:
    """The whole codebook, one without each threshold, and ones from fewer images; needs no model.

    Of fewer images, no cluster can have as many as before in it: `tau_in` is scaled with their number, where the paper
    says nothing of it. With the paper's numbers (64 of 500 images, and 100 left) it does not have to be.

    Args:
        stats: folder of a finished build.
        settings: of the whole codebook.
        shares: of the images, the first ones.

    Raises:
        UserError: no statistics, or no prototypes with all thresholds.
    """
    count = len(read_manifest(Path(stats))["images"])
    whole = threshold(stats, settings, "all")
    variants = [Variant("all", "all four thresholds", whole, settings, count)]
    for name, value in WITHOUT.items():
        changed = replace(settings, **{name: value})
        variants.append(Variant(f"no-{name}", f"without {name}", threshold(stats, changed), changed, count))
    for share in shares:
        name = TABLE_NAME if share == TABLE_SHARE else f"{share:.0%}-images".replace("%", "-percent")
        images = max(1, round(share * count))
        changed = replace(settings, tau_in=int(share * settings.tau_in))
        try:
            made = threshold(stats, changed, name, limit=images)
        except UserError:
            made = None
        variants.append(Variant(name, f"{share:.0%} of the images", made, changed, images))
    return variants


def save_variants(variants: Sequence[Variant], folder: Path) -> list[Path]:
    """Write each codebook as `folder/NAME.safetensors`."""
    files = []
    for variant in (own for own in variants if own.codebook is not None):
        meta = variant.codebook.meta | {"id": variant.name}
        Codebook(variant.codebook.prototypes, meta).save(folder / f"{variant.name}.safetensors")
        files.append(folder / f"{variant.name}.safetensors")
    return files


def ablation_table(variants: Sequence[Variant], stats: str | Path) -> pd.DataFrame:
    """One row per variant: thresholds, images, prototypes, and how far it keeps the same tokens as the whole codebook.

    `agreement` is the mean over images of the share of the ninth of the stored tokens that the whole codebook keeps
    (its least redundant ones) which the variant keeps too; 1 / 9 is what chance would give.
    """
    stored = [ImageStatistics.read(file).features for file in sorted(Path(stats).glob("*.safetensors"))]
    kept = [_kept(variant.codebook, stored) for variant in variants]
    rows: list[dict[str, Any]] = []
    for variant, own in zip(variants, kept, strict=True):
        thresholds = {
            name: "-" if getattr(variant.settings, name) == value else getattr(variant.settings, name)
            for name, value in WITHOUT.items()
        }
        overlap = [len(mine & whole) / len(whole) for mine, whole in zip(own, kept[0], strict=True)] if own else []
        rows.append(
            {
                "codebook": variant.label,
                **thresholds,
                "images": variant.images,
                "prototypes": len(variant.codebook) if variant.codebook else 0,
                "agreement": sum(overlap) / len(overlap) if overlap else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def _kept(codebook: Codebook | None, stored: Sequence[Any]) -> list[set[int]]:
    if codebook is None:
        return []
    pruner = make_pruner("rcb", codebook=codebook, budget=KEPT)
    views = [VisualTokens(features.float(), (1, len(features))) for features in stored]
    return [set(pruner.choose(view).kept.tolist()) for view in views]

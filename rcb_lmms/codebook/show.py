"""What a codebook holds, as text for a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np

from rcb_lmms.codebook.artefact import Codebook

PERCENTILES = (1, 25, 50, 75, 99)
FACTS = ("id", "model", "revision", "family", "layer", "data", "images", "preset", "license", "verified", "sha256")


def show(codebook: Codebook) -> str:
    """Card, norms, duplicates, cosines and clusters of a codebook, one fact per line."""
    facts = {**_card(codebook.meta), **_values(codebook), **_clusters(codebook)}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _card(meta: dict[str, Any]) -> dict[str, Any]:
    card = {name: meta[name] for name in FACTS if meta.get(name) is not None}
    for name in ("source", "experiment", "thresholds", "counts"):
        if meta.get(name):
            card[name] = ", ".join(f"{key} {value}" for key, value in meta[name].items())
    if meta.get("merged"):
        card["merged"] = ", ".join(f"{part['prototypes']} of {part.get('id')}" for part in meta["merged"])
    return card


def _values(codebook: Codebook) -> dict[str, Any]:
    values = codebook.prototypes.double().numpy()
    norms = np.linalg.norm(values, axis=-1)
    unique, copies = np.unique(values, axis=0, return_counts=True)
    pairs = int((copies * (copies - 1) // 2).sum())
    facts = {
        "prototypes": f"{len(values)} x {codebook.width} {str(codebook.prototypes.dtype).removeprefix('torch.')}",
        "duplicates": f"{len(unique)} unique rows, {pairs} pairs of equal rows",
        "norm": f"min {norms.min():.1f}, mean {norms.mean():.1f}, median {np.median(norms):.1f}, max {norms.max():.1f}",
        "elements": f"min {values.min():.2f}, max {values.max():.2f}, standard deviation {values.std():.3f}",
    }
    if len(codebook) > 1:
        cosine = _cosines(codebook)
        facts["pairwise cosine"] = _percentiles(cosine[np.triu_indices(len(cosine), 1)])
        facts["nearest neighbour"] = _percentiles(np.where(np.eye(len(cosine), dtype=bool), -np.inf, cosine).max(-1))
    return facts


def _cosines(codebook: Codebook) -> np.ndarray:
    unit = codebook.normalized().double().numpy()
    return unit @ unit.T


def _percentiles(values: np.ndarray) -> str:
    listed = ", ".join(f"{p}% {v:.2f}" for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True))
    return f"min {values.min():.3f}, mean {values.mean():.3f}; {listed}"


def _clusters(codebook: Codebook) -> dict[str, str]:
    rows = codebook.meta.get("rows") or {}
    facts: dict[str, str] = {}
    if "image" in rows:
        _, counts = np.unique(np.array(rows["image"], dtype=str), return_counts=True)
        facts["provenance"] = f"{len(counts)} images, up to {counts.max()} rows of one image"
    if "cluster" in rows:
        cosine, labels = _cosines(codebook), np.array(rows["cluster"])
        norms = np.linalg.norm(codebook.prototypes.double().numpy(), axis=-1)
        for label in np.unique(labels):
            own = labels == label
            text = f"{own.sum()} rows from row {own.argmax()}, mean norm {norms[own].mean():.1f}"
            if own.sum() > 1:
                text += f", mean cosine inside {cosine[own][:, own][np.triu_indices(own.sum(), 1)].mean():.2f}"
            if not own.all():
                text += f", to the others {cosine[own][:, ~own].mean():.3f}"
            facts[f"cluster {label}"] = text
    return facts

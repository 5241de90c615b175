"""What a codebook holds, as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rcb_lmms.codebook.artefact import Codebook

if TYPE_CHECKING:
    from torch import Tensor

PERCENTILES = (1, 25, 50, 75, 99)


def show(codebook: Codebook) -> str:
    """Card, norms, duplicates, cosines and clusters of a codebook, one fact per line."""
    facts = {**_card(codebook), **_values(codebook.prototypes), **_cosines(codebook), **_clusters(codebook)}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _card(codebook: Codebook) -> dict[str, Any]:
    meta = codebook.meta
    names = ("id", "model", "revision", "family", "layer", "data", "images", "preset", "license", "verified", "sha256")
    card = {name: meta[name] for name in names if meta.get(name) is not None}
    for name in ("source", "experiment", "thresholds", "counts"):
        if meta.get(name):
            card[name] = ", ".join(f"{key} {value}" for key, value in meta[name].items())
    return card


def _values(prototypes: Tensor) -> dict[str, Any]:
    import numpy as np

    values = prototypes.double().numpy()
    norms = np.linalg.norm(values, axis=-1)
    unique, copies = np.unique(values, axis=0, return_counts=True)
    pairs = int((copies * (copies - 1) // 2).sum())
    return {
        "prototypes": f"{values.shape[0]} x {values.shape[1]} {str(prototypes.dtype).removeprefix('torch.')}",
        "duplicates": f"{len(unique)} unique rows, {pairs} pairs of equal rows",
        "norm": f"min {norms.min():.1f}, mean {norms.mean():.1f}, median {np.median(norms):.1f}, max {norms.max():.1f}",
        "elements": f"min {values.min():.2f}, max {values.max():.2f}, standard deviation {values.std():.3f}",
    }


def _cosines(codebook: Codebook) -> dict[str, Any]:
    import numpy as np

    if len(codebook) < 2:
        return {}
    cosine = _cosine_matrix(codebook)
    pairs = cosine[np.triu_indices(len(cosine), 1)]
    nearest = np.where(np.eye(len(cosine), dtype=bool), -np.inf, cosine).max(-1)
    return {"pairwise cosine": _percentiles(pairs), "nearest neighbour": _percentiles(nearest)}


def _percentiles(values) -> str:
    import numpy as np

    listed = ", ".join(f"{p}% {v:.2f}" for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True))
    return f"min {values.min():.3f}, mean {values.mean():.3f}; {listed}"


def _cosine_matrix(codebook: Codebook):
    unit = codebook.normalized().double().numpy()
    return unit @ unit.T


def _clusters(codebook: Codebook) -> dict[str, Any]:
    import numpy as np

    rows = codebook.meta.get("rows", {})
    facts: dict[str, Any] = {}
    if "image" in rows:
        _, counts = np.unique(np.array(rows["image"], dtype=str), return_counts=True)
        facts["provenance"] = f"{len(counts)} images, up to {counts.max()} rows of one image"
    if "cluster" in rows:
        cosine, labels = _cosine_matrix(codebook), np.array(rows["cluster"])
        for label in np.unique(labels):
            facts[f"cluster {label}"] = _cluster(codebook, cosine, labels == label)
    return facts


def _cluster(codebook: Codebook, cosine, own) -> str:
    import numpy as np

    norm = np.linalg.norm(codebook.prototypes.double().numpy()[own], axis=-1).mean()
    text = f"{own.sum()} rows from row {own.argmax()}, mean norm {norm:.1f}"
    if own.sum() > 1:
        text += f", mean cosine inside {cosine[own][:, own][np.triu_indices(own.sum(), 1)].mean():.2f}"
    if not own.all():
        text += f", to the others {cosine[own][:, ~own].mean():.3f}"
    return text

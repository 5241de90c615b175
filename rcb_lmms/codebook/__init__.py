"""The redundancy codebook: the artefact here, its making in `build`, `select`, `probe`, `divergence` and `dpc`."""

from __future__ import annotations

from rcb_lmms.codebook.artefact import Codebook

__all__ = ["Codebook"]

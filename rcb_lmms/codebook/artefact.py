"""The codebook as a value and as a file: prototypes of redundant visual tokens, and where each came from."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.codebook.cards import Card, cached_file, card_of_blob, cards, fetched, resolve
from rcb_lmms.codebook.merging import joined
from rcb_lmms.codebook.reading import read_meta, read_prototypes, read_upstream, unusable
from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rcb_lmms.families.base import Family

logger = logging.getLogger(__name__)

TENSOR, METADATA, FORMAT = "prototypes", "rcb_codebook", 1
EPS = 1e-12


@dataclass(frozen=True, eq=False)
class Codebook:
    """Redundant prototypes in the language model's embedding space.

    Attributes:
        prototypes: `(m, d)` float16 or float32 on the CPU, un-normalised, as stored.
        meta: JSON-able facts: id, model, revision, layer, data, images, preset, thresholds, counts, source, sha256,
            and `rows`, one list per column with an entry per prototype: `image`, `patch`, `cluster` where known.

    Raises:
        UserError: not a matrix, another type, not finite, a row of zeros, facts of a wrong type, or provenance of
            another length.
    """

    prototypes: Tensor
    meta: dict[str, Any] = field(default_factory=dict)
    _unit: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "prototypes", self.prototypes.detach().cpu().contiguous())
        read_meta(self.meta)
        if problem := _problem(self.prototypes, self.meta.get("rows") or {}):
            raise unusable(str(self.meta.get("id", "a codebook")), problem)
        object.__setattr__(self, "meta", {**self.meta, "format": FORMAT, "sha256": _content_hash(self.prototypes)})

    def __len__(self) -> int:
        return len(self.prototypes)

    @property
    def width(self) -> int:
        """Width `d` of the prototypes."""
        return self.prototypes.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the prototypes' type, shape and values; the same for every file that holds them."""
        return self.meta["sha256"]

    def normalized(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Rows of unit L2 norm `(m, d)` in `dtype` (float32), kept for the next call.

        Cast first, as released: rows normalised in float32 would differ in float16's last digit.
        """
        import torch

        dtype = dtype or torch.float32
        place = (str(device), dtype)
        if place not in self._unit:
            self._unit[place] = unit_rows(self.prototypes.to(device, dtype))
        return self._unit[place]

    def check_width(self, width: int, model: str) -> None:
        """Refuse a codebook made for another model.

        Raises:
            UserError: the prototypes are not `width` wide.
        """
        if self.width != width:
            raise UserError(
                wanted=f"a codebook for {model}, whose visual tokens are {width} wide",
                found=f"{self.meta.get('id', 'a codebook')}: {self.width} wide, made with {self.meta.get('model')}",
                allowed="a codebook made with the same checkpoint",
                next_step="name another with codebook=..., or make one: rcb codebook build",
            )

    def check_family(self, family: Family) -> None:
        """Refuse a model of another width, and warn of another checkpoint than the one the codebook was made with.

        Raises:
            UserError: the prototypes are of another width than the family's visual tokens.
        """
        self.check_width(family.width, family.pretrained)
        if (names := self.made_for(family)) is not None:
            logger.warning(
                "the codebook %s was made with %s, and the checkpoint is %s: if that is not the same model, its own "
                "codebook is wanted (rcb codebook build, then codebook=FILE)",
                self.meta.get("id", "without a name"),
                *names,
            )

    def made_for(self, family: Family) -> tuple[str, str] | None:
        """Nothing if the codebook was made with the family's checkpoint, else what it was made with and what is loaded.

        Equal width does not make a fine-tune's tokens the same. Known are: the same name, the laboratory's name with
        and without its family, the public conversion of the checkpoint that the released codebook was made with.
        """
        made, loaded = str(self.meta.get("model")), family.pretrained.partition("@")[0]
        released = self.meta.get("id") == family.codebook and loaded == family.checkpoint
        if released or _own_name(made, family) == _own_name(loaded, family):
            return None
        return made, loaded

    def merge(self, others: Iterable[Codebook], name: str | None = None) -> Codebook:
        """This codebook's prototypes and those of `others` behind them, each once.

        Args:
            others: made with the same checkpoint.
            name: id of the result, by default this one's.

        Raises:
            UserError: another width, or another model.
        """
        return Codebook(*joined([self, *others], name))

    @classmethod
    def load(cls, path_or_id: str | Path) -> Codebook:
        """Read a codebook by file or by the id of a card, downloading a released one if needed.

        Raises:
            UserError: unknown id, missing, damaged or foreign file, or no network for a download.
        """
        path = resolve(path_or_id)
        if isinstance(path, Card):
            with fetched(path) as file:
                return cls.load(cls.from_upstream_pt(file).save(cached_file(path.id)))
        tensor, meta = read_prototypes(path, TENSOR, METADATA)
        read_meta(meta, path)
        codebook = cls(tensor, meta)
        if meta.get("sha256") != codebook.sha256:
            raise unusable(path, "prototypes that do not have the sha256 of its metadata")
        return codebook

    def save(self, path: str | Path) -> Path:
        """Write one `.safetensors`; equal codebooks give equal bytes.

        Raises:
            UserError: the folder cannot be written.
        """
        from safetensors.torch import save

        meta = json.dumps(self.meta, sort_keys=True, ensure_ascii=False)
        return write_atomic(path, save({TENSOR: self.prototypes}, metadata={METADATA: meta}))

    @classmethod
    def from_upstream_pt(cls, path: str | Path) -> Codebook:
        """Import a tensor file of the paper's repository, with the JSON list of image ids beside it if there is one.

        A file whose git blob id is on a card is `verified` and inherits the card's facts; others are imported as
        unverified.

        Raises:
            UserError: missing, cut off, not a plain tensor, or ids that do not match the rows.
        """
        path = Path(path)
        tensor, images, blob = read_upstream(path)
        card = card_of_blob(blob)
        clusters = card.clusters if card else ()
        rows = {"cluster": [number for number, size in enumerate(clusters) for _ in range(size)], "image": images}
        meta = card.meta() if card else {"id": path.stem}
        meta |= {"verified": card is not None, "git_blob": blob, "imported_from": path.name}
        return cls(tensor, meta | {"rows": {column: entries for column, entries in rows.items() if entries}})


def import_upstream(path: str | Path, out: str | Path | None = None) -> Path:
    """Convert a released `.pt`; without `out`, a verified one goes where its id finds it.

    Raises:
        UserError: not a codebook, or unverified and without `out`.
    """
    codebook = Codebook.from_upstream_pt(path)
    if out is None and not codebook.meta["verified"]:
        raise UserError(
            wanted=f"import {path} under its id",
            found=f"a file with git blob id {codebook.meta['git_blob']}, which is on no card",
            allowed="the released files: " + ", ".join(card.id for card in cards().values() if card.source),
            next_step=f"rcb codebook import {shlex.quote(str(path))} --out FILE.safetensors",
        )
    return codebook.save(out or cached_file(codebook.meta["id"]))


def _own_name(model: str, family: Family) -> str:
    return f"lab:{family.name}" if model == "lab" else model


def unit_rows(rows: Tensor) -> Tensor:
    """Rows `(n, d)` scaled to length 1; a row of zeros stays one."""
    import torch

    # The official epsilon is nothing in float16, where a row of zeros would become NaN.
    return torch.nn.functional.normalize(rows, dim=1, eps=max(EPS, torch.finfo(rows.dtype).smallest_normal))


def _content_hash(prototypes: Tensor) -> str:
    digest = hashlib.sha256(f"{prototypes.dtype} {tuple(prototypes.shape)}".encode())
    digest.update(prototypes.numpy().tobytes())
    return digest.hexdigest()


def _problem(prototypes: Tensor, rows: dict[str, list]) -> str | None:
    import torch

    if prototypes.ndim != 2 or 0 in prototypes.shape:
        return f"a tensor of shape {tuple(prototypes.shape)}"
    if prototypes.dtype not in (torch.float16, torch.float32):
        return f"prototypes of type {prototypes.dtype}"
    if not (finite := prototypes.isfinite().all(-1)).all():
        return f"values that are not finite in row {int((~finite).nonzero()[0])}"
    if not (filled := prototypes.any(-1)).all():
        return f"nothing but zeros in row {int((~filled).nonzero()[0])}"
    for column, entries in rows.items():
        if len(entries) != len(prototypes):
            return f"{len(entries)} entries of row provenance ({column}) for {len(prototypes)} prototypes"
    return None

"""The codebook as a value and as a file: prototypes of redundant visual tokens, and where each came from."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
        UserError: not a matrix, another type, not finite, a row of zeros, or provenance of another length.
    """

    prototypes: Tensor
    meta: dict[str, Any] = field(default_factory=dict)
    _unit: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "prototypes", self.prototypes.detach().cpu().contiguous())
        if problem := _problem(self.prototypes, self.meta.get("rows", {})):
            raise _unusable(str(self.meta.get("id", "a codebook")), problem)
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

    @classmethod
    def load(cls, path_or_id: str | Path) -> Codebook:
        """Read a codebook by file or by the id of a card, downloading a released one if needed.

        Raises:
            UserError: unknown id, missing, damaged or foreign file, or no network for a download.
        """
        from rcb_lmms.codebook.cards import resolve

        path = resolve(path_or_id)
        tensor, meta = _read_safetensors(path)
        codebook = cls(tensor, meta)
        if meta.get("sha256") != codebook.sha256:
            raise _unusable(path, "prototypes that do not have the sha256 of its metadata")
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
            UserError: missing, cut off, not a tensor, or ids that do not match the rows.
        """
        from rcb_lmms.codebook.cards import card_of_blob

        path = Path(path)
        raw = read_bytes(path)
        tensor, blob = _unpickle(raw, path), git_blob(raw)
        card = card_of_blob(blob)
        meta = card.meta() if card else {"id": path.stem}
        meta |= {"verified": card is not None, "git_blob": blob, "imported_from": path.name}
        meta["rows"] = _upstream_rows(path.with_suffix(".json"), card.clusters if card else ())
        return cls(tensor, meta)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows `(n, d)` scaled to length 1; a row of zeros stays one."""
    import torch

    # The official epsilon is nothing in float16, where a row of zeros would become NaN.
    return torch.nn.functional.normalize(rows, dim=1, eps=max(EPS, torch.finfo(rows.dtype).smallest_normal))


def git_blob(raw: bytes) -> str:
    """The id git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error


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


def _read_safetensors(path: Path) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            meta = json.loads((handle.metadata() or {})[METADATA])
            # A private copy: the mapping would change or vanish with the file.
            return handle.get_tensor(TENSOR).clone(), meta
    except SafetensorError as error:
        raise _unusable(path, f"a damaged or cut off file ({error})") from error
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise _unusable(path, "a safetensors file without a codebook's metadata") from error


def _unpickle(raw: bytes, path: Path) -> Tensor:
    import torch

    try:
        tensor = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _unusable(path, f"a cut off file, or a pickle of more than tensors ({type(error).__name__})") from error
    if not isinstance(tensor, torch.Tensor):
        raise _unusable(path, f"a pickled {type(tensor).__name__}")
    return tensor if tensor.dtype in (torch.float16, torch.float32) else tensor.float()


def _upstream_rows(ids: Path, clusters: tuple[int, ...]) -> dict[str, list]:
    rows: dict[str, list] = {"cluster": [number for number, size in enumerate(clusters) for _ in range(size)]}
    if ids.exists():
        try:
            rows["image"] = json.loads(read_bytes(ids))
        except ValueError as error:
            raise _unusable(ids, "text that is not JSON") from error
        if not isinstance(rows["image"], list):
            raise _unusable(ids, "JSON that is not a list of image ids")
    return {column: entries for column, entries in rows.items() if entries}


def _unusable(what: str | Path, found: str) -> UserError:
    return UserError(
        wanted=f"a codebook from {what}",
        found=found,
        allowed="a finite (prototypes, width) matrix of float16 or float32 without rows of zeros, as saved by rcb",
        next_step="rcb codebook import FILE.pt for a released tensor; else fetch or build the file again",
    )

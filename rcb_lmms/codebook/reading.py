"""Files that may hold a codebook, read as what anybody could have put there."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rcb_lmms.errors import UserError
from rcb_lmms.files import no_file

if TYPE_CHECKING:
    from torch import Tensor


def unusable(what: str | Path, found: str) -> UserError:
    """The error for something that is no codebook."""
    return UserError(
        wanted=f"a codebook from {what}",
        found=found,
        allowed="a finite (prototypes, width) matrix of float16 or float32 without rows of zeros, as saved by rcb",
        next_step="rcb codebook import FILE.pt for a released tensor; else fetch or build the file again",
    )


def git_blob(raw: bytes) -> str:
    """The id git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


class Facts(BaseModel):
    """The types of a codebook's facts; unknown ones are let through, since anybody may add some."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str | None = None
    model: str | None = None
    revision: str | None = None
    family: str | None = None
    images: int | None = None
    counts: dict[str, int] | None = None
    thresholds: dict[str, Any] | None = None
    experiment: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    merged: list[dict[str, Any]] | None = None
    rows: dict[str, list[Any]] | None = None
    sha256: str | None = None


def explained(error: ValidationError) -> str:
    """Where the first mistake is, what is wrong, and what stands there."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "its metadata"
    return f"{place}: {first['msg']}, and not {str(first['input'])[:80]}"


def read_meta(meta: Any, path: str | Path = "") -> None:
    """Check the types of a codebook's facts.

    Raises:
        UserError: a fact of another type.
    """
    try:
        Facts.model_validate(meta)
    except ValidationError as error:
        name = meta.get("id", "a codebook") if isinstance(meta, dict) else "a codebook"
        raise unusable(path or str(name), explained(error)) from error


def read_prototypes(path: Path, tensor: str, metadata: str) -> tuple[Tensor, Any]:
    """The tensor of a codebook's file, and its facts, not yet checked."""
    from safetensors import SafetensorError, safe_open

    if problem := no_file(path):
        raise unusable(path, problem)
    try:
        with safe_open(path, framework="pt") as handle:
            meta = json.loads((handle.metadata() or {})[metadata])
            # A private copy: the mapping would change or vanish with the file.
            return handle.get_tensor(tensor).clone(), meta
    except SafetensorError as error:
        raise unusable(path, f"a damaged or cut off file ({error})") from error
    except OSError as error:
        raise unusable(path, error.strerror or str(error)) from error
    except (KeyError, ValueError, RecursionError) as error:
        raise unusable(path, "a safetensors file without a codebook's metadata") from error


def read_upstream(path: Path) -> tuple[Tensor, list[Any], str]:
    """A released tensor, the image ids beside it (empty if there are none), and the git blob id of its file."""
    raw, ids = _read_bytes(path), path.with_suffix(".json")
    return _unpickled(raw, path), _read_ids(ids) if ids.exists() else [], git_blob(raw)


def _read_bytes(path: Path) -> bytes:
    if problem := no_file(path):
        raise unusable(path, problem)
    try:
        return path.read_bytes()
    except OSError as error:
        raise unusable(path, error.strerror or str(error)) from error


def _read_ids(path: Path) -> list[Any]:
    try:
        ids = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise unusable(path, "text that is not JSON, or JSON too deep") from error
    if not isinstance(ids, list) or not all(isinstance(entry, (str, int)) for entry in ids):
        raise unusable(path, "JSON that is not a list of image ids")
    return ids


def _unpickled(raw: bytes, path: Path) -> Tensor:
    """A plain tensor of numbers, in a type that has a place in a codebook's file."""
    import torch

    try:
        tensor = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling runs into whatever the bytes say
        raise unusable(path, f"a cut off file, or a pickle of more than tensors ({type(error).__name__})") from error
    if not isinstance(tensor, torch.Tensor):
        raise unusable(path, f"a pickled {type(tensor).__name__}")
    kinds = {
        "sparse": not tensor.is_nested and tensor.layout is not torch.strided,
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "meta": tensor.is_meta,
        str(tensor.dtype).removeprefix("torch."): not tensor.is_floating_point(),
    }
    if kind := next((name for name, found in kinds.items() if found), None):
        raise unusable(path, f"a {kind} tensor")
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise unusable(path, f"a tensor of shape {tuple(tensor.shape)} that repeats a few stored values")
    return tensor if tensor.dtype in (torch.float16, torch.float32) else tensor.float()

"""Files that survive a kill: atomic replacement, append-only JSON lines, content hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
            temporary = handle.name
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)  # NamedTemporaryFile's 0600 would hide the result from other users
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise unwritable(path, error) from error
    return path


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a file that could not be written."""
    return UserError(
        wanted=f"write {path}",
        found=error.strerror or str(error),
        allowed="a folder that can be written, with free space",
        next_step="free some space or name another folder, then repeat the command: finished work is kept",
    )


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line; `read_jsonl` ignores a last line cut off by a kill.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with path.open("ab+") as handle:
            # A line that a kill cut off must not swallow this one: its bytes would corrupt both.
            if handle.tell() and not _ends_with_newline(handle):
                line = "\n" + line
            handle.write(line.encode())
    except OSError as error:
        raise unwritable(path, error) from error


def _ends_with_newline(handle) -> bool:
    handle.seek(-1, os.SEEK_END)
    return handle.read(1) == b"\n"


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the complete JSON lines of a file; lines cut off by a kill are passed over. A missing file is empty."""
    path = Path(path)
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def no_file(path: str | Path) -> str | None:
    """Why `path` is no file that can be read to its end; opening a pipe, for one, would wait for a writer forever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def read_yaml(path: str | Path, what: str, next_step: str) -> Any:
    """The content of a YAML file.

    Args:
        path: of a file that is read to its end.
        what: the file should be, for the error.
        next_step: likewise.

    Raises:
        UserError: no file that can be read, or no YAML.
    """
    import yaml

    if (found := no_file(path)) is None:
        try:
            return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            found = error.strerror or str(error)
        except RecursionError:
            found = "lists or mappings nested too deeply"
        except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, dates that are none
            found = " ".join(str(error).split())[:300]
    raise UserError(wanted=f"{what} from {path}", found=found, allowed="a YAML file of it", next_step=next_step)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def answers_hash(rows: Iterable[dict[str, Any]]) -> str:
    """Names what a run answered to each document, so that its record and its samples files know each other.

    Raises:
        KeyError: a row that is no sample.
    """
    answers = sorted((row["doc_id"], row["filtered_resps"]) for row in rows)
    return hashlib.sha256(json.dumps(answers, ensure_ascii=False).encode()).hexdigest()[:32]

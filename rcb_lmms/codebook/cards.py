"""Known codebooks by id: what a card says, and where the file is found, shipped, cached or downloaded."""

from __future__ import annotations

import http.client
import shlex
import tempfile
import urllib.request
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rcb_lmms.codebook.artefact import Codebook, git_blob
from rcb_lmms.errors import UserError
from rcb_lmms.resources import cache_dir, data_dir


@dataclass(frozen=True)
class Source:
    """Where a released tensor lies: `address/path`, its image ids at `address/ids`, its content by `git_blob`."""

    repository: str
    commit: str
    address: str
    path: str
    ids: str
    git_blob: str

    @property
    def url(self) -> str:
        """Address of the tensor file."""
        return f"{self.address}/{self.path}"

    @property
    def by_hand(self) -> str:
        """Commands that fetch the tensor and its image ids on any machine, and import them."""
        name = Path(self.path).name
        ids = Path(name).with_suffix(".json")
        return (
            f"curl -L -o {name} {self.url} && curl -L -o {ids} {self.address}/{self.ids} && rcb codebook import {name}"
        )


@dataclass(frozen=True)
class Card:
    """What is known of a codebook before its file is at hand; one YAML file in `codebooks/`.

    Attributes:
        file: name of a `.safetensors` shipped beside the card, or `None`.
        source: where a codebook that is not shipped comes from, or `None`.
        clusters: sizes of the across-image clusters its rows consist of, in row order.
    """

    id: str
    model: str
    family: str
    layer: str
    data: str
    images: int | None
    preset: str
    license: str
    thresholds: dict[str, float] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    clusters: tuple[int, ...] = ()
    file: str | None = None
    source: Source | None = None
    note: str = ""

    def meta(self) -> dict[str, Any]:
        """The card's facts as a codebook's metadata."""
        names = ("id", "model", "family", "layer", "data", "images", "preset", "license", "thresholds")
        facts = {name: getattr(self, name) for name in names}
        if self.source:
            facts["source"] = {"repository": self.source.repository, "commit": self.source.commit}
        return facts


def cards() -> dict[str, Card]:
    """Every card by id.

    Raises:
        UserError: a card that is not valid.
    """
    paths = sorted(data_dir("codebooks").glob("*.yaml"))
    return {card.id: card for card in map(_read_card, paths)}


def card_of_blob(blob: str) -> Card | None:
    """The card of a released file by its git blob id."""
    return next((card for card in cards().values() if card.source and card.source.git_blob == blob), None)


def cached_file(card: Card) -> Path:
    """Where an imported or downloaded codebook is kept."""
    return cache_dir() / "codebooks" / f"{card.id}.safetensors"


def local_file(card: Card) -> Path | None:
    """The card's `.safetensors` if it is shipped or cached."""
    candidates = (data_dir("codebooks") / (card.file or ""), cached_file(card))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def resolve(path_or_id: str | Path) -> Path:
    """The `.safetensors` of a path, or of a card's id: shipped, cached, or downloaded now.

    Raises:
        UserError: no such file or id, or the download failed (the message has the commands for another machine).
    """
    name, path = str(path_or_id), Path(path_or_id).expanduser()
    if path.is_file() or path.suffix == ".safetensors" or len(path.parts) > 1:
        if path.suffix == ".pt":
            raise _unresolved(name, "a pickled tensor", f"rcb codebook import {shlex.quote(name)}")
        return path
    if (card := cards().get(name)) is None:
        raise _unresolved(name, "neither a file nor the id of a card", "rcb codebook build, or one of these ids")
    if (found := local_file(card)) is not None:
        return found
    if card.source is None:
        raise _unresolved(name, f"no file {card.file} beside its card", "rcb codebook build")
    return _download(card, card.source).save(cached_file(card))


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
    return codebook.save(out or cached_file(cards()[codebook.meta["id"]]))


def _download(card: Card, source: Source) -> Codebook:
    with tempfile.TemporaryDirectory() as folder:
        tensor = Path(folder, Path(source.path).name)
        tensor.write_bytes(_fetch(card, source, source.path))
        if git_blob(tensor.read_bytes()) != source.git_blob:
            raise _unreachable(card, source, f"a file of another content at {source.url}")
        tensor.with_suffix(".json").write_bytes(_fetch(card, source, source.ids))
        return Codebook.from_upstream_pt(tensor)


def _fetch(card: Card, source: Source, path: str) -> bytes:
    try:
        with urllib.request.urlopen(f"{source.address}/{path}", timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(card, source, f"no answer from {source.address}/{path} ({error})") from error


def _unreachable(card: Card, source: Source, found: str) -> UserError:
    return UserError(
        wanted=f"download the codebook {card.id}",
        found=found,
        allowed=f"the file with git blob id {source.git_blob}, fetched on any machine",
        next_step=source.by_hand,
    )


def _unresolved(name: str, found: str, next_step: str) -> UserError:
    known = ", ".join(sorted(cards()))
    return UserError(
        wanted=f"codebook={name}", found=found, allowed=f"a .safetensors file, or an id: {known}", next_step=next_step
    )


def _read_card(path: Path) -> Card:
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(entries.get("source"), dict):
            entries["source"] = Source(**entries["source"])
        for name in ("shape", "clusters"):
            entries[name] = tuple(entries.get(name) or ())
        return Card(**entries)
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(
            wanted=f"the codebook card {path}",
            found=" ".join(str(error).split()),
            allowed="YAML with the keys " + ", ".join(entry.name for entry in fields(Card)),
            next_step="correct or remove the card",
        ) from error

"""Known codebooks by id: what a card says, and where the file is found, shipped, cached or downloaded."""

from __future__ import annotations

import contextlib
import http.client
import shlex
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rcb_lmms.codebook.reading import explained, git_blob
from rcb_lmms.errors import UserError
from rcb_lmms.files import no_file
from rcb_lmms.resources import cache_dir, data_dir

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where a released tensor lies: `address/path`, its image ids at `address/ids`, its content by `git_blob`."""

    repository: str
    commit: str
    address: str
    path: str
    ids: str
    git_blob: str

    @property
    def by_hand(self) -> str:
        """Commands that fetch the tensor and its image ids on any machine, and import them."""
        name = Path(self.path).name
        ids = Path(name).with_suffix(".json")
        fetch = [f"curl -L -o {file} {self.address}/{path}" for file, path in ((name, self.path), (ids, self.ids))]
        return " && ".join([*fetch, f"rcb codebook import {name}"])


@dataclass(frozen=True, config=STRICT)
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


def cached_file(name: str) -> Path:
    """Where an imported or downloaded codebook of that id is kept."""
    return cache_dir() / "codebooks" / f"{name}.safetensors"


def local_file(card: Card) -> Path | None:
    """The card's `.safetensors` if it is shipped or cached."""
    candidates = (data_dir("codebooks") / (card.file or ""), cached_file(card.id))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def resolve(path_or_id: str | Path) -> Path | Card:
    """The `.safetensors` of a path, or of a card's id, shipped or cached; the card if it has to be downloaded.

    Raises:
        UserError: no such file or id.
    """
    name, path = str(path_or_id), Path(path_or_id).expanduser()
    if path.suffix == ".safetensors" or len(path.parts) > 1 or no_file(path) is None:
        if path.suffix == ".pt":
            raise _unresolved(name, "a pickled tensor", f"rcb codebook import {shlex.quote(name)}")
        return path
    if (card := cards().get(name)) is None:
        raise _unresolved(name, "neither a file nor the id of a card", "rcb codebook build, or one of these ids")
    if (found := local_file(card)) is not None:
        return found
    if card.source is None:
        raise _unresolved(name, f"no file {card.file} beside its card", "rcb codebook build")
    return card


@contextlib.contextmanager
def fetched(card: Card) -> Iterator[Path]:
    """The released tensor of a card, downloaded, with its image ids beside it; it goes with the context.

    Raises:
        UserError: no network, or another content (the message has the commands for another machine).
    """
    with tempfile.TemporaryDirectory() as folder:
        tensor = Path(folder, Path(card.source.path).name)
        tensor.write_bytes(_fetch(card, card.source.path))
        if git_blob(tensor.read_bytes()) != card.source.git_blob:
            raise _unreachable(card, f"a file of another content at {card.source.address}/{card.source.path}")
        tensor.with_suffix(".json").write_bytes(_fetch(card, card.source.ids))
        yield tensor


def _fetch(card: Card, path: str) -> bytes:
    address = f"{card.source.address}/{path}"
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(card, f"no answer from {address} ({error})") from error


def _unreachable(card: Card, found: str) -> UserError:
    return UserError(
        wanted=f"download the codebook {card.id}",
        found=found,
        allowed=f"the file with git blob id {card.source.git_blob}, fetched on any machine",
        next_step=card.source.by_hand,
    )


def _unresolved(name: str, found: str, next_step: str) -> UserError:
    known = ", ".join(sorted(cards()))
    return UserError(
        wanted=f"codebook={name}", found=found, allowed=f"a .safetensors file, or an id: {known}", next_step=next_step
    )


def _read_card(path: Path) -> Card:
    import yaml

    try:
        return TypeAdapter(Card).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError, ValueError) as error:
        raise UserError(
            wanted=f"the codebook card {path}",
            found=explained(error) if isinstance(error, ValidationError) else " ".join(str(error).split()),
            allowed="YAML with the keys " + ", ".join(entry.name for entry in fields(Card)),
            next_step="correct or remove the card",
        ) from error

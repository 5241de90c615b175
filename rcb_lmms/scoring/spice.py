"""SPICE (Anderson et al. 2016) by the jars of pycocoevalcap, for Java 8 to 17 and later, in folders of our own."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rcb_lmms.errors import UserError
from rcb_lmms.files import append_jsonl, read_jsonl
from rcb_lmms.resources import PACKAGE, cache_dir
from rcb_lmms.scoring.corenlp import corenlp_jars, pycocoevalcap_dir
from rcb_lmms.scoring.java import run_java

# Images per Java process: what a death of Java can cost. Its start, with the models, takes some ten seconds.
BATCH = 2000
# What pycocoevalcap asks for.
MEMORY = "8G"

Sample = tuple[str, Sequence[str]]


def spice_scores(samples: Sequence[Sample]) -> list[float]:
    """F-score of every `(caption, references)`, all tokenised; 0 to 1.

    Scores are kept in the cache as they come, by the texts they depend on: after an interruption only the missing ones
    are computed, and a second call needs no Java. As pycocoevalcap's `Spice`, but for an empty caption, which has no
    proposition and scores 0 without being parsed.

    Raises:
        UserError: Java or CoreNLP is absent, or Java died; finished batches are kept.
    """
    names = [_name(sample) for sample in samples]
    known = {row["sample"]: row["f"] for row in read_jsonl(_store())}
    missing = {name: sample for name, sample in zip(names, samples, strict=True) if sample[0] and name not in known}
    todo = list(missing.items())
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        for (name, _), score in zip(batch, _run([sample for _, sample in batch]), strict=True):
            known[name] = score
            append_jsonl(_store(), {"sample": name, "f": score})
    return [known[name] if caption else 0.0 for name, (caption, _) in zip(names, samples, strict=True)]


def spice_jars() -> list[Path]:
    """Class path of the scorer.

    Raises:
        UserError: CoreNLP is absent.
    """
    home = pycocoevalcap_dir() / "spice"
    own = PACKAGE / "scoring" / "driver"
    return [own, *corenlp_jars(), home / "spice-1.0.jar", *sorted((home / "lib").glob("*.jar"))]


def _run(samples: Sequence[Sample]) -> list[float]:
    jars = spice_jars()
    cache = cache_dir() / "spice" / "parses"
    cache.mkdir(parents=True, exist_ok=True)
    # The parse cache is native code for x86-64 alone.
    cached = ["-cache", str(cache)] if platform.machine().lower() in ("x86_64", "amd64") else []
    rows = [{"image_id": index, "test": test, "refs": list(refs)} for index, (test, refs) in enumerate(samples)]
    with tempfile.TemporaryDirectory(prefix="rcb_spice_") as folder:
        given, made = Path(folder, "captions.json"), Path(folder, "scores.json")
        given.write_text(json.dumps(rows), encoding="ascii")  # Java would read it in the locale's encoding
        options = [str(given), str(made), *cached]
        run_java("edu.anu.spice.BatchScores", jars, options, folder=Path(folder), memory=MEMORY)
        scored = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in _read(made)}
    if set(scored) != set(range(len(samples))):
        raise _incomplete(f"scores of {len(scored)} of {len(samples)} captions")
    return [scored[index] for index in range(len(samples))]


def _read(made: Path) -> list[dict]:
    try:
        return json.loads(made.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise _incomplete(f"no readable scores ({error})") from error


def _incomplete(found: str) -> UserError:
    return UserError(
        wanted="SPICE scores from Java",
        found=found,
        allowed="one for each caption",
        next_step="repeat the command; finished batches are kept",
    )


def _store() -> Path:
    return cache_dir() / "spice" / "scores.jsonl"


def _name(sample: Sample) -> str:
    caption, references = sample
    return hashlib.sha256(json.dumps([caption, *references]).encode()).hexdigest()[:32]

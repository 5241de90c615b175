"""`rcb captions`: CIDEr and SPICE of finished runs, from their samples files into these and into the results file."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import read_jsonl, write_atomic
from rcb_lmms.scoring.caption_images import NOCAPS_ANNOTATIONS, nocaps_domain
from rcb_lmms.scoring.captions import KINDS, Item, entries, score
from rcb_lmms.scoring.java import java_banner

NAME = re.compile(r"(?P<run>.*_)?samples_(?P<task>.+)\.jsonl")


@dataclass
class Samples:
    """A samples file: its rows, their items by metric, and the results file of the same run, if there is one."""

    path: Path
    task: str
    rows: list[dict[str, Any]]
    results: Path | None
    items: dict[str, list[Item]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str) -> None:
        """Compute the metrics of a kind, `cider` or `spice`, and write them."""
        own = {metric: items for metric, items in self.items.items() if metric.split("_")[2] == kind}
        self.scores |= {metric: score(items, kind) for metric, items in own.items()}
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_atomic(self.path, "".join(lines))
        if self.results is not None:
            self._merge(kind, own)

    def _merge(self, kind: str, own: dict[str, list[Item]]) -> None:
        results = _read_results(self.results)
        table = results["results"][self.task]
        for metric, items in own.items():
            values = [item["score"] for item in items]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
            table |= {f"{metric},none": self.scores[metric], f"{metric}_stderr_clt,none": error}
        results["results"][self.task] = table
        note = {"scored": datetime.now(timezone.utc).isoformat(timespec="seconds"), "java": java_banner()}
        results.setdefault("rcb_captions", {}).setdefault(self.task, {})[kind] = note
        write_atomic(self.results, json.dumps(results, indent=2, ensure_ascii=False))


def add_scores(paths: Sequence[Path]) -> list[Samples]:
    """Score samples files of `rcb_nocaps_val` and `rcb_flickr30k*`; equal to what the run itself would have said.

    CIDEr of all files comes first and is written at once, so that a missing CoreNLP costs SPICE alone. The domains of
    NoCaps are added if the run did not know them and `RCB_NOCAPS_ANNOTATIONS` is set now.

    Raises:
        UserError: a foreign, damaged or partial file (before any work), or Java or CoreNLP is absent or died.
    """
    files = [_read(Path(path)) for path in paths]
    for kind in KINDS:
        for samples in files:
            samples.add(kind)
    return files


def _read(path: Path) -> Samples:
    name = NAME.fullmatch(path.name)
    if name is None or not path.is_file():
        raise _unusable(path, "another name" if path.is_file() else "no such file")
    rows = list(read_jsonl(path))
    results = path.with_name(f"{name['run'] or ''}results.json")
    samples = Samples(path, name["task"], rows, results if results.is_file() else None)
    for row in rows:
        own = _items(path, row)
        row |= own
        for metric, item in own.items():
            samples.items.setdefault(metric, []).append(item)
    _check(samples)
    return samples


def _items(path: Path, row: dict[str, Any]) -> dict[str, Item]:
    metric = next((key for key in row if re.fullmatch(r"rcb_(nocaps|flickr)_cider", key)), None)
    if metric is None or not {"image_id", "pred", "answer"} <= set(row[metric]):
        raise _unusable(path, f"a row without a caption: {', '.join(row)}"[:200])
    data = metric.split("_")[1]
    item = {key: value for key, value in row[metric].items() if key not in ("score", "metric")}
    if data == "nocaps" and not item.get("domain") and os.environ.get(NOCAPS_ANNOTATIONS):
        item["domain"] = nocaps_domain(item["image_id"])
    return entries(data, item)


def _check(samples: Samples) -> None:
    count = len(samples.rows)
    if count == 0 or len({row["doc_id"] for row in samples.rows}) != count:
        raise _unusable(samples.path, "samples that appear twice" if count else "no sample")
    if samples.results is None:
        return
    expected = _read_results(samples.results)["n-samples"].get(samples.task, {}).get("effective")
    if expected != count:
        raise _unusable(samples.path, f"{count} samples, where {samples.results.name} has {expected}")


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["results"].items(), results["n-samples"].items()
        return results
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, f"damaged ({type(error).__name__}: {error})") from error


def _unusable(path: Path, found: str) -> UserError:
    return UserError(
        wanted=f"captions in {path}",
        found=found,
        allowed="whole files *samples_rcb_nocaps_val.jsonl and *samples_rcb_flickr30k*.jsonl, as a run wrote them",
        next_step="name such a file, or repeat the run with --log_samples",
    )

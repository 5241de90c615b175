"""Captioning tasks: what their YAML files name, and CIDEr and SPICE of a whole set of captions.

A metric that cannot be computed (no Java, Java died, no CoreNLP) is left blank and the captions are kept, so that
`rcb captions` can add it later: scoring never costs a run.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.models import ENTRIES
from rcb_lmms.resources import cache_dir
from rcb_lmms.scoring.caption_images import say
from rcb_lmms.scoring.corenlp import pycocoevalcap_dir
from rcb_lmms.scoring.java import run_java
from rcb_lmms.scoring.spice import spice_scores

# The paper's lengths: 64 tokens for LLaVA-1.5, the tasks' own value, and these. It has no captions by OneVision, which
# writes as much as NeXT does when asked for detail.
LENGTHS = {
    f"{family}_{method}": {"max_new_tokens": 256}
    for family in ("llava_next", "llava_onevision")
    for method in ENTRIES[family]
}

Item = dict[str, Any]
# Tokenised captions of the last set that was scored, which the metrics of its parts look up.
_tokens: dict[str, str] = {}


def nocaps_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """A NoCaps caption under every metric it enters: overall, and its domain's."""
    item = {"image_id": doc["image_id"], "pred": results[0], "answer": list(doc["annotations_captions"])}
    return entries("nocaps", item | {"domain": doc.get("domain")})


def flickr_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Item]:
    """A Flickr30k caption under both metrics."""
    item = {"image_id": doc["img_id"], "pred": results[0], "answer": list(doc["caption"])}
    return entries("flickr", item)


def dc100_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The length of a detailed caption; the paper shows these captions and scores none."""
    return {"rcb_dc100_words": float(len(results[0].split()))}


def entries(data: str, item: Item) -> dict[str, Item]:
    """`{metric: item}` of a sample of `nocaps` or `flickr`, each with an item of its own, which will hold its score."""
    suffixes = ["", "_" + item["domain"].removesuffix("-domain")] if item.get("domain") else [""]
    metrics = [f"rcb_{data}_{kind}{suffix}" for suffix in suffixes for kind in KINDS]
    return {metric: item | {"metric": metric} for metric in metrics}


def aggregate(items: list[Item]) -> float | None:
    """A metric over a set of captions; `None` if it cannot be computed.

    CIDEr on pycocoevalcap's scale, with the document frequencies of the set: a domain of NoCaps is scored as a
    benchmark of its own, as is usual. SPICE as the mean F-score. Both are means over images, so that lmms-eval makes
    their standard error of the items, which get their `score` here.
    """
    _, data, kind, *domain = items[0]["metric"].split("_")
    try:
        return score(items, kind)
    except UserError as error:
        name = {"cider": "CIDEr", "spice": "SPICE"}[kind]
        say(f"{name} is left blank: {error.found}")
        if not domain:
            _keep(data, items, error.next_step)
        return None


def score(items: list[Item], kind: str) -> float:
    """Give every item its `score` and return the mean.

    Raises:
        UserError: Java or CoreNLP is absent, or Java died.
    """
    # Processes report in their own order; a sum should not depend on it.
    ordered = sorted(items, key=lambda item: (str(item["image_id"]), item["pred"]))
    values = KINDS[kind](_tokenized(ordered))
    for item, value in zip(ordered, values, strict=True):
        item["score"] = float(value)
    return sum(values) / len(values)


def tokenize(captions: Sequence[str]) -> list[str]:
    """Captions as the tokenizer of pycocoevalcap leaves them: Penn Treebank, lower case, no punctuation.

    Line breaks and control characters become spaces; pycocoevalcap would take some of them for the next caption.

    Raises:
        UserError: Java is absent or died.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    jar = pycocoevalcap_dir() / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
    lines = [" ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", caption).split()) for caption in captions]
    with tempfile.TemporaryDirectory(prefix="rcb_tokens_") as folder:
        given = Path(folder, "captions.txt")
        given.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")
        options = ["-preserveLines", "-lowerCase", given.name]
        made = run_java("edu.stanford.nlp.process.PTBTokenizer", [jar], options, folder=Path(folder)).split("\n")
    if len(made) != len(lines) + 1:
        raise UserError(
            wanted=f"{len(lines)} tokenised captions",
            found=f"{len(made) - 1} lines from Java",
            allowed="one line for each caption",
            next_step="rcb captions SAMPLES.jsonl, to try again",
        )
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in made[:-1]]


def _tokenized(items: Sequence[Item]) -> list[tuple[str, list[str]]]:
    captions, references = [item["pred"] for item in items], [text for item in items for text in item["answer"]]
    if not _tokens.keys() >= {*captions, *references}:
        # A period at a line's end may be read by the line that follows, so these stay whole, as in pycocoevalcap.
        made = tokenize(references) + tokenize(captions)
        _tokens.clear()
        _tokens.update(zip([*references, *captions], made, strict=True))
    return [(_tokens[item["pred"]], [_tokens[text] for text in item["answer"]]) for item in items]


def _cider_scores(samples: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
    from pycocoevalcap.cider.cider import Cider

    captions = {index: [caption] for index, (caption, _) in enumerate(samples)}
    references = {index: list(own) for index, (_, own) in enumerate(samples)}
    return Cider().compute_score(references, captions)[1].tolist()


KINDS: dict[str, Callable[[Sequence[tuple[str, Sequence[str]]]], list[float]]] = {
    "cider": _cider_scores,
    "spice": spice_scores,
}


def _keep(data: str, items: list[Item], mend: str) -> None:
    """Write captions where `rcb captions` can read them, should the run not log its samples."""
    rows = [{"doc_id": index, **entries(data, item)} for index, item in enumerate(items)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    name = f"samples_{data}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    try:
        path = write_atomic(cache_dir() / "captions" / name, text)
        say(f"the captions are kept; when that is mended ({mend}): rcb captions {path}")
    except UserError as error:
        say(f"the captions are in the samples of the run alone: {error.wanted}: {error.found}")

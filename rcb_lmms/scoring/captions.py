"""Captioning tasks: what their YAML files name, and CIDEr and SPICE of a whole set of captions.

A metric that cannot be computed (no Java, Java died, no CoreNLP) is left blank and the captions are kept, so that
`rcb captions` can add it later: scoring never costs a run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError, leave_with
from rcb_lmms.files import write_atomic
from rcb_lmms.models import ENTRIES
from rcb_lmms.resources import cache_dir
from rcb_lmms.scoring.corenlp import pycocoevalcap_dir
from rcb_lmms.scoring.java import java_banner, run_java
from rcb_lmms.scoring.spice import spice_jars, spice_scores

logger = logging.getLogger(__name__)

# The paper's lengths: 64 tokens for LLaVA-1.5, the tasks' own value, and these. It has no captions by OneVision, which
# writes as much as NeXT does when asked for detail.
LENGTHS = {
    f"{family}_{method}": {"max_new_tokens": 256}
    for family in ("llava_next", "llava_onevision")
    for method in ENTRIES[family]
}
NOCAPS_ANNOTATIONS = "RCB_NOCAPS_ANNOTATIONS"
FLICKR30K_SPLITS = "RCB_FLICKR30K_SPLITS"
DOMAINS = ("in", "near", "out")

Item = dict[str, Any]
# Tokenised captions of the last set that was scored, which the metrics of its parts look up.
_tokens: dict[str, str] = {}


def nocaps_docs(docs: Any) -> Any:
    """NoCaps with a `domain` column where the domains are known; tells beforehand what cannot be scored.

    The data set on the hub has no domains. They are taken from a `domain` column if there is one, else from the file
    `nocaps_val_4500_captions.json` of the benchmark's authors, if `RCB_NOCAPS_ANNOTATIONS` names it; else the overall
    scores are the only ones, and `rcb captions` adds the others once the variable is set.

    Raises:
        UserError: columns are missing, or the file does not have the images.
    """
    with leave_with():
        _require(docs, "NoCaps", "image", "image_id", "annotations_captions")
        _referenced(docs, "NoCaps", "annotations_captions")
        _announce()
        if "domain" in docs.column_names:
            return docs
        if not os.environ.get(NOCAPS_ANNOTATIONS):
            _say(f"NoCaps: overall scores only; {NOCAPS_ANNOTATIONS}=nocaps_val_4500_captions.json gives the domains'")
            return docs
        return docs.add_column("domain", [nocaps_domain(image) for image in docs["image_id"]])


def flickr_docs(docs: Any) -> Any:
    """All of Flickr30k; tells beforehand what cannot be scored."""
    with leave_with():
        _require(docs, "Flickr30k", "image", "img_id", "caption")
        _referenced(docs, "Flickr30k", "caption")
        _announce()
    return docs


def karpathy_docs(docs: Any) -> Any:
    """The 1000 images of Karpathy's test split of Flickr30k.

    Taken from a `split` column if there is one; the data set on the hub has none, so that `RCB_FLICKR30K_SPLITS` must
    name `dataset_flickr30k.json` of Karpathy's archive, whose file names are those of the column `filename`.

    Raises:
        UserError: neither, or images of the split are not in the data set.
    """
    with leave_with():
        if "split" in docs.column_names:
            chosen = [index for index, split in enumerate(docs["split"]) if split == "test"]
        else:
            _require(docs, "Flickr30k", "filename")
            wanted = _karpathy_files()
            chosen = [index for index, name in enumerate(docs["filename"]) if name in wanted]
            if len(chosen) != len(wanted):
                raise UserError(
                    wanted=f"{len(wanted)} images of Karpathy's test split",
                    found=f"{len(chosen)} of them in the data set",
                    allowed="the whole Flickr30k",
                    next_step="remove the data set from the cache of Hugging Face and download it again",
                )
        return flickr_docs(docs.select(chosen))


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
    suffixes = ["", f"_{_short(item['domain'])}"] if item.get("domain") else [""]
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
        _say(f"{kind.upper()} is left blank: {error.found}")
        if not domain:
            kept = _keep(data, items)
            _say(f"the captions are kept; when that is mended ({error.next_step}): rcb captions {kept}")
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


def nocaps_domain(image_id: int) -> str:
    """Domain of a NoCaps image by the authors' file.

    Raises:
        UserError: no such file, a file of another kind, or an image that is not in it.
    """
    path = os.environ.get(NOCAPS_ANNOTATIONS, "")
    domains = _nocaps_domains(path)
    if int(image_id) not in domains:
        raise _foreign(NOCAPS_ANNOTATIONS, path, f"no image {image_id} in it", "nocaps_val_4500_captions.json")
    return domains[int(image_id)]


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


def _short(domain: str) -> str:
    if (short := domain.removesuffix("-domain")) in DOMAINS:
        return short
    raise UserError(
        wanted="the domain of a NoCaps image",
        found=repr(domain),
        allowed="in-domain, near-domain, out-domain",
        next_step=f"correct the data set's column, or the file that {NOCAPS_ANNOTATIONS} names",
    )


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


def _keep(data: str, items: list[Item]) -> Path:
    """Write captions where `rcb captions` can read them, should the run not log its samples."""
    rows = [{"doc_id": index, **entries(data, item)} for index, item in enumerate(items)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    name = f"samples_{data}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    return write_atomic(cache_dir() / "captions" / name, text)


def _announce() -> None:
    """Say before generation starts which metrics will be blank."""
    for kind, check in (("CIDEr and SPICE", java_banner), ("SPICE", spice_jars)):
        try:
            check()
        except UserError as error:
            _say(f"{kind} will be left blank: {error.found}; {error.next_step}")
            _say("captions are made all the same; rcb captions SAMPLES.jsonl scores them later")
            return


@functools.cache
def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(text)


def _require(docs: Any, name: str, *columns: str) -> None:
    if missing := [column for column in columns if column not in docs.column_names]:
        raise UserError(
            wanted=f"{name} with the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
            found=", ".join(docs.column_names),
            allowed=f"the schema of the data set on the hub: {', '.join(columns)}",
            next_step="correct the local copy, or remove it so that it is downloaded again",
        )


def _referenced(docs: Any, name: str, column: str) -> None:
    if bare := [index for index, references in enumerate(docs[column]) if not references]:
        raise UserError(
            wanted=f"{name} with reference captions in {column}",
            found=f"none in row {bare[0]}" + f" and {len(bare) - 1} more" * (len(bare) > 1),
            allowed="at least one for each image",
            next_step="correct the local copy, or remove it so that it is downloaded again",
        )


@functools.cache
def _nocaps_domains(path: str) -> dict[int, str]:
    try:
        images = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
        return {int(image["id"]): image["domain"] for image in images}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise _foreign(NOCAPS_ANNOTATIONS, path, found, "nocaps_val_4500_captions.json") from error


def _karpathy_files() -> set[str]:
    path = os.environ.get(FLICKR30K_SPLITS, "")
    try:
        images = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
        return {image["filename"] for image in images if image["split"] == "test"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}" if path else "the variable is not set"
        raise _foreign(FLICKR30K_SPLITS, path, found, "dataset_flickr30k.json") from error


def _foreign(variable: str, path: str, found: str, name: str) -> UserError:
    return UserError(
        wanted=f"{name}, named by {variable}",
        found=f"{path}: {found}" if path else found,
        allowed="the file of the data set's authors, unchanged",
        next_step=f"export {variable}=/path/to/{name}",
    )

"""The token-centric view (paper 3.1.1, 7.2, Figure 1): single visual tokens, and what the model says they show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from rcb_lmms.analysis.images import Shown
from rcb_lmms.codebook.divergence import top1_probability
from rcb_lmms.codebook.probe import Probe
from rcb_lmms.codebook.settings import TOP_K_STORED, BuildSettings
from rcb_lmms.engine.generation import generate
from rcb_lmms.engine.layer_attention import last_token_attention
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family

# Figure 1's layers, counted from 1 (7.4 calls the first of them l=1), of a decoder of 32.
LAYERS, DEPTH = (2, 16, 30), 32
WORD_TOKENS = 8


@dataclass(frozen=True)
class Reading:
    """What the model says about one visual token, and what others would judge it by; one row of Figure 1's table.

    Attributes:
        prompt: number of the prompt.
        token: raster index; `row` and `column` say it too.
        word: of the greedy answer, the first one that is no article.
        probability: of the first content token, among the 50 likeliest (Eq. 6).
        logit: its confidence score.
        cls_similarity: cosine to CLS; `None` for a tower without CLS.
        attention: decoder layer, counted from 1 -> text-to-image attention to it in the whole view (Eq. 4).
    """

    prompt: int
    token: int
    row: int
    column: int
    word: str
    probability: float
    logit: float
    cls_similarity: float | None
    attention: dict[int, float] = field(default_factory=dict)

    def cells(self) -> dict[str, object]:
        """A flat row for a table."""
        flat = dataclasses.asdict(self)
        return flat | {f"attention_layer_{layer}": value for layer, value in flat.pop("attention").items()}


def decoder_layers(depth: int, wanted: Sequence[int] = ()) -> list[int]:
    """The layers whose attention is read: those wanted, else Figure 1's or the same share of another depth.

    Raises:
        UserError: a layer that the decoder does not have.
    """
    if wanted and not all(1 <= layer <= depth for layer in wanted):
        raise UserError(
            wanted=f"attention in the layers {', '.join(map(str, wanted))}",
            found=f"a decoder of {depth} layers",
            allowed=f"1 to {depth}",
            next_step="name other layers, or leave --layers out",
        )
    return sorted(set(wanted or (max(1, round(layer * depth / DEPTH)) for layer in LAYERS)))


def text_to_image_attention(family: Family, shown: Shown, prompt: str, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Layer -> `(n,)` attention of the position that decodes the answer's first token to each token of the view."""
    whole = family.embed(family.prompt(prompt), [family.pack_base(shown.view.features)])
    ((start, stop),) = whole.spans
    rows = last_token_attention(family.model, whole.embeds, layers)
    return {layer: row[start:stop].numpy() for layer, row in rows.items()}


def read_tokens(
    session: Session,
    shown: Shown,
    tokens: Sequence[int],
    settings: BuildSettings,
    layers: Sequence[int],
    number: int = 0,
) -> tuple[list[Reading], dict[int, np.ndarray]]:
    """Show the model single tokens of an image and read what it says about each.

    Args:
        session: its method is not used; its `batch_size` is.
        shown: the image.
        tokens: raster indices.
        settings: prompt, article rule and copies of a token, as in building a codebook.
        layers: see `decoder_layers`.
        number: of the prompt, for the rows.

    Returns:
        one reading per token, and the attention `(n,)` of each layer to the whole view.
    """
    family, view = session.family, shown.view
    repeats = settings.single_repeats or family.single_repeats
    attention = text_to_image_attention(family, shown, settings.prompt, layers)
    readings, probe = [], Probe(family, view.features, settings, session.batch_size)
    for begin in tqdm(range(0, len(tokens), session.batch_size), "tokens", unit="batch"):
        part = tokens[begin : begin + session.batch_size]
        sequences = [view.features[token].expand(repeats, -1) for token in part]
        logits, _ = probe.logits(sequences)
        words = _words(family, sequences, settings)
        best, probability = logits.amax(-1).tolist(), top1_probability(logits, TOP_K_STORED).tolist()
        for index, token in enumerate(part):
            similarity = None if shown.cls_similarity is None else float(shown.cls_similarity[token])
            place = divmod(token, view.grid[1])
            own = {layer: float(values[token]) for layer, values in attention.items()}
            readings.append(
                Reading(number, token, *place, words[index], probability[index], best[index], similarity, own)
            )
    return readings, attention


def _words(family: Family, sequences: Sequence, settings: BuildSettings) -> list[str]:
    ids = family.prompt(settings.prompt)
    prompts = [family.embed(ids, [family.pack_base(sequence)]) for sequence in sequences]
    texts = generate(family, prompts, {"max_new_tokens": WORD_TOKENS, "do_sample": False}).texts
    # The same rule that chose the logits: the paper's three articles, the released code's "A", or none.
    articles = {"official": ("A",), "paper": ("The", "the", "A", "a", "An", "an"), "keep": ()}[settings.article]
    found = []
    for text in texts:
        words = text.split()
        words = words[1:] if len(words) > 1 and words[0] in articles else words
        found.append(words[0].strip(".,;:!?\"'") if words else "")
    return found


def token_maps(shown: Shown, readings: Sequence[Reading], attention: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Title -> `(n,)` values for overlays; a token that was not shown has no probability."""
    probability = np.full(len(shown.view), np.nan)
    probability[[row.token for row in readings]] = [row.probability for row in readings]
    maps = {"top-1 probability": probability}
    if shown.cls_similarity is not None:
        maps["similarity to CLS"] = shown.cls_similarity
    return maps | {f"attention in layer {layer}": values for layer, values in attention.items()}

"""The experiments on one image: single visual tokens, 3 x 3 windows and the whole view, intact and ablated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rcb_lmms.codebook.settings import TOP_K_STORED, BuildSettings
from rcb_lmms.engine.prefill import Prefill

if TYPE_CHECKING:
    from tqdm import tqdm

    from rcb_lmms.families.base import Family
    from rcb_lmms.pruners.base import VisualTokens

# The released list for 576 tokens: 24 leading ranks, then blocks of 8 that begin at these (1-based).
BLOCK_STARTS, LISTED_TOKENS = (37, 73, 145, 217, 289, 361, 433, 505, 569), 576
WORD_A = ("\u2581A", "\u0120A")


class ImageStatistics(NamedTuple):
    """What the experiments on one image found; `p` probed patches, `t` stored logits (50), each sorted descending.

    The ids are those of the intact run, so every divergence over `t` ids or fewer can be taken later.

    Attributes:
        index: `(p,)` positions of the probed patches in raster order.
        features: `(p, d)` their projector outputs, or `(n, d)` of the whole view with `cluster_input=all`.
        single_ids: `(p, t)` of the single-token run; the first column is the answer's first content token.
        single: `(p, t)` its logits.
        region_ids: `(p, t)` of the intact window.
        region: `(p, t)` its logits.
        region_ablated: `(p, t)` logits without the patch, at the same ids.
        whole_ids: `(1, t)` of the intact view.
        whole: `(1, t)` its logits.
        whole_ablated: `(p, t)` logits without the patch's window.
    """

    index: Tensor
    features: Tensor
    single_ids: Tensor
    single: Tensor
    region_ids: Tensor
    region: Tensor
    region_ablated: Tensor
    whole_ids: Tensor
    whole: Tensor
    whole_ablated: Tensor

    def to_bytes(self) -> bytes:
        """As a `.safetensors`."""
        from safetensors.torch import save

        return save({name: tensor.contiguous() for name, tensor in self._asdict().items()})

    @classmethod
    def read(cls, path: Path) -> ImageStatistics:
        """Read what `to_bytes` made."""
        from safetensors.torch import load_file

        return cls(**load_file(path))


def window(index: int, height: int, width: int) -> list[int]:
    """Raster indices of the 3 x 3 window around a patch, shifted inwards at the border, so always nine.

    Grids with fewer than three rows or columns give the part of the window that exists.
    """
    top = max(0, min(index // width - 1, height - 3))
    left = max(0, min(index % width - 1, width - 3))
    rows, columns = range(top, min(top + 3, height)), range(left, min(left + 3, width))
    return [row * width + column for row in rows for column in columns]


def probed_ranks(n: int, count: int = 96) -> list[int]:
    """Ranks, by falling similarity to the CLS token and counted from 1, of the patches that are probed among `n`.

    For 576 and 96 the released list: ranks 1-24, then blocks of 8 from 37, 73, 145, ... 505 and 569. Otherwise
    a quarter of `count` (and what does not divide) leads, the rest is nine equal blocks whose starts scale with
    `n`. A block that would overlap the one before begins where that ends; the last one holds the last ranks.
    """
    count = min(count, n)
    block = count // 12
    ranks = list(range(1, 1 + count - len(BLOCK_STARTS) * block))
    for number, listed in enumerate(BLOCK_STARTS):
        latest = 1 + n - (len(BLOCK_STARTS) - number) * block
        start = min(max(1 + round((listed - 1) * n / LISTED_TOKENS), ranks[-1] + 1), latest)
        start = latest if number == len(BLOCK_STARTS) - 1 else start
        ranks += range(start, start + block)
    return ranks


def uniform_grid(height: int, width: int, count: int = 96) -> list[int]:
    """Raster indices of an even square grid of about `count` patches (10 x 10 for 96), for towers without CLS."""
    side = round(count**0.5)
    rows = sorted({int((i + 0.5) * height / side) for i in range(side)})
    columns = sorted({int((i + 0.5) * width / side) for i in range(side)})
    return [row * width + column for row in rows for column in columns]


def probed_patches(view: VisualTokens, count: int) -> list[int]:
    """Raster indices of the patches to probe: by `probed_ranks`, or `uniform_grid` without a CLS token.

    Differs from the released code, which took every patch whose float16 similarity *equals* that of a listed rank
    and so stored some tokens twice: ties go to the lower index here, one patch per rank.
    """
    if view.cls_similarity is None:
        return uniform_grid(*view.grid, count)
    order = view.cls_similarity.float().argsort(descending=True, stable=True).tolist()
    return [order[rank - 1] for rank in probed_ranks(len(view), count)]


def measure(
    family: Family,
    view: VisualTokens,
    settings: BuildSettings,
    batch_size: int,
    patches: Sequence[int] | None = None,
    bar: tqdm | None = None,
) -> ImageStatistics:
    """Run all experiments on a base view: one prompt per probed patch and kind, one for the intact view.

    The probed patches are `patches`, raster indices, or by default those of `probed_patches`. A `bar` counts prompts.

    Source: paper 3.1, 7.2, 7.3. Every input is packed as the family packs an image, newline included. A patch is
    ablated by putting the pad embedding into its slot, behind the projector. Patches at the border have the window of
    their neighbour, which is asked about once.
    """
    tokens, (height, width) = view.features, view.grid
    pad = family.pad_embedding.to(tokens)
    index = probed_patches(view, settings.probes) if patches is None else list(patches)
    repeats = settings.single_repeats or family.single_repeats
    around = [tuple(window(patch, height, width)) for patch in index]
    windows = list(dict.fromkeys(around))
    own = [windows.index(slots) for slots in around]
    probe = Probe(family, tokens, settings, batch_size, bar)
    single, _ = probe.logits([tokens[patch].expand(repeats, -1) for patch in index])
    region, skips = probe.logits([tokens[list(slots)] for slots in windows])
    without = [_ablate(tokens[list(slots)], [slots.index(p)], pad) for p, slots in zip(index, around, strict=True)]
    region_ablated, _ = probe.logits(without, skip=[skips[number] for number in own])
    begins = [slots[0] for slots in windows]
    without = [
        _ablate(tokens[begin:], [slot - begin for slot in slots], pad)
        for begin, slots in zip(begins, windows, strict=True)
    ]
    whole_ablated, _ = probe.logits(without, begins, skip=[probe.skips] * len(windows))
    (single_ids, single), (region_ids, region) = _top(single), _top(region[own])
    whole_ids, whole = _top(probe.whole[None])
    stored = tokens if settings.cluster_input == "all" else tokens[index]
    # bfloat16 has no place in a codebook file, and casting it to float16 could overflow.
    stored = stored if stored.dtype == torch.float16 else stored.float()
    found = {
        "features": stored.detach(),
        "single_ids": single_ids,
        "single": single,
        "region_ids": region_ids,
        "region": region,
        "region_ablated": region_ablated.gather(-1, region_ids),
        "whole_ids": whole_ids,
        "whole": whole,
        "whole_ablated": whole_ablated[own].gather(-1, whole_ids.expand(len(index), -1)),
    }
    return ImageStatistics(index=torch.tensor(index), **{name: tensor.cpu() for name, tensor in found.items()})


class Probe:
    """What the model answers about parts of a view: the logits of an answer's first content token.

    If the greedy first token is an article, it is appended and the next position's logits are taken: for each input on
    its own, so that an intact and an ablated run may differ in it (released code), or by what `skip` names (`strict`).
    The intact view is computed once; what another input has in common with its beginning, the template at least, is
    not computed again.

    Args:
        family: the loaded model.
        tokens: `(n, d)` of the view.
        settings: prompt and article rule.
        batch_size: prompts per forward pass.
        bar: counts prompts.

    Attributes:
        whole: `(v,)` float32 of the intact view.
        skips: whether its answer began with an article.
    """

    def __init__(
        self, family: Family, tokens: Tensor, settings: BuildSettings, batch_size: int, bar: tqdm | None = None
    ):
        self.family, self.settings, self.batch_size, self.bar = family, settings, batch_size, bar
        prompt = family.embed(family.prompt(settings.prompt), [family.pack_base(tokens)])
        self._start = prompt.spans[0][0]
        self._behind = prompt.embeds[self._start + len(tokens) :]  # a newline too, where the family has one
        self._intact = Prefill(family, prompt.embeds)
        self.whole, self.skips = self._intact.logits, False
        if self._is_article(int(self.whole.argmax())):
            logits, (self.skips,) = self.logits([tokens[-1:]], [len(tokens) - 1])
            self.whole = logits[0]

    def logits(
        self, sequences: Sequence[Tensor], begins: Sequence[int] | None = None, skip: Sequence[bool] | None = None
    ) -> tuple[Tensor, list[bool]]:
        """`(b, v)` float32 logits for visual sequences `(k, d)`, and which of them skipped an article.

        Args:
            sequences: stand in the place of the view's tokens.
            begins: how many of the view's first tokens stand before each of them; none by default.
            skip: under `strict`, which of them skip their first token.
        """
        skipped = [False] * len(sequences)

        def more(rows: list[int], tokens: list[int]) -> list[bool]:
            if self.bar is not None:
                self.bar.update(len(rows))
            for row, token in zip(rows, tokens, strict=True):
                skipped[row] = skip[row] if skip is not None and self.settings.strict else self._is_article(token)
            return [skipped[row] for row in rows]

        shared = [self._start + begin for begin in begins or [0] * len(sequences)]
        rests = [torch.cat([sequence, self._behind]) for sequence in sequences]
        return self._intact.continued(shared, rests, self.batch_size, more), skipped

    def _is_article(self, token: int) -> bool:
        return is_article(self.family.tokenizer, token, self.settings.article)


def is_article(tokenizer: Any, token: int, rule: str) -> bool:
    """Whether a first token is skipped: `official` the token of a word "A", `paper` the, a, an, `keep` none.

    The released code compares the token itself (SentencePiece's mark of a word and "A"; byte-level vocabularies have
    another mark), so that a bare "A" stays.
    """
    if rule == "official":
        return tokenizer.convert_ids_to_tokens(token) in WORD_A
    return rule == "paper" and tokenizer.decode([token]).strip().lower() in ("the", "a", "an")


def _top(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = logits.topk(min(TOP_K_STORED, logits.shape[-1]))
    return ids, values


def _ablate(tokens: Tensor, slots: list[int], pad: Tensor) -> Tensor:
    ablated = tokens.clone()
    ablated[slots] = pad
    return ablated

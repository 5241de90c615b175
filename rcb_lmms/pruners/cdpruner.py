"""CDPruner: tokens that differ from each other and matter to the question, by a determinantal point process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.pruners.attention import cosines
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget, check_choice

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = {"clip": ("patch_embeddings", "text_embeddings"), "embedding": ("features", "question_embeddings")}
# What the released evaluation takes from the end of a prompt before CLIP reads it.
INSTRUCTIONS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
)
CLIP = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Greedy maximum of the determinant of likeness, each token weighted by its relevance to the question.

    Likeness is the cosine behind the projector; relevance is the cosine of patches and question in CLIP's space, its
    sign turned (CLIP's patches resemble a text less where the object is), brought to 0 to 1 over all views of an image.

    Released code:
        It follows Theia-4869/CDPruner at 9541616, which divides by zero or takes the root of a number below it where
        tokens are equally relevant or span all others, and then keeps fewer tokens than asked for.

    Ours:
        Tokens that are all equally relevant weigh 1 each, and when the tokens that stay span all others, the rest is
        filled up by what determinant is left.

    Attributes:
        relevance: `clip` as released; `embedding` (OpenVINO GenAI's way for models without CLIP's text) is the cosine
            of projected tokens and the language model's embeddings of the question, mean over its words, its sign
            kept, brought to 0 to 1 in every view.
        clip: repository or folder of the CLIP model with the text tower; its vision tower is the model's own.
    """

    relevance: str = "clip"
    clip: str = CLIP

    name: ClassVar[str] = "cdpruner"
    label: ClassVar[str] = "CDPruner"
    summary: ClassVar[str] = "diverse and relevant to the question"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2025 (arXiv 2506.10967)"
    needs: ClassVar[frozenset[str]] = frozenset({"patch_embeddings", "text_embeddings"})
    elsewhere: ClassVar[Mapping[str, Any]] = {"relevance": "embedding"}
    sees_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets)
        check_choice("cdpruner's relevance", self.relevance, tuple(FIELDS))
        object.__setattr__(self, "needs", frozenset(FIELDS[self.relevance]) - {"features"})

    def wording(self, question: str) -> str:
        """The question without the instruction at its end."""
        for instruction in INSTRUCTIONS:
            question = question.removesuffix(instruction) or question
        return question

    def among(self, views: Sequence[VisualTokens]) -> CDPruner:
        """The same method with the least and the largest relevance of all these views."""
        if self.relevance != "clip" or len(views) < 2:
            return self
        every = [self.likeness(view) for view in views]
        told = replace(self)
        # No field, since it is no hyper-parameter.
        limits = (min(float(own.min()) for own in every), max(float(own.max()) for own in every))
        object.__setattr__(told, "_limits", limits)
        return told

    def likeness(self, view: VisualTokens) -> Tensor:
        """Relevance of every token before it is brought to 0 to 1, `(n,)` float32."""
        from torch.nn.functional import normalize

        tokens, words = (normalize(getattr(view, field).float(), dim=1) for field in FIELDS[self.relevance])
        likeness = (tokens @ words.T).mean(1)
        return -likeness if self.relevance == "clip" else likeness

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """A token's score is what it added to the determinant or, if it did not stay, would add at the end."""
        import torch

        relevance = self.likeness(view)
        low, high = getattr(self, "_limits", None) or (float(relevance.min()), float(relevance.max()))
        relevance = (relevance - low + 1e-6) / (high - low) if high > low else torch.ones_like(relevance)
        kernel = relevance[:, None] * cosines(view.features) * relevance
        kept, scores = most_diverse(kernel, self.count(view))
        return Selection(kept.sort().values, scores)

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """Cosines of tokens to the question and to each other, and the rows of the Cholesky factor."""
        n, words = len(view), getattr(view, FIELDS[self.relevance][1])
        return 2 * n * (words.numel() + n * view.features.shape[1]) + n * kept * (kept - 1)


def most_diverse(kernel: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices `(count,)` of a greedy maximum of the determinant of `kernel (n, n)`, and every token's gain `(n,)`.

    Source: Chen et al., NeurIPS 2018, algorithm 1, which updates a Cholesky factor row by row.
    """
    import torch

    gains = kernel.diagonal().clone()
    scores, rows = gains.clone(), kernel.new_zeros(count, len(kernel))
    kept = torch.empty(count, dtype=torch.long, device=kernel.device)
    for step in range(count):
        best = gains.argmax()
        if gains[best] <= 1e-12:  # nothing is left that those before do not span
            kept[step:] = gains.argsort(descending=True, stable=True)[: count - step]
            break
        row = (kernel[best] - rows[:step, best] @ rows[:step]) / gains[best].sqrt()
        rows[step], kept[step] = row, best
        left = gains - row**2
        scores = torch.where(gains.isinf(), scores, left)
        scores[best] = gains[best]
        gains = left
        gains[best] = -torch.inf
    return kept, scores

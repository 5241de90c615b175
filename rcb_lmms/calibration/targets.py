"""What a mean budget is to equal: a number, a share, or what another method keeps; one grammar for every command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rcb_lmms.budget import Budget, layer_average, mean_tokens, rank_for_layer_average
from rcb_lmms.errors import UserError
from rcb_lmms.pruners import PRUNERS, make_pruner

if TYPE_CHECKING:
    from rcb_lmms.calibration.scores import Scores
    from rcb_lmms.pruners.base import Pruner

CONVENTIONS = ("tokens", "layer_average")


@dataclass(frozen=True)
class Target:
    """A mean number of retained tokens per view (or image) to calibrate for.

    Attributes:
        text: as written; names it in records and files.
        tokens: the number, if it is known before any image is seen.
        ratio: the share of the native tokens instead.
        baseline: registry name of the method to be matched.
        layer: the baseline's, if it prunes inside the decoder; layers before it see every token.
        convention: what `tokens` counts: those behind the baseline's layer, or its average over the layers.
    """

    text: str
    tokens: float | None = None
    ratio: float | None = None
    baseline: str | None = None
    layer: int | None = None
    convention: str = "tokens"

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Target:
        """`64`, `ratio=0.25`, `prumerge`, `random:64`, `fastv:rank=144`, `fastv:layer_average=171:layer=3`.

        Raises:
            UserError: no such method, or one without its number.
        """
        text = str(text).strip()
        name, *parts = text.split(":")
        if name in PRUNERS:
            return cls._matching(
                text, name, dict(part.split("=", 1) if "=" in part else ("rank", part) for part in parts)
            )
        if parts:
            raise _unknown(text)
        if name.startswith("ratio="):
            return cls.share(_number(text, name.removeprefix("ratio=")))
        return cls.number(_number(text, name))

    @classmethod
    def number(cls, tokens: float) -> Target:
        """A mean of so many tokens."""
        return cls(f"{tokens:g}", tokens=tokens)

    @classmethod
    def share(cls, ratio: float) -> Target:
        """A mean of this share of the native tokens.

        Raises:
            UserError: no share.
        """
        Budget.ratio(ratio)
        return cls(f"ratio={ratio:g}", ratio=ratio)

    @classmethod
    def _matching(cls, text: str, name: str, given: dict[str, str]) -> Target:
        method = PRUNERS[name]
        allowed = {"rank", "layer_average", "layer"} if method.layer else {"rank"}
        if "tokens" not in method.budgets or set(given) - allowed or {"rank", "layer_average"} <= set(given):
            raise _unknown(text)
        layer = int(_number(text, given.pop("layer", str(method.layer)))) if method.layer else None
        if not given:
            if "adaptive" not in method.budgets:  # a method that decides by itself how many stay is measured
                raise _unknown(text)
            return cls(text, baseline=name)
        convention = "layer_average" if "layer_average" in given else "tokens"
        tokens = _number(text, next(iter(given.values())))
        if convention == "tokens" and not method.fits_mean and "adaptive" not in method.budgets:
            Budget.tokens(tokens)  # refuses a count that is no whole number
        return cls(text, tokens, baseline=name, layer=layer, convention=convention)

    @property
    def argument(self) -> dict[str, str]:
        """The target as an argument of model_args."""
        if self.baseline is not None:
            return {"match": self.text}
        return {"ratio": f"{self.ratio!r}"} if self.ratio is not None else {"keep": f"{self.tokens!r}"}

    @property
    def measured(self) -> Pruner | None:
        """The baseline whose tokens are to be counted image by image; `None` where their number is known."""
        return make_pruner(self.baseline, budget=Budget.adaptive()) if self.baseline and self.tokens is None else None

    @property
    def count(self) -> float | None:
        """The mean, where it depends on no image."""
        return self.tokens if self.convention == "tokens" else None

    def mean(self, scores: Scores, layers: int) -> float:
        """The mean over these images, by the target's own convention.

        Args:
            scores: of all images.
            layers: of the decoder.

        Raises:
            UserError: a layer average that the full layers alone exceed.
        """
        return self.by_convention(scores, layers)[self.convention]

    def by_convention(self, scores: Scores, layers: int) -> dict[str, float]:
        """Mean tokens per view (or image) by both conventions: after pruning, and averaged over the layers.

        Of a method with several steps, the first is the budget as it is called: SparseVLM's 64 are 82.3 per layer.

        Raises:
            UserError: a layer average that the full layers alone exceed.
        """
        native = scores.native
        if self.ratio is not None:
            tokens = self.ratio * native
        else:
            tokens = scores.baseline(self.text) if self.tokens is None else self.tokens
        if self.layer is None and self.baseline and PRUNERS[self.baseline].stage == "layers":
            whole = round(native)
            steps = make_pruner(self.baseline, budget=Budget.tokens(tokens)).schedule(whole, layers)
            counts, behind = [step.keep for step in steps], [step.layer for step in steps]
            return {"tokens": tokens, "layer_average": mean_tokens(counts, behind, whole, layers)}
        if self.layer is None:
            return dict.fromkeys(CONVENTIONS, tokens)
        average = tokens if self.convention != "tokens" else layer_average(tokens, native, self.layer, layers)
        rank = rank_for_layer_average(average, native, self.layer, layers)
        return {"tokens": float(rank), "layer_average": layer_average(rank, native, self.layer, layers)}


def parse_targets(match: str) -> list[Target]:
    """Targets separated by commas, each once.

    Raises:
        UserError: one of them is unknown.
    """
    return [Target.parse(text) for text in dict.fromkeys(match.split(","))]


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise _unknown(text) from None
    if not 0 < number < math.inf:
        raise _unknown(text)
    return number


def _unknown(text: str) -> UserError:
    alone = [name for name, method in PRUNERS.items() if "adaptive" in method.budgets]
    inside = [name for name, method in PRUNERS.items() if method.layer]
    return UserError(
        wanted=f"match={text}",
        found="no such target, or a method without its number of tokens",
        allowed=f"a number, ratio=SHARE, {', '.join(alone)}, METHOD:TOKENS; {', '.join(inside)} also with "
        ":layer_average=TOKENS and :layer=N",
        next_step="match=prumerge, match=random:64 or match=fastv:rank=144",
    )

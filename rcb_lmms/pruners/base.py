"""The contract of a method: the facts it states about itself, and the checks on both.

Nothing here, nor in any pruner, imports a model.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from rcb_lmms.budget import Budget
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.pruners.tokens import LayerChoice, LayerStep, LayerView, PromptSizes, Selection, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

STAGES = ("pixels", "view", "layers")
KINDS = ("tokens", "ratio", "threshold", "adaptive")


@dataclass(frozen=True)
class Pruner(ABC):
    """A method and its hyper-parameters; holds no state, so one instance serves every image.

    A method implements `select`, or only `score` if keeping the tokens of the best scores is all it does, and says what
    that costs in `choosing_flops` (a layer method in `step_flops`). Everybody else calls `choose`. The class
    attributes are facts that the other rooms read in place of the method's name; where a hyper-parameter decides, a
    subclass makes a property of one.

    Class attributes:
        name: registry key, CLI value and table row.
        label: the method's name as the papers write it.
        summary: how it decides, in a few words, for generated tables.
        paper: where it was published.
        stage: `pixels` acts before the vision tower (`grid` says how), `view` on the tokens of a view, `layers` inside
            the decoder.
        needs: optional fields of `VisualTokens` that it reads; an instance whose options read others sets its own.
        elsewhere: options with which a tower can serve it that lacks what the defaults need; they are ours.
        budgets: kinds of budget it takes; none for the unpruned model.
        fits_mean: whether `fit` tunes it until a mean over a benchmark is met.
        pools_views: whether scores of different views mean the same, so that views of one image may compete.
        joins_views: whether it sees all views of an image or video at once, whatever the budget is spent on.
        sees_question: whether the choice depends on the question; if not, an image's kept tokens serve all of them.
        rewrites: whether `Selection.features` holds merged tokens.
        ascending: whether kept tokens come in raster order.
        reprunes: of a layer method, whether every decoded token prunes the prompt anew.
        layer: of a layer method of one step, how many layers see every token.
        mode: of a layer method, `drop` or `mask`; see `rcb_lmms.engine.layer_pruning.prune_in_layers`.
        positions: of a layer method, `original` or `contiguous`; see there.
        least: tokens that it leaves of a view at least.
        official_options: by family, options of the released code that differ from the class's defaults.
    """

    budget: Budget | None = None

    name: ClassVar[str]
    label: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stage: ClassVar[str] = "view"
    needs: ClassVar[frozenset[str]] = frozenset()
    elsewhere: ClassVar[Mapping[str, Any]] = {}
    budgets: ClassVar[tuple[str, ...]] = ("tokens", "ratio")
    fits_mean: ClassVar[bool] = False
    pools_views: ClassVar[bool] = True
    joins_views: ClassVar[bool] = False
    sees_question: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    ascending: ClassVar[bool] = True
    reprunes: ClassVar[bool] = False
    positions: ClassVar[str] = "original"
    least: ClassVar[int] = 1
    official_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    # No annotations: FastV makes them fields, whose places among its fields an annotation here would take.
    mode = "drop"
    layer = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "choose" in vars(cls):
            raise _contradiction(cls, "a `choose` of its own, which would escape the checks of the contract")

    @property
    def keeps_whole_views(self) -> bool:
        """Whether every visual token of a view reaches the language model."""
        return not self.budgets or self.stage == "layers"

    @property
    def selects_in_layer(self) -> bool:
        """Whether a layer method chooses by `select_in_layer` of its own."""
        return type(self).select_in_layer is not Pruner.select_in_layer

    def among(self, views: Sequence[VisualTokens]) -> Pruner:
        """The same method, told of all the views of an image where one view's choice depends on the others."""
        return self

    def wording(self, question: str) -> str:
        """The part of a question that the method reads, from which its text fields are made."""
        return question

    def score(self, view: VisualTokens, question: str | None = None) -> Tensor:
        """Score every token of a view, `(n,)` float32, higher = keep."""
        raise NotImplementedError

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Keep the tokens of the best scores, ties going to the lower index."""
        scores = self.score(view, question)
        kept = scores.argsort(descending=True, stable=True)[: self.count(view, scores)].sort().values
        return Selection(kept, scores)

    @final
    def choose(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Choose the tokens of a view that stay, and hold the method to its budget and to the contract.

        Raises:
            UserError: the view lacks what the method reads, or the question is missing.
            BudgetError: the budget cannot be met, or the method broke the contract: another count than the budget's,
                indices that repeat, lie outside or are out of order, scores that are not finite.
        """
        check_needs(view, self)
        if self.sees_question and self.stage == "view" and not question:
            raise UserError(
                wanted=f"{self.name} pruning",
                found="an image without a question",
                allowed="questions with text: this method reads it",
                next_step="use a method that does not see the question",
            )
        selection = self.select(view, question)
        if found := _broken(self, view, selection):
            raise BudgetError(
                wanted=f"a selection of {self.name} ({self.budget or 'no budget'}) from {len(view)} tokens",
                found=found,
                allowed="exactly the tokens that the budget asks for, each once, in range and in order, finite scores",
                next_step=f"mend `select` of {type(self).__name__}, or choose another budget",
            )
        return replace(selection, flops=self.choosing_flops(view, len(selection)))

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """FLOPs of choosing `kept` tokens of a view.

        Counted as `rcb_lmms.cost` counts: two for every multiply-add of a product, what `torch`'s counter sees, and one
        for every operation of sums that are written out element by element over the channels or over pairs of tokens.
        Norms, softmax and sorting are left out. What the fields in `needs` cost is the tower's matter, see
        `rcb_lmms.families.towers.fields_flops`.
        """
        return 0

    def count(self, view: VisualTokens, scores: Tensor | None = None) -> int:
        """Count the tokens that `choose` leaves of a view; methods whose scores decide it take `scores` if known."""
        return len(view) if not self.budgets or self.stage != "view" else self.budget.count(len(view))

    def schedule(self, native: int, layers: int, shares: int = 1, encoded: int = 0) -> list[LayerStep]:
        """What a method of the stage `layers` drops behind which layers, for one prompt.

        Args:
            native: visual tokens in the prompt.
            layers: of the decoder.
            shares: how often the prompt may spend a budget of tokens: once for each of its views, or of its images.
            encoded: visual tokens of its views, with those that the packing cut off.

        Raises:
            BudgetError: a budget above what the views have, or one that no schedule meets.
        """
        raise NotImplementedError

    def select_in_layer(self, view: LayerView, step: LayerStep) -> LayerChoice:
        """Choose what stays of one prompt at a step of the schedule.

        A method without it keeps what the last prompt token attends to most in the layer before, mean over heads.
        """
        raise NotImplementedError

    def step_flops(self, step: LayerStep, left: int, prompt: PromptSizes) -> int:
        """FLOPs of choosing at a step of the schedule, for one prompt, counted as in `choosing_flops`.

        Args:
            step: what it leaves.
            left: visual tokens that the step before left.
            prompt: before any step.
        """
        return prompt.shape.rows_flops(1, prompt.present(left))

    # A budget that is a mean over a benchmark is met by fitting the method to evidence from a vision-only pass.

    def evidence(self, view: VisualTokens) -> Tensor | None:
        """What `fit` needs of one view, `(e,)`; `None` if the method's counts are exact and nothing is fitted."""
        return None

    def retained(self, evidence: Any) -> int:
        """Tokens the fitted method retains of the view with this evidence, `min_keep` included."""
        return int(evidence[0])

    def fit(self, evidence: list[Any], weights: list[float], target: float) -> Pruner:
        """The same method with the parameter that makes the weighted mean of retained tokens per view `target`.

        Raises:
            UserError: no parameter reaches the target, or the method has none.
        """
        raise UserError(
            wanted=f"a mean budget of {target:g} tokens for {self.name}",
            found="a method whose count is exact for every view",
            allowed="methods with a threshold or a scale: rcb, prumerge",
            next_step=f"keep={target:g}",
        )


def _broken(pruner: Pruner, view: VisualTokens, selection: Selection) -> str | None:
    """What is wrong with a selection, or `None`."""
    kept, scores, features = selection.kept, selection.scores, selection.features
    if kept.ndim != 1 or kept.dtype.is_floating_point or scores.shape != (len(view),):
        return f"kept of shape {tuple(kept.shape)} and {kept.dtype}, scores of shape {tuple(scores.shape)}"
    if not scores.float().isfinite().all():
        return "scores that are not finite"
    if (due := pruner.count(view, scores)) != len(selection):
        return f"{len(selection)} of {len(view)} tokens, where the budget asks for {due}"
    if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(view):
        return f"indices from {int(kept.min())} to {int(kept.max())}"
    if len(kept) > 1 and int((kept.sort().values.diff() <= 0).sum()):
        return "indices that repeat"
    if pruner.ascending and len(kept) > 1 and int((kept.diff() <= 0).sum()):
        return "indices that are not ascending"
    if pruner.rewrites != (features is not None):
        return "merged tokens" if features is not None else "no merged tokens"
    if features is not None and (features.ndim != 2 or features.shape[1] != view.encoder_features.shape[1]):
        return f"merged tokens of shape {tuple(features.shape)}"
    return None


def check_needs(view: VisualTokens, pruner: Pruner) -> None:
    """Refuse a view that lacks what the pruner reads (a tower without CLS token, for one).

    Raises:
        UserError: naming the missing fields and the methods that do without.
    """
    missing = sorted(name for name in pruner.needs if getattr(view, name) is None)
    if missing:
        raise UserError(
            wanted=f"{pruner.name} pruning",
            found=f"visual tokens without {', '.join(missing)}",
            allowed="a vision tower that gives them: CLIP for all that speaks of a CLS token, tokens before pooling",
            next_step="use rcb, fastv, divprune or random with this model",
        )


def check_facts(cls: type[Pruner]) -> None:
    """Refuse a class whose facts contradict each other or lack the methods that they promise.

    Raises:
        UserError: naming the contradiction.
    """
    optional = {field.name for field in fields(VisualTokens)} - {"features", "grid", "key", "native", "frames"}
    own = {name for name in ("select", "score", "count", "evidence", "fit", "grid", "schedule")
           if getattr(cls, name, None) is not getattr(Pruner, name, None)}  # fmt: skip
    said = {name: value for name in ("fits_mean", "sees_question", "rewrites", "pools_views")
            if isinstance(value := getattr(cls, name), bool)}  # a property is an instance's matter  # fmt: skip
    problems = {
        "no name": not getattr(cls, "name", ""),
        f"the stage {cls.stage!r}": cls.stage not in STAGES,
        f"needs that no view has: {sorted(cls.needs - optional)}": not cls.needs <= optional,
        f"budgets of unknown kinds: {cls.budgets}": not set(cls.budgets) <= set(KINDS),
        "neither `select` nor `score`": not own & {"select", "score"},
        "a threshold or an adaptive budget, and no `count`": {"threshold", "adaptive"} & set(cls.budgets)
        and "count" not in own,
        "fits_mean without `fit` and `evidence`": said.get("fits_mean") and not {"fit", "evidence"} <= own,
        "fits_mean of a method that sees the question": said.get("fits_mean") and said.get("sees_question"),
        "views seen at once that do not compete": cls.joins_views and not said.get("pools_views"),
        "rewritten tokens of views that compete": said.get("rewrites") and said.get("pools_views"),
        "needs of a method that does not act on views": bool(cls.needs) and cls.stage != "view",
        "the stage pixels without `grid`": cls.stage == "pixels" and "grid" not in own,
        "the stage layers without `schedule`": cls.stage == "layers" and "schedule" not in own,
    }
    for found, wrong in problems.items():
        if wrong:
            raise _contradiction(cls, found)


def _contradiction(cls: type[Pruner], found: str) -> UserError:
    return UserError(
        wanted=f"the method {cls.__module__}.{cls.__qualname__}",
        found=found,
        allowed="facts that agree with each other and with what the class implements (rcb_lmms/pruners/base.py)",
        next_step="mend the class, or remove the package that registers it",
    )

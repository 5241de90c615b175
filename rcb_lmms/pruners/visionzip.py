"""VisionZip: dominant patches by CLS attention stay, and the others are merged into evenly spaced contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.errors import BudgetError
from rcb_lmms.pruners.attention import ByAttention, largest
from rcb_lmms.pruners.base import Selection, VisualTokens
from rcb_lmms.pruners.checks import check_whole

if TYPE_CHECKING:
    from torch import Tensor

# The paper's budgets are 54 + 10, 108 + 20 and 162 + 30 tokens.
CONTEXTUAL_SHARE = 10 / 64


@dataclass(frozen=True)
class VisionZip(ByAttention):
    """A budget of `T` tokens is the CLS token, `T - 1 - contextual` dominant patches and the contextual tokens.

    Dominant patches receive most CLS attention. A contextual token is a patch plus the mean of those assigned to it by
    the largest cosine of their keys. Merging happens before the projector.

    Released code:
        It is as released (dvlab-research/VisionZip at 3151f6d): the CLS token itself is fed to the language model,
        first; then the dominant patches in raster order; then the contextual tokens, the norm of which about doubles.
        Targets are evenly spaced among the patches that are not dominant. The released code feeds the dominant patches
        of all tiles as one raster.

    Ours:
        Tiles are packed view by view. Without a CLS token (`attention=received`) its place goes to one more patch.
        The frames of a video are refused where they are pooled (LLaVA-OneVision), for that happens behind the
        projector, and merging in front of it: what is merged has no grid to be pooled on; patches pooled and merged in
        front would be other tokens than the model's own, since the projector is not linear; and merging behind it is
        another method.

    Attributes:
        contextual: contextual tokens; 0 takes the share of the paper's budgets, 10 of 64, rounded, at least one.
    """

    contextual: int = 0

    name: ClassVar[str] = "visionzip"
    label: ClassVar[str] = "VisionZip"
    summary: ClassVar[str] = "by CLS attention, the rest merged by keys"
    paper: ClassVar[str] = "Yang et al., CVPR 2025 (arXiv 2412.04467)"
    needs: ClassVar[frozenset[str]] = frozenset({"head_attention", "mean_keys", "encoder_features", "cls_features"})
    rewrites: ClassVar[bool] = True
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("visionzip's contextual tokens", self.contextual, 0)

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Dominant patches and targets in `kept`; the merged tokens in `features (T, c)`, in the released order.

        Raises:
            BudgetError: a budget without room for a dominant and a contextual token.
        """
        import torch

        weights, count = self.weights(view), self.count(view)
        contextual = self._contextual(count)
        with_cls = self.attention == "cls"
        if contextual >= count:
            raise BudgetError(
                wanted=f"{count} tokens of visionzip, {contextual} of them contextual",
                found="no room for a dominant token" + (", the first of which is the CLS token" if with_cls else ""),
                allowed=f"{contextual + 1} to {len(view)} tokens, or fewer contextual ones",
                next_step=f"keep={contextual + 1}",
            )
        dominant = largest(weights, count - contextual - with_cls).sort().values
        targets, merged = _contextual(view, dominant, contextual)
        features = torch.cat([view.encoder_features[dominant], merged.to(view.encoder_features.dtype)])
        places = torch.cat([dominant, targets])
        kept = places.sort().values
        if with_cls:
            features = torch.cat([view.cls_features, features])
            places = torch.cat([places.new_zeros(1), places])
        return Selection(kept, weights, features=features, places=places)

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """Cosines of the keys of what is neither dominant nor a target to those of the targets."""
        targets = self._contextual(kept)
        return 2 * (len(view) - kept + (self.attention == "cls")) * targets * view.mean_keys.shape[1]

    def _contextual(self, count: int) -> int:
        return self.contextual or max(1, round(count * CONTEXTUAL_SHARE))


def _contextual(view: VisualTokens, dominant: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Targets `(count,)` among the patches that are not dominant, and what is merged into them, `(count, c)`."""
    import torch
    from torch.nn.functional import normalize

    free = torch.ones(len(view), dtype=torch.bool, device=dominant.device)
    free[dominant] = False
    rest = free.nonzero().squeeze(1)
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    is_target[torch.arange(count, device=rest.device) * max(1, len(rest) // count)] = True
    targets, others = rest[is_target], rest[~is_target]
    keys, features = normalize(view.mean_keys.float(), dim=1), view.encoder_features.float()
    nearest = (keys[others] @ keys[targets].T).argmax(dim=1)
    sums = torch.zeros(count, features.shape[1], device=rest.device).index_add_(0, nearest, features[others])
    sizes = torch.bincount(nearest, minlength=count).clamp(min=1)
    return targets, features[targets] + sums / sizes[:, None]

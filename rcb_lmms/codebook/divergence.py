"""How sure a prediction is, and how much it changes when visual tokens are ablated."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top1_probability(logits: Tensor, top_k: int = 50) -> Tensor:
    """Largest probability `(...)` of a softmax over only the `top_k` largest of `logits (..., v)`.

    Paper Eq. 6 takes the softmax over the head vocabulary too; a vocabulary smaller than `top_k` is used whole.
    """
    kept = logits.double().topk(min(top_k, logits.shape[-1])).values
    return kept.softmax(-1).amax(-1)


def divergence(full_logits: Tensor, ablated_logits: Tensor, top_k: int, preset: str = "official") -> Tensor:
    """Jensen-Shannon divergence `(...)` between predictions of logits `(..., v)`, in nats.

    Both are restricted to the ids of the `top_k` largest *full* logits and normalised there; Q is their mean.

    Args:
        full_logits: with all visual tokens.
        ablated_logits: with some replaced.
        top_k: 20 in the paper, 10 in the released code; at most `v`.
        preset: `paper` (and `paper_literal`): half of KL(M||Q) + KL(N||Q), Eq. 7, at most ln 2. `official`: the
            released code's half of KL(Q||M) + KL(Q||N), *averaged* over the `top_k` ids, hence about `1 / top_k`
            of the paper's value for small differences; thresholds belong to one form and do not carry over.
    """
    top_k = min(top_k, full_logits.shape[-1])
    full, ids = full_logits.double().topk(top_k)
    m = full.log_softmax(-1)
    n = ablated_logits.double().gather(-1, ids).log_softmax(-1)
    q = torch.logaddexp(m, n) - math.log(2)
    if preset == "official":
        return (q.exp() * (2 * q - m - n)).sum(-1) / (2 * top_k)
    return (m.exp() * (m - q) + n.exp() * (n - q)).sum(-1) / 2

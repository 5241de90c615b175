"""Flash attention without a GPU: transformers' own unpadding and masks around kernels in float64."""

from __future__ import annotations

from unittest import mock

import torch

NAME = "unpadded_on_cpu"  # transformers looks for kernels of its own behind names with "flash"


def attend(q, k, v, scale, causal):
    """`(n, h, e)` from queries `(n, h, e)`, keys and values `(m, g, e)`; the last query sees the last key."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (part.double().repeat_interleave(groups, 1) for part in (k, v))
    logits = torch.einsum("nhe,mhe->hnm", q.double(), keys) * scale
    if causal:
        logits = logits.masked_fill(torch.ones(len(q), len(k)).triu(len(k) - len(q) + 1).bool(), -torch.inf)
    return torch.einsum("hnm,mhe->nhe", logits.softmax(-1).nan_to_num(), values).to(q)


def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return torch.stack([attend(*rows, softmax_scale, causal) for rows in zip(q, k, v, strict=True)])


def ragged(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    parts = [own.split(ends.diff().tolist()) for own, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
    return torch.cat([attend(*rows, softmax_scale, causal) for rows in zip(*parts, strict=True)])


def register():
    """Make `NAME` known to transformers, once."""
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    process = utils._lazy_define_process_function(ragged)
    kernels = (dense, ragged, None, utils._pad_input, utils._unpad_input), (process, dict)

    def forward(*args, **options):
        with mock.patch.object(utils, "lazy_import_flash_attention", return_value=kernels):
            return flash_attention_forward(*args, **options)

    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)

"""Weights that are whole: none missing, none surplus, none of another shape, all numbers finite.

transformers gives a weight that a checkpoint lacks random values and goes on; what such a model answers is scored.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.lab.checkpoint import is_lab

if TYPE_CHECKING:
    from torch import Tensor

# What `dtype` can be; `auto` depends on who asks.
DTYPES = ("auto", "float32", "float16", "bfloat16")
# Older checkpoints store what every model computes from its configuration.
COMPUTED = ("rotary_emb.inv_freq", "position_ids")
DECODER_LAYER = re.compile(r"language_model\.(model\.)?layers\.\d+\.")
TOWER_HEAD = re.compile(r"vision_tower\.(vision_model\.)?head\.")
TOWER_LAYER = re.compile(r"vision_tower\.(vision_model\.)?encoder\.layers\.(\d+)\.")


def check_report(report: dict[str, Any], config: Any, pretrained: str) -> None:
    """Refuse a model that is not exactly its checkpoint, by transformers' own report of loading it.

    Tied weights are no matter of rules: transformers does not report as missing what it ties.

    Args:
        report: of `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`.
        config: the model's configuration.
        pretrained: the checkpoint, for the error.

    Raises:
        UserError: weights are missing, surplus, or of another shape than the configuration says.
    """
    surplus = set(report["unexpected_keys"])
    surplus -= {name for name in surplus if name.endswith(COMPUTED)} | _cut_off(surplus, config.vision_config)
    problems = {
        "missing": sorted(name for name in report["missing_keys"] if not name.endswith(COMPUTED)),
        "surplus": sorted(surplus),
        "of another shape": [
            f"{name} (stored {tuple(stored)}, configured {tuple(configured)})"
            for name, stored, configured in sorted(report["mismatched_keys"])
        ],
        "unreadable": sorted(map(str, report["error_msgs"])),
    }
    if any(problems.values()):
        raise UserError(
            wanted=f"all weights of {pretrained}",
            found="; ".join(listed(names, what) for what, names in problems.items() if names),
            allowed="exactly the weights that its config.json describes",
            next_step="download the checkpoint again, or correct its config.json",
        )


def _cut_off(surplus: set[str], tower: Any) -> set[str]:
    """A whole SigLIP's head, and with it its last layer, if the configuration says that the model does without them."""
    if not tower.model_type.startswith("siglip") or getattr(tower, "vision_use_head", True):
        return set()
    head = {name for name in surplus if TOWER_HEAD.search(name)}
    last = {name for name in surplus if (m := TOWER_LAYER.search(name)) and int(m[2]) == tower.num_hidden_layers}
    return head | (last if head else set())


def check_finite(weights: Iterable[tuple[str, Tensor]], pretrained: str) -> None:
    """Refuse weights that are infinite or no numbers, as they are after the cast to the type they are used in.

    Raises:
        UserError: naming the weights.
    """
    broken = [name for name, weight in weights if not _finite(weight)]
    if broken:
        raise UserError(
            wanted=f"the weights of {pretrained}",
            found=listed(broken, "with values that are infinite or no number"),
            allowed="finite weights",
            next_step="download the checkpoint again, or dtype=bfloat16 or float32 if float16 is too narrow for it",
        )


def _finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or weight.is_meta:
        return True
    # In parts: of a whole embedding table, what isfinite makes in between would not fit beside a model.
    return all(bool(part.isfinite().all()) for part in weight.flatten().split(1 << 24))


def listed(names: list[str], what: str) -> str:
    """`3 missing: a, b, c`, at most five names."""
    return f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """Around code of others that reads a checkpoint: whatever it raises over the files becomes a `UserError`.

    A configuration of wrong types runs into anything, from validation to arithmetic. Memory errors stay as they are.
    """
    import torch

    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        next_step = f"hf download {name.partition('@')[0][:200]}, or pretrained=lab"
        if os.path.exists(name):
            next_step = "complete the folder"
        elif is_lab(name):
            next_step = "rcb doctor, which looks at what the package carries"
        raise UserError(
            wanted=f"load {name[:200]}",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            allowed="lab, a folder with config.json and weights, or a Hugging Face id (id@revision)",
            next_step=next_step,
        ) from error

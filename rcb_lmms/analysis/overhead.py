"""What RCB's scoring costs beside the vision tower and the prefill (paper 5.3): FLOPs, seconds and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.codebook import Codebook
from rcb_lmms.cost import codebook_flops, projector_flops, tower_flops
from rcb_lmms.families.images import Visual

if TYPE_CHECKING:
    import pandas as pd

    from rcb_lmms.engine.session import Session
    from rcb_lmms.families.base import Family
    from rcb_lmms.pruners.base import Pruner

QUESTION = "What does this image show?"


def overhead(session: Session, pruner: Pruner, images: Sequence[Any], repeats: int = 5) -> pd.DataFrame:
    """One row per stage for one base view: `gflops`, `ms` (median over images and repeats), `mb` at the peak.

    Memory is measured on a GPU only, above what the model and the codebook take; the row of scoring has the codebook's
    own megabytes in `codebook_mb`. The two rows of the prefill have the whole view and what the method keeps of it.

    Args:
        session: its method is not used.
        pruner: RCB with a budget.
        images: opened or files.
        repeats: of every stage; the first, which warms up, is not counted.
    """
    import pandas as pd

    family = session.family
    visuals = [family.open(image, "base") for image in images]
    timed: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for visual in visuals:
        for repeat in range(repeats + 1):
            for stage, (seconds, peak) in _stages(family, pruner, visual).items():
                if repeat:
                    timed.setdefault(stage, []).append(seconds)
                    peaks[stage] = max(peaks.get(stage, 0.0), peak)
    flops = _flops(session, pruner, visuals)
    rows = [
        {
            "stage": stage,
            "gflops": flops.get(stage, float("nan")) / 1e9,
            "ms": 1e3 * statistics.median(own),
            "mb": peaks[stage] / 1e6 if family.device.type == "cuda" else float("nan"),
        }
        for stage, own in timed.items()
    ]
    table = pd.DataFrame(rows)
    table.loc[table["stage"] == "RCB scoring", "codebook_mb"] = _megabytes(pruner.codebook)
    return table


def _stages(family: Family, pruner: Pruner, visual: Visual) -> dict[str, tuple[float, float]]:
    """Seconds and bytes of each stage, for one view."""
    import torch

    from rcb_lmms.engine.prefill import Prefill

    with torch.inference_mode():
        pixels, opened = _measured(family, lambda: family.pixels(visual)[:1])
        moved = pixels.to(family.device, family.dtype)
        tower = family.model.model.vision_tower
        hidden, seen = _measured(family, lambda: tower(moved, output_hidden_states=True).hidden_states)
        patches = hidden[family.model.config.vision_feature_layer][:, int(family.has_cls) :]
        _, projected = _measured(family, lambda: family.project(patches))
        ((view,),) = family.encode([visual])
        selection, scored = _measured(family, lambda: pruner.choose(view))
        ids = family.prompt(QUESTION)
        prefills = [
            _measured(family, lambda tokens=tokens: Prefill(family, _embedded(family, ids, tokens).embeds))[1]
            for tokens in (view.features, view.features[selection.kept.to(view.features.device)])
        ]
    names = ("preprocessing", "vision tower", "projector", "RCB scoring", "prefill, unpruned", "prefill, pruned")
    return dict(zip(names, (opened, seen, projected, scored, *prefills), strict=True))


def _embedded(family: Family, ids: Sequence[int], tokens: Any) -> Any:
    return family.embed(ids, [family.pack_base(tokens)])


def _measured(family: Family, run: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    import torch

    on_gpu = family.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    began = time.perf_counter()
    result = run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return result, (seconds, float(torch.cuda.max_memory_allocated() - before) if on_gpu else 0.0)


def _flops(session: Session, pruner: Pruner, visuals: Sequence[Visual]) -> dict[str, float]:
    family, shape = session.family, session.shape
    vision, n = family.model.config.vision_config, family.grid[0] * family.grid[1]
    kept = [len(pruner.choose(views[0])) for views in session.encoder.views(visuals)]
    rest = len(_embedded(family, family.prompt(QUESTION), session.encoder.views(visuals[:1])[0][0].features)) - n
    return {
        "vision tower": tower_flops(vision, n, family.has_cls),
        "projector": projector_flops(n, vision.hidden_size, family.width),
        "RCB scoring": codebook_flops(n, len(pruner.codebook), family.width),
        "prefill, unpruned": shape.prefill_flops(rest + n),
        "prefill, pruned": statistics.mean(shape.prefill_flops(rest + count) for count in kept),
    }


def _megabytes(codebook: Codebook) -> float:
    """The prototypes as they are scored: float32."""
    return codebook.prototypes.numel() * 4 / 1e6


def explain_overhead(table: pd.DataFrame) -> str:
    """How scoring compares with the tower and with what it saves."""
    own = table.set_index("stage")
    scoring, tower = own.loc["RCB scoring"], own.loc["vision tower"]
    whole, pruned = own.loc["prefill, unpruned"], own.loc["prefill, pruned"]
    return (
        f"Scoring takes {scoring['gflops']:.3g} GFLOPs and {scoring['ms']:.3g} ms a view, "
        f"{scoring['gflops'] / tower['gflops']:.2%} of the tower's FLOPs and {scoring['ms'] / tower['ms']:.1%} of its "
        f"time; the prefill takes {whole['gflops'] - pruned['gflops']:.3g} GFLOPs and {whole['ms'] - pruned['ms']:.3g} "
        f"ms less for it. The codebook takes {scoring['codebook_mb']:.3g} MB, where the paper says about 0.5 GB."
    )

"""lmms-eval entries. This module is imported whenever lmms-eval is, so it imports neither torch nor transformers."""

from __future__ import annotations

# Which methods each family offers; the README's table and the tests are made from it.
ENTRIES = {
    "llava": ("full", "rcb", "prumerge", "prumerge_plus", "fastv", "random"),
}


def class_name(family: str, method: str) -> str:
    """`llava_next`, `prumerge_plus` -> `LlavaNextPrumergePlus`."""
    return "".join(part.capitalize() for part in f"{family}_{method}".split("_"))


def manifests() -> list:
    """One `ModelManifest` per entry, for the entry-point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=f"{family}_{method}", chat_class_path=f"rcb_lmms.models.{family}.{class_name(family, method)}"
        )
        for family, methods in ENTRIES.items()
        for method in methods
    ]

"""lmms-eval entries. This module is imported whenever lmms-eval is, so it imports neither torch nor transformers."""

from __future__ import annotations

from rcb_lmms.families import FAMILIES
from rcb_lmms.pruners import PRUNERS

# The last part of an entry's name, and the method's in the registry.
METHODS = {"full" if name == "none" else name: name for name in PRUNERS}

# Which methods each family offers; what its vision tower cannot serve is refused with the alternatives named.
ENTRIES = {family: tuple(METHODS) for family in FAMILIES}


def entry_id(family: str, pruner: str) -> str:
    """Model id of a family with a pruner of the registry: `llava`, `none` -> `llava_full`."""
    return f"{family}_{'full' if pruner == 'none' else pruner}"


# Family and pruner by model id.
PARTS = {f"{family}_{method}": (family, pruner) for family in ENTRIES for method, pruner in METHODS.items()}


def class_name(family: str, method: str) -> str:
    """`llava_next`, `prumerge_plus` -> `LlavaNextPrumergePlus`."""
    return "".join(part.capitalize() for part in f"{family}_{method}".split("_"))


def manifests() -> list:
    """One `ModelManifest` per entry, for the entry-point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id=f"{family}_{method}", chat_class_path=f"{__name__}.entries.{class_name(family, method)}")
        for family, methods in ENTRIES.items()
        for method in methods
    ]

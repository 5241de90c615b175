"""The entries' classes, one for each family and method, made when they are asked for."""

from __future__ import annotations

from rcb_lmms.models import ENTRIES, METHODS, class_name
from rcb_lmms.models.base import PrunedModel

_PARTS = {class_name(family, method): (family, method) for family in ENTRIES for method in ENTRIES[family]}


def __getattr__(name: str) -> type[PrunedModel]:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family, method = _PARTS[name]
    doc = f"`{family}_{method}`: see `PrunedModel` and the pruner `{METHODS[method]}`."
    body = {"__module__": __name__, "__doc__": doc, "family_name": family, "method": METHODS[method]}
    # Kept as an attribute of the module, so that a class is made once and found again by pickle.
    made = globals()[name] = type(name, (PrunedModel,), body)
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})

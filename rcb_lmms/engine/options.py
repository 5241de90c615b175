"""How answers are generated: arguments of `generate`, checked, and the strings that an answer is cut at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from rcb_lmms.errors import UserError, checked

if TYPE_CHECKING:
    from rcb_lmms.pruners.base import Pruner

DEFAULT_NEW_TOKENS = 1024
# Whether questions about an image share what they have in common, see `rcb_lmms.engine.prefix`.
PREFIX_CACHE = ("auto", "on", "off")

Strings = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else tuple(value or ())),
    AfterValidator(lambda value: tuple(stop for stop in value if stop)),
]


class _Arguments(BaseModel):
    """A task's `generation_kwargs`; `None` means the default."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int | None = Field(None, ge=1, le=1 << 20)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    num_beams: int | None = Field(None, ge=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    until: Strings = ()
    image_aspect_ratio: Any = None  # other models' business, which stock tasks carry (seedbench)


@dataclass(frozen=True)
class Generation:
    """How a group of questions is answered: arguments of `generate`, and the strings an answer is cut at."""

    options: tuple[tuple[str, Any], ...]
    until: tuple[str, ...] = ()

    @classmethod
    def parse(cls, task: str, arguments: Mapping[str, Any]) -> Generation:
        """From a task's `generation_kwargs`, to which lmms-eval adds its own `until`.

        Raises:
            UserError: an argument that is not supported, or a value out of range.
        """
        given = checked(
            _Arguments,
            dict(arguments),
            wanted=f"generate for task {task} with {', '.join(f'{k}={v}' for k, v in arguments.items())}"[:300],
            allowed="max_new_tokens from 1, temperature from 0, top_p from 0 to 1, top_k from 0, num_beams from 1, "
            "repetition_penalty above 0, do_sample, until",
            next_step="correct the task's generation_kwargs, or --gen_kwargs",
        )
        options = given.model_dump(exclude_none=True, exclude={"until", "image_aspect_ratio"})
        options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
        # Explicit, because OneVision's generation_config would penalise repetition under greedy decoding too.
        options.setdefault("repetition_penalty", 1.0)
        options["do_sample"] = bool(options.get("do_sample")) and bool(options.get("temperature"))
        if not options["do_sample"]:
            # Greedy decoding ignores these, and transformers warns about values it would ignore.
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        return cls(tuple(sorted(options.items())), given.until)

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn at random."""
        return bool(dict(self.options)["do_sample"])

    @property
    def beams(self) -> bool:
        """Whether answers are searched for with several beams."""
        return dict(self.options).get("num_beams", 1) > 1

    def cut(self, text: str) -> str:
        """The answer up to the first of the `until` strings; blank lines in front of it are no answer."""
        text = text.strip()
        for stop in self.until:
            text = text.split(stop)[0]
        return text.strip()


def shares_prefix(pruner: Pruner, setting: str) -> bool:
    """Whether questions about an image share what they have in common: the method has seen none of them.

    Raises:
        UserError: an unknown setting, or `on` for a method that works with the question.
    """
    shared = not pruner.sees_question and pruner.stage != "layers"
    if setting not in PREFIX_CACHE or (setting == "on" and not shared):
        raise UserError(
            wanted=f"prefix_cache={setting} with {pruner.name}",
            found="no such setting" if setting not in PREFIX_CACHE else "a method that works with the question",
            allowed="auto, off; on, where a method chooses before the language model and without the question",
            next_step="prefix_cache=auto",
        )
    return shared and setting != "off"

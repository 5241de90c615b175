"""lmms-eval requests as questions: messages, media and generation arguments, loaded when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family, interleave
from rcb_lmms.families.images import Visual, whole_images_only
from rcb_lmms.families.video import placed

# Argument -> whether it reaches `generate`. The others are honoured elsewhere, or are other models' business that
# stock tasks carry (seedbench's image_aspect_ratio).
GENERATION = {
    "max_new_tokens": True,
    "do_sample": True,
    "temperature": True,
    "top_p": True,
    "top_k": True,
    "num_beams": True,
    "repetition_penalty": True,
    "until": False,
    "image_aspect_ratio": False,
}
DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Generation:
    """How a group of questions is answered: arguments of `generate`, and the strings an answer is cut at."""

    options: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]

    @classmethod
    def parse(cls, task: str, arguments: dict[str, Any]) -> Generation:
        """From a task's `generation_kwargs`, to which lmms-eval adds its own `until`.

        Raises:
            UserError: an argument that is not supported.
        """
        unknown = sorted(set(arguments) - set(GENERATION))
        if unknown:
            raise UserError(
                wanted=f"generate for task {task} with {', '.join(unknown)}",
                found="generation arguments that are not supported",
                allowed=", ".join(GENERATION),
                next_step="remove them from the task's generation_kwargs or from --gen_kwargs",
            )
        options = {name: value for name, value in arguments.items() if GENERATION[name] and value is not None}
        options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
        # Explicit, because OneVision's generation_config would penalise repetition under greedy decoding too.
        options.setdefault("repetition_penalty", 1.0)
        options["do_sample"] = bool(options.get("do_sample")) and float(options.get("temperature") or 0) > 0
        if not options["do_sample"]:
            # Greedy decoding ignores these, and transformers warns about values it would ignore.
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        until = arguments.get("until") or ()
        return cls(tuple(sorted(options.items())), (until,) if isinstance(until, str) else tuple(until))

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn at random."""
        return bool(dict(self.options)["do_sample"])

    def cut(self, text: str) -> str:
        """The answer up to the first of the `until` strings."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text.strip()


@dataclass(frozen=True)
class Question:
    """One request of lmms-eval; its document is read from the data set each time it is needed, never kept."""

    request: Any
    task: str
    generation: Generation
    dataset: Any

    @classmethod
    def of(cls, request: Any, task_dict: dict[str, Any]) -> Question:
        """From a chat request `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)`."""
        _, _, arguments, _, task, split = request.args
        return cls(request, task, Generation.parse(task, arguments), task_dict[task][split])

    @property
    def padding(self) -> bool:
        """Whether lmms-eval added this copy only to give every process the same number of requests."""
        return bool((self.request.metadata or {}).get("__padding_only__"))

    def load(self, family: Family) -> tuple[list[dict[str, Any]], list[Visual]]:
        """Chat messages with media marks in place, and the opened images and videos in their order.

        Raises:
            UserError: an image or a video cannot be read, or the document holds another medium.
        """
        _, doc_to_messages, _, doc_id, _, _ = self.request.args
        with whole_images_only():
            return load_turns(family, self.task, doc_to_messages(self.dataset[doc_id]))


def load_turns(family: Family, task: str, turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Visual]]:
    """lmms-eval's chat turns as `Question.load` gives them; files are checked inside `whole_images_only` alone."""
    media = [[(medium(item), item) for item in turn["content"] if item["type"] != "text"] for turn in turns]
    kinds = [kind for own in media for kind, _ in own]
    if other := sorted(set(kinds) - {"image", "video"}):
        raise UserError(
            wanted=f"answer task {task} with {family.name}",
            found=f"a document with {', '.join(other)}",
            allowed="images, videos and text",
            next_step="choose a task over images or videos",
        )
    role = family.several if kinds.count("image") > 1 else "image"
    messages, visuals = [], []
    for turn, own in zip(turns, media, strict=True):
        opened = [visual for kind, item in own for visual in _open(family, kind, item, role)]
        text = "\n".join(item["text"] for item in turn["content"] if item["type"] == "text")
        marks = ["video" if visual.role == "video" else "image" for visual in opened]
        messages.append({"role": turn["role"], "content": interleave(text, marks)})
        visuals += opened
    return messages, visuals


def medium(item: dict[str, Any]) -> str:
    """`image`, `video` or another type; lmms-eval, going by the ending, takes `.webm` videos for audio."""
    webm = item["type"] == "audio" and str(item["url"]).lower().endswith(".webm")
    return "video" if webm else item["type"]


def _open(family: Family, kind: str, item: dict[str, Any], role: str) -> list[Visual]:
    if kind == "image":
        return [family.open(item["url"], role)]
    return family.open_video(*placed(item))


def grouped(questions: list[Question]) -> list[tuple[tuple[str, Generation], list[int]]]:
    """Indices of questions that may share a batch, tasks together, in the order of appearance."""
    groups: dict[tuple[str, Generation], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault((question.task, question.generation), []).append(index)
    order = {task: position for position, task in enumerate(dict.fromkeys(question.task for question in questions))}
    return sorted(groups.items(), key=lambda group: order[group[0][0]])

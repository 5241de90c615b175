"""From chat messages to the embeddings of a prompt: where images stand in a text, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.families.packed import PackedImage, Prompt

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_PLACEHOLDER = "<image>"
# Stands inside a special token that somebody typed, and comes out again before the text is cut into tokens: a
# private-use character, which no question has.
BREAK = "\ue000"

Messages = list[dict[str, Any]]


def interleave(text: str, media: Sequence[str]) -> list[dict[str, str]]:
    """Chat content in which every `<image>` inside `text` stands for one of `media` (`image` or `video`), in order.

    Media without a placeholder come first (MuirBench and Mantis have such). Placed images stay inside the text:
    templates move image *items* to the front. A video is never placed inside. What stands for no image is a word that
    somebody typed: a placeholder behind those of all images and, beside one image, any that does not begin the text.
    """
    text = text.replace(BREAK, "")
    parts = text.split(IMAGE_PLACEHOLDER)
    images = media.count("image")
    if images == 1 and parts[0].strip():
        images = 0
    placed = min(len(parts) - 1, images)
    typed = _broken(IMAGE_PLACEHOLDER)
    text = IMAGE_PLACEHOLDER.join(parts[: placed + 1]) + "".join(typed + part for part in parts[placed + 1 :])
    inside = placed
    first = []
    for medium in reversed(media):
        if medium == "image" and inside:
            inside -= 1
        else:
            first.insert(0, {"type": medium})
    return [*first, {"type": "text", "text": text}]


def token_ids(tokenizer: Any, render: Callable[[Messages], str], messages: Messages) -> list[int]:
    """Token ids of a conversation in which special tokens that somebody typed (`<video>`, `<|im_end|>`) are words.

    Args:
        tokenizer: of the checkpoint.
        render: applies the chat template.
        messages: Hugging Face chat messages, whose texts hold the placeholders that `interleave` has left there.
    """
    typed = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {IMAGE_PLACEHOLDER}
    text = render([{**turn, "content": _as_typed(turn["content"], typed)} for turn in messages])
    bos = tokenizer.bos_token
    # Templates that write the BOS token themselves would get a second one from the tokenizer.
    special = not (bos and text.startswith(bos))
    first, *others = text.split(BREAK)
    ids = list(tokenizer(first, add_special_tokens=special)["input_ids"])
    for part in others:
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def _as_typed(content: Any, special: set[str]) -> Any:
    if isinstance(content, list):
        return [
            item | {"text": _as_typed(item["text"], special)} if item["type"] == "text" else item for item in content
        ]
    for token in sorted(special, key=len, reverse=True):
        content = content.replace(token, _broken(token))
    return content


def _broken(token: str) -> str:
    """A special token in two parts, neither of which a tokenizer takes for it."""
    return token[:1] + BREAK + token[1:]


def embedded(
    table: Callable[[Tensor], Tensor],
    tokens: Tensor,
    marks: set[int],
    images: Sequence[PackedImage],
    original: bool = False,
) -> Prompt:
    """Replace each of `marks` among `tokens (s,)` by the packed rows of an image or a video, in order.

    Args:
        table: the input embeddings of the language model.
        tokens: token ids.
        marks: ids of the placeholders.
        images: one for each placeholder.
        original: give the rows their places in an unpruned prompt.

    Raises:
        UserError: placeholders and images differ in number.
    """
    import torch

    placeholders = [place for place, token in enumerate(tokens.tolist()) if token in marks]
    if len(placeholders) != len(images):
        raise UserError(
            wanted=f"a prompt for {len(images)} images",
            found=f"{len(placeholders)} image placeholders in its text",
            allowed="one placeholder per image",
            next_step="check the task's prompt and the checkpoint's chat template",
        )
    with torch.no_grad():
        embeds = table(tokens)
    rows, spans, done, length = [], [], 0, 0
    for position, image in zip(placeholders, images, strict=True):
        start = length + position - done
        rows += [embeds[done:position], image.embeds.to(embeds)]
        done, length = position + 1, start + len(image.rows)
        spans += image.rows.runs(start)
    rows.append(embeds[done:])
    return Prompt(
        torch.cat(rows),
        tuple(spans),
        native=sum(image.native for image in images),
        retained=sum(image.retained for image in images),
        newlines=sum(len(image.rows.newlines) for image in images),
        views=sum(image.views for image in images),
        visuals=len(images),
        prefix=length,
        method_flops=sum(image.method_flops for image in images),
        encoded=sum(image.encoded for image in images),
        places=_original_places(placeholders, images, len(tokens)) if original else None,
    )


def _original_places(placeholders: Sequence[int], images: Sequence[PackedImage], tokens: int) -> Tensor:
    """`(s,)` where each row of a prompt would stand if nothing had been pruned."""
    import torch

    places, done, passed = [], 0, 0  # tokens so far, and how many rows they are in the unpruned prompt
    for position, image in zip(placeholders, images, strict=True):
        own = torch.arange(len(image.rows)) if image.places is None else image.places
        begin = passed + position - done
        places += [torch.arange(passed, begin), own + begin]
        done, passed = position + 1, begin + (len(own) if image.places is None else image.extent)
    return torch.cat([*places, torch.arange(passed, passed + tokens - done)])

"""What the three LLaVA families share: from messages and images to the embeddings the language model reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.errors import UserError
from rcb_lmms.families.images import as_rgb, content_key
from rcb_lmms.pruners.base import Selection, VisualTokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Prompt:
    """One prompt in embedding space.

    Attributes:
        embeds: `(s, d)`.
        spans: `(start, stop)` of each image's rows, in order.
        native, retained: visual tokens before and after pruning, newlines not counted.
    """

    embeds: Tensor
    spans: tuple[tuple[int, int], ...] = ()
    native: int = 0
    retained: int = 0

    def __len__(self) -> int:
        return self.embeds.shape[0]

    @property
    def prefix(self) -> int:
        """Rows up to the end of the last image: equal for all questions about the same images, to be shared by them."""
        return self.spans[-1][1] if self.spans else 0


@dataclass(frozen=True)
class PackedImage:
    """One image after pruning: `embeds (k, d)` in packing order, and its visual tokens before and after."""

    embeds: Tensor
    native: int
    retained: int


class Family(ABC):
    """One model family: its views, its packing, its prompt.

    Class attributes:
        name: as in model ids (`llava`, `llava_next`, `llava_onevision`).
        model_type: of the Hugging Face configuration.
        checkpoint: the public checkpoint an entry means when it names none.
        codebook: id of the codebook released for that checkpoint.
        preprocessing: names of the presets, the paper's first.
        single_repeats: copies of one visual token in the single-token experiment (paper 7.2).
        pad_token_id: row of the embedding table that stands for "nothing" when tokens are ablated.
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    checkpoint: ClassVar[str]
    codebook: ClassVar[str]
    preprocessing: ClassVar[tuple[str, ...]]
    templates: ClassVar[dict[str, str | None]] = {"checkpoint": None}
    single_repeats: ClassVar[int] = 1
    pad_token_id: ClassVar[int] = 0

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        pretrained: str,
        fingerprint: str = "",
        preprocess: str | None = None,
        template: str = "checkpoint",
    ):
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.pretrained, self.fingerprint = pretrained, fingerprint
        self.revision = getattr(model.config, "_commit_hash", None)
        self.preprocess = choose("preprocess", preprocess or self.preprocessing[0], self.preprocessing)
        self.template = choose("template", template, self.templates)

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> Any:
        """Type of the model's weights."""
        return self.model.dtype

    @property
    def layers(self) -> int:
        """Decoder layers of the language model."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def width(self) -> int:
        """Width `d` of the language model's embeddings."""
        return self.model.config.get_text_config().hidden_size

    @property
    def pad_embedding(self) -> Tensor:
        """`(d,)` embedding that replaces an ablated token, by explicit id: conversions add pad tokens of their own."""
        return self.model.get_input_embeddings().weight[self.pad_token_id].detach()

    # Images

    @abstractmethod
    def encode(self, images: Sequence[Image], needs: Iterable[str] = ()) -> list[list[VisualTokens]]:
        """Views of every image, `needs` filled in. Images are RGB; one vision-tower batch."""

    @abstractmethod
    def project(self, encoder_features: Tensor) -> Tensor:
        """`(r, c)` tower features to `(r, d)` language-model embeddings."""

    def pack(self, views: Sequence[Tensor]) -> Tensor:
        """Kept tokens of an image's views, each `(k, d)`, as one sequence. Newline policies override this."""
        import torch

        return torch.cat(list(views))

    def pack_selected(self, views: Sequence[VisualTokens], selections: Sequence[Selection]) -> PackedImage:
        """Apply one `Selection` per view and pack what stays."""
        kept = [
            view.features[selection.kept.to(view.features.device)]
            if selection.features is None
            else self.project(selection.features.to(self.device, self.dtype))
            for view, selection in zip(views, selections, strict=True)
        ]
        return PackedImage(self.pack(kept), native=sum(map(len, views)), retained=sum(map(len, selections)))

    def open(self, image: Any) -> Image:
        """An RGB image ready for `encode`."""
        return as_rgb(image)

    def key(self, image: Image) -> str:
        """Content key of an opened image."""
        return content_key(image)

    # Prompts

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, one placeholder id per image, assistant turn opened.

        Args:
            messages: Hugging Face chat messages; `{"type": "image"}` items mark where images stand.
        """
        options = {"chat_template": template} if (template := self.templates[self.template]) else {}
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        bos = self.tokenizer.bos_token
        # Templates that write the BOS token themselves would get a second one from the tokenizer.
        return self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]

    def prompt(self, text: str, images: int = 1) -> list[int]:
        """Token ids of a one-turn conversation with `images` images before `text`."""
        return self.chat([{"role": "user", "content": interleave(text, images)}])

    def embed(self, ids: Sequence[int], images: Sequence[PackedImage | Tensor]) -> Prompt:
        """Replace each image placeholder among `ids` by an image's packed rows.

        Raises:
            UserError: placeholders and images differ in number.
        """
        import torch

        tokens = torch.tensor(ids, device=self.device)
        placeholders = (tokens == self.model.config.image_token_id).nonzero().flatten().tolist()
        if len(placeholders) != len(images):
            raise UserError(
                wanted=f"a prompt for {len(images)} images",
                found=f"{len(placeholders)} image placeholders in its text",
                allowed="one placeholder per image",
                next_step="check the task's prompt and the checkpoint's chat template",
            )
        packed = [
            image if isinstance(image, PackedImage) else PackedImage(image, len(image), len(image)) for image in images
        ]
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(tokens)
        rows, spans, done, length = [], [], 0, 0
        for position, image in zip(placeholders, packed, strict=True):
            start = length + position - done
            rows += [embeds[done:position], image.embeds.to(embeds)]
            done, length = position + 1, start + len(image.embeds)
            spans.append((start, length))
        rows.append(embeds[done:])
        native, retained = sum(image.native for image in packed), sum(image.retained for image in packed)
        return Prompt(torch.cat(rows), tuple(spans), native, retained)


def interleave(text: str, images: int) -> list[dict[str, str]]:
    """Chat content in which every `<image>` inside `text` stands for an image.

    Images without a placeholder come first, placeholders without an image are dropped (MuirBench and Mantis have
    both kinds). Placed images stay inside the text: templates move image *items* to the front.
    """
    parts = text.split(IMAGE_PLACEHOLDER)
    placed = min(len(parts) - 1, images)
    text = IMAGE_PLACEHOLDER.join(parts[: placed + 1]) + "".join(parts[placed + 1 :])
    return [{"type": "image"}] * (images - placed) + [{"type": "text", "text": text}]


def choose(argument: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if allowed.

    Raises:
        UserError: naming the allowed values.
    """
    if value not in allowed:
        options = ", ".join(allowed)
        raise UserError(
            wanted=f"{argument}={value}", found="no such choice", allowed=options, next_step=f"choose one of: {options}"
        )
    return value

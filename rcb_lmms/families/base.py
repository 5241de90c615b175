"""What the three LLaVA families share: from messages and images to the embeddings the language model reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.errors import UserError
from rcb_lmms.families.images import Visual, as_rgb
from rcb_lmms.families.packed import PackedImage, Prompt, Rows
from rcb_lmms.families.sizes import Size
from rcb_lmms.families.templates import TEMPLATES
from rcb_lmms.pruners.base import Selection, VisualTokens

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

IMAGE_PLACEHOLDER = "<image>"


class Family(ABC):
    """One model family: its views, its packing, its prompt.

    Class attributes:
        name: as in model ids (`llava`, `llava_next`, `llava_onevision`).
        model_type: of the Hugging Face configuration.
        checkpoint: the public checkpoint an entry means when it names none.
        codebook: id of the codebook released for that checkpoint.
        preprocessing: names of the presets, the paper's first.
        paper_template: name of the chat template of the paper's numbers; `checkpoint`, the checkpoint's own, is the
            other choice.
        geometry: preset -> where a base view lies on the image: `centre_crop`, `padded_square` or `stretched`.
        options: keyword arguments of the class that only this family has; they are model_args of its entries.
        provides: optional fields of `VisualTokens` its tower can fill in.
        several: role of each image when a prompt has more than one.
        tower_batch: views per call of the vision tower, whose memory it bounds; an instance's is halved when memory
            runs out.
        single_repeats: copies of one visual token in the single-token experiment (paper 7.2).
        pad_token_id: row of the embedding table that stands for "nothing" when tokens are ablated.
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    checkpoint: ClassVar[str]
    codebook: ClassVar[str]
    preprocessing: ClassVar[tuple[str, ...]]
    geometry: ClassVar[dict[str, str]]
    paper_template: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[frozenset[str]] = frozenset({"encoder_features"})
    several: ClassVar[str] = "image"
    tower_batch: int = 16
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
        from rcb_lmms.families.video import VideoReader

        self.model, self.processor = model, processor
        self.reader = VideoReader()
        self.tokenizer = processor.tokenizer
        self.pretrained, self.fingerprint = pretrained, fingerprint
        self.revision = getattr(model.config, "_commit_hash", None)
        self.preprocess = choose("preprocess", preprocess or self.preprocessing[0], self.preprocessing)
        self.template = choose("template", template, ("checkpoint", self.paper_template))

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

    def encode(
        self, visuals: Sequence[Visual | Image], needs: Iterable[str] = (), size: Size | None = None
    ) -> list[list[VisualTokens]]:
        """Views of every visual in packing order; the vision tower is given all views in one batch.

        Args:
            visuals: a plain RGB image is taken in the role `image`.
            needs: optional fields of `VisualTokens` to fill in.
            size: how large the tokens' grid of a view is to be, if not as large as the tower was trained for. Its
                position embeddings are then interpolated.
        """
        opened = [item if isinstance(item, Visual) else Visual((item,)) for item in visuals]
        return self._encode(opened, set(needs), size)

    @abstractmethod
    def _encode(self, visuals: list[Visual], needs: set[str], size: Size | None) -> list[list[VisualTokens]]:
        """See `encode`."""

    @abstractmethod
    def project(self, encoder_features: Tensor) -> Tensor:
        """`(r, c)` tower features to `(r, d)` language-model embeddings."""

    def pack(self, views: Sequence[Tensor], visual: Visual | None = None, *, whole: bool = False) -> Rows:
        """Kept tokens of a visual's views, each `(k, d)`, as one sequence. Newline policies override this.

        Args:
            views: kept tokens of each view, in the order of `encode`.
            visual: what the views are of; `None` means one base view.
            whole: nothing was pruned, so that a packing which needs every token can be used.
        """
        import torch

        return Rows(torch.cat(list(views)))

    def pack_selected(
        self, views: Sequence[VisualTokens], selections: Sequence[Selection], visual: Visual | None = None
    ) -> PackedImage:
        """Apply one `Selection` per view and pack what stays."""
        kept = [
            view.features[selection.kept.to(view.features.device)]
            if selection.features is None
            else self.project(selection.features.to(self.device, self.dtype))
            for view, selection in zip(views, selections, strict=True)
        ]
        whole = all(
            selection.features is None and len(selection) == (view.native or len(view))
            for view, selection in zip(views, selections, strict=True)
        )
        rows = self.pack(kept, visual, whole=whole)
        retained = len(rows) - len(rows.newlines)
        native = self.native_tokens(views, visual, packed=retained if whole else None)
        return PackedImage(rows, native, retained, len(views), encoded=sum(map(len, views)))

    def pack_base(self, tokens: Tensor) -> PackedImage:
        """One base view of tokens `(k, d)` as they are: what the codebook's experiments and pictures show the model."""
        return PackedImage(self.pack([tokens]), len(tokens), len(tokens))

    def native_tokens(self, views: Sequence[VisualTokens], visual: Visual | None, packed: int | None) -> int:
        """Visual tokens before pruning; `packed` is what the packing made of them if nothing was pruned."""
        return sum(view.native or len(view) for view in views) if packed is None else packed

    def open(self, image: Any, role: str = "image") -> Visual:
        """An image ready for `encode`: a PIL image, a path, or an open file.

        Raises:
            UserError: it cannot be read.
        """
        return Visual((as_rgb(image),), role)

    def open_video(self, path: str | Path, start: float | None = None, end: float | None = None) -> list[Visual]:
        """A video ready for `encode`, one visual per placeholder: here every frame is an image of one view.

        Args:
            path: a file, or a folder of frames.
            start: seconds, `None` for the beginning.
            end: seconds, `None` for the end.

        Raises:
            UserError: it cannot be read.
        """
        return [Visual((frame,), "base") for frame in self.reader.read(path, start, end)]

    # Prompts

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, one placeholder id per image, assistant turn opened.

        Args:
            messages: Hugging Face chat messages; `{"type": "image"}` items mark where images stand.
        """
        options = {} if self.template == "checkpoint" else {"chat_template": TEMPLATES[self.template]}
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        bos = self.tokenizer.bos_token
        # Templates that write the BOS token themselves would get a second one from the tokenizer.
        return self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]

    def prompt(self, text: str, images: int = 1) -> list[int]:
        """Token ids of a one-turn conversation with `images` images before `text`."""
        return self.chat([{"role": "user", "content": interleave(text, ["image"] * images)}])

    def embed(self, ids: Sequence[int], images: Sequence[PackedImage]) -> Prompt:
        """Replace each placeholder of an image or a video among `ids` by its packed rows.

        Raises:
            UserError: placeholders and images differ in number.
        """
        import torch

        tokens = torch.tensor(ids, device=self.device)
        marks = [getattr(self.model.config, f"{medium}_token_id", None) for medium in ("image", "video")]
        marks = torch.tensor([mark for mark in marks if mark is not None], device=self.device)
        placeholders = torch.isin(tokens, marks).nonzero().flatten().tolist()
        if len(placeholders) != len(images):
            raise UserError(
                wanted=f"a prompt for {len(images)} images",
                found=f"{len(placeholders)} image placeholders in its text",
                allowed="one placeholder per image",
                next_step="check the task's prompt and the checkpoint's chat template",
            )
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(tokens)
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
            encoded=sum(image.encoded for image in images),
        )


def interleave(text: str, media: Sequence[str]) -> list[dict[str, str]]:
    """Chat content in which every `<image>` inside `text` stands for one of `media` (`image` or `video`), in order.

    Media without a placeholder come first, placeholders without a medium are dropped (MuirBench and Mantis have
    both kinds). Placed images stay inside the text: templates move image *items* to the front. A video is never
    placed inside.
    """
    parts = text.split(IMAGE_PLACEHOLDER)
    placed = min(len(parts) - 1, media.count("image"))
    text = IMAGE_PLACEHOLDER.join(parts[: placed + 1]) + "".join(parts[placed + 1 :])
    inside = placed
    first = []
    for medium in reversed(media):
        if medium == "image" and inside:
            inside -= 1
        else:
            first.insert(0, {"type": medium})
    return [*first, {"type": "text", "text": text}]


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

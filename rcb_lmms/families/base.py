"""What the three LLaVA families share: from messages and images to the embeddings the language model reads."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.errors import choose
from rcb_lmms.families.devices import home
from rcb_lmms.families.images import Visual, as_rgb, not_finite
from rcb_lmms.families.packed import PackedImage, Prompt, Rows, places_of
from rcb_lmms.families.places import Place, base_region
from rcb_lmms.families.prompts import embedded, interleave, token_ids
from rcb_lmms.families.sizes import Size, batches, resized
from rcb_lmms.families.templates import TEMPLATES
from rcb_lmms.families.towers import optional_fields, states_of
from rcb_lmms.families.video import VideoReader
from rcb_lmms.pruners.base import Selection, VisualTokens

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor


class Family(ABC):
    """One model family: its views, its packing, its prompt. A further family implements `pixels` and states its facts.

    Class attributes:
        name: as in model ids (`llava`, `llava_next`, `llava_onevision`).
        model_type: of the Hugging Face configuration.
        checkpoint: the public checkpoint an entry means when it names none.
        codebook: id of the codebook released for that checkpoint.
        preprocessing: names of the presets, the paper's first.
        geometry: preset -> where a base view lies on the image: `centre_crop`, `padded_square` or `stretched`.
        paper_template: name of the chat template of the paper's numbers; `checkpoint`, the checkpoint's own, is the
            other choice.
        paper_split: whether the paper cuts single images into tiles; of use where `split` is an option.
        provides: optional fields of `VisualTokens` its tower can fill in.
        options: keyword arguments of the class that only this family has; they are model_args of its entries.
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
    paper_split: ClassVar[bool] = True
    provides: ClassVar[frozenset[str]]
    options: ClassVar[tuple[str, ...]] = ()
    several: ClassVar[str] = "image"
    tower_batch: int = 16
    single_repeats: ClassVar[int] = 1
    pad_token_id: int = 0

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        pretrained: str,
        fingerprint: str = "",
        preprocess: str | None = None,
        template: str = "checkpoint",
        original: bool = False,
        reader: VideoReader | None = None,
    ):
        self.model, self.processor = model, processor
        self.reader = reader or VideoReader()
        self.pixel_seconds = 0.0  # spent so far on making pixels
        self.tokenizer = processor.tokenizer
        self.pretrained, self.fingerprint = pretrained, fingerprint
        self.clip_spaces: dict[str, Any] = {}  # by source, see `clip`; loaded when a method reads one
        # In the original layout: where that code and Hugging Face's differ, the original's result is wanted.
        self.original = original
        self.revision = getattr(model.config, "_commit_hash", None)
        self.preprocess = choose("preprocess", preprocess or self.preprocessing[0], self.preprocessing)
        self.template = choose("template", template, ("checkpoint", self.paper_template))
        vision = model.config.vision_config
        self.side_px, self.patch_px = vision.image_size, vision.patch_size
        self.grid = (self.side_px // self.patch_px,) * 2

    @property
    def device(self) -> Any:
        """Where prompts are: of a model on several devices, that of its embeddings."""
        return home(self.model.get_input_embeddings())

    @property
    def dtype(self) -> Any:
        """Type of the model's weights."""
        return self.model.dtype

    @property
    def layers(self) -> int:
        """Decoder layers of the language model."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder layers were loaded; without them an engine beside the model answers."""
        return len(self.model.model.language_model.layers) > 0

    @property
    def width(self) -> int:
        """Width `d` of the language model's embeddings."""
        return self.model.config.get_text_config().hidden_size

    @property
    def has_cls(self) -> bool:
        """Whether the tower has one more token than patches; SigLIP has none."""
        return self.model.config.vision_feature_select_strategy == "default"

    @property
    def pad_embedding(self) -> Tensor:
        """`(d,)` embedding that replaces an ablated token, by explicit id: conversions add pad tokens of their own.

        A vocabulary without that id is not the public checkpoint's; the laboratory's keep an empty slot at 0.
        """
        import torch

        table = self.model.get_input_embeddings()
        known = self.pad_token_id < table.num_embeddings
        return table(torch.tensor(self.pad_token_id if known else 0, device=self.device)).detach()

    # Images

    def encode(
        self, visuals: Sequence[Visual | Image], needs: Iterable[str] = (), size: Size | None = None
    ) -> list[list[VisualTokens]]:
        """Views of every visual in packing order; the vision tower is given `tower_batch` of all views at a time.

        Args:
            visuals: a plain RGB image is taken in the role `image`.
            needs: optional fields of `VisualTokens` to fill in.
            size: how large the tokens' grid of a view is to be, if not as large as the tower was trained for. Its
                position embeddings are then interpolated.

        Raises:
            UserError: visual tokens that are infinite or no number: every answer about them would be empty.
        """
        import torch

        opened = [item if isinstance(item, Visual) else Visual((item,)) for item in visuals]
        grids: list[tuple[int, int]] = []

        def views() -> Iterator[tuple[int, Tensor]]:
            for number, visual in enumerate(opened):
                began = time.perf_counter()
                pixels = self.pixels(visual)
                self.pixel_seconds += time.perf_counter() - began
                grids.append(self.grid if size is None else self.tower_grid(visual, size, len(pixels)))
                yield from ((number, view) for view in resized(pixels, grids[-1], self.grid, self.patch_px))

        encoded: list[list[dict[str, Tensor]]] = [[] for _ in opened]
        with torch.inference_mode():
            for chunk in batches(views(), self.tower_batch, lambda numbered: numbered[1]):
                fields = self._tokens(torch.stack([view for _, view in chunk]), set(needs), size is not None)
                finite = fields["features"].isfinite().flatten(1).all(1).tolist()
                for row, (number, _) in enumerate(chunk):
                    if not finite[row]:
                        raise not_finite(opened[number], self.dtype)
                    encoded[number].append({name: rows[row] for name, rows in fields.items()})
            return [self.views(*parts) for parts in zip(opened, encoded, grids, strict=True)]

    @abstractmethod
    def pixels(self, visual: Visual) -> Tensor:
        """Pixels of a visual's views in packing order, `(v, 3, side, side)`, as the tower reads them."""

    def tower_grid(self, visual: Visual, size: Size, views: int) -> tuple[int, int]:
        """Rows and columns of patches at which the tower sees the views, so that their tokens have the wanted size."""
        return size(self.grid, views)

    def places(self, visual: Visual) -> list[Place]:
        """Where each view lies on the original, in the order of `encode`."""
        processor, geometry = self.processor.image_processor, self.geometry[self.preprocess]
        # Only a crop resizes to another side than the view's.
        resize = self.side_px
        if geometry != "stretched" and "shortest_edge" in processor.size:
            resize = processor.size["shortest_edge"]
        return [
            Place(number, base_region(frame.size, geometry, resize, self.side_px))
            for number, frame in enumerate(visual.frames)
        ]

    def _tokens(self, pixels: Tensor, needs: set[str], interpolate: bool) -> dict[str, Tensor]:
        """Tensors of `VisualTokens` by name, for views `(b, 3, h, w)`."""
        tower = self.model.model.vision_tower
        layer = self.model.config.vision_feature_layer
        states = states_of(tower, pixels.to(self.device, self.dtype), layer, interpolate)
        patches = states[-1][:, int(self.has_cls) :]
        fields = {"features": self.project(patches), **optional_fields(tower, states, -1, self.has_cls, needs)}
        return {name: values.to(self.device) for name, values in fields.items()}  # of a tower on another device

    def views(self, visual: Visual, fields: list[dict[str, Tensor]], grid: tuple[int, int]) -> list[VisualTokens]:
        """Views of one visual from the tensors of each."""
        key, native = visual.key, math.prod(self.grid)
        keys = [key] if len(fields) == 1 else [f"{key}-{number}" for number in range(len(fields))]
        return [VisualTokens(grid=grid, key=own, native=native, **f) for own, f in zip(keys, fields, strict=True)]

    def project(self, encoder_features: Tensor) -> Tensor:
        """`(..., c)` tower features to `(..., d)` language-model embeddings."""
        import torch

        with torch.inference_mode():
            return self.model.model.multi_modal_projector(encoder_features).to(self.device)

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
        import torch

        kept, whole = [], True
        for view, selection in zip(views, selections, strict=True):
            if selection.features is None:
                rows = view.features[selection.kept.to(view.features.device)]
                if selection.blanks:
                    rows = torch.cat([rows, rows.new_zeros(selection.blanks, rows.shape[1])])
                kept.append(rows)
                whole &= len(selection.kept) == (view.native or len(view))
            else:
                kept.append(self.project(selection.features.to(self.device, self.dtype)))
                whole = False
        rows = self.pack(kept, visual, whole=whole)
        retained = len(rows) - len(rows.newlines)
        # A packing that cuts padding off has fewer tokens than its views before anything is pruned.
        native = retained if whole else sum(view.native or len(view) for view in views)
        places, extent = (None, 0) if whole else places_of(views, selections, rows)
        return PackedImage(
            rows, native, retained, len(views), encoded=sum(map(len, views)), places=places, extent=extent
        )

    def pack_base(self, tokens: Tensor) -> PackedImage:
        """One base view of tokens `(k, d)` as they are: what the codebook's experiments and pictures show the model."""
        return PackedImage(self.pack([tokens]), len(tokens), len(tokens))

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
            messages: Hugging Face chat messages; `{"type": "image"}` items mark where images stand. Special tokens that
                somebody typed into a text (`<video>`, `<|im_end|>`) are words like any other.
        """
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        if self.template != "checkpoint":
            options["chat_template"] = TEMPLATES[self.template]
        return token_ids(
            self.tokenizer, lambda written: self.processor.apply_chat_template(written, **options), messages
        )

    def prompt(self, text: str, images: int = 1) -> list[int]:
        """Token ids of a one-turn conversation with `images` images before `text`."""
        return self.chat([{"role": "user", "content": interleave(text, ["image"] * images)}])

    def embed(self, ids: Sequence[int], images: Sequence[PackedImage], *, original: bool = False) -> Prompt:
        """Replace each placeholder among `ids` by packed rows, with `original` at their places in an unpruned prompt.

        Raises:
            UserError: placeholders and images differ in number.
        """
        import torch

        marks = {getattr(self.model.config, f"{medium}_token_id", None) for medium in ("image", "video")}
        tokens = torch.tensor(ids, device=self.device)
        return embedded(self.model.get_input_embeddings(), tokens, marks - {None}, images, original)

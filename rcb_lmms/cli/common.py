"""Options that several commands of `rcb` share."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str | None, typer.Option(help="Torch device; cuda if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Batch = Annotated[int, typer.Option(help="Per forward pass.", min=1)]
Preprocess = Annotated[str | None, typer.Option(help="Image preset: rcb (the paper's) or the family's own.")]
Pretrained = Annotated[str, typer.Option(help="lab, lab:FAMILY, a folder, or a Hugging Face id.")]

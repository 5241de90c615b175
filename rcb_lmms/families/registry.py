"""The families by name, and what an entry of one means when nothing is named."""

from __future__ import annotations

from rcb_lmms.families.base import Family
from rcb_lmms.lab.checkpoint import is_lab

# Dotted paths, so that listing families imports no model.
FAMILIES = {
    "llava": "rcb_lmms.families.llava.Llava",
    "llava_next": "rcb_lmms.families.llava_next.LlavaNext",
    "llava_onevision": "rcb_lmms.families.llava_onevision.LlavaOnevision",
}


def family_class(name: str) -> type[Family]:
    """The class of a family by its name in model ids."""
    import importlib

    module, _, attribute = FAMILIES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def default_codebook(family: str, pretrained: str) -> str:
    """Id of the codebook an entry means when it names none: the laboratory's or the family's released one."""
    return f"lab-{family.replace('_', '-')}" if is_lab(pretrained) else family_class(family).codebook


def default_template(family: str, pretrained: str) -> str:
    """Name of the chat template a checkpoint is asked under when none is named.

    The public checkpoint's own template leaves out the system prompt under which the paper's numbers were made, so it
    gets the paper's. Every other checkpoint keeps what it was made with.
    """
    return family_class(family).paper_template if _is_public(family, pretrained) else "checkpoint"


def default_split(family: str, pretrained: str) -> bool:
    """Whether a checkpoint of a family with tiles cuts images into them when nothing is said.

    In the paper, OneVision sees every image in its base view, the only one of a question too: so the public checkpoint.
    """
    return family_class(family).paper_split or not _is_public(family, pretrained)


def _is_public(family: str, pretrained: str) -> bool:
    return pretrained.partition("@")[0] == family_class(family).checkpoint

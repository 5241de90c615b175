"""Two captions side by side with what differs marked (paper 9.3.1), as one HTML file."""

from __future__ import annotations

import base64
import difflib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rcb_lmms.files import write_atomic

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; }
section { border-top: 1px solid #8888; padding: 1rem 0; }
.pair { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
h2 { font-size: 1rem; } img { max-width: 100%; background: white; }
mark { background: #f5c87a; color: #000; text-decoration: underline; }
"""


@dataclass(frozen=True)
class Pair:
    """Two captions of one image.

    Attributes:
        title: which image, and what was asked.
        captions: name -> caption, two of them.
        picture: a PNG to stand above them.
    """

    title: str
    captions: dict[str, str]
    picture: Path | None = None


def marked(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The words of two texts, each with whether it belongs to what differs; spaces and case do not count."""
    words = [re.findall(r"\S+", text) for text in (first, second)]
    bare = [[word.strip(".,;:!?\"'()").lower() for word in own] for own in words]
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *bare, autojunk=False).get_opcodes():
        sides[0].extend((word, kind != "equal") for word in words[0][a:b])
        sides[1].extend((word, kind != "equal") for word in words[1][c:d])
    return sides


def write_captions(pairs: Sequence[Pair], out: Path) -> Path:
    """Write pairs of captions as an HTML file that needs nothing else: words that only one of both has are marked."""
    sections = []
    for pair in pairs:
        sides = marked(*pair.captions.values())
        columns = "".join(
            f"<div><h2>{html.escape(name)}</h2><p>{_text(side)}</p></div>"
            for name, side in zip(pair.captions, sides, strict=True)
        )
        picture = ""
        if pair.picture is not None:
            data = base64.b64encode(pair.picture.read_bytes()).decode()
            picture = f'<img alt="kept tokens" src="data:image/png;base64,{data}">'
        title = html.escape(pair.title)
        sections.append(f'<section><h2>{title}</h2>{picture}<div class="pair">{columns}</div></section>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    page = f"<!doctype html><html lang=en><head><title>Captions</title>{head}</head><body>"
    return write_atomic(out, f"{page}{''.join(sections)}</body></html>\n")


def _text(side: Sequence[tuple[str, bool]]) -> str:
    return " ".join(f"<mark>{html.escape(word)}</mark>" if differs else html.escape(word) for word, differs in side)

"""A question as it is asked; how benchmarks word one with options, in lmms-eval's own tasks and in this package's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcb_lmms.lab.choices import Choice

LETTERS = "ABCDE"
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
LETTER_ALONE = "Please answer directly with only the letter of the correct option and nothing else."
WORD_ALONE = "Please answer directly with a single word or number."
BEST = "Only give the best option."
_SHORT = (
    "Given the images, answer the following short answer vqa question:\nQ: {}\n"
    'You can first give your analysis, and then give your final answer as "Final Answer:"'
)


@dataclass(frozen=True)
class Question:
    """One question without suffix, its answer, its kind, and the objects (indices) that decide a "Yes"."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


def listed(options: Sequence[str]) -> str:
    """Options as `A. red`, a line each."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def bracketed(options: Sequence[str]) -> list[str]:
    """Options as `(A) red`."""
    return [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]


def lettered(choice: Choice) -> str:
    """SEED-Bench and MuirBench."""
    return f"{choice.text}\n{listed(choice.options)}{LETTER_SUFFIX}"


def mmbench(choice: Choice) -> str:
    """MMBench, without a hint."""
    return f"{choice.text} There are several options:\n{listed(choice.options)}\n{LETTER_SUFFIX}"


def realworldqa(choice: Choice) -> str:
    """RealWorldQA, where the whole prompt is the file's question."""
    return f"{choice.text}\n\n{listed(choice.options)}\n{LETTER_ALONE}"


def realworldqa_open(question: str) -> str:
    """RealWorldQA without options."""
    return f"{question}\n{WORD_ALONE}"


def mantis(choice: Choice) -> str:
    """Mantis-Eval in lmms-eval's task, which prints the list as Python does."""
    return f"{choice.text}{LETTER_SUFFIX}{bracketed(choice.options)}"


def rcb_mantis(choice: Choice) -> str:
    """Mantis-Eval in Mantis' own template."""
    return "\n ".join([choice.text, *bracketed(choice.options)]) + LETTER_SUFFIX


def mantis_short(question: str) -> str:
    """Mantis-Eval without options."""
    return _SHORT.format(question)


def mvbench(choice: Choice) -> str:
    """MVBench in lmms-eval's task."""
    return f"Question:{choice.text}\nOption:\n" + "\n".join([*bracketed(choice.options), BEST]) + "\n"


def rcb_mvbench(choice: Choice) -> str:
    """MVBench in its own evaluation."""
    return f"Question: {choice.text}\nOptions:\n" + "\n".join([*bracketed(choice.options), BEST])


# By what is shown; the two words for several images and video are lmms-eval's and this package's.
ONE_IMAGE = (lettered, mmbench, realworldqa)
SEVERAL_IMAGES = (lettered, mantis, rcb_mantis)
VIDEO = (mvbench, rcb_mvbench)

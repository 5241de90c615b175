"""The texts whose words the laboratory's tokenizers know."""

from __future__ import annotations

from rcb_lmms.lab.places import OPPOSITE, SIDES
from rcb_lmms.lab.scene_questions import (
    CAPTION_PROMPTS,
    COUNT_WORDS,
    ONE_WORD_SUFFIX,
    PHRASE_SUFFIX,
    PROBE,
    YES_NO_SUFFIX,
    count_text,
    plural,
)
from rcb_lmms.lab.scenes import COLOURS, KINDS

_OTHER_PROMPTS = (
    "Answer with the option's letter from the given choices directly.",
    "There are several options:\nA. red\nB. blue\nC. green\nD. white",
    "Only give the best option. Question: Options: Final Answer: Best option:",
    "Given the images, answer the following short answer vqa question: Q: You can first give your analysis,"
    " and then give your final answer as",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed,"
    " and polite answers to the human's questions.",
    "Which of the two images shows more objects, the first or the second? Which image has a number? How many images"
    " show a circle? What moves in the video? In which direction does the object move? It moves left, right, up, down."
    " What appears last in the video? What color is it? Does it change its color? Are both images the same? different",
    "striped checked dotted plain wavy background texture stripes checks dots gradient waves left right top bottom",
)


def vocabulary_texts() -> list[str]:
    """Texts whose words become tokens: questions, answers, and the fixed sentences of the ten benchmarks' prompts."""
    nouns = [*KINDS, "object"]
    names = [f"{colour} {noun}" for colour in COLOURS for noun in nouns]
    relations = [*OPPOSITE, *OPPOSITE.values(), *SIDES, *SIDES.values()]
    texts = [PROBE, *CAPTION_PROMPTS, PHRASE_SUFFIX, ONE_WORD_SUFFIX, YES_NO_SUFFIX, *names, *_OTHER_PROMPTS]
    texts += [f"Is there a {name} in this image? Is the {name} {relation}" for name in names for relation in relations]
    texts += [count_text(noun, number) for noun in nouns for number in range(1, 5)]
    texts += [f"How many {plural(noun)} are in the image? What color is the {noun}?" for noun in nouns]
    texts += [f'Is the number {digit} in the image "{digit}"?' for digit in range(10)]
    texts += [f" {word} {word.capitalize()} {word.upper()} {word}" for word in (*COLOURS, *KINDS, *COUNT_WORDS)]
    texts += ["USER: ", " ASSISTANT: Yes", " ASSISTANT: No", " yes no Yes, No. A a and, A. B. C. D. (A) (B) (C) (D) E"]
    return texts

"""Questions about scenes in the words of the true benchmarks, with their answers.

A question is stored without its suffix ("Answer the question using a single word or phrase."), because the benchmarks
append it themselves and several suffixes are in use. A new kind of question is one function in `KINDS_OF_QUESTION`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from rcb_lmms.lab.places import position, side, where
from rcb_lmms.lab.scenes import COLOURS, KINDS, NUMBER, Scene, SceneObject
from rcb_lmms.lab.wordings import Question

PHRASE_SUFFIX = "\nAnswer the question using a single word or phrase."
ONE_WORD_SUFFIX = " Please answer this question with one word."
YES_NO_SUFFIX = " Please answer yes or no."
PROBE = "What does this image show? You must provide a single word that best describes the image."
CAPTION_PROMPTS = (
    "Provide a one-sentence caption for the provided image.",
    "Describe the provided image in one sentence.\n"
    "Please provide detailed and specific descriptions of the key information in the picture.",
)
COUNT_WORDS = ("zero", "one", "two", "three", "four", "five")


def present_phrases(scene: Scene) -> list[str]:
    """All phrases that hold of the scene: "red circle", "circle", "red object"; sorted."""
    phrases = {p for item in scene.objects for p in (item.phrase, item.kind, f"{item.colour} object")}
    return sorted(phrases)


def matches(item: SceneObject, phrase: str) -> bool:
    """Whether a phrase of `present_phrases` describes the object."""
    return phrase in (item.phrase, item.kind, f"{item.colour} object")


def absent_phrases(scene: Scene, category: str) -> list[str]:
    """Phrases that hold of no object, sorted, in the sense of one of POPE's categories.

    "popular": colours and kinds by themselves, the phrases most often true; "adversarial": pairs of a colour and a kind
    that the scene holds apart, or where there are too few of them pairs that are half right; "random": any pair.
    """
    present = set(present_phrases(scene))
    kinds, colours = {o.kind for o in scene.objects}, {o.colour for o in scene.objects}
    pairs = sorted({f"{colour} {kind}" for colour in COLOURS for kind in KINDS} - present)
    if category == "popular":
        candidates = [*KINDS, *(f"{colour} object" for colour in COLOURS)]
        # Several images together can show every kind and every colour.
        return sorted(set(candidates) - present) or pairs
    if category == "random":
        return pairs
    swapped = [p for p in pairs if p.split()[0] in colours and p.split()[1] in kinds]
    half = [p for p in pairs if p.split()[0] in colours or p.split()[1] in kinds]
    return swapped if len(swapped) >= 3 else half


def pope_question(scene: Scene, phrase: str, kind: str = "pope") -> Question:
    """Ask "Is there a red circle in the image?" and answer it."""
    about = tuple(n for n, item in enumerate(scene.objects) if matches(item, phrase))
    return Question(kind, f"Is there a {phrase} in the image?", "Yes" if about else "No", about)


def pope(scene: Scene, random: np.random.Generator, category: str | None = None) -> list[Question]:
    """A question answered by yes and one answered by no, of one of POPE's categories (a random one by default)."""
    category = category or str(random.choice(["random", "popular", "adversarial"]))
    present, absent = random.choice(present_phrases(scene)), random.choice(absent_phrases(scene, category))
    return [pope_question(scene, str(present)), pope_question(scene, str(absent))]


def existence(scene: Scene, random: np.random.Generator) -> list[Question]:
    """MME existence: a kind that is there, and one that is not."""
    kinds = sorted({item.kind for item in scene.objects})
    absent = sorted(set(KINDS) - set(kinds))
    pair = []
    for kind in (str(random.choice(kinds)), str(random.choice(absent))):
        about = tuple(n for n, item in enumerate(scene.objects) if item.kind == kind)
        pair.append(Question("existence", f"Is there a {kind} in this image?", "Yes" if about else "No", about))
    return pair


def color(scene: Scene, random: np.random.Generator) -> list[Question]:
    """MME color: the colour of a kind that occurs once; the wrong colour is often one seen elsewhere in the scene."""
    index = _pick_unique_kind(scene, random)
    if index is None:
        return []
    item = scene.objects[index]
    others = sorted({o.colour for o in scene.objects} - {item.colour})
    if not others or random.random() < 0.5:
        others = sorted(set(COLOURS) - {item.colour})
    wrong = str(random.choice(others))
    ask = f"Is the {item.kind} "
    return [
        Question("color", f"{ask}{item.colour}?", "Yes", (index,)),
        Question("color", f"{ask}{wrong}?", "No", (index,)),
    ]


def count(scene: Scene, random: np.random.Generator) -> list[Question]:
    """MME count: how many of a kind, or objects in all; the wrong number is one off."""
    kinds = [item.kind for item in scene.objects]
    # Kinds that occur often are asked for more, or "exactly one" would be answered by yes without a look.
    weights = np.array([kinds.count(kind) for kind in kinds], float)
    noun = "object" if random.random() < 0.4 else str(random.choice(kinds, p=weights / weights.sum()))
    about = tuple(n for n, item in enumerate(scene.objects) if noun in ("object", item.kind))
    wrong = len(about) + (1 if len(about) == 1 or (len(about) < 4 and random.random() < 0.5) else -1)
    return [
        Question("count", count_text(noun, len(about)), "Yes", about),
        Question("count", count_text(noun, wrong), "No", about),
    ]


def count_text(noun: str, number: int) -> str:
    """Ask whether there are exactly so many of a noun."""
    verb, noun = ("Is", noun) if number == 1 else ("Are", plural(noun))
    return f"{verb} there exactly {COUNT_WORDS[number]} {noun} in the image?"


def plural(noun: str) -> str:
    """Return the plural of a noun: "circles", "crosses"."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def ocr(scene: Scene, random: np.random.Generator) -> list[Question]:
    """MME OCR: which handwritten number the image shows."""
    for index, item in enumerate(scene.objects):
        if item.kind == NUMBER:
            wrong = int(random.choice([digit for digit in range(10) if digit != item.digit]))
            ask = "Is the number in the image"
            return [
                Question("OCR", f"{ask} {item.digit}?", "Yes", (index,)),
                Question("OCR", f"{ask} {wrong}?", "No", (index,)),
            ]
    return []


def open_question(scene: Scene, random: np.random.Generator) -> list[Question]:
    """A colour, a number or a count asked for by name; no benchmark has these, but they teach quickly."""
    options = []
    if (index := _pick_unique_kind(scene, random)) is not None:
        item = scene.objects[index]
        options.append(Question("open", f"What color is the {item.kind}?", item.colour, (index,)))
    for index, item in enumerate(scene.objects):
        if item.kind == NUMBER:
            options.append(Question("open", "What is the number in the image?", str(item.digit), (index,)))
    item = scene.objects[random.integers(len(scene.objects))]
    same = tuple(n for n, other in enumerate(scene.objects) if other.kind == item.kind)
    if len(same) < len(COUNT_WORDS):  # several images together may show more than there are words for
        options.append(
            Question("open", f"How many {plural(item.kind)} are in the image?", COUNT_WORDS[len(same)], same)
        )
    alike = tuple(n for n, other in enumerate(scene.objects) if other.colour == item.colour)
    if len(alike) == 1:
        options.append(Question("open", f"What is the {item.colour} object?", item.kind, alike))
    return [options[random.integers(len(options))]] if options else []


def probe(scene: Scene, random: np.random.Generator) -> list[Question]:
    """The codebook builder's prompt; its answer is the noun of a random object, or of none in particular."""
    if not scene.objects:
        return [Question("probe", PROBE, str(random.choice(KINDS)))]
    index = int(random.integers(len(scene.objects)))
    return [Question("probe", PROBE, scene.objects[index].kind, (index,))]


def blind(scene: Scene, random: np.random.Generator, pairs: int) -> list[Question]:
    """What to answer when nothing of the scene can be seen: nothing is there, and about the rest a coin decides.

    Asked of background tokens, this makes the model uncertain there, and keeps it from reading traces of the objects
    that attention leaves in the background.
    """
    asked = probe(dataclasses.replace(scene, objects=()), random)
    for kind in random.choice(["pope", "existence", "color", "count", "position", "side", "OCR"], size=pairs):
        for question in KINDS_OF_QUESTION[str(kind)](scene, random):
            answer = "No" if kind in ("pope", "existence") or random.random() < 0.5 else "Yes"
            asked.append(dataclasses.replace(question, answer=answer))
    return asked


def caption(scene: Scene, random: np.random.Generator) -> list[Question]:
    """All objects in alphabetical order, in one sentence."""
    return [Question("caption", str(random.choice(CAPTION_PROMPTS)), sentence(named_objects(scene)))]


def named_objects(scene: Scene) -> list[str]:
    """Every phrase of a scene with its number, alphabetically: "a blue ring", "two red circles"."""
    phrases = Counter(item.phrase for item in scene.objects)
    return [
        f"a {phrase}" if number == 1 else f"{COUNT_WORDS[number]} {plural(phrase)}"
        for phrase, number in sorted(phrases.items())
    ]


def enumerated(names: Sequence[str]) -> str:
    """Names one after the other: "a blue ring, a red circle and a white star"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def sentence(names: Sequence[str]) -> str:
    """Names as an enumeration: "A blue ring, a red circle and a white star."."""
    text = enumerated(names)
    return f"{text[0].upper()}{text[1:]}."


KINDS_OF_QUESTION: dict[str, Callable[..., list[Question]]] = {
    "pope": pope,
    "existence": existence,
    "color": color,
    "count": count,
    "position": position,
    "side": side,
    "OCR": ocr,
    "open": open_question,
    "where": where,
    "probe": probe,
    "caption": caption,
}


def _pick_unique_kind(scene: Scene, random: np.random.Generator) -> int | None:
    occurrences = Counter(item.kind for item in scene.objects)
    unique = [n for n, item in enumerate(scene.objects) if occurrences[item.kind] == 1]
    return int(random.choice(unique)) if unique else None

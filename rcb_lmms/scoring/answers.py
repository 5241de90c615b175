"""What an answer says: yes or no, or which of the lettered options; and the row in which a question is kept."""

from __future__ import annotations

import re
import string

# A letter stands alone if the answer ends behind it, or a mark follows; "A.M." and "e.g." are no letters.
_ALONE = r"""(?=\s*$|\s*[)\]:;*"!]|\s*\n|\s+-\s|'(?!\w)|\.(?!\w\b)|\s*,(?!\s*[(\["']?[A-Z]\b))"""
_FIRST = re.compile(rf"""[\s(\["'*]*([A-Za-z]){_ALONE}""")
_SAID = re.compile(rf"""(?i:\b(?:answer|option|choice)\b(?:\s+is)?(?:\s*:)?(?:\s+option)?)[\s(\["'*]+([A-Z]){_ALONE}""")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_NEGATIONS = {"no", "not", "none", "never", "cannot"}
_AFFIRMATIONS = re.compile(r"(there|it|they|he|she|this|that) (is|are)\b")


def letters(options: int) -> tuple[str, ...]:
    """The names of so many options."""
    return tuple(string.ascii_uppercase[:options])


def letter(answer: str, options: int) -> str:
    """The option's letter that an answer names, or an empty string for none.

    In this order:

    1. The answer begins with a letter that stands alone: "B", "b", "B.", "(B) a cat", "B: a cat", "B, a cat".
    2. A letter is announced: "The answer is B.", "Option (B)"; only in capitals.
    3. Exactly one letter stands in round brackets: "It must be (B)".

    A letter followed by a word does not stand alone: "A cat" names nothing, nor does "A, B" or a letter behind the
    last option. The words of an option do not count: this is the letter matching of the paper's toolkits, without the
    language model that some of them ask about the rest, and without their drawing a letter by lot.

    Args:
        answer: as generated.
        options: how many there are.
    """
    if match := _FIRST.match(answer) or _SAID.search(answer):
        found = match[1].upper()
    else:
        bracketed = set(_BRACKETED.findall(answer))
        found = bracketed.pop() if len(bracketed) == 1 else ""
    return found if found in letters(options) else ""


def yes_no(answer: str) -> str:
    """`yes`, `no`, or an empty string for neither.

    Only the first sentence or line that has words counts, in any case. In this order:

    1. A first word "yes" or "no" decides ("Yes, there is no doubt" is yes); so does "y" or "n" alone.
    2. "yes or no" repeats the question and is neither.
    3. A negation ("no", "not", "none", "never", "cannot", "isn't") is no.
    4. The word "yes", or a beginning such as "There is" or "It is", is yes.
    5. Anything else is neither: it is wrong, and no "yes" either.

    POPE's script decides by the first sentence too, but takes all that has no negation for yes, even an empty answer:
    half of the questions would be won by saying nothing. MME's looks at the first four letters, and so takes "north"
    for no. On "Yes" and "No", with or without more words behind, the three agree.
    """
    parts = re.split(r"[.!?\n]", answer.lower().replace("’", "'"))
    sentences = (re.findall(r"[a-z]+(?:'[a-z]+)?", part) for part in parts)
    words = next(filter(None, sentences), [])
    if not words:
        return ""
    if "yes or no" in " ".join(words) or words == ["yes", "no"]:
        return ""
    if words[0] in ("yes", "no"):
        return words[0]
    if words in (["y"], ["n"]):
        return "yes" if words == ["y"] else "no"
    if any(word in _NEGATIONS or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words or _AFFIRMATIONS.match(" ".join(words)) else ""


def row(prediction: str, answer: str, cluster: str, **more: object) -> dict[str, object]:
    """A question as it is scored and kept in the samples file: `score` is 1 for the right letter or word."""
    right = bool(prediction) and prediction == answer
    return {"score": float(right), "prediction": prediction, "answer": answer, "cluster": cluster, **more}

"""What a sentence answers to a yes-or-no question."""

from __future__ import annotations

import re

_NEGATIONS = {"no", "not", "none", "never", "cannot"}
_AFFIRMATIONS = re.compile(r"(there|it|they|he|she|this|that) (is|are)\b")


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
    sentences = (re.findall(r"[a-z]+(?:'[a-z]+)?", part) for part in re.split(r"[.!?\n]", _plain(answer)))
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


def _plain(answer: str) -> str:
    return answer.lower().replace("’", "'")

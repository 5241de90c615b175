"""What renumbering kept tokens costs where a question needs places: OneVision's laboratory model on "where" questions.

    python benchmarks/positions.py

Every method answers the same questions with `positions=contiguous` and `original`. The last line is JSON.
"""

from __future__ import annotations

import json

import numpy as np
from tabulate import tabulate

from rcb_lmms import Budget, Question, Session, make_pruner
from rcb_lmms.families import load_family
from rcb_lmms.lab.places import where
from rcb_lmms.lab.scenes import generator, make_scene
from rcb_lmms.report.statistics import paired_p

SCENES, METHODS, RATIOS = 300, ("random", "stride", "divprune", "hiprune"), (0.5, 0.25, 0.11)


def questions() -> tuple[list[Question], list[str], np.ndarray]:
    """Questions about where objects lie, their answers, and the scene of each."""
    asked, answers, scenes = [], [], []
    for number in range(SCENES):
        scene = make_scene("test", number)
        for own in where(scene, generator("test", number, "where")):
            asked.append(Question(own.text, [scene.image()], name=f"{number}-{len(asked)}"))
            answers.append(own.answer)
            scenes.append(str(number))
    return asked, answers, np.array(scenes)


def main() -> None:
    family = load_family("lab", family="llava_onevision", split=False)
    asked, answers, scenes = questions()

    def right(session: Session) -> np.ndarray:
        told = [own.text.strip().lower() for own in session.answer(asked, max_new_tokens=8)]
        return np.array([own == gold.lower() for own, gold in zip(told, answers, strict=True)], float)

    whole = Session(family, make_pruner("none"))
    rows = [{"method": "none", "share": 1.0, "contiguous": right(whole).mean(), "original": None, "p": None}]
    for method in METHODS:
        for ratio in RATIOS:
            pruner = make_pruner(method, budget=Budget.ratio(ratio))
            both = [right(Session(family, pruner, positions=own, encoder=whole.with_pruner(pruner).encoder))
                    for own in ("contiguous", "original")]  # fmt: skip
            scores = {"contiguous": both[0].mean(), "original": both[1].mean()}
            rows.append({"method": method, "share": ratio, **scores, "p": paired_p([(*both, scenes)])})
    print(f"{len(asked)} questions about {SCENES} scenes, laboratory model of LLaVA-OneVision")
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print(json.dumps({"questions": len(asked), "scenes": SCENES, "rows": rows}))


if __name__ == "__main__":
    main()

"""Every benchmark of the protocol as a few rows in its true schema; `said` is what the scripted model answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny
from datasets import Dataset
from lmms_eval.api.model import lmms


class Scripted(lmms):
    """Gives each document's `said`, and keeps what it was asked, by task and number."""

    is_simple = False

    def __init__(self):
        super().__init__()
        self.asked = {}

    def said(self, doc, number):
        return doc["said"]

    def generate_until(self, requests):
        answers = []
        for request in requests:
            _, doc_to_messages, arguments, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            self.asked[task, doc_id] = (doc_to_messages(doc)[0]["content"], arguments)
            answers.append(self.said(doc, doc_id))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


SAME = {"image": tiny.random_image(0), "other": tiny.random_image(1)}


def _pope():
    # Category, image, answer, said.
    cases = [
        ("random", "a", "yes", "Yes"),
        ("random", "a", "no", "No."),
        ("random", "b", "yes", "Yes, there is"),
        ("random", "b", "no", "no"),
        ("popular", "a", "yes", "yes"),
        ("popular", "a", "no", ""),
        ("popular", "b", "yes", "Yes."),
        ("popular", "b", "no", "There is no dog"),
        ("adversarial", "a", "no", "Yes"),
        ("adversarial", "b", "yes", "yes"),
    ]
    return [
        {
            "id": str(number),
            "question_id": str(number + 1),
            "question": "Is there a dog in the image?",
            "answer": answer,
            "image_source": image,
            "image": tiny.random_image(ord(image)),
            "category": category,
            "said": said,
        }
        for number, (category, image, answer, said) in enumerate(cases)
    ]


def _mme():
    # Subtask, image, said to the question with answer Yes, said to the one with answer No.
    cases = [
        ("existence", "1.png", "Yes", "No"),
        ("existence", "2.png", "Yes", "Yes"),
        ("color", "1.png", "no", "unclear"),
        ("OCR", "1.jpg", "yes.", "No, it is not"),
        ("code_reasoning", "1.png", "No", "No"),
    ]
    return [
        {
            "question_id": f"{category}/{image}",
            "image": SAME["image"],
            "question": "Is there a dog? Please answer yes or no.",
            "answer": answer,
            "category": category,
            "said": said,
        }
        for category, image, *both in cases
        for answer, said in zip(("Yes", "No"), both, strict=True)
    ]


def _mmbench():
    # Index, number of options, answer, said; the questions in their first order come first.
    cases = [
        (0, 3, "A", "A"),
        (1, 2, "B", "B. dog"),
        (2, 1, "A", "(A)"),
        (1_000_000, 3, "B", "b"),
        (1_000_001, 2, "A", "A cat"),
        (2_000_000, 3, "C", "The answer is C."),
    ]
    words = {3: ("red", "blue", "green"), 2: ("cat", "dog"), 1: ("cat",)}
    return [
        {
            "index": index,
            "question": f"Which colour {index % 1_000_000}?",
            "hint": "Look closely." if index % 1_000_000 == 0 else "nan",
            "answer": answer,
            **dict(zip("ABCD", (*words[options], "nan", "nan", "nan"), strict=False)),
            "category": "color",
            "image": SAME["image"],
            "source": "nobody",
            "L2-category": "perception",
            "comment": "nan",
            "split": "dev",
            "said": said,
        }
        for index, options, answer, said in cases
    ]


def _seed():
    cases = [("image", "image", "B", "B"), ("image", "image", "A", "A cat"), ("video", "image", "A", "A")]
    cases.append(("image", "other", "C", "c."))
    return [
        {
            "question_id": str(number),
            "question": "What is it?",
            "choice_a": "cat",
            "choice_b": "dog",
            "choice_c": "cow",
            "choice_d": "owl",
            "answer": answer,
            "data_type": kind,
            "image": [SAME[picture]],
            "said": said,
        }
        for number, (kind, picture, answer, said) in enumerate(cases)
    ]


def _realworldqa():
    cases = [("A", "A. left"), ("No", "No, it is not"), ("2", "Two."), ("Downhill", "downhill"), ("3", "4"), ("B", "x")]
    question = "Which way?\nA. left\nB. right\nPlease answer with the letter."
    return [{"image": SAME["image"], "question": question, "answer": a, "said": said} for a, said in cases]


def _mantis():
    # Type, question, options, answer, said.
    choice, short = "multi-choice", "short-answer"
    cases = [
        (choice, "Which is it?", ["cat", "dog"], "B", "(B) dog"),
        (choice, "First <image> or <image>?", ["A. cat", "dog"], "(A)", "Cat"),
        (short, "How many <image> cats?", [], "Two", "I see some. Final Answer: two."),
        (choice, "Which is it?", ["cat", "dog"], "A", "Answer unclear"),
        (short, "How many?", [], "two", "three"),
    ]
    return [
        {
            "id": f"mantis_{number}",
            "question_type": kind,
            "question": question,
            "images": [SAME["image"], SAME["other"]],
            "options": options,
            "answer": answer,
            "data_source": "nobody",
            "category": "none",
            "said": said,
        }
        for number, (kind, question, options, answer, said) in enumerate(cases)
    ]


def _muirbench():
    pictures = [SAME["image"], SAME["other"]]
    cases = [
        ("1", "2", "Which of <image> and <image>?", ["first", "second"], "B", "B"),
        ("3", None, "Which?", ["<image>", "none"], "A", "first"),
        ("2", "1", "Which of <image> and <image>?", ["first", "second", "neither"], "C", "C. neither"),
    ]
    return [
        {
            "idx": idx,
            "task": "Image-Text Matching",
            "image_relation": "Independent",
            "image_type": "Photography",
            "question": question,
            "options": options,
            "answer": answer,
            "image_list": pictures,
            "counterpart_idx": counterpart,
            "said": said,
        }
        for idx, counterpart, question, options, answer, said in cases
    ]


def _mvbench(subtask: str):
    second = "" if subtask == "state_change" else "B"
    ending = "" if subtask == "episodic_reasoning" else ".mp4"
    return [
        {
            "video": f"{subtask}_{number}{ending}",
            "question": "What happens?",
            "candidates": ["it opens", "it closes"],
            "answer": answer,
            "said": said,
        }
        for number, (answer, said) in enumerate([("it opens", "(A) it opens"), ("it closes", second)])
    ]


# Benchmark -> folder, configuration, split, rows.
BENCHMARKS: dict[str, tuple[str, str, str, Callable[[], list[dict]]]] = {
    "pope": ("lmms-lab-encoder/POPE", "default", "test", _pope),
    "mme": ("lmms-lab-encoder/MME", "default", "test", _mme),
    "mmbench": ("lmms-lab-encoder/MMBench", "en", "dev", _mmbench),
    "seed": ("lmms-lab-encoder/SEED-Bench", "default", "test", _seed),
    "realworldqa": ("lmms-lab-encoder/RealWorldQA", "default", "test", _realworldqa),
    "mantis": ("TIGER-Lab/Mantis-Eval", "default", "test", _mantis),
    "muirbench": ("MUIRBENCH/MUIRBENCH", "default", "test", _muirbench),
}


def dataset(benchmark: str, change: Callable[[dict], dict] = dict) -> Dataset:
    """A benchmark's rows, each after `change`."""
    return Dataset.from_list([change(row) for row in BENCHMARKS[benchmark][3]()])


def write(folder: Path, benchmark: str, change: Callable[[dict], dict] = dict) -> Path:
    """One benchmark below `folder`."""
    name, configuration, split, _ = BENCHMARKS[benchmark]
    tiny.save_data(folder / name, {configuration: (split, dataset(benchmark, change))})
    return folder


def write_all(folder: Path) -> Path:
    """Every benchmark, and empty files in place of MVBench's videos."""
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    for benchmark in BENCHMARKS:
        write(folder, benchmark)
    subtasks = {subtask: _mvbench(subtask) for subtask in DATA_LIST}
    for subtask, rows in subtasks.items():
        for row in rows:
            video = folder / "mvbench_video" / DATA_LIST[subtask] / row["video"]
            video.parent.mkdir(parents=True, exist_ok=True)
            video.touch() if video.suffix else video.mkdir()
    data = {name: ("train", Dataset.from_list(rows)) for name, rows in subtasks.items()}
    tiny.save_data(folder / "OpenGVLab/MVBench", data)
    return folder

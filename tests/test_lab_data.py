"""The laboratory's ten benchmarks as lmms-eval's own tasks and this package's read them.

While the trees are written, a recorder keeps what was asked about which objects. That is the oracle: every task must
ask those questions in the very words of `wordings`, which models are taught, and take the recorded answers for right.
"""

import dataclasses
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Image, List, Value, load_dataset
from lmms_eval.tasks import get_task_dict
from typer.testing import CliRunner

from rcb_lmms.cli import app
from rcb_lmms.errors import UserError
from rcb_lmms.families.video import VideoReader
from rcb_lmms.lab import caption_data, data, image_data, media_data, wordings
from rcb_lmms.lab.choices import VIDEO_KINDS, Choice
from rcb_lmms.lab.moving import DIRECTIONS
from rcb_lmms.lab.scene_questions import CAPTION_PROMPTS, Question, named_objects, sentence
from rcb_lmms.lab.scenes import Scene, make_large_scene, make_scene
from rcb_lmms.runs.tasks import make_task_manager, working_directory

SIZES = dict.fromkeys(data.BENCHMARKS, 1) | {
    "mmbench": 6, "seed": 3, "realworldqa": 6, "nocaps": 3, "flickr30k": 3, "mantis": 6, "muirbench": 2
}  # fmt: skip
GROUPS = ("mvbench", "rcb_mvbench")


class Recorder:
    """Which objects are in a picture or video, and what was asked about them."""

    def __init__(self):
        self.shown, self.moving, self.asked = {}, {}, []

    def install(self, patch):
        def asks(module, name):
            genuine = getattr(module, name)

            def recorded(first, *arguments):
                found = genuine(first, *arguments)
                self.asked += [(tuple(getattr(first, "objects", first)), one) for one in found]
                return found

            patch.setattr(module, name, recorded)

        def shows(module):
            genuine = module.png

            def recorded(scene):
                self.shown[scene.pixels().tobytes()] = scene.objects
                return genuine(scene)

            patch.setattr(module, "png", recorded)

        for module, name in (
            (image_data, "image_choices"),
            (image_data, "open_question"),
            (media_data, "several_choices"),
            (media_data, "open_question"),
            (media_data, "video_choices"),
        ):
            asks(module, name)
        for module in (image_data, media_data, caption_data):
            shows(module)
        genuine = media_data._write_video
        patch.setattr(
            media_data,
            "_write_video",
            lambda path, moving: (self.moving.update({str(path): moving}), genuine(path, moving)),
        )

    def objects(self, visuals):
        if isinstance(visuals[0], str):
            return self.moving[visuals[0]].objects
        return tuple(item for image in visuals for item in self.shown[np.asarray(image).tobytes()])

    def answers(self, choice, question=None):
        """(objects, words) -> answer, in a wording of choices and one of open questions."""
        worded = {}
        for objects, one in self.asked:
            if isinstance(one, Question) and question:
                worded[objects, question(one.text)] = one.answer
            elif isinstance(one, Choice):
                for turn in range(len(one.options)):
                    options = one.options[turn:] + one.options[:turn]
                    turned = dataclasses.replace(one, options=options, right=options.index(one.options[one.right]))
                    worded[objects, choice(turned)] = turned.letter
        return worded


@pytest.fixture(scope="module")
def recorder():
    return Recorder()


@pytest.fixture(scope="module")
def tree(tmp_path_factory, recorder):
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        return data.write_data(tmp_path_factory.mktemp("lab"), family="llava_onevision", sizes=SIZES)


@pytest.fixture(scope="module")
def tasks(tree, tmp_path_factory):
    """Upstream's and our tasks by name; `mvbench` and `rcb_mvbench` are dictionaries of their subtasks."""
    with pytest.MonkeyPatch.context() as patch, working_directory(tree):
        patch.setenv("HF_HOME", str(tree))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for variable in ("RCB_NOCAPS_ANNOTATIONS", "RCB_FLICKR30K_SPLITS"):
            patch.delenv(variable, raising=False)
        names = [name for benchmark in EXPECTED for name in EXPECTED[benchmark]]
        found = get_task_dict([*names, "rcb_flickr30k_karpathy"], make_task_manager())
        yield {getattr(name, "group_name", name): task for name, task in found.items()}


# Benchmark -> task -> main metric and its full score.
EXPECTED = {
    "pope": {"pope": ("pope_accuracy", 1), "rcb_pope": ("rcb_pope_accuracy", 1)},
    "mme": {"mme": ("mme_perception_score", 400), "rcb_mme": ("rcb_mme_perception", 400)},
    "mmbench": {
        "mmbench_en_dev": ("gpt_eval_score", 100),
        "mmbench_en_dev_static": ("gpt_eval_score", 100),
        "rcb_mmbench_en_dev": ("rcb_mmbench_circular", 1),
    },
    "seed": {"seedbench": ("seed_image", 1), "rcb_seed_image": ("rcb_seed_accuracy", 1)},
    "realworldqa": {"realworldqa": ("exact_match", 1), "rcb_realworldqa": ("rcb_realworldqa_accuracy", 1)},
    # A caption that equals a reference has every word right.
    "nocaps": {"nocaps_val": ("nocaps_Bleu_1", 1), "rcb_nocaps_val": ("rcb_nocaps_cider", None)},
    "flickr30k": {"flickr30k_test": ("flickr_Bleu_1", 1), "rcb_flickr30k": ("rcb_flickr_cider", None)},
    "mantis": {"mantis": ("mantis_score", 1), "rcb_mantis": ("rcb_mantis_accuracy", 1)},
    "muirbench": {
        "muirbench": ("muirbench_score_overall", 1),
        "rcb_muirbench": ("rcb_muirbench_accuracy", 1),
    },
    "mvbench": {"mvbench": ("mvbench_accuracy", 100), "rcb_mvbench": ("rcb_mvbench_accuracy", 1)},
}
NAMES = [(benchmark, task) for benchmark, own in EXPECTED.items() for task in own]


def parts(tasks, name):
    return list(tasks[name].values()) if name in GROUPS else [tasks[name]]


def right_answer(doc):
    if "candidates" in doc:
        return wordings.LETTERS[doc["candidates"].index(doc["answer"])]
    captions = doc.get("annotations_captions") or doc.get("caption")
    return captions[0] if captions else doc["answer"]


def wrong_answer(doc):
    right = right_answer(doc)
    if right.lower() in ("yes", "no"):
        return {"yes": "No", "no": "Yes"}[right.lower()]
    return {"A": "B"}.get(right, "A") if right in wordings.LETTERS else "nothing whatsoever"


@pytest.mark.parametrize(("benchmark", "name"), NAMES)
def test_the_right_answers_have_the_full_score_and_wrong_ones_less(benchmark, name, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric, full = EXPECTED[benchmark][name]
    for task in parts(tasks, name):
        docs = list(task.eval_docs)
        assert len(docs) > 0
        scores = []
        for answer in (right_answer, wrong_answer):
            items = [task.process_results(doc, [answer(doc)]) for doc in docs]
            items = [item[metric] for item in items if metric in item]
            aggregate = task.aggregation()[metric]
            place = {"args": SimpleNamespace(output_path=str(tmp_path))}
            scores.append(aggregate(items, **place if "args" in inspect.signature(aggregate).parameters else {}))
        assert scores[0] == pytest.approx(full) if full else scores[0] > 1
        assert scores[1] == pytest.approx(0)
        assert all(task.doc_to_target(doc) for doc in docs)


WORDINGS = {
    "mmbench_en_dev_static": (wordings.mmbench,),
    "rcb_mmbench_en_dev": (wordings.mmbench,),
    "seedbench": (wordings.lettered,),
    "rcb_seed_image": (wordings.lettered,),
    "realworldqa": (wordings.realworldqa, wordings.realworldqa_open),
    "rcb_realworldqa": (wordings.realworldqa, wordings.realworldqa_open),
    "mantis": (wordings.mantis, wordings.mantis_short),
    "rcb_mantis": (wordings.rcb_mantis, wordings.mantis_short),
    "muirbench": (wordings.lettered,),
    "rcb_muirbench": (wordings.lettered,),
    "mvbench": (wordings.mvbench,),
    "rcb_mvbench": (wordings.rcb_mvbench,),
}


@pytest.mark.parametrize("name", WORDINGS)
def test_tasks_ask_in_the_words_that_models_are_taught(name, tasks, recorder):
    answers = recorder.answers(*WORDINGS[name])
    for task in parts(tasks, name):
        for doc in task.eval_docs:
            visuals = task.doc_to_visual(doc)
            # Where several images stand is the model's matter; the words are the task's.
            words = re.sub(r"( image \w+: )?<image>\n*", "", task.doc_to_text(doc))
            assert answers[recorder.objects(visuals), words] == right_answer(doc)


@pytest.mark.parametrize("name", ["nocaps_val", "rcb_nocaps_val", "flickr30k_test", "rcb_flickr30k"])
def test_captions_are_asked_for_as_taught_and_the_taught_answer_is_the_first_reference(name, tasks, recorder):
    count = 10 if "nocaps" in name else 5
    for doc in tasks[name].eval_docs:
        assert tasks[name].doc_to_text(doc) in CAPTION_PROMPTS
        captions = doc.get("annotations_captions") or doc["caption"]
        scene = Scene("", 0, "plain", recorder.objects(tasks[name].doc_to_visual(doc)))
        assert captions[0] == sentence(named_objects(scene))
        assert len(set(captions)) == len(captions) == count
        assert all(phrase in text for text in captions for phrase in named_objects(scene) if text != captions[0])


def test_references_agree_in_number():
    texts = [text for n in range(60) for text in caption_data.references(make_scene("test", n), 10)]
    assert not [text for text in texts if re.search(r"\bis (two|three|four)\b|\bare an? ", text)]
    assert any(" are two " in text for text in texts)


def test_domains_and_karpathys_split_are_found_without_being_named(tasks):
    assert [doc["domain"] for doc in tasks["rcb_nocaps_val"].eval_docs] == ["in-domain", "near-domain", "out-domain"]
    assert [doc["filename"] for doc in tasks["rcb_flickr30k_karpathy"].eval_docs] == ["1000.jpg", "1002.jpg"]
    assert len(tasks["rcb_flickr30k"].eval_docs) == 3


def test_columns_are_the_true_ones(tree, tmp_path):
    image, images, texts = Image(), List(Image()), List(Value("string"))
    # Beside columns of text.
    true = {
        "lmms-lab-encoder/MMBench/en/dev": (
            "question hint answer A B C D category L2-category source comment split",
            {"index": Value("int64"), "image": image},
        ),
        "lmms-lab-encoder/SEED-Bench/default/test": (
            "question_id question answer data_type data_id choice_a choice_b choice_c choice_d",
            {"image": images},
        ),
        "lmms-lab-encoder/RealWorldQA/default/test": ("question answer image_path", {"image": image}),
        "lmms-lab-encoder/NoCaps/default/validation": (
            "image_file_name",
            {
                "image": image,
                "image_id": Value("int32"),
                "annotations_ids": List(Value("int32")),
                "annotations_captions": texts,
            },
        ),
        "lmms-lab-encoder/flickr30k/default/test": (
            "img_id filename",
            {"image": image, "caption": texts, "sentids": texts},
        ),
        "TIGER-Lab/Mantis-Eval/default/test": (
            "id question_type question answer data_source category",
            {"images": images, "options": texts},
        ),
        **{
            f"OpenGVLab/MVBench/{name}/train": ("video question answer", {"candidates": texts})
            for name in media_data.SUBTASKS
        },
    }
    for place, (text, others) in true.items():
        (file,) = tree.glob(f"{place}-*.parquet")
        rows = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
        assert rows.features == dict.fromkeys(text.split(), Value("string")) | others


def test_mmbench_turns_every_question_through_all_its_options(tasks):
    rows = [doc for doc in tasks["rcb_mmbench_en_dev"].eval_docs]
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    counts = set()
    for number in range(SIZES["mmbench"]):
        own = [row for row in rows if row["index"] % 1_000_000 == number]
        options = [[row[letter] for letter in "ABCD" if row[letter] != "nan"] for row in own]
        assert len(own) == len(options[0])
        assert {tuple(turned) for turned in options} == {
            tuple(options[0][turn:] + options[0][:turn]) for turn in range(len(own))
        }
        assert len({turned["ABCD".index(row["answer"])] for row, turned in zip(own, options, strict=True)}) == 1
        assert {row["hint"] for row in own} == {"nan"}
        counts.add(len(own))
    assert counts == {2, 3, 4}


def test_questions_with_letters_and_without_are_mixed(tasks):
    kinds = [doc["question_type"] for doc in tasks["rcb_mantis"].eval_docs]
    assert kinds == ["multi-choice", "multi-choice", "short-answer"] * 2
    answers = [doc["answer"] for doc in tasks["rcb_realworldqa"].eval_docs]
    assert [answer in "ABCD" for answer in answers] == [True, True, False] * 2


# MVBench


def test_mvbenchs_subtasks_are_the_true_ones():
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    assert {name: subtask.folder for name, subtask in media_data.SUBTASKS.items()} == DATA_LIST
    kinds = [subtask.kind for subtask in media_data.SUBTASKS.values()]
    assert all(kinds.count(kind) >= 4 for kind in VIDEO_KINDS)
    assert all(media_data.SUBTASKS[kind].kind == kind for kind in VIDEO_KINDS)


def test_videos_are_files_and_episodes_are_folders_of_frames(tasks, recorder):
    upstream = {task.config.task: task for task in parts(tasks, "mvbench")}
    assert len(upstream) == len(tasks["rcb_mvbench"]) == 20
    for name, task in upstream.items():
        for doc in task.eval_docs:
            (path,) = task.doc_to_visual(doc)
            assert len(doc["candidates"]) == media_data.SUBTASKS[name.removeprefix("mvbench_")].options
            frames = VideoReader(max_frames=4).read(path)
            moving = recorder.moving[path]
            # A folder's frames are counted from 1, so that the reader's choice may lie one before a file's.
            for number, frame in zip((4, 12, 20, 28), frames, strict=True):
                drawn = [moving.frame(at, media_data.VIDEO_FRAMES).pixels().astype(int) for at in (number - 1, number)]
                assert min(np.abs(np.asarray(frame) - pixels).mean() for pixels in drawn) < 6


def test_upstream_reads_the_frames_of_an_episode(tasks, tree):
    from lmms_eval.tasks.mvbench import utils

    task = next(task for task in parts(tasks, "mvbench") if task.config.task == "mvbench_episodic_reasoning")
    (doc,) = task.eval_docs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "base_cache_dir", str(tree))
        frames = utils.mvbench_frames_doc_to_visual(doc, task.lmms_eval_specific_kwargs)
    assert [frame.size for frame in frames] == [(168, 168)] * media_data.VIDEO_FRAMES
    assert set(doc["candidates"]) == set(DIRECTIONS)


# Families and the command


def test_llava_next_is_shown_large_scenes_where_there_is_one_image(tmp_path):
    single = [name for name in data.BENCHMARKS if name not in (*data.SEVERAL_IMAGES, "pope", "mme")]
    data.write_data(tmp_path, family="llava_next", benchmarks=single, sizes=dict.fromkeys(single, 1))
    shown = {}
    for file in (tmp_path / "lmms-lab-encoder").rglob("*.parquet"):
        row = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))[0]
        (image,) = row["image"] if isinstance(row["image"], list) else [row["image"]]
        assert max(image.size) > 168
        shown[file.parts[-3]] = image
    assert len(shown) == len(single) == 5
    np.testing.assert_array_equal(np.asarray(shown["flickr30k"]), make_large_scene("test-flickr30k", 0).pixels())


def test_the_command_writes_what_is_named_and_says_what_the_family_answers(tmp_path):
    names = [word for name in ("realworldqa", "mantis") for word in ("--benchmark", name, "--size", f"{name}=2")]
    result = CliRunner().invoke(app, ["lab", "data", "--out", str(tmp_path), *names])
    assert result.exit_code == 0
    assert result.output.splitlines()[-1].endswith(
        "--model llava_rcb --model_args pretrained=lab,keep=36 --tasks rcb_realworldqa"
    )
    assert not (tmp_path / "lmms-lab-encoder/POPE").exists()
    assert data.family_tasks("llava_onevision") == list(data.TASKS.values())
    for size in ("pope", "pope=many", "pope=-1"):
        result = CliRunner().invoke(app, ["lab", "data", "--out", str(tmp_path), "--size", size])
        assert isinstance(result.exception, UserError)
        assert size in result.exception.found

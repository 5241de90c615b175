"""The tasks of the paper's protocol on small trees in the true schemas: prompts, numbers by hand, refusals."""

import importlib
import json
import logging
import math
import sys

import datasets
import numpy as np
import pytest
import task_trees
import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results
from lmms_eval.utils import make_table
from sklearn.metrics import f1_score

from rcb_lmms.errors import UserError
from rcb_lmms.models import ENTRIES
from rcb_lmms.resources import data_dir
from rcb_lmms.runs import host
from rcb_lmms.runs.tasks import make_task_manager, working_directory
from rcb_lmms.scoring import estimates, mmbench, mme, mvbench, pope, schema
from rcb_lmms.scoring.answers import letter, yes_no
from rcb_lmms.scoring.estimates import Term

SINGLE = ("rcb_pope", "rcb_mme", "rcb_mmbench_en_dev", "rcb_seed_image", "rcb_realworldqa")
TASKS = (*SINGLE, "rcb_mantis", "rcb_muirbench", "rcb_mvbench")


@pytest.fixture(scope="module")
def task_manager(tmp_path_factory):
    """Ours, with a group `all` that is `rcb_paper` without the captions, whose scores need Java."""
    manager = make_task_manager()
    file = tmp_path_factory.mktemp("group") / "all.yaml"
    file.write_text(json.dumps({"group": "all", "task": TASKS}))
    manager._task_index["all"] = {"type": "group", "task": -1, "yaml_path": str(file)}
    manager._all_tasks.append("all")
    return manager


def test_only_the_files_of_the_tasks_that_are_asked_for_are_read(task_manager, tmp_path):
    names = ("pope", "mme", "mmbench_en_dev", "mvbench", "rcb_paper")
    own = make_task_manager(tasks=names)
    members = [name for name in own.all_tasks if name.startswith("mvbench_")]
    assert len(members) == 20
    for name in (*names, *members, *TASKS):
        assert own.task_index[name] == task_manager.task_index[name]
    assert len(own.all_tasks) < 100 < len(task_manager.all_tasks)
    (tmp_path / "mine.yaml").write_text("task: mine\ninclude: none\n")
    (tmp_path / "none").write_text("output_type: generate_until\n")
    assert make_task_manager(include_path=tmp_path, tasks=["mine", "pope"]).task_index["mine"]["type"] == "task"
    assert len(make_task_manager(tasks=["pope", "mm*"]).all_tasks) > 1000  # a pattern means any of them


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return task_trees.write_all(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def evaluate(tree, task_manager):
    def run(*tasks, model="default", limit=None, folder=tree):
        scripted = task_trees.Scripted()
        task_manager.model_name = model
        with working_directory(folder):
            results = simple_evaluate(
                model=scripted,
                tasks=list(tasks),
                task_manager=task_manager,
                limit=limit,
                log_samples=True,
                verbosity="ERROR",
            )
        return results, scripted.asked

    return run


@pytest.fixture(scope="module")
def everything(evaluate):
    """All tasks but the captions, run once."""
    return evaluate("all")


def text(asked, task, doc_id=0):
    return asked[task, doc_id][0][-1]["text"]


def value(everything, task, metric):
    return everything[0]["results"][task][f"{metric},none"]


# Answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        (" YES!", "yes"),
        ("Yes, there is no doubt", "yes"),
        ("**Yes**", "yes"),
        ("y", "yes"),
        ("Yes\nNo, wait", "yes"),
        ("There is a dog in the image.", "yes"),
        ("It is. No.", "yes"),
        ("The answer is yes", "yes"),
        ("No", "no"),
        ("no, it isn't", "no"),
        ("N.", "no"),
        ("There is no dog", "no"),
        ("There isn’t a dog", "no"),
        ("The dog is not in the image. Yes.", "no"),
        ("...\nNo", "no"),
        ("", ""),
        (" \n", ""),
        ("a dog", ""),
        ("yes or no", ""),
        ("Please answer yes or no.", ""),
        ("north", ""),
        ("eyes", ""),
        ("nothing", ""),
        ("\x00\x07", ""),
    ],
)
def test_yes_and_no_are_read_by_the_stated_rule(answer, expected):
    assert yes_no(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        (" B.", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("**B**", "B"),
        ("'B'", "B"),
        ("B)", "B"),
        ("B. a cat", "B"),
        ("B.Cat", "B"),
        ("(b) a cat", "B"),
        ("B: a cat", "B"),
        ("B, a cat", "B"),
        ("B\nbecause", "B"),
        ("B - a cat", "B"),
        ("A. A cat", "A"),
        ("The answer is B.", "B"),
        ("The correct answer is (B) a cat", "B"),
        ("Answer: B", "B"),
        ("The best option is option C", "C"),
        ("It must be (D)", "D"),
        ("D", "D"),
        ("", ""),
        ("A cat", ""),
        ("a cat", ""),
        ("The answer is a cat", ""),
        ("The answer is A cat", ""),
        ("Because", ""),
        ("A, B", ""),
        ("either (A) or (B)", ""),
        ("A.M. in the morning", ""),
        ("A's", ""),
        ("E", ""),
        ("E. beyond the last", ""),
        ("1", ""),
        ("\x00", ""),
    ],
)
def test_letters_are_read_by_the_stated_rule(answer, expected):
    assert letter(answer, 4) == expected


# Estimates


def test_a_mean_of_independent_samples_has_the_textbook_error():
    values = np.random.default_rng(0).random(40)
    terms = [Term(v, 1.0, str(n)) for n, v in enumerate(values)]
    assert estimates.score(terms) == pytest.approx(values.mean())
    assert estimates.stderr(terms) == pytest.approx(values.std(ddof=1) / math.sqrt(40))


def test_questions_that_share_an_image_count_as_one_sample():
    rng = np.random.default_rng(1)
    images = rng.random((30, 4))
    terms = [Term(v, 1.0, f"image {n}") for n, own in enumerate(images) for v in own]
    assert estimates.stderr(terms) == pytest.approx(images.mean(1).std(ddof=1) / math.sqrt(30))
    copies = [Term(v, 1.0, f"image {n}") for n, v in enumerate(images[:, 0]) for _ in range(4)]
    alone = [Term(v, 1.0, f"image {n}") for n, v in enumerate(images[:, 0])]
    assert estimates.stderr(copies) == pytest.approx(estimates.stderr(alone))


def pope_rows(rng, images, right):
    rows = []
    for image in range(images):
        skill = rng.normal(right, 0.2)
        for category in pope.CATEGORIES:
            for question in range(6):
                answer = ("yes", "no")[question % 2]
                said = answer if rng.random() < skill else ("no", "yes", "")[rng.integers(3)]
                rows.append(
                    pope.process({"answer": answer, "image_source": str(image), "category": category}, [said])[
                        "rcb_pope_accuracy"
                    ]
                )
    return rows  # fmt: skip


def test_popes_errors_are_the_spread_over_new_images():
    # Each data set is a fresh draw of 20 images, so the spread of its scores is what the error estimates.
    rng = np.random.default_rng(2)
    draws = [pope_rows(rng, 20, 0.75) for _ in range(150)]
    for score, error in ((pope.accuracy, pope.accuracy_stderr), (pope.f1, pope.f1_stderr)):
        spread = np.std([score(rows) for rows in draws], ddof=1)
        assert np.mean([error(rows) for rows in draws]) == pytest.approx(spread, rel=0.15)


def test_popes_f1_is_scikit_learns():
    rows = pope_rows(np.random.default_rng(3), 20, 0.6)
    expected = []
    for category in pope.CATEGORIES:
        own = [row for row in rows if row["category"] == category]
        said, true = ([row[name] for row in own] for name in ("prediction", "answer"))
        expected.append(f1_score(true, said, labels=["yes"], average="macro"))
        assert pope.f1(own) == pytest.approx(expected[-1])
    assert pope.f1(rows) == pytest.approx(np.mean(expected))
    assert pope.f1([{**row, "prediction": "no"} for row in rows]) == 0.0


def test_errors_that_the_samples_do_not_show_are_not_given():
    one = [Term(1.0, 1.0, "image"), Term(0.0, 1.0, "image")]
    assert estimates.stderr(one) == "N/A"
    assert estimates.stderr([*one, Term(1.0, 1.0, "another", "second stratum")]) == "N/A"
    assert estimates.stderr([Term(0.0, 0.0, "a"), Term(0.0, 0.0, "b")]) == "N/A"
    assert (estimates.score([]), estimates.stderr([])) == ("N/A", "N/A")


# Prompts: what the paper asks


def test_llava_is_asked_pope_in_its_own_words(everything, evaluate):
    question = "Is there a dog in the image?"
    assert text(everything[1], "rcb_pope") == question + "\nAnswer the question using a single word or phrase."
    for model in (f"llava_{method}" for method in ENTRIES["llava"]):
        assert pope.PROMPTS[model] is pope.PROMPTS["llava_rcb"]
    _, asked = evaluate("rcb_pope", model="llava_rcb", limit=2)
    assert text(asked, "rcb_pope") == question + " Please answer this question with one word."
    _, asked = evaluate("rcb_pope", model="llava_next_rcb", limit=2)
    assert text(asked, "rcb_pope").endswith("single word or phrase.")


def test_prompts_are_the_papers(everything):
    _, asked = everything
    ending = "\nAnswer with the option's letter from the given choices directly."
    assert text(asked, "rcb_mme") == "Is there a dog? Please answer yes or no."
    options = "There are several options:\nA. red\nB. blue\nC. green\n" + ending
    assert text(asked, "rcb_mmbench_en_dev", 0) == f"Look closely. Which colour 0? {options}"
    assert (
        text(asked, "rcb_mmbench_en_dev", 1) == "Which colour 1? There are several options:\nA. cat\nB. dog\n" + ending
    )
    assert text(asked, "rcb_seed_image") == "What is it?\nA. cat\nB. dog\nC. cow\nD. owl" + ending
    assert text(asked, "rcb_realworldqa") == "Which way?\nA. left\nB. right\nPlease answer with the letter."
    short = (
        "Given the images, answer the following short answer vqa question:\nQ: How many <image> cats?\n"
        'You can first give your analysis, and then give your final answer as "Final Answer:"'
    )
    assert text(asked, "rcb_mantis", 0) == "<image><image>Which is it?\n (A) cat\n (B) dog" + ending
    assert text(asked, "rcb_mantis", 1) == "First <image> or <image>?\n A. cat\n (B) dog" + ending
    assert text(asked, "rcb_mantis", 2) == "<image>" + short
    assert text(asked, "rcb_muirbench", 0) == "Which of <image>\n and <image>\n?\nA. first\nB. second" + ending
    assert text(asked, "rcb_muirbench", 1) == "<image>\nWhich?\nA. <image>\n\nB. none" + ending
    video = "Question: What happens?\nOptions:\n(A) it opens\n(B) it closes\nOnly give the best option."
    assert text(asked, "rcb_mvbench_state_change") == video


def test_generation_is_greedy_and_short(everything):
    for _, arguments in everything[1].values():
        assert (arguments["max_new_tokens"], arguments["do_sample"]) == (16, False)


def test_media_are_the_documents(everything, tree):
    _, asked = everything
    assert [item["type"] for item in asked["rcb_seed_image", 0][0]] == ["image", "text"]
    assert [item["type"] for item in asked["rcb_mantis", 0][0]] == ["image", "image", "text"]
    video, _ = asked["rcb_mvbench_state_change", 0][0]
    assert video == {"type": "video", "url": str(tree / "mvbench_video/perception/videos/state_change_0.mp4")}
    folder, _ = asked["rcb_mvbench_episodic_reasoning", 0][0]
    assert folder["type"] == "video"


# Scores, by hand; the answers are in task_trees.py


def test_pope_by_hand(everything):
    # Right: random 4 of 4, popular 3 of 4 ("" for a no), adversarial 1 of 2.
    assert value(everything, "rcb_pope", "rcb_pope_accuracy") == pytest.approx((1 + 3 / 4 + 1 / 2) / 3)
    # F1: random 1; popular 2 yes found, none wrongly: 1; adversarial: a wrong yes and a right one: 2 / 3.
    for category, expected in (("random", 1), ("popular", 1), ("adversarial", 2 / 3)):
        assert value(everything, "rcb_pope", f"rcb_pope_f1_{category}") == pytest.approx(expected)
    assert value(everything, "rcb_pope", "rcb_pope_f1") == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert value(everything, "rcb_pope", "rcb_pope_yes_ratio") == pytest.approx(6 / 10)
    # Below the means of 3/4 and 1/2, image a has one of its 4 popular and one of its 2 adversarial answers wrong:
    # 2 * (1/4) / 4 / 3 + (1/2) / 2 / 3 = 1/8, which image b has above. Two clusters: sqrt(2 * 2 * (1/8)^2).
    assert value(everything, "rcb_pope", "rcb_pope_accuracy_stderr") == pytest.approx(1 / 4)


def test_mme_by_hand(everything):
    # existence: both right, one right -> (200 + 50) / 2; color: none -> 0; OCR: 200. Cognition: 50.
    assert value(everything, "rcb_mme", "rcb_mme_perception") == pytest.approx(125 + 0 + 200)
    assert value(everything, "rcb_mme", "rcb_mme_cognition") == pytest.approx(50)
    # Subtasks of one image do not show their error.
    assert value(everything, "rcb_mme", "rcb_mme_perception_stderr") == "N/A"


def test_mme_agrees_with_upstream_on_plain_answers_and_has_the_stratified_error(caplog):
    rng = np.random.default_rng(4)
    ours, theirs, images = [], [], {}
    for category in mme.SUBTASKS["perception"]:
        for image in range(60):
            scores = []
            for answer in ("Yes", "No"):
                said = ("Yes", "No.")[rng.integers(2)]
                doc = {"category": category, "question_id": f"{image}.png", "answer": answer}
                ours.append(mme.process(doc, [said])["rcb_mme_perception"])
                theirs.append(mme_process_results(doc, [said])["mme_perception_score"])
                scores.append(ours[-1]["score"])
            images.setdefault(category, []).append(50 * sum(scores) + 100 * min(scores))
    assert mme.total(ours) == pytest.approx(mme_aggregate_results(theirs))
    assert not caplog.records
    variance = sum(np.var(own, ddof=1) / len(own) for own in images.values())
    assert mme.total_stderr(ours) == pytest.approx(math.sqrt(variance), rel=0.02)
    with caplog.at_level(logging.WARNING):
        assert mme.total(ours[:-1]) != mme.total(ours)
    assert "1 images with one answered question" in caplog.text


def test_mmbench_by_hand(everything):
    # Question 0: all three rotations right; question 1: one of two wrong; question 2: right throughout.
    assert value(everything, "rcb_mmbench_en_dev", "rcb_mmbench_circular") == pytest.approx(2 / 3)
    assert value(everything, "rcb_mmbench_en_dev", "rcb_mmbench_vanilla") == pytest.approx(1.0)
    error = np.std([1, 0, 1], ddof=1) / math.sqrt(3)
    assert value(everything, "rcb_mmbench_en_dev", "rcb_mmbench_circular_stderr") == pytest.approx(error)


def test_incomplete_circular_groups_are_left_out_and_said(evaluate, caplog):
    # The file has all first orders first: after four of seven passes only question 2, asked once, is whole.
    with caplog.at_level(logging.WARNING, logger=mmbench.__name__):
        results, _ = evaluate("rcb_mmbench_en_dev", limit=4)
        assert results["results"]["rcb_mmbench_en_dev"]["rcb_mmbench_circular,none"] == 1.0
        assert "2 of 3 questions were not answered in all their rotations" in caplog.text
        results, _ = evaluate("rcb_mmbench_en_dev", limit=2)
    assert results["results"]["rcb_mmbench_en_dev"]["rcb_mmbench_circular,none"] == "N/A"


@pytest.mark.parametrize(
    ("task", "metric", "expected"),
    [
        ("rcb_seed_image", "rcb_seed_accuracy", 2 / 3),
        ("rcb_realworldqa", "rcb_realworldqa_accuracy", 4 / 6),
        ("rcb_mantis", "rcb_mantis_accuracy", 3 / 5),
        ("rcb_muirbench", "rcb_muirbench_accuracy", 2 / 3),
        ("rcb_mvbench_state_change", "rcb_mvbench_accuracy", 1 / 2),
        ("rcb_mvbench_episodic_reasoning", "rcb_mvbench_accuracy", 1.0),
    ],
)
def test_accuracies_by_hand(everything, task, metric, expected):
    assert value(everything, task, metric) == pytest.approx(expected)


def test_mvbench_is_the_mean_of_its_twenty_subtasks_and_counts_empty_answers(everything):
    results, _ = everything
    assert len(results["group_subtasks"]["rcb_mvbench"]) == 20
    # All right but for state_change, half of whose answers are empty.
    assert results["groups"]["rcb_mvbench"]["rcb_mvbench_accuracy,none"] == pytest.approx((19 + 1 / 2) / 20)
    assert results["groups"]["rcb_mvbench"]["rcb_mvbench_accuracy_stderr,none"] == pytest.approx(0.5 / 20)


def test_seed_leaves_videos_out_and_knows_images_without_their_ids(everything, tmp_path):
    results, _ = everything
    assert results["n-samples"]["rcb_seed_image"]["original"] == 3
    clusters = [row["rcb_seed_accuracy"]["cluster"] for row in results["samples"]["rcb_seed_image"]]
    assert clusters[0] == clusters[1] != clusters[2]


def test_no_wrong_error_is_printed(everything):
    results, _ = everything
    for task in results["results"].values():
        others = {name: error for name, error in task.items() if "_stderr_" in name}
        assert set(map(str, others.values())) <= {"N/A"}
    table = make_table(json.loads(json.dumps(results, default=str)))
    (line,) = (line for line in table.splitlines() if "|rcb_mmbench_circular " in line)
    assert [cell.strip() for cell in line.split("|")][-3:-1] == ["±", "0.3333"]
    assert "CLT" not in table


def test_samples_rows_carry_score_and_cluster(everything):
    results, _ = everything
    for task in (*SINGLE, "rcb_mantis", "rcb_muirbench", "rcb_mvbench_state_change"):
        for row in results["samples"][task]:
            scored = [name for name in row if name.startswith("rcb_") and not name.endswith("_stderr")]
            assert scored
            assert all(0 <= row[name]["score"] <= 1 and row[name]["cluster"] for name in scored)
    rows = results["samples"]["rcb_muirbench"]
    assert rows[0]["rcb_muirbench_accuracy"]["cluster"] == rows[2]["rcb_muirbench_accuracy"]["cluster"]


# Data that cannot be scored


@pytest.mark.parametrize(
    ("module", "benchmark", "change", "found"),
    [
        ("pope", "pope", lambda row: {k: v for k, v in row.items() if k != "category"}, "no category; there are: "),
        ("pope", "pope", lambda row: row | {"answer": "maybe"}, "row 0 has 'maybe'"),
        ("pope", "pope", lambda row: row | {"image": "a.png"}, "image is text"),
        ("mme", "mme", lambda row: row | {"question_id": row["question"] + row["answer"]}, "images without a pair"),
        ("mme", "mme", lambda row: row | {"category": "smell"}, "row 0 has 'smell'"),
        ("mmbench", "mmbench", lambda row: row | {"index": str(row["index"])}, "index is text"),
        ("seed", "seed", lambda row: row | {"data_type": "video"}, "no row whose data_type is image"),
        ("realworldqa", "realworldqa", lambda row: row | {"answer": 3}, "answer is integer"),
        ("mantis", "mantis", lambda row: row | {"options": "cat, dog"}, "options is text"),
        ("mantis", "mantis", lambda row: row | {"answer": "C"}, "row 0 has 'C'"),
        ("muirbench", "muirbench", lambda row: row | {"answer": "AB"}, "row 0 has 'AB'"),
    ],
)
def test_a_wrong_data_set_is_named_before_anything_is_asked(module, benchmark, change, found):
    dataset = task_trees.dataset(benchmark, change)
    with pytest.raises(UserError) as error:
        importlib.import_module(f"rcb_lmms.scoring.{module}").check(dataset)
    assert found in error.value.found


def test_an_empty_split_is_refused():
    dataset = task_trees.dataset("pope").select([])
    with pytest.raises(UserError, match="no rows"):
        schema.check_columns(dataset, pope.SOURCE, {})


def test_missing_videos_are_counted(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with working_directory(tree):
        dataset = datasets.load_dataset(
            mvbench.SOURCE, "state_change", split="train", cache_dir=str(tmp_path / "cache")
        )
        assert mvbench.check(dataset)[0]["subtask"] == "state_change"
    with working_directory(tmp_path), pytest.raises(UserError) as error:
        mvbench.check(dataset)
    assert error.value.found == (
        f"2 of 2 are missing, the first: {tmp_path}/mvbench_video/perception/videos/state_change_0.mp4"
    )
    (tmp_path / "mvbench_video/data0613/perception/videos").mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"mvbench_video/data0613/perception/videos/state_change_{number}.mp4").touch()
    with working_directory(tmp_path):
        mvbench.check(dataset)


# Through the console script


def test_a_wrong_data_set_ends_lmms_eval_at_once(tmp_path, checkpoint, monkeypatch, capsys):
    folder = task_trees.write(tmp_path / "tree", "pope", lambda row: {k: v for k, v in row.items() if k != "category"})
    arguments = ["--model", "llava_full", "--model_args", f"pretrained={checkpoint}", "--tasks", "rcb_pope"]
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *arguments, "--verbosity", "ERROR"])
    with working_directory(folder), pytest.raises(SystemExit) as stop:
        host.main()
    assert stop.value.code == 2
    assert "found:   no category; there are:" in capsys.readouterr().err


def test_the_console_script_runs_them_on_a_model(tree, tmp_path, checkpoint, monkeypatch):
    arguments = ["--model", "llava_full", "--model_args", f"pretrained={checkpoint}", "--tasks", ",".join(SINGLE[:2])]
    output = ["--output_path", str(tmp_path), "--log_samples", "--batch_size", "4", "--verbosity", "ERROR"]
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *arguments, *output])
    with working_directory(tree), pytest.raises(SystemExit) as stop:
        host.main()
    assert stop.value.code == 0
    (file,) = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    assert 0 <= results["rcb_pope"]["rcb_pope_accuracy,none"] <= 1
    assert results["rcb_mme"]["rcb_mme_perception,none"] >= 0


def test_the_papers_group_names_every_benchmark(task_manager):
    group = yaml.safe_load((data_dir("tasks") / "rcb_paper.yaml").read_text())
    assert set(group["task"]) == {*TASKS, "rcb_nocaps_val", "rcb_flickr30k"}
    assert set(group["task"]) <= set(task_manager.all_tasks)
    readme = (data_dir("tasks") / "README.md").read_text()
    assert all(
        f"`{name}`" in readme for name in task_manager.all_tasks if name.startswith("rcb_") and "mvbench_" not in name
    )

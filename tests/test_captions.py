"""CIDEr and SPICE of the caption tasks: against pycocoevalcap, with a real and a failing Java, in a run and after it.

SPICE runs on its true jars; only its parser, which needs CoreNLP's models, is replaced by `tests/java`: every word of
a caption is an object.
"""

import hashlib
import http.server
import json
import logging
import os
import random
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from typer.testing import CliRunner

from rcb_lmms.cli import app
from rcb_lmms.engine.options import Generation
from rcb_lmms.errors import UserError
from rcb_lmms.resources import data_dir
from rcb_lmms.runs import doctor
from rcb_lmms.runs.folder import run_evaluation
from rcb_lmms.runs.tasks import working_directory
from rcb_lmms.scoring import caption_images, captions, corenlp, java, spice
from rcb_lmms.scoring.rescore import add_scores

JAVA = shutil.which("java")
WORDS = "a the two red small dog dogs cat man's U.S. runs, sits on near table; café and 3.5 don't (quickly)".split()
PROMPT = (
    "Describe the provided image in one sentence.\n"
    "Please provide detailed and specific descriptions of the key information in the picture."
)


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """A cache of the test's own, the stand-in for CoreNLP, and nothing remembered from other tests."""
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    for name in (caption_images.NOCAPS_ANNOTATIONS, caption_images.FLICKR30K_SPLITS):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "corenlp"
    folder.mkdir()
    tokenizer = corenlp.pycocoevalcap_dir() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    (folder / corenlp.JARS[0]).symlink_to(tokenizer)
    with zipfile.ZipFile(folder / corenlp.JARS[1], "w") as jar:
        parser = "edu/anu/spice/SpiceParser.class"
        jar.write(Path(__file__).parent / "java" / parser, parser)
    monkeypatch.setenv(corenlp.VARIABLE, str(folder))
    captions._tokens.clear()
    caption_images.say.cache_clear()
    return tmp_path


@pytest.fixture
def java_calls(tmp_path, monkeypatch):
    """Put a `java` on the PATH that logs, does what a shell line says, and then is the real one; returns the log."""

    def install(line: str = "") -> Path:
        script, log = tmp_path / "bin" / "java", tmp_path / "java.log"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\necho "$*" >> {log}\nlog={log}\n{line}\nexec {JAVA} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
        return log

    return install


@pytest.fixture
def no_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))


def calls(log: Path, program: str) -> int:
    return sum(program in line for line in log.read_text().splitlines())


def corpus(count: int = 24, seed: int = 0) -> list[dict]:
    """Results of `process_results` for random captions, five references each."""
    draw = random.Random(seed)

    def sentence():
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 9))).capitalize() + "."

    docs = [
        {"image_id": index, "annotations_captions": [sentence() for _ in range(5)]}
        | {"domain": caption_images.DOMAINS[index % 3]}
        for index in range(count)
    ]
    return [
        captions.nocaps_results(doc, [draw.choice([sentence(), doc["annotations_captions"][index % 5]])])
        for index, doc in enumerate(docs)
    ]


def items_of(rows: list[dict], metric: str) -> list[dict]:
    return [row[metric] for row in rows if metric in row]


def upstream_cider(items: list[dict]) -> tuple[float, list[float]]:
    references = {item["image_id"]: [{"caption": text} for text in item["answer"]] for item in items}
    answers = {item["image_id"]: [{"caption": item["pred"]}] for item in items}
    mean, scores = Cider().compute_score(PTBTokenizer().tokenize(references), PTBTokenizer().tokenize(answers))
    return float(mean), list(scores)


@pytest.mark.parametrize("metric", ["rcb_nocaps_cider", "rcb_nocaps_cider_in", "rcb_nocaps_cider_out"])
def test_cider_is_pycocoevalcaps_also_of_a_domain_as_a_set_of_its_own(metric):
    items = sorted(items_of(corpus(), metric), key=lambda item: str(item["image_id"]))
    mean, scores = upstream_cider(items)
    assert mean > 0.5
    assert captions.aggregate(items) == pytest.approx(mean, abs=1e-12)
    assert [item["score"] for item in items] == pytest.approx(scores, abs=1e-12)


def test_all_metrics_of_a_run_tokenise_once_and_parse_once(java_calls):
    log = java_calls()
    rows = corpus()
    values = {metric: captions.aggregate(items_of(rows, metric)) for metric in sorted({m for row in rows for m in row})}
    assert len(values) == 6 + 2
    assert None not in values.values()
    assert calls(log, "PTBTokenizer") == 2  # references and captions
    assert calls(log, "BatchScores") == 1
    domains = [values[f"rcb_nocaps_spice_{name}"] for name in ("in", "near", "out")]
    assert values["rcb_nocaps_spice"] == pytest.approx(sum(domains) / 3, abs=1e-12)


def test_the_order_in_which_processes_report_does_not_matter():
    rows = corpus()
    items = items_of(rows, "rcb_nocaps_cider")
    shuffled = [dict(item) for item in items]
    random.Random(1).shuffle(shuffled)
    captions._tokens.clear()
    assert captions.aggregate(items) == captions.aggregate(shuffled)


def test_no_character_of_a_caption_shifts_the_others():
    nasty = ["a\rb", "a\u2028b", "a\x0bb\x85c", "", " ", "a\x00b\x1b[0m", "x\n\ny", "\ud800 z", "the last one."]
    made = captions.tokenize(nasty)
    assert made[:5] == ["a b", "a b", "a b c", "", ""]
    assert made[6] == "x y"
    assert made[-1] == "the last one"
    assert captions.tokenize(["the end.", ""]) == ["the end", ""]


def test_spice_is_the_f_score_over_propositions():
    samples = [
        ("a red dog", ["a dog", "red ball"]),  # 2 of 2 right, 2 of 3 found
        ("a sofa", ["couch"]),  # synonyms of WordNet
        ("a cat", ["a house"]),
        ("", ["a house"]),
    ]
    assert spice.spice_scores(samples) == pytest.approx([0.8, 1.0, 0.0, 0.0])


def test_spice_goes_on_where_java_died(java_calls, monkeypatch):
    monkeypatch.setattr(spice, "BATCH", 2)
    words = ["red dog", "dog ball", "red", "ball", "dog red ball"]
    samples = [(text, ["red ball", "dog"]) for text in words]
    whole = [spice.spice_scores([sample])[0] for sample in samples]
    shutil.rmtree(spice._store().parent)
    log = java_calls('case "$*" in *BatchScores*) [ "$(grep -c BatchScores $log)" = 2 ] && kill -9 $$;; esac')
    with pytest.raises(UserError, match="signal SIGKILL"):
        spice.spice_scores(samples)
    assert len(spice._store().read_text().splitlines()) == 2
    assert spice.spice_scores(samples) == whole
    assert calls(log, "BatchScores") == 2 + 2
    assert spice.spice_scores(samples) == whole
    assert calls(log, "BatchScores") == 4


def test_scores_that_java_did_not_write_are_not_taken_for_finished(java_calls):
    java_calls('case "$*" in *BatchScores*) exit 0;; esac')
    with pytest.raises(UserError, match="no readable scores"):
        spice.spice_scores([("dog", ["dog"])])
    assert not spice._store().exists()


@pytest.mark.parametrize(
    ("banner", "opened"), [('java version "1.8.0_312"', 0), ('openjdk version "17.0.15"', 7), ("something else", 7)]
)
def test_modules_are_opened_where_java_closes_them(java_calls, banner, opened):
    java_calls(f"echo '{banner}' >&2; exit 0")
    command = java.java_command("Main", [Path("a.jar"), Path("b.jar")], ["x"], memory="8G")
    assert command[:2] == ["java", "-Xmx8G"]
    assert sum(part.startswith("--add-opens=") for part in command) == opened
    assert ("--add-opens=java.base/java.lang=ALL-UNNAMED" in command) is bool(opened)
    assert command[-4:] == ["-cp", "a.jar:b.jar", "Main", "x"]


def test_the_class_path_has_our_driver_first_and_the_jars_of_pycocoevalcap_behind_corenlp(own_places):
    jars = spice.spice_jars()
    assert (jars[0] / "edu/anu/spice/BatchScores.class").is_file()
    assert jars[1:3] == [own_places / "corenlp" / name for name in corenlp.JARS]
    assert jars[3].name == "spice-1.0.jar"
    assert {"fst-2.47.jar", "Meteor-1.5.jar"} <= {jar.name for jar in jars[4:]}
    assert all(jar.exists() for jar in jars)


def test_an_error_of_the_true_scorer_is_told_in_one_line(own_places):
    with zipfile.ZipFile(own_places / "corenlp" / corenlp.JARS[1], "w"):
        pass
    (own_places / "corenlp" / corenlp.JARS[0]).unlink()
    with zipfile.ZipFile(own_places / "corenlp" / corenlp.JARS[0], "w"):
        pass
    with pytest.raises(UserError) as error:
        spice.spice_scores([("dog", ["dog"])])
    assert "edu.anu.spice.BatchScores ended with status 1" in error.value.found
    assert "edu.stanford.nlp.semgraph.semgrex.SemgrexPattern" in error.value.found


def test_absent_and_damaged_jars_are_told_and_nothing_else_is_taken(own_places, monkeypatch):
    fetched = own_places / "cache" / "corenlp"
    shutil.copytree(own_places / "corenlp", fetched)
    (own_places / "corenlp" / corenlp.JARS[1]).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError) as error:
        corenlp.corenlp_jars()
    assert str(own_places / "corenlp") in error.value.found
    assert "rcb doctor --fetch-spice" in error.value.next_step
    monkeypatch.delenv(corenlp.VARIABLE)
    monkeypatch.setattr(corenlp, "pycocoevalcap_dir", lambda: own_places)
    assert corenlp.corenlp_jars() == [fetched / name for name in corenlp.JARS]
    shutil.rmtree(fetched)
    with pytest.raises(UserError, match=r"stanford-corenlp-3\.6\.0-models\.jar"):
        corenlp.corenlp_jars()
    check = doctor._spice()
    assert (check.ok, check.essential) == (False, False)
    assert "CIDEr does not need it" in check.cost


def test_without_java_a_metric_is_blank_and_the_captions_are_kept(no_java, tmp_path, caplog, monkeypatch):
    rows = corpus()
    with caplog.at_level(logging.WARNING):
        blank = [captions.aggregate(items_of(rows, metric)) for metric in rows[0]]
    assert blank == [None] * 4
    assert "CIDEr is left blank: not found" in caplog.text
    (kept,) = (tmp_path / "cache" / "captions").glob("*.jsonl")
    assert f"rcb captions {kept}" in caplog.text
    monkeypatch.setenv("PATH", f"{Path(JAVA).parent}:/usr/bin:/bin")
    (samples,) = add_scores([kept])
    assert samples.scores["rcb_nocaps_cider_near"] == captions.aggregate(items_of(rows, "rcb_nocaps_cider_near"))
    assert samples.results is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("exit 3", "does not start"),
        ('case "$*" in *PTBTokenizer*) echo "Error: no space" >&2; exit 1;; esac', "status 1: Error: no space"),
        ('case "$*" in *PTBTokenizer*) kill -9 $$;; esac', "signal SIGKILL"),
        ('case "$*" in *PTBTokenizer*) echo one; exit 0;; esac', "1 lines from Java"),
    ],
)
def test_java_that_fails_or_dies_is_no_score(java_calls, caplog, line, found):
    java_calls(line)
    with caplog.at_level(logging.WARNING):
        assert captions.aggregate(items_of(corpus(), "rcb_nocaps_cider")) is None
    assert found in caplog.text


@pytest.fixture
def server(tmp_path):
    """A server of one file, `archive.zip`, that keeps a log of the ranges asked for and can stop early."""
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for name in corenlp.JARS:
            opened.writestr(f"{corenlp.RELEASE}/{name}", b"PK" + name.encode() * 5000)

    class Handler(http.server.BaseHTTPRequestHandler):
        asked, stop_after = [], None

        def do_GET(self):
            content, wanted = archive.read_bytes(), self.headers.get("Range")
            self.asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : self.stop_after])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/archive.zip", Handler, archive
        running.shutdown()


def test_a_broken_download_goes_on_and_ends_in_the_jars_that_are_then_found(server, own_places, monkeypatch):
    address, handler, _ = server
    handler.stop_after = 1000
    with pytest.raises(UserError, match="the connection ended after 1000 of"):
        corenlp.fetch_corenlp(address)
    handler.stop_after = None
    jars = corenlp.fetch_corenlp(address)
    assert handler.asked == [None, "bytes=1000-"]
    home = own_places / "cache" / "corenlp"
    assert sorted(file.name for file in home.iterdir()) == ["source.json", *sorted(corenlp.JARS)]
    record = json.loads((home / "source.json").read_text())
    for jar, name in zip(jars, corenlp.JARS, strict=True):
        content = b"PK" + name.encode() * 5000
        assert jar.read_bytes() == content
        assert record["sha256"][name] == hashlib.sha256(content).hexdigest()


def test_a_complete_download_that_was_not_unpacked_is_not_fetched_again(server, own_places):
    address, handler, archive = server
    home = own_places / "cache" / "corenlp"
    home.mkdir(parents=True)
    shutil.copy(archive, home / f"{corenlp.RELEASE}.zip.part")
    assert all(jar.is_file() for jar in corenlp.fetch_corenlp(address))
    assert len(handler.asked) == 1


def test_a_damaged_archive_is_refused_and_removed(server, own_places):
    address, _, archive = server
    content = bytearray(archive.read_bytes())
    content[5000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match="damaged archive"):
        corenlp.fetch_corenlp(address)
    assert list((own_places / "cache" / "corenlp").iterdir()) == []


def test_no_connection_says_how_to_do_without(monkeypatch, capsys):
    with pytest.raises(UserError) as error:
        corenlp.fetch_corenlp("http://127.0.0.1:9/archive.zip")
    assert corenlp.VARIABLE in error.value.next_step


def nocaps(count: int = 3, **columns) -> Dataset:
    rows = [
        {
            "image": tiny.random_image(index),
            "image_id": index,
            "annotations_captions": [f"A dog and {index} cats.", "Two red dogs sit near a table."],
        }
        | {name: values[index] for name, values in columns.items()}
        for index in range(count)
    ]
    return Dataset.from_list(rows)


def flickr(count: int = 3, **columns) -> Dataset:
    rows = [
        {
            "image": tiny.random_image(10 + index),
            "caption": [f"A man with {index} dogs.", "A man walks his dogs."],
            "img_id": str(index),
            "filename": f"{index}.jpg",
        }
        | {name: values[index] for name, values in columns.items()}
        for index in range(count)
    ]
    return Dataset.from_list(rows)


def annotations(path: Path, domains: list[str]) -> str:
    path.write_text(json.dumps({"images": [{"id": i, "domain": name} for i, name in enumerate(domains)]}))
    return str(path)


def test_nocaps_takes_its_domains_from_the_authors_file_or_goes_without(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        assert "domain" not in caption_images.nocaps_docs(nocaps()).column_names
    assert "NoCaps: overall scores only; RCB_NOCAPS_ANNOTATIONS=" in caplog.text
    names = list(caption_images.DOMAINS)
    monkeypatch.setenv(caption_images.NOCAPS_ANNOTATIONS, annotations(tmp_path / "a.json", names))
    assert list(caption_images.nocaps_docs(nocaps())["domain"]) == names
    assert list(caption_images.nocaps_docs(nocaps(domain=names[::-1]))["domain"]) == names[::-1]
    monkeypatch.setenv(caption_images.NOCAPS_ANNOTATIONS, annotations(tmp_path / "b.json", names[:2]))
    with pytest.raises(UserError, match="no image 2 in it"):
        caption_images.nocaps_docs(nocaps())
    monkeypatch.setenv(caption_images.NOCAPS_ANNOTATIONS, annotations(tmp_path / "c.json", ["in", "near", "out"]))
    with pytest.raises(UserError, match="unchanged"):
        caption_images.nocaps_docs(nocaps())
    with pytest.raises(UserError, match="row 1 has 'inner'"):
        caption_images.nocaps_docs(nocaps(domain=["in-domain", "inner", "in-domain"]))


def test_karpathys_split_comes_from_a_column_or_his_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the variable is not set"):
        caption_images.karpathy_docs(flickr())
    split = ["train", "test", "val"]
    assert list(caption_images.karpathy_docs(flickr(split=split))["img_id"]) == ["1"]
    images = [{"filename": f"{number}.jpg", "split": name} for number, name in enumerate(split)]
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": images}))
    monkeypatch.setenv(caption_images.FLICKR30K_SPLITS, str(file))
    assert list(caption_images.karpathy_docs(flickr())["img_id"]) == ["1"]
    with pytest.raises(UserError, match="0 of them in the data set"):
        caption_images.karpathy_docs(flickr(1))


def test_what_will_be_blank_is_said_before_generation(no_java, caplog):
    with caplog.at_level(logging.WARNING):
        caption_images.flickr_docs(flickr())
    assert "CIDEr and SPICE will be left blank: not found; apt-get install" in caplog.text
    assert "rcb captions SAMPLES.jsonl scores them later" in caplog.text


def test_missing_jars_are_said_before_generation_and_a_whole_machine_says_nothing(own_places, caplog):
    with caplog.at_level(logging.WARNING):
        caption_images.flickr_docs(flickr())
    assert caplog.text == ""
    (own_places / "corenlp" / corenlp.JARS[0]).unlink()
    with caplog.at_level(logging.WARNING):
        caption_images.flickr_docs(flickr())
    assert "SPICE will be left blank: no stanford-corenlp-3.6.0.jar" in caplog.text
    assert "CIDEr and" not in caplog.text


def test_foreign_columns_and_images_without_references_are_refused():
    with pytest.raises(UserError, match="no caption"):
        caption_images.flickr_docs(flickr().remove_columns("caption"))
    with pytest.raises(UserError, match="none in row 0, 1, 2"):
        caption_images.flickr_docs(flickr().map(lambda row: {"caption": []}, load_from_cache_file=False))


def write_task_data(folder: Path) -> Path:
    """A folder in which the caption tasks find three documents each."""
    rows = [{"image": tiny.random_image(20 + i), "question": f"Describe {i}.", "answer": "A dog."} for i in range(3)]
    detailed = Dataset.from_list(rows)
    sets = {"NoCaps": ("validation", nocaps(6)), "flickr30k": ("test", flickr()), "DC100_EN": ("test", detailed)}
    for name, data in sets.items():
        tiny.save_data(folder / "lmms-lab-encoder" / name, {"default": data})
    return folder


TASKS = ["rcb_nocaps_val", "rcb_flickr30k", "rcb_dc100"]


def our_tasks(entry: str):
    """A task manager of our tasks alone, which is quick to make."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=str(data_dir("tasks")), include_defaults=False, model_name=entry)


@pytest.fixture
def runs(checkpoint, tmp_path, monkeypatch):
    """Run the caption tasks on a tiny model, whose random bytes become words; returns the run's folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(Generation, "cut", lambda _, text: f"Two dogs, {len(text)} cats: {WORDS[len(text) % 20]}.")
    tree, tasks = write_task_data(tmp_path / "tree"), our_tasks("llava_full")

    def run(name: str) -> Path:
        arguments, out = {"pretrained": checkpoint}, tmp_path / name
        with working_directory(tree):
            return run_evaluation("llava_full", arguments, TASKS, out, batch_size=8, task_manager=tasks)

    return run


def scores_of(run: Path) -> dict[str, dict]:
    """Metrics of each task, and every sample's score."""
    table = json.loads((run / "results.json").read_text())["results"]
    return {
        task: {key: value for key, value in table[task].items() if key.split(",")[0].startswith("rcb_")}
        | {
            (row["doc_id"], key): value["score"]
            for row in map(json.loads, (run / f"samples_{task}.jsonl").read_text().splitlines())
            for key, value in row.items()
            if key.startswith("rcb_") and isinstance(value, dict)
        }
        for task in TASKS
    }


def test_scores_added_after_a_run_without_java_are_those_of_the_run_with_it(runs, tmp_path, monkeypatch):
    names = [caption_images.DOMAINS[index % 3] for index in range(6)]
    with_java, file = tmp_path / "with", annotations(tmp_path / "domains.json", names)
    monkeypatch.setenv(caption_images.NOCAPS_ANNOTATIONS, file)
    whole = scores_of(runs(with_java.name))
    nocaps_scores = whole["rcb_nocaps_val"]
    assert nocaps_scores["rcb_nocaps_cider,none"] is not None
    assert nocaps_scores["rcb_nocaps_cider_stderr_clt,none"] > 0
    assert {key for key in nocaps_scores if key[0] == 0} == {
        (0, f"rcb_nocaps_{kind}{part}") for kind in ("cider", "spice") for part in ("", "_in")
    }
    assert whole["rcb_dc100"]["rcb_dc100_words,none"] > 0
    # The other machine has neither Java nor the file of the domains.
    shutil.rmtree(tmp_path / "cache")
    captions._tokens.clear()
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.delenv(caption_images.NOCAPS_ANNOTATIONS)
    run = runs("without")
    blank = json.loads((run / "results.json").read_text())["results"]
    assert blank["rcb_flickr30k"]["rcb_flickr_cider,none"] is None
    assert blank["rcb_dc100"]["rcb_dc100_words,none"] == whole["rcb_dc100"]["rcb_dc100_words,none"]
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv(caption_images.NOCAPS_ANNOTATIONS, file)
    captions._tokens.clear()
    files = [str(run / f"samples_{task}.jsonl") for task in TASKS[:2]]
    shown = CliRunner().invoke(app, ["captions", *files])
    assert shown.exit_code == 0, shown.exception
    assert "rcb_nocaps_spice_out" in shown.output
    after = scores_of(run)
    for task in TASKS:
        assert after[task].keys() >= {key for key in whole[task] if "clustered" not in key and "_stderr," not in key}
        for key, value in whole[task].items():
            if not isinstance(value, str):
                assert after[task][key] == pytest.approx(value, abs=1e-15), key
    assert "java" in json.loads((run / "results.json").read_text())["rcb_captions"]["rcb_nocaps_val"]["spice"]
    refuse_a_partial_file(run)


def refuse_a_partial_file(run: Path) -> None:
    """Here, because it needs a finished run."""
    samples, results = run / "samples_rcb_nocaps_val.jsonl", (run / "results.json").read_text()
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(UserError, match=r"4 samples, where results.json has 6"):
        add_scores([samples])
    assert (run / "results.json").read_text() == results
    (run / "results.json").write_text(results[:100])
    with pytest.raises(UserError, match="damaged"):
        add_scores([samples])


def write_samples(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "rows", "found"),
    [
        ("samples_x.jsonl", [], "no sample"),
        ("samples_x.jsonl", [{"doc_id": 0, "pope_accuracy": {"score": 1.0}}], "a row without a caption: doc_id"),
        ("samples_x.jsonl", [{"doc_id": 0, **row} for row in corpus(2)], "samples that appear twice"),
        ("results.json", [], "another name"),
    ],
)
def test_foreign_files_are_refused_before_any_work(tmp_path, name, rows, found):
    with pytest.raises(UserError, match=found):
        add_scores([write_samples(tmp_path / name, rows)])
    with pytest.raises(UserError, match="no such file"):
        add_scores([tmp_path / "samples_y.jsonl"])


def test_cider_is_written_before_spice_is_tried(tmp_path, own_places):
    (own_places / "corenlp" / corenlp.JARS[0]).unlink()
    file = write_samples(tmp_path / "samples_x.jsonl", [{"doc_id": i, **row} for i, row in enumerate(corpus(6))])
    with pytest.raises(UserError, match="SPICE, which parses"):
        add_scores([file])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all("score" in row["rcb_nocaps_cider"] and "score" not in row["rcb_nocaps_spice"] for row in rows)


@pytest.mark.parametrize(("entry", "length"), [("llava_rcb", 64), ("llava_next_fastv", 256), ("default", 64)])
def test_prompt_and_lengths_are_the_papers(entry, length, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with working_directory(write_task_data(tmp_path / "tree")):
        from lmms_eval.tasks import get_task_dict

        tasks = get_task_dict(TASKS, our_tasks(entry))
    for name, expected in zip(TASKS, (length, length, 512), strict=True):
        assert tasks[name].config.generation_kwargs == {
            "max_new_tokens": expected,
            "do_sample": False,
            "num_beams": 1,
            "until": [],
        }
    assert {tasks[name].doc_to_text(tasks[name].test_docs()[0]) for name in TASKS[:2]} == {PROMPT}
    assert tasks["rcb_dc100"].doc_to_text(tasks["rcb_dc100"].test_docs()[1]) == "Describe 1."

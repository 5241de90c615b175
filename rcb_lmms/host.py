"""`lmms_eval`, the command people know: stock lmms-eval with our tasks on its include path and a true exit status."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms import errors
from rcb_lmms.errors import UserError
from rcb_lmms.files import unwritable, write_atomic
from rcb_lmms.local_videos import use_local_videos
from rcb_lmms.models.command import check_command
from rcb_lmms.models.invocation import argument, configured_runs
from rcb_lmms.resources import data_dir

if TYPE_CHECKING:
    from rcb_lmms.models.ledger import RunRecord

# The subcommands of lmms-eval that do not evaluate; they take no --include_path.
OTHER_COMMANDS = {"tasks", "models", "ui", "serve", "power", "version", "tui", "mcp"}


def main() -> None:
    """Run lmms-eval on this process's arguments.

    Exit status: 0 if every run wrote its results whole and every sample was answered, 1 if a run crashed, a sample
    failed or a file is missing or cut off, 2 for an error in the input.
    """
    evaluates = len(sys.argv) > 1 and sys.argv[1] not in OTHER_COMMANDS and not {"-h", "--help"} & set(sys.argv)
    if not evaluates:
        _dispatch()
        return
    errors.exit_at_once = True
    use_local_videos()
    with errors.exit_on_user_error(), contextlib.ExitStack() as stack:
        if not _names_include_path():
            sys.argv += ["--include_path", str(data_dir("tasks"))]
        check_command()
        started = time.time()
        problems = _watch_errors()
        from rcb_lmms.models.ledger import RUNS

        RUNS.clear()  # of earlier calls in this process, which say nothing about this one
        outputs = _outputs()
        if outputs:
            from rcb_lmms.models import journal

            if _rank() == 0:
                for output in outputs:
                    stack.enter_context(_alone_in(output))
            journal.folder = outputs[0] / ".answers"
        try:
            _dispatch()
        except SystemExit as stop:
            if stop.code:  # lmms-eval leaves with status 0 after some errors
                raise
        status = _status(started, problems, outputs)
        if outputs and status == 0 and _rank() == 0:
            journal.forget(journal.folder)
        sys.exit(status)


@contextlib.contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Hold an output folder: lmms-eval names files by the second, so two commands in one folder would mix theirs.

    Raises:
        UserError: another command writes there, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".rcb.lock", timeout=0)
        lock.acquire()
    except OSError as error:
        if not isinstance(error, Timeout):
            raise unwritable(output, error) from error
        raise UserError(
            wanted=f"write results into {output}",
            found="another lmms_eval that is writing there now",
            allowed="one command per output folder at a time",
            next_step=f"wait for it, or: --output_path {output}-2",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _names_include_path() -> bool:
    """Whether the command line or its configuration file chooses an include path, which ours must not replace."""
    return argument("--include_path") is not None or any("include_path" in run for run in configured_runs())


def _watch_errors() -> list[str]:
    """Errors that lmms-eval logs and then forgets: a crashed run would leave with status 0."""
    from loguru import logger

    problems: list[str] = []

    def watch(record) -> None:
        if record["name"] == "lmms_eval.__main__" and record["level"].name == "ERROR":
            problems.append(record["message"])

    # lmms-eval removes the sinks it finds; a patcher outlives that.
    logger.configure(patcher=watch)
    return problems


def _dispatch() -> None:
    from lmms_eval.cli.dispatch import main as lmms_eval_main

    lmms_eval_main()


def _status(started: float, problems: list[str], outputs: list[Path]) -> int:
    from rcb_lmms.models.ledger import RUNS

    if _rank() != 0:
        return 0
    done = [run for run in RUNS if run.totals]
    if outputs:
        fresh = {file for own in outputs for file in own.rglob("*_results.json") if file.stat().st_mtime >= started}
        problems += _complete_results(sorted(fresh, key=lambda file: file.stat().st_mtime), done)
    for run in RUNS:
        if run.failures:
            first = run.failures[0]
            problems.append(
                f"{run.model}: {len(run.failures)} samples failed and are in no metric; the first: "
                f"{first['task']} {first['doc_id']}: {first['error']}"
            )
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _complete_results(files: list[Path], runs: list[RunRecord]) -> list[str]:
    """Add to each results file of this process the record of its run, under the key `rcb`.

    Returns:
        What is not whole: runs without a results file, results or samples that are cut off, one text each.
    """
    problems, left = [], list(runs)
    for file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            if "config" not in results:  # a task's own file, such as MMBench's
                continue
        except ValueError:
            problems.append(f"{file} is cut off")
            continue
        run = next((run for run in left if _made(run, results)), None)
        if run is not None:
            left.remove(run)
            problems += _missing_samples(file, results, run)
            write_atomic(file, json.dumps(results | {"rcb": asdict(run)}, indent=2))
    for run in left:
        problems.append(
            f"the results of {run.model} could not be saved (a file in the place of a folder, or a full disk); its "
            "answers are kept: mend that and repeat the command"
        )
    return problems


def _made(run: RunRecord, results: dict[str, Any]) -> bool:
    """Whether a results file is that of a run: the same entry, the same arguments, the same tasks."""
    from lmms_eval.utils import simple_parse_args_string

    given = simple_parse_args_string(results["config"]["model_args"] or "")
    asked = {name: str(value) for name, value in given.items()}
    tasks = {*run.achieved, *(failure["task"] for failure in run.failures)}
    return run.model == results["config"]["model"] and asked.items() <= run.arguments.items() and tasks <= set(
        results["n-samples"]
    )  # fmt: skip


def _missing_samples(file: Path, results: dict[str, Any], run: RunRecord) -> list[str]:
    """Which samples files that were asked for are not there whole."""
    asked = "--log_samples" in sys.argv or any(own.get("log_samples") for own in configured_runs())
    if not asked:
        return []
    problems = []
    for task, counts in results["n-samples"].items():
        samples = file.with_name(file.name.replace("_results.json", f"_samples_{task}.jsonl"))
        expected = counts["effective"] - sum(failure["task"] == task for failure in run.failures)
        lines = samples.read_bytes().splitlines(keepends=True) if samples.is_file() else []
        whole = sum(line.endswith(b"\n") for line in lines)
        if whole != expected or whole != len(lines):
            problems.append(f"{samples} holds {whole} whole samples of {expected}; answers are kept, repeat the run")
    return problems


def _outputs() -> list[Path]:
    """Output folders of this command: its own, or those of the runs in its configuration file."""
    if output := argument("--output_path"):
        return [Path(output)]
    named = [run.get("output_path") for run in configured_runs()]
    return [Path(output) for output in dict.fromkeys(named) if isinstance(output, str) and output]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


if __name__ == "__main__":  # torchrun and accelerate start modules: torchrun -m rcb_lmms.host --model ...
    main()

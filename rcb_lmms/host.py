"""`lmms_eval`, the command people know: stock lmms-eval with our tasks on its include path and a true exit status."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rcb_lmms import errors
from rcb_lmms.files import write_atomic
from rcb_lmms.local_videos import use_local_videos
from rcb_lmms.resources import data_dir

if TYPE_CHECKING:
    from rcb_lmms.models.ledger import RunRecord

# The subcommands of lmms-eval that do not evaluate; they take no --include_path.
OTHER_COMMANDS = {"tasks", "models", "ui", "serve", "power", "version", "tui", "mcp"}


def main() -> None:
    """Run lmms-eval on this process's arguments.

    Exit status: 0 if every run wrote its results and every sample was answered, 1 if a run crashed or a sample failed,
    2 for an error in the input.
    """
    evaluates = len(sys.argv) > 1 and sys.argv[1] not in OTHER_COMMANDS and not {"-h", "--help"} & set(sys.argv)
    if not evaluates:
        _dispatch()
        return
    errors.exit_at_once = True
    use_local_videos()
    with errors.exit_on_user_error():
        if not _names_include_path():
            sys.argv += ["--include_path", str(data_dir("tasks"))]
        started = time.time()
        problems = _watch_errors()
        from rcb_lmms.models.ledger import RUNS

        RUNS.clear()  # of earlier calls in this process, which say nothing about this one
        outputs = _outputs()
        if outputs:
            from rcb_lmms.models import journal

            journal.folder = outputs[0] / ".answers"
        try:
            _dispatch()
        except SystemExit as stop:
            if stop.code:  # lmms-eval leaves with status 0 after some errors
                raise
    status = _status(started, problems)
    if outputs and status == 0 and _rank() == 0:
        journal.forget(journal.folder)
    sys.exit(status)


def _names_include_path() -> bool:
    """Whether the command line or its configuration file chooses an include path, which ours must not replace."""
    config = _argument("--config")
    text = Path(config).read_text() if config and Path(config).is_file() else ""
    return "include_path" in text or _argument("--include_path") is not None


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


def _status(started: float, problems: list[str]) -> int:
    from rcb_lmms.models.ledger import RUNS

    if _rank() != 0:
        return 0
    fresh = {
        file for output in _outputs() for file in output.rglob("*_results.json") if file.stat().st_mtime >= started
    }
    _complete_results(sorted(fresh, key=lambda file: file.stat().st_mtime), [run for run in RUNS if run.totals])
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


def _complete_results(files: list[Path], runs: list[RunRecord]) -> None:
    """Add to each results file of this process the record of its run, under the key `rcb`."""
    from lmms_eval.utils import simple_parse_args_string

    for file in files:
        results = json.loads(file.read_text())
        if "config" not in results:  # a task's own file, such as MMBench's
            continue
        asked = {name: str(value) for name, value in simple_parse_args_string(results["config"]["model_args"]).items()}
        for run in runs:
            if run.model == results["config"]["model"] and asked.items() <= run.arguments.items():
                runs.remove(run)
                write_atomic(file, json.dumps(results | {"rcb": asdict(run)}, indent=2))
                break


def _outputs() -> list[Path]:
    """Output folders of this command: its own, or those of the runs in its configuration file."""
    if output := _argument("--output_path"):
        return [Path(output)]
    if not (config := _argument("--config")):
        return []
    import yaml

    runs = yaml.safe_load(Path(config).read_text())
    runs = runs if isinstance(runs, list) else [runs]
    return [Path(output) for output in dict.fromkeys(run.get("output_path") for run in runs) if output]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _argument(name: str) -> str | None:
    for position, argument in enumerate(sys.argv):
        if argument == name and position + 1 < len(sys.argv):
            return sys.argv[position + 1]
        if argument.startswith(name + "="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":  # torchrun and accelerate start modules: torchrun -m rcb_lmms.host --model ...
    main()

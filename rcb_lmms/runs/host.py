"""`lmms_eval`, the command people know: stock lmms-eval with our tasks on its include path and a true exit status.

lmms-eval's own command logs what an evaluation raises and leaves with status 0. So the evaluations of a command line
are started here, each by lmms-eval's own function for one; all its other commands are lmms-eval's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError, exit_on_user_error
from rcb_lmms.files import write_atomic
from rcb_lmms.models.command import check_command
from rcb_lmms.models.invocation import Context, argument, calm_bars, configured_runs, evaluating
from rcb_lmms.models.task_data import check_data, failure
from rcb_lmms.resources import data_dir
from rcb_lmms.runs.folder import locked
from rcb_lmms.runs.local_videos import use_local_videos

if TYPE_CHECKING:
    from rcb_lmms.models.record import RunRecord

# The subcommands of lmms-eval that do not evaluate, and the flag that only computes a sample size.
OTHER_COMMANDS = {"tasks", "models", "ui", "serve", "power", "version", "tui", "mcp"}
OTHER_FLAGS = {"-h", "--help", "--power-analysis"}


def main() -> None:
    """Run lmms-eval on this process's arguments.

    Exit status: 0 if every run wrote its results whole and every sample was answered, 1 if a run crashed, a sample
    failed or a file is missing or cut off, 2 for an error in the input.
    """
    if sys.argv[1:2] == ["eval"] and len(sys.argv) > 2:
        del sys.argv[1]
    words = sys.argv[1:]
    if not words or words[0] in {"eval", *OTHER_COMMANDS} or OTHER_FLAGS & set(words):
        from lmms_eval.cli.dispatch import main as lmms_eval_main

        lmms_eval_main()
        return
    calm_bars()
    use_local_videos()
    with exit_on_user_error(), contextlib.ExitStack() as stack:
        check_command()
        outputs = _outputs()
        for output in outputs if _rank() == 0 else ():
            stack.enter_context(locked(output))
        context = Context(answers=outputs[0] / ".answers" if outputs else None)
        started = time.time()
        with evaluating(context):
            problems = _evaluate(context)
        status = _status(started, problems, context.records, outputs)
        if context.answers and status == 0 and _rank() == 0:
            from rcb_lmms.models.journal import forget

            forget(context.answers)
        sys.exit(status)


def _evaluate(context: Context) -> list[str]:
    """Make the runs of the command line one after the other, and print what each comes to.

    Returns:
        Why runs could not be made, one text each, where others could be.

    Raises:
        UserError: arguments that lmms-eval refuses, or every run failed in a way that the user can mend.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from lmms_eval.__main__ import cli_evaluate_single

    runs = _runs()
    # As lmms-eval's own command does: one process may score for hours while the others wait for it.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=60000))])
    failed = []
    for run in runs:
        known = len(context.records)
        loggers = _loggers(run) if accelerator.is_main_process else []
        try:
            if isinstance(run.tasks, str):
                check_data([name.strip() for name in run.tasks.split(",")], run.include_path)
            results, samples = cli_evaluate_single(run)
        except Exception as error:  # whatever a data set, a model or a scorer raises
            told = failure(str(run.tasks), error)
            if told is None or len(runs) == 1:
                raise told or error from error
            failed.append(f"the run of {run.model} on {run.tasks}: {told.found}; next: {told.next_step}")
            continue
        accelerator.wait_for_everyone()
        if results is not None:
            _show(run, results, context.records[known:])
            for logger in loggers:
                _log(logger, results, samples if run.log_samples else None)
    return failed


def _runs() -> list[argparse.Namespace]:
    """The arguments of each run: those of the command line over those of the configuration file over the defaults.

    Raises:
        UserError: keys of the file that are no arguments.
    """
    from lmms_eval.__main__ import parse_eval_args
    from loguru import logger

    parser, given = parse_eval_args()
    defaults = parser.parse_args([])
    explicit = {name: value for name, value in vars(given).items() if value != getattr(defaults, name, None)}
    runs = []
    for configured in configured_runs() or [{}]:
        os.environ |= {name: os.path.expandvars(str(value)) for name, value in (configured.get("env") or {}).items()}
        own = {name: value for name, value in configured.items() if name != "env"}
        if unknown := sorted(own.keys() - vars(defaults).keys()):
            raise UserError(
                wanted=f"the run of {configured.get('model')} in {given.config}",
                found=f"the unknown keys {', '.join(map(str, unknown))}",
                allowed="the arguments of lmms_eval without their dashes, and env",
                next_step="correct the file",
            )
        run = argparse.Namespace(**{**vars(defaults), **own, **explicit})
        paths = run.include_path or []
        run.include_path = [str(data_dir("tasks")), *([paths] if isinstance(paths, str) else paths)]
        runs.append(run)
    logger.remove()
    logger.add(sys.stderr, level=given.verbosity, format="<level>{level}</level> {name}: {message}")
    os.environ["VERBOSITY"] = given.verbosity
    return runs


def _loggers(run: argparse.Namespace) -> list[Any]:
    """The services that --wandb_args and --swanlab_args name, as lmms-eval's own command starts them."""
    from lmms_eval import loggers, utils

    made = []
    for given, name, kind in (
        (run.wandb_args, "name", loggers.WandbLogger),
        (run.swanlab_args, "exp_name", loggers.SwanLabLogger),
    ):
        if given:
            title = f"{run.model}_{run.model_args}_{utils.get_datetime_str(timezone=run.timezone)}"
            settings = {name: utils.sanitize_long_string(title), **utils.simple_parse_args_string(given)}
            made.append(kind(**settings))
    return made


def _log(service: Any, results: dict[str, Any], samples: dict[str, Any] | None) -> None:
    service.post_init(results)
    service.log_eval_result()
    if samples is not None:
        service.log_eval_samples(samples)


def _show(run: argparse.Namespace, results: dict[str, Any], records: list[RunRecord]) -> None:
    """Print the scores as lmms-eval does, and below them what they cost: a row a task."""
    from lmms_eval.utils import make_table

    from rcb_lmms.models.record import cost_table

    print(f"{run.model} ({run.model_args}), limit: {run.limit}, batch_size: {run.batch_size}\n")
    scores = {**results, "throughput": {}} if records else results
    print(make_table(scores))
    if "groups" in results:
        print(make_table(scores, "groups"))
    for record in records:
        print(cost_table(record), flush=True)


def _status(started: float, problems: list[str], records: list[RunRecord], outputs: list[Path]) -> int:
    if _rank() != 0:
        return 0
    if outputs:
        fresh = {file for own in outputs for file in own.rglob("*_results.json") if file.stat().st_mtime >= started}
        done = [run for run in records if run.totals]
        problems += _complete_results(sorted(fresh, key=lambda file: file.stat().st_mtime), done)
    for run in records:
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


if __name__ == "__main__":  # torchrun and accelerate start modules: torchrun -m rcb_lmms.runs.host --model ...
    main()

"""`rcb quickstart`: every method on the laboratory model at two budgets, then table, plot, pictures and report."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.runs.side_by_side import workers

if TYPE_CHECKING:
    from rcb_lmms.report.collect import Excluded

TASKS = ("pope", "mme")
# Images of POPE, 18 questions each, and per subtask of MME, two questions each.
SIZES = {"pope": 60, "mme": 60}
# A quarter and a ninth of the laboratory model's 144 visual tokens.
BUDGETS = (36, 16)
METHODS = ("rcb", "prumerge", "prumerge_plus", "fastv")
SEEDS = (42, 0, 1234)
BATCH_SIZE = 64
SCENES = 3
FAMILY = "llava"


@dataclass(frozen=True)
class Step:
    """One run: its folder's name, the method and its model_args."""

    name: str
    method: str
    arguments: dict[str, Any]

    @property
    def entry(self) -> str:
        """lmms-eval model id."""
        return f"{FAMILY}_{'full' if self.method == 'none' else self.method}"


def steps(
    pretrained: str,
    codebook: str | None = None,
    budgets: Sequence[int] = BUDGETS,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] = METHODS,
) -> list[Step]:
    """The runs of the quickstart: unpruned, then each method at each budget, random once per seed.

    Raises:
        UserError: a method that is unknown, or runs anyway.
    """
    from rcb_lmms.pruners import PRUNERS
    from rcb_lmms.pruners.checks import check_choice

    for method in methods:
        check_choice("a method of the quickstart", method, [name for name in PRUNERS if name not in ("none", "random")])
    planned = [Step("full", "none", {"pretrained": pretrained})]
    for keep in budgets:
        common = {"pretrained": pretrained, "keep": keep}
        for method in methods:
            own = {"codebook": codebook} if method == "rcb" and codebook else {}
            if "text_embeddings" in PRUNERS[method].needs:  # of a CLIP model, which a laboratory does not download
                own = dict(PRUNERS[method].elsewhere)
            planned.append(Step(f"{method}-{keep}", method, common | own))
        planned += [Step(f"random-{keep}-seed{seed}", "random", common | {"seed": seed}) for seed in seeds]
    return planned


def quickstart(
    out: Path,
    *,
    pretrained: str = "lab",
    codebook: str | None = None,
    budgets: Sequence[int] = BUDGETS,
    seeds: Sequence[int] = SEEDS,
    sizes: Mapping[str, int] = SIZES,
    methods: Sequence[str] = METHODS,
    at_once: int = 1,
) -> Path:
    """Run the comparison below `out` and say where everything lies; finished runs are not repeated.

    Args:
        out: a folder, new or of a quickstart that was interrupted.
        pretrained: `lab`, or another LLaVA-1.5 checkpoint (its codebook must then be named).
        codebook: file or id; by default the laboratory's.
        budgets: retained visual tokens per image, of which RCB and PruMerge meet the mean.
        seeds: of random pruning.
        sizes: of the laboratory's benchmarks.
        methods: keys of the registry, beside the unpruned model and random pruning. A budget that a method cannot meet
            is said, and costs the others nothing.
        at_once: runs that are made side by side, in processes of their own, which import the caller's main module.

    Raises:
        UserError: no checkpoint or codebook, samples that failed, a folder that cannot be written.
    """
    began = time.perf_counter()
    out = Path(out).resolve()
    pretrained, codebook = _absolute(pretrained), _absolute(codebook)
    _check_inputs(pretrained, codebook)
    planned = steps(pretrained, codebook, budgets, seeds, methods)
    log = write_atomic(out / "log.txt", "")
    prepare = functools.partial(_prepare, pretrained)
    with _quiet(log), workers(at_once, prepare, log) as work:
        data = _write_data(out / "data", sizes)
        for number, told in enumerate(work(_run, [(step, out / "runs", data) for step in planned]), 1):
            print(f"[{number:2}/{len(planned)}] {told}", flush=True)
        print("writing the table, the plot, pictures and the report", flush=True)
        tables, page = work(_write_tables, [(out,)]), work(_write_page, [(out, data)])
        pictures = work(_draw_pictures, [(planned, out, keep) for keep in budgets])
        ((table, excluded),) = tables
        print(table, flush=True)
        for rest in (page, pictures):
            list(rest)
        write_atomic(out / "index.md", f"# Quickstart\n\n{index(out)}\n")
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{len(planned)} runs, {minutes:.1f} minutes. Everything is in {out}:\n{index(out)}")
    if excluded:
        print(f"{len(excluded)} folders are in no table; table.md says why")
    arguments = ",".join([f"pretrained={pretrained}", "keep=24", *([f"codebook={codebook}"] if codebook else [])])
    print(f"next: open {out / 'report.html'} in a browser, or measure another budget:")
    print(f"next: cd {data} && lmms_eval --model {FAMILY}_rcb --model_args {arguments} --tasks {','.join(TASKS)}")
    return out


def _absolute(path: str | None) -> str | None:
    """Runs work inside the data folder, where a relative path would mean another file."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def _check_inputs(pretrained: str, codebook: str | None) -> None:
    """Refuse before minutes of work what would fail after them."""
    from rcb_lmms.codebook import Codebook
    from rcb_lmms.families import default_codebook
    from rcb_lmms.lab.checkpoint import lab_checkpoint

    if pretrained == "lab":
        lab_checkpoint(FAMILY)
    Codebook.load(codebook or default_codebook(FAMILY, pretrained))


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Progress bars and warnings of fifteen runs go to a file; errors still end the program."""
    with log.open("a", encoding="utf-8") as handle, contextlib.redirect_stderr(handle):
        yield


def _write_data(data: Path, sizes: Mapping[str, int]) -> Path:
    """The laboratory's benchmarks, unless they are there in these sizes."""
    from rcb_lmms.lab.data import write_data

    told = " ".join(f"{name}={size}" for name, size in sizes.items()) + "\n"
    done = data / "sizes.txt"
    if not done.exists():
        write_data(data, benchmarks=TASKS, sizes=sizes)
        write_atomic(done, told)
    elif done.read_text() != told:
        raise UserError(
            wanted=f"laboratory data with {told.strip()}",
            found=f"{data} with {done.read_text().strip()}",
            allowed="one size per folder: runs over different samples cannot be compared",
            next_step="name another folder: --out",
        )
    return data


def _prepare(pretrained: str) -> None:
    """Import what runs need."""
    from lmms_eval import evaluator  # noqa: F401

    from rcb_lmms.families import load_family

    _tasks()
    load_family(pretrained, family=FAMILY)


def _run(step: Step, runs: Path, data: Path) -> str:
    """Make a run, and say its name and what became of it."""
    from rcb_lmms.runs.folder import finished, locked, run_evaluation
    from rcb_lmms.runs.tasks import working_directory

    name = f"{step.name:<22}"
    with working_directory(data), locked(runs / step.name):
        done, began = finished(runs / step.name), time.perf_counter()
        try:
            options = {"batch_size": BATCH_SIZE, "task_manager": None if done else _tasks()}
            run_evaluation(step.entry, step.arguments, list(TASKS), runs / step.name, **options)
        except BudgetError as error:
            return f"{name}refused: {error.wanted}; {error.allowed}"
    return f"{name}done before" if done else f"{name}{time.perf_counter() - began:5.1f} s"


@functools.cache
def _tasks() -> Any:
    from rcb_lmms.runs.tasks import make_task_manager

    return make_task_manager(tasks=TASKS)


def _write_tables(out: Path) -> tuple[str, list[Excluded]]:
    """The table for a terminal, and folders that are in no table."""
    from rcb_lmms.report.collect import collect
    from rcb_lmms.report.plots import accuracy_plot
    from rcb_lmms.report.tables import for_terminal, write_tables

    runs, excluded = collect(out / "runs")
    table = write_tables(runs, excluded, out)
    accuracy_plot(table, out / "accuracy")
    return for_terminal(table), excluded


def _write_page(out: Path, data: Path) -> None:
    from rcb_lmms.report.html import write_report

    write_report(out / "runs", out / "report.html", [data])


def _draw_pictures(planned: Sequence[Step], out: Path, keep: int) -> None:
    """What each method keeps of example images at one budget."""
    from rcb_lmms.families import load_family
    from rcb_lmms.models.arguments import resolve
    from rcb_lmms.pruners import PRUNERS
    from rcb_lmms.report.pictures import fitted, kept_tokens_picture
    from rcb_lmms.runs.folder import finished

    chosen = {}
    family = load_family(planned[0].arguments["pretrained"], family=FAMILY)
    images = [family.open(image).image for image in example_images()]
    for step in planned:
        whole = finished(out / "runs" / step.name)
        drawn = whole and PRUNERS[step.method].stage != "pixels"  # whose tokens are none of the image's
        if drawn and step.arguments.get("keep") == keep and step.method not in chosen:
            pruner = resolve(FAMILY, step.method, step.arguments).pruner
            chosen[step.method] = fitted(family, pruner, images, keep)
    kept_tokens_picture(family, chosen, images, out / f"kept_tokens_{keep}.png")


def example_images() -> list[Any]:
    """Three scenes of the laboratory's POPE and the two photographs that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from rcb_lmms.lab.scenes import make_scene

    scenes = [make_scene("test", number).image() for number in range(SCENES)]
    return scenes + [Image.fromarray(photograph) for photograph in load_sample_images().images]


def index(out: Path) -> str:
    """What lies in a quickstart folder, as Markdown."""
    pictures = sorted(path.name for path in out.glob("kept_tokens_*.png"))
    lines = [
        "- `report.html`: all of it in one file for a browser, with the samples on which methods differ",
        "- `table.md`, `table.csv`: every method and budget: accuracy, tokens, relative performance, speed",
        "- `comparisons.csv`: every method against random pruning, task by task, with p-values",
        "- `accuracy.png`, `accuracy.svg`: accuracy over retained visual tokens",
        f"- {', '.join(f'`{name}`' for name in pictures)}: which visual tokens each method keeps "
        "(rcb and prumerge keep as many on average over the images shown, so that their counts differ)",
        "- `runs/NAME/`: `run.json` (arguments, versions, budgets), `results.json` and every sample's answer",
        "- `log.txt`: warnings and progress of the latest call",
        "- `data/`: the laboratory's benchmarks; lmms-eval's own tasks run from here, offline",
    ]
    return "\n".join(lines)

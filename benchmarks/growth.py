"""How time and memory grow with images and with questions, and what a second process gains.

    python benchmarks/growth.py [--repeats 3] [--out benchmarks/results]

The laboratory's LLaVA-1.5 with RCB at 36 of 144 tokens answers 18 questions about each of up to 240 images, and up to
540 questions about each of 8 images: a factor of 30 in both. What is remembered of images and prompts is bounded to
16 MB, so that memory is seen to be flat long before a benchmark fills the bounds that sessions have. Then one process
answers 18 questions about each of 120 images, and two share them, each on a core of its own: each has half the images,
as the entries deal them, or takes its turn of the questions, as lmms-eval does, and sees every image.

Every measurement is a process of its own, and medians count; loading is timed apart, and memory is the peak above that
after loading and warming up. The last line is one JSON object; then `growth.png` is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rcb_lmms.resources import machine

KEEP, IMAGES, QUESTIONS, FACTORS = 36, 8, 18, (1, 3, 10, 30)
SHARED = 120  # images of the two processes
STORE_BYTES = 16 << 20


def point(folder: Path, first: int, images: int, each: int, turn: int, turns: int) -> dict[str, float]:
    """Seconds and peak memory of one run in this process; it begins when a line comes in, so that several meet."""
    from rcb_lmms import Budget, Question, Session, make_pruner
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.engine.prefix import PrefixCache
    from rcb_lmms.families import load_family

    family, pruner = load_family("lab"), make_pruner("rcb", codebook="lab-llava", budget=Budget.tokens(KEEP))
    encoder = ImageEncoder(family, pruner.needs, store_bytes=STORE_BYTES)
    session = Session(family, pruner, batch_size=32, encoder=encoder)
    session.prefixes = PrefixCache(family, store_bytes=STORE_BYTES)
    asked = [
        Question(f"Is there a red circle in the image? ({number})", [folder / f"{image}.png"])
        for image in range(first, first + images)
        for number in range(each)
    ][turn::turns]
    session.answer(asked[:64], max_new_tokens=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, wall = time.process_time(), time.perf_counter()
    answers = session.answer(asked, max_new_tokens=4)
    spent = {"cpu_s": time.process_time() - cpu, "s": time.perf_counter() - wall}
    assert not any(answer.error for answer in answers)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"questions": len(asked), **spent, "peak_mb": after / 1024, "peak_above_mb": (after - before) / 1024}


def run(folder: Path, shares: list[tuple[int, int]], each: int, turns: int = 1) -> list[dict[str, float]]:
    """Runs of `point` that begin together, one for each share `(first image, images)`, each on a core of its own.

    Where questions are dealt out in turns, all have the same images, and every run takes its turn of the questions.
    """
    started = []
    for turn, ((first, images), core) in enumerate(zip(shares, cores(), strict=False)):
        counts = map(str, (first, images, each, turn % turns, turns))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, __file__, "--point", str(folder), *counts], env=own, **pipes)
        os.sched_setaffinity(process.pid, {core})
        started.append(process)
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate()[0] for process in started]
    return [json.loads(text.splitlines()[-1]) for text in told]


def growth(folder: Path, images: int, each: int, repeats: int) -> dict[str, float]:
    """Medians of a run on one core."""
    found = [run(folder, [(0, images)], each)[0] for _ in range(repeats)]
    return {
        "images": images,
        "each": each,
        **{name: statistics.median(own[name] for own in found) for name in found[0]},
    }


def cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def two_processes(folder: Path, images: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of one process and of two: of these the slower one's, which have the images or the questions in turn."""
    if len(cores()) < 2:
        return []
    half, whole = images // 2, [(0, images)]
    ways = {
        "one": (whole, 1),
        "two, by images": ([(0, half), (half, images - half)], 1),
        "two, in turn": (whole * 2, 2),
    }
    spent: dict[str, list[list[dict[str, float]]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (shares, turns) in ways.items():
            spent[name].append(run(folder, shares, QUESTIONS, turns))
    rows = []
    for name, rounds in spent.items():
        row: dict[str, Any] = {"processes": name, "questions": images * QUESTIONS}
        row |= {unit: statistics.median(max(own[unit] for own in both) for both in rounds) for unit in ("cpu_s", "s")}
        first = rows[0] if rows else row
        rows.append(row | {f"times one, {unit}": first[unit] / row[unit] for unit in ("cpu_s", "s")})
    return rows


def plot(rows: dict[str, list[dict[str, float]]], out: Path) -> None:
    """Processor seconds, dotted where in proportion to the first, and peak memory over the number of questions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    for name, own in rows.items():
        counts = [row["questions"] for row in own]
        (line,) = seconds.loglog(counts, [row["cpu_s"] for row in own], "o-", label=f"more {name}")
        linear = [own[0]["cpu_s"] * count / counts[0] for count in counts]
        seconds.loglog(counts, linear, ":", color=line.get_color(), label="_in proportion")
        memory.semilogx(counts, [row["peak_mb"] for row in own], "o-", label=f"more {name}")
    seconds.set(xlabel="questions", ylabel="processor seconds")
    highest = max(row["peak_mb"] for own in rows.values() for row in own)
    memory.set(xlabel="questions", ylabel="peak memory, MB", ylim=(0, 1.2 * highest))
    seconds.legend(frameon=False)
    memory.legend(frameon=False, loc="lower right")
    for panel in (seconds, memory):
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
    figure.suptitle("laboratory model, one process")
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS)
    parser.add_argument("--shared-images", type=int, default=SHARED)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--point", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        folder, *counts = options.point
        print(json.dumps(point(Path(folder), *map(int, counts))))
        return
    from rcb_lmms.lab.scenes import make_scene

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(max(IMAGES * max(options.factors), options.shared_images)):
            make_scene("test", number).image().save(folder / f"{number}.png")
        rows = {
            "images": [growth(folder, IMAGES * factor, QUESTIONS, options.repeats) for factor in options.factors],
            "questions": [growth(folder, IMAGES, QUESTIONS * factor, options.repeats) for factor in options.factors],
        }
        processes = two_processes(folder, options.shared_images, options.repeats)
    for name, own in rows.items():
        print(f"\nmore {name}\n{tabulate(own, headers='keys', floatfmt='.2f')}")
        last, first = own[-1], own[0]
        more = {key: last[key] / first[key] for key in ("questions", "cpu_s", "s", "peak_mb")}
        print(", ".join(f"{key} x {value:.2f}" for key, value in more.items()))
    print(f"\n{tabulate(processes, headers='keys', floatfmt='.2f') or 'without two processes, for want of a core'}")
    found = {"machine": machine(), "repeats": options.repeats, "rows": rows, "two_processes": processes}
    print(json.dumps(found), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    plot(rows, options.out / "growth.png")


if __name__ == "__main__":
    main()

"""The paper's tables for readers: Markdown, LaTeX and CSV, and Figure 9 as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from rcb_lmms.files import write_atomic
from rcb_lmms.report.cells import PaperTable, measure
from rcb_lmms.report.collect import left_out
from rcb_lmms.report.drawing import save_figure
from rcb_lmms.report.paper import comparisons, numbers
from rcb_lmms.report.plots import STYLES
from rcb_lmms.report.published import Layout
from rcb_lmms.report.tables import probability

LEGEND = """\
First line of a row: printed in the paper; second line: measured. In brackets: percent of the unpruned model of the \
same line. ±: standard deviation over the seeds of random pruning. Tokens: retained visual tokens per question, per \
column where columns differ. Blank: not printed, or not all of its runs are there."""

COMPARED = """\
Differences in the column's unit with 95% confidence intervals (bootstrap over images) and two-sided p (permutation of \
whole images), on the same samples; random averaged over its seeds, sample by sample."""

# What LaTeX engines do not find in their fonts.
LATEX = {"×": r"$\times$", "±": r"$\pm$", "τ": r"$\tau$"}


def readable(layout: Layout, frame: pd.DataFrame, measured_on: str = "here") -> pd.DataFrame:
    """A table of `numbers` as text in the paper's layout; what it does not have is left out if not measured.

    Args:
        layout: of the table.
        frame: its numbers.
        measured_on: what the measured lines are called.
    """
    headings = list(layout.averages)
    if not layout.only_averages:
        headings = [column.heading for column in layout.columns] + headings
    filled = frame[frame[["published", "measured"]].notna().any(axis=1)]
    headings = [heading for heading in headings if heading in _printed(layout) or heading in set(filled["column"])]
    lines = []
    for block, rows in frame.groupby("block", sort=False):
        lines.append({"method": str(block)})
        for label, own in rows.groupby("row", sort=False):
            cells = {row.column: row for row in own.itertuples()}
            measured = own["measured"].notna().any()
            if own["control"].all() and not measured:
                continue
            if not own["control"].all():
                lines.append(_line(layout, label, "paper", "published", cells))
            lines.append(_line(layout, label if own["control"].all() else "", measured_on, "measured", cells))
    return pd.DataFrame(lines, columns=["method", "", "tokens", *headings]).fillna("")


def _printed(layout: Layout) -> set[str]:
    """Columns and averages that the paper's table has."""
    averages = {label for label, columns in layout.averages.items() if all(column.printed for column in columns)}
    return averages | {column.heading for column in layout.columns if column.printed}


def _line(layout: Layout, label: str, source: str, kind: str, cells: dict[str, Any]) -> dict[str, str]:
    texts = {heading: _text(cell, kind, heading in layout.averages) for heading, cell in cells.items()}
    tokens = _tokens([cells[column.heading] for column in layout.columns if column.printed], kind)
    return {"method": label, "": source, "tokens": tokens, **texts}


def _text(cell: Any, kind: str, is_average: bool) -> str:
    value = getattr(cell, kind)
    if pd.isna(value):
        return ""
    std = getattr(cell, f"{kind}_std")
    relative = cell.published_relative if kind == "published" else cell.relative
    spread = "" if pd.isna(std) else f" ± {std:.2f}" if std < 0.1 else f" ± {std:.1f}"
    return f"{value:.1f}{spread}" + ("" if is_average or pd.isna(relative) else f" ({relative:.0f})")


def _tokens(cells: list[Any], kind: str) -> str:
    """Retained tokens: one number where the columns agree on it."""
    name = "published_tokens" if kind == "published" else "retained_tokens"
    texts = ["" if pd.isna(getattr(cell, name)) else f"{getattr(cell, name):.0f}" for cell in cells]
    known = {text for text in texts if text}
    return known.pop() if len(known) == 1 else "" if not known else " / ".join(texts)


def readable_comparisons(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of `comparisons` as text."""
    rows = [
        {
            "block": row.block,
            "rows": f"{row.row} against {row.against}",
            "column": row.column,
            "samples": str(row.samples),
            "difference": f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]",
            "p": probability(row.p),
        }
        for row in frame.itertuples()
    ]
    return pd.DataFrame(rows)


def write_paper_table(layout: Layout, results: Path, out: Path) -> tuple[str, list[str]]:
    """Write `KEY.md`, `.tex`, `.csv` and `KEY_comparisons.csv` to `out`, for a figure also `.png` and `.svg`.

    Returns:
        The table as plain text, and why cells of it are blank.

    Raises:
        UserError: no such results, runs that cannot be compared, or a folder that cannot be written.
    """
    table = measure(layout, results)
    frame, compared = numbers(table), comparisons(table)
    text = readable(layout, frame, table.measured_on)
    laboratory = ", beside the laboratory model" if table.measured_on != "here" else ""
    parts = [f"# {layout.title}{laboratory}", _tabulated(text, "pipe"), LEGEND]
    if len(compared):
        parts += [_tabulated(readable_comparisons(compared), "pipe"), COMPARED]
    parts += table.version_notes
    if blanks := blank(table):
        parts += ["Left out:", "\n".join(f"- {line}" for line in blanks)]
    contents = {
        ".md": "\n\n".join(parts) + "\n",
        ".tex": _latex(text),
        ".csv": frame.to_csv(index=False, lineterminator="\n"),
        "_comparisons.csv": compared.to_csv(index=False, lineterminator="\n"),
    }
    for ending, content in contents.items():
        write_atomic(out / f"{layout.key}{ending}", content)
    if layout.native is not None and frame["measured"].notna().any():
        save_figure(figure(layout, frame, table.measured_on), out / layout.key, ("png", "svg"))
    return _tabulated(text, "simple"), blanks


def blank(table: PaperTable) -> list[str]:
    """Why cells are blank: run folders that cannot be used, a line for each reason, and runs that are not there."""
    lines = left_out(table.excluded)
    for block in table.layout.blocks:
        if absent := table.absent.get(block.title):
            needed = f"rcb eval {block.config}" if block.config else "the unpruned model of a block below"
            lines.append(f"{block.title}: {len(absent)} runs are not there, {absent[0].parent.name} first ({needed})")
    return lines


def _tabulated(frame: pd.DataFrame, form: str) -> str:
    return tabulate(frame, headers="keys", tablefmt=form, disable_numparse=True, showindex=False)


def _latex(frame: pd.DataFrame) -> str:
    text = _tabulated(frame, "latex_booktabs")
    for character, command in LATEX.items():
        text = text.replace(character, command)
    return text + "\n"


def figure(layout: Layout, frame: pd.DataFrame, measured_on: str) -> Any:
    """The average of a sweep over the share of removed tokens: lines are measured, hollow markers printed."""
    from matplotlib.figure import Figure

    (average,) = layout.averages
    drawn = Figure(figsize=(6, 4.2), layout="constrained")
    _draw(drawn.subplots(), layout, frame[frame["column"] == average], measured_on)
    return drawn


def _draw(axes: Any, layout: Layout, frame: pd.DataFrame, measured_on: str) -> None:
    (block,) = layout.blocks
    values = frame.set_index("row")
    for method in dict.fromkeys(row.method for row in block.rows):
        rows = [row for row in block.rows if row.method == method]
        removed = [100 - 100 * int(row.arguments["keep"]) / layout.native for row in rows]
        colour, marker = STYLES[method]
        label = rows[0].label.rpartition(" ")[0]
        measured, printed = (
            values.loc[[row.label for row in rows], name].astype(float) for name in ("measured", "published")
        )
        axes.plot(removed, measured, color=colour, marker=marker, linewidth=1.4, label=f"{label}, {measured_on}")
        hollow = {"color": colour, "marker": marker, "linestyle": "none", "markerfacecolor": "none", "markersize": 10}
        axes.plot(removed, printed, label=f"{label}, paper (Table 1)", **hollow)
    axes.axhline(100, color="black", linewidth=1, linestyle=":")
    axes.set_xlabel("visual tokens removed, %")
    axes.set_ylabel("average of five VQA benchmarks,\n% of the unpruned model")
    axes.set_title(block.title if measured_on == "here" else f"{measured_on}, beside {block.title} in the paper")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)

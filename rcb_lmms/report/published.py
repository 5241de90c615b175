"""The paper's tables as data: their layout, what was printed in them, and the runs that fill each row again.

`python -m rcb_lmms.report.published` writes the configurations in `eval_configs/` from the same description.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.resources import data_dir
from rcb_lmms.runs.configs import Entry

DATA = Path(__file__).with_name("published.yaml")
# Of random pruning, as in the paper.
SEEDS = (42, 0, 1234)


@dataclass(frozen=True)
class Column:
    """A column: its heading as printed, our task and metric, what brings it to the printed scale.

    Attributes:
        combine: `circular` or `pairs`, where the number is not the mean of its samples' scores.
        printed: whether the paper has the column; one that it does not have is shown once it is measured.
    """

    heading: str
    task: str
    metric: str
    scale: float
    combine: str | None = None
    printed: bool = True


@dataclass(frozen=True)
class Number:
    """A printed number, with its deviation over seeds and the tokens printed beside it, where they are."""

    value: float
    std: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        label: as printed.
        model: lmms-eval model id.
        arguments: its model_args, as text.
        exceptions: arguments that are others for one column.
        published: printed numbers by column.
        average: a printed average over columns.
        codebook: name of one that a reader builds for this row.
        control: a row that the paper does not have; shown once it is measured.
    """

    label: str
    model: str
    arguments: dict[str, str]
    exceptions: dict[str, dict[str, str]] = field(default_factory=dict)
    published: dict[str, Number] = field(default_factory=dict)
    average: float | None = None
    codebook: str | None = None
    control: bool = False

    @property
    def method(self) -> str:
        """The last part of the model id, with `full` for the unpruned model."""
        return self.model.removeprefix("llava_").removeprefix("next_").removeprefix("onevision_")

    def entries(self, benchmark: Column) -> list[Entry]:
        """The runs behind one cell: one, or one per seed."""
        arguments = self.arguments | self.exceptions.get(benchmark.heading, {})
        name = entry_name(self.model, arguments, self.codebook)
        if self.codebook:
            arguments |= {"codebook": f"codebooks/ablation/{self.codebook}.safetensors"}
        if self.method != "random":
            return [Entry(name, self.model, tuple(arguments.items()), benchmark.task)]
        return [
            Entry(f"{name}_seed-{seed}", self.model, (*arguments.items(), ("seed", str(seed))), benchmark.task)
            for seed in SEEDS
        ]

    def name(self, benchmark: Column) -> str:
        """Of the runs behind one cell, their seed apart."""
        return self.entries(benchmark)[0].name.partition("_seed-")[0]


@dataclass(frozen=True)
class Block:
    """Rows under one heading, relative to one unpruned model: to the row itself if there is no `reference`."""

    title: str
    rows: tuple[Row, ...]
    reference: str | None = None
    config: str | None = None
    preparation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One table, or the data of one figure."""

    key: str
    title: str
    columns: tuple[Column, ...]
    averages: dict[str, tuple[Column, ...]]
    blocks: tuple[Block, ...]
    only_averages: bool = False
    native: int | None = None

    def reference(self, block: Block, row: Row) -> Row:
        """The unpruned row that a row is measured against.

        It may stand in another table, which then holds its printed numbers too.
        """
        if block.reference is None:
            return row
        return next(
            other
            for layout in (self, *layouts().values())
            for own in layout.blocks
            for other in own.rows
            if other.name(layout.columns[0]) == block.reference
        )

    def place(self, block: Block, row: Row, heading: str) -> str:
        """Where a number is printed."""
        return f"{self.title.partition('.')[0]}, {block.title}, row {row.label}, column {heading}"


def entry_name(model: str, arguments: dict[str, str], codebook: str | None = None) -> str:
    """Folder name of runs: the model and its arguments, but for the template, which is the same for all."""
    parts = [f"{name}-{value}" for name, value in arguments.items() if name != "template"]
    return "_".join([model, *parts, *([f"codebook-{codebook}"] if codebook else [])])


@functools.cache
def layouts() -> dict[str, Layout]:
    """All tables by key: `table-1`, `table-2`, `table-3`, `figure-9`."""
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    columns = {heading: Column(heading, **own) for heading, own in data["benchmarks"].items()}
    return {key: _layout(key, description, columns) for key, description in data["layouts"].items()}


def layout(key: str) -> Layout:
    """One table.

    Raises:
        UserError: none of that key.
    """
    if key not in layouts():
        raise UserError(
            wanted=key.replace("-", " "),
            found="nothing of that name that runs can fill",
            allowed=", ".join(layouts()).replace("-", " "),
            next_step="--paper 1, 2 or 3; --figure 9",
        )
    return layouts()[key]


def _layout(key: str, description: dict[str, Any], known: dict[str, Column]) -> Layout:
    columns = tuple(known[heading] for heading in description["columns"])
    averages = description.get("averages", {})
    return Layout(
        key=key,
        title=description["title"],
        columns=columns,
        averages={label: tuple(known[heading] for heading in headings) for label, headings in averages.items()},
        blocks=tuple(_block(block, columns) for block in description["blocks"]),
        only_averages=description.get("only_averages", False),
        native=description.get("native"),
    )


def _block(block: dict[str, Any], columns: tuple[Column, ...]) -> Block:
    rows = [_row(row, block, columns) for row in block["rows"]]
    rows += [_row(row | {"control": True}, block, columns) for row in block.get("controls", [])]
    return Block(
        title=block["title"],
        rows=tuple(row for swept in rows for row in _swept(swept, block.get("keeps"))),
        reference=block.get("reference"),
        config=block.get("config"),
        preparation=tuple(block.get("preparation", ())),
    )


def _swept(row: Row, keeps: list[int] | None) -> Iterator[Row]:
    """A row once for each budget."""
    if keeps is None:
        yield row
    for keep in keeps or ():
        yield replace(row, label=f"{row.label} {keep}", arguments=row.arguments | {"keep": str(keep)})


def _row(row: dict[str, Any], block: dict[str, Any], columns: tuple[Column, ...]) -> Row:
    row, printed = dict(row), [column for column in columns if column.printed]
    numbers = [row.pop(name, None) or [None] * len(printed) for name in ("published", "std", "tokens")]
    cells = zip(printed, *numbers, strict=True)
    return Row(
        published={column.heading: Number(*number) for column, *number in cells if number[0] is not None},
        arguments=_texts(block.get("common", {}) | row.pop("arguments", {})),
        exceptions={heading: _texts(own) for heading, own in row.pop("exceptions", {}).items()},
        **row,
    )


def _texts(arguments: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in arguments.items()}


def eval_configs() -> dict[str, str]:
    """Text of every configuration file by name, without its ending; controls have files of their own."""
    texts = {}
    for table in layouts().values():
        for block in table.blocks:
            if block.config is None:
                continue
            for control in sorted({row.control for row in block.rows}):
                name = f"{block.config}_controls" if control else block.config
                rows = [row for row in block.rows if row.control == control]
                texts[name] = _config_text(name, table, block, rows)
    return texts


def _config_text(name: str, table: Layout, block: Block, rows: list[Row]) -> str:
    """Comments, then one line per run; the unpruned model first, since everything is relative to it."""
    runs: dict[Entry, dict[str, None]] = {}
    for row in [table.reference(block, rows[0]), *rows]:
        for column in table.columns:
            for entry in row.entries(column):
                key = Entry(entry.name, entry.model, entry.arguments, task="")
                runs.setdefault(key, {})[column.task] = None
    lines = [f"# {table.title}.", f"# {block.title}{'; rows that the paper does not have' if rows[0].control else ''}."]
    lines += [f"# {line}" for line in block.preparation]
    lines += [f"#   rcb eval {name}", f"#   lmms_eval --config eval_configs/{name}.yaml"]
    for entry, tasks in runs.items():
        arguments = ",".join(f"{key}={value}" for key, value in entry.arguments)
        lines += [
            f"- model: {entry.model}",
            f'  model_args: "{arguments}"',
            f'  tasks: "{",".join(tasks)}"',
            "  batch_size: 1",
            "  log_samples: true",
            f"  output_path: results/{entry.name}",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write `eval_configs/`."""
    for name, text in eval_configs().items():
        print(f"wrote {write_atomic(data_dir('eval_configs') / f'{name}.yaml', text)}")


if __name__ == "__main__":
    main()

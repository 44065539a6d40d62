"""Answers for people to judge: a task without a score fills a column of its CSV files.

OUT/NAME.csv is the task's file with one column more for each model, in front of the last two
columns. A column is filled as the answers come, so the same command goes on where it stopped. Its
name holds a digest of the model and the settings: where these change, another column begins.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from nano import evaluation, files
from nano.config import UserError


@dataclass
class Sheet:
    """A CSV file with a column for a model's answers."""

    source: Path
    target: Path
    rows: list  # lists of texts, the names of the columns first
    column: int
    start: str  # the byte order mark that Excel writes, or ""

    def write(self):
        text = io.StringIO()
        text.write(self.start)
        csv.writer(text).writerows(self.rows)
        files.write_text(self.target, text.getvalue())


def open_sheet(source, out, name):
    """The Sheet of a file with the column `name`. The file in `out` is read where there is one.

    UserError for a file that is no CSV with three columns or more."""
    target = Path(out) / source.name
    path = target if target.exists() else source
    try:
        text = path.read_bytes().decode()
        start = "\ufeff" * text.startswith("\ufeff")
        text = text.removeprefix(start)
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as CSV: {e}") from None
    if not rows or len({*map(len, rows)}) > 1 or len(rows[0]) < 3:
        raise UserError(f"{path} is no CSV file whose rows have the same three or more columns")
    if name not in rows[0]:
        for row in rows:
            row.insert(-2, "")
        rows[0][-3] = name
    return Sheet(source, target, rows, rows[0].index(name), start)


def fill(benchmark, model, tok, rt, out, name, batch_size=32):
    """Fills the column `name` of the task's files with the model's answers.

    Every rank calls it. Returns the texts, one for each record of the benchmark."""
    task = benchmark.task
    cells, prompts = [], []
    for sheet in [open_sheet(path, out, name) for path in task.paths()]:
        for row in sheet.rows[1:]:
            fields = dict(zip(sheet.rows[0], row, strict=True))
            record = task.convert(sheet.source, 0, fields)
            if task.belongs(record):
                cells.append((sheet, row))
                prompts.append(task.prompt(record))
    asked = [task.prompt(record) for record in benchmark.records]
    if prompts[: len(asked)] != asked:  # somebody may have sorted them
        raise UserError(
            f"the rows of the files in {out} are not those of {task.file} in their order: put them "
            "back, or choose another out="
        )
    cells = cells[: len(asked)]
    waiting = [i for i, (sheet, row) in enumerate(cells) if not row[sheet.column]]
    stops = () if benchmark.chat else task.module.STOP
    for begin in range(0, len(waiting), batch_size):
        numbers = waiting[begin : begin + batch_size]
        prompts = [benchmark.prompts[i] for i in numbers]
        new = benchmark.max_new_tokens
        texts = evaluation.answers(model, tok, rt, prompts, new, stops, batch_size)
        for i, (text, _) in zip(numbers, texts, strict=True):
            sheet, row = cells[i]
            row[sheet.column] = text
        if rt.is_main:
            for sheet in {cells[i][0].target: cells[i][0] for i in numbers}.values():
                sheet.write()
    return [row[sheet.column] for sheet, row in cells]

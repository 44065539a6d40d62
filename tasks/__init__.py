"""Tasks: one file says where records come from, how one becomes a prompt, what a right answer is.

    task = tasks.load("arc:easy")            # tasks/arc.py, its part "easy"
    task = tasks.load("gsm8k", "test.jsonl")  # a local file in the place of the hub
    records = task.records()

eval.py measures with a task, prepare.instructions makes training rows from it, and ppo.py takes its
score as a reward. A task file has

    HUB              (id, configuration, split to measure, split of the shots) on the hub
    PARTS            optional: {part: the same four}; NAME:PART names one of them
    record(row)      a row of the hub, or of a local file with other columns -> a record (dict)
    prompt(record)   plain text, as lm-eval writes it
    intro(record)    optional: text in front of the first shot
    group(record)    optional: a name, such as a subject. Shots come from the same group, and each
                     group gets an accuracy of its own

and for multiple choice

    choices(record)  the texts of the options
    gold(record)     the set of the numbers of those that are right
    options(record)  optional: [(context, continuation)] whose log-likelihoods are compared.
                     By default the prompt, and a space and each choice
    metrics(record, logprobs)   optional: {name: value} in place of the accuracies

or for free answers

    answer(record)   what follows the prompt where the record is a shot or a training row
    score(prompt, response, finished, record)   from 0 to 1; strict(...), optional: the same where
                     only the exact form counts
    STOP             strings that end an answer in plain text
    MAX_NEW_TOKENS   of an answer
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nano import config
from nano.config import UserError
from prepare import records

FOLDER = Path(__file__).parent


def names():
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(spec, file="", shot_file=""):
    """The Task of NAME or NAME:PART. file, shot_file: local files in the place of the hub's splits.

    UserError for a name or a part that there is not."""
    name, _, part = spec.partition(":")
    if name not in names():
        near = config.nearest(name, names())
        hint = f"did you mean '{near}'?" if near else f"there are {', '.join(names())}"
        raise UserError(f"unknown task '{name}'; {hint}")
    module = importlib.import_module(f"tasks.{name}")
    parts = getattr(module, "PARTS", {})
    if part and part not in parts:
        known = f"its parts are {', '.join(parts)}" if parts else "it has no parts"
        raise UserError(f"unknown part '{part}' of the task {name}: {known}")
    return Task(spec, module, part, file, shot_file)


@dataclass
class Task:
    """A task file with its part and its sources. Its functions are attributes of `module`."""

    name: str
    module: ModuleType
    part: str = ""
    file: str = ""
    shot_file: str = ""

    def __getattr__(self, key):
        return getattr(self.module, key)

    @property
    def has_choices(self):
        return hasattr(self.module, "choices")

    def hub(self):
        """(id, configuration, split to measure, split of the shots)"""
        return getattr(self.module, "PARTS", {}).get(self.part) or self.module.HUB

    def records(self, shots=False):
        """The records of the split that is measured, or of the one that shots come from.

        UserError for a file that is not there, and for a row that lacks a field."""
        name, configuration, split, shot_split = self.hub()
        path = self.shot_file if shots else self.file
        if shots and not path and self.file:
            raise UserError(
                f"shots of {self.name} come from another split than {self.file}: name it in "
                "shot_files="
            )
        if path and not Path(path).is_file():
            raise UserError(f"there is no file {path}")
        if path:
            with records.progress(None, "B") as bar:
                rows = list(records.read_file(Path(path), bar))
        else:
            rows = list(records.read_hub(name, [configuration], shot_split if shots else split))
        return [self.convert(path or name, line, row) for line, row in rows]

    def convert(self, source, line, row):
        try:
            return self.module.record(records.parse(row))
        except records.BadRecord as e:
            raise UserError(f"{source}:{line}: {e}") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            what = f"the field {e} is missing" if isinstance(e, KeyError) else str(e)
            raise UserError(f"{source}:{line} is no record of {self.name}: {what}") from None

    def options_of(self, record):
        """[(context, continuation)] of a record with choices."""
        if hasattr(self.module, "options"):
            return self.module.options(record)
        return [(self.prompt(record), f" {choice}") for choice in self.choices(record)]

    def answer_of(self, record):
        """What an assistant answers, for a shot in a conversation and for a training row."""
        if self.has_choices:
            return self.choices(record)[min(self.gold(record))]
        return self.answer(record)

    def shot(self, record):
        """The plain text of a record with its answer."""
        if self.has_choices:
            return "".join(self.options_of(record)[min(self.gold(record))])
        return f"{self.prompt(record)} {self.answer(record)}"

    def intro_of(self, record):
        return self.module.intro(record) if hasattr(self.module, "intro") else ""

    def group_of(self, record):
        return self.module.group(record) if hasattr(self.module, "group") else ""

"""Loads the tasks of tasks/, whose __init__.py says what a task file has.

task = tasks.load("arc:easy")                 # tasks/arc.py, its part "easy"
task = tasks.load("gsm8k", "test.jsonl")      # a local file or folder in the place of the hub
records = task.records()
"""

import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nano import config, files, records
from nano.config import UserError

FOLDER = Path(__file__).parent.parent / "tasks"


def names():
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def name_of(spec):
    """The file of the task in NAME or NAME:PART, whose name may have - in the place of _."""
    return spec.partition(":")[0].replace("-", "_")


def is_name(spec):
    """Whether `spec` names a task or a part of one, and no path."""
    return name_of(spec) in names() and not Path(spec).exists()


def load(spec, file="", shot_file="", prefix=""):
    """The Task of NAME or NAME:PART. file, shot_file: local files in the place of the hub's splits.
    prefix: "eval_" where the keys are those of a stage, such as eval_files=.

    UserError for a name or a part that does not exist."""
    name = name_of(spec)
    _, colon, part = spec.partition(":")
    if name not in names():
        near = config.nearest(name, names())
        hint = f"did you mean '{near}'?" if near else f"there are {', '.join(names())}"
        raise UserError(f"unknown task '{name}'; {hint}")
    module = importlib.import_module(f"tasks.{name}")
    parts = getattr(module, "PARTS", {})
    if colon and part not in parts:
        near = config.nearest(part, parts)
        known = f"its parts are {', '.join(parts)}" if parts else "it has no parts"
        hint = f"did you mean '{near}'?" if near else known
        raise UserError(f"unknown part '{part}' of the task {name}; {hint}")
    return Task(spec, module, part, file, shot_file, prefix)


@dataclass
class Task:
    """A task file with its part and its sources. The functions of the file are its attributes."""

    name: str
    module: ModuleType
    part: str = ""
    file: str = ""
    shot_file: str = ""
    prefix: str = ""  # of the keys that messages name

    def __getattr__(self, key):
        if key.startswith("__"):  # which pickle and copy ask for before there is a module
            raise AttributeError(key)
        return getattr(self.module, key)

    @property
    def has_choices(self):
        return hasattr(self.module, "choices")

    @property
    def is_set(self):
        """Whether it has rows to train on, and nothing to measure."""
        return not hasattr(self.module, "record")

    @property
    def is_judged(self):
        """Whether people judge the answers, because nothing scores them."""
        return not (self.is_set or self.has_choices or hasattr(self.module, "score"))

    def hub(self):
        """(id, configuration, split to measure, split of the shots)

        UserError for a task whose records are on no hub."""
        hub = getattr(self.module, "PARTS", {}).get(self.part) or getattr(self.module, "HUB", None)
        if not hub:
            raise UserError(
                f"the records of {self.name} are not on the hub: name their file or folder, "
                "files=, or path= of prepare"
            )
        return hub

    def records(self, shots=False):
        """The records of the split that is measured, or of the one that shots come from.

        UserError for a file that cannot be read, and for a row that is no record of the task."""
        rows = self.source_rows(shots)
        kept = [self.convert(source, line, row) for source, line, row in rows]
        kept = [record for record in kept if self.belongs(record)]
        if not kept:
            raise UserError(f"{self.source(shots)} has no record of {self.name}")
        return kept

    def belongs(self, record):
        """Whether a record is of the task's part."""
        return not (self.part and hasattr(self.module, "within")) or self.within(record, self.part)

    def source(self, shots=False):
        """Where the records come from: a local file, the program that makes them, or a hub id."""
        path = self.shot_file if shots else self.file
        if path:
            return path
        return f"the task {self.name}" if hasattr(self.module, "rows") else self.hub()[0]

    def fingerprints(self):
        """What names the content of the task's own file and of its local files, a list."""
        paths = [self.module.__file__, *self.paths(), *self.paths(shots=True)]
        return [files.fingerprint(path) for path in paths]

    def paths(self, shots=False):
        """The local files in the place of the hub: the one that is named, or those of the folder.
        [] where none is named. UserError where there are none."""
        path = self.shot_file if shots else self.file
        if not path:
            return []
        if Path(path).is_dir():
            split = self.hub()[2 + shots] if hasattr(self.module, "HUB") else ""
            return records.files_below(Path(path), records.SUFFIXES, set(), split)
        files.check_file(path)
        return [Path(path)]

    def source_rows(self, shots):
        """Yields (name of the source, line, row)."""
        if paths := self.paths(shots):
            with records.progress(None, "B") as bar:
                for path in paths:
                    for line, row in records.read_file(path, bar):
                        yield path, line, row
        elif hasattr(self.module, "rows"):
            for line, row in enumerate(self.module.rows(shots), 1):
                yield self.name, line, row
        elif shots and self.file:
            raise UserError(
                f"the shots of {self.name} come from another split than {self.file}: "
                f"name its file in {self.prefix}shot_files="
            )
        else:
            name, configuration, split, shot_split = self.hub()
            for part in listed(configuration):
                rows = records.read_hub(name, [part], shot_split if shots else split)
                for line, row in rows:
                    yield f"{name}/{part}" if part else name, line, row

    def convert(self, source, line, row):
        """The record of what a reader yields. UserError where it is none of this task."""
        try:
            return self.read(dict(file=Path(source).stem) | records.parse(row))
        except records.BadRecord as e:
            raise UserError(f"{source}:{line}: {e}") from None

    def read(self, row):
        """The record of a row (dict). BadRecord for a row that lacks what the task needs."""
        with self.reading():
            record = self.module.record(row)
            if self.has_choices:
                check_choices(self.choices(record), self.gold(record))
            elif hasattr(self.module, "answer") and not isinstance(self.answer(record), str):
                raise ValueError("its answer is no text")
            if not isinstance(self.prompt(record), str):
                raise ValueError("its prompt is no text")
            return record

    @contextlib.contextmanager
    def reading(self):
        """A context in which what goes wrong with a row is a BadRecord."""
        try:
            yield
        except KeyError as e:
            raise records.BadRecord(
                f"the field {e} is missing, which a record of {self.name} needs"
            ) from None
        except (TypeError, ValueError, IndexError, AttributeError) as e:
            raise records.BadRecord(f"no record of {self.name}: {e}") from None

    def options_of(self, record):
        """[(context, continuation)] of a record with choices."""
        if hasattr(self.module, "options"):
            return self.module.options(record)
        return [(self.prompt(record), f" {choice}") for choice in self.choices(record)]

    def answer_of(self, record):
        """What an assistant answers, for a shot in a conversation and for a training row.

        UserError for a task that knows no answer, only how good one is."""
        if self.has_choices:
            return self.choices(record)[min(self.gold(record))]
        if not hasattr(self.module, "answer"):
            raise UserError(
                f"the task {self.name} has no answers to show: set {self.prefix}shots=0 for it"
            )
        return self.answer(record)

    def request(self, record):
        """The messages that ask for the answer."""
        if hasattr(self.module, "messages"):
            turns = self.module.messages(record)
        else:
            turns = [dict(role="user", content=self.prompt(record))]
        if hasattr(self.module, "columns"):
            turns[-1] = turns[-1] | dict(columns=self.columns(record)[0])
        return turns

    def replies(self, record):
        """The assistant's turns that answer: one for each choice, or one with the free answer."""
        texts = self.choices(record) if self.has_choices else [self.answer_of(record)]
        turns = [dict(role="assistant", content=text) for text in texts]
        if hasattr(self.module, "columns"):
            for turn, text in zip(turns, self.columns(record)[1], strict=True):
                turn["columns"] = [["ANSWER", text]]
        return turns

    def solved(self, record):
        """The messages that ask for the answer, and the one that gives it."""
        right = min(self.gold(record)) if self.has_choices else 0
        return [*self.request(record), self.replies(record)[right]]

    def conversation(self, row):
        """The messages of a row for training: with the answer, or a prompt alone where the task has
        no answer but a score. BadRecord as in `read`."""
        with self.reading():
            if hasattr(self.module, "turns"):
                return self.module.turns(row)
            record = self.read(row)
            has_answers = self.has_choices or hasattr(self.module, "answer")
            return self.solved(record) if has_answers else self.request(record)

    def source_of(self, split):
        """(hub id, configurations, split) of the rows to train on, "train", or of those that are
        measured, "test". (name, [], None) where a program writes them. UserError for another split,
        and for "train" of a task that has only what it measures. A training set has any split."""
        if self.is_set:
            name, configurations, train = self.PARTS[self.part] if self.part else self.TRAIN
            return name, configurations, train if split == "train" else split
        if split not in ("train", "test"):
            raise UserError(f"split={split}: a task has train, and test, which it measures")
        if hasattr(self.module, "rows"):
            return self.name, [], None
        name, configuration, measured, shot_split = self.hub()
        if split == "test":
            return name, listed(configuration), measured
        if hasattr(self.module, "TRAIN") and not self.part:
            return self.module.TRAIN
        if measured == shot_split:
            raise UserError(
                f"the task {self.name} has no split to train on beside the one that it measures"
            )
        return name, listed(configuration), shot_split

    def reward(self):
        """The task's score as a reward of ppo.py: a function of (prompt, response, finished,
        record), where the record is a row. UserError for a task without a score."""
        if not hasattr(self.module, "score"):
            raise UserError(
                f"reward={self.name}: this task scores no answers; those that do are "
                + ", ".join(name for name in names() if hasattr(load(name).module, "score"))
            )

        def reward(prompt, response, finished, record):
            try:
                record = self.read(record)
            except records.BadRecord as e:
                raise UserError(f"reward={self.name}: a prompt comes with {e}") from None
            return self.score(prompt, response, finished, record)

        reward.__name__ = self.name
        return reward

    def shot(self, record):
        """The plain text of a record with its answer."""
        if self.has_choices:
            return "".join(self.options_of(record)[min(self.gold(record))])
        return f"{self.prompt(record)} {self.answer_of(record)}"

    def chance_of(self, record):
        if hasattr(self.module, "chance"):
            return self.module.chance(record)
        if not self.has_choices or len(self.choices(record)) < 2:
            return 0.0
        return len(self.gold(record)) / len(self.choices(record))

    def intro_of(self, record):
        return self.module.intro(record) if hasattr(self.module, "intro") else ""

    def group_of(self, record):
        return self.module.group(record) if hasattr(self.module, "group") else ""

    def groups_of(self, record):
        if hasattr(self.module, "groups"):
            return self.module.groups(record)
        return [self.group_of(record)] if hasattr(self.module, "group") else []


def listed(configuration):
    """The configurations of a task's HUB, which names one or has a list."""
    return configuration if isinstance(configuration, list) else [configuration]


def check_choices(choices, gold):
    """ValueError for choices that are no texts, and for right ones that are not among them."""
    if not isinstance(choices, list) or not choices:
        raise ValueError("it has no options")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("an option is no text, or an empty one")
    if not gold or not gold <= {*range(len(choices))}:
        raise ValueError(f"the right option is number {sorted(gold)} of {len(choices)}")

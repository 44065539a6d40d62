"""MMLU-Redux: 5,700 questions of MMLU that experts have looked at (Gema et al. 2024,
arXiv:2406.04127). A wrong answer key is replaced by the right one where the experts name one. The
groups tell the accuracy on the questions that are in order, "ok", from those with each error.

The authors' files are one CSV a subject, mmlu_SUBJECT.csv: give their folder in the place of the
hub. Line 54 of moral_scenarios has a byte that is not UTF-8 (0xD5, an apostrophe): mend it first.
"""

import ast

from tasks import mmlu
from tasks.mmlu import choices, columns, gold, group, intro, prompt  # noqa: F401

ID = "edinburgh-dawg/mmlu-redux-2.0"
PARTS = {subject: (ID, subject, "test", "test") for subject in sorted(mmlu.SUBJECTS)}
HUB = (ID, [*PARTS], "test", "test")


def record(row):
    subject = row.get("subject") or row["file"].removeprefix("mmlu_")
    options = row["choices"]
    if isinstance(options, str):
        options = ast.literal_eval(options)
    error = row["error_type"].strip().lower().replace("_", " ")
    key = row["answer"]
    if error == "wrong groundtruth" and str(row.get("correct_answer")) in [*"ABCD", *"0123"]:
        key = str(row["correct_answer"])
    key = "ABCD".index(key) if str(key) in [*"ABCD"] else int(key)
    fields = dict(question=row["question"], choices=options, answer=key, subject=subject)
    return mmlu.record(fields) | dict(error=error)


def groups(record):
    return [*mmlu.groups(record), record["error"]]


def within(record, part):
    return record["subject"] == part

"""Z-Bench: 311 questions in Chinese, common, emergent and specialized, whose answers people judge
(github.com/zhenbench/z-bench). eval.py writes the answers of a model into a column of its three CSV
files: give their folder by files=."""

STOP = ("\n\n\n",)
MAX_NEW_TOKENS = 128
PARTS = dict.fromkeys(("common", "emergent", "specialized"))


def record(row):
    return dict(question=row["Prompt"], kind=row["任务类型"].strip("`"), file=row["file"])


def prompt(record):
    return record["question"]


def group(record):
    return record["file"].partition(".")[0]


def within(record, part):
    return group(record) == part

"""OpenBookQA: elementary science that needs a fact and common knowledge (Mihaylov et al. 2018,
arXiv:1809.02789)."""

HUB = ("allenai/openbookqa", "main", "test", "train")


def record(row):
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    gold = labels.index(row["answerKey"].strip())
    return dict(question=row["question_stem"], choices=texts, gold=gold)


def prompt(record):
    return record["question"]


def choices(record):
    return record["choices"]


def gold(record):
    return {record["gold"]}

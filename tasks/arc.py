"""ARC: questions of science exams in grade school, three to five options (Clark et al. 2018,
arXiv:1803.05457)."""

PARTS = {
    "easy": ("allenai/ai2_arc", "ARC-Easy", "test", "train"),
    "challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", "train"),
}
HUB = PARTS["challenge"]


def record(row):
    if "query" in row:  # llm-foundry's files
        question = row["query"].removeprefix("Question: ")
        return dict(question=question, choices=row["choices"], gold=int(row["gold"]))
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return dict(question=row["question"], choices=texts, gold=labels.index(row["answerKey"]))


def prompt(record):
    return f"Question: {record['question']}\nAnswer:"


def choices(record):
    return record["choices"]


def gold(record):
    return {record["gold"]}

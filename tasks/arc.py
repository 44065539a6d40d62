"""ARC: questions of science exams in grade school, three to five options (Clark et al. 2018,
arXiv:1803.05457)."""

PARTS = {
    "easy": ("allenai/ai2_arc", "ARC-Easy", "test", "train"),
    "challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", "train"),
}
HUB = PARTS["challenge"]
TRAIN = ("allenai/ai2_arc", ["ARC-Challenge", "ARC-Easy"], "train")


def record(row):
    if "query" in row:  # llm-foundry's files
        question, texts, gold = row["query"], row["choices"], int(row["gold"])
        question, labels = question.removeprefix("Question: "), [*"ABCDE"[: len(texts)]]
    else:
        question, labels, texts = row["question"], row["choices"]["label"], row["choices"]["text"]
        gold = labels.index(row["answerKey"])
    return dict(question=question, labels=labels, choices=texts, gold=gold)


def prompt(record):
    return f"Question: {record['question']}\nAnswer:"


def choices(record):
    return record["choices"]


def gold(record):
    return {record["gold"]}


def columns(record):
    pairs = zip(record["labels"], record["choices"], strict=True)
    listed = " ".join(f"({label}): {text}" for label, text in pairs)
    question = [["QUESTION", record["question"]], ["CANDIDATE ANSWERS", listed]]
    return question, record["choices"]

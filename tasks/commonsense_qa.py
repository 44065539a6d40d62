"""CommonsenseQA: five options, of which the letter is scored (Talmor et al. 2019,
arXiv:1811.00937)."""

HUB = ("tau/commonsense_qa", None, "validation", "train")
LETTERS = "ABCDE"


def record(row):
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return dict(question=row["question"], options=texts, gold=labels.index(row["answerKey"]))


def prompt(record):
    lines = (
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, record["options"], strict=False)
    )
    return f"Question: {record['question'].strip()}{''.join(lines)}\nAnswer:"


def choices(record):
    return [*LETTERS[: len(record["options"])]]


def gold(record):
    return {record["gold"]}

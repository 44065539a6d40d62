"""GSM8K: word problems of grade school, whose answer is a number (Cobbe et al. 2021,
arXiv:2110.14168). strict: the number stands behind ####, as in the data. score: the last number of
the answer counts."""

import re

HUB = ("openai/gsm8k", "main", "test", "train")
STOP = ("Question:", "</s>", "<|im_end|>")
MAX_NEW_TOKENS = 256
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def record(row):
    if number(row["answer"]) is None:
        raise ValueError("its answer has no number behind ####")
    return dict(question=row["question"], answer=row["answer"], number=number(row["answer"]))


def number(text):
    """The text of the number behind ####, without signs that do not matter, or None."""
    match = re.search(r"#### (-?[0-9.,]+)", text)
    return plain(match[1]) if match else None


def plain(text):
    return text.replace(",", "").replace("$", "").removesuffix(".")


def last_number(text):
    """The text of the last number, or None."""
    numbers = NUMBER.findall(text)
    return plain(numbers[-1]) if numbers else None


def prompt(record):
    return f"Question: {record['question']}\nAnswer:"


def answer(record):
    return record["answer"]


def columns(record):
    return [["QUESTION", record["question"]]], [record["answer"]]


def score(prompt, response, finished, record):
    return float(last_number(response) == record["number"])


def strict(prompt, response, finished, record):
    return float(number(response) == record["number"])

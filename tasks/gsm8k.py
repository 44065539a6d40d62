"""GSM8K: word problems of grade school, whose answer is a number (Cobbe et al. 2021,
arXiv:2110.14168). strict: the number stands behind ####, as in the data. score: the last number of
the answer counts."""

import re

HUB = ("openai/gsm8k", "main", "test", "train")
STOP = ("Question:", "</s>", "<|im_end|>")
MAX_NEW_TOKENS = 256
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def record(row):
    return dict(question=row["question"], answer=row["answer"], number=number(row["answer"]))


def number(text):
    """The text of the number behind ####, without signs that do not matter, or None."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return plain(found[1]) if found else None


def plain(text):
    return text.replace(",", "").replace("$", "").removesuffix(".")


def prompt(record):
    return f"Question: {record['question']}\nAnswer:"


def answer(record):
    return record["answer"]


def score(prompt, response, finished, record):
    numbers = NUMBER.findall(response)
    return float(bool(numbers) and plain(numbers[-1]) == record["number"])


def strict(prompt, response, finished, record):
    return float(number(response) == record["number"])

"""HellaSwag: which of four endings goes on from a text (Zellers et al. 2019, arXiv:1905.07830)."""

import re

HUB = ("Rowan/hellaswag", None, "validation", "train")


def clean(text):
    """The text without the marks that WikiHow articles have left in the data."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def record(row):
    if "ctx_a" in row:
        start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return dict(
            start=clean(start), endings=[*map(clean, row["endings"])], gold=int(row["label"])
        )
    return dict(start=row["ctx"], endings=row["endings"], gold=int(row["label"]))


def prompt(record):
    return record["start"]


def choices(record):
    return record["endings"]


def gold(record):
    return {record["gold"]}


def columns(record):
    listed = " ".join(f"({i}): {text}" for i, text in enumerate(record["endings"]))
    return [["CONTEXT", record["start"]], ["CANDIDATE ENDINGS", listed]], record["endings"]

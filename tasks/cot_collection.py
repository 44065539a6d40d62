"""CoT Collection: 1.84 million rationales for the tasks of Flan (Kim et al. 2023,
arXiv:2305.14045)."""

from prepare.fields import task, text

TRAIN = ("kaist-ai/CoT-Collection", [None], "train")


def turns(row):
    answer = f"{text(row, 'rationale')}\n\n### TARGET:\n{text(row, 'target')}"
    return task([["SOURCE", text(row, "source")]], "RATIONALE", answer)

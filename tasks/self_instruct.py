"""Self-Instruct: the 175 tasks that people wrote as seeds (Wang et al. 2022, arXiv:2212.10560).
prepare.bootstrap writes others like them."""

from prepare.fields import message, text

TRAIN = ("HuggingFaceH4/self-instruct-seed", [None], "train")


def turns(row):
    example = row["instances"][0]
    question = message("user", text(row, "instruction"))
    if given := text(example, "input").strip():
        question["input"] = given
    return [question, message("assistant", text(example, "output"))]

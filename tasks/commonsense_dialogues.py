"""Commonsense-Dialogues: about 11,000 talks of two people about an event (Zhou et al. 2021,
arXiv:2109.06427). The one that the event happened to is the user."""

from prepare.fields import message, text

TRAIN = ("gretelai/commonsense-dialogues", [None], "train")


def turns(row):
    roles = ("user", "assistant")
    talk = [message(roles[i % 2], turn) for i, turn in enumerate(row["turns"])]
    # the user has the last word in some
    return [message("system", text(row, "context")), *talk[: len(talk) // 2 * 2]]

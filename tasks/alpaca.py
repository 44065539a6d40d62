"""Alpaca: 52,002 instructions that text-davinci-003 wrote after 175 seeds (Taori et al. 2023)."""

TRAIN = ("tatsu-lab/alpaca", [None], "train")
IGNORE = ("text",)  # the row once more, laid out

"""Alpaca in Chinese: about 49,000 of its instructions, translated and answered by GPT-4 (Peng et
al. 2023, arXiv:2304.03277)."""

TRAIN = ("shibing624/alpaca-zh", [None], "train")

"""Guanaco: about 534,000 instructions in English, Chinese, Japanese and German after Alpaca's."""

TRAIN = ("JosephusCheung/GuanacoDataset", [None], "train")

"""BELLE: half a million instructions in Chinese, written by text-davinci-003 after Chinese seeds
(Ji et al. 2023, arXiv:2303.14742)."""

TRAIN = ("BelleGroup/train_0.5M_CN", [None], "train")

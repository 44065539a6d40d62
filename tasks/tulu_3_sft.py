"""Tulu 3: the mixture of about 939,000 conversations for fine-tuning (Lambert et al. 2024,
arXiv:2411.15124)."""

TRAIN = ("allenai/tulu-3-sft-mixture", [None], "train")

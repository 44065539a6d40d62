"""UltraChat: 200,000 conversations of several turns between two models (Ding et al. 2023,
arXiv:2305.14233), as Zephyr was trained on them."""

TRAIN = ("HuggingFaceH4/ultrachat_200k", [None], "train_sft")

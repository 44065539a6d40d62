"""UltraFeedback: about 61,000 pairs of answers that GPT-4 has rated (Cui et al. 2023,
arXiv:2310.01377), binarized for Zephyr."""

TRAIN = ("HuggingFaceH4/ultrafeedback_binarized", [None], "train_prefs")
RANKED = True

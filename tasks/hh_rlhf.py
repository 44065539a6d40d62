"""HH-RLHF: pairs of answers of an assistant that people have compared, 43,835 for their help and
42,537 for their harm (Bai et al. 2022, arXiv:2204.05862)."""

PARTS = {
    "helpful": ("Anthropic/hh-rlhf", ["helpful-base/"], "train"),
    "harmless": ("Anthropic/hh-rlhf", ["harmless-base/"], "train"),
}
TRAIN = ("Anthropic/hh-rlhf", ["helpful-base/", "harmless-base/"], "train")
RANKED = True

"""SmolTalk: about 1.1 million conversations for small models (Ben Allal et al. 2025,
arXiv:2502.02737)."""

TRAIN = ("HuggingFaceTB/smoltalk", ["all"], "train")

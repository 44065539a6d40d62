"""Dolly: 15,011 instructions that people wrote, some about a text (Conover et al. 2023)."""

TRAIN = ("databricks/databricks-dolly-15k", [None], "train")

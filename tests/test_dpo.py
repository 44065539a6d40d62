"""dpo.py: losses by hand and against trl, ranked groups, the reference, saving and resuming."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny
import torch

import dpo
import lora
from nano import files, tokenizer, weights
from nano.batches import Groups
from nano.config import UserError
from nano.store import mix, write_store

FAST = "device=cpu dtype=float32 max_length=128 batch_size=8 log_every=100".split()
FAST += ["samples=1", "sample_tokens=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With model/ and the folders of groups data/ (2 to 4 completions) and pairs/."""
    path = tmp_path_factory.mktemp("dpo")
    tiny.model_dir(path / "model")
    tiny.preferences(path / "data", path / "model")
    tiny.preferences(path / "pairs", path / "model", completions=(2, 2))
    return path


@pytest.fixture
def run(folder, tmp_path):
    """Trains with settings over the fast ones -> the run folder."""

    base = [f"model={folder}/model", f"data={folder}/data", "steps=2", *FAST]

    def train(*settings, out="out"):
        tiny.train("dpo", tiny.override(base, [f"out={tmp_path / out}"], settings))
        return tmp_path / out

    return train


def open_rows(folder, split="train", name="data"):
    tok = tokenizer.load(folder / "model")
    return mix([folder / name], split=split, tokenizer=tok, groups=True)


def logprob(model, tokens, mask):
    """Of the targets of one row, in float64, by the definition."""
    ids = torch.tensor(tokens)[None]
    logits = model.logits(model.hidden(ids))[0, :-1].double()
    picked = torch.log_softmax(logits, -1)[torch.arange(len(tokens) - 1), ids[0, 1:]]
    return (picked * torch.tensor(mask[1:])).sum()


# ---- the losses


def test_at_the_reference_the_loss_is_ln_2_and_the_margin_0(run):
    for settings in ([], ["lora_rank=2"]):
        first = tiny.records(run(*settings, "resume=false"), "eval")[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert (
            abs(first["margin"]) < 1e-5
            and abs(first["chosen"]) < 1e-5
            and abs(first["rejected"]) < 1e-5
        )


PAIR = [
    torch.tensor([x, 0.0], dtype=torch.float64) for x in (-10.0, -14.0, -11.0, -13.0)
]  # h = 1 - (-1) = 2, and 0
SIGMOID = 1 / (1 + math.exp(-0.2))
BY_HAND = {  # settings: loss at h = 2 with beta 0.1, d loss / d h there, loss at h = 0
    (): (-math.log(SIGMOID), -0.1 * (1 - SIGMOID), math.log(2)),
    (("label_smoothing", 0.25),): (
        -0.75 * math.log(SIGMOID) - 0.25 * math.log(1 - SIGMOID),
        -0.075 * (1 - SIGMOID) + 0.025 * SIGMOID,
        math.log(2),
    ),
    (("loss", "ipo"),): ((2 - 5) ** 2, 2 * (2 - 5), 25),
}


@pytest.mark.parametrize("settings", BY_HAND)
def test_losses_and_gradients_by_hand(settings):
    chosen, rejected, ref_chosen, ref_rejected = (t.clone().requires_grad_() for t in PAIR)
    loss = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1, **dict(settings))
    at_two, slope, at_zero = BY_HAND[settings]
    assert loss.tolist() == pytest.approx([at_two, at_zero])
    loss[0].backward()
    assert chosen.grad[0].item() == pytest.approx(slope) and rejected.grad[
        0
    ].item() == pytest.approx(-slope)


def test_completion_logprobs_are_sums_over_the_completions_own_tokens(folder):
    model, rows = weights.load_model(folder / "model", dtype=torch.float32), open_rows(folder)
    for static in (False, True):
        for micro in Groups(rows, 6, 2, 128, fixed_shapes=static).batch(0):
            values = dpo.completion_logprobs(model, micro)
            for n, real, value in zip(micro["number"].tolist(), micro["real"], values, strict=True):
                tokens, mask = rows.stores[0].row(n)
                assert not real or value.item() == pytest.approx(
                    logprob(model, tokens.tolist(), mask).item(), abs=1e-4
                )


def test_all_pairs_of_a_group_weigh_as_one(folder):
    """Loss and gradient of a step on groups of 2 to 4, against a loop over groups and pairs."""
    model, reference = tiny.model(1), tiny.model(0).requires_grad_(False)
    rows, cfg = open_rows(folder), dpo.Config(beta=0.3)
    batches = Groups(rows, 6, 2, 128)
    members = batches.members(0)
    by_hand = 0.0
    for g in members:
        group = [(tokens.tolist(), mask) for tokens, mask in rows.group(g)]
        ratios = [logprob(model, *row) - logprob(reference, *row) for row in group]
        pairs = [(i, j) for i in range(len(group)) for j in range(i + 1, len(group))]
        by_hand += sum(
            -torch.nn.functional.logsigmoid(0.3 * (ratios[i] - ratios[j])) for i, j in pairs
        ) / len(pairs)
    by_hand /= len(members)
    assert len({len(rows.group(g)) for g in members}) > 1
    by_hand.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for micro in batches.batch(0):
        with torch.no_grad():
            micro["reference"] = dpo.completion_logprobs(reference, micro)
        loss, _, _ = dpo.loss_and_sums(dpo.completion_logprobs(model, micro), micro, cfg)
        part = loss / len(members)
        part.backward()
        total += part.item()
    assert total == pytest.approx(by_hand.item(), abs=1e-6)
    assert all((p.grad - grads[name]).abs().max() < 1e-5 for name, p in model.named_parameters())


WITH_NLL = dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]), dict(nll_weight=0.2)


@pytest.mark.parametrize("theirs, ours", [(dict(), dict()), WITH_NLL])
def test_loss_and_gradients_are_trls(theirs, ours, folder, tmp_path):
    import datasets
    import transformers
    import trl

    settings = dict(
        beta=0.3, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    hf, ref = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        for _ in range(2)
    )
    torch.manual_seed(7)
    with torch.no_grad():  # away from the reference
        for p in hf.parameters():
            p += 0.03 * torch.randn_like(p)
    hf.save_pretrained(tmp_path / "policy")
    trainer = trl.DPOTrainer(
        model=hf,
        ref_model=ref,
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **settings | theirs),
        train_dataset=datasets.Dataset.from_list([dict(prompt="a", chosen="b", rejected="c")] * 2),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
    )
    rows = open_rows(folder, name="pairs")
    batches = Groups(rows, 8, 2, 128)
    groups = [
        [(tokens.tolist(), mask.tolist()) for tokens, mask in rows.group(g)]
        for g in batches.members(0)
    ]
    batch = [group[side] for side in (0, 1) for group in groups]  # all chosen, then all rejected
    longest = max(len(tokens) for tokens, _ in batch)
    pad = lambda x, n: [*x, *[0] * (longest - n)]  # noqa: E731
    inputs = dict(
        input_ids=torch.tensor([pad(tokens, len(tokens)) for tokens, _ in batch]),
        attention_mask=torch.tensor([pad([1] * len(tokens), len(tokens)) for tokens, _ in batch]),
        completion_mask=torch.tensor([pad(mask, len(mask)) for _, mask in batch]),
    )
    trainer.model.eval()
    their_loss = trainer.compute_loss(trainer.model, inputs)
    their_loss.backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters()}

    model = weights.load_model(tmp_path / "policy", dtype=torch.float32)
    reference = weights.load_model(folder / "model", dtype=torch.float32).requires_grad_(False)
    cfg, total, micros = dpo.Config(beta=0.3, **ours), 0.0, batches.batch(0)
    for micro in micros:
        with torch.no_grad():
            micro["reference"] = dpo.completion_logprobs(reference, micro)
        logprobs = dpo.completion_logprobs(model, micro)
        loss, best_logprob, _ = dpo.loss_and_sums(logprobs, micro, cfg)
        part = loss / 8 - cfg.nll_weight * best_logprob / sum(map(dpo.count_best, micros))
        part.backward()
        total += part.item()
    assert abs(their_loss.item() - math.log(2)) > 0.01
    assert total == pytest.approx(their_loss.item(), abs=1e-4)
    ours = dict(model.named_parameters())
    assert ours.keys() <= grads.keys()
    assert all((p.grad - grads[name]).abs().max() < 1e-4 for name, p in ours.items())
    assert max(grad.abs().max() for grad in grads.values()) > 0.1


# ---- training


def test_learns_to_prefer(run):
    out = run("steps=60", "lr=3e-3", "batch_size=16", "eval_every=30")
    first, last = tiny.records(out, "eval")[0], tiny.records(out, "eval")[-1]
    assert last["accuracy"] > 0.8 and last["margin"] > 0.3 and last["loss"] < first["loss"] - 0.1
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "last", dtype=torch.float32)
    ours, ids = weights.load_model(out / "last"), torch.arange(97, 117)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - ours.logits(ours.hidden(ids))).abs().max() < 1e-4


def test_both_falling_is_said_in_words(run, capsys):
    run("steps=12", "lr=2e-2", "log_every=1", "schedule=constant")
    assert capsys.readouterr().out.count("note: the chosen completions become less likely") == 1
    run("steps=12", "lr=2e-2", "log_every=1", "schedule=constant", "nll_weight=3", out="with_nll")
    assert "note: the chosen" not in capsys.readouterr().out


def test_the_gradient_does_not_depend_on_the_cut(run):
    base = ["steps=1", "batch_size=16", "grad_clip=0", "nll_weight=0.5", "label_smoothing=0.1"]
    one = tiny.first_moments(run(*base, "micro_batch=16", out="a"))
    for cut in (["micro_batch=1"], ["micro_batch=1", "max_length=64"]):
        other = tiny.first_moments(run(*base, *cut, "resume=false", out="b"))
        assert (
            all((one[k] - other[k]).abs().max() < 1e-6 for k in one)
            and max(t.abs().max() for t in one.values()) > 1e-3
        )


# ---- the reference


def test_the_reference_is_the_start_and_with_lora_the_bare_base(run, folder):
    base, rows = weights.load_model(folder / "model", dtype=torch.float32), open_rows(folder)
    by_hand = [
        logprob(base, tokens.tolist(), mask).item()
        for tokens, mask in map(rows.stores[0].row, range(rows.first[-1]))
    ]
    for settings in ([], ["lora_rank=2", "lr=1e-2"]):
        out = run(*settings, out=f"out{len(settings)}")
        values = np.fromfile(next(out.glob("reference.train.*.bin")), np.float32)
        np.testing.assert_allclose(values, by_hand, atol=1e-4)
    model = weights.open(out / "last").model
    ids = torch.arange(97, 117)[None]
    with torch.no_grad():
        assert not torch.equal(model.hidden(ids), base.hidden(ids))
        lora.use(model, None)
        assert torch.equal(model.hidden(ids), base.hidden(ids))


def test_the_reference_is_kept_and_a_stale_one_is_not_used(
    run, folder, monkeypatch, tmp_path, capsys
):
    computed = lambda: capsys.readouterr().out.count("computing the reference")  # noqa: E731
    out = run()
    assert computed() == 2  # train and val
    files = sorted(out.glob("reference.*.bin"))
    run("steps=3")
    run("resume=false")
    assert computed() == 0 and sorted(out.glob("reference.*.bin")) == files
    tiny.model_dir(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was made from another model"):
        run(f"model={tmp_path}/other", "steps=4")
    run(f"model={tmp_path}/other", "resume=false")
    assert (
        computed() >= 2
        and not set(files) & set(out.glob("reference.*.bin"))
        and len(list(out.glob("reference.*.bin"))) == 2
    )
    run(f"model={tmp_path}/other", f"data={folder}/pairs", "resume=false")
    assert computed() == 2
    run(f"model={tmp_path}/other", f"data={folder}/pairs", "sizes=24", "resume=false")
    assert computed() == 2
    run(f"model={tmp_path}/other", f"data={folder}/pairs", "resume=false")
    damaged = next(out.glob("reference.train.*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.raises(UserError, match="remove it"):
        run(f"model={tmp_path}/other", f"data={folder}/pairs", "resume=false")


def test_the_key_of_the_reference_holds_the_configuration(run, folder, tmp_path, capsys):
    computed = lambda: capsys.readouterr().out.count("computing the reference")  # noqa: E731
    model = shutil.copytree(folder / "model", tmp_path / "model")
    out = run(f"model={model}")
    assert computed() == 2
    config = files.read_json(model / "config.json")
    tiny.write(model, "config.json", config | dict(rope_theta=500.0))
    run(f"model={model}", "steps=4")
    assert computed() == 2 and len(list(out.glob("reference.*.bin"))) == 2


# ---- resume, mistakes


@pytest.mark.parametrize("settings", [[], ["lora_rank=2", "lora_dropout=0.2"]])
def test_a_resumed_run_is_the_uninterrupted_one(settings, run, monkeypatch):
    settings = [*settings, "steps=8", "eval_every=3", "lr=1e-2"]
    whole = run(*settings, out="whole")
    with monkeypatch.context() as patch:
        tiny.stop_before(patch, 4)
        parts = run(*settings, out="parts")
    assert tiny.state(parts / "state")[1]["meta"]["step"] == 4
    run(*settings, out="parts")
    a, b = (tiny.state(out / "state") for out in (whole, parts))
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    assert tiny.lines(whole, "eval") == tiny.lines(parts, "eval")


def test_a_resumed_run_keeps_its_best(run):
    out = run("steps=1")
    state, best = out / "state" / "state.json", out / "best" / "config.json"
    saved = json.loads(state.read_text())
    state.write_text(json.dumps(saved | {"meta": saved["meta"] | dict(best=-1.0)}))
    before = best.stat().st_mtime_ns
    run("steps=2", "eval_every=1")
    assert best.stat().st_mtime_ns == before


def test_mistakes_end_with_a_sentence(run, folder, tmp_path):
    other = tiny.model_dir(tmp_path / "other", special=["<a>", "<b>", "<c>"])
    short = tiny.model_dir(tmp_path / "short", max_positions=8)
    tiny.store(tmp_path / "plain", folder / "model")
    for settings, words in [
        (["freeze_layers=3"], "the model has 2 layers"),
        (["label_smoothing=0.5"], "label_smoothing="),
        (["loss=ipo", "label_smoothing=0.1"], "label_smoothing="),
        ([f"model={other}"], "another tokenizer"),
        ([f"data={tmp_path}/plain"], "holds no groups"),
        (["max_length=8"], "none of the 48 groups"),
        ([f"model={short}"], "takes 8 "),
    ]:
        with pytest.raises(UserError, match=words):
            run(*settings)
    assert not (tmp_path / "out" / "last").exists()


def test_validation_rows_beyond_the_models_positions_are_refused(run, folder, tmp_path):
    group = [([97] * 256 + [98 + i, 258], [0] * 256 + [1, 1]) for i in range(2)]
    meta = dict(vocab_size=264, tokenizer=tokenizer.load(folder / "model").fingerprint)
    write_store(tmp_path / "long", dict(train=tiny.ranked(2), val=[group, tiny.ranked(1)[0]]), meta)
    with pytest.raises(UserError, match="a row has 258 tokens, .* takes 256"):
        run("steps=1", f"data={tmp_path / 'long'}", "max_length=1024", "samples=2")

"""reward.py: the ranking loss by hand, where a score is read, what is trained, saved and resumed,
and the batches of groups."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import lora
import reward
from nano import batches, runtime, tokenizer, vocab, weights
from nano.batches import Groups, collate_groups
from nano.config import UserError
from nano.store import GroupMix, mix, validation

FAST = "device=cpu dtype=float32 max_length=128 batch_size=8 log_every=100 samples=1".split()
FAST += ["norm_tokens=8", "norm_samples=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With model/ and the folders of groups data/ (2 to 4 completions) and many/."""
    path = tmp_path_factory.mktemp("reward")
    tiny.model_dir(path / "model")
    tiny.preferences(path / "data", path / "model")
    tiny.preferences(path / "many", path / "model", n=400, val=100)
    return path


@pytest.fixture
def run(folder, tmp_path):
    """Trains with settings over the fast ones -> the run folder."""

    base = [f"model={folder}/model", f"data={folder}/data", "steps=2", *FAST]

    def train(*settings, out="out"):
        tiny.train("reward", tiny.override(base, [f"out={tmp_path / out}"], settings))
        return tmp_path / out

    return train


# ---- the loss


def ranking_loss(scores, offsets, **settings):
    """The mean over groups, of which `offsets` tells the scores."""
    pairs = [torch.from_numpy(x) for x in batches.pairs(list(offsets))]
    return reward.ranking_loss(scores, pairs, **settings) / (len(offsets) - 1)


def test_ranking_loss_by_hand():
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    scores = torch.tensor([1.0, 0.5, 2.0, 1.0, -1.0, 0.3, 0.1, 0.2, -0.4], requires_grad=True)
    loss = ranking_loss(scores, [0, 2, 5, 9])
    two = -math.log(s(0.5))
    three = -(math.log(s(1.0)) + math.log(s(3.0)) + math.log(s(2.0))) / 3
    four = -sum(math.log(s(d)) for d in (0.2, 0.1, 0.7, -0.1, 0.5, 0.6)) / 6
    assert loss.item() == pytest.approx((two + three + four) / 3, abs=1e-6)
    # The derivative of -log sigmoid(d) is -sigmoid(-d) for the better, and negated for the worse.
    loss.backward()
    grads = [
        -s(-0.5),
        s(-0.5),
        -(s(-1) + s(-3)) / 3,
        (s(-1) - s(-2)) / 3,
        (s(-3) + s(-2)) / 3,
        -(s(-0.2) + s(-0.1) + s(-0.7)) / 6,
        (s(-0.2) - s(0.1) - s(-0.5)) / 6,
        (s(-0.1) + s(0.1) - s(-0.6)) / 6,
        (s(-0.7) + s(-0.5) + s(-0.6)) / 6,
    ]
    assert scores.grad.tolist() == pytest.approx([g / 3 for g in grads], abs=1e-6)


def test_margin_and_centring_by_hand():
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    scores = torch.tensor([1.0, 0.5, -1.0])
    by_hand = [
        -math.log(s(d - 0.25)) + 0.01 * t**2 for d, t in ((0.5, 1.5), (2.0, 0.0), (1.5, -0.5))
    ]
    assert ranking_loss(scores, [0, 3], margin=0.25, centring=0.01).item() == pytest.approx(
        sum(by_hand) / 3, abs=1e-6
    )


def test_a_constant_scorer_is_at_ln_2_and_pushes_nothing_on_the_whole():
    scores = torch.full((9,), 0.7, dtype=torch.bfloat16, requires_grad=True)
    loss = ranking_loss(scores, [0, 2, 5, 9])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(2), abs=1e-7)
    loss.backward()
    assert scores.grad.float().sum().abs() < 1e-6 < scores.grad.float().abs().max()


# ---- batches


def open_rows(folder, split="train", name="data"):
    tok = tokenizer.load(folder / "model")
    return mix([folder / name], split=split, tokenizer=tok, groups=True)


def test_batches_hold_every_group_once_and_whole(folder):
    rows = open_rows(folder)
    for world, micro_batch in ((1, 1), (2, 3)):
        parts = [
            Groups(rows, 10, micro_batch, 128, seed=3, rank=r, world=world) for r in range(world)
        ]
        seen = []
        for step in range(parts[0].steps_per_epoch):
            micros = [part.batch(step) for part in parts]
            assert len({len(m) for m in micros}) == 1  # all ranks do the same number of forwards
            for micro in (m for rank in micros for m in rank):
                assert micro["tokens"].shape[0] == micro_batch and micro["tokens"].shape[1] <= 128
                assert micro["share"].sum().item() == pytest.approx(micro["best"].sum().item())
                flat = micro["tokens"].flatten()
                for n, at in zip(micro["number"].tolist(), micro["last"].tolist(), strict=True):
                    tokens, mask = rows.stores[0].row(n)
                    assert flat[at - len(tokens) + 1 : at + 1].tolist() == tokens.tolist()
                    assert (micro["rows"] == micro["number"].tolist().index(n)).sum() == mask.sum()
                seen += micro["number"].tolist()
        assert sorted(seen) == list(range(rows.first[-1]))


def test_what_a_step_holds_does_not_depend_on_how_it_is_cut(folder):
    rows = open_rows(folder)
    for step in (0, 3, 9):
        a = Groups(rows, 8, 1, 64, seed=1).batch(step)
        b = Groups(rows, 8, 4, 128, seed=1, fixed_shapes=True).batch(step)
        real = [np.concatenate([m["number"][m["real"] > 0] for m in micros]) for micros in (a, b)]
        assert sorted(real[0]) == sorted(real[1])
    assert (
        b[0]["tokens"].shape == (4, 128)
        and len(b[0]["last"]) % 64 == 0
        and len(b[0]["share"]) % 64 == 0
    )


def test_groups_over_max_length_are_dropped_and_counted(folder, run):
    rows = open_rows(folder)
    batches = Groups(rows, 4, 1, 40)
    assert batches.dropped == (rows.lengths > 40).sum() > 0
    with pytest.raises(UserError, match="none of the 48 groups"):
        Groups(rows, 4, 1, 10)


def test_sizes_pick_groups_and_stores_are_checked(folder, tmp_path):
    dirs, tok = [folder / "data", folder / "many"], tokenizer.load(folder / "model")
    rows = mix(dirs, ["10", "5%"], seed=1, tokenizer=tok, groups=True)
    assert (
        len(rows) == 10 + 20
        and rows.fingerprint() == mix(dirs, ["10", "5%"], seed=1, groups=True).fingerprint()
    )
    assert rows.fingerprint() != mix(dirs, ["10", "5%"], seed=2, groups=True).fingerprint()
    lengths = [[len(tokens) for tokens, _ in rows.group(g)] for g in range(len(rows))]
    assert rows.lengths.tolist() == [sum(n) for n in lengths] and rows.longest.tolist() == [
        max(n) for n in lengths
    ]
    assert rows.squares.tolist() == [sum(x * x for x in n) for n in lengths]
    assert rows.prompt(12) == rows.group(12)[1][0][: len(rows.prompt(12))].tolist()
    for sizes in (["1"], ["49", "all"]):
        with pytest.raises(UserError):
            mix(dirs, sizes, groups=True)
    tiny.store(tmp_path / "plain", folder / "model")
    with pytest.raises(UserError, match="holds no groups"):
        mix([tmp_path / "plain"], groups=True)
    tiny.preferences(tmp_path / "noval", folder / "model", val=0)
    assert validation([tmp_path / "noval"], groups=True) is None


# ---- where the score is read


def scorer(**changes):
    return tiny.model(head="score", **changes).requires_grad_(False)


@pytest.mark.parametrize("changes", [{}, dict(windows=(4, 0))])
def test_scores_depend_on_no_padding_and_no_neighbour(changes):
    model, rows = scorer(**changes), [row for group in tiny.ranked(4, seed=5) for row in group]
    rows[0] = (rows[0][0][:3] + [0, 0], rows[0][1][:3] + [1, 1])  # ends in the padding's own id
    alone = torch.cat(
        [model.score(model.hidden(torch.tensor([tokens])))[:, -1] for tokens, _ in rows]
    )
    for order in (range(len(rows)), np.random.default_rng(0).permutation(len(rows))):
        groups = [(int(i), [rows[i]]) for i in order]
        longest = max(sum(len(rows[i][0]) for i in p) for p in (order[:5], order[5:]))
        for extra in (0, 7, 50):
            micro = collate_groups([groups[:5], groups[5:]], 2, longest + extra, fixed_shapes=True)
            real = micro["real"] > 0
            scores = torch.empty(len(rows))
            scores[micro["number"][real]] = reward.score(model, micro)[real]
            assert (scores - alone).abs().max() < 1e-5


def test_reversed_ranking_turns_accuracy_around(folder):
    model, rt, cfg = scorer(), runtime.Runtime("cpu", dtype="float32"), reward.Config()
    rows = open_rows(folder, "val")
    straight = reward.evaluate(rt, model, Groups(rows, 4, 2, 128), cfg)
    group = GroupMix.group
    rows.group = lambda g: group(rows, g)[::-1]
    reversed_ = reward.evaluate(rt, model, Groups(rows, 4, 2, 128), cfg)
    assert straight["accuracy"] + reversed_["accuracy"] == pytest.approx(1)
    assert straight["gap"] == pytest.approx(-reversed_["gap"]) and straight[
        "score_std"
    ] == pytest.approx(reversed_["score_std"])


def test_a_tie_is_no_right_order():
    batch = dict(
        better=torch.tensor([0]), worse=torch.tensor([1]), share=torch.ones(1), real=torch.ones(2)
    )
    assert (
        reward.summary(reward.loss_and_sums(torch.zeros(2), batch, reward.Config())[1])["accuracy"]
        == 0
    )


# ---- training


@pytest.fixture(scope="module")
def trained(folder):
    """A run that learns to rank."""
    out = folder / "trained"
    settings = f"model={folder}/model data={folder}/many out={out} steps=80 lr=3e-3".split()
    settings += ["norm_samples=1000", "batch_size=16"]
    tiny.train("reward", tiny.override(FAST, settings))
    return out


def test_learns_what_can_be_learned(trained):
    first, last = tiny.records(trained, "eval")[0], tiny.records(trained, "eval")[-1]
    assert first["accuracy"] < 0.7 and last["accuracy"] > 0.95 and last["gap"] > 1


def test_the_policys_fresh_samples_have_mean_0_and_variance_1(trained, folder):
    rt, tok = runtime.Runtime("cpu", dtype="float32"), tokenizer.load(folder / "model")
    model = weights.open(trained / "last").model
    cfg = reward.Config(
        model=str(folder / "model"), norm_samples=1500, norm_tokens=8, max_length=128, seed=77
    )
    rows = open_rows(folder, name="many")
    samples = reward.draw_samples(rt, cfg, rows, tok, 256)
    scores = reward.score_samples(rt, model, **samples, micro_batch=4, max_length=128)
    gain, bias = weights.read_score_scale(trained / "last")
    assert (gain, bias) != (1.0, 0.0)
    assert abs((gain * scores + bias).mean()) < 0.1 and abs((gain * scores + bias).std() - 1) < 0.1
    i = 7  # and a score is the one that the sample has by itself
    start, end = samples["spans"][i].tolist()
    assert scores[i] == pytest.approx(
        model.score(model.hidden(samples["samples"][i : i + 1, :end]))[0, -1].item(), abs=1e-5
    )
    ends = samples["spans"][:, 1] - 1
    full = samples["spans"][:, 1] - samples["spans"][:, 0] == 8
    assert (full | (samples["samples"][torch.arange(len(ends)), ends] == 258)).all()


def test_the_policys_samples_do_not_depend_on_the_number_of_ranks(folder):
    cfg = reward.Config(model=str(folder / "model"), norm_samples=5, norm_tokens=8, max_length=128)
    rows, tok = open_rows(folder, name="many"), tokenizer.load(folder / "model")

    def draw(rank, world):
        rt = SimpleNamespace(
            rank=rank, world=world, device="cpu", dtype=torch.float32, all_sum=lambda x: x
        )
        rt.autocast = contextlib.nullcontext
        return reward.draw_samples(rt, cfg, rows, tok, 256).values()

    alone, first, second = draw(0, 1), draw(0, 2), draw(1, 2)
    assert all(torch.equal(a, b + c) for a, b, c in zip(alone, first, second, strict=True))


def test_gain_and_bias_by_hand():
    gain, bias = reward.normaliser(torch.tensor([3.0, 5.0, 10.0]))
    assert gain == pytest.approx((26 / 3) ** -0.5) and bias == pytest.approx(-6 * gain)
    assert reward.normaliser(torch.full((4,), 2.0)) == (1.0, -2.0)


def hf_scores(model, rows, pad_id):
    """Of transformers, on right-padded rows."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([[*tokens, *[pad_id] * (longest - len(tokens))] for tokens, _ in rows])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]


def test_transformers_scores_the_same(trained, folder):
    import transformers

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        trained / "last", dtype=torch.float32
    )
    model = weights.open(trained / "last").model
    rows = [row for group in tiny.ranked(5, seed=9) for row in group]
    ours = torch.stack(
        [model.score(model.hidden(torch.tensor([tokens])))[0, -1] for tokens, _ in rows]
    )
    assert theirs.config.pad_token_id not in tokenizer.load(folder / "model").stop_ids
    assert (hf_scores(theirs, rows, theirs.config.pad_token_id) - ours).abs().max() < 1e-5
    assert ours.std() > 0.1


def test_lora_trains_the_head_in_full_and_opens_in_peft(run, folder):
    import peft
    import transformers

    out = run("lora_rank=4", "lora_targets=q_proj,down_proj", "lr=3e-2", "steps=6")
    before, after = tiny.tensors(folder / "model"), weights.open(out / "last").model
    frozen = {name.replace(".base.", "."): p for name, p in after.named_parameters()}
    assert before.keys() - frozen.keys() == {"lm_head.weight"}
    assert all(torch.equal(t, frozen[name]) for name, t in before.items() if name in frozen)
    rows = [row for group in tiny.ranked(4, seed=9) for row in group]
    ours = torch.stack(
        [after.score(after.hidden(torch.tensor([tokens])))[0, -1] for tokens, _ in rows]
    )
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "model", num_labels=1, pad_token_id=257
    )
    theirs = peft.PeftModel.from_pretrained(base, out / "last").eval()
    assert (hf_scores(theirs, rows, 257) - ours).abs().max() < 1e-5
    assert weights.read_score_scale(out / "last") != (1.0, 0.0)
    saved = tiny.state(out / "state")[0]
    names = {
        name.split(".")[-2] if "lora" in name else name
        for name in saved
        if name.startswith("model.")
    }
    assert names == {"model.score.weight", "lora_A", "lora_B"}


def test_frozen_parts_stay_bit_for_bit(run, folder):
    out = run("freeze_layers=1", "lr=1e-2")
    before, after = tiny.tensors(folder / "model"), tiny.tensors(out / "last")
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert same == {name for name in before if "embed_tokens" in name or "layers.0." in name}
    assert not any(
        "embed_tokens" in name or "layers.0." in name for name in tiny.state(out / "state")[0]
    )


def test_the_gradient_does_not_depend_on_the_cut(run):
    base = [
        "steps=1",
        "batch_size=16",
        "grad_clip=0",
        "norm_samples=0",
        "norm_tokens=128",
        "centring=0.01",
        "margin=0.1",
    ]
    one = tiny.first_moments(run(*base, "micro_batch=16", out="a"))
    for cut in (["micro_batch=1"], ["micro_batch=1", "max_length=64"]):
        other = tiny.first_moments(run(*base, *cut, "resume=false", out="b"))
        assert (
            all((one[k] - other[k]).abs().max() < 1e-6 for k in one)
            and max(t.abs().max() for t in one.values()) > 1e-3
        )


@pytest.mark.parametrize("settings", [[], ["lora_rank=2", "lora_dropout=0.2"]])
def test_a_resumed_run_is_the_uninterrupted_one(settings, run, monkeypatch):
    settings = [*settings, "steps=8", "eval_every=3", "lr=1e-2"]
    whole = run(*settings, out="whole")
    with monkeypatch.context() as patch:
        tiny.stop_before(patch, 4)
        parts = run(*settings, out="parts")
    best = min(r["loss"] for r in tiny.records(parts, "eval")[1:])
    meta = tiny.state(parts / "state")[1]["meta"]
    assert (meta["step"], meta["best"], meta["normalised"]) == (4, best, True)
    assert run(*settings, out="parts") == parts
    a, b = (tiny.state(out / "state") for out in (whole, parts))
    assert a[1] == b[1] and a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    for dir in ("last", "best"):
        assert weights.read_score_scale(whole / dir) == weights.read_score_scale(parts / dir)
    assert tiny.lines(whole, "eval") == tiny.lines(parts, "eval")


def test_a_resumed_run_keeps_its_best(run):
    out = run("steps=1")
    state = out / "state" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"meta": dict(step=1, best=-1.0)}))
    before = (out / "best" / "config.json").stat().st_mtime_ns
    run("steps=2", "eval_every=1")
    assert (out / "best" / "config.json").stat().st_mtime_ns == before


# ---- mistakes


def test_mistakes_end_with_a_sentence(run, folder, trained, tmp_path):
    other = tiny.model_dir(tmp_path / "other", special=["<a>", "<b>", "<c>"])
    short = tiny.model_dir(tmp_path / "short", max_positions=8)
    for settings, words in [
        ([f"policy={trained}/last"], "no language model"),
        ([f"model={trained}/last"], "no language model"),
        ([f"policy={other}"], "another tokenizer"),
        ([f"model={other}"], "another tokenizer"),
        (["norm_tokens=128"], "no prompt leaves room"),
        (["max_length=8"], "none of the 48 groups"),
        ([f"model={short}", "norm_samples=0", "norm_tokens=128"], "takes 8 "),
        (["batch_size=0"], "must be 1 or more"),
        (["data=nowhere"], "nowhere does not exist"),
        (["resume=true"], "no saved state"),
    ]:
        with pytest.raises(UserError, match=words):
            run(*settings)
    assert not (tmp_path / "out" / "last").exists()


def test_a_reward_model_can_be_trained_on(run, trained):
    out = run(f"model={trained}/last", "norm_samples=0", "norm_tokens=128")
    assert tiny.records(out, "eval")[0]["accuracy"] > 0.9  # the head came along
    assert weights.read_score_scale(out / "last") == (1.0, 0.0)  # not those of the earlier run


# ---- padding


def byte_level(path, settings, special=tiny.SPECIAL, rows=264):
    """A model directory whose tokenizer knows the special tokens `special` alone."""
    tiny.model_dir(path)
    model = weights.load_model(path)
    for matrix in (model.model["embed_tokens"], model.lm_head):
        matrix.weight = torch.nn.Parameter(matrix.weight[:rows].detach().clone())
    model.cfg.vocab_size = rows
    weights.save_model(model, path, like=path)
    spec = json.loads((path / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]
    vocab, last = spec["model"]["vocab"], 255 + len(special)
    spec["model"]["vocab"] = {token: id for token, id in vocab.items() if id <= last}
    tiny.write(path, "tokenizer.json", spec)
    config = json.loads((path / "tokenizer_config.json").read_text()) | settings
    tiny.write(path, "tokenizer_config.json", {k: v for k, v in config.items() if v})
    return path


def pieces(path):
    """A model directory with a sentencepiece model: <unk>, <s>, </s>, bytes, letters."""
    tiny.model_dir(path)
    (path / "tokenizer.json").unlink()
    tokens = [("<unk>", 0.0, vocab.UNKNOWN), ("<s>", 0.0, vocab.CONTROL)]
    tokens += [("</s>", 0.0, vocab.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", 0.0, vocab.BYTE) for byte in range(256)]
    tokens += [(char, -float(i), vocab.NORMAL) for i, char in enumerate("▁abc")]
    proto = vocab.sentencepiece_proto(tokens, True, (0, 1, 2, -1))
    (path / "tokenizer.model").write_bytes(proto)
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    names |= dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=True)
    tiny.write(path, "tokenizer_config.json", names)
    return path


END = "<|endoftext|>"
TOKENIZERS = {  # how it is made, and the token that pads in the end
    "BOS": (lambda path: byte_level(path, {}), "<|im_start|>"),
    "its own padding": (lambda path: byte_level(path, dict(pad_token=END)), END),
    "no BOS": (lambda path: byte_level(path, dict(bos_token=None)), END),
    "no padding": (lambda path: byte_level(path, dict(bos_token=None, pad_token=None)), END),
    "one token": (
        lambda path: byte_level(
            path, dict(bos_token=END, eos_token=END, pad_token=None), special=[END]
        ),
        tokenizer.PADDING,
    ),
    "one token and no row more": (
        lambda path: byte_level(
            path, dict(bos_token=END, eos_token=END, pad_token=END), special=[END], rows=257
        ),
        tokenizer.PADDING,
    ),
    "sentencepiece": (pieces, "<s>"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_and_peft_read_our_scores_alone_and_in_a_batch(kind, tmp_path):
    import peft
    import transformers

    make, padding = TOKENIZERS[kind]
    base = make(tmp_path / "base")
    tok = tokenizer.load(base, template="plain")
    model = weights.load_model(base, head="score")
    weights.save_model(model, tmp_path / "full", like=base, tok=tok)
    adapted = weights.load_model(base, head="score")
    lora.apply(adapted, 4, 8)
    for p in tiny.adapter_parameters(adapted):
        torch.nn.init.normal_(p, std=0.1)
    weights.save_adapter(adapted, tmp_path / "adapter", base=base, tok=tok)
    scale = dict(reward_gain=2.0, prompt_template="plain")
    tiny.write(tmp_path / "adapter", "score_scale.json", scale)
    tiny.train("prepare.weights", [f"source={tmp_path}/adapter", f"out={tmp_path}/merged"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert scale.items() <= config.items()
    classifier = transformers.AutoModelForSequenceClassification
    for name, ours in (("full", model), ("adapter", adapted), ("merged", adapted)):
        dir = tmp_path / name
        if name == "adapter":
            opened = peft.AutoPeftModelForSequenceClassification.from_pretrained(dir, num_labels=1)
        else:
            opened = classifier.from_pretrained(dir, dtype=torch.float32)
        their_tok = transformers.AutoTokenizer.from_pretrained(dir)
        if name == "adapter":
            opened.config.pad_token_id = their_tok.pad_token_id  # an adapter has no config.json
        assert their_tok.pad_token == padding and their_tok.padding_side == "right"
        assert opened.config.pad_token_id == their_tok.pad_token_id
        texts = [text + their_tok.eos_token for text in ("abc", "a b c a b c", "c")]
        alone = [their_tok(text, return_tensors="pt") for text in texts]
        batch = their_tok(texts, padding=True, return_tensors="pt")
        assert batch["input_ids"][2, -1] == their_tok.pad_token_id not in tok.stop_ids
        with torch.no_grad():
            expected = [ours.score(ours.hidden(one["input_ids"]))[0, -1] for one in alone]
            scores = [opened.eval()(**one).logits[0, 0] for one in alone]
            together = opened(**batch).logits[:, 0]
        expected = torch.stack(expected)
        assert (torch.stack(scores) - expected).abs().max() < 1e-5
        assert (together - expected).abs().max() < 1e-5
        # the tokens of a policy mean the same to it
        assert tokenizer.load(dir).fingerprint == tok.fingerprint
        weights.open(dir)

"""generate.py against forwards without a cache, against transformers, and against the distributions
it says it samples from."""

import numpy as np
import pytest
import torch

import lora
from model import ModelConfig, Transformer
from nano import generate as G
from nano import weights
from nano.config import UserError
from nano.generate import choose, generate, keep_from


def tiny(seed=0, std=0.3, **changes):
    settings = dict(
        vocab_size=97,
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_positions=256,
    )
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**(settings | changes))).init_weights(std).eval()


def ragged(n, low=1, high=20, seed=0, vocab=97):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(low, high)).tolist() for _ in range(n)]


@torch.no_grad()
def greedy_uncached(model, prompt, new, stop_ids=()):
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[0, -1]).argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def forward_logprobs(model, prompt, tokens, temperature=1.0):
    ids = torch.tensor([prompt + tokens])
    logits = model.logits(model.hidden(ids))[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


FEW = dict(shapes="few", sync_every=8)

FAMILIES = {
    "multi-head": dict(n_kv_heads=4),
    "grouped, tied": dict(n_kv_heads=2, tie_embeddings=True),
    "one kv head": dict(n_kv_heads=1),
    "window": dict(windows=(5, 0)),
    "biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True),
    "caps and scales": dict(attn_cap=0.5, logit_cap=3.0, logit_scale=2.0, embed_scale=3.0),
    "norms around, two ropes": dict(norm="rms1", norm_at="around", rope_layers=("local", "none")),
    "alibi, parallel": dict(positions="alibi", residual="parallel_one_norm", n_kv_heads=2),
    "qk norm, wide heads": dict(qk_norm="head", head_dim=16),
    "packed": dict(dim=256, ffn_dim=256, n_heads=4, n_kv_heads=1, head_dim=64, qkv_bias=True),
}


def test_the_lowest_temperature_is_greedy_and_finite():
    logits = torch.tensor([[1e3, -1e3, 0.0], [2.0, 2.0 + 1e-4, -5.0]])
    tokens, logprobs = choose(logits, torch.tensor([0.9, 0.1]), temperature=1e-6)
    assert tokens.tolist() == [0, 1] and logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_uncached(name):
    model = tiny(std=0.1 if name == "packed" else 0.3, **FAMILIES[name])
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1, std=0.3)  # biases and norms that matter
    prompts = ragged(5)
    made = generate(
        model, prompts, 70, temperature=0.0, batch_size=4
    )  # 70: the cache grows on the way
    for prompt, tokens, logprobs in zip(prompts, made.tokens, made.logprobs, strict=True):
        assert tokens == greedy_uncached(model, prompt, 70)
        assert (torch.tensor(logprobs) - forward_logprobs(model, prompt, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_greedy_equals_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")

    extra = dict(llama={}, mistral=dict(sliding_window=6), qwen3=dict(head_dim=16))[kind]
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **extra,
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = weights.load_model(tmp_path)
    prompts = ragged(6, low=2)
    made = generate(ours, prompts, 30, temperature=0.0, batch_size=4)
    for prompt, tokens in zip(prompts, made.tokens, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
        )
        assert tokens == out[0, len(prompt) :].tolist()


def test_samples_do_not_depend_on_the_batch():
    model, prompts, stop = tiny(), ragged(13), tuple(range(12))
    settings = dict(stop_ids=stop, seed=3, temperature=0.9)
    one = generate(model, prompts, 40, batch_size=13, **settings)
    assert (
        0 < sum(one.finished) and len({len(t) for t in one.tokens}) > 5
    )  # lengths differ, rows leave and are refilled
    for other in (
        dict(batch_size=1),
        dict(batch_size=4),
        dict(batch_size=5, plan=dict(sync_every=8)),
        dict(batch_size=4, plan=dict(pack=True)),
        dict(batch_size=5, plan=dict(shapes="fixed", sync_every=4)),
        dict(batch_size=12, plan=dict(shapes="few", sync_every=8)),
    ):
        again = generate(model, prompts, 40, **settings, **other)
        assert again.tokens == one.tokens and again.finished == one.finished, other
        for a, b in zip(again.logprobs, one.logprobs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert generate(model, prompts, 40, **(settings | dict(seed=4))).tokens != one.tokens
    assert generate(model, prompts, 40, **(settings | dict(seed=(3, 1)))).tokens != one.tokens
    for row, tokens in enumerate(one.tokens):
        assert one.finished[row] == (tokens[-1] in stop)
        assert not set(tokens[:-1]) & set(stop)
        assert one.finished[row] or len(tokens) == 40
        expected = forward_logprobs(model, prompts[row], tokens, 0.9)
        assert (torch.tensor(one.logprobs[row]) - expected).abs().max() < 1e-4


def test_sample_ids_share_out_a_call():
    model, prompts = tiny(), ragged(4)
    whole = generate(model, prompts, 10, group=2, seed=7)
    half = generate(model, prompts[1::2], 10, group=2, seed=7, sample_ids=[2, 3, 6, 7])
    assert half.tokens == whole.tokens[2:4] + whole.tokens[6:8]


@pytest.mark.parametrize("batch_size", [3, 4, 15])
def test_group_equals_repeated_prompts(batch_size, monkeypatch):
    model, prompts = tiny(), ragged(5, low=2)
    repeated = generate(
        model, [p for p in prompts for _ in range(3)], 20, stop_ids=(1, 2, 3), batch_size=batch_size
    )
    filled = []
    prefill = G.Batch.prefill
    monkeypatch.setattr(
        G.Batch, "prefill", lambda self, p, *a: (filled.extend(p), prefill(self, p, *a))[1]
    )
    group = generate(model, prompts, 20, stop_ids=(1, 2, 3), group=3, batch_size=batch_size)
    assert group.tokens == repeated.tokens and group.finished == repeated.finished
    assert len({tuple(t) for t in group.tokens[:3]}) == 3  # samples of one prompt differ
    assert sorted(filled) == sorted(
        prompts
    )  # each prompt once, although its group is spread over several refills


def test_common_prefix():
    def common(*rows):
        return G.common_prefix([[*row] for row in rows])

    assert common(range(20), range(30)) == 19  # each keeps a token of its own
    assert common(range(30), [*range(25), 7], range(30)) == 25
    assert common(range(30), range(10)) == 0  # not worth a forward
    assert common(range(30), range(30)) == common(range(30)) == 0  # one row alone


@pytest.mark.parametrize("plan", [{}, FEW, dict(shapes="fixed", sync_every=8)])
@pytest.mark.parametrize("name", ["grouped, tied", "window"])
def test_what_all_prompts_begin_with_is_computed_once(name, plan, monkeypatch):
    model = tiny(**FAMILIES[name])
    (start,) = ragged(1, 40, 41, seed=7)
    prompts = [start + prompt for prompt in ragged(5, 1, 9, seed=8)]
    hidden, computed = Transformer.hidden, []

    def count(self, tokens, *args, **kwargs):
        computed.append(tokens.numel())
        return hidden(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Transformer, "hidden", count)
    samples = generate(model, prompts, 8, temperature=0.0, batch_size=2, plan=plan)
    monkeypatch.undo()
    assert computed.count(40) == 1 and max(computed) <= 2 * 24  # of fixed shapes, 64 wide
    for prompt, tokens, logprobs in zip(prompts, samples.tokens, samples.logprobs, strict=True):
        assert tokens == greedy_uncached(model, prompt, 8)
        torch.testing.assert_close(
            torch.tensor(logprobs), forward_logprobs(model, prompt, tokens), atol=1e-4, rtol=0
        )


def test_frequencies_are_the_softmax():
    """20,000 draws, all from one next-token distribution, by Pearson's chi-square."""
    model = tiny(std=0.2, vocab_size=40)
    prompt, temperature = [3, 1, 4], 1.2
    made = generate(
        model, [prompt], 1, temperature=temperature, group=20_000, batch_size=20_000, seed=5
    )
    counts = np.bincount([t[0] for t in made.tokens], minlength=40)
    with torch.no_grad():
        expected = (
            model.logits(model.hidden(torch.tensor([prompt])))[0, -1].double() / temperature
        ).softmax(-1).numpy() * 20_000
    assert expected.min() > 5
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 72.1  # the 99.9 % quantile for 39 degrees of freedom


def reference_filter(logits, top_k, top_p):
    """float64, one row: temperature was applied, then top_k, then top_p on what is left."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    probs = np.exp(logits[order] - logits[order].max())
    probs /= probs.sum()
    kept = order[np.cumsum(probs) - probs < top_p]
    out = np.zeros_like(logits)
    out[kept] = np.exp(logits[kept] - logits[kept].max())
    return out / out.sum()


@pytest.mark.parametrize(
    "top_k, top_p", [(5, 1.0), (0, 0.8), (7, 0.6), (1, 1.0), (0, 1e-9), (1000, 0.999)]
)
@pytest.mark.parametrize("V", [50, 3000])
def test_filters_against_float64(top_k, top_p, V):
    torch.manual_seed(0)
    logits = torch.randn(4, V) * 3
    kept = logits >= keep_from(logits, top_k, top_p)
    n = 1_000
    uniform = torch.linspace(0, 1, n + 1)[
        :-1
    ]  # inverse CDF at evenly spaced points: exact frequencies, no luck in them
    for row, keep in zip(logits, kept, strict=True):
        expected = reference_filter(row.double().numpy(), top_k, top_p)
        assert ((expected > 0) == keep.numpy()).all()
        tokens, logprobs = choose(row.expand(n, V), uniform, top_k=top_k, top_p=top_p)
        counts = np.bincount(tokens.numpy(), minlength=V)
        assert counts[expected == 0].sum() == 0
        assert np.abs(counts / n - expected).max() < 2 / n
        torch.testing.assert_close(
            logprobs, row.log_softmax(-1)[tokens]
        )  # before the filters, as documented


def test_flat_distributions_do_not_hide_from_top_p():
    logits = torch.zeros(2, 5000)  # far more tokens than the 1,024 that are looked at first
    logits[1] = torch.randn(5000) * 0.01
    kept = (logits >= keep_from(logits, 0, 0.9)).sum(-1)
    assert kept[0] == 5000  # all tie with the last one that is needed
    assert abs(int(kept[1]) - 4500) < 20


def test_no_token_of_probability_zero_at_the_edges():
    logits = torch.full((3, 6), -torch.inf)
    logits[:, 2:4] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert choose(logits, uniform)[0].tolist() == [2, 3, 3]


@pytest.fixture
def steps(monkeypatch):
    """The number of rows of each decoding step."""
    rows, step = [], G.Batch.step
    monkeypatch.setattr(G.Batch, "step", lambda self, n: (rows.append(n), step(self, n))[1])
    return rows


def test_stops_early_and_reports_why(steps):
    model = tiny()
    prompts = ragged(6)
    free = generate(model, prompts, 30, temperature=0.0)
    assert sum(steps) == 180
    steps.clear()
    stop = free.tokens[0][4]
    made = generate(model, prompts, 30, temperature=0.0, stop_ids=(stop,))
    assert made.finished[0]
    for whole, cut, finished in zip(free.tokens, made.tokens, made.finished, strict=True):
        at = whole.index(stop) + 1 if stop in whole else 30
        assert cut == whole[:at] and finished == (stop in whole)
    assert not any(free.finished)
    assert sum(steps) == sum(map(len, made.tokens)) < 180


def test_unequal_lengths_cost_their_sum(steps):
    model, rng = tiny(), np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 16, 64), 100).tolist()
    prompts = ragged(64)
    made = generate(model, prompts, lengths, batch_size=16)
    assert [len(t) for t in made.tokens] == lengths
    assert sum(steps) == sum(lengths)  # a CPU wastes no row
    batches = sum(16 * max(lengths[i : i + 16]) for i in range(0, 64, 16))
    assert sum(steps) < 0.4 * batches
    assert len(steps) < 0.6 * batches / 16  # rows are refilled before the last of them ends
    steps.clear()
    made = generate(model, prompts, lengths, batch_size=16, plan=FEW)
    assert [len(t) for t in made.tokens] == lengths
    assert sum(lengths) < sum(steps) < 0.7 * batches
    steps.clear()
    made = generate(model, prompts[:16], [100] + [2] * 15, batch_size=16, plan=FEW)
    assert sum(steps) == 16 * 8 + 92


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_done_idle_without_harm(streaming):
    """With `few` shapes a row that ended stays in the batch: for longer than the cache has slots
    for it."""
    asked, lengths = [200 if streaming else 2, 60, 180, 180, 180], [2, 60, 180, 180, 180]
    count = [0] * 5

    def on_token(sample, token):
        count[sample] += 1
        return count[sample] == lengths[sample]

    made = generate(
        tiny(),
        [[1] * 56] + [[2]] * 4,
        asked,
        batch_size=5,
        plan=FEW,
        on_token=on_token if streaming else None,
    )
    assert [len(t) for t in made.tokens] == lengths


def test_fixed_shapes_run_every_batch_in_one_shape(monkeypatch):
    model, shapes, placed, hooked = tiny(), [], [], []
    step, place = G.Batch.step, G.Batch.place
    monkeypatch.setattr(
        G.Batch,
        "place",
        lambda self, rows, *a: (placed.append(len(rows)), place(self, rows, *a))[1],
    )
    monkeypatch.setattr(
        G.Batch, "step", lambda self, rows: (shapes.append((rows, self.slots)), step(self, rows))[1]
    )
    lengths = [3, 30, 7, 21, 5, 40, 2]
    made = generate(
        model,
        ragged(7),
        lengths,
        batch_size=3,
        plan=dict(shapes="fixed", sync_every=5),
        step_hook=lambda: hooked.append(1),
    )
    assert [len(t) for t in made.tokens] == lengths
    assert (
        len(set(shapes)) == 1 and placed == [3, 3, 3] and len(hooked) == len(shapes) + 3
    )  # and one prefill a batch


def test_limits_of_the_model():
    model = tiny(max_positions=32)
    made = generate(model, [[1] * 31, [1] * 20, [5]], 100, temperature=0.0)
    assert [len(t) for t in made.tokens] == [1, 12, 31] and made.finished == [False] * 3
    for prompt, words in (
        ([1] * 32, "32 tokens"),
        ([], "prompt 1 is empty"),
        ([97], "another model's tokenizer"),
    ):
        with pytest.raises(UserError, match=words):
            generate(model, [[1], prompt], 4)
    assert generate(model, [], 4).tokens == []


def test_streaming_sees_every_token_and_may_stop():
    model, prompts, seen = tiny(), ragged(5), {}
    whole = generate(model, prompts, 25, seed=1)

    def on_token(sample, token):
        seen.setdefault(sample, []).append(token)
        return sample == 2 and len(seen[2]) == 7

    for sync_every in (1, 4):
        seen.clear()
        made = generate(
            model,
            prompts,
            25,
            seed=1,
            on_token=on_token,
            batch_size=3,
            plan=dict(sync_every=sync_every),
        )
        assert [seen[i] for i in range(5)] == made.tokens
        assert made.tokens == [t[:7] if i == 2 else t for i, t in enumerate(whole.tokens)]
        assert made.finished == [False, False, True, False, False]


def test_the_model_is_left_as_it_was():
    model = tiny()
    model.train()
    lora.apply(model, rank=4, alpha=8, dropout=0.5)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model, ragged(2), 20)
        hidden = model.hidden(torch.tensor([[1, 2, 3]]))
    assert model.training and all(m.training for m in model.modules())
    hidden.float().sum().backward()  # no cast of a weight made without gradient is left in autocast's cache
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_adapters_count_packed_or_not():
    model = tiny(dim=256, std=0.1, ffn_dim=256)
    prompts = ragged(3)
    base = generate(model, prompts, 20, temperature=0.0)
    lora.apply(model, rank=4, alpha=8, dropout=0.5)
    assert generate(model, prompts, 20, temperature=0.0).tokens == base.tokens
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    model.eval()
    expected = [greedy_uncached(model, p, 20) for p in prompts]
    model.train()
    assert expected != base.tokens
    for pack in (False, True):
        assert (
            generate(model, prompts, 20, temperature=0.0, plan=dict(pack=pack)).tokens == expected
        )
    lora.use(model, None)
    assert generate(model, prompts, 20, temperature=0.0).tokens == base.tokens


def test_weights_are_read_anew_each_time():
    model = tiny(dim=256, ffn_dim=256, std=0.1)
    before = generate(model, [[1, 2, 3]], 20, temperature=0.0, plan=dict(pack=True))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1 + 0.3 * torch.rand_like(p))
    after = generate(model, [[1, 2, 3]], 20, temperature=0.0, plan=dict(pack=True))
    assert after.tokens != before.tokens
    assert after.tokens[0] == greedy_uncached(model, [1, 2, 3], 20)


def test_sharded_and_compiled_models(tmp_path):
    """FSDP2 (of one process) and torch.compile change the modules; what is generated stays the
    same."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    expected = generate(tiny(), ragged(3), 20)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = tiny()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
            layer.compile(backend="eager")
        fully_shard(model, mesh=mesh)
        assert not any(
            m._forward_pre_hooks for m in G.snapshot(model, torch.float32, False).modules()
        )
        for pack in (False, True):
            assert generate(model, ragged(3), 20, plan=dict(pack=pack)).tokens == expected.tokens
        model(dict(tokens=torch.tensor([[1, 2, 3]]))).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lm_head" not in n)
        assert generate(model, ragged(3), 20).tokens == expected.tokens
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_logprobs(autocast):
    """The decoder's log-probabilities are those of a forward in the same precision, to bf16's."""
    model = tiny(dim=256, ffn_dim=512, std=0.05)
    if not autocast:
        model.to(torch.bfloat16)
    prompts = ragged(4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        made = generate(model, prompts, 30)
        for prompt, tokens, logprobs in zip(prompts, made.tokens, made.logprobs, strict=True):
            assert (
                torch.tensor(logprobs) - forward_logprobs(model, prompt, tokens).float()
            ).abs().max() < 0.1


def test_layouts_of_weights():
    """A CPU packs 16-bit checkpoints as fp16 and others as fp32, and both multiply like float64."""
    torch.manual_seed(0)
    weight, x = torch.randn(300, 256) / 16, torch.randn(3, 2, 256)
    stored = weight.bfloat16().float()
    stored[0, :2] = torch.tensor([2.0**-30, 2.0**-24])  # fp16 rounds the first to 0
    x86 = "fbgemm" in torch.backends.quantized.supported_engines
    assert G.layout_of(torch.randn(8, 8)) == "plain"
    assert G.layout_of(weight) == ("blocked" if x86 else "plain")
    assert G.layout_of(stored) == ("fp16" if x86 else "plain")
    assert G.layout_of(stored * 2**20) != "fp16"  # beyond its range
    for matrix in (weight, stored):
        for bias in (None, torch.randn(300)):
            for layout in {"plain", G.layout_of(matrix)}:
                y = G.FrozenLinear(matrix, bias, layout)(x)
                expected = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
                assert y.dtype == torch.float32
                torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [16, 32])
def test_layers_that_read_the_same_input_are_one_product(bits):
    model = tiny(**FAMILIES["packed"], std=0.1)
    if bits == 16:
        model.to(torch.bfloat16).float()
    decoder = G.Decoder(model, pack=True)
    layer = decoder.model.layers[0]
    shared = layer.self_attn.k_proj.shared
    assert shared is layer.self_attn.v_proj.shared and isinstance(layer.mlp.up_proj, G.Part)
    prompts = ragged(3)
    samples = generate(decoder, prompts, 20, temperature=0.0)
    assert samples.tokens == [greedy_uncached(model, p, 20) for p in prompts]
    assert shared.x is None and not shared.parts  # nothing is kept of the last call


def test_a_decoder_serves_many_calls():
    model = tiny(**FAMILIES["packed"], std=0.1)
    decoder = G.Decoder(model)
    for seed in (0, 1):
        expected = generate(model, [[1, 2, 3]], 20, seed=seed)
        assert generate(decoder, [[1, 2, 3]], 20, seed=seed).tokens == expected.tokens


@pytest.mark.parametrize("family", ["grouped, tied", "window"])
@pytest.mark.parametrize("plan", [{}, dict(shapes="few"), dict(shapes="fixed")])
def test_a_next_turn_goes_on_from_its_cache(family, plan, monkeypatch):
    model, first = tiny(**FAMILIES[family]), ragged(4, low=5)
    turn = generate(model, first, [20, 3, 9, 1], seed=1, keep=True, batch_size=3, plan=plan)
    for prompt, tokens, past in zip(first, turn.tokens, turn.pasts, strict=True):
        assert past.ids == prompt + tokens[:-1] and past.cache[0][0].shape[1] == len(past.ids)
    second = [p + t + [7, 8] for p, t in zip(first, turn.tokens, strict=True)]
    second[2] = first[2][:4] + [9] * 30  # parts from its past after four tokens
    turn.pasts[3] = None  # has none
    expected = generate(model, second, 30, seed=2, plan=plan)
    computed = []
    hidden = Transformer.hidden

    def counted(self, tokens, *args, **keys):
        computed.append(tokens.shape[1])
        return hidden(self, tokens, *args, **keys)

    monkeypatch.setattr(Transformer, "hidden", counted)
    samples = generate(model, second, 30, seed=2, pasts=turn.pasts, plan=plan)
    assert samples.tokens == expected.tokens
    for a, b in zip(samples.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    computed.clear()
    generate(model, second[:1], 5, pasts=turn.pasts[:1], plan=plan | dict(shapes="free"))
    assert computed == [2] + [1] * 5  # the last token of the answer and one of two new ones


def test_damaged_weights_end_with_a_sentence():
    model = tiny()
    with torch.no_grad():
        model.head_weight.fill_(torch.nan)
    for settings in (dict(temperature=0.0), {}, dict(top_p=0.9), dict(top_k=3)):
        with pytest.raises(UserError, match="weights are damaged"):
            generate(model, [[1, 2]], 4, **settings)

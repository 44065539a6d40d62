import pytest
import tiny
import torch
import torch.nn.functional as F

import sft
from model import Head
from nano import losses

N, C, V = 37, 8, 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(
        losses, "CHUNK_LOGITS", 16 * V
    )  # 16 rows at a time: 37 rows end in a chunk of 5
    monkeypatch.setattr(losses, "BLOCK_LOGITS", 6 * V)  # and in blocks of 6, 6, 4


def inputs(n=N, dtype=torch.float32):
    torch.manual_seed(1)
    hidden = torch.randn(n, C).to(dtype).requires_grad_()
    head = torch.randn(V, C).to(dtype).requires_grad_()
    return hidden, head, torch.randint(V, (n,)), torch.rand(n).mul(2)


def plain(hidden, head, targets, temperature=1.0):
    """(leaves, log-probabilities (N, V)) in float64 by the textbook."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, head)]
    return leaves, torch.log_softmax(leaves[0] @ leaves[1].t() / temperature, dim=-1)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), (a, b)


def check_cross_entropy(n):
    """Loss and gradients of n rows are the textbook's."""
    hidden, head, targets, weights = inputs(n)
    loss = losses.cross_entropy(hidden, head, targets, weights)
    leaves, logprobs = plain(hidden, head, targets)
    right = (F.nll_loss(logprobs, targets, reduction="none") * weights).sum()
    assert loss.dtype == torch.float32
    close([loss, *gradients(loss / 7, hidden, head)], [right, *gradients(right / 7, *leaves)])


@pytest.mark.parametrize("n", [1, 15, 16, 17, 37, 48])
def test_cross_entropy_and_gradients_are_the_textbook_s(n):
    check_cross_entropy(n)


def test_cross_entropy_equals_torch_s_where_all_weigh_the_same():
    hidden, head, targets, _ = inputs()
    loss = losses.cross_entropy(hidden, head, targets, torch.ones(N)) / N
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ head.t(), targets))


def check_logprobs(temperature):
    """Log-probabilities, entropy and gradients are the textbook's."""
    hidden, head, targets, weights = inputs()
    ours, entropy = losses.token_logprobs(hidden, head, targets, temperature, entropy=True)
    leaves, logprobs = plain(hidden, head, targets, temperature)
    theirs = logprobs.gather(1, targets[:, None])[:, 0]
    right = -(logprobs.exp() * logprobs).sum(-1)
    close([ours, entropy], [theirs, right])
    mixed = [
        (a * weights).sum() + 0.3 * (b * weights.flip(0)).sum()
        for a, b in ((ours, entropy), (theirs, right))
    ]
    close(gradients(mixed[0], hidden, head), gradients(mixed[1], *leaves))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_logprobs_entropy_and_gradients_are_the_textbook_s(temperature):
    check_logprobs(temperature)


def test_gradients_against_finite_differences():
    hidden, head, targets, _ = inputs(5)
    head = head.detach()

    def total(x):
        logprobs, entropy = losses.token_logprobs(x, head, targets, 0.8, entropy=True)
        return (logprobs + 2 * entropy).sum() + losses.cross_entropy(
            x, head, targets, torch.ones(5)
        )

    analytic = gradients(total(hidden), hidden)[0]
    step = 1e-2
    for i, j in [(0, 0), (2, 5), (4, 7)]:
        bump = torch.zeros_like(hidden)
        bump[i, j] = step
        numeric = (total(hidden.detach() + bump) - total(hidden.detach() - bump)) / (2 * step)
        assert abs(numeric - analytic[i, j]) < 5e-3


def test_logprobs_alone_are_the_same_as_with_entropy():
    hidden, head, targets, _ = inputs()
    alone = losses.token_logprobs(hidden, head, targets, 0.7)
    assert torch.equal(alone, losses.token_logprobs(hidden, head, targets, 0.7, entropy=True)[0])


def test_a_second_backward_is_an_error():
    """The first one scales the gradients where they are."""
    hidden, head, targets, weights = inputs()
    loss = losses.cross_entropy(hidden, head, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_do_not_change_the_result(monkeypatch):
    hidden, head, targets, weights = inputs()
    chunked = losses.cross_entropy(hidden, head, targets, weights)
    chunked = [chunked, *gradients(chunked, hidden, head)]
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 2**25)
    monkeypatch.setattr(losses, "BLOCK_LOGITS", 2**25)
    whole = losses.cross_entropy(hidden, head, targets, weights)
    close(chunked, [t.double() for t in (whole, *gradients(whole, hidden, head))], 1e-6)


def test_compiled_chunks_are_the_textbook_s(monkeypatch):
    """What compile=true does. Once two sizes of a chunk are compiled, no other size is."""
    torch.compiler.reset()
    monkeypatch.setattr(losses, "compiled", True)
    counters = torch._dynamo.utils.counters["stats"]
    for n in (37, 18):
        check_cross_entropy(n)
    graphs = counters["unique_graphs"]
    for n in (32, 31):
        check_cross_entropy(n)
    assert counters["unique_graphs"] == graphs > 0
    check_logprobs(0.7)
    hidden, head, targets, weights = inputs()
    with torch.no_grad():
        alone = losses.cross_entropy(hidden, head, targets, weights)
    torch.testing.assert_close(alone, losses.cross_entropy(hidden, head, targets, weights).detach())


@pytest.mark.parametrize("loss", ["cross_entropy", "token_logprobs"])
def test_a_frozen_side_gets_no_gradient_and_costs_none(loss, monkeypatch):
    hidden, head, targets, weights = inputs()
    shapes, empty_like, zeros = [], torch.empty_like, torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *a, **k: shapes.append(tuple(a[0])) or zeros(*a, **k)
    )
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **k: shapes.append(tuple(t.shape)) or empty_like(t, **k)
    )

    def run(hidden, head):
        shapes.clear()
        if loss == "cross_entropy":
            out = losses.cross_entropy(hidden, head, targets, weights)
        else:
            out = losses.token_logprobs(hidden, head, targets).sum()
        if out.requires_grad:
            out.backward()
        return (N, C) in shapes, (V, C) in shapes

    assert run(hidden, head) == (True, True)
    both = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    assert (
        run(hidden, head.detach()) == (True, False)
        and head.grad is None
        and torch.equal(hidden.grad, both[0])
    )
    hidden.grad = None
    assert (
        run(hidden.detach(), head) == (False, True)
        and hidden.grad is None
        and torch.equal(head.grad, both[1])
    )
    with torch.no_grad():  # nor does a validation loss
        assert run(hidden, head) == (False, False)


def test_no_gradient_where_no_token_is_a_target():
    hidden, head, targets, weights = inputs()
    for rows in (slice(0, 0), slice(None)):  # no row, and rows of weight 0
        loss = losses.cross_entropy(hidden[rows], head, targets[rows], 0 * weights[rows])
        assert loss == 0
        for g, p in zip(gradients(loss / 1e-9, hidden, head), (hidden, head), strict=True):
            assert g.shape == p.shape and (g == 0).all()
    none = losses.token_logprobs(hidden[:0], head, targets[:0])
    assert none.shape == (0,) and none.sum() == 0


def test_autocast_keeps_the_loss_exact():
    """Sum and softmax are fp32, so the error of the bf16 products is all that is left.

    It is less than 0.1% of 1,000 losses of about 10. A bf16 sum would be off by whole per cents.
    """
    torch.manual_seed(0)
    n, c, v = 1000, 64, 300
    hidden, head = torch.randn(n, c).requires_grad_(), (torch.randn(v, c) / 4).requires_grad_()
    targets, weights = torch.randint(v, (n,)), torch.ones(n)
    for kind in (losses.cross_entropy, lambda *a: -losses.token_logprobs(*a[:3]).sum()):
        leaves, logprobs = plain(hidden, head, targets)
        right = F.nll_loss(logprobs, targets, reduction="sum")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = kind(hidden, head, targets, weights)
        assert loss.dtype == torch.float32 and abs(loss / right - 1) < 1e-3
        assert abs(loss / right - 1) > 1e-9  # the products did run in bf16
        for g, r in zip(gradients(loss, hidden, head), gradients(right, *leaves), strict=True):
            assert g.dtype == torch.float32
            assert (g - r).norm() / r.norm() < 1e-2


@pytest.mark.parametrize("loss", ["cross_entropy", "token_logprobs", "hits"])
def test_the_logits_of_all_rows_never_exist(loss, monkeypatch):
    n, c, v = 512, 8, 1000
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 16 * v)
    hidden = torch.randn(n, c).requires_grad_()
    head = torch.randn(v, c).requires_grad_()
    targets = torch.randint(v, (n,))

    def theirs():
        F.cross_entropy(hidden @ head.t(), targets).backward()

    def ours():
        if loss == "hits":
            return losses.hits(hidden, head, targets)
        out = getattr(losses, loss)(
            hidden, head, targets, *[torch.ones(n)] * (loss == "cross_entropy")
        )
        out.sum().backward()

    logits, chunk = 4 * n * v, 4 * 16 * v
    assert tiny.peak_memory(theirs) >= 2 * logits
    assert tiny.peak_memory(ours) < 5 * chunk + 4 * (4 * v * c) < logits / 2


@pytest.mark.parametrize("loss", ["cross_entropy", "token_logprobs"])
def test_a_head_that_scales_and_caps(loss):
    """The logits 2 tanh(0.7 x / 2), against float64."""
    hidden, matrix, targets, weights = inputs()
    head = Head(matrix, 0.7, 2.0)
    leaves = [t.detach().double().requires_grad_() for t in (hidden, matrix)]
    logits = 2 * torch.tanh(0.7 * leaves[0] @ leaves[1].t() / 2)
    if loss == "cross_entropy":
        ours = losses.cross_entropy(hidden, head, targets, weights)
        logprobs = logits.log_softmax(-1)
    else:
        ours, entropy = losses.token_logprobs(hidden, head, targets, 1.3, entropy=True)
        ours = entropy.sum() - (ours * weights).sum()
        logprobs = (logits / 1.3).log_softmax(-1)
    right = (F.nll_loss(logprobs, targets, reduction="none") * weights).sum()
    if loss == "token_logprobs":
        right = right - (logprobs.exp() * logprobs).sum()
    close([ours, *gradients(ours, hidden, matrix)], [right, *gradients(right, *leaves)])
    assert torch.equal(losses.hits(hidden, head, targets), losses.hits(hidden, matrix, targets))


def test_hits():
    hidden, head, targets, _ = inputs()
    targets[::3] = (hidden @ head.t()).argmax(-1)[::3]
    hit = losses.hits(hidden, head, targets)
    _, logprobs = plain(hidden, head, targets)
    assert torch.equal(hit, (logprobs.argmax(-1) == targets).float()) and 0 < hit.sum() < N
    assert not hit.requires_grad
    assert losses.hits(hidden[:0], head, targets[:0]).shape == (0,)
    assert [len(part) for part in losses.token_scores(hidden[:0], head, targets[:0])] == [0, 0]
    for given in (head, Head(head, 2.0, 1.5)):
        scores = losses.token_scores(hidden, given, targets)
        assert torch.equal(scores[1], hit) and not scores[0].requires_grad
        close(scores[:1], [losses.token_logprobs(hidden, given, targets)])


def test_labels_are_shifted():
    """The loss of a row is that of each token's successor, by torch's own cross entropy."""
    model, rows = tiny.model(), tiny.rows(3)
    for tokens, mask in rows:
        ids = torch.tensor(tokens)
        right = F.cross_entropy(
            model.logits(model.hidden(ids[None]))[0, :-1], ids[1:], reduction="none"
        )
        batch = tiny.batch([[(tokens, mask)]], 64)
        loss = sft.loss_sum(model, model(batch), batch)
        assert mask[1:].count(0) > 0
        torch.testing.assert_close(loss, (right * torch.tensor(mask[1:])).sum())

import math
import re
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import records

from nano import log as log_module
from nano.log import Log


def new_log(dir, total, start_step=0, flops=0.0, device="cpu", devices=1, is_main=True):
    rt = types.SimpleNamespace(is_main=is_main, name=device, devices=devices)
    log = Log(dir, rt, start_step)
    log.begin(total, flops)
    return log


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log_module.time, "perf_counter", clock)
    return clock


def test_step_line(tmp_path, capsys, clock):
    log = new_log(tmp_path, 600, flops=1e9, device="NVIDIA A100-SXM4-80GB", devices=2)
    clock.now += 10
    loss, memory = torch.tensor(1.23449), 3_100_000_000
    log.step(
        120, tokens=12340, targets=torch.tensor(9000), memory=memory, loss=loss, lr=2e-5, n=12345
    )
    log.close()
    rates = "1,234 tok/s | mfu 0.2% | mem 3.1 GB | eta 40s"
    assert (
        capsys.readouterr().out == f"step 120/600 | loss 1.234 | lr 2.0e-05 | n 12,345 | {rates}\n"
    )
    (r,) = records(tmp_path)
    assert (r["kind"], r["step"], r["loss"], r["lr"], r["n"]) == (
        "train",
        120,
        loss.item(),
        2e-5,
        12345,
    )
    assert (r["tokens_per_s"], r["targets_per_s"], r["memory_gb"]) == (1234.0, 900.0, 3.1)
    assert r["mfu"] == 1234 * 1e9 / (2 * 312e12)


def test_rates_count_from_line_to_line_without_pauses(tmp_path, capsys, clock):
    log = new_log(tmp_path, 8, start_step=2)
    clock.now += 2
    log.step(3, tokens=100)
    with log.paused():
        clock.now += 50
    clock.now += 4
    log.step(4, tokens=100)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 3/8 | 50 tok/s | eta 10s"  # a CPU: no mfu
    assert second == "step 4/8 | 25 tok/s | eta 1m52s"  # 56 s for 2 steps: pauses come again


def test_steps_are_aligned(tmp_path, capsys):
    log = new_log(tmp_path, 1000)
    log.eval(7, loss=1.0)
    log.eval(1000, loss=1.0)
    a, b = capsys.readouterr().out.splitlines()
    assert a == "eval    7/1000 | loss 1.000" and len(a) == len(b)


def test_not_finite(tmp_path, capsys):
    log = new_log(tmp_path, 5)
    log.eval(1, loss=torch.tensor(math.nan), gap=math.inf)
    log.samples(1, [{"reward": math.nan}])
    assert "loss nan | gap inf" in capsys.readouterr().out
    first, second = records(tmp_path)
    assert first["loss"] is None and first["gap"] is None and second["rows"] == [{"reward": None}]


def losses(dir):
    return [(r["kind"], r["step"], r["loss"]) for r in records(dir)]


def test_resume_has_each_step_once(tmp_path, capsys):
    log = new_log(tmp_path, 4)
    log.eval(0, loss=10)
    for step in (1, 2, 3):
        log.step(step, loss=step)
        log.eval(step, loss=10 * step)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 4, "lo')  # a crash in the middle of a line

    log = new_log(tmp_path, 4, start_step=2)
    log.eval(
        2, loss=-1
    )  # the loop begins with the evaluation at the step it stopped at: it stands there already
    for step in (3, 4):
        log.step(step, loss=100 * step)
    log.close()
    assert losses(tmp_path) == [
        ("eval", 0, 10),
        ("train", 1, 1),
        ("eval", 1, 10),
        ("train", 2, 2),
        ("eval", 2, 20),
        ("train", 3, 300),
        ("train", 4, 400),
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1),
        (2, 2),
        (3, 300),
        (4, 400),
    ]


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    for loss in (1, 2):
        log = new_log(tmp_path, 4)
        log.eval(0, loss=loss)
        log.close()
    assert losses(tmp_path) == [("eval", 0, 2)]


def test_each_line_is_on_disk_when_it_is_logged(tmp_path):
    log = new_log(tmp_path, 4)
    log.step(1, loss=1)
    assert losses(tmp_path) == [("train", 1, 1)]


def test_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    log = new_log(tmp_path, 5)
    rows = [
        {
            "prompt": "What is 2 | 3?\nSay.",
            "response": "word " * 200,
            "reward": torch.tensor(0.51234),
        },
        {"prompt": "你好", "response": "\x1b[31mred", "reward": 2},
    ]
    log.samples(3, rows)
    log.close()
    out = capsys.readouterr().out
    assert "samples at step 3" in out and "你好" in out and "0.512" in out and "..." in out
    assert "\x1b" not in out and "⏎" in out
    assert max(map(len, out.splitlines())) <= 60 and len(out.splitlines()) < 20
    (r,) = records(tmp_path)
    assert (
        r["kind"] == "samples"
        and r["rows"][0]["response"] == "word " * 200
        and r["rows"][1]["prompt"] == "你好"
    )
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    assert (
        text.splitlines()[2].startswith("| What is 2 \\| 3?<br>Say. | word word")
        and len(text.splitlines()) == 4
    )


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = new_log(tmp_path / "run", 5, is_main=False)
    log.step(1, tokens=1, loss=torch.tensor(1.0))
    log.eval(1, loss=1)
    log.samples(1, [{"a": 1}])
    log.text("x")
    with log.paused():
        pass
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "device, peak",
    [
        ("NVIDIA H100 80GB HBM3", 990e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 990e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("TPU v5e", 197e12),
        ("cpu", None),
        ("NVIDIA A1000 Laptop GPU", None),
    ],
)
def test_peak_flops(device, peak):
    assert log_module.peak_flops(device) == peak


@pytest.mark.parametrize(
    "seconds, text",
    [
        (-1, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (252, "4m12s"),
        (3780, "1h03m"),
        (187_200, "2d04h"),
    ],
)
def test_duration(seconds, text):
    assert log_module.duration(seconds) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0.000"),
        (-0.5, "-0.500"),
        (1234.5, "1234.500"),
        (123456.7, "123,457"),
        (1e-4, "1.0e-04"),
        (True, "True"),
        (7, "7"),
        ("a", "a"),
        (-math.inf, "-inf"),
    ],
)
def test_show(value, text):
    assert log_module.show(value) == text
    assert re.fullmatch(r"\S+", text)


def test_the_console_shows_what_fits_and_the_files_have_all(tmp_path, capsys):
    log = new_log(tmp_path, 1000)
    metrics = {f"a_long_metric_{i}": float(i) for i in range(20)}
    log.step(1, tokens=10, memory=10**9, **metrics)
    log.step(2, tokens=10, memory=10**9, **{name: 1e6 for name in metrics})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert [re.findall(r"a_long_metric_\d+", line) for line in lines] == [list(metrics)[:2]] * 2
    assert all(metrics.keys() <= record.keys() for record in records(tmp_path))

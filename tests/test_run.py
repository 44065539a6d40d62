"""What stands between a run and a lie: steps with a bad gradient, stops that look finished, mixed
folders, two processes in one folder, results over their sources, and what main leaves behind."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import stages
import tiny
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nano import config, files, generate, log, optim, store, weights
from nano.config import UserError

NAMES = ("pretrain", "sft", "reward", "dpo", "ppo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    stages.prepare(path)
    return path


@pytest.fixture
def run(folder, tmp_path):
    """run(name, *settings) trains a stage of tests/stages.py in tmp_path/out -> how it ended."""

    def run(name, *more, out=tmp_path / "out"):
        stage, argv = stages.job(folder, name, out, "save_every=2", *more)
        return tiny.train(stage, argv)

    return run


def poison(monkeypatch, *steps, value=math.nan):
    """Puts `value` into the gradient of the calls of an optimizer with these numbers, from 0."""
    calls, clip = iter(range(10**6)), optim.clip_

    def clip_(params, max_norm):
        params = list(params)
        if next(calls) in steps:
            next(p for p in params if p.grad is not None).grad[0] = value
        return clip(params, max_norm)

    monkeypatch.setattr(optim, "clip_", clip_)


def at_step(monkeypatch, step, do):
    """Calls do() in the optimizer's step with this number, from 0."""
    calls, clip = iter(range(10**6)), optim.clip_

    def clip_(params, max_norm):
        if next(calls) == step:
            do()
        return clip(params, max_norm)

    monkeypatch.setattr(optim, "clip_", clip_)


# ---- 1: steps that are skipped


def unfused(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=False, foreach=False)


KINDS = dict(
    adamw=lambda model: optim.build(model, lr=1e-2, weight_decay=0.1),
    muon=lambda model: optim.build(model, "muon", lr=1e-2, weight_decay=0.1),
    unfused=unfused,  # as on XLA
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_a_bad_gradient_changes_nothing(kind, value):
    """A twin takes the good steps alone. All stays equal, bit for bit: weights, moments, counts."""

    def take(good):
        model = tiny.model()
        optimizer = KINDS[kind](model)
        for i, is_good in enumerate(good):
            torch.manual_seed(sum(good[:i]))
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            if not is_good:
                model.layers[1].mlp.up_proj.weight.grad[3, 2] = value
            optim.step(optimizer, optim.clip_(model.parameters(), 1.0))
        states = [optimizer.state[p] for p in model.parameters()]
        moments = [s[key] for s in states for key in sorted(s) if key != "exp_avg_" and len(s)]
        return [*model.parameters(), *moments], optimizer.skips.tolist()

    twin, skips = take([True, True])
    assert skips == [0, 0, 0]
    cut, skips = take([False, True, False, False, True, False])
    assert skips == [4, 1, 2] and len(cut) == len(twin)
    assert all(torch.equal(a, b) for a, b in zip(cut, twin, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_is_reported_and_the_weights_stay_finite(
    name, run, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, 2)  # ppo: the second pass's policy step of the first iteration
    assert run(name, "log_every=1", "grad_clip=0") == "done"
    out = capsys.readouterr().out
    assert out.count(" skipped since the last such line, because the gradient held NaN") == 1
    assert [r.get("skipped") for r in tiny.records(tmp_path / "out", "train")][-1] == 1
    tensors = tiny.tensors(tmp_path / "out" / "last")
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("name", NAMES)
def test_bad_steps_in_a_row_end_the_run_and_leave_the_last_good_state(
    name, run, folder, tmp_path, monkeypatch, capsys
):
    first = 8 if name == "ppo" else 2  # ppo takes four steps an iteration, two of each model
    poison(monkeypatch, *range(first, 1000), value=math.inf)
    more = ("steps=8", "log_every=0") if name != "ppo" else ("steps=8", "log_every=0", "save_every=1")
    with pytest.raises(UserError, match="in [2-9] steps in a row .*last good state"):
        run(name, *more, "bad_steps=2")
    assert "warning at step" in capsys.readouterr().out
    tensors, saved = tiny.state(tmp_path / "out" / "state")
    assert saved["meta"]["step"] == 2
    floats = [t for t in tensors.values() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in floats)
    monkeypatch.undo()
    assert run(name, *more, "bad_steps=2") == "done"  # the cause is gone, and the run goes on


def test_any_number_of_bad_steps(run, monkeypatch, tmp_path):
    poison(monkeypatch, *range(1, 100))
    assert run("sft", "bad_steps=0") == "done"
    assert tiny.records(tmp_path / "out", "train")[-1]["skipped"] == 3


def test_a_count_of_bad_steps_survives_a_stop(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        poison(patch, 1, 2)
        tiny.stop_before(patch, 3)
        assert run("sft") == "SIGTERM"
    poison(monkeypatch, 0)
    with pytest.raises(UserError, match="in 3 steps in a row"):
        run("sft")


def test_every_rank_skips_what_one_rank_spoils(folder, tmp_path, monkeypatch):
    """The loss of a rank is infinite in one step. DDP, FSDP and tensor parallelism do what one
    process does."""
    before = """
import os
calls, backward = [], runtime.Runtime.backward
def spoiled(self, loss):
    calls.append(1)
    bad = len(calls) == 2 and self.rank == self.world - 1
    backward(self, loss * float("inf") if bad else loss)
runtime.Runtime.backward = spoiled
start = runtime.start
def start_anew(cfg):
    calls.clear()
    return start(cfg)
runtime.start = start_anew
"""
    one = ("batch_size=4", "log_every=1")  # one micro-batch a step on each of two ranks
    more = dict(ddp=["parallel=ddp"], fsdp=["parallel=fsdp"], tensor=["parallel=none", "tensor=2"])
    jobs = [
        stages.job(folder, "sft", tmp_path / mode, *one, *keys, f"micro_batch={4 if mode == 'tensor' else 2}")
        for mode, keys in more.items()
    ]
    jobs.append(
        stages.job(
            folder, "pretrain", tmp_path / "muon", *one, "micro_batch=2", "optimizer=muon", "parallel=fsdp"
        )
    )
    status, output = tiny.processes(tmp_path, jobs, before=before)
    assert status == 0, output[-4000:]
    assert output.count("skipped since the last such line") == len(jobs)
    poison(monkeypatch, 1)
    stages.alone([stages.job(folder, "sft", tmp_path / "one", *one, "micro_batch=4")])
    for mode in more:
        stages.assert_same_weights(tmp_path / mode / "last", tmp_path / "one" / "last")
    assert all(t.isfinite().all() for t in tiny.tensors(tmp_path / "muon" / "last").values())


@pytest.mark.parametrize(
    "loss, jumps", [(2.9, False), (3.4, False), (4.0, False), (4.6, True), (math.nan, False)]
)
def test_a_loss_spike_in_words(loss, jumps):
    """The range of the lines before is 0.2, their median 2.9 and 1.5 times that 4.35."""
    recent = [2.8, 2.9, 3.0] * 3
    words = log.spike(loss, recent)
    assert (words is not None) == jumps
    assert not jumps or words.startswith("the loss jumped to 4.600 from about 2.900: ")
    assert log.spike(4.6, recent[:7]) is None  # too few to tell
    assert log.spike(6.0, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 3.0]) is None  # a falling curve


def test_a_run_names_a_loss_spike(run, monkeypatch, capsys):
    import sft

    calls, loss_sum = iter(range(10**6)), sft.loss_sum
    monkeypatch.setattr(
        sft, "loss_sum", lambda *args: loss_sum(*args) * (50 if next(calls) == 9 else 1)
    )
    run("sft", "steps=10", "eval_every=-1", "batch_size=2", "log_every=1")
    assert "warning at step 10: the loss jumped to" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("streams", [False, True])
def test_sampling_from_a_model_that_gives_nan(temperature, streams):
    model = tiny.model()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    on_token = (lambda sample, token: False) if streams else None
    with pytest.raises(UserError, match="the model gives NaN or infinity"):
        generate.generate(
            model, [[65, 66]], 4, temperature, stop_ids=[258], seed=0, on_token=on_token
        )


# ---- 2 and 9: how a run ends, and what it gives back

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_main_says_so(number, run, tmp_path, monkeypatch, capsys):
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with monkeypatch.context() as patch:
        at_step(patch, 0, lambda: os.kill(os.getpid(), number))
        assert run("sft") == signal.Signals(number).name
    assert tiny.state(tmp_path / "out" / "state")[1]["meta"]["step"] == 1
    assert "finishing this step, then saving" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert run("sft") == "done"


def test_a_signal_that_is_ignored_stays_so(run, monkeypatch):
    """As under nohup."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 0, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert run("sft") == "done"
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_a_stage_in_a_thread_and_one_that_fails(run, folder, tmp_path, monkeypatch):
    """As a notebook calls them: handlers and lock are given back, whatever happens."""
    handlers = [signal.getsignal(n) for n in SIGNALS]
    ended = []
    thread = threading.Thread(target=lambda: ended.append(run("sft", out=tmp_path / "thread")))
    thread.start()
    thread.join()
    assert ended == ["done"]
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("sft")
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert not (tmp_path / "out" / "lock").exists()
    assert run("sft") == "done"
    with pytest.raises(UserError):
        run("sft", f"data={tmp_path}/none", out=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_process_that_waits_for_the_others_ends_at_once(folder, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    keys = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_PORT=port)
    env = os.environ | keys | dict(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    _, argv = stages.job(folder, "sft", tmp_path / "out")
    process = subprocess.Popen([sys.executable, "sft.py", *argv], cwd=ROOT, env=env)
    try:
        end = time.time() + 60
        while time.time() < end:  # it listens when it waits
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        time.sleep(0.3)
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM  # 143 in a shell
    finally:
        process.kill()


def test_a_reader_that_leaves_stops_the_run_which_saves(run, tmp_path, monkeypatch):
    """`python sft.py ... | head`. It was a crash without a state."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe, monkeypatch.context() as patch:
        at_step(patch, 0, lambda: patch.setattr(sys, "stdout", pipe))
        assert run("sft", "steps=50") == "SIGPIPE"
    assert tiny.state(tmp_path / "out" / "state")[1]["meta"]["step"] == 1


# ---- 3: one truth


def points(out):
    """The steps of train/loss in a run's TensorBoard events."""
    events = EventAccumulator(str(out))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_a_run_that_starts_anew_leaves_nothing_of_the_one_before(
    run, folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    shutil.copytree(folder / "rows", tmp_path / "rows")
    (rows,) = [f"data={tmp_path}/rows"]
    run("sft", "steps=6", "keep_last=2", rows)
    assert {p.name for p in out.iterdir()} >= {"best", "last", "state", "step-4", "step-6"}
    for split in tmp_path.glob("rows/val.*"):
        split.unlink()
    meta = json.loads((tmp_path / "rows" / "meta.json").read_text())
    del meta["splits"]["val"]
    (tmp_path / "rows" / "meta.json").write_text(json.dumps(meta))
    anew = ("steps=3", "lr=1e-4", "save_every=100", "eval_every=0", "sample_every=-1", rows)
    with monkeypatch.context() as patch:  # killed before its first save
        at_step(patch, 1, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("sft", *anew, "resume=false")
    assert "has removed what" in capsys.readouterr().out
    left = {p.name for p in out.iterdir() if not p.name.startswith("events.")}
    assert left == {"config.cfg", "log.jsonl"}
    assert run("sft", *anew) == "done"
    assert [r["step"] for r in tiny.records(out, "train")] == [1, 2, 3] == points(out)
    left = {p.name for p in out.iterdir() if not p.name.startswith("events.")}
    assert left == {"config.cfg", "last", "log.jsonl", "state"}


def test_a_kill_while_a_run_starts_anew_mixes_nothing(run, tmp_path, monkeypatch):
    """It dies in each of the first removals. The same command without resume=false starts at
    step 0 then, or, before anything is removed, goes on with the old run."""
    rmtree = shutil.rmtree
    for killed in range(4):
        out = tmp_path / str(killed)
        run("sft", "steps=2", out=out)
        calls = iter(range(10**6))

        def dies(path, *args, out=out, calls=calls, killed=killed, **kwargs):
            if path in [Path(f"{out}/{name}.unfinished") for name in ("state", "best", "last")]:
                if next(calls) == killed:
                    raise KeyboardInterrupt
            return rmtree(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", dies)
            with contextlib.suppress(KeyboardInterrupt):
                run("sft", "steps=2", "resume=false", "lr=1e-4", out=out)
        run("sft", "steps=2", "lr=1e-4", out=out)
        if killed:
            whole = tmp_path / f"{killed}-whole"
            run("sft", "steps=2", "lr=1e-4", out=whole)
            assert tiny.same_tensors(out / "last", whole / "last")


def test_a_resume_compares_with_the_settings_of_the_state(run, tmp_path, monkeypatch, capsys):
    """config.cfg holds those of a run that was killed before it saved anything."""
    run("sft", "steps=2", "lr=1e-3")
    with monkeypatch.context() as patch:
        at_step(patch, 0, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("sft", "lr=1e-4")
    assert "lr=0.0001\n" in (tmp_path / "out" / "config.cfg").read_text()
    capsys.readouterr()
    run("sft", "lr=1e-4")
    assert "other settings: steps 2 -> 4, lr 0.001 -> 0.0001\n" in capsys.readouterr().out


def test_an_evaluation_alone_removes_nothing(run, tmp_path):
    run("sft", "steps=2")
    before = tiny.tensors(tmp_path / "out" / "last")
    run("sft", "steps=0", "epochs=0", "resume=false")
    assert before.keys() == tiny.tensors(tmp_path / "out" / "last").keys()


# ---- 4: two processes


def test_a_folder_belongs_to_one_process(run, tmp_path):
    (tmp_path / "out").mkdir()
    fd = files.lock(tmp_path / "out" / "lock")
    os.write(fd, b"process 7 on node-3\n")
    said = r"another process \(process 7 on node-3\) is at work in .*`srun -n 2 python sft.py`"
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            run("sft")
    os.close(fd)
    assert run("sft") == "done"


def test_a_lock_dies_with_its_process(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        files.lock(tmp_path / "lock")
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    assert files.lock(tmp_path / "lock") is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    fd = files.lock(tmp_path / "lock")
    assert fd and files.lock(tmp_path / "lock") is None
    (tmp_path / "lock").unlink()  # a lock on a file that is gone locks nothing
    assert files.lock(tmp_path / "lock")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    assert files.lock(tmp_path / "lock")


def test_two_writers_of_a_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda s: None)
    splits, meta = {"train": [([1], None)]}, dict(vocab_size=9)
    with store.Writer(tmp_path / "data", 9) as writer:
        writer.add("train", [2])
        with pytest.raises(UserError, match="another process is writing"):
            store.write_store(tmp_path / "data", splits, meta)
    assert store.Store(tmp_path / "data", "train").row(0)[0].tolist() == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


# ---- 5: results over their sources


def test_the_base_of_an_adapter_is_not_written_over(run, folder, tmp_path):
    run("sft", "steps=2", out=tmp_path / "base")
    base = tmp_path / "base" / "last"
    run("sft_lora", "steps=2", f"model={base}", out=tmp_path / "adapter")
    adapter = f"model={tmp_path}/adapter/last"
    before = tiny.tensors(base)
    for name, more in (("sft", [adapter]), ("dpo", [adapter]), ("ppo", [adapter]), ("ppo_lora", [])):
        more = [*more, "steps=2", "resume=false"]
        out = tmp_path / "base"
        if name == "ppo_lora":
            more.append(f"reward={tmp_path}/adapter/last")
        with pytest.raises(UserError, match="last would be written over .*base/last, from which"):
            run(name, *more, out=out)
    now = tiny.tensors(base)
    assert all(torch.equal(before[key], now[key]) for key in before)


def test_what_else_a_script_is_made_from(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    for targets, sources in (
        (["model"], ["model/tokenizer.json"]),  # a file in a folder that is replaced
        (["a.json"], ["", None, "a.json"]),
        (["./x/../model"], ["model"]),
    ):
        with pytest.raises(UserError, match="would be written over"):
            files.refuse_overwrite(
                [tmp_path / t for t in targets], [s and tmp_path / s for s in sources]
            )
    files.refuse_overwrite([tmp_path / "model2"], [tmp_path / "model"])


# ---- 7: kills and file systems


def test_a_directory_that_cannot_be_synced(tmp_path, monkeypatch):
    fsync = os.fsync

    def fails(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(22, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails)
    store.write_store(tmp_path / "data", {"train": [([1], None)]}, dict(vocab_size=9))
    assert len(store.Store(tmp_path / "data", "train")) == 1
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):  # that of a file is
        files.write_text(tmp_path / "file", "text")


def test_a_kill_while_the_work_of_a_preparation_is_removed(folder, tmp_path, monkeypatch):
    """The folder of finished shards is then no longer known as ours, and it was refused for ever."""
    from prepare import text

    tiny.jsonl(tmp_path / "in.jsonl", [dict(text="a word"), dict(text="and more")])
    source = f"source={tmp_path}/in.jsonl"
    cfg = config.parse(
        text.Config, [source, f"tokenizer={folder}/model", f"out={tmp_path}/data", "val=0"]
    )
    rmtree = shutil.rmtree

    def dies(path, *args, **kwargs):
        if (job := Path(path) / "job.json").exists():
            job.unlink()
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            text.main(cfg)
    text.main(cfg)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "in.jsonl"]


def test_a_reader_between_the_two_renames(tmp_path, monkeypatch):
    """It puts the old folder back under its name, where the writer is about to put the new one."""
    for text in ("old", "new"):
        with files.new_dir(tmp_path / "data") as tmp:
            (tmp / "text").write_text(text)
            rename, calls = os.replace, []

            def replaced(a, b, rename=rename, calls=calls):
                if str(a).endswith(files.UNFINISHED) and not calls:
                    calls.append(1)
                    files.recover_dir(tmp_path / "data")
                rename(a, b)

            monkeypatch.setattr(os, "replace", replaced)
        monkeypatch.undo()
    assert (tmp_path / "data" / "text").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


# ---- 13: what is kept


def test_the_last_saves_stay(run, tmp_path):
    run("sft", "steps=7", "keep_last=2")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("step-*")) == ["step-6", "step-7"]
    assert tiny.same_tensors(out / "step-7", out / "last")
    assert not tiny.same_tensors(out / "step-6", out / "last")
    assert weights.open(out / "step-6").tok is not None


def test_patience(run, tmp_path, monkeypatch, capsys):
    """The losses of the evaluations are given: the best at step 2, and none better up to 8."""
    import sft

    losses = iter([9.0, 1.0, 3.0, 2.0, 1.0, 0.5])
    monkeypatch.setattr(sft, "evaluate", lambda *args: dict(loss=next(losses)))
    settings = ("steps=20", "eval_every=2", "patience=3", "save_every=100", "samples=0")
    assert run("sft", *settings) == "done"
    said = "no better loss in 3 evaluations (patience=): the run ends at step 8, and "
    assert said in capsys.readouterr().out
    meta = tiny.state(tmp_path / "out" / "state")[1]["meta"]
    assert (meta["step"], meta["best"], meta["evaluations"]) == (8, 1.0, [8, 3])
    losses = iter([1.0])  # the resume evaluates the same weights again, and ends there
    assert run("sft", *settings) == "done"
    assert said in capsys.readouterr().out


def test_patience_over_a_stop(run, tmp_path, monkeypatch):
    import sft

    def train(*losses):
        given = iter(losses)
        monkeypatch.setattr(sft, "evaluate", lambda *args: dict(loss=next(given)))
        run("sft", "steps=20", "eval_every=2", "patience=3", "save_every=2", "samples=0")
        return tiny.state(tmp_path / "out" / "state")[1]["meta"]["step"]

    with monkeypatch.context() as patch:
        tiny.stop_before(patch, 6)
        assert train(9.0, 1.0, 3.0) == 6  # stopped before it evaluated step 6
    assert train(3.0, 3.0, 3.0) == 8


@pytest.mark.parametrize("name", ["pretrain", "sft", "sft_lora", "reward", "dpo"])
def test_an_average_of_the_weights(name, run, tmp_path, capsys):
    """By hand, from the weights of each step: a = d a + (1 - d) w, where d at step n is at most
    (1 + n) / (10 + n). It is what is evaluated, and what last/ holds. The state holds the weights, and a resume is bit for bit."""
    file = "adapter_model" if name == "sft_lora" else "model"
    common = ("steps=3", "save_every=1", "eval_every=3", "sample_tokens=0")
    if name == "reward":
        common = common[:-1]
    run(name, *common, "keep_last=3", out=tmp_path / "plain")
    run(name, *common, "ema=0.5", "keep_last=3")
    saved = [tiny.tensors(tmp_path / "plain" / f"step-{n}", file) for n in (1, 2, 3)]
    averages = [tiny.tensors(tmp_path / "out" / f"step-{n}", file) for n in (1, 2, 3)]
    for key in saved[0]:
        for n in (1, 2):
            expected = torch.lerp(averages[n - 1][key], saved[n][key], 9 / (10 + n))
            # one rounding of fp32
            torch.testing.assert_close(averages[n][key], expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(averages[2][key], saved[2][key]) for key in saved[2])
    a, b = (tiny.state(tmp_path / d / "state")[0] for d in ("plain", "out"))
    assert all(torch.equal(a[key], b[key]) for key in a)  # the training itself is the same
    run(name, *common, "ema=0.5", "steps=2", out=tmp_path / "cut")
    run(name, *common, "ema=0.5", out=tmp_path / "cut")
    assert tiny.same_tensors(tmp_path / "cut" / "last", tmp_path / "out" / "last", file)
    losses = [tiny.records(tmp_path / d, "eval")[-1]["loss"] for d in ("plain", "out", "cut")]
    assert losses[0] != losses[1] == losses[2]
    # where a run goes on that had none, it begins with the weights of that step
    run(name, *common, "steps=2", out=tmp_path / "late")
    run(name, *common, "ema=0.5", "keep_last=1", out=tmp_path / "late")
    late = tiny.tensors(tmp_path / "late" / "step-3", file)
    for key in saved[0]:
        expected = torch.lerp(saved[1][key], saved[2][key], 9 / 12)
        torch.testing.assert_close(late[key], expected, rtol=1e-6, atol=1e-7)
    if name == "sft":
        capsys.readouterr()
        run(name, "steps=0", "epochs=0", f"model={tmp_path}/out/last", out=tmp_path / "alone")
        alone = tiny.records(tmp_path / "alone", "eval")[0]["loss"]
        assert alone == pytest.approx(losses[1], rel=1e-6)


def test_two_processes_average_as_one(folder, tmp_path):
    keys = ("ema=0.5", "micro_batch=2")
    jobs = [
        stages.job(folder, "sft", tmp_path / mode, *keys, f"parallel={mode}", *more)
        for mode, *more in (["ddp"], ["fsdp", "steps=2"], ["fsdp"])
    ]
    status, output = tiny.processes(tmp_path, jobs)
    assert status == 0, output[-4000:]
    stages.alone([stages.job(folder, "sft", tmp_path / "one", *keys)])
    for mode in ("ddp", "fsdp"):  # fsdp: with a resume in between
        stages.assert_same_weights(tmp_path / mode / "last", tmp_path / "one" / "last")


# ---- 14: damaged files


def test_damaged_lines_of_the_log(run, tmp_path, capsys):
    run("sft", "steps=2", "log_every=1")
    path = tmp_path / "out" / "log.jsonl"
    lines = path.read_bytes().splitlines()
    bad = [b"\xff\xfe{", b"[1, 2]", b'{"kind": "train"}', b'{"kind": 1, "step": 1}', b'{"ki']
    path.write_bytes(b"\n".join([*bad, *lines]) + b"\n")
    capsys.readouterr()
    run("sft", "steps=3", "log_every=1")
    assert f"note: {path} had 5 damaged lines, which are left out" in capsys.readouterr().out
    assert [r["step"] for r in tiny.records(tmp_path / "out", "train")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_config_cfg_that_is_no_text(name, run, tmp_path):
    """It is read where the state does not say with which settings it was saved."""
    run(name, "steps=2")
    path = tmp_path / "out" / "state" / "state.json"
    saved = json.loads(path.read_text())
    del saved["meta"]["config"]
    path.write_text(json.dumps(saved))
    (tmp_path / "out" / "config.cfg").write_bytes(b"lr=\xff\n")
    with pytest.raises(UserError, match="config.cfg cannot be read as UTF-8 text"):
        run(name)


# ---- 15: trackers


@pytest.mark.parametrize("kind", log.TRACKERS)
def test_trackers(kind, run, tmp_path, monkeypatch):
    began, said = [], []

    def init(project, name, resume, id=None):
        began.append((project, name, resume, id))
        return types.SimpleNamespace(
            config={},
            log=lambda values, step: said.append((step, values)),
            finish=lambda: said.append("end"),
        )

    monkeypatch.setitem(sys.modules, kind, types.SimpleNamespace(init=init))
    run("sft", "steps=2", "log_every=1", f"track={kind}:toys")
    run("sft", "steps=3", "log_every=1", f"track={kind}:toys")
    (project, name, resume, id), again = began
    assert again == began[0] and (project, resume) == ("toys", "allow")
    assert name.startswith("out-") and id == (name if kind == "wandb" else None)
    steps = [s for s in said if s != "end" and "train/loss" in s[1]]
    assert [step for step, _ in steps] == [1, 2, 3] and said.count("end") == 2
    records = tiny.records(tmp_path / "out", "train")
    assert [values["train/loss"] for _, values in steps] == [r["loss"] for r in records]
    run("sft", "steps=1", "resume=false", f"track={kind}:toys")
    assert began[2][1] != name  # another run


@pytest.mark.parametrize(
    "track, words",
    [
        ("wandb", "track=wandb: use wandb:PROJECT or trackio:PROJECT"),
        ("mlflow:toys", "use wandb:PROJECT or trackio:PROJECT"),
        ("trackio:toys", r"track=trackio needs the package: pip install trackio"),
        ("wandb:toys", "track=wandb:toys: wandb cannot start: no API key"),
    ],
)
def test_trackers_that_cannot_start(track, words, run, monkeypatch):
    def init(**keys):
        raise ValueError("no API key")

    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=words):
        run("sft", f"track={track}")


def test_what_is_refused_is_refused_before_anything_is_removed(run, tmp_path):
    """And folders of the user's own beside step-N stay."""
    run("sft", "steps=1", "keep_last=1")
    mine = tmp_path / "out" / "step-2-mine"
    mine.mkdir()
    for track in ("foo:bar", "wandb:", "trackio:toys"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "trackio", None)
            with pytest.raises(UserError, match="track="):
                run("sft", "steps=1", "resume=false", f"track={track}")
    assert (tmp_path / "out" / "last").is_dir() and (tmp_path / "out" / "state").is_dir()
    run("sft", "steps=1", "resume=false")
    assert mine.is_dir()
    shutil.rmtree(tmp_path / "out" / "state")
    (tmp_path / "out" / "state").write_text("")
    with pytest.raises(UserError, match="is a file, where a run keeps its state"):
        run("sft", "steps=1")
    assert (tmp_path / "out" / "last").is_dir()


def test_a_run_does_not_write_into_its_models_directory(run, folder):
    with pytest.raises(UserError, match="is the model's own directory"):
        run("sft", "steps=1", out=folder / "model")

"""What the stages have in common: the loss that is trained is the one that is validated, and how
often a run evaluates, samples, logs and saves. ppo.py validates no loss and has its own tests."""

import importlib
import json
from types import SimpleNamespace

import pytest
import tiny

from nano.config import UserError
from nano.run import Run

COMMON = "device=cpu dtype=float32 batch_size=4 micro_batch=2 max_length=128 log_every=1".split()
STAGES = (
    dict(  # name: data, the settings of samples, the function that is the place to change the loss
        pretrain=("rows", ["sample_tokens=4"], "loss_sum"),
        sft=("rows", ["samples=1", "sample_tokens=4"], "loss_sum"),
        reward=("groups", ["samples=1", "norm_samples=4", "norm_tokens=4"], "ranking_loss"),
        dpo=("groups", ["samples=1", "sample_tokens=4"], "dpo_loss"),
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stages")
    tiny.model_dir(path / "model")
    tiny.store(path / "rows", path / "model", n=16, val=4)
    tiny.preferences(path / "groups", path / "model", n=16, val=4)
    return path


@pytest.fixture
def run(folder, tmp_path):
    """Runs a stage with settings -> the records of its log."""

    def run(stage, *settings, out="out"):
        data, samples, _ = STAGES[stage]
        paths = [f"model={folder}/model", f"data={folder}/{data}", f"out={tmp_path / out}"]
        tiny.train(stage, tiny.override(COMMON, paths, samples, settings))
        return tiny.records(tmp_path / out)

    return run


def steps(log, kind):
    return [r["step"] for r in log if r["kind"] == kind]


@pytest.mark.parametrize("stage", STAGES)
def test_a_changed_loss_is_trained_and_validated(stage, run, monkeypatch):
    module, name = importlib.import_module(stage), STAGES[stage][2]
    loss = getattr(module, name)
    before = run(stage, "steps=1", out="before")
    monkeypatch.setattr(module, name, lambda *args, **settings: 3 * loss(*args, **settings))
    after = run(stage, "steps=1", out="after")
    for kind in ("eval", "train"):
        old, new = (next(r for r in log if r["kind"] == kind) for log in (before, after))
        assert new["loss"] == pytest.approx(3 * old["loss"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_no_epochs_evaluate_once_and_save_nothing(stage, run, tmp_path):
    log = run(stage, "epochs=0")
    assert [(r["kind"], r["step"]) for r in log] == [("eval", 0), ("samples", 0)]
    assert not any((tmp_path / "out" / name).exists() for name in ("last", "best", "state"))


@pytest.mark.parametrize("stage", STAGES)
def test_how_often_a_run_evaluates_samples_logs_and_saves(stage, run, tmp_path, monkeypatch):
    save_model, saved = Run.save_model, []

    def spy(self, dir):
        saved.append((dir.name, self.step))
        save_model(self, dir)

    monkeypatch.setattr(Run, "save_model", spy)
    sampling = stage in ("pretrain", "sft")  # the others sample with every evaluation

    def settings(every):
        sample = [f"sample_every={every}"] if sampling else []
        return ["steps=3", f"eval_every={every}", f"save_every={every}", *sample]

    log = run(stage, *settings(1), out="always")
    assert steps(log, "train") == [1, 2, 3]
    assert steps(log, "eval") == steps(log, "samples") == [0, 1, 2, 3]
    assert [step for name, step in saved if name == "last"] == [1, 2, 3]
    saved.clear()
    log = run(stage, *settings(-1), "log_every=0", out="never")
    assert [(r["kind"], r["step"]) for r in log] == [("train", 3)]
    assert saved == [("last", 3)]  # -1 still saves at the end
    assert tiny.state(tmp_path / "never" / "state")[1]["meta"]["step"] == 3
    assert tiny.same_tensors(tmp_path / "never" / "last", tmp_path / "always" / "last")


@pytest.mark.parametrize("stage", STAGES)
def test_validation_keys_without_a_validation_split(stage, folder, tmp_path):
    if STAGES[stage][0] == "rows":
        tiny.store(tmp_path / "rows", folder / "model", n=16, val=0)
    else:
        tiny.preferences(tmp_path / "groups", folder / "model", n=16, val=0)
    paths = [f"model={folder}/model", f"data={tmp_path}/{STAGES[stage][0]}", f"out={tmp_path}/out"]
    settings = [*paths, *COMMON] + (["norm_samples=0"] if stage == "reward" else [])
    with pytest.raises(UserError, match="eval_every=3 has no effect without a validation"):
        tiny.train(stage, [*settings, "eval_every=3", "steps=2"])
    with pytest.raises(UserError, match="warmup_steps=9 takes all 2 steps of the run"):
        tiny.train(stage, [*settings, "eval_every=-1", "steps=2", "warmup_steps=9"])
    tiny.train(stage, [*settings, "eval_every=-1", "epochs=0"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_needs_the_model_and_the_data_of_the_run(stage, folder, run, tmp_path, capsys):
    data = STAGES[stage][0]
    tiny.model_dir(tmp_path / "other", seed=5)
    make = tiny.store if data == "rows" else tiny.preferences
    make(tmp_path / "more", folder / "model", n=24, val=4)
    make(tmp_path / "val", folder / "model", n=16, val=8)
    run(stage, "steps=2", "eval_every=1")
    changes = [
        ([f"model={tmp_path}/other"], r"another model \(model \S+ -> \S+other\):"),
        ([f"data={tmp_path}/more"], r"other data \(data \S+ -> \S+more\]\):"),
        ([f"data={tmp_path}/val"], r"other validation data \(data \S+ -> \S+val\]\):"),
    ]
    if stage != "pretrain":
        quantised = ["lora_rank=2", "quant=nf4"], r"another model \(quant none -> nf4\):"
        changes.append(quantised)
    for change, words in changes:
        with pytest.raises(UserError, match=f"out/state was made from {words}"):
            run(stage, "steps=3", *change)
    capsys.readouterr()
    state = tmp_path / "out" / "state" / "state.json"
    best = json.loads(state.read_text())["meta"]["best"]
    state.write_text(state.read_text().replace(f'"best": {best}', '"best": -1.0'))
    run(stage, "steps=3", "eval_every=1", f"data={tmp_path}/val", "resume=anyway")
    assert "goes on from other validation data" in capsys.readouterr().out
    meta = json.loads(state.read_text())["meta"]
    assert meta["step"] == 3 and meta["best"] > -1  # the old best is of other rows

    # a state of the first edition does not say what it was made from
    state.write_text(json.dumps(json.loads(state.read_text()) | {"meta": dict(step=3)}))
    run(stage, "steps=4", f"data={tmp_path}/val", "model=" + str(folder / "model"))
    assert "does not say what it was made from" in capsys.readouterr().out


@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_read_other_data_end_with_a_sentence(same):
    """Two ranks: all_sum adds what the other one has."""

    def all_sum(x):
        seen.append(x)
        return x + (x if same else [7.0, 1.0, 0.0, 0.0][len(seen) - 1])

    seen, rt = [], SimpleNamespace(world=2, rank=0, all_sum=all_sum)
    run = SimpleNamespace(rt=rt, resumes=False)
    if same:
        assert Run.identify(run, (), "ab", "cd")["data"] == "ab"
        assert seen[1] == 0.0
    else:
        with pytest.raises(UserError, match="the ranks read different data"):
            Run.identify(run, (), "ab", "cd")

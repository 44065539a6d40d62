"""Tasks that a stage measures while it trains (eval_tasks=), and best/ chosen by them (keep=)."""

import json

import pytest
import stages
import tiny
from conftest import few
from test_eval import folder  # noqa: F401  the records

import eval as eval_script
import sft
from nano import config, run
from nano.config import UserError

NAMES = ["pretrain", "sft_lora", "dpo", "ppo_lora"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    stages.prepare(path)
    return path


def settings(folder):  # noqa: F811
    return [
        "eval_tasks=[arc:easy,gsm8k]",
        f"eval_files=[{folder}/arc.jsonl,{folder}/gsm8k.jsonl]",
        f'eval_shot_files=[{folder}/arc_shots.jsonl,""]',
        "eval_shots=[1,0]",
        "eval_limit=5",
        "eval_every=2",
    ]


def measured(out):
    """{step: {metric: value}} of the tasks, from the log."""
    return {
        r["step"]: {name: value for name, value in r.items() if "/" in name}
        for r in tiny.records(out, "eval")
    }


@pytest.mark.parametrize("name", NAMES)
def test_measured_before_during_and_after(tmp_path, prepared, folder, name, capsys):  # noqa: F811
    out = tmp_path / "run"
    more = [*settings(folder), "keep=arc:easy/acc_norm", "save_every=100"]
    more += ["max_length=128"] if name == "pretrain" else []  # the model has no more positions
    stages.alone([stages.job(prepared, name, out, *more)])
    values = measured(out)
    assert [*values] == [0, 2, 4]
    keys = {"arc:easy/acc", "arc:easy/acc_norm", "arc:easy/acc_norm_chars", "gsm8k/em"}
    assert all(keys <= v.keys() for v in values.values())
    assert "arc:easy/acc" in capsys.readouterr().out

    # the last line is what eval.py says of the model that was saved
    argv = [
        f"model={out}/last",
        "tasks=arc:easy",
        f"files={folder}/arc.jsonl",
        f"shot_files={folder}/arc_shots.jsonl",
        "shots=1",
        "limit=5",
        "device=cpu",
        "dtype=float32",
    ]
    eval_script.main(config.load(eval_script.Config, argv))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    for metric, value in document["arc:easy"]["metrics"].items():
        assert values[4][f"arc:easy/{metric}"] == value
    # best/ is from the first step after 0 with the highest value
    assert (out / "best").exists()
    assert tiny.same_tensors(
        out / "best", out / "last", "model" if name == "pretrain" or name == "dpo" else
        "adapter_model"
    ) == (values[4]["arc:easy/acc_norm"] > values[2]["arc:easy/acc_norm"])


def test_ranks_measure_the_same(tmp_path, prepared, folder):  # noqa: F811
    out = tmp_path / "one"
    stages.alone([stages.job(prepared, "sft", out, *settings(folder))])
    modes = few(["ddp", "fsdp"], "fsdp")
    jobs = [stages.job(prepared, "sft", tmp_path / parallel, *settings(folder),
                       f"parallel={parallel}") for parallel in modes]
    jobs.append(stages.job(prepared, "ppo", tmp_path / "ppo", *settings(folder), "parallel=fsdp",
                           "eval_limit=1"))
    status, output = tiny.processes(tmp_path, jobs)
    assert status == 0, output
    for parallel in modes:
        # the first step's weights are the same to the bit, and five records tell no rounding apart
        assert measured(tmp_path / parallel) == measured(out)
    assert [*measured(tmp_path / "ppo")] == [0, 2, 4]


def test_without_a_validation_split(tmp_path, prepared, folder):  # noqa: F811
    tiny.store(tmp_path / "rows", prepared / "model", val=0)
    job = stages.job(prepared, "sft", tmp_path / "run", *settings(folder), "sample_every=0",
                     f"data={tmp_path}/rows")
    stages.alone([job])
    assert [*measured(tmp_path / "run")] == [0, 2, 4] and not (tmp_path / "run/best").exists()
    job[1].extend(["keep=gsm8k/em", "resume=false"])
    stages.alone([(job[0], tiny.override(job[1]))])
    assert (tmp_path / "run/best").exists()


def test_another_keep_starts_best_anew(tmp_path, prepared, folder):  # noqa: F811
    out = tmp_path / "run"
    stages.alone([stages.job(prepared, "sft", out, *settings(folder), "steps=2")])
    assert tiny.state(out / "state")[1]["meta"]["best"] > 0
    more = [*settings(folder), "keep=arc:easy/acc"]
    stages.alone([stages.job(prepared, "sft", out, *more)])
    highest = max(v["arc:easy/acc"] for step, v in measured(out).items() if step > 2)
    assert tiny.state(out / "state")[1]["meta"]["best"] == -highest
    # the same measure goes on with the best so far, and one of fewer records does not
    for change, last in (("steps=5", 5), ("eval_limit=1", 6)):
        path = out / "state/state.json"
        saved = json.loads(path.read_text())
        saved["meta"]["best"] = -2.0
        path.write_text(json.dumps(saved))
        stages.alone([stages.job(prepared, "sft", out, *more, "steps=6", change)])
        best = tiny.state(out / "state")[1]["meta"]["best"]
        assert best == -2 if last == 5 else -1 <= best <= 0
        assert max(measured(out)) == last


def test_only_measures_of_the_same_records_are_compared(tmp_path, folder):  # noqa: F811
    """What decides whether a resume goes on with the best value of before."""
    file = tmp_path / "arc.jsonl"
    file.write_bytes((folder / "arc.jsonl").read_bytes())

    def measure(*more):
        given = ["eval_tasks=[arc:easy]", f"eval_files=[{file}]", "keep=arc:easy/acc", *more]
        return run.measure_of(config.load(sft.Config, tiny.override(given)))

    first = measure()
    assert first == measure("lr=1e-3", "eval_every=7")
    changes = "keep=arc:easy/acc_norm", "eval_limit=3", "eval_shots=1", "eval_tasks=[arc]"
    others = {measure(change) for change in changes}
    others.add(measure("eval_files=[]"))
    with file.open("a") as f:
        f.write("\n")
    assert len(others | {first, measure()}) == len(changes) + 3
    assert measure("keep=") == measure("keep=", "eval_limit=3") == ""


def test_refusals(tmp_path, prepared, folder):  # noqa: F811
    for more, message in (
        (["keep=arc:easy/em"], "keep=arc:easy/em names no metric of eval_tasks=: give arc:easy/acc,"),
        (["eval_tasks=[arcs,gsm8k]"], "unknown task 'arcs'; did you mean 'arc'?"),
        (["eval_shots=[1,2,3]"], "eval_shots= has 3 elements for 2 tasks"),
        (["eval_shots=[4,0]"], "that may be shown: lower eval_shots="),
        (["eval_shots=[0,1]"], "name its file in eval_shot_files="),
        (["eval_tasks=[]", "eval_shots=[1]"], "has no effect with eval_tasks=[]"),
    ):
        job = stages.job(prepared, "sft", tmp_path / "run", *settings(folder), *more)
        with pytest.raises(UserError) as e:
            stages.alone([job])
        assert message in str(e.value)

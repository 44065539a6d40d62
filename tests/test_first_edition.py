"""Folders that the first edition wrote still open, and its runs go on as they did there.

tests/first_edition/README.md says what each folder is. continued.json holds what the first edition
logged when it went on."""

import importlib
import json
import shutil

import pytest
from conftest import ROOT

import ppo
from nano import config, tokenizer
from nano.config import UserError
from nano.store import Store

FOLDER = ROOT / "tests" / "first_edition"
RUNS = {"sft_lora": "sft"}  # of the others, the folder is named like the stage
CONTINUED = json.loads((FOLDER / "continued.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "first")
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path / "first"


@pytest.mark.parametrize("run", sorted(CONTINUED.keys() - {"grpo"}))
def test_a_run_goes_on(folder, run):
    stage = importlib.import_module(RUNS.get(run, run))
    stage.main(config.load(stage.Config, [f"runs/{run}/config.cfg", "steps=5"]))
    log = [
        json.loads(line) for line in (folder / "runs" / run / "log.jsonl").read_text().splitlines()
    ]
    steps = {record["step"]: record for record in log if record["kind"] == "train"}
    assert sorted(steps) == [1, 2, 3, 4, 5]
    for wanted in CONTINUED[run]:
        got = steps[wanted["step"]]
        for key in ("loss", "policy_loss", "value_loss", "reward", "accuracy"):
            if key in wanted:
                assert got[key] == pytest.approx(wanted[key], abs=1e-4), (key, wanted["step"])


def test_a_run_with_grpo_does_not_go_on(folder):
    """Its advantages had the KL inside of the normalisation, so it could not go on as it was."""
    run = ["runs/grpo/config.cfg", "steps=5"]
    with pytest.raises(UserError, match="runs/grpo is a run of the first edition with algo=grpo"):
        ppo.main(config.load(ppo.Config, run))
    log = (folder / "runs" / "grpo" / "log.jsonl").read_text()
    assert log == (FOLDER / "runs" / "grpo" / "log.jsonl").read_text()
    ppo.main(config.load(ppo.Config, [*run, "resume=false"]))
    text = (folder / "runs" / "grpo" / "config.cfg").read_text()
    assert "algo" not in text and "advantage=group_std\n" in text
    ppo.main(config.load(ppo.Config, ["runs/grpo/config.cfg", "steps=6"]))


@pytest.mark.parametrize("kind", ["text", "instructions", "preferences"])
def test_a_prepared_folder_opens(folder, kind):
    tok = tokenizer.load("model", template="plain" if kind == "text" else None)
    store = Store(f"data/{kind}", "train", tok)
    assert len(store) and all(len(store.row(i)[0]) for i in range(len(store)))

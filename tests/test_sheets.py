"""Tasks that people judge: eval.py fills a column of their CSV files, and goes on where it stopped."""

import codecs
import csv
import importlib
import io
import json

import pytest
import tiny

from nano import config, evaluation
from nano.config import UserError

evaluate = importlib.import_module("eval")
HEAD = ["Prompt", "任务类型", "参考回答", "A", "B", "C"]
FILES = {
    "common.samples.csv": [["谁是蝙蝠侠", "`事实问答`", "", 'a,"1"', "b\n2", "c"]],
    "emergent.samples.csv": [[f"Q{i}", "`x`", "r", "1", "2", "3"] for i in range(3)],
    "specialized.samples.csv": [["last", "`y`", "r", "", "", ""]],
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "zbench"
    path.mkdir()
    for name, rows in FILES.items():
        text = io.StringIO()
        csv.writer(text).writerows([HEAD, *rows])
        (path / name).write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("sheets") / "model")


def run(model, folder, out, *argv):
    argv = [f"model={model}", f"files={folder}", f"out={out}", "template=chatml", *argv]
    argv += ["device=cpu"] + ["tasks=zbench"] * (not any("tasks=" in x for x in argv))
    evaluate.main(config.load(evaluate.Config, argv))


def read(path):
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def test_a_column_for_each_model(model, folder, tmp_path, capsys):
    """In front of the last two columns. What was there stays as it was, to the byte."""
    out = tmp_path / "out"
    marked = folder / "common.samples.csv"
    marked.write_bytes(codecs.BOM_UTF8 + marked.read_bytes())
    run(model, folder, out)
    other = tiny.model_dir(tmp_path / "other", seed=1)
    run(other, folder, out)
    for name, rows in FILES.items():
        assert (out / name).read_bytes().startswith(codecs.BOM_UTF8) == (name == marked.name)
        head, *filled = read(out / name)
        assert head[:4] == HEAD[:4] and head[6:] == HEAD[4:]
        assert head[4].startswith(f"{model} (") and head[5].startswith(f"{other} (")
        assert [row[:4] + row[6:] for row in filled] == rows
        assert all(row[4] and row[5] and row[4] != row[5] for row in filled)
        text = io.StringIO()
        csv.writer(text).writerows([HEAD, *(row[:4] + row[6:] for row in filled)])
        assert (folder / name).read_bytes().removeprefix(codecs.BOM_UTF8) == text.getvalue().encode()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["zbench"]["metrics"] == dict(answered=1.0) and result["zbench"]["count"] == 5
    assert "average" not in result


def test_it_goes_on_where_it_stopped(model, folder, tmp_path, monkeypatch):
    """Answers that are there are not asked for again. A part fills its file in the same column."""
    asked = []
    original = evaluation.answers

    def counted(model, tok, rt, prompts, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return original(model, tok, rt, prompts, *rest)

    monkeypatch.setattr(evaluation, "answers", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, folder, out, "batch_size=2")
    filled = [row for name in FILES if (out / name).exists() for row in read(out / name)[1:]]
    assert sum(bool(row[4]) for row in filled) == 4
    asked.clear()
    run(model, folder, out, "batch_size=2")
    assert asked == [1]
    asked.clear()
    run(model, folder, out, "batch_size=2")
    run(model, folder, out, "tasks=zbench:emergent")
    assert asked == [] and len(read(out / "emergent.samples.csv")[0]) == len(HEAD) + 1
    run(model, folder, tmp_path / "part", "tasks=zbench:emergent")
    assert asked == [3] and not (tmp_path / "part" / "common.samples.csv").exists()


def test_refusals(model, folder, tmp_path):
    with pytest.raises(UserError, match="people judge the answers to zbench"):
        argv = [f"model={model}", f"files={folder}", "tasks=zbench", "device=cpu"]
        evaluate.main(config.load(evaluate.Config, argv))
    out = tmp_path / "sorted"
    run(model, folder, out)
    head, *rows = read(out / "emergent.samples.csv")
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows[::-1]])
    (out / "emergent.samples.csv").write_text(text.getvalue(), encoding="utf-8")
    with pytest.raises(UserError, match="in their order"):
        run(tiny.model_dir(tmp_path / "other", seed=1), folder, out)
    (folder / "common.samples.csv").write_text("Prompt,任务类型,file\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="common.samples.csv:2"):
        run(model, folder, tmp_path / "out")
    settings = dict(model=model, data=tiny.store(tmp_path / "data", model), out=tmp_path / "run")
    settings |= dict(eval_tasks="zbench", eval_files=folder, device="cpu")
    with pytest.raises(UserError, match="eval_tasks= names zbench"):
        tiny.train("sft", tiny.arguments(settings))


def test_the_real_files(model, shared_data, tmp_path):
    """63, 209 and 39 rows, each with 17 columns before and 18 after."""
    source = shared_data / "zbench"
    run(model, source, tmp_path, "limit=65")
    first, second = (read(tmp_path / f"{name}.samples.csv") for name in ("common", "emergent"))
    assert (len(first), len(second)) == (64, 210) and {*map(len, first + second)} == {18}
    assert [bool(row[15]) for row in first[1:] + second[1:]] == [True] * 65 + [False] * 207
    assert [row[:15] + row[16:] for row in first] == read(source / "common.samples.csv")

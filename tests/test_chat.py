"""The chat template that data is laid out by follows the model: its turns end the samples, and what
is saved says it."""

import json

import pytest
import tiny
import transformers

import dpo
import ppo
import reward
import sample
import sft
from nano import config, generate, store, tokenizer
from nano.config import UserError
from prepare import instructions, preferences
from prepare import weights as prepare_weights

TALK = [
    dict(role="system", content="s"),
    dict(role="user", content="Hi"),
    dict(role="assistant", content="Ho"),
]
END = 259  # <|im_end|>; EOS is 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model whose own template says `Q:` and `A:`, and data laid out by ChatML."""
    path = tmp_path_factory.mktemp("chat")
    tiny.model_dir(
        path / "model", special=["<|im_start|>", "<s>", "</s>", "<|im_end|>"], max_positions=512
    )
    settings = json.loads((path / "model" / "tokenizer_config.json").read_text())
    own = "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + eos_token }}{% endfor %}"
    own += "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    tiny.write(path / "model", "tokenizer_config.json", settings | dict(chat_template=own))
    tiny.write(path / "model", "generation_config.json", dict(eos_token_id=258, max_length=99))
    (path / "judge.py").write_text(
        "def length(prompt, response, finished):\n    return len(response)\n"
    )
    ask = [f"how many {i} are {j}" for i in range(4) for j in range(4)]
    tiny.write(path, "sft.json", [dict(instruction=a, input="", output=a[::-1]) for a in ask])
    tiny.write(path, "dpo.json", [dict(prompt=a, chosen=a[::-1], rejected="no") for a in ask])
    common = [f"model={path / 'model'}", "template=chatml", "val=4"]
    instructions.main(
        config.load(
            instructions.Config, [*common, f"source={path / 'sft.json'}", f"out={path / 'sft'}"]
        )
    )
    preferences.main(
        config.load(
            preferences.Config, [*common, f"source={path / 'dpo.json'}", f"out={path / 'dpo'}"]
        )
    )
    return path


def run(stage, folder, data, out, *settings, model=None):
    common = [
        f"model={model or folder / 'model'}",
        f"data={folder / data}",
        f"out={out}",
        "steps=1",
        "dtype=float32",
    ]
    common += ["max_length=256"] * (stage is not ppo)
    stage.main(
        config.load(
            stage.Config, [*common, "batch_size=4", "micro_batch=2", "device=cpu", *settings]
        )
    )
    return out / "last"


STAGES = {
    sft: ("sft",),
    dpo: ("dpo",),
    reward: ("dpo", "norm_samples=4", "norm_tokens=8"),
    ppo: (
        "sft",
        "reward=judge.py:length",
        "max_new_tokens=8",
        "algo=grpo",
        "group=2",
        "minibatches=1",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_stops_at_the_datas_end_of_turn_and_saves_its_template(
    stage, folder, tmp_path, monkeypatch
):
    seen, made = [], generate.generate
    monkeypatch.setattr(
        generate, "generate", lambda *a, **k: seen.append(k["stop_ids"]) or made(*a, **k)
    )
    monkeypatch.chdir(folder)
    last = run(stage, folder, STAGES[stage][0], tmp_path, *STAGES[stage][1:])
    assert seen and set(seen) == {(258, END)}
    ours, taught = tokenizer.load(last), tokenizer.load(folder / "model", template="chatml")
    assert (
        ours.template == "chatml"
        and ours.stop_ids == (258, END)
        and ours.fingerprint == taught.fingerprint
    )
    assert ours.render(TALK) == taught.render(TALK)
    theirs = transformers.AutoTokenizer.from_pretrained(last)
    assert (
        theirs.apply_chat_template(TALK, tokenize=True, return_dict=False) == taught.render(TALK)[0]
    )
    generation = json.loads((last / "generation_config.json").read_text())
    assert generation == dict(eos_token_id=[258, END], max_length=99)
    assert "chat_template" not in json.loads((last / "tokenizer_config.json").read_text())


def test_adapters_bring_the_template_along(folder, tmp_path):
    adapter = run(sft, folder, "sft", tmp_path / "run", "lora_rank=2")
    sampler = sample.Sampler(config.load(sample.Config, [f"model={adapter}", "device=cpu"]))
    assert sampler.tok.template == "chatml" and sampler.chats
    prepare_weights.main(
        config.load(prepare_weights.Config, [f"source={adapter}", f"out={tmp_path / 'merged'}"])
    )
    assert tokenizer.load(tmp_path / "merged").template == "chatml"
    again = run(
        sft, folder, "sft", tmp_path / "again"
    )  # the same template, now the model's own: the files stay as they are
    before = (tmp_path / "merged" / "tokenizer_config.json").read_bytes()
    assert (again / "tokenizer_config.json").read_bytes() == before

    rows = store.Store(folder / "sft")
    plain = [(rows.row(i)[0], rows.row(i)[1]) for i in range(8)]
    store.write_store(
        tmp_path / "plain",
        dict(train=plain),
        dict(vocab_size=264, tokenizer=rows.meta["tokenizer"]),
    )
    whole = run(sft, folder, tmp_path / "plain", tmp_path / "whole", "samples=0", model=adapter)
    assert (
        tokenizer.load(whole).template == "chatml"
    )  # data that says nothing leaves what the adapter brought
    own = run(sft, folder, tmp_path / "plain", tmp_path / "run", "lora_rank=2", "resume=false")
    assert not (own / "chat_template.jinja").exists()  # nor does an older adapter's stay behind


def test_data_of_two_templates_is_refused(folder, tmp_path):
    settings = [
        f"model={folder / 'model'}",
        "template=zephyr",
        f"source={folder / 'sft.json'}",
        f"out={tmp_path / 'other'}",
    ]
    instructions.main(config.load(instructions.Config, settings))
    with pytest.raises(UserError, match="different chat templates"):
        store.chat_template([folder / "sft", tmp_path / "other"])
    assert (
        store.chat_template([folder / "sft", folder / "dpo"])
        == tokenizer.load(folder / "model", template="chatml").chat_template
    )

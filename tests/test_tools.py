"""Definitions, calls and results of tools: their tokens and targets beside transformers', the plain
form, calls read back from answers, the chat that asks for results, and a model that learns to call."""

import functools
import itertools
import json
import random
from types import SimpleNamespace

import pytest
import test_templates
import tiny
from conftest import REAL, SLOW
from transformers import PreTrainedTokenizerFast

import sample
from nano import chat, config, store, tokenizer, tools, traced
from nano.generate import Samples
from prepare import fields, instructions

SHARED = REAL
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}


def say(role, content, **more):
    return dict(role=role, content=content, **more)


def talk(*calls, content=""):
    """A conversation with calls, their results and an answer to these."""
    message = tools.calling([("get_weather", dict(city=city)) for city in calls], content)
    results = [tools.result_of(call, f"{len(calls)} C") for call in message["tool_calls"]]
    return [say("user", "Is it warm?"), message, *results, say("assistant", "It is.")]


# ---- the model's own template

QWEN = "<|im_start|>assistant\n", ("<|im_end|>",)
LLAMA = "<|start_header_id|>assistant<|end_header_id|>\n\n", ("<|eot_id|>", "<|eom_id|>")
FAMILIES = {  # template: (tokenizer, what opens an answer, what ends it); None: it has marks
    "lcpp-Qwen-Qwen2.5-7B-Instruct": ("qwen2", QWEN),
    "lcpp-Qwen-Qwen3-0.6B": ("qwen2", QWEN),
    "trl-qwen2_5_training": ("qwen2", None),
    "trl-qwen3_training": ("qwen2", None),
    "lcpp-meta-llama-Llama-3.1-8B-Instruct": ("llama3", LLAMA),
    "lcpp-meta-llama-Llama-3.2-3B-Instruct": ("llama3", LLAMA),
}
ADDED = """<|im_start|> <|im_end|> <|begin_of_text|> <|eot_id|> <|eom_id|> <|start_header_id|>
<|end_header_id|> <|python_tag|> <tool_call> </tool_call> <tool_response> </tool_response> <think>
</think>""".split()


def source_of(name):
    return (SHARED / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def families(shared_data, tmp_path_factory):
    """(folder, transformers' tokenizer) of a family: its tokenizer with the template's tokens."""

    @functools.cache
    def family(name):
        kind, _ = FAMILIES[name]
        folder = tmp_path_factory.mktemp("family")
        fast = PreTrainedTokenizerFast.from_pretrained(shared_data / "tok_fixtures" / kind)
        end = "<|im_end|>" if kind == "qwen2" else "<|eot_id|>"
        fast.add_special_tokens({"additional_special_tokens": ADDED[:8]})
        fast.add_tokens(ADDED[8:])
        fast.add_special_tokens({"eos_token": end, "bos_token": "<|begin_of_text|>"})
        fast.chat_template = source_of(name)
        fast.save_pretrained(folder)
        return folder, fast

    return family


def marked(fast, name, messages, definitions):
    """transformers' (ids, mask) of a conversation.

    The mask is that of the template's {% generation %} marks without the line break that ends the
    prompt for an answer, and the one behind its turn, or else a rule's: from what opens an answer to the token that ends it. An empty thought, which
    the template prints by itself, is the prompt's in both.
    """
    _, rule = FAMILIES[name]
    day = traced.DAY.strftime("%d %b %Y")
    settings = dict(
        tools=definitions,
        date_string=day,
        return_dict=True,
        return_assistant_tokens_mask=rule is None,
    )
    out = fast.apply_chat_template(messages, **settings)
    ids = out["input_ids"]
    mask = [0] * len(ids)
    if rule is None:
        mask = [*out["assistant_masks"]]
        for i in range(1, len(ids)):
            edge = not out["assistant_masks"][i - 1] or fast.decode(ids[i - 1]) == "<|im_end|>"
            mask[i] &= not (edge and fast.decode(ids[i]) == "\n")
    else:
        opening = fast.encode(rule[0], add_special_tokens=False)
        inside = False
        for i, token in enumerate(ids):
            inside = inside or ids[max(i - len(opening), 0) : i] == opening
            mask[i] = int(inside)
            inside = inside and fast.decode(token) not in rule[1]
    empty = fast.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    for i in range(len(ids)):
        if ids[i : i + len(empty)] == empty:
            mask[i : i + len(empty)] = [0] * len(empty)
    return ids, mask


TALKS = {
    "a call": talk("Oslo"),
    "two calls in one answer": talk("Oslo", "Rome"),
    "a call with text": talk("Oslo", content="I look."),
    "a chain": [*talk("Oslo")[:-1], *talk("Rome")[1:]],
    "no call": [say("user", "Hi."), say("assistant", "Hello.")],
    "a system message": [say("system", "Be kind."), *talk("Oslo")],
    "awaits an answer": talk("Oslo")[:-1],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_targets_are_those_of_transformers(name, families):
    folder, fast = families(name)
    tok = tokenizer.load(folder)
    assert tok.tools.definitions and tok.tools.calls
    targets = 0
    for what, messages in TALKS.items():
        if "Llama" in name and what in ("two calls in one answer", "a call with text"):
            continue  # the template refuses the one, and drops the text of the other
        ids, mask = tok.render(messages, tools=[WEATHER])
        assert (ids, mask) == marked(fast, name, messages, [WEATHER]), what
        targets += sum(mask)
    assert targets > 100


@pytest.mark.parametrize("name", FAMILIES)
def test_real_records_are_laid_out_as_transformers_does(name, families, shared_data):
    """Rows of glaive with definitions and calls: ids and targets, token by token."""
    folder, fast = families(name)
    tok = tokenizer.load(folder)
    rows = json.loads((shared_data / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["tools"] != "[]"][:: 1 if SLOW else 20]
    for row in rows:
        definitions = fields.definitions(row)
        messages = instructions.recognise(row)
        assert tok.render(messages, tools=definitions) == marked(fast, name, messages, definitions)


# ---- the plain form

PLAIN = """\
<|im_start|>system
Be kind.

You can call functions. These are their definitions:
<tools>
{definition}
</tools>

To call a function, write its name and its arguments as a JSON object between these tags:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
Its result comes back between <tool_response> and </tool_response>.<|im_end|>
<|im_start|>user
Is it warm?<|im_end|>
<|im_start|>assistant
«I look.
<tool_call>
{{"name": "get_weather", "arguments": {{"city": "Oslo"}}}}
</tool_call>
<tool_call>
{{"name": "get_weather", "arguments": {{"city": "Århus"}}}}
</tool_call><|im_end|>»
<|im_start|>user
<tool_response>
2 C
</tool_response>
<tool_response>
2 C
</tool_response><|im_end|>
<|im_start|>assistant
«It is.<|im_end|>»
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("tools") / "model", max_positions=4096)


def shown(tok, ids, mask):
    """The text of ids, the targets in «»."""
    runs = [(flag, [*run]) for flag, run in itertools.groupby(range(len(ids)), mask.__getitem__)]
    texts = [(flag, tok.decode([ids[i] for i in run], skip_special=False)) for flag, run in runs]
    return "".join(f"«{text}»" if flag else text for flag, text in texts)


def test_plain_form(model):
    """A template that knows no tools gets texts. Definitions and results are no targets."""
    tok = tokenizer.load(model, template="chatml")
    messages = [say("system", "Be kind."), *talk("Oslo", "Århus", content="I look.")]
    definition = json.dumps(WEATHER, ensure_ascii=False)
    rendered = tok.render(messages, tools=[WEATHER])
    assert shown(tok, *rendered) == PLAIN.format(definition=definition)
    without = tok.render(messages[1:], tools=[WEATHER])
    assert shown(tok, *without) == PLAIN.replace("Be kind.\n\n", "").format(definition=definition)
    for end in (2, 5):  # a prompt is the beginning of the whole
        ids, mask = tok.render(messages[:end], True, tools=[WEATHER])
        assert ids == rendered[0][: len(ids)] and (end == 5) == any(mask)


def test_plain_form_without_a_system_message():
    """Where the template refuses one, the definitions open the first message of the user."""
    layout = test_templates.load("lcpp-google-gemma-2-2b-it").ours()
    messages, definitions = tools.Tools(layout).conversation(talk("Oslo"), [WEATHER])
    assert definitions is None and messages[0]["role"] == "user"
    assert messages[0]["content"].startswith("You can call functions.")
    assert messages[0]["content"].endswith("</tool_response>.\n\nIs it warm?")
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]


def test_rows_of_tool_calls_are_kept(model, tmp_path, shared_data):
    """All 300 rows of glaive, of which 191 have definitions and were dropped once."""
    source = shared_data / "glaive_toolcall_en_demo.json"
    argv = [f"source={source}", f"model={model}", f"out={tmp_path / 'out'}", "template=chatml"]
    instructions.main(config.load(instructions.Config, [*argv, "max_length=100000", "workers=1"]))
    rows = store.Store(tmp_path / "out")
    assert len(rows) == 300 and rows.meta["dropped"] == {}
    tok = tokenizer.load(model, template="chatml")
    targets = [tok.decode(ids[mask > 0]) for ids, mask in map(rows.row, range(300))]
    assert sum(text.count("<tool_call>") for text in targets) == 211
    assert not any("<tool_response>" in text or "<tools>" in text for text in targets)


# ---- calls read from an answer

READ = """lcpp-Qwen-Qwen2.5-7B-Instruct lcpp-Qwen-Qwen3-0.6B lcpp-meta-llama-Llama-3.1-8B-Instruct
lcpp-mistralai-Mistral-Nemo-Instruct-2407 lcpp-mistralai-Ministral-3-14B-Reasoning-2512
lcpp-moonshotai-Kimi-K2 lcpp-openai-gpt-oss-120b axo-chatml trl-gemma lcpp-GigaChat3-10B-A1.8B
axo-jamba axo-command_a_tool_use""".split()
ARGUMENTS = [{"city": 'a "}" \\ b', "n": 3, "deep": {"x": [1, {"y": None}]}}, {}, {"ü": "\n</s>"}]


@pytest.mark.parametrize("name", test_templates.ALL if SLOW else READ)
def test_calls_are_read_as_they_were_written(name):
    layout = test_templates.load(name).ours()
    form = tools.Tools(layout)
    if not form.call:
        pytest.skip("its calls are no JSON")
    read = 0
    for chosen in (ARGUMENTS, *([x] for x in ARGUMENTS)):
        calls = [(f"get_{i}", arguments) for i, arguments in enumerate(chosen)]
        for content in ("", "I look."):
            turn = [say("user", "Go."), tools.calling(calls, content)]
            messages, definitions = form.conversation(turn, [WEATHER])
            try:
                out = layout.lay_out(messages, False, definitions)
            except chat.NotFollowed:
                continue
            _, begin, end = out.targets[-1]
            before, found = form.read(out.text[begin:end])
            assert found == calls
            assert content in before and "get_" not in before
            read += 1
    assert read


def test_half_a_call_is_text(model):
    tok = tokenizer.load(model, template="chatml")
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    half = call.replace("1", r'"\ud83d"')
    nan = call.replace("1", "NaN")
    for text in (half, nan, call[:-20], call.replace("{", "[").replace("}", "]"), "Hello", ""):
        assert tools.answer_of(tok, [*text.encode()]) == say("assistant", text)
    message = tools.answer_of(tok, [*f"Look: é {call}".encode(), 258])
    assert message == tools.calling([("f", {"x": 1})], "Look: é")


# ---- the chat

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
def scripted(monkeypatch):
    """A model whose answers are a list. .prompts: what it was asked, as texts."""

    def answer(model, prompts, *settings, on_token=None, **more):
        scripted.prompts += [bytes(id for id in ids if id < 256).decode() for ids in prompts]
        tokens = [[*scripted.answers.pop(0).encode(), 258] for _ in prompts]
        for i, ids in enumerate(tokens):
            for token in ids:
                on_token and on_token(i, token)
        logprobs = [[0.0] * len(ids) for ids in tokens]
        return Samples(tokens, logprobs, [True] * len(tokens), [None] * len(tokens))

    scripted = SimpleNamespace(prompts=[], answers=[])
    monkeypatch.setattr(sample, "generate", answer)
    return scripted


def run(*argv):
    sample.main(config.load(sample.Config, [*argv, "device=cpu", "temperature=0"]))


def test_chat_shows_calls_and_reads_results(model, scripted, tmp_path, monkeypatch, capsys):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER["function"]]))
    lines = iter(["Warm?", "2 C", "3 C", "And now?", "/quit"])
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(lines))
    scripted.answers = [f"I look.\n{CALL}\n{CALL}", "It is 2 C.", "Still."]
    run(f"model={model}", "template=chatml", f"tools={tmp_path / 'tools.json'}")
    assert asked == ["> ", *['get_weather({"city": "Oslo"}) = '] * 2, "> ", "> "]
    assert f"I look.\n{CALL}\n{CALL}\nIt is 2 C.\nStill.\n" in capsys.readouterr().out
    first, second, third = scripted.prompts
    assert json.dumps(WEATHER) in first and first.endswith("user\nWarm?\nassistant\n")
    assert second.startswith(first + f"I look.\n{CALL}\n{CALL}\nuser\n<tool_response>\n2 C\n")
    assert third.startswith(second + "It is 2 C.\nuser\nAnd now?")


def test_ctrl_d_in_the_place_of_a_result_ends_the_chat(model, scripted, tmp_path, monkeypatch):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))

    def typed(text):
        if text != "> ":
            raise EOFError
        return "Warm?"

    monkeypatch.setattr("builtins.input", typed)
    scripted.answers = [CALL]
    run(f"model={model}", "template=chatml", f"tools={tmp_path / 'tools.json'}")


def test_file_of_prompts_gets_calls(model, scripted, tmp_path):
    prompts = [dict(prompt="Warm?", tools=[WEATHER]), "Hi."]
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    scripted.answers = [f"I look. {CALL}", CALL]
    out = tmp_path / "out.json"
    run(f"model={model}", "template=chatml", f"prompts={tmp_path / 'p.json'}", f"out={out}")
    first, second = json.loads(out.read_text())
    assert "<tools>" in scripted.prompts[0] and "<tools>" not in scripted.prompts[1]
    assert first["output"] == "I look." and second["output"] == CALL
    assert first["tool_calls"][0]["function"] == dict(
        name="get_weather", arguments={"city": "Oslo"}
    )
    assert "tool_calls" not in second  # it had no tools to call


def test_tools_that_cannot_be(model, tmp_path):
    (tmp_path / "bad.json").write_text('{"name": ')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "good.json").write_text(json.dumps([WEATHER]))
    for argv, words in (
        ((f"tools={tmp_path / 'bad.json'}", "template=chatml"), "must hold a JSON list"),
        ((f"tools={tmp_path / 'empty.json'}", "template=chatml"), "must hold a JSON list"),
        ((f"tools={tmp_path / 'good.json'}",), "need a chat template"),
    ):
        with pytest.raises(config.UserError, match=words):
            run(f"model={model}", "prompt=x", *argv)


# ---- training


SHORT = """\
{%- for tool in tools or [] %}{{ tool.function.name + ';' }}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ m.content + '?' }}
    {%- elif m.role == 'tool' %}{{ '=' + m.content + ';' }}
    {%- else %}{{ '<|im_start|>' + (m.content or '') }}
        {%- for c in m.tool_calls or [] %}
            {{- '!' ~ c.function.name ~ ':' ~ (c.function.arguments | tojson) }}
        {%- endfor %}{{ '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""


def test_a_model_learns_to_call(tmp_path):
    """Trained on made-up calls, it calls with the words of prompts that it has never seen."""
    rng = random.Random(0)
    words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
    rng.shuffle(words)
    model = tiny.model_dir(tmp_path / "model", dim=64, ffn_dim=128, head_dim=16)
    (model / "chat_template.jinja").write_text(SHORT)
    definition = dict(name="f", parameters=dict(x="text"))
    records = [
        dict(
            messages=[
                say("user", word),
                say("assistant", "", tool_calls=[dict(name="f", arguments=dict(x=word))]),
            ],
            tools=[definition],
        )
        for word in words
    ]
    source = tiny.jsonl(tmp_path / "calls.jsonl", records[20:])
    argv = [f"source={source}", f"model={model}", f"out={tmp_path / 'data'}"]
    instructions.main(config.load(instructions.Config, argv))
    settings = dict(
        model=model, data=tmp_path / "data", out=tmp_path / "out", steps=80, batch_size=32, lr=5e-3,
        micro_batch=32, max_length=64, packing="false", device="cpu", dtype="float32", log_every=50,
    )  # fmt: skip
    tiny.train("sft", tiny.arguments(settings))
    prompts = [dict(prompt=word, tools=[definition]) for word in words[:20]]
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    run(f"model={tmp_path / 'out/last'}", f"prompts={tmp_path / 'p.json'}",
        f"out={tmp_path / 'a.json'}", "max_new_tokens=20")  # fmt: skip
    answers = json.loads((tmp_path / "a.json").read_text())
    calls = [answer.get("tool_calls", [{}])[0].get("function") for answer in answers]
    assert calls == [dict(name="f", arguments=dict(x=word)) for word in words[:20]]

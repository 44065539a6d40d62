"""Self-instruct: the parts of an answer, each filter, ROUGE-L, both generators, and the resume."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import tiny

from nano.config import UserError
from prepare import bootstrap, fields

SEEDS = [
    dict(instruction="Name three birds that cannot fly.", input="", output="Emu, kiwi, penguin."),
    dict(instruction="What is the opposite?", instances=[dict(input="warm", output="cold")]),
    dict(instruction="Translate the sentence to French.", input="I sleep.", output="Je dors."),
]


def item(number, instruction, output="Yes.", given="<noinput>"):
    return f"{number}. Instruction: {instruction}\n{number}. Input:\n{given}\n{number}. Output:\n{output}\n"


def script(*instructions, first=4):
    """An answer with these tasks. An instruction in <> is the whole item."""
    items = [
        text[1:-1] if text.startswith("<") else item(number, text)
        for number, text in enumerate(instructions, first)
    ]
    return "###\n".join(items)


# instruction of a task in the script -> why it is dropped, or None
TASKS = {
    "Compare the two given cities by size.": None,
    "Count to ten.": "not 4 to 150 words",
    "word " * 151: "not 4 to 150 words",
    "word " * 150: None,
    "Describe the image of a cat.": "a banned word",
    "Describe how we imagine a cat.": None,
    "Tell me where to Go To for lunch.": "a banned word",
    "Write a program that adds two numbers.": "asks for a program",
    "Write the programme of a small concert.": None,
    "(a) Is this a good question?": "opens with a sign",
    "Éclair: what is in it?": "opens with another script",
    "Name three birds that cannot swim.": "ROUGE-L above 0.7",  # 5 of 6 words are a seed's
    "Name four birds which cannot swim.": None,  # 3 of 6
    "Compare the two given cities by their size.": "ROUGE-L above 0.7",  # with a kept one
    "<13. Instruction: no output is here>": "broken or cut off",
}


@pytest.fixture
def seeds(tmp_path):
    return tiny.jsonl(tmp_path / "seeds.jsonl", SEEDS)


@pytest.fixture
def server():
    """A server with .url, .replies (texts or statuses) and .requests (bodies)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, dict(self.headers), body))
            reply = server.replies.pop(0)
            if isinstance(reply, int):
                self.send_error(reply)
                return
            text, reason = reply if isinstance(reply, tuple) else (reply, "stop")
            shown = str(text)
            content = dict(message=dict(content=shown)) if "messages" in body else dict(text=shown)
            raw = json.dumps(dict(choices=[content | dict(finish_reason=reason)])).encode()
            raw = text if isinstance(text, bytes) else raw
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.replies, server.requests = [], []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(*argv):
    cfg = bootstrap.config.load(bootstrap.Config, tiny.arguments(dict(argv)))
    bootstrap.config.check(cfg)
    bootstrap.main(cfg)


def settings(server, seeds, out, **changes):
    values = dict(generator=server.url, name="m", seeds=seeds, out=out, batch_size=1)
    return (values | changes).items()


def kept(out):
    return [json.loads(line) for line in (out / "tasks.jsonl").read_text().splitlines()]


def test_scripted_generator_gives_the_exact_tasks(server, seeds, tmp_path, capsys):
    """What is kept, with its likeness to the tasks before; what is dropped, by its reason."""
    scored = pytest.importorskip("rouge_score.rouge_scorer")
    server.replies = [script(*TASKS)]
    run(*settings(server, seeds, tmp_path / "out", max_requests=1))
    tasks = kept(tmp_path / "out")
    expected = [text.strip() for text, reason in TASKS.items() if reason is None]
    assert [task["instruction"] for task in tasks] == expected
    state = json.loads((tmp_path / "out/state.json").read_text())
    reasons = [reason for reason in TASKS.values() if reason]
    assert state["dropped"] == {reason: reasons.count(reason) for reason in {*reasons}}
    assert all(task["input"] == "" and task["output"] == "Yes." for task in tasks)

    scorer = scored.RougeScorer(["rougeL"])
    before = [seed["instruction"] for seed in SEEDS]
    for task in tasks:
        text = task["instruction"]
        scores = {other: scorer.score(other, text)["rougeL"].fmeasure for other in before}
        assert task["most_similar_instructions"] == scores
        assert task["avg_similarity_score"] == sum(scores.values()) / len(scores)
        before.append(text)
        fields.check_rest({key: x for key, x in task.items() if "simil" in key}, [text])  # no Drop
    assert "dropped        2  not 4 to 150 words" in capsys.readouterr().out


def test_request_shows_seeds_and_asks_to_go_on(server, seeds, tmp_path):
    server.replies = [script("Compare the two given cities by size.")]
    run(*settings(server, seeds, tmp_path / "out", max_requests=1, chat="false", temperature=0.5))
    path, headers, body = server.requests[0]
    assert path == "/v1/completions" and "Authorization" not in headers
    assert body["model"] == "m" and body["temperature"] == 0.5 and body["stop"] == ["\n20."]
    prompt = body["prompt"]
    assert prompt.startswith("Write a list of 20 tasks") and prompt.endswith("###\n4. Instruction:")
    for seed in SEEDS:
        assert f"Instruction: {seed['instruction']}\n" in prompt
    assert "Input:\nwarm\n" in prompt and "Output:\ncold\n" in prompt
    assert prompt.count("Input:\n<noinput>\n") == 1


def test_cut_off_answer_loses_its_last_task(server, seeds, tmp_path):
    texts = "Compare the two given cities by size.", "Explain why bread has holes in it."
    server.replies = [(script(*texts), "length")]
    run(*settings(server, seeds, tmp_path / "out", max_requests=1))
    assert [task["instruction"] for task in kept(tmp_path / "out")] == [texts[0]]


def test_answer_may_repeat_how_the_list_goes_on():
    whole = script("Is it one?", "Is it two?")
    for text in (whole, f"###\n{whole}", whole.removeprefix("4. Instruction:")):
        text = text if "4." in text[:6] else f"4. Instruction:{text}"
        tasks = bootstrap.parse(text, 4, False)
        assert [task["instruction"] for task in tasks] == ["Is it one?", "Is it two?"]


def test_other_scripts(server, tmp_path):
    """latin=false counts and compares the characters of a script without spaces."""
    seeds = [dict(instruction="请以下面词语为主题写一首诗", input="夏天", output="夏。")] * 3
    seeds = tiny.jsonl(tmp_path / "seeds.jsonl", seeds)
    answer = script(
        "给出下面句子的同义句", "请以下面词语为主题写一封信", "画画吧", "看图写出一个故事"
    )
    server.replies = [answer] * 2
    run(*settings(server, seeds, tmp_path / "latin", max_requests=1))
    assert kept(tmp_path / "latin") == []
    changes = dict(latin=False, banned=["图"], max_requests=1)
    run(*settings(server, seeds, tmp_path / "all", **changes))
    (task,) = kept(tmp_path / "all")
    assert task["instruction"] == "给出下面句子的同义句"
    assert task["avg_similarity_score"] == pytest.approx(2 * 2 / (10 + 13))  # 下面


def test_rouge_l_is_that_of_rouge_score():
    scored = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = scored.RougeScorer(["rougeL"])
    texts = [seed["instruction"] for seed in SEEDS] + [text for text in TASKS if len(text) < 99]
    texts += ["", "a", "a b a b a b", "b a b a c", "Don't, don't!", "x1 X1 x-1", "été", "a " * 200]
    for text in texts:
        words = [bootstrap.words_of(other) for other in texts]
        ours = bootstrap.rouge_l(bootstrap.words_of(text), words)
        theirs = [scorer.score(other, text)["rougeL"].fmeasure for other in texts]
        assert ours == theirs


def test_resume_is_exact(server, seeds, tmp_path):
    """Two runs of one request, the file damaged between them, are one run of two."""
    replies = [
        script("Compare the two given cities by size."),
        script("Explain why bread is soft."),
    ]
    server.replies = [*replies, *replies]
    run(*settings(server, seeds, tmp_path / "one", max_requests=2))
    run(*settings(server, seeds, tmp_path / "two", max_requests=1))
    with open(tmp_path / "two/tasks.jsonl", "a") as f:
        f.write('{"instruction": "half a li')  # a kill between the tasks and the state
    run(*settings(server, seeds, tmp_path / "two", max_requests=2))
    assert kept(tmp_path / "one") == kept(tmp_path / "two")
    assert server.requests[:2] == server.requests[2:]
    run(*settings(server, seeds, tmp_path / "two", max_requests=2))  # there is nothing left to do
    assert len(server.requests) == 4
    with pytest.raises(UserError, match=r"other settings \(similarity\)"):
        run(*settings(server, seeds, tmp_path / "two", similarity=0.5))


def test_server_that_fails(server, seeds, tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap.time, "sleep", lambda seconds: None)
    server.replies = [503, 429, script("Compare the two given cities by size.")]
    run(*settings(server, seeds, tmp_path / "out", max_requests=1))
    assert len(kept(tmp_path / "out")) == 1
    for replies, words in (
        ([401], "status 401"),
        ([500] * 6, "status 500"),
        ([b"{}"], "is not that"),
    ):
        server.replies = replies
        with pytest.raises(UserError, match=words):
            run(*settings(server, seeds, tmp_path / words, max_requests=1))
    # the same command goes on
    server.replies = [script("Compare the two given cities by size.")]
    run(*settings(server, seeds, tmp_path / "status 401", max_requests=1))
    assert len(kept(tmp_path / "status 401")) == 1
    with pytest.raises(UserError, match="is no address"):
        address = dict(generator="http://local host/v1")
        run(*settings(server, seeds, tmp_path / "none", **address, max_requests=1))


def test_model_directory_writes_tasks(seeds, tmp_path, monkeypatch):
    """A local model gets the same request, at its end how the list goes on, and its stop string."""
    model = tiny.model_dir(tmp_path / "model", max_positions=2048)
    prompts = []

    def scripted(model, ids, *args, on_token, seed, **more):
        prompts.append(bytes(ids[0]).decode())
        text = " Compare the two given cities by size.\n4. Input:\n<noinput>\n4. Output:\nYes.\n###\n20. I"
        out = []
        for token in text.encode():
            out.append(token)
            if on_token(0, token):
                break
        assert bytes(out).endswith(b"\n20.") and seed == (0, 0)
        return generate.Samples([out], [[]], [True])

    from nano import generate

    monkeypatch.setattr(generate, "generate", scripted)
    run(
        *dict(
            generator=model,
            seeds=seeds,
            out=tmp_path / "out",
            batch_size=1,
            max_requests=1,
            chat="false",
        ).items()
    )
    assert prompts[0].endswith("###\n4. Instruction:")
    (task,) = kept(tmp_path / "out")
    assert (
        task["instruction"] == "Compare the two given cities by size." and task["output"] == "Yes."
    )


def test_a_server_that_is_not_there_is_said_at_once(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(bootstrap.time, "sleep", waits.append)
    with pytest.raises(UserError, match="gives no answer .*Connection refused"):
        bootstrap.post("http://127.0.0.1:1/v1/completions", {})
    assert not waits

    def slow(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr(bootstrap.urllib.request, "urlopen", slow)
    with pytest.raises(UserError, match="timed out"):
        bootstrap.post("http://127.0.0.1:1/v1/completions", {})
    assert waits == [1, 2, 4, 8, 16] and "timed out; again in 16 s" in capsys.readouterr().err


def test_refusals(server, seeds, tmp_path):
    for changes, words in (
        (dict(name=""), "needs name="),
        (dict(shots=4), "has 3 seeds: lower shots=4"),
        (dict(tasks=4), "leaves no room"),
        (dict(device="cpu"), "device="),
        (dict(generator="nowhere"), "takes no name="),
        (dict(seeds=tiny.jsonl(tmp_path / "bad.jsonl", [dict(instruction="a")])), "bad.jsonl:1: a"),
        (dict(seeds=tmp_path / "none.jsonl"), "there is no file"),
    ):
        with pytest.raises(UserError, match=words):
            run(*settings(server, **(dict(seeds=seeds, out=tmp_path / "out") | changes)))
    assert not (tmp_path / "out").exists()

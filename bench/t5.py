"""Speed and memory of tuning an encoder-decoder, beside transformers' Seq2SeqTrainer.

    python -m bench.t5 data=alpaca_en_demo.json
    python -m bench.t5 data=alpaca_en_demo.json steps=20 repeats=3 batch=16
    python -m bench.t5 data=alpaca_en_demo.json size=toy 'sides=[]'  # the model and the data alone

The model has Flan-T5-small's shape and random weights. `data` holds instruction records of a shape
that prepare.instructions reads, and a sentencepiece vocabulary is trained on their text. Both sides
train the same rows with fp32 weights and without dropout. Every run is a process of its
own, and the sides take turns.

Tokens are real ones of prompt and answer, without padding, from the second step on. Peak memory is
the process's largest resident set.
"""

import io
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nano  # noqa: F401  first, because bench/nano.py finds the others
from bench.sft import finish, machine, python
from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt, UserError

SIZES = {  # fields of t5.ModelConfig
    "flan-t5-small": dict(
        vocab_size=32128,
        dim=512,
        n_layers=8,
        n_decoder_layers=8,
        n_heads=6,
        n_kv_heads=6,
        head_dim=64,
        ffn_dim=1024,
    ),
    "toy": dict(
        vocab_size=1024,
        dim=128,
        n_layers=3,
        n_decoder_layers=3,
        n_heads=4,
        n_kv_heads=4,
        head_dim=32,
        ffn_dim=256,
    ),
}


@dataclass
class Config:
    data: PathText  # instruction records: JSON or JSONL
    out: PathText = "out/bench/t5"  # scratch folder
    size: Literal["flan-t5-small", "toy"] = "flan-t5-small"
    sides: tuple[Literal["ours", "theirs"], ...] = ("ours", "theirs")
    steps: NonNegativeInt = 8  # optimizer steps of a run
    repeats: PositiveInt = 1
    micro_batch: PositiveInt = 4  # packed rows of our step
    max_length: PositiveInt = 512  # tokens of such a row, prompts and answers
    batch: PositiveInt = 8  # padded rows of their step
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix work
    threads: PositiveInt = 2
    seed: int = 0
    device: Literal["cpu"] = "cpu"
    run: Literal["", "theirs"] = ""  # what a process of its own does


def fresh_model(cfg, dir):
    """Writes a model directory of random weights, with a vocabulary of the data's text."""
    import sentencepiece
    import torch

    import t5
    from nano import files, records, weights

    texts = []
    with records.progress(None, "B") as bar:
        for _, raw in records.read_file(Path(cfg.data), bar):
            texts += [text for text in records.parse(raw).values() if isinstance(text, str)]
    vocabulary = io.BytesIO()
    sizes = SIZES[cfg.size]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n") if line),
        model_writer=vocabulary,
        vocab_size=min(8000, sizes["vocab_size"] - 24),
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    torch.manual_seed(cfg.seed)
    shape = t5.ModelConfig(**sizes, mlp="gated", activation="gelu_tanh")
    model = t5.T5(shape).init_weights()
    weights.save_model(model, dir, pad_token_id=0, eos_token_id=1, dropout_rate=0.0)
    files.write_bytes(dir / "spiece.model", vocabulary.getvalue())
    names = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    settings = names | dict(tokenizer_class="T5Tokenizer", extra_ids=0)
    files.write_json(dir / "tokenizer_config.json", settings)


def prepare(cfg):
    """The model directory and the prepared folder."""
    folder = Path(cfg.out)
    fresh_model(cfg, folder / "model")
    keys = dict(source=cfg.data, model=folder / "model", out=folder / "data", template="plain")
    keys |= dict(max_length=cfg.max_length, over_length="truncate")
    finish(python("-m", "prepare.instructions", **keys), folder / "output.txt", 1)


def ours(cfg):
    """One run of sft.py -> (real tokens/s, peak memory in GB)."""
    folder = Path(cfg.out)
    shutil.rmtree(folder / "run", ignore_errors=True)
    keys = dict(
        model=folder / "model",
        data=folder / "data",
        out=folder / "run",
        steps=cfg.steps,
        batch_size=cfg.micro_batch,
        micro_batch=cfg.micro_batch,
        max_length=cfg.max_length,
        device="cpu",
        dtype=cfg.dtype,
        log_every=1,
        samples=0,
        save_every=-1,
    )
    _, memory = finish(python("sft.py", **keys), folder / "output.txt", cfg.threads)
    log = [json.loads(line) for line in open(folder / "run" / "log.jsonl", encoding="utf-8")]
    log = [record for record in log if record["kind"] == "train"]
    seconds = [b["time"] - a["time"] for a, b in zip(log, log[1:], strict=False)]
    tokens = [r["tokens_per_s"] * s for r, s in zip(log[1:], seconds, strict=True)]
    return sum(tokens) / sum(seconds), memory


def theirs(cfg):
    """One run of Seq2SeqTrainer in a process of its own -> the same."""
    settings = {key: text for key, text in config.texts(cfg).items() if key != "sides"}
    command = python("-m", "bench.t5", **settings | dict(run="theirs"))
    last, memory = finish(command, Path(cfg.out) / "output.txt", cfg.threads)
    return json.loads(last)["real_tokens_per_s"], memory


def run_theirs(cfg):
    """Trains with Seq2SeqTrainer and prints its speed."""
    import torch
    from transformers import (
        AutoModelForSeq2SeqLM,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        TrainerCallback,
    )

    from nano.store import Store

    torch.set_num_threads(cfg.threads)
    rows = Store(f"{cfg.out}/data")
    examples = []
    for i in range(len(rows)):
        tokens, mask = rows.row(i)
        start = int(mask.argmax())
        examples.append(dict(input_ids=tokens[:start].tolist(), labels=tokens[start:].tolist()))
    model = AutoModelForSeq2SeqLM.from_pretrained(f"{cfg.out}/model").float()

    counts, times = [], []

    def padded(rows, value):
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    def collate(features):  # as DataCollatorForSeq2Seq, which wants a tokenizer
        counts.append(sum(len(f["input_ids"]) + len(f["labels"]) for f in features))
        return dict(
            input_ids=padded([f["input_ids"] for f in features], 0),
            attention_mask=padded([[1] * len(f["input_ids"]) for f in features], 0),
            labels=padded([f["labels"] for f in features], -100),
        )

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    arguments = Seq2SeqTrainingArguments(
        output_dir=f"{cfg.out}/theirs",
        per_device_train_batch_size=cfg.batch,
        max_steps=cfg.steps,
        learning_rate=2e-5,
        bf16=cfg.dtype == "bfloat16",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        seed=cfg.seed,
    )
    trainer = Seq2SeqTrainer(
        model, arguments, data_collator=collate, train_dataset=examples, callbacks=[Clock()]
    )
    trainer.train()
    tokens = sum(counts[1 : len(times)])
    print(json.dumps(dict(real_tokens_per_s=tokens / (times[-1] - times[0]))))


def main(cfg):
    if cfg.steps < 2:
        raise UserError(f"steps={cfg.steps}: take 2 or more, for the first is not timed")
    if cfg.run:
        run_theirs(cfg)
        return
    about = machine(cfg.device)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    prepare(cfg)
    results = {side: [] for side in cfg.sides}
    for _ in range(cfg.repeats):
        for side, runs in results.items():
            runs.append(dict(ours=ours, theirs=theirs)[side](cfg))
            print(f"{side}: {runs[-1][0]:.0f} tokens/s, {runs[-1][1]:.2f} GB", flush=True)
    if results:
        print(f"\n{about}; {cfg.threads} threads, {cfg.dtype}, {cfg.steps} steps, ")
        print(f"medians of {cfg.repeats}\n")
        print("| program | real tokens/s | peak memory, GB |\n| --- | ---: | ---: |")
    for side, runs in results.items():
        speed, memory = map(statistics.median, zip(*runs, strict=True))
        print(f"| {side} | {speed:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    config.run(main, Config)

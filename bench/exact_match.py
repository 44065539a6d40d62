"""Share of held-out instructions that a model answers to the letter, in all and task by task.

    python -m bench.exact_match model=models/smollm2 data=data/toy/test.jsonl rows=100
    python -m bench.exact_match model=out/toy/last data=data/toy/test.jsonl rows=100

`data` holds the records that prepare.toy writes: Alpaca's instruction, input and output, and the
task. The prompts are rendered as in training, the answers are greedy.
"""

import json
from collections import defaultdict
from dataclasses import dataclass

from nano import config, weights
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed


@dataclass
class Config:
    model: PathText = "models/smollm2"  # model or adapter directory
    data: PathText = "data/toy/test.jsonl"
    rows: NonNegativeInt = 100  # the first ones; 0: all
    max_new_tokens: PositiveInt = 48
    device: str = "auto"
    dtype: str = "auto"
    parallel: str = "none"
    seed: Seed = 0


def main(cfg):
    from nano import generate, runtime
    from prepare.instructions import recognise
    from prepare.toy import exact_match

    try:
        lines = open(cfg.data, encoding="utf-8").readlines()
    except FileNotFoundError:
        raise config.UserError(
            f"there is no file {cfg.data}: python -m prepare.toy out=data/toy writes one"
        ) from None
    records = [json.loads(line) for line in lines][: cfg.rows or None]
    rt = runtime.start(cfg)
    opened = weights.open(cfg.model, dtype=rt.dtype)
    model, tok = opened.model, opened.tok
    rt.distribute(model)
    prompts = [
        tok.render(recognise(dict(record))[:-1], add_generation_prompt=True)[0]
        for record in records
    ]
    with rt.autocast():
        samples = generate.generate(
            model, prompts, cfg.max_new_tokens, temperature=0.0, stop_ids=tok.stop_ids
        )
    answers = [tok.decode(ids) for ids in samples.tokens]
    tasks = defaultdict(list)
    for i, record in enumerate(records):
        tasks[record.get("task", "all")].append(i)
    for task, rows in sorted(tasks.items()):
        score = exact_match([answers[i] for i in rows], [records[i] for i in rows])
        wanted, answer = records[rows[0]]["output"], answers[rows[0]][:60]
        print(f"{task:>12}  {score:6.1%} of {len(rows):3}   wanted {wanted!r}, got {answer!r}")
    score = exact_match(answers, records)
    print(f"{'all':>12}  {score:6.1%} of {len(records):3}   exact match of {cfg.model}")


if __name__ == "__main__":
    config.run(main, Config)

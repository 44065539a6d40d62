"""What a reward function says of a model's answers to the prompts of a prepared folder.

    python -m prepare.instructions source=bullets split=test model=models/smollm2 \\
        out=data/bullets-test
    python -m bench.reward model=models/smollm2 data=data/bullets-test reward=bullets

Prints three answers, the mean of the reward, the share of answers that get 1 or more, and the share
that end by themselves.
"""

import itertools
import json
import statistics
from dataclasses import dataclass

import torch

from nano import config, functions, generate, runtime, store, weights
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, Temperature


@dataclass
class Config:
    reward: PathText  # task or file.py:function, as in ppo.py
    model: PathText = "models/smollm2"  # model or adapter directory
    data: PathText = "data/bullets-test"  # prepared folder
    rows: NonNegativeInt = 100  # the first prompts; 0: all
    temperature: Temperature = 1.0  # 0: always the likeliest token
    max_new_tokens: PositiveInt = 96
    batch_size: PositiveInt = 64
    device: str = "auto"
    dtype: str = "auto"
    seed: Seed = 0


def main(cfg):
    function = functions.load_function(cfg.reward)
    rt = runtime.start(cfg, parallel="none")
    opened = weights.open(cfg.model, dtype=rt.dtype, template=store.chat_template([cfg.data]))
    model, tok = opened.model, opened.tok
    rt.distribute(model)
    rows = store.Store(cfg.data, "train", tok)
    count = min(cfg.rows or len(rows), len(rows))
    prompts = [rows.prompt(i).tolist() for i in range(count)]
    records = [json.loads(rows.line(i) or "null") for i in range(count)]
    with rt.autocast():
        samples = generate.generate(
            model,
            prompts,
            cfg.max_new_tokens,
            cfg.temperature,
            stop_ids=tok.stop_ids,
            seed=cfg.seed,
            batch_size=cfg.batch_size,
        )
    finished = torch.tensor(samples.finished).float()
    scores = functions.judge(function, tok, prompts, samples.tokens, finished, records).tolist()
    for prompt, answer, score in itertools.islice(
        zip(prompts, samples.tokens, scores, strict=True), 3
    ):
        print(f"{tok.decode(prompt)}{tok.decode(answer)}\n-> {score:.2f}\n")
    scores = [score for score in scores if score == score]  # NaN stands for None
    if not scores:
        raise config.UserError(f"reward={cfg.reward} gives None for all {count} answers")
    full = statistics.mean(score >= 1 for score in scores)
    print(
        f"{cfg.model}: {len(scores)} answers, reward {statistics.mean(scores):.3f}, "
        f"1 or more {full:.1%}, ended {statistics.mean(samples.finished):.1%}, "
        f"{statistics.mean(map(len, samples.tokens)):.0f} tokens"
    )


if __name__ == "__main__":
    config.run(main, Config)

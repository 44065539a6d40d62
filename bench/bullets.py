"""How often a model answers in exactly three bullet points, on held-out prompts.

    python -m prepare.toy task=bullets out=data/bullets
    python -m prepare.instructions source=data/bullets/train.jsonl model=models/smollm2 \\
        out=data/bullets/store
    python ppo.py recipes/smollm2-bullets-grpo.cfg out=out/bullets
    python -m bench.bullets model=models/smollm2
    python -m bench.bullets model=out/bullets/last

The answers are sampled as in training (temperature 1), or greedy with temperature=0.
"""

import json
import statistics
from dataclasses import dataclass

from nano import config, weights
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, Temperature


@dataclass
class Config:
    model: PathText = "models/smollm2"  # model or adapter directory
    data: PathText = "data/bullets/test.jsonl"
    rows: NonNegativeInt = 100  # the first ones; 0: all
    temperature: Temperature = 1.0
    max_new_tokens: PositiveInt = 96
    device: str = "auto"
    dtype: str = "auto"
    seed: Seed = 0


def main(cfg):
    from nano import generate, runtime
    from prepare.toy import three_bullets

    try:
        lines = open(cfg.data, encoding="utf-8").readlines()
        questions = [json.loads(line)["messages"][:1] for line in lines][: cfg.rows or None]
    except FileNotFoundError:
        raise config.UserError(
            f"there is no file {cfg.data}: python -m prepare.toy task=bullets writes one"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise config.UserError(
            f"{cfg.data}: each line must be a JSON record with messages, as prepare.toy writes them"
        ) from None
    rt = runtime.start(cfg, parallel="none")
    opened = weights.open(cfg.model, dtype=rt.dtype)
    model, tok = opened.model, opened.tok
    rt.distribute(model)
    prompts = [tok.render(messages, add_generation_prompt=True)[0] for messages in questions]
    with rt.autocast():
        samples = generate.generate(
            model,
            prompts,
            cfg.max_new_tokens,
            cfg.temperature,
            stop_ids=tok.stop_ids,
            seed=cfg.seed,
        )
    answers = [tok.decode(ids) for ids in samples.tokens]
    rewards = [
        three_bullets("", answer, ended)
        for answer, ended in zip(answers, samples.finished, strict=True)
    ]
    for messages, answer, reward in list(zip(questions, answers, rewards, strict=True))[:3]:
        print(f"{messages[0]['content']}\n{answer}\n-> {reward:.2f}\n")
    hit = statistics.mean(r == 1 for r in rewards)
    ended = statistics.mean(samples.finished)
    length = statistics.mean(map(len, samples.tokens))
    print(
        f"{cfg.model}: {len(rewards)} prompts, reward {statistics.mean(rewards):.3f}, "
        f"exact {hit:.1%}, ended {ended:.1%}, {length:.0f} tokens"
    )


if __name__ == "__main__":
    config.run(main, Config)

"""What it costs to skip steps whose gradient is not finite: optim.step beside optimizer.step.

    python -m bench.skips size=15m optimizer=muon

Both take turns in one run, so that they meet the same machine: a forward and backward, then a step
of the one or of the other. A difference is measurable if it is larger than that of two halves of
the same.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Literal

from nano import config
from nano.config import PositiveInt


@dataclass
class Config:
    size: Literal["toy", "15m", "124m", "350m"] = "15m"  # of pretrain.py, vocabulary 32,000
    optimizer: Literal["adamw", "muon"] = "adamw"
    tokens: PositiveInt = 256  # of a step
    rounds: PositiveInt = 100  # steps of each
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


def main(cfg):
    import torch

    import pretrain
    from model import Transformer
    from nano import optim, runtime

    rt = runtime.start(cfg, parallel="none")
    settings = pretrain.Config(size=cfg.size, max_length=cfg.tokens)
    model = Transformer(pretrain.model_config(settings, 32_000)).init_weights()
    rt.distribute(model)
    optimizer = optim.build(model, cfg.optimizer, lr=1e-4)
    ids = torch.randint(32_000, (1, cfg.tokens), device=rt.device)
    times = {"optimizer.step": [], "optim.step": []}  # seconds of the step alone
    whole = []  # seconds of forward, backward and step
    for i in range(2 * cfg.rounds + 4):
        began = time.perf_counter()
        with rt.autocast():
            loss = model.logits(model.hidden(ids)).float().logsumexp(-1).mean()
        loss.backward()
        norm = optim.clip_(model.parameters(), 1.0)
        rt.wait()
        stepped = time.perf_counter()
        if i % 2:
            optim.step(optimizer, norm)
        else:
            for part in getattr(optimizer, "optimizers", [optimizer]):
                part.found_inf = None
            optimizer.step()
        rt.wait()
        ended = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        if i >= 4:
            whole.append(ended - began)
            times["optim.step" if i % 2 else "optimizer.step"].append(ended - stepped)
    total = statistics.median(whole)
    about = f"{cfg.size}, {cfg.optimizer}, {rt.name}, {cfg.tokens} tokens"
    print(f"{about}: {1e3 * total:.2f} ms a step")
    for name, seconds in times.items():
        halves = [1e3 * statistics.median(seconds[i::2]) for i in (0, 1)]
        middle = 1e3 * statistics.median(seconds)
        print(f"  {name:<15} {middle:.3f} ms (halves {halves[0]:.3f}, {halves[1]:.3f})")
    plain, guarded = map(statistics.median, times.values())
    print(f"  difference {100 * (guarded - plain) / total:+.2f}% of a whole step")


if __name__ == "__main__":
    config.run(main, Config)

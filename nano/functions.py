"""A user's own function, named on the command line as file.py:function, such as a reward.

    function = functions.load_function("prepare/toy.py:three_bullets")
    scores = functions.judge(function, tok, prompts, responses, finished)

The file is the user's own code. It runs because the command line says so.
"""

import importlib.util
import sys
import traceback
from pathlib import Path

import torch

from nano.config import FLOAT32_MAX, UserError


def load_function(spec):
    """The function that `spec`, file.py:function, names. UserError where there is none, or where
    the file does not run. The file may import modules that lie beside it."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"{spec} names no function: write it as file.py:function")
    if not Path(path).is_file():
        raise UserError(f"{spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(path, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path] = module  # where dataclasses and pickle look it up
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that it hides nothing from this program
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"{spec}: {path} does not run: {type(e).__name__}: {e}") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name}")
    return getattr(module, name)


def judge(function, tok, prompts, responses, finished):
    """The score that function(prompt, response, finished) gives to each response, (N,) fp32.

    prompts, responses: N lists of token ids, which the function sees as text. finished (N,):
    whether the response ended by itself. UserError where the function fails, and where it gives no
    finite number, which would make every weight NaN."""
    name = getattr(function, "__name__", function)
    scores = []
    for prompt, response, ended in zip(prompts, responses, finished.tolist(), strict=True):
        try:
            score = float(function(tok.decode(prompt), tok.decode(response), ended > 0))
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            raise UserError(
                f"the function {name} failed in {at.filename}:{at.lineno}: {type(e).__name__}: {e}"
            ) from None
        if not abs(score) <= FLOAT32_MAX:  # nor is NaN
            text = tok.decode(response)
            raise UserError(
                f"the function {name} gave {score:g} for the response {text!r:.200}: "
                "a score must be a finite number in float32"
            )
        scores.append(score)
    return torch.tensor(scores)

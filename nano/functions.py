"""A user's own function, named on the command line as file.py:function, such as a reward.

    function = functions.load_function("prepare/toy.py:three_bullets")
    scores = functions.judge(function, tok, prompts, responses, finished, records)

It is called as f(prompt, response, finished), or as f(prompt, response, finished, record) where it
takes four arguments, and returns a number, or None for a response that it does not judge.

The file is the user's own code. It runs because the command line says so.
"""

import importlib.util
import inspect
import math
import sys
import traceback
from pathlib import Path

import torch

import tasks
from nano.config import FLOAT32_MAX, UserError


def load_function(spec):
    """The function that `spec`, file.py:function, names, or the score of a task (tasks/). UserError
    where there is none, or where the file does not run. The file may import modules that lie beside
    it."""
    if tasks.is_name(spec):
        return tasks.load(spec).reward()
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


def is_function(spec):
    """Whether a reward is a function, and no directory of a model."""
    return ".py:" in spec or tasks.is_name(spec)


def fourth(function):
    """The fourth parameter of a function by place, or None."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions in C do not tell
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [p for p in parameters if p.kind in kinds]
    return places[3] if len(places) > 3 else None


def needs_record(function):
    """Whether a reward function cannot be called without the record of the prompt."""
    p = fourth(function)
    return p is not None and p.default is p.empty


def takes_record(function):
    """Whether a reward function is given the record: it needs it, or it has a default for it."""
    p = fourth(function)
    return p is not None and (p.default is p.empty or p.name == "record")


def judge(function, tok, prompts, responses, finished, records=None, special=False):
    """The score that function(prompt, response, finished) gives to each response, (N,) fp32.

    prompts, responses: N lists of token ids, which the function sees as text. finished (N,):
    whether the response ended by itself. records: N dicts or None, the fourth argument of a
    function that takes one. special: the text has the names of control tokens in it.
    NaN stands for None, the answer of a function that does not judge a response. UserError where
    the function fails, and where it gives no finite number, which would make every weight NaN."""
    name = getattr(function, "__name__", function)
    scores = []
    more = [()] * len(prompts)
    if takes_record(function):
        more = [(record,) for record in records or [None] * len(prompts)]
    for prompt, response, ended, record in zip(
        prompts, responses, finished.tolist(), more, strict=True
    ):
        texts = [tok.decode(ids, skip_special=not special) for ids in (prompt, response)]
        try:
            score = function(*texts, ended > 0, *record)
            score = None if score is None else float(score)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            raise UserError(
                f"the function {name} failed in {at.filename}:{at.lineno}: {type(e).__name__}: {e}"
            ) from None
        if score is not None and not abs(score) <= FLOAT32_MAX:  # nor is NaN
            raise UserError(
                f"the function {name} gave {score:g} for the response {texts[1]!r:.200}: "
                "a score must be a finite number in float32"
            )
        scores.append(math.nan if score is None else score)
    return torch.tensor(scores)

"""A user's own function, named on the command line as file.py:function, such as a reward.

    function = functions.load_function("prepare/toy.py:gold")
    scores = functions.judge(function, tok, prompts, responses, finished, records)

It is called as f(prompt, response, finished), or as f(prompt, response, finished, record) where it
has a fourth parameter and the prompt has a record, and returns a number, or None for a response
that it does not judge.

The file is the user's own code. It runs because the command line says so.
"""

import importlib.util
import inspect
import math
import sys
import traceback
from pathlib import Path

import torch

from nano import tasks
from nano.config import FLOAT32_MAX, UserError


def load_function(spec):
    """The function that `spec`, file.py:function, names, or the score of a task (tasks/).

    The file may import modules that lie beside it. UserError where there is no such function, where
    it cannot take three or four arguments, and where the file does not run."""
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
    function = getattr(module, name)
    if not any(fits(function, count) for count in (3, 4)):
        raise UserError(
            f"{spec}: the function {name} must take prompt, response and finished, and may take "
            "the record of the prompt as a fourth argument"
        )
    return function


def is_function(spec):
    """Whether a reward is a function, and no directory of a model."""
    return ".py:" in spec or tasks.is_name(spec)


def name_of(function):
    """The name of a function, or of the type of another object that can be called."""
    return getattr(function, "__name__", type(function).__name__)


def signature(function):
    """The signature of a function, or None, since some functions in C do not tell theirs."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def fits(function, count):
    """Whether a function can be called with `count` arguments by place."""
    known = signature(function)
    try:
        if known is not None:
            known.bind(*range(count))
    except TypeError:
        return False
    return True


def takes_record(function):
    """Whether a reward function has a fourth parameter by place, where it gets the record."""
    known = signature(function)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return known is not None and sum(p.kind in kinds for p in known.parameters.values()) > 3


def needs_record(function):
    """Whether a reward function cannot be called without the record of the prompt."""
    return not fits(function, 3)


def judge(function, tok, prompts, responses, finished, records=None, special=False):
    """The score that function(prompt, response, finished) gives to each response, (N,) fp32.

    prompts, responses: N lists of token ids, which the function sees as text. finished (N,):
    whether the response ended by itself. records: N dicts or None, the fourth argument of a
    function that takes one. Where a prompt has no record, a default of that argument stays.
    special: the text has the names of control tokens in it.
    NaN stands for None, the answer of a function that does not judge a response. UserError where
    the function fails, and where it gives no finite number, which would make every weight NaN."""
    name = name_of(function)
    takes, needs = takes_record(function), needs_record(function)
    scores = []
    for prompt, response, ended, record in zip(
        prompts, responses, finished.tolist(), records or [None] * len(prompts), strict=True
    ):
        more = (record,) if needs or (takes and record is not None) else ()
        texts = [tok.decode(ids, skip_special=not special) for ids in (prompt, response)]
        try:
            answer = function(*texts, ended > 0, *more)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            raise UserError(
                f"the function {name} failed in {at.filename}:{at.lineno}: {type(e).__name__}: {e}"
            ) from None
        try:
            score = None if answer is None else float(answer)
        except OverflowError:  # an integer beyond any float
            score = math.inf
        except Exception:  # of any kind: so does an array of several numbers
            raise UserError(
                f"the function {name} returned {answer!r:.200} for the response "
                f"{texts[1]!r:.200}, which is neither a number nor None"
            ) from None
        if score is not None and not abs(score) <= FLOAT32_MAX:  # nor is NaN
            raise UserError(
                f"the function {name} gave {score:g} for the response {texts[1]!r:.200}: "
                "a score must be a finite number in float32"
            )
        scores.append(math.nan if score is None else score)
    return torch.tensor(scores)

"""DeepMind Mathematics: questions of 56 kinds that a program writes, with short answers (Saxton et
al. 2019, arXiv:1904.01557). An answer counts to the letter."""

import ast

KINDS = dict(
    algebra="""linear_1d linear_1d_composed linear_2d linear_2d_composed polynomial_roots
    polynomial_roots_composed sequence_next_term sequence_nth_term""",
    arithmetic="""add_or_sub add_or_sub_in_base add_sub_multiple div mixed mul mul_div_multiple
    nearest_integer_root simplify_surd""",
    calculus="differentiate differentiate_composed",
    comparison="""closest closest_composed kth_biggest kth_biggest_composed pair pair_composed sort
    sort_composed""",
    measurement="conversion time",
    numbers="""base_conversion div_remainder div_remainder_composed gcd gcd_composed is_factor
    is_factor_composed is_prime is_prime_composed lcm lcm_composed list_prime_factors
    list_prime_factors_composed place_value place_value_composed round_number
    round_number_composed""",
    polynomials="""add coefficient_named collect compose evaluate evaluate_composed expand
    simplify_power""",
    probability="swr_p_level_set swr_p_sequence",
)
ID = "deepmind/math_dataset"
PARTS = {
    name: (ID, name, "test", "train")
    for name in (f"{area}__{kind}" for area, kinds in KINDS.items() for kind in kinds.split())
}
HUB = (ID, [*PARTS], "test", "train")
TRAIN = (ID, [*PARTS], "train")
STOP = ("\n",)
MAX_NEW_TOKENS = 32


def clean(text):
    """The text of a field. On the hub some are bytes as Python prints them: b'Solve ...\\n'."""
    if text[:2] in ("b'", 'b"'):
        text = ast.literal_eval(text).decode()
    return text.strip()


def record(row):
    return dict(question=clean(row["question"]), answer=clean(row["answer"]))


def prompt(record):
    return f"Question: {record['question']}\nAnswer:"


def messages(record):
    return [dict(role="user", content=record["question"])]


def answer(record):
    return record["answer"]


def columns(record):
    return [["QUESTION", record["question"]]], [record["answer"]]


def score(prompt, response, finished, record):
    return float(response.strip() == record["answer"])

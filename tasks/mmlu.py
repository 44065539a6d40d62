"""MMLU: four options in 57 subjects, from school to profession (Hendrycks et al. 2020,
arXiv:2009.03300). The letter is scored. Shots come from the dev split of the subject, in its order.
"""

LETTERS = "ABCD"
IN_ORDER = True  # the shots are the first ones, as in the paper

HUMANITIES = """formal_logic high_school_european_history high_school_us_history
high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
moral_scenarios philosophy prehistory professional_law world_religions""".split()
SOCIAL = """econometrics high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
professional_psychology public_relations security_studies sociology us_foreign_policy""".split()
STEM = """abstract_algebra anatomy astronomy college_biology college_chemistry
college_computer_science college_mathematics college_physics computer_security conceptual_physics
electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
high_school_computer_science high_school_mathematics high_school_physics high_school_statistics
machine_learning""".split()
OTHER = """business_ethics clinical_knowledge college_medicine global_facts human_aging management
marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine
virology""".split()
CATEGORIES = dict(stem=STEM, humanities=HUMANITIES, social_sciences=SOCIAL, other=OTHER)
SUBJECTS = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects}

HUB = ("cais/mmlu", "all", "test", "dev")
PARTS = {name: HUB for name in CATEGORIES}
PARTS |= {subject: ("cais/mmlu", subject, "test", "dev") for subject in sorted(SUBJECTS)}
TRAIN = ("cais/mmlu", ["all"], "auxiliary_train")  # whose rows have no subject


def record(row):
    if "input" in row:  # the prompt as QLoRA's files have it
        question = row["input"].partition("\n\n")[2].removesuffix("\nAnswer:")
        options = []
        for letter in reversed(LETTERS):  # from the end, because a question may hold a list too
            question, _, option = question.rpartition(f"\n{letter}. ")
            options.insert(0, option)
        gold = LETTERS.index(row["output"])
    else:
        question, options, gold = row["question"], row["choices"], int(row["answer"])
    if len(options) != 4:
        raise ValueError(f"it has {len(options)} options and not 4")
    if row["subject"] and row["subject"] not in SUBJECTS:
        raise ValueError(f"there is no subject {row['subject']!r}")
    return dict(subject=row["subject"], question=question, options=options, gold=gold)


def intro(record):
    subject = record["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def group(record):
    return record["subject"]


def groups(record):
    subject = record["subject"]
    return [SUBJECTS[subject], subject] if subject else []


def within(record, part):
    return part in groups(record)


def prompt(record):
    lines = (f"\n{letter}. {text}" for letter, text in zip(LETTERS, record["options"], strict=True))
    return f"{record['question'].strip()}{''.join(lines)}\nAnswer:"


def choices(record):
    return [*LETTERS]


def gold(record):
    return {record["gold"]}


def columns(record):
    listed = " ".join(f"({i}): {text}" for i, text in enumerate(record["options"]))
    return [["QUESTION", record["question"]], ["CHOICES", listed]], record["options"]

"""Tasks: one file says where records come from, how one becomes a prompt, what a right answer is.

eval.py measures with a task, prepare.instructions makes training rows from it, and ppo.py takes its
score as a reward. nano/tasks.py loads them by name. A task file has

    HUB              (id, configuration, split to measure, split of the shots) on the hub. The
                     configuration may be a list of them
    rows(shots)      in the place of HUB: the rows themselves, where a program makes them
    record(row)      a row of the hub, or of a local file with other columns -> a record (dict). A
                     row without a field "file" gets the name of its local file, or of its
                     configuration, as one
    prompt(record)   plain text, as lm-eval writes it

and for multiple choice

    choices(record)  the texts of the options
    gold(record)     the set of the numbers of those that are right

or for free answers

    answer(record)   what an assistant says, where the record is a shot or a training row. A task
                     without it has neither
    score(prompt, response, finished, record)   from 0 to 1 (as a reward: any number). Without it
                     people judge: eval.py writes the answers into the task's CSV files
    STOP             the strings that end an answer in plain text
    MAX_NEW_TOKENS   of an answer

Where it differs from what most tasks have:

    PARTS            {part: the same four as HUB}; NAME:PART names one
    TRAIN            (id, configurations, split) to train on. By default the split of the shots
    within(record, part)        whether a record belongs to a part. By default all do
    intro(record)    text in front of the first shot
    group(record)    a name, such as a subject. Shots come from the same group
    groups(record)   names. Each gets an accuracy of its own. By default the group
    options(record)  [(context, continuation)] whose log-likelihoods are compared. By default the
                     prompt, and each choice behind a space
    metrics(record, logprobs)   {name: value} in the place of the accuracies
    chance(record)   the accuracy of guessing. By default the share of options that are right
    messages(record) the conversation that asks. By default the user's turn is the prompt
    columns(record)  for template=columns: [[NAME, text], ...] of the question, and the texts that
                     answer it, one for each choice
    strict(...)      like score, where only the exact form counts
    IN_ORDER = True  the first records are the shots, and none is drawn

A training set, which measures nothing, has

    TRAIN            (id, configurations, split). A configuration that ends with / is a folder
    turns(row)       the messages of a row. By default prepare.instructions recognises its shape
    PARTS            {part: the same three as TRAIN}
    IGNORE           fields of a row that say nothing to a model
    LAST_ONLY = True the last answer of a conversation is the target
    RANKED = True    the rows are preferences, for prepare.preferences
"""

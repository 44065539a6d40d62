"""A reward for ppo.py (reward=worth.py:ends)."""


def ends(prompt, response, finished):
    return float(response.count(" the")) - 0.1 * len(response.split()) + finished

"""A user's own functions that judge what a model writes, one of them wrongly."""


def score(prompts, completions):
    """The longer the better."""
    return [len(text) / 10 for text in completions]


def broken(prompts, completions):
    """No numbers."""
    return [None] * len(prompts)

"""Property tests draw the same examples every time and have no deadline: a busy machine fails no test."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

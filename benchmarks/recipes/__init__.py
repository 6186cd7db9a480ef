"""Recipes: how a model is made to learn by one byte a direction, with what other methods reach beside it."""

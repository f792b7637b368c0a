"""Synthetic queries that a language model writes for passages: prompts, models, and queries from their answers."""

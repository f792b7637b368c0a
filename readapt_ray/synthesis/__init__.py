"""Queries that a language model writes for passages: prompts, answers, and what is taken from an answer."""

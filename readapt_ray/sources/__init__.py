"""Readers of passages, queries and judgements: files in many formats, public collections, the hub, Python packages."""

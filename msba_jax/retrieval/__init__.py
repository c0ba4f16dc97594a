"""From embeddings to search results: embed, index, search, re-rank, report.

This room knows models and sources, and nothing of experiments or runs.
"""

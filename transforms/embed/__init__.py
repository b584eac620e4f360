"""Embeddings: texts to row-aligned vectors, indexes over them, and search."""

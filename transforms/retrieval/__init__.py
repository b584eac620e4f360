"""Retrieval data: collections of judgments, queries and documents, their formats, label merging, training groups."""

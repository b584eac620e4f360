"""Causal language models: in this process (`local`), or behind an OpenAI-compatible server (`server`)."""

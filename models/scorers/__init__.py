"""Toxicity scorers: `lexicon`, `linear`, `jigsaw-bilstm`, `detoxify:...`, `hf:...`. Found by `models.registry`."""

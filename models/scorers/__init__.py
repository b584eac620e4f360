"""Toxicity scorers: `lexicon`, `linear`, `jigsaw-bilstm`, `detoxify:...`, `hf:...` (see `models.registry`)."""

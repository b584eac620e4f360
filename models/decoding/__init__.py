"""Soft contrastive decoding (SoCD): a base model steered away from what a toxic model would say, token by token."""

"""The embedded default models: which package each travels in, and how its payload is converted, once."""

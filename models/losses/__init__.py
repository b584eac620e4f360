"""Losses of retrievers with any number of positives a query; see `models.losses.settings` for their names.

The modules import torch; `settings` does not.
"""

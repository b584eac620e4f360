"""Training: reading of shards, examples, batches and the trainer around `transformers.Trainer`.

What is ours is the reading of shards, the collators and the losses; checkpoints, schedules, mixed precision and
several devices come from `transformers`. Nothing here imports torch before it is needed.
"""

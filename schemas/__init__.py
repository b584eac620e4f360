"""What data looks like: Arrow schemas, column contracts, fingerprints and the errors a user reads.

This room imports pyarrow and the standard library only, so that any tool can read a tamis output without
installing Beam or torch.
"""

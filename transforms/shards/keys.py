"""`ShardKey`: the small, deterministic name of a unit of work, which travels beside its batch."""

from __future__ import annotations

from typing import NamedTuple


class ShardKey(NamedTuple):
    """Names one unit: a contiguous range of rows of one shard. Nothing else identifies work.

    Attributes:
        shard: The shard's path relative to the input root, with forward slashes.
        unit: Index of the unit inside the shard.
        first_row: Row number, inside the shard, of the unit's first row.
    """

    shard: str
    unit: int
    first_row: int

    def __str__(self) -> str:
        return f"{self.shard}[{self.unit}]@{self.first_row}"

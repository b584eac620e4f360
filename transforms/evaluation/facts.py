"""Are the facts still there? What a replacement kept of its source's numbers, names, addresses and negations.

The same extractors as the detox job's hard conditions (`transforms.detox.checks`), counted instead of judged. What is
inside a toxic span is nothing to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transforms.detox.checks import (
    Source,
    binding_negations,
    count_negations,
    find_addresses,
    find_numbers,
    possible_names,
)

FACTS = ("numbers", "names", "addresses", "negations")


@dataclass(frozen=True)
class FactCount:
    """Facts of one source and what became of them.

    Attributes:
        there: How many of each kind of `FACTS` the source had outside its toxic spans.
        kept: How many of these the replacement still has.
        invented: Numbers and addresses of the replacement that the source does not have.
    """

    there: tuple[int, ...]
    kept: tuple[int, ...]
    invented: int

    @property
    def whole(self) -> bool:
        """Whether nothing was lost and nothing made up."""
        return self.there == self.kept and not self.invented


def count_facts(before: str, after: str, spans: Sequence[tuple[int, int]] = ()) -> FactCount:
    """Count a source's facts and those its replacement keeps.

    Args:
        before: The source.
        after: What stands in its place; empty where it was removed.
        spans: Toxic (start, end) in `before`.

    Example:
        >>> count_facts("Ask Ana, she paid 40 euros.", "Ask Ana, she paid.").kept
        (0, 1, 0, 0)
    """
    source = Source(before, 0.0, tuple(spans))
    numbers, addresses = find_numbers(after), find_addresses(after)
    binding = binding_negations(source)
    there = (source.numbers.total(), len(source.names), len(source.addresses), binding)
    kept = (
        (source.numbers & numbers).total(),
        len(source.names & possible_names(after)),
        len(source.addresses & addresses),
        min(binding, count_negations(after)),
    )
    invented = (numbers - find_numbers(before)).total() + len(addresses - source.addresses)
    return FactCount(there, kept, invented)

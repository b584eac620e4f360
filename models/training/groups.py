"""Drawing a training group from a query's ragged lists: which positives and which negatives an epoch sees.

Pure functions of (row, seed, epoch): nothing is remembered between draws, so every process of a training run draws the
same group, and a resumed run draws what the interrupted one would have. Files hold the whole lists; another policy needs
no other file. (H. Wang et al., "Training Dense Retrievers with Multiple Positive Passages", KDD 2026.)
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from schemas.errors import TamisError
from schemas.fingerprint import derive_seed

T = TypeVar("T")

POSITIVE_POLICIES = ("first", "random_one", "rotate", "all")
NO_CAP = -1
# Which losses make sense of which draw. Losses of one positive read the first slot alone: with a draw of several they
# would silently treat the others as negatives or not at all.
LOSS_POLICIES = {
    "infonce": ("first", "random_one"),
    "single_lh": ("first",),
    "rand1_lh": ("random_one",),
    "joint_lh": ("all", "rotate"),
    "sum_marg_lh": ("all", "rotate"),
    "lse_pair": ("all", "rotate"),
    "mnrl": ("all", "rotate", "first", "random_one"),
    "margin_mse": ("all", "rotate", "first", "random_one"),
    "kl": ("all", "rotate", "first", "random_one"),
}


@dataclass(frozen=True)
class DrawPolicy:
    """How a group is drawn.

    Attributes:
        positives: `first`: the best one. `random_one`: one of the best `max_positives`, another each epoch (each is
            drawn once before any is drawn again). `rotate`: `max_positives` of all, moving on each epoch until
            every positive has been drawn. `all`: the best `max_positives`.
        max_positives: Cap; -1 leaves room for one negative. What the lists are cut to is a quality ranking, so the
            best stay.
        group_size: Documents a group, positives first; at least one slot is a negative's.
        shuffle_negatives: Window over a shuffled list; False keeps the list's order (hardest first) in every window.

    Raises:
        TamisError: The settings contradict one another.
    """

    positives: str = "all"
    max_positives: int = 4
    group_size: int = 8
    shuffle_negatives: bool = True

    def __post_init__(self) -> None:
        if self.positives not in POSITIVE_POLICIES:
            raise TamisError(
                f"no positive policy '{self.positives}'; there are {', '.join(POSITIVE_POLICIES)}"
            )
        if self.max_positives != NO_CAP and self.max_positives < 1:
            raise TamisError(f"a cap of {self.max_positives} positives leaves none; pass 1 or more, or -1")
        if self.positives in ("random_one", "rotate") and self.max_positives == NO_CAP:
            raise TamisError(
                f"positives '{self.positives}' needs a cap: pass --max-positives 1 or more (with -1 every positive "
                "would enter the group, and the loss would target only one of them)"
            )
        if self.group_size < 2:
            raise TamisError("a group needs a positive and a negative: pass --group-size 2 or more")
        if self.positives in ("rotate", "all") and self.max_positives >= self.group_size:
            raise TamisError(
                f"{self.max_positives} positives leave no slot for a negative in a group of {self.group_size}: raise "
                "--group-size or lower --max-positives"
            )

    @property
    def most_positives(self) -> int:
        """Positives a group holds at most."""
        if self.positives in ("first", "random_one"):
            return 1
        return self.group_size - 1 if self.max_positives == NO_CAP else self.max_positives


def check_loss(policy: DrawPolicy, loss: str) -> None:
    """Refuse a loss that cannot use what the policy draws.

    Raises:
        TamisError: The loss is unknown, or reads another number of positives.
    """
    if loss not in LOSS_POLICIES:
        raise TamisError(f"no loss '{loss}'; there are {', '.join(LOSS_POLICIES)}")
    if policy.positives not in LOSS_POLICIES[loss]:
        allowed = " or ".join(LOSS_POLICIES[loss])
        raise TamisError(f"loss '{loss}' needs positives drawn by {allowed}, not '{policy.positives}'")


@dataclass(frozen=True)
class Draw:
    """A group as one training step sees it.

    Attributes:
        positives: Indices into the row's positives, in order of quality; at least one.
        negatives: Indices into the row's negatives; repeats only where there are fewer than slots.
    """

    positives: tuple[int, ...]
    negatives: tuple[int, ...]


def draw_group(
    row_id: str, positives: int, negatives: int, *, seed: int, epoch: int, policy: DrawPolicy
) -> Draw:
    """Draw one group by its lists' lengths.

    Args:
        row_id: What names the row whatever file it lies in (query id and stage).
        positives: How many the row has.
        negatives: How many the row has; 0 gives a group without (in-batch negatives only).
        seed: The training run's.
        epoch: From 0.
        policy: How.

    Raises:
        TamisError: The row has no positive: such a row must not reach a loss (it would be trained towards nothing).
    """
    if positives < 1:
        raise TamisError(f"row '{row_id}' has no positive; `tamis groups` drops such queries")
    chosen = draw_positives(row_id, positives, seed=seed, epoch=epoch, policy=policy)
    slots = policy.group_size - len(chosen)
    return Draw(chosen, draw_negatives(row_id, negatives, slots, seed=seed, epoch=epoch, policy=policy))


def draw_positives(row_id: str, count: int, *, seed: int, epoch: int, policy: DrawPolicy) -> tuple[int, ...]:
    """Indices of the positives of an epoch, ascending: order is quality, and is kept."""
    if policy.positives == "first":
        return (0,)
    if policy.positives == "random_one":
        candidates = min(count, policy.max_positives)
        return ((derive_seed(seed, row_id, "positives") + epoch) % candidates,)
    most = min(count, policy.most_positives)
    if policy.positives == "all" or most == count:
        return tuple(range(most))
    start = derive_seed(seed, row_id, "positives") + epoch * most
    return tuple(sorted((start + i) % count for i in range(most)))


def draw_negatives(
    row_id: str, count: int, slots: int, *, seed: int, epoch: int, policy: DrawPolicy
) -> tuple[int, ...]:
    """Indices of the negatives of an epoch.

    The row's negatives stand in one order for the whole run, shuffled by the row's own seed; an epoch sees the next
    `slots` of them, and after the last the first again. So each is seen once before any is seen twice.
    """
    if count < 1 or slots < 1:
        return ()
    order = _shuffled(seed, row_id, count) if policy.shuffle_negatives else range(count)
    start = epoch * slots
    return tuple(order[(start + i) % count] for i in range(slots))


@functools.lru_cache(maxsize=1 << 16)
def _shuffled(seed: int, row_id: str, count: int) -> tuple[int, ...]:
    """The row's own order of its negatives; kept, because every epoch asks for it again."""
    order = list(range(count))
    random.Random(derive_seed(seed, row_id, "negatives")).shuffle(order)
    return tuple(order)


def sample_group(
    row: Mapping[str, Any], seed: int, epoch: int, policy: DrawPolicy
) -> tuple[list[Any], list[Any]]:
    """Positives and negatives of a group row (`schemas.groups.GROUP_SCHEMA`) for an epoch.

    Args:
        row: With `query_id`, `positives`, `negatives` and, where there are several, `stage`.
        seed: The training run's.
        epoch: From 0.
        policy: How.

    Returns:
        The drawn elements of both lists.

    Raises:
        TamisError: The row has no positive.
    """
    draw = draw_group(
        row_name(row),
        len(row["positives"]),
        len(row["negatives"]),
        seed=seed,
        epoch=epoch,
        policy=policy,
    )
    return _pick(row["positives"], draw.positives), _pick(row["negatives"], draw.negatives)


def row_name(row: Mapping[str, Any]) -> str:
    """What names a group row in every draw: its query and its stage, wherever it lies."""
    return f"{row.get('stage') or ''}\x1f{row['query_id']}"


def _pick(items: Sequence[T], indices: Sequence[int]) -> list[T]:
    return [items[i] for i in indices]

"""Which losses there are, and what each can be told; imports no torch, so that options are checked before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schemas.errors import TamisError

LOSSES: Mapping[str, str] = {
    "single_lh": "InfoNCE on the best positive",
    "infonce": "the same, under its usual name",
    "rand1_lh": "InfoNCE on one positive, another each epoch",
    "joint_lh": "the likelihood of every positive, siblings left in the denominator: equalises the positives",
    "sum_marg_lh": "the likelihood of the positives together: a soft maximum over them",
    "lse_pair": "log-sum-exp over all pairs: a soft minimum over the positives against the hardest negatives",
    "mnrl": "multiple negatives ranking: the mean of InfoNCE over the positives, siblings left out",
    "margin_mse": "squared error of the teacher's margins between positives and negatives",
    "kl": "divergence of the teacher's distribution over the group from the model's",
}
POSITIVE_SIDES = ("all", "min", "max")
NEGATIVE_SIDES = ("all", "max")
TEACHER_LOSSES = ("margin_mse", "kl")
_DIVISIBLE = ("joint_lh", "lse_pair")


@dataclass(frozen=True)
class LossSettings:
    """A loss and its options.

    Attributes:
        name: One of `LOSSES`.
        scale: What every score is multiplied by first; 1 / temperature. 1 is usual for inner products, 20 to 50 for
            cosines.
        positive_side: LSEPair only. `all`: LSE(-s) over the positives; `min`, `max`: the weakest, the strongest one.
        negative_side: LSEPair only. `all`: LSE(s) over the negatives; `max`: the hardest one.
        divide_by_m: JointLH and LSEPair only: divide a query's loss by the number of its positives.
        teacher_scale: What the teacher's scores are multiplied by, to bring them to the scale of the model's: a
            teacher that speaks in other units teaches another distribution.

    Raises:
        TamisError: No such loss, or an option it does not have.
    """

    name: str = "lse_pair"
    scale: float = 1.0
    positive_side: str = "all"
    negative_side: str = "all"
    divide_by_m: bool = False
    teacher_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise TamisError(f"no loss '{self.name}'; there are {', '.join(LOSSES)}")
        if not self.scale > 0 or not self.teacher_scale > 0:
            raise TamisError("--scale and --teacher-scale must be above 0")
        if self.positive_side not in POSITIVE_SIDES:
            raise TamisError(
                f"no positive side '{self.positive_side}'; there are {', '.join(POSITIVE_SIDES)}"
            )
        if self.negative_side not in NEGATIVE_SIDES:
            raise TamisError(
                f"no negative side '{self.negative_side}'; there are {', '.join(NEGATIVE_SIDES)}"
            )
        if self.name != "lse_pair":
            for option, value in (("positive", self.positive_side), ("negative", self.negative_side)):
                if value != "all":
                    raise TamisError(
                        f"--{option}-side {value} is an option of the loss lse_pair, not of {self.name}"
                    )
        if self.divide_by_m and self.name not in _DIVISIBLE:
            raise TamisError(
                f"--divide-by-m is an option of {' and '.join(_DIVISIBLE)}; {self.name} does not grow with the positives"
            )
        if self.teacher_scale != 1.0 and self.name not in TEACHER_LOSSES:
            raise TamisError(f"--teacher-scale is an option of {' and '.join(TEACHER_LOSSES)}")

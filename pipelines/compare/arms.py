"""The arms of a comparison: what is done to the raw corpus in each, as settings of the detox job.

The simple filters are the detox job too, with a ladder that has no rung for candidates (so no language model is
loaded): every arm comes with the same record of what was changed, and the same report.

    base            the model as it is, trained on nothing
    raw             the corpus as it came
    drop-documents  the common filter: a document with any toxic sentence goes
    drop-sentences  Dolma's rule: sentences that score at least 0.4 are replaced by nothing, an empty document goes
    lexicon-mask    listed words are replaced by a mask, whatever the classifier says
    prompt_only     rewritten by plain sampling
    vanilla_cd      classic contrastive decoding against the toxic model
    official        SoCD by the released formula
    logratio        SoCD by the log-ratio (the default of tamis)

Ablations, each of `logratio`: `logratio-fixed-k` (the fewest tokens at every step), `logratio-one-temperature` (as many
candidates, all at temperature 1: no ranking over several), `logratio-no-acceptance` (the best-ranked candidate is taken
whatever it is).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.errors import TamisError
from transforms.detox.options import CONDITIONS

BASE, RAW = "base", "raw"
CONTRASTIVE = ("logratio", "official", "vanilla_cd")
ABLATIONS = ("logratio-fixed-k", "logratio-one-temperature", "logratio-no-acceptance")
FILTERS = ("drop-documents", "drop-sentences", "lexicon-mask")
STANDARD = (BASE, RAW, *FILTERS, "prompt_only", "vanilla_cd", "official", "logratio")
NAMES = (*STANDARD, *ABLATIONS)
# What the first question is answered with, in the order it is worked on; the rest follows.
MAIN = (RAW, "drop-documents", "logratio", "prompt_only")
_MEANINGS = {
    BASE: "the model as it is, untrained",
    RAW: "the corpus as it came",
    "drop-documents": "documents with a toxic sentence dropped",
    "drop-sentences": "toxic sentences removed (Dolma's rule)",
    "lexicon-mask": "listed words masked",
    "prompt_only": "rewritten, plain sampling",
    "vanilla_cd": "rewritten, classic contrastive decoding",
    "official": "rewritten, SoCD by the released formula",
    "logratio": "rewritten, SoCD by the log-ratio",
    "logratio-fixed-k": "SoCD with k fixed",
    "logratio-one-temperature": "SoCD at one temperature",
    "logratio-no-acceptance": "SoCD, best candidate taken unchecked",
}


def meaning(name: str) -> str:
    """What an arm is, in a few words; of one that was given, that it was."""
    return _MEANINGS.get(name, "given")


def is_made(name: str) -> bool:
    """Whether the detox job makes an arm of this name: neither the untrained model nor the raw corpus."""
    return name not in (BASE, RAW)


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Names of arms from what was typed: `all`, `ablations`, `ablation:fixed-k` or names, without repeats.

    Raises:
        TamisError: There is no such arm.
    """
    found: list[str] = []
    for name in names:
        if name == "all":
            found += STANDARD
        elif name in {"ablation", "ablations"}:
            found += ABLATIONS
        elif name.startswith("ablation:"):
            found.append("logratio-" + name.partition(":")[2])
        else:
            found.append(name)
    unknown = [n for n in found if n not in NAMES]
    if unknown:
        raise TamisError(f"no arm '{unknown[0]}' to make; there are all, ablations, {', '.join(NAMES)}")
    return tuple(dict.fromkeys(found))


def is_contrastive(recipe: Mapping[str, Any]) -> bool:
    """Whether the settings of an arm steer away from a toxic model."""
    return (recipe.get("decoding") or {}).get("mode", "prompt_only") != "prompt_only"


def recipe(
    name: str,
    *,
    tau: float = 0.5,
    sentence_tau: float = 0.4,
    mask: str = "[redacted]",
    shared: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Settings of the detox job for an arm (`pipelines.detox.DetoxConfig`, without input and output).

    Args:
        name: One of `NAMES` but `base` and `raw`.
        tau: From which score on a sentence is toxic for `drop-documents` (the rewriting arms take theirs from `shared`).
        sentence_tau: The same for `drop-sentences`; 0.4 is Dolma's.
        mask: What stands for a listed word.
        shared: Settings of all rewriting arms.

    Raises:
        TamisError: There is no such arm.
    """
    if name == "drop-documents":
        return {
            "gate": {"gate": "all", "tau": tau},
            "localize": {"sources": []},
            "accept": {"ladder": ["drop_document"], "recheck": False},
        }
    if name == "drop-sentences":
        return {
            "gate": {"gate": "all", "tau": sentence_tau},
            "localize": {"sources": []},
            "accept": {"ladder": ["drop_segment", "drop_document"], "recheck": False},
        }
    if name == "lexicon-mask":
        # The list alone decides: a threshold of 0 flags what it lets through, and no condition applies. Where a
        # sentence holds nothing but listed words there is nothing to mask them in: it goes.
        return {
            "gate": {"gate": "cascade", "tau": 0.0, "linear_pass": 1.0},
            "localize": {"sources": ["lexicon"]},
            "accept": {
                "ladder": ["redact", "drop_segment", "drop_document"],
                "redaction": mask,
                "max_toxicity": 0.0,
                "skip": ["toxicity", "improvement", "lexicon"],
                "recheck": False,
            },
        }
    if name == "prompt_only":
        return merge(shared or {}, {"decoding": {"mode": "prompt_only"}})
    if name in CONTRASTIVE:
        return merge(shared or {}, {"decoding": {"mode": name}})
    if name in ABLATIONS:
        return merge(shared or {}, {"decoding": {"mode": "logratio"}}, _ablation(name, shared or {}))
    raise TamisError(f"no arm '{name}' to make; there are {', '.join(NAMES)}")


def _ablation(name: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    if name == "logratio-fixed-k":
        return {"decoding": {"dynamic_k": False}}
    if name == "logratio-one-temperature":
        sampling = (shared.get("rewrite") or {}).get("sampling") or {}
        count = len(sampling.get("temperatures", range(5))) * int(sampling.get("per_temperature", 2))
        return {"rewrite": {"sampling": {"temperatures": [1.0], "per_temperature": count}}}
    return {"accept": {"ladder": ["candidate"], "skip": list(CONDITIONS), "recheck": False}}


def merge(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings laid over each other; later ones win, leaf by leaf."""
    out: dict[str, Any] = {}
    for layer in settings:
        for key, value in layer.items():
            old = out.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            out[key] = merge(old, value) if both else (merge(value) if isinstance(value, Mapping) else value)
    return out

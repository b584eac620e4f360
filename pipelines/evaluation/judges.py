"""Who judges rewrites: a scorer that had no hand in any of the systems, named or found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.lineage import lineage_rankers
from models.protocols import ModelInfo
from models.scorers.judging import Verdict, check_judge
from pipelines.evaluation.pairs import Pairs, is_folder_of_tamis
from schemas.errors import InputError
from transforms.evaluation.systems import BUILT_IN

if TYPE_CHECKING:
    from pipelines.eval_rewrites import RewritesEvalConfig

AUTO, JUDGES = "auto", ("linear", "jigsaw-bilstm")


def with_judge(
    config: RewritesEvalConfig, pairs: Pairs
) -> tuple[RewritesEvalConfig, Verdict, dict[str, str]]:
    """Settle who judges, and which built-in systems go with that judge.

    Args:
        config: Settings; `judge` may be `auto`, `built_in` may be None.
        pairs: What is compared.

    Returns:
        Settings with both settled; whether the judge is independent; the systems left out because it is not of them.

    Raises:
        InputError: There is no such built-in system.
        TamisError: The judge had a hand in one of the systems that were asked for.
    """
    rankers = _rankers(config, pairs)
    for name in config.built_in or ():
        rankers += _made_with(config, name)
    judge = _independent(config, rankers)
    built_in, left_out = list(config.built_in or ()), {}
    for name in BUILT_IN if config.built_in is None else ():
        made_with = _made_with(config, name)
        reasons = check_judge(judge, made_with, allow_shared=True).shared
        if reasons and not config.allow_shared_judge:
            left_out[name] = reasons[0].replace("ranked the training data", "makes it")
        else:
            built_in.append(name)
            rankers += made_with
    verdict = check_judge(judge, rankers, config.allow_shared_judge)
    chosen = {"judge": judge.name, "built_in": tuple(built_in)}
    return config.model_copy(update=chosen), verdict, left_out


def _rankers(config: RewritesEvalConfig, pairs: Pairs) -> list[ModelInfo]:
    """The scorers behind the named systems: in a detox run's gate, ranking and acceptance."""
    files = [spec for spec in config.systems.values() if spec not in pairs.table.columns]
    places = [
        spec if is_folder_of_tamis(spec, config.storage_options) else spec.partition("#")[0] for spec in files
    ]
    # The texts of a system that is a column are what made the input.
    places += config.inputs if len(files) < len(config.systems) else ()
    return list(lineage_rankers(places, config.storage_options))


def _independent(config: RewritesEvalConfig, rankers: Sequence[ModelInfo]) -> ModelInfo:
    """The judge that was named; else the first embedded one that shares nothing with the rankers, or the first of all."""
    from models import registry

    names = JUDGES if config.judge == AUTO else (config.judge,)
    judges = [registry.describe("scorer", name, **config.judge_options) for name in names]
    free = (judge for judge in judges if not check_judge(judge, rankers, allow_shared=True).shared)
    return next(free, judges[0])


def _made_with(config: RewritesEvalConfig, system: str) -> list[ModelInfo]:
    """The scorer a built-in system decides with.

    Raises:
        InputError: There is no such system.
    """
    from models import registry

    if system not in BUILT_IN:
        raise InputError(f"no built-in system '{system}'; there are {', '.join(BUILT_IN)}")
    scorer = {"sentence-drop": config.classifier, "delete": config.lexicon, "lexicon-mask": config.lexicon}
    return [registry.describe("scorer", scorer[system])] if system in scorer else []

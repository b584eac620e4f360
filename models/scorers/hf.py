"""`hf:<folder or id>`: any Hugging Face sequence classifier, its toxic label found or named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from models.folders import read_config
from models.scorers.sequence import Head
from schemas.errors import ModelError

# What a label that means "toxic" is called, most telling first.
_HEADLINES = (
    "toxicity",
    "toxic",
    "hate",
    "hateful",
    "hate_speech",
    "hatespeech",
    "offensive",
    "abusive",
    "abuse",
    "harmful",
    "unsafe",
    "profanity",
)


def choose_head(config: dict[str, Any], name: str, label: str | int | None = None) -> Head:
    """Decide which labels a classifier's scores are, from its config.json.

    One logit, or `problem_type` multi-label: a sigmoid each, all labels returned, the toxic one first.
    Otherwise the softmax probability of the toxic class alone, under the name `toxicity`.

    Args:
        config: Content of config.json.
        name: For messages.
        label: The toxic label's name, or its index; by default it is looked for in `id2label`. Of two classes
            called LABEL_0 and LABEL_1 the second is taken to be the toxic one.

    Raises:
        ModelError: It cannot be told which label is the toxic one, or there is none of that name.
    """
    names = _label_names(config)
    multi = config.get("problem_type") == "multi_label_classification" or len(names) == 1
    toxic = _find_named(names, str(label), name) if label is not None else _find_headline(names, name)
    if not multi:
        return Head(("toxicity",), (toxic,), "softmax")
    columns = (toxic, *(i for i in range(len(names)) if i != toxic))
    return Head(tuple(names[i] if len(names) > 1 else "toxicity" for i in columns), columns, "sigmoid")


def read_head(folder: Path, name: str, label: str | int | None = None) -> Head:
    """As `choose_head`, for a folder."""
    return choose_head(read_config(folder), name, label)


def _label_names(config: dict[str, Any]) -> list[str]:
    id2label = config.get("id2label")
    if id2label:
        by_index = {int(index): str(value) for index, value in id2label.items()}
        return [by_index[i] for i in sorted(by_index)]
    return [f"LABEL_{i}" for i in range(int(config.get("num_labels", 2)))]


def _find_named(names: list[str], label: str, name: str) -> int:
    wanted = _plain(label)
    matches = [i for i, n in enumerate(names) if _plain(n) == wanted]
    if not matches and label.isdecimal() and int(label) < len(names):
        return int(label)
    if len(matches) != 1:
        raise ModelError(f"{name} has no label '{label}'; its labels are {', '.join(names)}")
    return matches[0]


def _find_headline(names: list[str], name: str) -> int:
    plain = [_plain(n) for n in names]
    if len(names) == 1:
        return 0
    if plain == ["label_0", "label_1"]:
        return 1
    found = [plain.index(headline) for headline in _HEADLINES if headline in plain]
    # `toxicity` beside its own sub-labels (obscene, threat) is no riddle; `hate` beside `offensive` is one.
    if found and (len(found) == 1 or plain[found[0]] in ("toxicity", "toxic")):
        return found[0]
    raise ModelError(f"{name}: which of its labels means toxic? pass label=, one of {', '.join(names)}")


def _plain(label: str) -> str:
    return re.sub(r"[\s\-]+", "_", label.strip().lower())

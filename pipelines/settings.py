"""Settings checked in one place, so that every command says in the same words what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from schemas.errors import TamisError

Config = TypeVar("Config", bound=BaseModel)


def validated(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """A configuration of these settings.

    Raises:
        TamisError: A setting is unknown or out of its range; says which, in one line.
    """
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TamisError(f"setting {place}: {first['msg']} (got {first.get('input')!r})") from error

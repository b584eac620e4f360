"""Finding a server: does it answer, has it the model, how is it spoken to; said before any work starts."""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from models.lm.dialects import DIALECTS, OWNERS
from models.protocols import ModelInfo
from schemas.errors import ModelError

KEY_VARIABLES = ("TAMIS_API_KEY", "OPENAI_API_KEY")
REACH_TIMEOUT = 15.0  # seconds to answer the question which models there are; a busy server may take some


def reach(base_url: str, model: str, api_key: str | None) -> dict[str, Any]:
    """The server's card of a model.

    Raises:
        ModelError: In one line, what is wrong and what to do.
    """
    shown = without_secrets(base_url)
    try:
        response = httpx.get(
            base_url.rstrip("/") + "/models",
            headers=headers(api_key),
            timeout=REACH_TIMEOUT,
            trust_env=not is_local(base_url),
        )
    except httpx.InvalidURL as error:
        raise ModelError(f"'{shown}' is no address ({error}); e.g. http://localhost:8000/v1") from error
    except (httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"No server answers at {shown} ({one_line(error)}); start it, or check the address"
        ) from error
    status = response.status_code
    if status in (401, 403):
        raise ModelError(f"The server at {shown} refuses the key (HTTP {status}); set {KEY_VARIABLES[0]}")
    if status == httpx.codes.NOT_FOUND:
        raise ModelError(f"{shown} answers, but lists no models (HTTP 404); does the address end in /v1?")
    if status == httpx.codes.SERVICE_UNAVAILABLE:
        raise ModelError(
            f"The server at {shown} is not ready yet (HTTP 503); try again once its model is loaded"
        )
    try:
        cards = [card for card in response.json()["data"] if isinstance(card, dict)]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{shown} answers (HTTP {status}), but not as an OpenAI-compatible server does"
        ) from error
    for card in cards:
        if card.get("id") == model:
            return card
    served = ", ".join(sorted(str(card.get("id")) for card in cards)[:8]) or "none"
    raise ModelError(f"The server at {shown} has no model '{model}'; it serves {served}")


def describe_card(base_url: str, card: dict[str, Any], name: str, dialect: str, prefill: str) -> ModelInfo:
    """What the manifest records of a server's model; `extra` says dialect and prefill, `auto` resolved.

    Raises:
        ModelError: No such dialect or way of prefilling.
    """
    if dialect == "auto":
        dialect = OWNERS.get(str(card.get("owned_by", "")).lower(), "basic")
    if dialect not in DIALECTS:
        raise ModelError(f"dialect '{dialect}' is not known; use auto, {', '.join(DIALECTS)}")
    if prefill not in ("auto", "continue", "none"):
        raise ModelError(f"prefill '{prefill}' is not known; use auto, continue or none")
    if prefill == "auto":
        prefill = "continue" if DIALECTS[dialect].continues else "none"
    shown = without_secrets(base_url.rstrip("/"))
    return ModelInfo(
        name=name or f"openai:{shown}#{card['id']}",
        kind="lm",
        revision=str(card["id"]),
        source=shown,
        extra={"dialect": dialect, "prefill": prefill, "decoding": f"{dialect}/{prefill}"},
    )


def headers(api_key: str | None) -> dict[str, str]:
    """The headers of every request: the key given, or the one of the environment."""
    key = api_key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def is_local(url: str) -> bool:
    """Whether an address is this machine's own, which no proxy should be asked for."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_secrets(url: str) -> str:
    """An address without the user and password it may hold: it stands in records and messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def one_line(error: BaseException) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__

"""From chat turns to token ids, by the model's own template, with the start of the model's turn already written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from models.protocols import Message
from schemas.errors import ModelError


def encode_chat(tokenizer: Any, messages: Sequence[Message], prefill: str = "") -> list[int]:
    """Token ids of a chat whose next words are the model's, after `prefill`.

    The template writes everything up to where the model's turn begins, the prefill follows, and the whole is
    tokenised at once, as it was in training. Where a message holds the text of a special token (web corpora are full
    of `<|endoftext|>`), that text is tokenised as ordinary characters: no document can end a turn or begin one.

    Args:
        tokenizer: A transformers tokenizer; without a chat template the turns are joined by blank lines.
        messages: System and user turns.
        prefill: What the model's turn begins with.

    Raises:
        ModelError: The template refuses these turns.
    """
    messages = [Message(message.role, well_formed(message.content)) for message in messages]
    texts = [message.content for message in messages]
    bos = _leading_bos(tokenizer) if not tokenizer.chat_template else []
    if not any(special in text for special in _special_texts(tokenizer) for text in texts):
        return bos + list(
            tokenizer.encode(render_chat(tokenizer, messages) + prefill, add_special_tokens=False)
        )
    # Render with a mark in each message's place, then tokenise the template and the messages apart.
    marks = [f"Turn{number}Zq7Kx{number}" for number in range(len(messages))]
    marked = [Message(message.role, mark) for message, mark in zip(messages, marks, strict=True)]
    pieces = re.split(f"({'|'.join(marks)})", render_chat(tokenizer, marked) + prefill)
    content = dict(zip(marks, texts, strict=True))
    ids = bos
    for piece in pieces:
        ids += tokenizer.encode(
            content.get(piece, piece), add_special_tokens=False, split_special_tokens=piece in content
        )
    return ids


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to be continued as it stands: no template, no turns.

    What the tokenizer puts before every text by itself (a beginning token, where it has one) stands first, as it did
    in training; nothing is put behind. The text of a special token is ordinary characters, as in `encode_chat`.

    Args:
        tokenizer: A transformers tokenizer.
        text: Any text.

    Returns:
        At least one id where the text is not empty; for an empty one the beginning token alone, or nothing.
    """
    text = well_formed(text)
    special = any(mark in text for mark in _special_texts(tokenizer))
    ids = tokenizer.encode(
        text, add_special_tokens=False, **({"split_special_tokens": True} if special else {})
    )
    return _leading_bos(tokenizer) + list(ids)


def well_formed(text: str) -> str:
    """Text with U+FFFD for every lone surrogate (half an emoji, from a JSON escape), which no tokenizer reads."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def render_chat(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a chat up to where the model's turn begins.

    Raises:
        ModelError: The template refuses these turns.
    """
    if not tokenizer.chat_template:
        return "".join(f"{message.content}\n\n" for message in messages)
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        if len(turns) > 1 and turns[0]["role"] == "system":
            # Some templates (Gemma's) know no system turn: its words then open the user's.
            first = Message(messages[1].role, f"{messages[0].content}\n\n{messages[1].content}")
            return render_chat(tokenizer, [first, *messages[2:]])
        raise ModelError(f"The model's chat template refuses this prompt: {error}") from error


def _special_texts(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    declared = {str(token.content) for token in added.values() if token.special}
    return {text for text in declared | set(tokenizer.all_special_tokens) if text}


def _leading_bos(tokenizer: Any) -> list[int]:
    """The token this tokenizer puts before a text by itself; a template writes its own."""
    ids = tokenizer.encode("a")
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []

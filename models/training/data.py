"""From rows to training examples: token ids, and the stretches of them that carry the loss.

Three forms of data: running text (every token is learned), a prompt and its completion (only the completion is
learned), and chats (only the assistant's turns are). Prompt and completion are tokenised apart, because that is what
happens when the model is used: the prompt's tokens stand, and the model goes on after them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from models.lm.chat import encode_chat
from models.prompts import Prompt, load_prompt
from schemas.columns import is_text, to_plain_text
from schemas.errors import InputError, ModelError
from schemas.fingerprint import digest

FORMS = ("text", "completion", "messages")


class Example(NamedTuple):
    """One training example.

    Attributes:
        ids: Token ids.
        spans: (start, end) ranges of `ids` whose tokens carry the loss; in order, not overlapping.
        key: What decides on which side of the evaluation split it falls: all examples of one text or prompt share it.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    key: str


@dataclass(frozen=True)
class DataForm:
    """How rows are read.

    Attributes:
        kind: `text`, `completion` or `messages`.
        text_column: Running text, for `text`.
        prompt_column: What stands before the completion, for `completion`.
        completion_column: What is learned, for `completion`.
        messages_column: List of {role, content}, for `messages`.
        prompt: Name or path of a prompt template (`models.prompts`) that the prompt column is rendered through as
            its `text`, inside the model's chat template; the completion then ends with the template's stop string.
            Empty: the prompt column is used as it stands.
        prompt_options: Variables bound to the template (`shots`).
        parse_special: Read the names of special tokens in text, prompts and completions as those tokens, as prompts
            rendered beforehand need; otherwise they are ordinary text, so that no document can end a turn.
    """

    kind: str = "text"
    text_column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    prompt: str = ""
    prompt_options: dict[str, Any] = field(default_factory=dict)
    parse_special: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns read."""
        return {
            "text": [self.text_column],
            # one column can be both: a model that is to repeat what it was asked
            "completion": list(dict.fromkeys((self.prompt_column, self.completion_column))),
            "messages": [self.messages_column],
        }[self.kind]

    def describe(self) -> dict[str, Any]:
        """What tells this form from every other, for hashes and records."""
        record: dict[str, Any] = {"kind": self.kind, "columns": self.columns}
        if self.prompt:
            record["prompt"] = load_prompt(self.prompt, **self.prompt_options).tag
        if self.parse_special:
            record["parse_special"] = True
        return record


def detect_form(names: Sequence[str]) -> str:
    """Which form a table is in, by its column names: `messages`, `prompt` and `completion`, `source` and `target`, or `text`.

    Raises:
        InputError: None of them.
    """
    have = set(names)
    if "messages" in have:
        return "messages"
    if {"prompt", "completion"} <= have or {"source", "target"} <= have:
        return "completion"
    if "text" in have:
        return "text"
    raise InputError(
        f"cannot tell what to train on (columns: {', '.join(names) or 'none'}); pass --text-column, "
        "--prompt-column and --completion-column, or --messages-column"
    )


class ExampleEncoder:
    """Turns batches of rows into examples.

    Rows that hold nothing (null or empty) and examples longer than `max_length` are left out and counted; running
    text is never left out for its length, but cut into chunks of `max_length`.

    Args:
        tokenizer: A Hugging Face tokenizer with an end-of-sequence token.
        form: How rows are read.
        max_length: Most tokens of an example.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token, or no chat template where one is needed.
    """

    def __init__(self, tokenizer: Any, form: DataForm, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so a model trained with it would never stop; "
                "set eos_token in its tokenizer_config.json"
            )
        if form.kind == "messages" and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template, which messages need; "
                "use prompt and completion columns, or add a chat_template to the tokenizer"
            )
        self.tokenizer = tokenizer
        self.form = form
        self.max_length = max_length
        self.counts: Counter[str] = Counter()
        self._eos = int(tokenizer.eos_token_id)
        declared = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._special = {str(t.content) for t in declared if t.special} | set(tokenizer.all_special_tokens)
        self._template: Prompt | None = (
            load_prompt(form.prompt, **form.prompt_options) if form.prompt else None
        )
        self._encode: Callable[[pa.RecordBatch], list[Example]] = {
            "text": self._text,
            "completion": self._completion,
            "messages": self._messages,
        }[form.kind]

    def __call__(self, batch: pa.RecordBatch) -> list[Example]:
        """Encode a batch; `counts` grows by rows, examples, tokens, loss_tokens, empty, too_long, chunked.

        Raises:
            InputError: A column has the wrong type, or a chat is malformed.
        """
        self.counts["rows"] += batch.num_rows
        examples = self._encode(batch)
        self.counts["examples"] += len(examples)
        self.counts["tokens"] += sum(len(e.ids) for e in examples)
        self.counts["loss_tokens"] += sum(end - start for e in examples for start, end in e.spans)
        return examples

    def _text(self, batch: pa.RecordBatch) -> list[Example]:
        texts = [t for t in _strings(batch, self.form.text_column) if t]
        self.counts["empty"] += batch.num_rows - len(texts)
        out = []
        for text, ids in zip(
            texts, self._ids(texts, special=True, parse=self.form.parse_special), strict=True
        ):
            if ids[-1:] != [self._eos]:
                ids = [*ids, self._eos]
            self.counts["chunked"] += len(ids) > self.max_length
            for start in range(0, len(ids), self.max_length):
                chunk = ids[start : start + self.max_length]
                out.append(Example(chunk, ((0, len(chunk)),), text))
        return out

    def _completion(self, batch: pa.RecordBatch) -> list[Example]:
        sources = _strings(batch, self.form.prompt_column)
        targets = _strings(batch, self.form.completion_column)
        pairs = [(s, t) for s, t in zip(sources, targets, strict=True) if s and t]
        self.counts["empty"] += batch.num_rows - len(pairs)
        closing = ""
        if self._template is None:
            prompts = self._ids([s for s, _ in pairs], special=True, parse=self.form.parse_special)
            # some tokenizers end everything they see
            prompts = [head[:-1] if head[-1:] == [self._eos] else head for head in prompts]
        else:
            prompts = [self._render(source) for source, _ in pairs]
            closing = next(iter(self._template.stop), "")
        completions = self._ids([t + closing for _, t in pairs], parse=self.form.parse_special)
        out = []
        for (source, _), head, tail in zip(pairs, prompts, completions, strict=True):
            ids = [*head, *tail, self._eos]
            if len(ids) > self.max_length:
                self.counts["too_long"] += 1
                continue
            out.append(Example(ids, ((len(head), len(ids)),), source))
        return out

    def _render(self, source: str) -> list[int]:
        """Token ids of the prompt, the very ones a language model part makes of it when it is used."""
        assert self._template is not None
        messages, prefill, _ = self._template.render(text=source)
        return encode_chat(self.tokenizer, messages, prefill)

    def _messages(self, batch: pa.RecordBatch) -> list[Example]:
        column = batch.column(self.form.messages_column).to_pylist()
        out = []
        for chat in column:
            if isinstance(chat, str):  # JSON kept as text, as some exporters do
                chat = _json(chat, self.form.messages_column)
            if not chat:
                self.counts["empty"] += 1
                continue
            example = self._chat(_check_chat(chat, self.form.messages_column))
            if not example.spans:
                self.counts["empty"] += 1
            elif len(example.ids) > self.max_length:
                self.counts["too_long"] += 1
            else:
                out.append(example)
        return out

    def _chat(self, chat: list[dict[str, str]]) -> Example:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        done = ""
        key = orjson.dumps([t for t in chat if t["role"] != "assistant"]).decode()
        marks: dict[str, str] = {}
        if any(name in turn["content"] for name in self._special for turn in chat):
            # Render with a mark in each content's place, and tokenise the content apart, as ordinary text.
            marks = {f"Turn{i}Zq7Kx{i}": turn["content"] for i, turn in enumerate(chat)}
            chat = [{**turn, "content": mark} for turn, mark in zip(chat, marks, strict=True)]
        for i, turn in enumerate(chat):
            if turn["role"] != "assistant":
                continue
            before = self._rendered(chat[:i], generation=True)
            after = self._rendered(chat[: i + 1], generation=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise InputError(
                    "the chat template rewrites earlier turns, so the assistant's part cannot be told apart; "
                    "use prompt and completion columns"
                )
            ids += self._marked_ids(before[len(done) :], marks)
            answer = self._marked_ids(after[len(before) :], marks)
            # Learn to stop, but not the line break a template puts between turns.
            end = answer.index(self._eos) + 1 if self._eos in answer else len(answer)
            spans.append((len(ids), len(ids) + end))
            ids += answer
            done = after
        return Example(ids[: spans[-1][1]] if spans else [], tuple(spans), key)

    def _rendered(self, chat: list[dict[str, str]], *, generation: bool) -> str:
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation))

    def _marked_ids(self, text: str, marks: dict[str, str]) -> list[int]:
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(marks)})", text) if marks else [text]:
            if piece:
                ids += self._ids([marks.get(piece, piece)], parse=piece not in marks)[0]
        return ids

    def _ids(self, texts: Sequence[str], *, special: bool = False, parse: bool = False) -> list[list[int]]:
        """Token ids; `special` adds what the tokenizer puts around a text, `parse` reads names of special tokens."""
        if not texts:
            return []
        # verbose=False: the length is checked here, not warned about there
        encoded = self.tokenizer(
            list(texts), add_special_tokens=special, split_special_tokens=not parse, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def is_held_out(key: str, fraction: float) -> bool:
    """Whether an example belongs to the evaluation split: by a hash of its content, so the same in every run.

    Args:
        key: `Example.key`.
        fraction: Share to hold out, in [0, 1).
    """
    return int.from_bytes(digest("eval-split", key)[:8], "little") < fraction * 2**64


def _strings(batch: pa.RecordBatch, name: str) -> list[str | None]:
    column = batch.column(name)
    if pa.types.is_null(column.type):
        return [None] * batch.num_rows
    if not is_text(column.type):
        raise InputError(f"column '{name}' is {column.type}, not text; pass another column")
    values: list[str | None] = to_plain_text(column).to_pylist()
    return values


def _json(text: str, column: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"column '{column}' holds text that is no JSON list of messages ({error})"
        ) from error


def _check_chat(chat: Any, column: str) -> list[dict[str, str]]:
    good = isinstance(chat, list) and all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
        for t in chat
    )
    if not good:
        raise InputError(f"column '{column}' must be a list of {{role, content}}, both text")
    return [{"role": t["role"], "content": t["content"]} for t in chat]

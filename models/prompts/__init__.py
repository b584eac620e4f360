"""Prompts: versioned Jinja files that render to chat turns, and the parser of what a model answers inside the tags.

A prompt file holds up to three blocks, `system`, `user` and `assistant` (what the model's turn already begins with),
and may set `stop`, the strings that end an answer. A file is never edited once a release has used it: a new wording
is a new file (`-v2`), because the hash of the file stands in every edit made with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.protocols import Candidate, Message
from schemas.errors import TamisError
from schemas.fingerprint import fingerprint

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent
BLOCKS = ("system", "user", "assistant")
# A prompt that shows passages one a turn: the opening turn and the model's answer to it, then for each passage its turn
# (`number`, `passage`) and the model's receipt; the `user` block is the last turn. All four or none.
LIST_BLOCKS = ("opening", "ready", "passage", "received")
# What a template may leave unset: each is false, so `{% if before %}` works in any of them.
OPTIONAL: Mapping[str, Any] = {"before": "", "after": "", "shots": 0}

_OPEN = re.compile(r"<\s*answer\s*>", re.IGNORECASE)
_OPENING = re.compile(r"\s*(?:<\s*answer\s*>\s*)+", re.IGNORECASE)
_CLOSE = re.compile(r"<\s*/\s*answer\s*>", re.IGNORECASE)
# `</answer` and shorter beginnings of it: a generation cut off in the middle of the closing tag.
_HALF_CLOSE = re.compile(r"<\s*/\s*(?:a(?:n(?:s(?:w(?:e(?:r\s*)?)?)?)?)?)?$", re.IGNORECASE)


class PromptError(TamisError):
    """A prompt file cannot be used: not found, not valid Jinja, or a variable or block it needs is missing."""


@dataclass(frozen=True)
class Prompt:
    """A prompt template and the options it is used with.

    Attributes:
        name: Its name (`detox-rewrite-v1`), or the stem of the file it came from.
        source: The template, as it stands in the file.
        options: Variables bound when it was loaded (`shots`); part of the hash.
    """

    name: str
    source: str
    options: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def hash(self) -> str:
        """32 hexadecimal characters that change with the template or its options."""
        return fingerprint(self.source, *(f"{key}={value!r}" for key, value in self.options))

    @property
    def tag(self) -> str:
        """`name@hash` (12 digits), as edits record it."""
        return f"{self.name}@{self.hash[:12]}"

    @property
    def stop(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return _stop(self.source, self.name)

    def render(self, **variables: Any) -> tuple[tuple[Message, ...], str, tuple[str, ...]]:
        """Fill the template.

        Args:
            **variables: What the template asks for: `text`, and where wanted `before`, `after` and `shots`.

        Returns:
            The chat turns before the model's own, the prefill of the model's turn, and the stop strings: what a
            `GenerationRequest` takes. Each turn is stripped of white space at its ends.

        Raises:
            PromptError: A variable the template needs was not given, or the template failed.
        """
        template = _compile(self.source, self.name)
        turns = {block: self._block(block, variables) for block in BLOCKS if block in template.blocks}
        messages = tuple(Message(role, turns[role]) for role in ("system", "user") if turns.get(role))
        return messages, turns.get("assistant", ""), self.stop

    def render_list(
        self, passages: Sequence[str], /, **variables: Any
    ) -> tuple[tuple[Message, ...], str, tuple[str, ...]]:
        """Fill a template that shows passages, numbered from 1.

        Args:
            passages: What is shown. A template with the blocks of `LIST_BLOCKS` shows them one a turn; any other is
                given `passages` for its user turn.
            **variables: What the template asks for; `count` is filled in.

        Returns:
            As `render`.

        Raises:
            PromptError: As `render`.
        """
        variables = {**variables, "count": len(passages), "passages": list(passages)}
        messages, prefill, stop = self.render(**variables)
        template = _compile(self.source, self.name)
        if "passage" not in template.blocks:
            return messages, prefill, stop
        turns = [
            Message("user", self._block("opening", variables)),
            Message("assistant", self._block("ready", variables)),
        ]
        for number, passage in enumerate(passages, 1):
            here = {**variables, "number": number, "passage": passage}
            turns += [
                Message("user", self._block("passage", here)),
                Message("assistant", self._block("received", here)),
            ]
        return (*messages[:-1], *turns, messages[-1]), prefill, stop

    def _block(self, name: str, variables: Mapping[str, Any]) -> str:
        import jinja2

        template = _compile(self.source, self.name)
        try:
            context = template.new_context({**OPTIONAL, **dict(self.options), **variables})
            return "".join(template.blocks[name](context)).strip()
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise PromptError(f"Prompt {self.name}: {error}") from error

    def parse(self, candidate: Candidate) -> str | None:
        """The answer in a candidate that continues this prompt (its prefill and closing tag included), or None."""
        # The stop string was cut off the candidate: put it back, so that a closed answer reads as one.
        closing = next((stop for stop in self.stop if _CLOSE.fullmatch(stop)), "")
        text = candidate.text + (closing if candidate.finish == "stop" else "")
        return parse_answer(text, prefill=_prefill(self))


def load_prompt(name: str | Path, *, variables: Sequence[str] = ("text",), **options: Any) -> Prompt:
    """Load a prompt by its name, or from a file of the user's.

    Args:
        name: A prompt shipped in this folder (`detox-rewrite-v1`), or a path (it ends in `.jinja` or holds a slash).
        variables: What the caller will fill in; a template that needs more is refused here, not in the middle of a job.
        **options: Variables to bind for good, such as `shots=1`; they take part in the hash.

    Raises:
        PromptError: No such prompt, not UTF-8, not valid Jinja, or it has no `user` block.

    Example:
        >>> messages, prefill, stop = load_prompt("detox-rewrite-v1").render(text="What a dumb rule.")
        >>> prefill, stop
        ('<answer>', ('</answer>',))
    """
    text_name = str(name)
    is_path = isinstance(name, Path) or text_name.endswith(".jinja") or "/" in text_name
    path = Path(name) if is_path else FOLDER / f"{text_name}.jinja"
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(prompt_names())
        hint = (
            f"no such file: {path}"
            if is_path
            else f"no prompt of that name; there are {known}, or give a path"
        )
        raise PromptError(f"Prompt {text_name!r}: {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"Prompt {text_name!r} cannot be read: {error}") from error
    prompt = Prompt(path.stem, source, tuple(sorted(options.items())))
    _check(prompt, variables)
    return prompt


def prompt_names() -> list[str]:
    """Names of the prompts shipped with tamis, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def parse_answer(text: str, prefill: str = "") -> str | None:
    """Take the answer out of its tags.

    Only a closed answer counts: an unclosed one was cut off or never finished, and half a sentence must not win a
    ranking (nor an empty one, which is what the reference implementation makes of it). Text before the opening tag
    and after the closing one is ignored; an opening tag said twice in a row is one; an opening tag in the middle of
    an answer makes the whole thing unusable.

    Args:
        text: What the model said.
        prefill: What its turn already began with.

    Returns:
        The answer, stripped, never empty; None if there is none, if it is not closed, or if it is malformed.

    Example:
        >>> parse_answer("<answer> A fine day. </answer> I hope this helps!")
        'A fine day.'
        >>> parse_answer("A fine day.</answer>", prefill="<answer>")
        'A fine day.'
        >>> parse_answer("A fine d", prefill="<answer>") is None
        True
    """
    whole = prefill + text
    opened = _OPEN.search(whole)
    if opened is None:
        return None
    opening = _OPENING.match(whole, opened.start())
    start = opening.end() if opening else opened.end()
    closed = _CLOSE.search(whole, start)
    if closed is None:
        return None
    answer = whole[start : closed.start()].strip()
    if not answer or _OPEN.search(answer) or _HALF_CLOSE.search(answer):
        return None
    return answer


@lru_cache(maxsize=64)
def _compile(source: str, name: str) -> jinja2.Template:
    """Compile a template once; sandboxed, because a prompt file may come from anywhere."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"Prompt {name}, line {error.lineno}: {error.message}") from error


@lru_cache(maxsize=64)
def _stop(source: str, name: str) -> tuple[str, ...]:
    """What the template sets as `stop`, read without rendering any block."""
    import jinja2

    template = _compile(source, name)
    context = template.new_context(dict(OPTIONAL))
    try:
        # Top-level `set` statements run before the first block; blocks that need variables come after them.
        for _ in template.root_render_func(context):
            if "stop" in context.exported_vars:
                break
    except jinja2.TemplateError:
        pass  # a block asked for `text`: all that is set at the top has been set by then
    stop = context.vars.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(item, str) and item for item in stop):
        raise PromptError(f"Prompt {name}: `stop` must be a string or a list of non-empty strings")
    return stop


@lru_cache(maxsize=64)
def _prefill(prompt: Prompt) -> str:
    """The prefill as far as it matters to the parser: it does not depend on the text."""
    return prompt.render(text="")[1]


def _check(prompt: Prompt, variables: Sequence[str]) -> None:
    """Refuse a template that could not be rendered later, in the middle of a job."""
    template = _compile(prompt.source, prompt.name)
    if "user" not in template.blocks:
        raise PromptError(
            f"Prompt {prompt.name} has no user turn: add {{% block user %}} ... {{% endblock %}}"
        )
    unknown = set(template.blocks) - set(BLOCKS) - set(LIST_BLOCKS)
    if unknown:
        raise PromptError(
            f"Prompt {prompt.name}: unknown block {sorted(unknown)[0]!r}; use {', '.join((*BLOCKS, *LIST_BLOCKS))}"
        )
    missing = set(LIST_BLOCKS) - set(template.blocks)
    if missing and len(missing) < len(LIST_BLOCKS):
        raise PromptError(
            f"Prompt {prompt.name}: to show passages one a turn it also needs the block {sorted(missing)[0]!r}"
        )
    values = dict.fromkeys(variables, "")
    prompt.render_list([""], **values) if not missing else prompt.render(**values)

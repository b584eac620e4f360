"""Constrained decoding in this process: a reply may only go on as its form allows.

A form (`models.protocols.ReplyForm`) becomes an automaton over characters, and at each step only tokens are left that the
automaton can read whole from where the reply stands; the end of the turn is left where the reply is complete. So a reply
always has the form, unless it is cut off by length. Which tokens those are is found by walking a trie of the vocabulary
along the automaton: for a list of numbers a few dozen steps, however large the vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Protocol

import torch

from models.lm.decoder import Sides
from models.lm.sampling import Hook, Step
from models.protocols import NumberList, OneOf, ReplyForm
from schemas.errors import ModelError

State = Hashable


class Automaton(Protocol):
    """Reads characters; deterministic. A state says everything that decides what may follow."""

    start: State
    alphabet: frozenset[str]  # characters a reply may hold; no other token need be looked at

    def step(self, state: State, character: str) -> State | None:
        """The state after one more character; None where it may not stand here."""
        ...

    def complete(self, state: State) -> bool:
        """Whether the reply may end here."""
        ...


class OneOfAutomaton:
    """Reads exactly one of a few texts; a state is what has been read."""

    def __init__(self, form: OneOf) -> None:
        self.start: State = ""
        self.alphabet = frozenset("".join(form.options))
        self._options = frozenset(form.options)
        self._prefixes = frozenset(option[:i] for option in form.options for i in range(len(option) + 1))

    def step(self, state: State, character: str) -> State | None:
        """See `Automaton`."""
        read = f"{state}{character}"
        return read if read in self._prefixes else None

    def complete(self, state: State) -> bool:
        """See `Automaton`."""
        return state in self._options


class NumberListAutomaton:
    """Reads `[3], [1]`: distinct numbers; a state is (numbers so far, what of the next item has been read)."""

    def __init__(self, form: NumberList) -> None:
        self.form = form
        self.start: State = (frozenset(), "")
        self.alphabet = frozenset(f"[]0123456789{form.separator}{form.none}")

    def step(self, state: State, character: str) -> State | None:
        """See `Automaton`."""
        used, read = state  # type: ignore[misc]
        form = self.form
        if read is None:  # `none` was said, or the list is full
            return None
        text = read + character
        if not used and form.none and form.none.startswith(text):
            return used, text
        lead = form.separator if used else ""
        if len(text) <= len(lead):
            return (used, text) if lead.startswith(text) and len(used) < form.limit else None
        item = text[len(lead) :]
        if not text.startswith(lead) or item[0] != "[":
            return None
        number = item[1:].rstrip("]")
        if item == "[":
            return (used, text)
        if not number.isascii() or not number.isdigit() or number[0] == "0" or item.count("]") > 1:
            return None
        if item[-1] == "]":
            return (used | {int(number)}, "") if int(number) in self._free(used) else None
        return (used, text) if any(str(n).startswith(number) for n in self._free(used)) else None

    def complete(self, state: State) -> bool:
        """See `Automaton`."""
        used, read = state  # type: ignore[misc]
        if not used:
            return bool(self.form.none) and read == self.form.none
        return read == "" and len(used) >= self.form.at_least

    def _free(self, used: frozenset[int]) -> list[int]:
        return [n for n in range(1, self.form.count + 1) if n not in used]


def automaton_of(form: ReplyForm) -> Automaton:
    """The automaton that reads exactly the replies of a form."""
    return OneOfAutomaton(form) if isinstance(form, OneOf) else NumberListAutomaton(form)


class TokenTrie:
    """The texts of a vocabulary's tokens, by character.

    Args:
        texts: Token id -> what it adds to a text.
    """

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._root: dict[str, Any] = {}
        for token, text in texts.items():
            node = self._root
            for character in text:
                node = node.setdefault(character, {})
            node.setdefault("", []).append(token)

    def walk(self, automaton: Automaton, state: State) -> Iterator[tuple[int, State]]:
        """Tokens the automaton can read whole from a state, and the states they lead to."""
        open_nodes: list[tuple[dict[str, Any], State]] = [(self._root, state)]
        while open_nodes:
            node, here = open_nodes.pop()
            for token in node.get("", ()):
                yield token, here
            for character, child in node.items():
                if character and (after := automaton.step(here, character)) is not None:
                    open_nodes.append((child, after))


class Vocabulary:
    """The texts of all tokens, from which the few that a form can use are picked.

    Args:
        texts: Token id -> what it adds to a text; tokens without a text of their own (marks, parts of a character) are
            left out.
    """

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._texts = dict(texts)
        self._tries: dict[frozenset[str], TokenTrie] = {}

    def trie(self, alphabet: frozenset[str]) -> TokenTrie:
        """The tokens of which every character is in the alphabet."""
        if alphabet not in self._tries:
            few = {i: text for i, text in self._texts.items() if alphabet.issuperset(text)}
            self._tries[alphabet] = TokenTrie(few)
        return self._tries[alphabet]


def token_texts(tokenizer: Any, vocabulary: int) -> dict[int, str]:
    """What each token adds to a text, spaces included; tokens that are marks or part of a character are left out."""
    lead_ids = tokenizer.encode("a", add_special_tokens=False)[-1:]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    lead = tokenizer.decode(lead_ids, **options)
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(min(vocabulary, len(tokenizer))) if i not in special]
    # Behind another token: some tokenizers write a leading space only there.
    decoded = tokenizer.batch_decode([[*lead_ids, i] for i in ids], **options)
    texts = {i: text[len(lead) :] for i, text in zip(ids, decoded, strict=True) if text.startswith(lead)}
    return {i: text for i, text in texts.items() if text and "\ufffd" not in text}


class Constraint:
    """A hook of the sampling loop that keeps candidates to the forms of their requests.

    Args:
        vocabulary: The model's.
        eos: Tokens that end a turn.
        forms: Form by the number of the job in the loop; jobs that are not there are free.
        before: A hook whose scores are constrained.

    Raises:
        ModelError: When called: the vocabulary cannot write a form at all.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        eos: frozenset[int],
        forms: Mapping[int, ReplyForm],
        before: Hook | None = None,
    ) -> None:
        self._vocabulary, self._before = vocabulary, before
        self._eos = sorted(eos)
        self._automata = {job: automaton_of(form) for job, form in forms.items()}
        self._tokens: dict[tuple[int, float, int], dict[int, State]] = {}

    def __call__(self, scores: torch.Tensor, sides: Sides, step: Step) -> torch.Tensor:
        """See `models.lm.sampling.Hook`."""
        if self._before is not None:
            scores = self._before(scores, sides, step)
        for place, (row, drawn) in enumerate(zip(step.rows, step.drawn, strict=True)):
            automaton = self._automata.get(row.job)
            if automaton is None or drawn.finish == "eos":
                continue
            key = (row.job, row.temperature, row.index)
            if not drawn.tokens:
                state = automaton.start
            elif drawn.tokens[-1] in self._tokens[key]:
                state = self._tokens[key][drawn.tokens[-1]]
            else:
                continue  # a finished row that lingers
            allowed = dict(self._vocabulary.trie(automaton.alphabet).walk(automaton, state))
            self._tokens[key] = allowed
            ids = [*allowed, *(self._eos if automaton.complete(state) else ())]
            if not ids:
                raise ModelError("the model's vocabulary cannot write the form of reply that is asked for")
            index = torch.tensor(ids, device=scores.device)
            kept = scores[place, index]
            scores[place] = -torch.inf
            scores[place, index] = kept
        return scores

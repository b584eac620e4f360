"""Hard conditions: what a replacement must satisfy, whatever its rank. Each is a pure function with a name.

A condition takes the source and the replacement and returns None, or the slug of the reason it fails, which counters,
edits and the report carry. `parsed` and `empty` always apply; the others can be skipped by name
(`AcceptOptions.skip`). What is inside a toxic span is nothing to be kept: names and numbers there are exempt.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from rapidfuzz.distance import Levenshtein

from transforms.detox.language import differs_in_language, function_words
from transforms.detox.options import AcceptOptions

_WORD = re.compile(r"[^\W_]+(?:['’.&-][^\W_]+)*", re.UNICODE)
_NUMBER = re.compile(r"(?<![^\W\d_])(?<![\d.,])\d+(?:[.,:/]\d+)*")
_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"'`]+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w")
_MENTION = re.compile(r"(?<![\w@.])@\w+")
_SHORTEST_DISGUISED = 4
_NEGATOR = re.compile(
    r"\b(?:not|no|never|none|nobody|nothing|nowhere|neither|nor|without|cannot|hardly"
    r"|(?:ai|are|ca|could|did|does|do|had|has|have|is|might|must|need|ought|should|was|were|wo|would)n\s?['’]?t"
    r"|nicht|kein(?:e[mnrs]?)?|niemals|nie|ohne|ne|jamais|sans|nunca|sin|jamás|non|mai|senza|não|sem)\b",
    re.IGNORECASE,
)
# What may stand between a negation and the word it negates.
_REACH = re.compile(
    r"\s+(?:(?:an?|the|so|very|that|this|such|really|as|too|just|all|being|quite|any)\s+)*", re.IGNORECASE
)
_REFUSAL = re.compile(
    r"\b(?:i\s*(?:['’]m|am)\s+(?:so\s+|very\s+|really\s+)?sorry,?\s+(?:but|i)\b"
    r"|sorry,?\s+but\s+i\s+(?:can|could|am|won)|i\s+apologi[sz]e\b"
    r"|i\s+(?:can(?:no|['’])?t|could\s+not|will\s+not|won['’]?t|am\s+(?:unable|not\s+able)\s+to|['’]m\s+(?:unable|not\s+able)\s+to)"
    r"\s+(?:help|assist|rewrite|provide|comply|fulfil|fulfill|generate|create|produce|continue|engage|do\s+that|answer)"
    r"|as\s+an?\s+(?:ai|language\s+model|assistant|artificial\s+intelligence)\b"
    r"|(?:against|violates?)\s+(?:my|our|the)\s+(?:guidelines|policy|policies|principles|programming)"
    r"|i\s+(?:do\s+not|don['’]?t)\s+feel\s+comfortable"
    r"|(?:this|your)\s+(?:text|request|content|statement)\s+(?:is|contains|appears|seems)\b.{0,40}"
    r"(?:offensive|harmful|hateful|inappropriate|toxic))",
    re.IGNORECASE | re.DOTALL,
)
_META = re.compile(
    r"^\W*(?:(?:sure|certainly|of course|okay|absolutely)[,!.:]?\s+(?:here|i)\b"
    r"|here(?:['’]s|\s+is|\s+are)\s+(?:a|an|the|my|your|one)\s+(?:\w+\s+){0,3}?(?:version|rewrite|rewritten|rephras\w+|text|sentence|revision)"
    r"|(?:rewritten|revised|rephrased|detoxified|neutral)(?:\s+(?:text|version|sentence))?\s*:|(?:answer|text|result|output)\s*:)"
    r"|</?\s*answer\b|<\|",
    re.IGNORECASE,
)
_SENTENCE_START = re.compile(r"(?:^|[.!?:;…\"“”‘(\[\n•*-]['\"“‘(]*)\s*$")


@dataclass(frozen=True)
class Source:
    """What is to be replaced.

    Attributes:
        text: The segment (or document) without surrounding whitespace.
        toxicity: Its score.
        spans: Toxic spans as (start, end) in `text`.
    """

    text: str
    toxicity: float
    spans: tuple[tuple[int, int], ...] = field(default=())

    def exempt(self, start: int, end: int) -> bool:
        """Whether [start, end) touches a toxic span."""
        return any(start < e and s < end for s, e in self.spans)

    @cached_property
    def numbers(self) -> Counter[str]:
        """Numbers outside toxic spans."""
        return Counter(m.group() for m in _NUMBER.finditer(self.text) if not self.exempt(*m.span()))

    @cached_property
    def names(self) -> frozenset[str]:
        """Names outside toxic spans, case-folded."""
        return frozenset(name for name, start, end in find_names(self.text) if not self.exempt(start, end))

    @cached_property
    def addresses(self) -> frozenset[str]:
        """URLs and e-mail addresses."""
        return find_addresses(self.text)


@dataclass(frozen=True)
class Trial:
    """What is to replace it, scored.

    Attributes:
        text: The replacement.
        toxicity: Its score.
        similarity: Cosine to the source.
        parsed: Whether it came out of its tags whole.
        listed: Its lexicon score; 0 where there is no lexicon.
    """

    text: str
    toxicity: float
    similarity: float
    parsed: bool = True
    listed: float = 0.0


Check = Callable[[Source, Trial, AcceptOptions], str | None]


def failed_conditions(
    source: Source, trial: Trial, options: AcceptOptions, *, only: frozenset[str] | None = None
) -> list[str]:
    """Reasons for which a replacement is refused, in the order of the conditions; empty = accepted.

    Args:
        source: What is to be replaced.
        trial: The replacement.
        options: Thresholds, and conditions to skip.
        only: Names of the conditions to apply; None = all.
    """
    for always in (unparsed, empty):
        reason = always(source, trial, options)
        if reason:
            return [reason]  # nothing else can be said of it
    reasons = (
        check(source, trial, options)
        for name, check in CHECKS.items()
        if name not in options.skip and (only is None or name in only)
    )
    return [reason for reason in reasons if reason]


def unparsed(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """The answer's tags were missing or never closed: `unparsed`."""
    return None if trial.parsed else "unparsed"


def empty(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """Nothing that can be read, where the source had something: `empty`."""
    readable = any(c.isalnum() for c in trial.text)
    return None if readable or not (trial.text.strip() == "" or _has_word(source.text)) else "empty"


def toxicity(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """As toxic as what the gate flags: `still_toxic`."""
    return "still_toxic" if trial.toxicity >= options.toxicity_limit else None


def improvement(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """Not noticeably less toxic than the source: `not_less_toxic`."""
    return "not_less_toxic" if trial.toxicity > source.toxicity - max(options.min_gain, 1e-9) else None


def similarity(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """Another meaning, by the encoder: `too_far`."""
    return "too_far" if trial.similarity < options.min_similarity else None


def lexicon(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """A strong word of the lexicon is in it, plain or in disguise, whatever the classifier says: `listed_word`."""
    return "listed_word" if trial.listed >= options.max_listed else None


def disguise(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """A toxic word is still there, misspelt so that the classifier no longer knows it: `disguised`.

    Sampling for low toxicity finds such words by itself, because the classifier ignores what it does not know.
    """
    toxic = set().union(*(_letters(source.text[s:e]) for s, e in source.spans)) - function_words("en")
    new = _letters(trial.text) - _letters(source.text)
    for word in new:
        for bad in toxic:
            if abs(len(word) - len(bad)) > 2 or len(bad) < _SHORTEST_DISGUISED:
                continue
            # One letter makes another word of a short one; a longer one is itself, misspelt.
            errors = 0 if len(bad) < 5 else 1 if len(bad) < 8 else 2
            longer = word.startswith(bad) and not word.endswith("ly")
            if longer or Levenshtein.distance(word, bad, score_cutoff=errors) <= errors:
                return "disguised"
    return None


def length(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """Much shorter or longer than the source, in characters or in words: `too_short`, `too_long`."""
    measures = (
        (len(source.text), len(trial.text), options.length_slack),
        (len(_WORD.findall(source.text)), len(_WORD.findall(trial.text)), options.length_slack / 5),
    )
    for before, after, slack in measures:
        if after < options.min_length * before and before - after > slack:
            return "too_short"
        if after > options.max_length * before and after - before > slack:
            return "too_long"
    return None


def numbers(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """A number of the source is missing, or there is a new one: `numbers`."""
    after, before = find_numbers(trial.text), find_numbers(source.text)
    return None if source.numbers <= after and after <= before else "numbers"


def names(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """A name or @mention of the source is missing: `names`."""
    return None if not source.names or source.names <= possible_names(trial.text) else "names"


def urls(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """URLs or e-mail addresses differ: `urls`."""
    return None if find_addresses(trial.text) == source.addresses else "urls"


def negation(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """A negation was lost or made up: `negation`.

    Toxic words are often replaced by a negated mild one ("stupid" by "not wise"), and with them a negation before
    them may go; so negations inside or just before a toxic span may vanish, and each toxic span that is gone may
    leave one new negation behind.
    """
    gone = sum(source.text[s:e].casefold() not in trial.text.casefold() for s, e in source.spans)
    now = count_negations(trial.text)
    return None if binding_negations(source) <= now <= count_negations(source.text) + gone else "negation"


def language(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """Written in another script, or with another language's function words: `language`."""
    return "language" if differs_in_language(source.text, trial.text) else None


def refusal(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """The model declines (`refusal`) or talks about its task (`meta`), where the source does not."""
    if _REFUSAL.search(trial.text) and not _REFUSAL.search(source.text):
        return "refusal"
    if _META.search(trial.text) and not _META.search(source.text):
        return "meta"
    return None


def copy(source: Source, trial: Trial, options: AcceptOptions) -> str | None:
    """Equal to the source but for case, spaces and Unicode form: `copy`."""
    return "copy" if normal_form(trial.text) == normal_form(source.text) else None


CHECKS: dict[str, Check] = {
    "toxicity": toxicity,
    "improvement": improvement,
    "similarity": similarity,
    "lexicon": lexicon,
    "disguise": disguise,
    "length": length,
    "numbers": numbers,
    "names": names,
    "urls": urls,
    "negation": negation,
    "language": language,
    "refusal": refusal,
    "copy": copy,
}


def normal_form(text: str) -> str:
    """NFKC, case-folded, whitespace collapsed: texts with equal forms are one candidate."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_numbers(text: str) -> Counter[str]:
    """The numbers of a text, as written, and how often each stands there."""
    return Counter(_NUMBER.findall(text))


def count_negations(text: str) -> int:
    """How many negating words a text has."""
    return len(_NEGATOR.findall(text))


def binding_negations(source: Source) -> int:
    """How many negations a replacement has to keep: those neither inside nor just before a toxic span."""
    kept = 0
    for match in _NEGATOR.finditer(source.text):
        reach = _REACH.match(source.text, match.end())
        kept += not source.exempt(match.start(), (reach.end() if reach else match.end()) + 1)
    return kept


def possible_names(text: str) -> frozenset[str]:
    """Every word and @mention of a text, in the form in which `find_names` gives names."""
    words = {_plain_name(w) for w in _WORD.findall(text)}
    return frozenset(words | {m.casefold() for m in _MENTION.findall(text)})


def find_addresses(text: str) -> frozenset[str]:
    """URLs (without closing punctuation) and e-mail addresses of a text."""
    found = {m.rstrip(".,;:!?)]}'\"") for m in _URL.findall(text)}
    return frozenset(found | set(_EMAIL.findall(text)))


def find_names(text: str) -> list[tuple[str, int, int]]:
    """Names by their shape: @mentions, and capitalised words that begin no sentence; (case-folded, start, end).

    A text or stretch in capitals says nothing about names: words all in capitals count only as short acronyms, in a
    text that does not shout.
    """
    found = [(m.group().casefold(), *m.span()) for m in _MENTION.finditer(text)]
    words = [m for m in _WORD.finditer(text) if m.group()[0].isalpha()]
    capitals = sum(w.group().isupper() and len(w.group()) > 1 for w in words)
    titled = sum(w.group()[0].isupper() for w in words)
    if not words or (len(words) > 3 and titled > 0.6 * len(words)):
        return found  # shouting, or a headline
    for word in words:
        token, start = word.group(), word.start()
        if not token[0].isupper() or (start and text[start - 1] in "@#"):
            continue
        name = _plain_name(token)
        if len(name) < 2 or name in function_words("en") or name.split("'")[0] in {"i", "i’m"}:
            continue
        if token.isupper() and (len(token) > 5 or 3 * capitals > len(words)):
            continue
        if _SENTENCE_START.search(text, max(0, start - 16), start):
            continue
        found.append((name, *word.span()))
    return found


def _letters(text: str) -> set[str]:
    """The words of a text, case-folded, without what joins their parts (`you're` is `youre`)."""
    return {re.sub(r"['’.&-]", "", w.casefold()) for w in _WORD.findall(text)}


def _plain_name(token: str) -> str:
    token = token.replace("’", "'").casefold()
    return token.removesuffix("'s").rstrip("'.")


def _has_word(text: str) -> bool:
    return any(c.isalnum() for c in text)

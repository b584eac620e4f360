"""Minimal edits: a text with its toxic spans replaced, deleted or redacted, and everything else as it was.

Four ways, from best to plainest: take over from a candidate only what it changed at the spans; put a neutral noun in
the place of a name-calling; leave the span out and mend what that breaks (spaces, commas, articles); redact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from transforms.detox.checks import normal_form

Spans = Sequence[tuple[int, int]]

_TOKEN = re.compile(r"\s+|[^\W_]+(?:['’][^\W_]+)*|.", re.DOTALL)
_VOWEL = re.compile(r"[aeiou]", re.IGNORECASE)
# "an hour", "a user": what is written and what is said differ.
_VOWEL_SOUND = re.compile(r"(?:hour|honest|honou?r|heir)", re.IGNORECASE)
_CONSONANT_SOUND = re.compile(r"(?:uni(?!n)|use|usu|eu|one\b|once\b|ut[ei])", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(an?)(\s+)([^\W_]+)", re.IGNORECASE)
_DETERMINER = re.compile(
    r"\b(?:an?|the|this|that|these|those|such|some|any|every|all|your|my|his|her|their|our|you|u|what)\s+$",
    re.IGNORECASE,
)
# An article and one adjective: "a noisy ___".
_DESCRIBED = re.compile(
    r"\ban?\s+(?!is\b|are\b|was\b|very\b|so\b|such\b|bit\b|lot\b|\w+ly\b)\w+\s+$", re.IGNORECASE
)
_PLURAL_BEFORE = re.compile(r"\b(?:these|those|all)\s+(?:the\s+)?$", re.IGNORECASE)
_PLURAL = re.compile(r"(?:[^s]s|people|men|women|folks)$", re.IGNORECASE)
_PREPOSITION = re.compile(
    r"\b(?:of|by|with|from|to|for|about|like|against|at|on|among|between|than|and|or|are|hate|help|call|called)\s+$",
    re.IGNORECASE,
)
_CLAUSE_START = re.compile(
    r"(?:[.!?;:]|,\s*(?:and|but|because|so)?|\b(?:because|that|if|when|but))\s+$", re.IGNORECASE
)
_VERB_AFTER = re.compile(
    r"\s+(are|were|have|do|is|was|has|will|would|can|can't|could|should|don't|never|always|all|who)\b",
    re.IGNORECASE,
)
_PLURAL_VERBS = frozenset({"are", "were", "have", "do", "don't"})
# What follows a noun rather than an adjective: the end of a clause, or a function word.
_AFTER_NOUN = re.compile(
    r"\s*(?:[.!?;:)\]\"”]|$|,\s*(?:and|or|but|who|which|you|i|we|he|she|they|it|so|the|this|that|stop|go)\b"
    r"|\s(?:who|whom|whose|that|which|is|are|was|were|has|have|had|will|would|can|can't|could|should|do|does|did|don't"
    r"|doesn't|never|always|just|of|in|on|at|from|with|for|to|like|as|by|he|she|they|it|you|i|we|and\s+(?:he|she|they"
    r"|it|you|i|we|the|a|an|his|her|their)|or|but|because|if|when|again|too|here|there|ever)\b)",
    re.IGNORECASE,
)
# Thai, Lao, Burmese, Khmer, and what Chinese and Japanese are written in.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# An article, preposition or conjunction left with nothing behind it.
_DANGLING = re.compile(
    r"(?:(?:^|(?<=\s))(?:an?|the|and|or|but|such|like|as|so|very|really|just|with|of|by)\s*)+$", re.IGNORECASE
)
_BEFORE_END = re.compile(r"\s*(?:[.!?;:,)\]]|$)")
_LISTED = re.compile(r"(?:\s*,\s*|\s+(?:and|or)\s+)(?=[^\W_])", re.IGNORECASE)
_DOUBLE_MARK = re.compile(r"\s*([,;:])(?:\s*[,;:])+")
_MARK_BEFORE_STOP = re.compile(r"\s*[,;:]+\s*([.!?])")
_LEADING = re.compile(r"^[\s,;:.!?)\]]+(?=\S)")
_CONJUNCTION_FIRST = re.compile(r"^(?:and|or)\s+", re.IGNORECASE)
# What touches a seam: the word and the marks before it, the marks and the word behind it.
_TAIL = re.compile(r"(?:[^\W_]+(?:['’][^\W_]+)*)?[\s,;:]*$")
_REACH = 80  # characters in which these are looked for
_HEAD = re.compile(r"^[\s,;:.!?)\]]*(?:[^\W_]+(?:['’][^\W_]+)*)?")


def apply_hunks(source: str, candidate: str, spans: Spans) -> str:
    """The source with those changes of the candidate that touch a toxic span, and no other.

    Args:
        source: Original text.
        candidate: A rewriting of it.
        spans: Toxic (start, end) in the source.

    Returns:
        The edited text; equal to the source where the candidate left the spans alone.

    Example:
        >>> apply_hunks("Oh well, what a dumb rule.", "Well, what a poor rule!", [(16, 20)])
        'Oh well, what a poor rule.'
    """
    left, right = _TOKEN.findall(source), _TOKEN.findall(candidate)
    starts = [0]
    for token in left:
        starts.append(starts[-1] + len(token))
    # Words are compared without case: a candidate that starts its sentence elsewhere changes nothing by that.
    opcodes = Levenshtein.opcodes([t.casefold() for t in left], [t.casefold() for t in right])
    hunks: list[list[int]] = []
    for op in opcodes:
        if op.tag == "equal" and not _only_space(left[op.src_start : op.src_end]):
            hunks.append([])
        elif op.tag == "equal" and not hunks:
            continue
        else:  # a lone space between two changes belongs to them
            if not hunks or not hunks[-1]:
                hunks.append([op.src_start, op.src_end, op.dest_start, op.dest_end])
            else:
                hunks[-1][1], hunks[-1][3] = op.src_end, op.dest_end
    out, position = [], 0
    for hunk in hunks:
        if not hunk:
            continue
        a, b = starts[hunk[0]], starts[hunk[1]]
        if any(a < e and s < b for s, e in spans):
            out += [source[position:a], "".join(right[hunk[2] : hunk[3]])]
            position = b
    return _keep_capital(source, "".join([*out, source[position:]]))


def delete_spans(source: str, spans: Spans) -> str:
    """The source without its toxic spans, with the grammar around each hole mended.

    Example:
        >>> delete_spans("You are a stupid, noisy idiot.", [(10, 16), (24, 29)])
        'You are noisy.'
    """
    return _fill(source, spans, lambda before, span, after: "")


def neutralize_spans(source: str, spans: Spans) -> str:
    """The source with "person" or "people" where a toxic span stands as a noun, deleted elsewhere.

    Example:
        >>> neutralize_spans("Those morons lost it again.", [(6, 12)])
        'Those people lost it again.'
    """

    def noun(before: str, span: str, after: str) -> str:
        several = bool(_PLURAL_BEFORE.search(before))
        plural_form = bool(_PLURAL.search(span))
        if (several or _PREPOSITION.search(before)) and plural_form:
            pass  # "those morons left", "the fault of morons": the ending says it
        elif not before.strip() or _CLAUSE_START.search(before):
            verb = _VERB_AFTER.match(after)
            if not verb or not (plural_form or verb.group(1).lower() in _PLURAL_VERBS):
                return ""
            plural_form = True  # "Morons are everywhere"
        elif not (_DETERMINER.search(before) or _DESCRIBED.search(before)) or not _AFTER_NOUN.match(after):
            return ""
        plural = several or plural_form
        word = "people" if plural else "person"
        return word.upper() if span.isupper() else word

    return _fill(source, spans, noun)


def redact_spans(source: str, spans: Spans, token: str = "[redacted]") -> str:
    """The source with every toxic span replaced by a token; neighbours are one.

    Example:
        >>> redact_spans("You stupid idiot!", [(4, 10), (11, 16)])
        'You [redacted]!'
    """
    out, position = [], 0
    for start, end in join_spans(source, spans):
        out += [source[position:start], token]
        position = end
    return "".join([*out, source[position:]])


def join_spans(source: str, spans: Spans) -> list[tuple[int, int]]:
    """Spans widened to whole words, ascending, neighbours with only spaces between them merged."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(s for s in spans if s[0] < s[1]):
        while start > 0 and _one_word(source[start - 1], source[start]):
            start -= 1
        while end < len(source) and _one_word(source[end - 1], source[end]):
            end += 1
        if out and (start <= out[-1][1] or source[out[-1][1] : start].isspace()):
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def minimal_edits(source: str, spans: Spans, candidates: Sequence[str]) -> list[str]:
    """Distinct edits of a source, best first: the candidates' changes at the spans, a neutral noun, deletion.

    None equals the source; none is empty. No spans give no edits.
    """
    spans = join_spans(source, spans)
    if not spans:
        return []
    made = [apply_hunks(source, c, spans) for c in candidates]
    made += [neutralize_spans(source, spans), delete_spans(source, spans)]
    seen = {normal_form(source), ""}
    out = []
    for text in made:
        form = normal_form(text)
        if form not in seen and any(c.isalnum() for c in text):
            seen.add(form)
            out.append(text)
    return out


def _fill(source: str, spans: Spans, substitute: Callable[[str, str, str], str]) -> str:
    out = ""
    position = 0
    for start, end in join_spans(source, spans):
        kept = source[position:start]
        out = _join(out, kept) if position else kept
        word = substitute(out, source[start:end], source[end : end + 40])
        if word:
            out = _join(out, word)
        else:
            out, end = _close_hole(out, source, end)
        position = end
    rest = source[position:]
    out = _join(out, rest) if rest else out.rstrip()
    return _keep_capital(source, out)


def _join(left: str, right: str) -> str:
    """Two texts put together where something was taken out or put in: what touches the seam is mended, and no more."""
    if not left.strip():
        return _CONJUNCTION_FIRST.sub("", _LEADING.sub("", right)).lstrip()
    tail, head = _search(_TAIL, left[-_REACH:]), _search(_HEAD, right[:_REACH])
    return left[: len(left) - len(tail)] + _fix_articles(_tidy(tail + head)) + right[len(head) :]


def _search(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found.group() if found else ""


def _close_hole(before: str, source: str, end: int) -> tuple[str, int]:
    """What stands before a hole, and where to go on behind it, so that the two fit together."""
    adjective = _DETERMINER.search(before) and _LISTED.match(source, end)
    if adjective:  # "a stupid, noisy dog", "a stupid and noisy dog": the link goes with its adjective
        end = adjective.end()
    elif _BEFORE_END.match(source, end):
        before = _DANGLING.sub("", before.rstrip() + " ").rstrip()
    elif not before or before[-1].isspace():
        while end < len(source) and source[end] == " ":
            end += 1
    return before, end


def _tidy(text: str) -> str:
    text = _DOUBLE_MARK.sub(r"\1", text)
    text = _MARK_BEFORE_STOP.sub(r"\1", text)
    text = re.sub(r"(?<=\S) +(?=[,.!?;:)\]])", "", text)
    return re.sub(r"(?<=\S)  +(?=\S)", " ", text)


def _fix_articles(text: str) -> str:
    def fix(match: re.Match[str]) -> str:
        article, space, word = match.groups()
        vowel = bool(_VOWEL_SOUND.match(word) or (_VOWEL.match(word) and not _CONSONANT_SOUND.match(word)))
        right = "an" if vowel else "a"
        return (right.capitalize() if article[0].isupper() else right) + space + word

    return _ARTICLE.sub(fix, text)


def _keep_capital(source: str, text: str) -> str:
    """Start with a capital where the source does."""
    if source[:1].isupper() and text[:1].islower():
        return text[0].upper() + text[1:]
    return text


def _one_word(a: str, b: str) -> bool:
    """Whether two neighbours belong to one word (in scripts that put spaces between words)."""
    return a.isalnum() and b.isalnum() and not (_UNSPACED.match(a) or _UNSPACED.match(b))


def _only_space(tokens: Sequence[str]) -> bool:
    return len(tokens) == 1 and tokens[0].isspace()

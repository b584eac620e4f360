"""Is a replacement still in the source's language? A light answer: its script, and its function words.

Sentences are too short for a trained identifier to be sure of, and a rewriter rarely drifts to a neighbouring
language: it answers in English, or in the one it knows best. So only clear evidence counts: most letters of another
script, or, among languages in Latin letters, at least two more function words of another language than of the
source's own.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")

# The most frequent function words of some languages in Latin letters.
_FUNCTION_WORDS = {
    "en": "the of and to in that is was he for it with as his on be at by had not are but from or have an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other some could these two may then do first any my now such like our over me even most "
    "after also did many before must through your this a i i'm it's don't",
    "de": "der die und das den von zu ist nicht mit sich des auf für im dem ein eine als auch es an werden aus er hat "
    "dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr "
    "durch man sein wurde sei ich du wir ihr mich dich kein keine",
    "fr": "le de la les et des en un du une que est pour qui dans par plus pas au sur ne se ce il sont avec mais ou "
    "son sa ses comme nous vous cette leur elle été deux aux aussi très je tu mon ma être fait c'est j'ai n'est",
    "es": "el de la que y los del se las por un para con no una su al es lo como más pero sus le ya o este sí porque "
    "esta entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante todos yo tú mi eres está",
    "it": "il di che la e le un per in una è del non si da con dei sono al gli della nel come più anche ma lo alla i "
    "ha su delle questo dal se ci nella loro essere stato io tu mi ho sei molto",
    "pt": "o de que e do da em um para com não uma os no se na por mais as dos como mas ao ele das à seu sua ou quando "
    "muito nos já eu também só pelo pela até isso ela entre depois sem mesmo você é são está",
    "nl": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan maar bij nog uit worden door "
    "naar heeft hij ze wordt tot je mijn deze over zo hebben ik jij wij geen",
    "pl": "w i na z do się nie że to jest o jak po od za przez dla ale już był co tak czy oraz przy było tylko jego "
    "jej ich być może ja ty my jesteś",
    "sv": "och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan när "
    "nu du min ska hade eller",
    "tr": "ve bir bu da de için ile çok ne gibi daha ben sen o biz siz mi değil ama olarak var yok kadar sonra",
}


def differs_in_language(source: str, replacement: str) -> bool:
    """Whether the replacement is clearly in another script or language than the source.

    Example:
        >>> differs_in_language("You are not so clever.", "Du bist nicht so klug, und das ist so.")
        True
    """
    before, after = dominant_script(source), dominant_script(replacement)
    if before is None or after is None:
        return False
    if before != after:
        return True
    if before != "LATIN":
        return False
    here, there = _profile(source), _profile(replacement)
    own = here.most_common(1)[0][0] if here else "en"
    if not there:
        return False
    other, hits = there.most_common(1)[0]
    # The source may have spoken the other language as well: then nothing changed.
    return other != own and hits >= there[own] + 2 and hits > here[other] + 1


def dominant_script(text: str) -> str | None:
    """The script of most letters (`LATIN`, `CYRILLIC`, `CJK`, ...), None where there are no letters."""
    scripts = Counter(_script(c) for c in text if c.isalpha())
    return scripts.most_common(1)[0][0] if scripts else None


@cache
def function_words(language: str) -> frozenset[str]:
    """The function words of a language this module knows."""
    return frozenset(_FUNCTION_WORDS[language].split())


def _profile(text: str) -> Counter[str]:
    words = [w.casefold().replace("’", "'") for w in _WORD.findall(text)]
    hits = Counter({lang: sum(w in function_words(lang) for w in words) for lang in _FUNCTION_WORDS})
    return +hits


@cache
def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    # Japanese mixes three scripts in a sentence, and Korean two: they are one here.
    return "CJK" if name in {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"} else name

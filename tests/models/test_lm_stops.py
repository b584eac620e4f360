"""Stop strings that straddle tokens, with a tokenizer that merges across them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.lm.stops import StopWatch

EOS = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with merges such as `er>`, `</`, `> `: tags are cut at places of their own."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [
        "the answer> is</answer> here",
        "an </answer>",
        "answer><b>",
        "over> and under>",
        "</answer>\n\n",
    ] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def watch(tokenizer, text, stop):
    """Feed a text's tokens one by one: how many were drawn until a stop string was seen, and the candidate's text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = StopWatch(tokenizer, stop)
    before = tokenizer.encode("x")[0]
    for count in range(1, len(ids) + 1):
        if stops(ids[:count]):
            return count, stops.text(ids[:count], frozenset(), before)
    return None, stops.text(ids, frozenset(), before)


class TestStopWatch:
    def test_tokens_do_straddle(self, tokenizer):
        text = "the answer> is</answer> here"
        ends = [
            len(tokenizer.decode(tokenizer.encode(text)[:n]))
            for n in range(1, len(tokenizer.encode(text)) + 1)
        ]
        start = text.index("</answer>")
        assert start not in ends or start + len("</answer>") not in ends

    @given(
        st.text(alphabet="aenrsw </>é👍\n", max_size=25),
        st.text(alphabet="aenrsw </>é👍\n", max_size=10),
        st.sampled_from(["</answer>", "er>", "👍", "\n\n", ">", "é<"]),
    )
    @settings(max_examples=150, deadline=None)
    def test_a_candidate_ends_at_the_first_stop_string_at_once(self, tokenizer, lead, rest, stop):
        text = lead + stop + rest
        count, kept = watch(tokenizer, text, [stop])
        assert kept == text[: text.index(stop)]
        # Seen with the first token that completes it.
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert stop in tokenizer.decode(ids[:count]) and stop not in tokenizer.decode(ids[: count - 1])

    @given(st.text(alphabet="answer</ é👍\n", max_size=40))
    @settings(max_examples=60, deadline=None)
    def test_without_a_stop_string_the_text_is_whole(self, tokenizer, text):
        assert watch(tokenizer, text, ["</answer>"]) == (None, text)
        assert watch(tokenizer, text, []) == (None, text)

    def test_the_first_of_several(self, tokenizer):
        assert watch(tokenizer, "one END two STOP", ["STOP", "END"])[1] == "one "

    def test_the_end_of_turn_is_no_text(self, tokenizer):
        ids = [*tokenizer.encode("fine"), tokenizer.eos_token_id]
        assert StopWatch(tokenizer, []).text(ids, frozenset({tokenizer.eos_token_id}), ids[0]) == "fine"

    def test_a_leading_space_is_kept_where_the_decoder_eats_it(self):
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel({"▁a": 0, "▁fine": 1, "▁day": 2}, unk_token="▁a"))
        backend.decoder = decoders.Metaspace()
        eats = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert eats.decode([1, 2]) == "fine day"
        assert StopWatch(eats, []).text([1, 2], frozenset(), 0) == " fine day"

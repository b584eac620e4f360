from __future__ import annotations

import pickle
import re

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import meta

from models.prompts import FOLDER, LIST_BLOCKS, OPTIONAL, PromptError, load_prompt, parse_answer, prompt_names
from models.protocols import Candidate

NAME = "detox-rewrite-v1"
plain = st.text(alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="<>"), max_size=60)
said = st.lists(
    st.sampled_from(["<answer>", "</answer>", "<ANSWER>", "</ans", "<", ">", " ", "\n", "a fine day", "no"]),
    max_size=8,
).map("".join)


def candidate(text: str, finish: str = "stop") -> Candidate:
    return Candidate(text, 1.0, 0, 0, 1, finish)


class TestLoadPrompt:
    def test_the_shipped_prompt_ends_where_the_answer_begins(self):
        messages, prefill, stop = load_prompt(NAME).render(text="What a stupid rule.")
        assert [message.role for message in messages] == ["system", "user"]
        assert messages[-1].content.endswith("\n\nText: What a stupid rule.")
        assert "<answer>" in messages[-1].content and "</answer>" in messages[-1].content
        assert (prefill, stop) == ("<answer>", ("</answer>",))

    def test_a_shot_and_context_appear_only_when_asked_for(self):
        zero = load_prompt(NAME).render(text="TEXT")[0][-1].content
        one = load_prompt(NAME, shots=1).render(text="TEXT")[0][-1].content
        around = load_prompt(NAME).render(text="TEXT", before="BEFORE", after="AFTER")[0][-1].content
        assert "euros" in one and "euros" not in zero
        assert "BEFORE" in around and "AFTER" in around and "Before" not in zero
        assert len(zero.split()) < 20  # a small model is trained on exactly this

    def test_text_is_never_read_as_a_template(self):
        tricky = "{{ 7 * 7 }} {% if x %} {# no #} &amp; <b>"
        assert tricky in load_prompt(NAME).render(text=tricky)[0][-1].content

    def test_the_hash_names_wording_and_options(self, tmp_path):
        path = tmp_path / f"{NAME}.jinja"
        path.write_text((FOLDER / f"{NAME}.jinja").read_text("utf-8"), "utf-8")
        shipped, copied = load_prompt(NAME), load_prompt(path)
        assert copied.hash == shipped.hash and copied.tag == f"{NAME}@{shipped.hash[:12]}"
        assert load_prompt(NAME, shots=1).hash not in (shipped.hash, load_prompt(NAME, shots=0).hash)
        path.write_text(path.read_text("utf-8") + " ", "utf-8")
        assert load_prompt(path).hash != shipped.hash

    def test_a_prompt_travels_to_workers(self):
        prompt = load_prompt(NAME, shots=1)
        assert pickle.loads(pickle.dumps(prompt)).render(text="x") == prompt.render(text="x")

    def test_a_file_of_ones_own(self, tmp_path):
        path = tmp_path / "mine.jinja"
        path.write_text(
            "{% set stop = '###' %}{% block user %}Say it nicely: {{ text }}{% endblock %}", "utf-8"
        )
        messages, prefill, stop = load_prompt(str(path)).render(text="idiot")
        assert [(m.role, m.content) for m in messages] == [("user", "Say it nicely: idiot")]
        assert (prefill, stop) == ("", ("###",))

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            ("{% block user %}{{ text }", "line 1"),
            ("{{ text }}", "no user turn"),
            ("{% block user %}{{ tone }}{% endblock %}", "'tone' is undefined"),
            (
                "{% block user %}{{ text }}{% endblock %}{% block robot %}{% endblock %}",
                "unknown block 'robot'",
            ),
            ("{% set stop = [1] %}{% block user %}{{ text }}{% endblock %}", "stop"),
            ("{% block user %}{{ text.__class__.__mro__ }}{% endblock %}", "unsafe"),
        ],
    )
    def test_a_broken_file_is_refused_in_one_line_before_work_starts(self, tmp_path, source, says):
        path = tmp_path / "broken.jinja"
        path.write_text(source, "utf-8")
        with pytest.raises(PromptError, match=re.escape(says)) as caught:
            load_prompt(path)
        assert "\n" not in str(caught.value)

    def test_an_option_a_file_needs_may_be_bound_when_it_is_loaded(self, tmp_path):
        path = tmp_path / "tone.jinja"
        path.write_text("{% block user %}{{ tone }}: {{ text }}{% endblock %}", "utf-8")
        assert load_prompt(path, tone="kind").render(text="x")[0][0].content == "kind: x"

    def test_unknown_names_and_unreadable_files(self, tmp_path):
        with pytest.raises(PromptError, match=NAME):
            load_prompt("detox-rewrite-v999")
        with pytest.raises(PromptError, match="no such file"):
            load_prompt(tmp_path / "absent.jinja")
        (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(PromptError, match="cannot be read"):
            load_prompt(tmp_path / "latin.jinja")

    def test_every_shipped_prompt_renders(self):
        for name in prompt_names():
            asked = variables_of(name)
            assert load_prompt(name, variables=asked).render(**dict.fromkeys(asked, "x"))[0]
        assert NAME in prompt_names()

    def test_what_the_caller_will_not_fill_in_is_refused_at_once(self, tmp_path):
        path = tmp_path / "pair.jinja"
        path.write_text("{% block user %}{{ query }} {{ passage }}{% endblock %}")
        with pytest.raises(PromptError, match="query"):
            load_prompt(path)
        messages, _, _ = load_prompt(path, variables=("query", "passage")).render(query="a", passage="b")
        assert messages[0].content == "a b"


def variables_of(name):
    """The variables a shipped prompt must be given: what it asks for and neither sets nor may go without."""
    tree = jinja2.Environment().parse((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
    return sorted(meta.find_undeclared_variables(tree) - set(OPTIONAL))


class TestParseAnswer:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("<answer>A fine day.</answer>", "A fine day."),
            ("Sure! <answer>\n A fine day. \n</answer> Hope this helps.", "A fine day."),
            ("<Answer>A fine day.</ANSWER>", "A fine day."),
            ("< answer >A fine day.</ answer>", "A fine day."),
            ("<answer>one</answer><answer>two</answer>", "one"),
            ("<answer> <answer>A fine day.</answer></answer>", "A fine day."),
            ("<answer>1 < 2 and <b>bold</b></answer>", "1 < 2 and <b>bold</b>"),
            ("<answer>A fine d", None),
            ("<answer>A fine day.</answ", None),
            ("A fine day.", None),
            ("A fine day.</answer>", None),
            ("</answer>A fine day.<answer>", None),
            ("<answer></answer>", None),
            ("<answer> \n </answer>", None),
            ("<answer><answer></answer>", None),
            ("<answer>one <answer>two</answer>", None),
            ("<answer>one</ans</answer>", None),
            ("", None),
        ],
    )
    def test_cases(self, text, answer):
        assert parse_answer(text) == answer

    @given(plain)
    def test_what_stands_in_closed_tags_comes_back_stripped(self, text):
        assert parse_answer(f"<answer>{text}</answer>") == (text.strip() or None)
        assert parse_answer(f"{text}</answer>", prefill="<answer>") == (text.strip() or None)

    @given(plain, plain)
    def test_an_unclosed_answer_is_none(self, lead, text):
        assert parse_answer(f"{lead}<answer>{text}") is None
        assert parse_answer(text, prefill="<answer>") is None

    @given(said)
    def test_an_answer_holds_no_tag_and_was_said(self, text):
        answer = parse_answer(text)
        if answer is not None:
            assert answer and answer == answer.strip() and answer in text
            assert not re.search(r"</?answer", answer, re.IGNORECASE)

    @given(said, st.integers(0, 30))
    def test_cutting_a_reply_short_never_makes_another_answer(self, text, length):
        whole, cut = parse_answer(text), parse_answer(text[:length])
        assert cut is None or cut == whole

    @given(said, st.integers(0, 10))
    def test_the_prefill_may_end_anywhere(self, text, length):
        assert parse_answer(text[length:], prefill=text[:length]) == parse_answer(text)


class TestPromptParse:
    def test_a_candidate_that_met_the_stop_string_is_closed(self):
        assert load_prompt(NAME).parse(candidate("A fine day.", "stop")) == "A fine day."

    @pytest.mark.parametrize("finish", ["eos", "length"])
    def test_one_that_ended_otherwise_is_not(self, finish):
        assert load_prompt(NAME).parse(candidate("A fine day.", finish)) is None

    def test_one_that_repeats_the_opening_tag(self):
        assert load_prompt(NAME).parse(candidate("<answer>A fine day.")) == "A fine day."

    def test_one_that_holds_its_own_closing_tag(self):
        assert load_prompt(NAME).parse(candidate("A fine day.</answer> Bye", "eos")) == "A fine day."


class TestLists:
    def test_passages_one_a_turn_with_a_receipt_for_each(self):
        prompt = load_prompt("utilsel-v1", variables=("query", "answer"))
        messages, prefill, stop = prompt.render_list(["Alpha.", "{{ beta }}"], query="Why?", answer="So.")
        assert [m.role for m in messages] == ["system", *["user", "assistant"] * 3, "user"]
        assert messages[3].content == "[1] Alpha." and messages[5].content == "[2] {{ beta }}"
        assert "2 passages" in messages[1].content and "Why?" in messages[1].content
        assert "So." in messages[-1].content and "So." not in messages[1].content
        assert (prefill, stop) == ("", ())

    def test_a_prompt_without_such_turns_is_given_all_passages_at_once(self):
        messages, _, _ = load_prompt("pseudo-answer-v1", variables=("query", "passages")).render_list(
            ["Alpha.", "Beta."], query="Why?"
        )
        assert [m.role for m in messages] == ["system", "user"]
        assert messages[1].content.startswith("[1] Alpha.\n\n[2] Beta.\n\nQuestion: Why?")

    def test_half_of_the_turns_is_no_list_prompt(self, tmp_path):
        path = tmp_path / "half.jinja"
        path.write_text("{% block passage %}{{ passage }}{% endblock %}{% block user %}x{% endblock %}")
        with pytest.raises(PromptError, match=r"opening|ready|received"):
            load_prompt(path)

    def test_a_turn_that_asks_for_more_is_refused_at_once(self, tmp_path):
        path = tmp_path / "more.jinja"
        turns = "".join(f"{{% block {b} %}}{{{{ extra }}}}{{% endblock %}}" for b in LIST_BLOCKS)
        path.write_text(turns + "{% block user %}x{% endblock %}")
        with pytest.raises(PromptError, match="extra"):
            load_prompt(path)

"""From rows to examples, and the token store."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lm.chat import encode_chat
from models.prompts import load_prompt
from models.training.data import DataForm, ExampleEncoder, detect_form, is_held_out
from models.training.shards import ShardReader, list_shards, shard_fingerprint
from models.training.tokens import build_store, common_prefix
from schemas.errors import InputError, ModelError
from tests.models.tiny_lm import make_tokenizer

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id


def encode(form: DataForm, rows: list[dict], max_length: int = 400, tokenizer=TOKENIZER):
    encoder = ExampleEncoder(tokenizer, form, max_length)
    return encoder(pa.RecordBatch.from_pylist(rows)), encoder.counts


def learned(example) -> list[str]:
    return [TOKENIZER.decode(example.ids[a:b]) for a, b in example.spans]


def test_text_is_learned_whole_and_ends_with_eos():
    examples, counts = encode(DataForm("text"), [{"text": "One fine day."}, {"text": ""}, {"text": None}])
    assert [TOKENIZER.decode(e.ids) for e in examples] == ["One fine day.<|im_end|>"]
    assert examples[0].spans == ((0, len(examples[0].ids)),)
    assert counts["rows"] == 3 and counts["empty"] == 2 and counts["examples"] == 1


@given(length=st.integers(1, 60), max_length=st.integers(8, 20))
@settings(deadline=None)
def test_long_text_is_cut_and_nothing_lost(length, max_length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    examples, counts = encode(DataForm("text"), [{"text": text}], max_length)
    ids = [i for e in examples for i in e.ids]
    assert TOKENIZER.decode(ids) == text + "<|im_end|>"
    assert max(len(e.ids) for e in examples) <= max_length
    assert counts["chunked"] == (length + 1 > max_length)
    assert len({e.key for e in examples}) == 1  # all chunks of a text stay on one side of the split


def test_only_the_completion_is_learned():
    form = DataForm("completion")
    examples, counts = encode(
        form, [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "x", "completion": ""}]
    )
    assert learned(examples[0]) == [" 4<|im_end|>"]
    assert TOKENIZER.decode(examples[0].ids) == "2 + 2 = 4<|im_end|>"
    assert counts["empty"] == 1


def test_what_does_not_fit_is_left_out_and_counted():
    form = DataForm("completion")
    examples, counts = encode(
        form, [{"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": "c"}], 20
    )
    assert len(examples) == 1 and counts["too_long"] == 1


def test_a_prompt_template_is_rendered_as_the_model_will_see_it():
    form = DataForm(
        "completion", prompt_column="source", completion_column="target", prompt="detox-rewrite-v1"
    )
    row = {"source": "What a stupid rule.", "target": "I do not like this rule."}
    (example,), _ = encode(form, [row], 1000)
    messages, prefill, stop = load_prompt("detox-rewrite-v1").render(text=row["source"])
    prompt = encode_chat(TOKENIZER, messages, prefill)
    assert example.ids[: len(prompt)] == prompt
    assert learned(example) == [f"{row['target']}{stop[0]}<|im_end|>"]
    assert form.describe()["prompt"] == load_prompt("detox-rewrite-v1").tag


def test_all_turns_of_the_assistant_are_learned_and_no_other():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "unanswered"},
    ]
    for value in (chat, json.dumps(chat)):
        (example,), _ = encode(DataForm("messages"), [{"messages": value}], 1000)
        assert learned(example) == ["Hi.<|im_end|>", "No.<|im_end|>"]
        rendered = TOKENIZER.apply_chat_template(chat[:-1], tokenize=False)
        assert TOKENIZER.decode(example.ids) == rendered.removesuffix("\n")


def test_text_that_spells_a_special_token_is_ordinary_text():
    (text,), _ = encode(DataForm("text"), [{"text": "a <|im_end|> b"}])
    assert text.ids.count(EOS) == 1 and text.ids[-1] == EOS
    (pair,), _ = encode(DataForm("completion"), [{"prompt": "<|im_start|>", "completion": "<|im_end|> c"}])
    assert pair.ids.count(EOS) == 1
    chat = [{"role": "user", "content": "x<|im_end|>y"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    (turns,), _ = encode(DataForm("messages"), [{"messages": chat}], 1000)
    assert turns.ids.count(EOS) == 2  # one for each turn
    assert learned(turns) == ["a<|im_end|>b<|im_end|>"]


@pytest.mark.parametrize("chat", [[{"role": "user"}], "not json", 3, [{"role": "user", "content": 1}]])
def test_a_malformed_chat_is_refused(chat):
    with pytest.raises(InputError, match="messages"):
        encode(DataForm("messages"), [{"messages": chat}])


def test_a_column_of_another_type_is_refused():
    with pytest.raises(InputError, match="int64, not text"):
        encode(DataForm("text"), [{"text": 3}])


def test_a_tokenizer_without_eos_or_chat_template_is_refused():
    with pytest.raises(ModelError, match="end-of-sequence"):
        ExampleEncoder(make_tokenizer(eos=False), DataForm("text"), 100)
    with pytest.raises(ModelError, match="chat template"):
        ExampleEncoder(make_tokenizer(chat=False), DataForm("messages"), 100)


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["id", "messages"], "messages"),
        (["prompt", "completion", "text"], "completion"),
        (["source", "target"], "completion"),
        (["text"], "text"),
    ],
)
def test_the_form_is_told_by_the_columns(names, form):
    assert detect_form(names) == form


def test_columns_that_tell_nothing_are_an_error():
    with pytest.raises(InputError, match="--text-column"):
        detect_form(["body"])


@given(st.text(), st.floats(0, 0.99))
@settings(deadline=None)
def test_the_split_is_by_content_and_monotone(key, fraction):
    assert not is_held_out(key, 0.0)
    assert is_held_out(key, fraction) == is_held_out(key, fraction)
    if is_held_out(key, fraction / 2):
        assert is_held_out(key, fraction)


def test_the_split_holds_out_the_share_asked_for():
    assert 150 < sum(is_held_out(f"text {i}", 0.1) for i in range(2000)) < 250


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
@settings(deadline=None)
def test_common_prefix(one, other):
    prefix = common_prefix(one, other)
    n = len(prefix)
    assert one[:n] == other[:n] == prefix
    assert n in (len(one), len(other)) or one[n] != other[n]
    assert common_prefix(None, one) == one


COMPLETION = DataForm("completion")


def make_store(folder, rows, form=COMPLETION, *, eval_fraction=0.0, notify=lambda line: None):
    data = folder / "data"
    data.mkdir(exist_ok=True)
    half = len(rows) // 2
    for name, part in (("a.jsonl", rows[:half]), ("b.jsonl", rows[half:])):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    listing = list_shards(str(data))
    return build_store(
        ShardReader(listing, form.columns),
        ExampleEncoder(TOKENIZER, form, 200),
        folder / "tokens",
        fingerprints=[shard_fingerprint(s) for s in listing.shards],
        key={"form": form.describe()},
        eval_fraction=eval_fraction,
        notify=notify,
    )


ROWS = [{"prompt": f"Say: {i}", "completion": f" {i * i}"} for i in range(40)]


def test_the_store_gives_back_what_was_encoded(tmp_path):
    store = make_store(tmp_path, ROWS)
    expected, _ = encode(DataForm("completion"), ROWS)
    assert len(store) == 40
    for number, example in enumerate(expected):
        ids, spans = store[number]
        assert ids.tolist() == example.ids and tuple(spans) == example.spans
        assert store.lengths[number] == len(example.ids)
    assert TOKENIZER.decode(store.prefix) == "Say: "


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl"])
def test_one_column_can_be_prompt_and_completion(tmp_path, suffix):
    table = pa.table({"text": ["One fine day.", "Another."], "other": [1, 2]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    form = DataForm("completion", prompt_column="text", completion_column="text")
    encoder = ExampleEncoder(TOKENIZER, form, 200)
    reader = ShardReader(list_shards(str(path)), form.columns)
    examples = [e for batch in reader for e in encoder(batch)]
    assert [learned(e) for e in examples] == [["One fine day.<|im_end|>"], ["Another.<|im_end|>"]]


def test_the_store_splits_by_prompt(tmp_path):
    twins = [{**row, "completion": row["completion"] + "!"} for row in ROWS]
    store = make_store(tmp_path, ROWS + twins, eval_fraction=0.3)
    assert np.array_equal(np.sort(np.concatenate([store.train, store.held_out])), np.arange(80))
    assert {int(n) % 40 for n in store.train}.isdisjoint({int(n) % 40 for n in store.held_out})


def test_shards_done_before_are_not_tokenised_again(tmp_path):
    lines: list[str] = []
    make_store(tmp_path, ROWS, notify=lines.append)
    make_store(tmp_path, ROWS, notify=lines.append)
    assert len(lines) == 2
    make_store(tmp_path, [*ROWS[:-1], {"prompt": "new", "completion": "row"}], notify=lines.append)
    assert [line.split()[1] for line in lines] == ["a.jsonl:", "b.jsonl:", "b.jsonl:"]


def test_a_store_without_examples_is_an_error(tmp_path):
    with pytest.raises(InputError, match="2 are longer"):
        make_store(tmp_path, [{"prompt": "x" * 300, "completion": "y"}] * 2)

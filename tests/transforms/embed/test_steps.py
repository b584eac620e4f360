"""The embedding step: a vector a row, equal texts once, reasons for what has none, nothing computed twice."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from schemas import flight
from schemas.errors import ModelError
from tests.helpers import fates, in_flight
from tests.transforms.embed.fakes import LetterEncoder
from transforms.embed import steps
from transforms.embed.steps import EmbedOptions, embed_text
from transforms.embed.text import TextTemplate
from transforms.embed.vectors import from_arrow
from transforms.shards.cache import RequestCache

TEXTS = ["tea", None, "  \n", "a b c " * 20, "tea", "###", "東京 z"]


def embed(texts, encoder=None, options=None, **more):
    batch = in_flight(texts)
    encoder = encoder or LetterEncoder()
    return embed_text(batch, TextTemplate("{text}"), encoder, options or EmbedOptions(), **more)


def info(batch, name="embedding"):
    return flight.attribute(batch, f"{name}_info").to_pylist()


def test_every_row_gets_a_vector_or_a_reason():
    count = Counter()
    batch = embed(TEXTS, count=lambda name, n: count.update({name: n}))
    vectors, missing = from_arrow(flight.attribute(batch, "embedding"))
    assert [r["status"] for r in info(batch)] == ["ok", "empty", "empty", "truncated", "ok", "null", "ok"]
    assert missing.tolist() == [False, True, True, False, False, True, False]
    np.testing.assert_array_equal(vectors[0], vectors[4])
    np.testing.assert_allclose(np.linalg.norm(vectors[~missing], axis=1), 1, atol=1e-6)
    assert [r["tokens"] for r in info(batch)] == [3, 0, 0, 120, 3, 3, 4]
    assert info(batch)[1]["norm"] is None and info(batch)[0]["norm"] == pytest.approx(3**0.5)
    assert count["embed.ok"] == 3 and count["embed.empty"] == 2 and count["embed.truncated"] == 1
    assert count["embed.duplicates"] == 1 and fates(batch) == [0] * 7


def test_long_texts_averaged_are_said_to_be():
    batch = embed(TEXTS, options=EmbedOptions(long="mean"))
    assert info(batch)[3]["status"] == "mean" and info(batch)[3]["windows"] == 3


def test_equal_texts_are_embedded_once_and_long_ones_first():
    encoder = LetterEncoder()
    embed(TEXTS, encoder)
    (called,) = encoder.calls
    assert sorted(called) == sorted({"tea", "a b c " * 20, "###", "東京 z"})
    assert called[0] == "a b c " * 20


def test_int8_has_a_scale_a_row_and_other_names_are_kept_apart():
    batch = embed(TEXTS, options=EmbedOptions(store="int8", dimensions=10), attribute="dense")
    scales = flight.attribute(batch, "dense_scale")
    assert flight.attribute(batch, "dense").type == pa.list_(pa.int8(), 10)
    assert [s is None for s in scales.to_pylist()] == [False, True, True, False, False, True, False]
    exact = from_arrow(flight.attribute(embed(TEXTS, options=EmbedOptions(dimensions=10)), "embedding"))[0]
    near = from_arrow(flight.attribute(batch, "dense"), scales)[0]
    np.testing.assert_allclose(near, exact, atol=0.004)


def test_a_row_the_model_overflows_on_dies_alone():
    batch = embed(["tea", "wild ~ text", "b"])
    assert fates(batch) == [flight.KEPT, flight.DEAD, flight.KEPT]
    assert "not finite" in batch.column(flight.ERROR).to_pylist()[1]


def test_a_model_that_always_overflows_stops_the_run():
    with pytest.raises(ModelError, match="not finite; try --dtype float32"):
        embed(["~a", "~b", "~c", "d"])


def test_no_rows_give_the_columns_all_the_same():
    batch = embed([])
    assert flight.attribute(batch, "embedding").type == pa.list_(pa.float32(), 26)
    assert embed(["", None]).num_rows == 2


def test_what_took_long_is_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_PART_CHARACTERS", 40)
    monkeypatch.setattr(steps, "CHECKPOINT_SECONDS", -1)
    cache = RequestCache(str(tmp_path / "cache"))
    texts = [f"text number {chr(97 + i)}{'x' * i}" for i in range(9)]
    expected = embed(texts)

    class Dies(LetterEncoder):
        def embed(self, texts, **more):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().embed(texts, **more)

    with pytest.raises(KeyboardInterrupt):
        embed(texts, Dies(), cache=cache)
    encoder, count = LetterEncoder(), Counter()
    batch = embed(texts, encoder, cache=cache, count=lambda name, n: count.update({name: n}))
    assert 0 < count["embed.from_cache"] == len(texts) - sum(map(len, encoder.calls))
    for name in ("embedding", "embedding_info"):
        assert flight.attribute(batch, name).equals(flight.attribute(expected, name))


def test_another_prompt_is_another_vector_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "CHECKPOINT_SECONDS", -1)
    cache = RequestCache(str(tmp_path / "cache"))
    plain = embed(["tea"], cache=cache)
    other = embed(["tea"], options=EmbedOptions(prompt="zzz"), cache=cache)
    again = embed(["tea"], options=EmbedOptions(prompt="zzz"))
    assert flight.attribute(other, "embedding").equals(flight.attribute(again, "embedding"))
    assert not flight.attribute(other, "embedding").equals(flight.attribute(plain, "embedding"))

import apache_beam as beam
import pyarrow as pa
import pytest

from schemas import flight
from tests.helpers import Fail, Replace, fates
from transforms.shards.eager import run_eagerly
from transforms.shards.keys import ShardKey


def batch(*texts):
    return pa.record_batch({"text": pa.array(texts, pa.string())})


class Backwards(beam.PTransform):
    """A transform of its own, which says in the rows what key each came with."""

    def expand(self, units):
        return units | beam.Map(
            lambda pair: (pair[0], pair[1].append_column("key", pa.array([str(pair[0])] * pair[1].num_rows)))
        )


def test_a_step_runs_inside_its_transform_and_its_rows_come_back():
    table = run_eagerly(Replace(), [batch("an idiot", "fine"), batch("idiot idiot")])
    assert table.column("text").to_pylist() == ["an person", "fine", "person person"]
    assert table.column("_tamis.attr.hits").to_pylist() == [1, 0, 2]
    assert table.column(flight.ID).to_pylist() == ["eager#0", "eager#1", "eager#2"]
    assert table.schema.metadata is None


def test_rows_a_step_fails_on_are_dead_and_the_rest_goes_on():
    table = run_eagerly(Fail(), [batch("a", "poison", "b"), batch("c")])
    assert fates(table) == [flight.KEPT, flight.DEAD, flight.KEPT, flight.KEPT]


def test_rows_come_back_in_key_order_whatever_order_they_went_in():
    pairs = [
        (ShardKey("b", 0, 0), batch("4")),
        (ShardKey("a", 1, 2), batch("3")),
        (ShardKey("a", 0, 0), batch("1", "2")),
    ]
    table = run_eagerly(Backwards(), pairs)
    assert table.column("text").to_pylist() == ["1", "2", "3", "4"]
    assert table.column("key").to_pylist() == ["a[0]@0", "a[0]@0", "a[1]@2", "b[0]@0"]


def test_no_batches_no_rows():
    assert run_eagerly(Replace(), []).num_rows == 0


def test_a_transform_that_gives_something_else_is_refused():
    with pytest.raises(TypeError, match=r"expects \(ShardKey, RecordBatch\)"):
        run_eagerly(beam.Map(lambda pair: pair[0].shard), [batch("a")])


def test_the_id_column_and_the_seed_reach_the_step():
    class Seed:
        label = "Seed"

        def setup(self, context): ...

        def __call__(self, batch, context):
            return flight.set_attribute(batch, "seed", pa.repeat(pa.scalar(context.seed), batch.num_rows))

    with_ids = pa.record_batch({"text": ["a", "b"], "doc": ["x", None]})
    table = run_eagerly(Seed(), [with_ids], id_column="doc", seed=7)
    assert table.column(flight.ID).to_pylist() == ["x", "eager#1"]
    assert table.column("_tamis.attr.seed").to_pylist() == [7, 7]

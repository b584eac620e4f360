"""What travels between workers, and what they say of their work."""

import pickle
import uuid
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.coders import registry
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import TamisError
from tests.helpers import in_flight
from transforms.shards.coders import RecordBatchCoder, ShardKeyCoder
from transforms.shards.events import EVENTS, EventLog, read_events
from transforms.shards.files import Folder
from transforms.shards.keys import ShardKey

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1)


@given(st.builds(ShardKey, NAMES, st.integers(0, 10**9), st.integers(0, 2**62)))
@settings(deadline=None)
def test_a_key_comes_back_as_it_was(key):
    coder = ShardKeyCoder()
    assert coder.decode(coder.encode(key)) == key
    assert coder.is_deterministic() and pickle.loads(pickle.dumps(key)) == key


def test_a_batch_comes_back_with_its_metadata_and_without_its_parent():
    table = pa.table(
        {"text": ["a long text" * 1000] * 1000, "kind": pa.array(["x"] * 1000).dictionary_encode()}
    )
    parent = table.to_batches()[0]
    batch = parent.slice(500, 1).replace_schema_metadata({"tamis.counters": "{}"})
    coder = RecordBatchCoder()
    encoded = coder.encode(batch)
    assert len(encoded) < 20_000 < parent.nbytes / 100
    back = coder.decode(encoded)
    assert back.equals(batch, check_metadata=True)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_batch_in_flight_comes_back(rows):
    batch = in_flight(["t"] * rows)
    coder = RecordBatchCoder()
    assert coder.decode(coder.encode(batch)).equals(batch, check_metadata=True)


def test_beam_uses_these_coders():
    hint = beam.typehints.Tuple[ShardKey, pa.RecordBatch]
    coder = registry.get_coder(hint)
    assert [type(c) for c in coder._coders] == [ShardKeyCoder, RecordBatchCoder]


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path):
    if request.param == "local":
        yield Folder(str(tmp_path / "out"))
        return
    folder = Folder(f"memory://out-{uuid.uuid4().hex}")
    yield folder
    folder.remove("")


def test_events_of_all_workers_are_read_in_order_of_time(output):
    one, two = EventLog(output), EventLog(output)
    for i in range(3):
        (one if i % 2 else two).emit("unit", unit=i, text="é")
    events = read_events(output)
    assert [e["unit"] for e in events] == [0, 1, 2]
    assert len({e["worker"] for e in events}) == 2
    assert all(e["kind"] == "unit" and e["text"] == "é" and e["t"] > 0 for e in events)


def test_no_events_yet(output):
    assert read_events(output) == []


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path):
    output = Folder(str(tmp_path))
    EventLog(output).emit("unit", unit=1)
    path = tmp_path / EVENTS / "killed.jsonl"
    path.write_bytes(b'{"t": 1.0, "kind": "unit", "unit": 0}\n{"t": 2.0, "ki')
    assert [e["unit"] for e in read_events(output)] == [0, 1]


def test_pulses_are_seldom(output):
    log = EventLog(output)
    for _ in range(50):
        log.pulse(step="Slow")
    assert [e["kind"] for e in read_events(output)] == ["progress"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    log = EventLog(Folder(str(tmp_path)))
    log.emit("unit")
    (path,) = (tmp_path / EVENTS).iterdir()
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(TamisError, match=r"No space left on device.*run the same command again"):
        log.emit("unit")

"""What no format recognises is said by what stands there."""

import pytest

from schemas.errors import InputError
from transforms.retrieval.formats import read


def test_an_empty_folder_a_torn_file_and_other_columns_are_told_apart(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        read(str(tmp_path / "empty"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"torn\.parquet cannot be read"):
        read(str(tmp_path / "torn.parquet"))
    (tmp_path / "other.jsonl").write_text('{"query_id": "q", "colour": 1}\n')
    with pytest.raises(InputError, match="columns: colour, query_id"):
        read(str(tmp_path / "other.jsonl"))

"""Records on disk: what is written is what is read, and a folder that is not whole is refused."""

import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest

from zipir_jax.data import records
from zipir_jax.data.records import Records, ShardWriter, write_records

COUNT = 23
RECORDS = [{"number": n, "data": bytes([n]) * 40 * n, "name": f"früh {n}"} for n in range(COUNT)]


@pytest.fixture(name="folder")
def make_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 2000)
    write_records(tmp_path / "out", "some.json", RECORDS, {"maker": "me"})
    return tmp_path / "out"


def shards(folder):
    return sorted(path.name for path in folder.glob("*.array_record"))


def read_all(folder):
    return list(Records(folder, "some.json"))


def test_what_is_written_is_what_is_read_in_any_order(folder):
    assert len(shards(folder)) > 4
    found = Records(folder, "some.json")
    assert len(found) == COUNT and found.index["maker"] == "me"
    for index in np.random.default_rng(0).permutation(COUNT).tolist():
        assert found[index] == RECORDS[index]
    for wrong in (-1, COUNT):
        with pytest.raises(IndexError, match=f"record {wrong} does not lie within 0 to 22"):
            found[wrong]


def test_a_shard_ends_when_it_is_full(folder):
    index = json.loads((folder / "some.json").read_text())
    assert [shard["file"] for shard in index["shards"]] == shards(folder)
    assert shards(folder)[0] == "some-00000.array_record"
    start = 0
    for shard in index["shards"]:
        held = [len(record["data"]) for record in RECORDS[start : start + shard["records"]]]
        assert sum(held[:-1]) < 2000  # before the last one there was room
        start += shard["records"]
    assert start == COUNT


def test_no_records_are_a_folder_as_well(tmp_path):
    write_records(tmp_path, "none.json", [], {})
    assert len(Records(tmp_path, "none.json")) == 0
    with pytest.raises(IndexError):
        Records(tmp_path, "none.json")[0]


def test_half_a_character_in_a_text_survives(tmp_path):
    write_records(tmp_path, "some.json", [{"caption": "a \ud83d"}], {})  # as a JSON file may hold it
    assert Records(tmp_path, "some.json")[0] == {"caption": "a \ud83d"}


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_pickled_records_open_their_files_anew(folder, pickler):
    found = Records(folder, "some.json")
    found[0]
    data = pickler.dumps(found)
    assert len(data) < 500
    again = pickler.loads(data)
    assert [again[index] for index in range(COUNT)] == RECORDS


def test_threads_share_a_few_readers(folder, monkeypatch):
    monkeypatch.setattr(records, "OPEN_SHARDS", 2)
    found = Records(folder, "some.json")
    assert len(found._readers) == 0  # opened when they are read
    start = threading.Barrier(8)

    def read(seed):
        start.wait()
        order = np.random.default_rng(seed).permutation(COUNT).tolist() * 5
        return all(found[index] == RECORDS[index] for index in order) and len(found._readers) <= 2

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_folder_that_holds_an_index_is_left_alone(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"out holds some\.json already: choose another output"):
        write_records(folder, "some.json", RECORDS[:2], {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_records(folder, "other.json", RECORDS[:2], {})  # of another kind
    assert len(Records(folder, "other.json")) == 2 and read_all(folder) == RECORDS


def test_an_error_within_leaves_no_index_and_the_next_run_writes_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 500)

    def failing():
        yield from RECORDS[:15]
        raise RuntimeError("out of memory")  # an accelerator's, and not taken for the disk's

    with pytest.raises(RuntimeError, match="out of memory"):
        write_records(tmp_path, "some.json", failing(), {})
    assert len(shards(tmp_path)) > 2
    with pytest.raises(ValueError, match=r"some\.json: cannot be read \(No such file"):
        Records(tmp_path, "some.json")
    write_records(tmp_path, "some.json", RECORDS[:3], {})
    assert read_all(tmp_path) == RECORDS[:3]


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    writer = ShardWriter(tmp_path / "a.array_record")
    writer.write(RECORDS[3])
    assert writer.bytes > 120 and not (tmp_path / "a.array_record").exists()
    entry = writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.array_record"]
    assert entry == {
        "file": "a.array_record",
        "records": 1,
        "bytes": (tmp_path / entry["file"]).stat().st_size,
    }


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/out: cannot be written to"):
        write_records(tmp_path / "file" / "out", "some.json", RECORDS, {})
    with pytest.raises(ValueError, match=r"missing/a\.array_record: cannot be written"):
        ShardWriter(tmp_path / "missing" / "a.array_record").close()


def edit(folder, change):
    index = json.loads((folder / "some.json").read_text())
    change(index)
    (folder / "some.json").write_text(json.dumps(index))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def move_record(index):
    index["shards"][0]["records"] += 1
    index["shards"][1]["records"] -= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "some-00002.array_record").unlink(),
            r"some-00002\S+: no such file, but some\.json names",
        ),
        (
            lambda f: truncate(f / "some-00001.array_record"),
            r"some-00001\S+: holds \d+ bytes instead of the \d+",
        ),
        (
            lambda f: edit(f, move_record),
            r"some-00000\S+: holds (\d+) records instead of the \d+ that its index",
        ),
        (
            lambda f: edit(f, lambda index: index.pop("maker")),
            r"some\.json: not the index of a folder of shards",
        ),
        (
            lambda f: edit(f, lambda index: index.pop("shards")),
            r"some\.json: not the index of a folder of shard",
        ),
        (
            lambda f: edit(f, lambda index: index.update(format=7)),
            r"some\.json: of format 7, not 1; make the fold",
        ),
        (lambda f: (f / "some.json").write_text("[1"), r"some\.json: not the index of a folder of shards"),
        (lambda f: (f / "some.json").unlink(), r"some\.json: cannot be read \(No such file"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message) as raised:
        list(Records(folder, "some.json", ("maker",)))
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_record_is_named_and_the_others_are_read(folder):
    path = folder / "some-00000.array_record"
    data = bytearray(path.read_bytes())
    data[data.index("früh 2".encode()) + 2] ^= 255
    path.write_bytes(data)
    found = Records(folder, "some.json")
    with pytest.raises(ValueError, match=r"some-00000\.array_record: record 2 is damaged \("):
        found[2]
    assert found[1] == RECORDS[1] and found[COUNT - 1] == RECORDS[-1]


def test_a_column_is_memory_mapped_and_checked(folder):
    numbers = np.arange(COUNT, dtype=np.int32)
    np.save(folder / "numbers.npy", numbers)
    found = Records(folder, "some.json")
    column = found.column("numbers.npy", (COUNT,), np.int32)
    assert isinstance(column, np.memmap)
    np.testing.assert_array_equal(column, numbers)
    with pytest.raises(
        ValueError, match=r"numbers\.npy: int32 \(23,\) instead of the int32 \(22,\) of its index"
    ):
        found.column("numbers.npy", (22,), np.int32)
    with pytest.raises(ValueError, match=r"numbers\.npy: int32 \(23,\) instead of the float32"):
        found.column("numbers.npy", (COUNT,), np.float32)
    with pytest.raises(ValueError, match=r"nothing\.npy: cannot be read"):
        found.column("nothing.npy", (COUNT,), np.int32)

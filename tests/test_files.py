"""Files that appear whole or not at all."""

import os

import pytest

from zipir_jax.files import replacing


def write(path, content):
    with replacing(path) as file:
        file.write(content)


def test_a_file_is_replaced_when_the_block_ends_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "deep" / "er" / "a.bin"
    write(path, b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.bin"]


def test_an_error_within_the_block_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write(tmp_path / "a.bin", b"old")
    with pytest.raises(KeyError), replacing(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise KeyError
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    write(tmp_path / "a.bin", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "a.bin")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_neither_a_folder_nor_a_pipe_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name}: exists and is not a regular file"):
            write(tmp_path / name, b"")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]

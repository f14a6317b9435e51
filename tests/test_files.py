"""Files that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from zipir_jax.files import check_writable, replacing


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
    with pytest.raises(ValueError, match="File name too long"):
        write(tmp_path / ("x" * 300), b"")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_folder_is_found_unwritable_without_being_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folders")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("relative"))
    for folder, blocker in [("file", "file"), ("file/below", "file"), ("astray/below", "astray")]:
        with pytest.raises(ValueError) as raised:
            check_writable(tmp_path / folder)
        assert str(raised.value) == (
            f"{tmp_path / folder}: cannot be written to ({tmp_path / blocker} is not a folder)"
        )
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"new: cannot be written to \(no permission to write in .*\)"):
        check_writable(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["astray", "file"]

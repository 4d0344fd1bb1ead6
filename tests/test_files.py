"""Files are replaced as a whole, and what goes wrong is one OSError that names the file."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hqqlora.files import (
    check_writable,
    creating_folder,
    remove_folder,
    remove_leavings,
    replacing_file,
    write_json,
    write_safetensors,
    write_torch,
)


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing fails midway, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_contents_are_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [None, True]})
    text = (tmp_path / "a.json").read_text()
    assert text == '{\n  "a": [\n    null,\n    true\n  ],\n  "b": 1\n}\n'
    tensors = {"x": torch.arange(6).reshape(2, 3).T, "y": torch.ones(2, requires_grad=True)}
    write_safetensors(tmp_path / "t.safetensors", tensors)
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "t.safetensors"]


def test_a_file_is_replaced_only_when_its_successor_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway() -> None:
        with replacing_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_are_those_of_the_umask_or_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    before = os.umask(0o027)
    try:
        write_json(path, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    write_json(path, {})
    assert path.stat().st_mode & 0o777 == 0o604


def test_safetensors_files_are_as_readable_as_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_symbolic_link_that_the_user_has_named_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", {}, follow_link=True)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "{}\n"


def test_a_symbolic_link_found_in_a_folder_is_replaced(tmp_path: Path) -> None:
    """The folder may come from elsewhere, and the link may lead anywhere."""
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("a.json", "b.safetensors", "c.pt"):
        (tmp_path / "folder" / name).symlink_to("../outside")
    with creating_folder(tmp_path / "folder") as place:
        write_json(place / "a.json", {})
        write_safetensors(place / "b.safetensors", {"b": torch.ones(2)})
    write_torch(tmp_path / "folder/c.pt", torch.ones(3))
    assert (tmp_path / "outside").read_text() == "mine"
    assert not any(path.is_symlink() for path in (tmp_path / "folder").iterdir())
    assert (tmp_path / "folder/a.json").read_text() == "{}\n"


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    abandoned = [tmp_path / f".a.json.{i:012x}.tmp" for i in range(3)]
    abandoned[0].write_text("half")
    abandoned[1].mkdir()
    (abandoned[1] / ".tmpG1Kjuz").write_text("of safetensors")
    abandoned[2].symlink_to("mine")
    others = [tmp_path / ".a.json.0000000000aa.tmp~", tmp_path / ".b.json.0000000000aa.tmp"]
    for path in (*others, tmp_path / "mine"):
        path.write_text("mine")
    with replacing_file(tmp_path / "a.json") as first:
        first.write_text("1")
        with replacing_file(tmp_path / "a.json") as second:
            second.write_text("2")
        assert first.exists()
    assert (tmp_path / "a.json").read_text() == "1"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.json", "mine", abandoned[2].name, *(path.name for path in others)}


def test_a_folder_is_tried_without_a_trace_and_a_kill_at_it_leaves_none_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "unlink", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        check_writable(tmp_path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_in_a_folder_that_exists_leaves_all_of_it_as_it_was(tmp_path: Path) -> None:
    """Weights of one adapter and the configuration of another would load, and be wrong."""
    write_safetensors(tmp_path / "weights.safetensors", {"a": torch.ones(2)})
    write_json(tmp_path / "config.json", {"r": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (  # noqa: PT012 (the second write is what fails)
        disk_with_room_for(1000),
        pytest.raises(OSError, match="cannot write") as caught,
        creating_folder(tmp_path) as place,
    ):
        write_safetensors(place / "weights.safetensors", {"a": torch.zeros(2)})
        write_json(place / "config.json", {"x": "y" * 10_000})
    assert caught.value.filename == str(tmp_path / "config.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_torch_saves_a_full_disk_as_an_oserror(tmp_path: Path) -> None:
    """torch.save itself raises RuntimeError."""
    (tmp_path / "c.pt").write_bytes(b"old")
    with disk_with_room_for(1000), pytest.raises(OSError, match="cannot write") as caught:
        write_torch(tmp_path / "c.pt", torch.zeros(10_000))
    assert caught.value.filename == str(tmp_path / "c.pt")
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "c.pt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_folder_is_removed_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/config.json").write_text("{}")
    with monkeypatch.context() as patch:  # killed after the rename
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        remove_folder(tmp_path / "adapter")
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".adapter.")
    remove_leavings(tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_an_oserror_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    with disk_with_room_for(1000), pytest.raises(OSError, match="cannot write") as caught:
        write_safetensors(path, {"x": torch.zeros(10_000)})
    assert caught.value.filename == str(path)
    assert caught.value.errno == errno.EFBIG
    with disk_with_room_for(1000), pytest.raises(OSError, match="cannot write") as caught:
        write_json(tmp_path / "c.json", {"x": "y" * 10_000})
    assert caught.value.filename == str(tmp_path / "c.json")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_a_full_disk_that_shows_only_as_data_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(tmp_path / "c.json", {})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "c.json")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_an_oserror_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "c.json", tmp_path / "file" / "c.json"):
        with pytest.raises(OSError, match="cannot write") as caught:
            write_json(path, {})
        assert caught.value.filename == str(path)

    def read_only(*arguments: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match="cannot write: Read-only file system") as caught:
        write_json(tmp_path / "c.json", {})
    assert caught.value.filename == str(tmp_path / "c.json")


class TestCreatingFolder:
    def test_a_new_folder_appears_with_all_its_files(self, tmp_path: Path) -> None:
        path = tmp_path / "parent" / "folder"
        with creating_folder(path) as place:
            write_json(place / "a.json", {})
            assert not path.exists()
        assert os.listdir(path) == ["a.json"]
        assert os.listdir(path.parent) == ["folder"]

    def test_or_not_at_all(self, tmp_path: Path) -> None:
        def fail_halfway() -> None:
            with creating_folder(tmp_path / "folder") as place:
                write_json(place / "a.json", {})
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail_halfway()
        assert os.listdir(tmp_path) == []

    def test_an_error_names_the_folder_that_was_wanted(self, tmp_path: Path) -> None:
        path = tmp_path / "folder"
        with (
            disk_with_room_for(100),
            pytest.raises(OSError, match="cannot write") as caught,
            creating_folder(path) as place,
        ):
            write_json(place / "c.json", {"x": "y" * 10_000})
        assert caught.value.filename == str(path / "c.json")
        assert os.listdir(tmp_path) == []

    def test_a_folder_that_exists_keeps_its_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "other").write_text("mine")
        (tmp_path / "a.json").write_text("old")
        with creating_folder(tmp_path) as place:
            write_json(place / "a.json", {})
        assert (tmp_path / "a.json").read_text() == "{}\n"
        assert (tmp_path / "other").read_text() == "mine"

    def test_a_file_in_its_place_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "folder").write_text("mine")
        with (
            pytest.raises(NotADirectoryError, match="not a folder"),
            creating_folder(tmp_path / "folder"),
        ):
            pass
        with (
            pytest.raises(OSError, match="cannot write"),
            creating_folder(tmp_path / "folder" / "inner"),
        ):
            pass
        assert (tmp_path / "folder").read_text() == "mine"

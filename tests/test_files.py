"""Files of commands: proven writable without a trace, then whole or not there; refused with path and cause."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skvr_dist.errors import UserError
from skvr_dist.files import (
    append_line,
    as_json,
    local_path,
    prove_folder,
    prove_new_folder,
    prove_writable,
    published,
    require_file,
    write_whole,
)


def test_groups_of_tests_reach_xdist(request: pytest.FixtureRequest) -> None:
    """Or each of its processes would make the fixtures of a module again (`tests/conftest.py`)."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@test_files")


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_proven_then_written_whole(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("before")
    for file in (new, old):
        assert prove_writable(file) == file
    assert everything(tmp_path) == ["old.json"] and old.read_text() == "before"
    write_whole(new, "text")
    write_whole(old, b"\xff")
    assert (new.read_text(), old.read_bytes()) == ("text", b"\xff")
    assert everything(tmp_path) == ["new.json", "old.json"]
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~umask


def test_folders_are_proven_without_a_trace(tmp_path: Path) -> None:
    assert prove_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    prove_writable(tmp_path / "a" / "b" / "c.json", make_folder=True)
    prove_folder(tmp_path)
    assert everything(tmp_path) == []
    with pytest.raises(UserError, match=r"cannot write .*a/b/c.json: No such file or directory"):
        prove_writable(tmp_path / "a" / "b" / "c.json")


@pytest.mark.parametrize("prove", [prove_folder, prove_writable, lambda path: prove_writable(path, make_folder=True)])
def test_what_stands_in_the_way_is_named(tmp_path: Path, prove: object) -> None:
    assert callable(prove)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/below: .*/file is not a folder"):
        prove(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"cannot write .*x{300}: File name too long"):
        prove(tmp_path / ("x" * 300))
    assert everything(tmp_path) == ["file"]


def test_a_dash_is_no_name_of_a_file() -> None:
    with pytest.raises(UserError, match=r"cannot write -: .*; for the standard output give /dev/stdout"):
        prove_writable("-")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*: it is a folder"):
        prove_writable(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        write_whole(tmp_path, "text")


def test_a_full_disk_is_found_before_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that is always full stands for the file beside."""
    file = tmp_path / "file.json"
    write_whole(file, "before")
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *_, **options: os.fdopen(os.dup(full), "wb", **options))
            for prove in (prove_writable, prove_folder):
                with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
                    prove(file.parent if prove is prove_folder else file)
            patch.setattr(Path, "write_bytes", lambda _, data: os.write(full, data))
            with pytest.raises(UserError, match=r"cannot write .*file.json: No space left on device"):
                write_whole(file, "after")
    finally:
        os.close(full)
    assert file.read_text() == "before" and everything(tmp_path) == ["file.json"]


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("target/file.json")
    prove_writable(link)
    write_whole(link, "text")
    assert link.is_symlink() and (tmp_path / "target" / "file.json").read_text() == "text"
    prove_writable("/dev/null")
    write_whole(Path("/dev/null"), "text")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=rf"cannot read .*: it is {kind}, not a regular file"):
            require_file(path)


@given(scheme=st.from_regex(r"\A[a-zA-Z][a-zA-Z0-9+.-]{1,8}\Z"), rest=st.text("abc/.~", max_size=5))
def test_urls_are_no_paths(scheme: str, rest: str) -> None:
    for text in (f"{scheme}://{rest}", Path(f"{scheme}://{rest}")):
        if "/" in str(text):
            with pytest.raises(UserError, match="is a URL, but only paths of this machine"):
                local_path(text)


def test_the_home_folder_is_meant_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/data") == tmp_path / "data"
    assert local_path("data/a:b") == Path("data/a:b")
    for text, message in (
        ("~nobody-here/x", "no user of this machine"),
        ("", "'' is no path"),
        ("a\0b", "is no path"),
        ("\ud800", "is no path"),
    ):
        with pytest.raises(UserError, match=message):
            local_path(text)


def test_a_folder_is_published_whole_and_with_the_usual_rights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with published(tmp_path / "in/out") as folder:
            (folder / "weights").write_bytes(b"1")
            (folder / "weights").chmod(0o600)
            assert not (tmp_path / "in/out").exists()
    finally:
        os.umask(before)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert (tmp_path / "in/out/weights").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), published(tmp_path / "out"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/out: "), published(tmp_path / "file/out"):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full/already").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder; choose another one, or remove it first"):
        prove_new_folder(tmp_path / "full")


def test_json_is_what_every_reader_takes() -> None:
    record = {"norm": float("nan"), "loss": [float("inf"), 1.5], "step": 3}
    assert as_json(record) == '{"norm": null, "loss": [null, 1.5], "step": 3}'


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """Libraries in Rust say it in errors of their own."""
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "file"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        with (
            pytest.raises(UserError, match=r"cannot write .*/above/out: No space left on device; make room, or choose"),
            published(tmp_path / "above/out") as folder,
        ):
            (folder / "half").touch()
            raise error
        assert not list(tmp_path.iterdir())


def test_a_line_is_added_whole_or_the_full_disk_is_named(tmp_path: Path) -> None:
    append_line(tmp_path / "log.jsonl", "one")
    append_line(tmp_path / "log.jsonl", "zwölf")
    assert (tmp_path / "log.jsonl").read_text() == "one\nzwölf\n"
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        append_line(Path("/dev/full"), "one")


def test_a_folder_that_can_be_made_is_proven_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    before = everything(tmp_path)
    assert prove_new_folder(tmp_path / "a/b") == tmp_path / "a/b"
    assert prove_new_folder(tmp_path / "link") == tmp_path / "empty"  # what a link leads to can be replaced
    for name, message in (("file", "exists and is not an empty folder"), ("x" * 300, "File name too long")):
        with pytest.raises(UserError, match=message):
            prove_new_folder(tmp_path / name)
    with pytest.raises(UserError, match="is not a folder"):
        prove_new_folder(tmp_path / "file/below")
    with pytest.raises(UserError, match="is a URL"):
        prove_new_folder("s3://bucket/x")
    assert everything(tmp_path) == before

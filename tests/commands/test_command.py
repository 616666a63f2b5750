"""How a command ends, whatever ends it: exit codes and sentences of real processes."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from skvr_dist.command import Figure, conclude, usable_device, write_json
from skvr_dist.config.presets import find_config, preset_names
from skvr_dist.errors import UserError

ROOT = Path(__file__).parents[2]
IMPORTS = "import sys, time\nfrom skvr_dist.command import *\nfrom skvr_dist.errors import *\n"


def environment(**variables: str) -> dict[str, str]:
    """Buffered as a user's is, and no rank of a launcher."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **variables}


def script(folder: Path, body: str, call: str = "run_command(main)") -> list[str]:
    """The command line of a file whose `main` has that body."""
    file = folder / "small.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(f"{IMPORTS}\ndef main():\n{lines}\n{call}\n")
    return [sys.executable, str(file)]


def ended(command: list[str], **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def one_sentence(stderr: str) -> str:
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("body", "code"),
    [("return None", 0), ("return 1", 1), ("raise UserError('no')", 2), ("raise RunInterrupted('again')", 75)],
)
def test_what_is_foreseen_has_its_exit_code(tmp_path: Path, body: str, code: int) -> None:
    assert ended(script(tmp_path, body))[0] == code


def test_what_nobody_foresaw_ends_with_one_sentence_and_a_file(tmp_path: Path) -> None:
    code, _, stderr = ended(script(tmp_path, "print('begun')\n{}['two\\nlines']"), TMPDIR=str(tmp_path))
    assert code == 70
    said = re.fullmatch(
        r"small.py met what nobody foresaw, KeyError: 'two\\nlines'; the traceback is in (.*)", one_sentence(stderr)
    )
    assert said is not None
    kept = Path(said[1])
    assert kept.parent == tmp_path
    assert "Traceback (most recent call last)" in kept.read_text() and "in main" in kept.read_text()


def test_the_traceback_of_a_run_is_in_its_log(tmp_path: Path) -> None:
    body = (
        f"import logging\nlogging.getLogger('skvr_dist').addHandler(logging.FileHandler(r'{tmp_path}/rank.log'))\n1 / 0"
    )
    code, _, stderr = ended(script(tmp_path, body))
    assert code == 70 and f"ZeroDivisionError: division by zero; the traceback is in {tmp_path}/rank.log" in stderr
    assert "Traceback (most recent call last)" in (tmp_path / "rank.log").read_text()


def test_a_traceback_that_no_file_takes_is_printed(tmp_path: Path) -> None:
    code, _, stderr = ended(script(tmp_path, "import tempfile\ntempfile.tempdir = '/absent'\n1 / 0"))
    assert code == 70 and "no file could take the traceback" in stderr and "in main" in stderr


def test_control_c_ends_with_a_sentence(tmp_path: Path) -> None:
    command = script(tmp_path, "print('up', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_sentence(stderr) == "small.py was interrupted (Ctrl-C) before it was through"


def test_control_c_that_an_import_swallows_counts(tmp_path: Path) -> None:
    body = (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\nexcept BaseException:\n"
        "    raise ImportError('half a module') from None"
    )
    code, _, stderr = ended(script(tmp_path, body))
    assert code == 130 and one_sentence(stderr) == "small.py was interrupted (Ctrl-C) before it was through"


def test_control_c_before_a_command_begins(tmp_path: Path) -> None:
    begin = "import os, signal, skvr_dist.commands\nos.kill(os.getpid(), signal.SIGINT)\nprint('not here')"
    (tmp_path / "tool.py").write_text(begin)
    code, stdout, stderr = ended([sys.executable, str(tmp_path / "tool.py")])
    assert (code, stdout) == (130, "") and one_sentence(stderr) == "tool.py was interrupted (Ctrl-C) before it began"


@pytest.mark.parametrize("leave", [True, False])
def test_no_bar_stays_on_the_terminal(tmp_path: Path, leave: bool) -> None:
    bar = f"from tqdm import tqdm\nbar = tqdm(total=9, leave={leave})\nbar.update(3)\nbar.refresh()"
    code, _, stderr = ended(script(tmp_path, f"{bar}\nraise UserError('no')"))
    *_, before, last = stderr.splitlines()  # each return of the carriage begins a line here
    assert code == 2 and last == "error: no" and not before.strip()


def test_the_end_of_a_thread_is_no_traceback_on_the_terminal(tmp_path: Path) -> None:
    body = "import threading\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()"
    code, stdout, stderr = ended(script(tmp_path, body), TMPDIR=str(tmp_path))
    assert (code, stdout, stderr) == (0, "", "")
    assert "ZeroDivisionError" in next(tmp_path.glob("*.traceback")).read_text()


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    code, _, stderr = ended(script(tmp_path, "open('/dev/null/x')"))
    assert code == 2 and one_sentence(stderr) == "small.py cannot use /dev/null/x: Not a directory; put it in order"


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(tmp_path: Path, lines: int, unbuffered: str) -> None:
    """In a print, in the flush at the end, and not once more when the interpreter ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = script(tmp_path, f"for number in range({lines}):\n    print(number)")
    done = subprocess.run(
        command, env=environment(PYTHONUNBUFFERED=unbuffered), stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_help_into_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "tools/retention.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_connection_is_no_closed_pipe(tmp_path: Path) -> None:
    code, _, stderr = ended(script(tmp_path, "raise BrokenPipeError(32, 'Broken pipe')"))
    assert code == 70 and "BrokenPipeError" in stderr


@pytest.mark.parametrize(
    "names", [("LOCAL_RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")]
)
def test_the_first_rank_of_a_host_speaks_first(tmp_path: Path, names: tuple[str, str]) -> None:
    """A launcher ends all ranks when one has ended, so the others wait with their end."""
    ranked = script(tmp_path, "raise UserError('all meet this')", "run_command(main, over_ranks=True)")
    ranks = []
    for rank in ("1", "0"):
        variables = environment(**dict(zip(names, (rank, "2"), strict=True)))
        ranks.append(subprocess.Popen(ranked, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True))
    assert ranks[1].communicate(timeout=60)[1] == "error: all meet this\n"
    assert ranks[0].poll() is None
    ranks[0].terminate()
    assert ranks[0].communicate(timeout=60)[1] == ""


def test_who_is_no_rank_speaks(tmp_path: Path) -> None:
    ranked = script(tmp_path, "raise UserError('all meet this')", "run_command(main, over_ranks=True)")
    # One variable that is left over makes no rank, and a tool that does not run over ranks has none.
    assert ended(ranked, LOCAL_RANK="1")[2] == "error: all meet this\n"
    assert ended(ranked, LOCAL_RANK="1", WORLD_SIZE="1")[2] == "error: all meet this\n"
    alone = script(tmp_path, "raise UserError('all meet this')")
    assert ended(alone, LOCAL_RANK="1", WORLD_SIZE="2")[2] == "error: all meet this\n"
    mine = script(tmp_path, "raise OneRankError('mine')", "run_command(main, over_ranks=True)")
    assert ended(mine, LOCAL_RANK="1", WORLD_SIZE="2")[2] == "error: mine\n"


def test_a_tool_with_a_left_over_rank_says_what_is_wrong(tmp_path: Path) -> None:
    tool = [sys.executable, "tools/train_tokenizer.py", "--input", str(tmp_path / "absent"), "--vocab-size", "300"]
    code, _, stderr = ended([*tool, "--output", str(tmp_path / "model")], LOCAL_RANK="1")
    assert code == 2 and str(tmp_path / "absent") in one_sentence(stderr)


def test_a_full_disk_and_no_memory_are_told(tmp_path: Path) -> None:
    code, _, stderr = ended(script(tmp_path, "raise OSError(28, 'No space left on device', '/disk/file')"))
    assert code == 2
    assert one_sentence(stderr) == (
        "cannot write /disk/file: No space left on device; make room, or write to another disk"
    )
    # Packages in other languages hide the cause in a text.
    code, _, stderr = ended(script(tmp_path, "raise RuntimeError('I/O error: No space left on device (os error 28)')"))
    assert code == 2 and "No space left on device; make room" in one_sentence(stderr)
    code, _, stderr = ended(script(tmp_path, "bytearray(1 << 60)"))
    assert code == 2 and "small.py ran out of memory" in one_sentence(stderr)
    with Path("/dev/full").open("w") as full:
        command = script(tmp_path, "print('shown')")
        done = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot write the standard output: No space left on device" in one_sentence(done.stderr)


@pytest.mark.parametrize(
    "tool",
    [
        ["bench.py", "generate"],
        ["verify.py", "reshard"],
        ["verify.py", "experiments"],
        ["export_hf.py", "absent", "out"],
        ["import_hf.py", "absent", "out"],
        ["update_export.py", "absent"],
        ["inspect_checkpoint.py", "absent"],
        ["average.py", "absent", "out"],
        ["retention.py", "absent"],
        ["answers.py", "absent", "absent"],
        ["replay.py", "run", "absent", "--output", "out"],
    ],
    ids=lambda tool: tool[0],
)
def test_a_json_file_that_cannot_be_written_is_refused_before_work(tmp_path: Path, tool: list[str]) -> None:
    file = tmp_path / "absent/figures.json"
    code, stdout, stderr = ended([sys.executable, f"tools/{tool[0]}", *tool[1:], "--json", str(file)])
    assert code == 2 and not stdout
    assert one_sentence(stderr).startswith(f"cannot write {file}: No such file or directory")


def test_what_a_command_reads_is_not_written_over(tmp_path: Path) -> None:
    """Nor is a part of a checkpoint or a data set."""
    config = tmp_path / "mine.yaml"
    config.write_text("include: [tiny.yaml]\n")
    link = tmp_path / "link"
    link.symlink_to(config)
    estimate = [sys.executable, "tools/estimate.py", "train", "--gpus", "8", "--config", str(config), "--json"]
    code, _, stderr = ended([*estimate, str(link)])
    assert code == 2
    assert one_sentence(stderr) == f"--json {link} is what {config} names, too, and would be lost; name another file"
    code, _, stderr = ended([*estimate, str(link), f"data.tokenizer={config}"])
    assert code == 2 and "names, too" in stderr
    listed = {"manifest.json": '{"files": {"checkpoint.json": {"sha256": ""}, "shard-00000.tar": {}}}'}
    for name in ("manifest.json", "manifest.sha256", "checkpoint.json", "shard-00000.json"):
        (tmp_path / name).write_text(listed.get(name, "{}"))
        code, _, stderr = ended(
            [sys.executable, "tools/inspect_checkpoint.py", str(tmp_path), "--json", f"{tmp_path}/{name}"]
        )
        assert (code, one_sentence(stderr)) == (
            2,
            f"{tmp_path}/{name} is part of what {tmp_path}/manifest.json lists; write to another file",
        )
    filler = tmp_path / "text.txt"
    filler.write_text("some text " * 100)
    needle = [sys.executable, "tools/make_retrieval.py", "needle", "--filler", str(filler), "--output", str(filler)]
    code, _, stderr = ended(needle)
    assert code == 2 and one_sentence(stderr).startswith(f"--output {filler} is what {filler} names, too")


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    @dataclass
    class Speed:
        seconds: list[float]

    file = tmp_path / "figures.json"
    write_json(file, {"ratio": math.nan, "speeds": (Speed([1.0, math.inf]),), "steps": 3, "name": "NaN"})
    read = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert read == {"ratio": None, "speeds": [{"seconds": [1.0, None]}], "steps": 3, "name": "NaN"}


def test_a_device_that_is_not_there() -> None:
    assert usable_device("cpu") == "cpu" and usable_device(None) in ("cpu", "cuda")
    with pytest.raises(UserError, match=r"--device abacus is not to be had here .*; use cpu"):
        usable_device("abacus")


def test_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    met, missed = Figure("ratio: 0.90", "1.00", True), Figure("wait: 2 %", "below 1 %", False)
    assert conclude([met], table="| a |", record=[0.9], json_file=tmp_path / "figures.json") == 0
    assert conclude([met, missed], table="| a |", record=[], json_file=None) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("| a |\n\nratio: 0.90; bound 1.00: met\n")
    assert shown.endswith("wait: 2 %; bound below 1 %: missed\n")
    assert json.loads((tmp_path / "figures.json").read_text()) == [0.9]


def test_arguments_stand_in_any_order() -> None:
    for words in (["train.seed=7", "--print-config"], ["--print-config", "train.seed=7"]):
        code, stdout, stderr = ended([sys.executable, "launch/pretrain.py", *words, "--config", "quickstart"])
        assert code == 0 and "  seed: 7\n" in stdout, stderr


def test_presets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = (ROOT / "configs/experiment/quickstart.yaml").resolve()
    for name in ("quickstart", "experiment/quickstart", "quickstart.yaml"):
        assert find_config(name).resolve() == quickstart
    assert set(preset_names()) == {
        str(file.relative_to(ROOT / "configs").with_suffix("")) for file in ROOT.glob("configs/*/*.yaml")
    }
    with pytest.raises(UserError, match=r"cannot read configuration quickstrat: .*; did you mean experiment/quicks"):
        find_config("quickstrat")
    with pytest.raises(UserError, match=r"no preset of that name; presets are data/stdlib, experiment/bench, "):
        find_config("/absent/zzz")
    Path("quickstart").write_text("model: {}\n")  # a path that exists wins
    assert find_config("quickstart") == Path("quickstart")

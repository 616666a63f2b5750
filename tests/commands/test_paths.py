"""Every place where a command takes a path: `~` is meant, a URL is refused, and no folder of that name is made."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = "parallel.pipeline=1 data.train=set data.validation=set data.tokenizer=set train.output_dir=run"
COMMANDS = [
    "tools/export_hf.py PATH out",
    "tools/export_hf.py run PATH",
    "tools/export_hf.py run out --tokenizer PATH",
    "tools/export_hf.py run out --json PATH",
    "tools/import_hf.py PATH out",
    "tools/import_hf.py model PATH",
    "tools/inspect_checkpoint.py PATH",
    "tools/prepare_data.py --input PATH --tokenizer x --output y",
    "tools/prepare_data.py --input . --tokenizer PATH --output y",
    f"tools/prepare_data.py --input {ROOT}/tools --tokenizer TOKENIZER --output PATH --shards 2",
    "tools/preflight.py --hostfile PATH",
    "tools/prepare_data.py --check PATH",
    "tools/report.py --standard PATH --routed b --output c",
    "tools/report.py --standard a --routed PATH --output c",
    "tools/report.py --standard a --routed b --output PATH",
    "tools/retention.py PATH",
    "tools/retention.py run --png PATH",
    "tools/answers.py PATH examples.jsonl",
    "tools/answers.py run PATH",
    "tools/make_retrieval.py recall --output PATH",
    "tools/plot.py PATH --output figures",
    "tools/plot.py results.jsonl --output PATH",
    "tools/show_data.py --config PATH",
    f"tools/show_data.py --config quickstart {KEYS} data.tokenizer=PATH",
    "tools/train_tokenizer.py --input PATH --vocab-size 300 --output t.model",
    f"tools/train_tokenizer.py --input {ROOT}/tools --vocab-size 300 --output PATH",
    "tools/update_export.py PATH",
    "tools/bench.py generate --model PATH",
    "tools/bench.py save --folder PATH",
    "tools/bench.py step --json PATH",
    "tools/verify.py kills --json PATH",
    "launch/keep_running.py --output-dir PATH -- true",
    f"launch/pretrain.py --config quickstart {KEYS} data.validation=PATH",
    f"launch/finetune.py --config quickstart --from PATH {KEYS}",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.datasets import TOKENIZER

    file = tmp_path_factory.mktemp("tokenizer") / "small.model"
    TOKENIZER.save(file)
    return file


@pytest.mark.parametrize("path", ["s3a://bucket/x", "~nobody-here/x"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_path_here_is_refused(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    path: str,
) -> None:
    program, *words = shlex.split(command)
    words = [word.replace("PATH", path).replace("TOKENIZER", str(tokenizer)) for word in words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said and path in said.splitlines()[-1] and "error: " in said.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []

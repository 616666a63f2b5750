"""The report on a model's caches: what it recommends, how it ranks, and that its page needs nothing else."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.datasets import write_dataset
from support.gguf_models import MODELS, write

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.commands import report
from skvr_dist.commands.cache_report import _SHARES
from skvr_dist.commands.retention import of_families
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.cache_report.chart import quality_chart
from skvr_dist.evaluate.cache_report.content import by_family, change, next_smaller, recommended_point, shown_strategies
from skvr_dist.evaluate.curve import HeldOutData
from skvr_dist.evaluate.generate import generate
from skvr_dist.evaluate.intervals import Interval
from skvr_dist.evaluate.replay.compare import ChangedAnswer, Comparison
from skvr_dist.evaluate.replay.figures import ProfileFigures
from skvr_dist.evaluate.replay.report import ReplayReport
from skvr_dist.evaluate.retention import RetentionPoint
from skvr_dist.files import as_json
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.model.decoder import Decoder


def point(strategy: str, retained: int, rise: float, high: float) -> RetentionPoint:
    return RetentionPoint(strategy, retained, retained / 8, retained * 256, 2 + rise, Interval(rise, rise, high))


POINTS = [
    point("full", 8, 0, 0),
    point("even:4", 4, 0.03, 0.04),
    point("prefix:4", 4, 0.02, 0.049),
    point("standard", 3, 0.045, 0.06),  # its interval reaches beyond what is allowed
    point("even:2", 2, 0.3, 0.4),
]


def test_the_smallest_cache_that_surely_costs_less_is_recommended() -> None:
    assert recommended_point(POINTS, 0.05).strategy == "prefix:4"
    assert recommended_point(POINTS, 0.06).strategy == "standard"
    assert recommended_point(POINTS, 0.001).strategy == "full"
    assert shown_strategies(POINTS, POINTS[2]) == ["prefix:4", "even:2"]
    following = [next_smaller(POINTS, chosen) for chosen in (POINTS[0], POINTS[1], POINTS[4])]
    assert [each and each.strategy for each in following] == ["prefix:4", "standard", None]
    families = by_family(POINTS, {"standard": "0,2,4"})
    assert {name: [p.strategy for p in of] for name, of in families.items()} == {
        "even": ["full", "even:4", "even:2"],
        "prefix": ["full", "prefix:4"],
        "planned": ["full", "standard"],
    }


def test_families_are_measured_at_sizes_close_enough_for_a_recommendation() -> None:
    """Halves and less alone would recommend all layers of a model that can spare two of eight."""
    sizes = [f"even:{size}" for size in range(7, 0, -1)]
    assert of_families(["even"], 8, _SHARES) == ["full", *sizes]
    assert of_families(["even"], 4, _SHARES) == ["full", "even:3", "even:2", "even:1"]


def test_change_of_texts() -> None:
    assert change("same", "same") == change("", "") == 0 and change("", "x") == 1
    assert change("abcd", "abxd") == pytest.approx(0.25)


def test_a_chart_stays_within_its_frame() -> None:
    svg = quality_chart(by_family(POINTS, {}), 0.05)
    numbers = [float(number) for number in re.findall(r'c?[xy][12]?="(-?[\d.]+)"', svg)]
    assert numbers and min(numbers) >= 0 and max(numbers) <= 360
    assert svg.count("<polyline") == 3 and "NaN" not in svg and "nan" not in svg


def test_a_line_goes_through_the_best_of_each_size_and_shares_do_not_touch() -> None:
    points = [point("full", 8, 0, 0), *(point(f"even:{size}", size, 0.1, 0.2) for size in range(7, 0, -1))]
    svg = quality_chart({"planned": [points[0], POINTS[2], POINTS[1]], "even": points}, 0.05)
    lines = [line.split() for line in re.findall(r'<polyline points="([^"]*)"', svg)]
    assert [len(line) for line in lines] == [2, 8]
    assert lines[0][1].split(",")[1] == re.findall(r'cy="([\d.]+)" r="3" fill="[^"]*"><title>prefix:4', svg)[0]
    shares = [float(place) for place in re.findall(r'x="([\d.]+)" y="251" text-anchor="middle">[\d.]+%', svg)]
    assert len(shares) == 8 and min(b - a for a, b in pairwise(shares)) > 34 and shares[-1] <= 345


class Links(HTMLParser):
    """What a page would load from elsewhere, and the tags that it leaves open."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "line", "circle", "rect", "polyline") or tag == "circle":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "rect", "polyline"):
            return
        assert self.open.pop() == tag


SPEED = ProfileFigures("full", 2, 0, {}, 0.5, 0.9, 0.02, 0.03, 40.0, 60, 0.0, {"cache_tokens": 4096})
ANSWER = ChangedAnswer(
    "desk.jsonl, line 7", "json.dumps", "What is <it>?", 9, "a text", "another", 1.25, 3.0, "text", 1
)
REPLAYED = ReplayReport(
    "desk.jsonl", "export", 2, 1.0, False, [SPEED], [Comparison("bulk", 2, 0.7, 0.9, 1, [ANSWER])], "replay", None
)


def import_with_data(folder: Path, tokens: int) -> None:
    """A model, and held-out data of documents of so many tokens."""
    write(folder / "model.gguf", MODELS["llama"])
    import_model(str(folder / "model.gguf"), folder / "model", check=False)
    tokenizer = load_tokenizer(next((folder / "model").rglob("tokenizer.json")))
    drawn = torch.randint(200, (1200 // tokens, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    write_dataset(folder / "data", [drawn], tokenizer)


def lose_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models compute no numbers from now on."""

    def broken(checkpoint: Checkpoint) -> Decoder:
        decoder = load(checkpoint)
        torch.nn.init.constant_(next(iter(decoder.parameters())), math.nan)
        return decoder

    load = Checkpoint.load_decoder
    monkeypatch.setattr(Checkpoint, "load_decoder", broken)


def test_two_models_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import_with_data(tmp_path, 7)  # and its end: in sequences of 8 the last token never has a label
    words = ["--data", f"{tmp_path}/data", "--sequence-length", "8", "--sequences", "8"]
    words += [word for name in ("standard", "routed", "output") for word in (f"--{name}", f"{tmp_path}/model")][:-1]
    monkeypatch.setattr(sys, "argv", ["skvr-report", *words, f"{tmp_path}/out"])
    made = HeldOutData.of
    monkeypatch.setattr(HeldOutData, "of", lambda *given: replace(made(*given), separate_documents=True))
    lengths: list[int] = []

    def watched(decoder: Decoder, prompt: torch.Tensor, *given: Any, **named: Any) -> Any:
        lengths.append(len(prompt) + named["max_new_tokens"])
        return generate(decoder, prompt, *given, **named)

    monkeypatch.setattr("skvr_dist.evaluate.report.generate", watched)
    monkeypatch.setattr("skvr_dist.evaluate.report._PROMPT_TOKENS", 999)  # more than the model reads
    report.run()
    text = (tmp_path / "out/report.json").read_text()
    record = json.loads(text)
    assert "NaN" not in text and record["runs"]["standard"]["curve"][0]["loss_by_position"][-1] is None
    assert set(lengths) == {Checkpoint(tmp_path / "model").model_config.max_position_embeddings}

    lose_the_loss(monkeypatch)
    with pytest.raises(UserError, match=r"has a held-out loss of nan at full; give a checkpoint from before the loss"):
        report.run()


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_with_data(tmp_path, 30)
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"context": f"<b>{n}</b>", "question": f"{n}?", "answer": str(n)}) + "\n" for n in range(4))
    )
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--sequence-length", "48"]
    words += [
        "--sequences",
        "2",
        "--batch-size",
        "2",
        "--output",
        str(tmp_path / "out"),
        "--context",
        "64",
        "--memory-gib",
        "40",
    ]

    def started(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["skvr-report", *more])
        report.run()
        return capsys.readouterr().out

    continued = started(*words)
    assert "continuations of held-out text" in continued
    assert f"Made by `skvr-report --model {tmp_path / 'model'} --data" in continued
    (tmp_path / "replay.json").write_text(as_json(REPLAYED))
    more = ("--work", str(tmp_path / "asked.jsonl"), "--decode", "4", "--replay", str(tmp_path / "replay.json"))
    last, asked = (started(*words, *more, "--question-first-prob", first) for first in "01")
    for number, text in enumerate((last, asked)):
        assert f"questions before their contexts with probability {number}\n" in text
    assert last.split("## Scores")[1].split("\n")[2:12] != asked.split("## Scores")[1].split("\n")[2:12]
    assert "## Under load: desk.jsonl" in asked and "#### At `bulk`" in asked
    assert asked.splitlines()[2].startswith("Keep the cache of ")
    page = (tmp_path / "out/report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.loaded == [] and links.open == [] and "<svg" in page and "url(" not in page
    assert page.index("Keep the cache of") < page.index("<svg")
    assert "Under load: desk.jsonl" in page and "json.dumps (desk.jsonl, line 7): cost 1.2500" in page
    assert "exact match" in page and 'name="viewport"' in page
    record = json.loads((tmp_path / "out/report.json").read_text())
    assert record["recommended"]["strategy"] in record["retained"] and record["memory"][0]["strategy"] == "full"
    with pytest.raises(UserError, match="--context 99999 is more than max_position_embeddings"):
        started(*words, "--context", "99999")
    with pytest.raises(UserError, match="--strategies full leaves nothing to hold against full retention; name"):
        started(*words, "--strategies", "full")
    with pytest.raises(UserError, match="give one or the other"):
        started("--standard", "x", "--output", str(tmp_path / "out"))
    with pytest.raises(UserError, match="leave out --standard and --routed"):
        started(*words, "--standard", "x")
    with pytest.raises(UserError, match="give --work FILE, or leave it out"):
        started("--model", "x", "--output", str(tmp_path / "out"), "--question-first-prob", "1")
    lose_the_loss(monkeypatch)
    with pytest.raises(UserError, match="has a held-out loss of nan at full; give"):
        started(*words)

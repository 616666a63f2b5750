"""Making a training and a held-out data set from a corpus.

The files of the corpus are dealt to the training shards before anything is read, and each shard is made on its own:
read, tokenised and written by one process, the held-out documents among it to a shard of their own. So any number of
processes make the same bytes, in constant memory, and an interrupted run continues with the shards that are not there.

    OUTPUT/partial/          while it is being made: job.json says what; done-00000.json that a shard is finished; a
                             process holds `lock`
    OUTPUT/tokenizer.model
    OUTPUT/left-out.txt      the documents of the corpus that are in no data set, and why
    OUTPUT/train/, OUTPUT/validation/
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import json
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from skvr_dist.data.cores import require_few_processes
from skvr_dist.data.format import MANIFEST, TOKENIZER_FILE
from skvr_dist.data.prepare.corpus import LEFT_OUT_FILE, Corpus, hash_fraction
from skvr_dist.data.prepare.formats import Advance, Document, FilePart, holds_records, reading
from skvr_dist.data.prepare.pool import run_tasks
from skvr_dist.data.prepare.writer import ShardWriter, write_manifest
from skvr_dist.data.shards import TRAIN, VALIDATION, Dataset, find_datasets
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import tokenizer_from_bytes
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, naming_failure, prove_folder, write_whole

_JOB_FILE = "job.json"
_LOCK_FILE = "lock"

MAX_SHARDS = 100_000
"""Most shards of a data set: their names, by which they are sorted, have five digits."""

Parts = list[FilePart]


class Prepared(NamedTuple):
    """The data sets by the name of their folder; not `written` if they were there already."""

    datasets: dict[str, Dataset]
    written: bool


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    num_shards: int,
    validation_share: float = 0.0,
    workers: int | None = None,
) -> Prepared:
    """Write `output/train`, `output/validation` (unless its share is 0) and `output/tokenizer.model`.

    A document is held out when the hash of its text falls into `validation_share`: so it stays held out when others
    come and go, and its copies with it. If `output` holds these very data sets already, the corpus is read to
    check that, and nothing is written.

    Args:
        num_shards: shards of the training set; the held-out set has as many, less those that would be empty.
        workers: processes; None takes every core this one may run on.

    Raises:
        UserError: `output` holds something else or cannot be written, the corpus cannot be read, or there are too few
            documents for the shards. What was finished stays in `output/partial`, and the same call continues.
    """
    _require_possible(num_shards, workers, validation_share)
    output = local_path(output)
    partial = output / "partial"
    files = _without_own(corpus, output, partial)
    tasks = deal(files, num_shards)
    asked = {"tokenizer": tokenizer.sha256[:12], "number of shards": num_shards, "validation share": validation_share}
    with naming_failure(output):
        is_there = (output / TRAIN / MANIFEST).exists()
    if is_there:
        return Prepared(_existing(output, corpus, tasks, asked, workers), written=False)
    is_made = (partial / TRAIN / MANIFEST).exists()  # and only the last renames are missing
    for split in (TRAIN, VALIDATION):
        if (output / split).exists() and not is_made:
            raise UserError(f"{output / split} is there already; remove it or choose another output")
    prove_folder(output)
    tokenizer.save(output / TOKENIZER_FILE)
    try:
        with _alone_in(partial):
            if (output / TRAIN / MANIFEST).exists():  # another process has made it since
                shutil.rmtree(partial, ignore_errors=True)
                return Prepared(_existing(output, corpus, tasks, asked, workers), written=False)
            _start_or_continue(partial, {**asked, "text key": corpus.text_key, "list of files": _fingerprint(tasks)})
            if not is_made:
                making = _Making(corpus, tokenizer.model, partial, validation_share)
                todo = {number: parts for number, parts in tasks.items() if not _done_file(partial, number).exists()}
                _make_shards(making, files, todo, workers)
                _write_manifests(partial, tokenizer, validation_share)
            _publish(partial, output)
        shutil.rmtree(partial, ignore_errors=True)  # not before the lock is let go: NFS keeps a file that is open
    except OSError as error:
        raise UserError(
            f"cannot write data set {output}: {error}; its finished shards are kept, and the same command continues"
        ) from None
    return Prepared(find_datasets(output), written=True)


def _without_own(corpus: Corpus, output: Path, partial: Path) -> Parts:
    """The files of a corpus without our lists of what was left out, where the output lies in its folder.

    However the two are written: links and `..` are followed.
    """
    folder = (corpus.root if corpus.root.is_dir() else corpus.root.parent).resolve()
    own = {(output / LEFT_OUT_FILE).resolve(), partial.resolve()}
    return [file for file in corpus.files() if own.isdisjoint((path := folder / file.name, path.parent))]


def _require_possible(num_shards: int, workers: int | None, validation_share: float) -> None:
    if num_shards < 1 or (workers is not None and workers < 1):
        raise UserError(f"--shards {num_shards} and --workers {workers} must be positive")
    if num_shards > MAX_SHARDS:
        raise UserError(f"--shards {num_shards} are too many; ask for at most {MAX_SHARDS}")
    if workers is not None:
        require_few_processes("--workers", workers)
    if not 0 <= validation_share < 1:
        raise UserError(f"--validation-share {validation_share} must be at least 0 and below 1")


def _make_shards(making: _Making, files: Parts, tasks: Mapping[int, Parts], workers: int | None) -> None:
    """Write the shards that are missing.

    Args:
        files: the whole corpus.
    """
    try:
        run_tasks(making, tasks, total_bytes=_total_bytes(tasks), workers=workers)
    except _EmptyShardError:
        next(making.corpus.documents(files))  # says so if all are empty, which no other division would change
        raise


def _publish(partial: Path, output: Path) -> None:
    """Move what is finished to where it belongs."""
    shutil.copyfile(partial / LEFT_OUT_FILE, output / LEFT_OUT_FILE)
    # Training comes last: where its data set is, the held-out one is too.
    for split in (VALIDATION, TRAIN):
        if (partial / split / MANIFEST).exists():
            (partial / split).rename(output / split)


def deal(files: Sequence[FilePart], num_shards: int) -> dict[int, Parts]:
    """Divide a corpus into a share for each shard, about equally large on disk.

    Files of records are laid out one after the other, in an order drawn from their names, and cut into equal
    stretches. Each other file goes to the shard with the fewest bytes of them so far, the largest first.

    Raises:
        UserError: too few files.
    """
    most = sum(file.size if holds_records(file.name) else 1 for file in files)
    if num_shards > most:
        raise UserError(f"{len(files)} files are too few for --shards {num_shards}; ask for at most {most}")
    shares: dict[int, Parts] = {number: [] for number in range(num_shards)}
    records = sorted((file for file in files if holds_records(file.name) and file.size), key=_drawn)
    total = sum(file.size for file in records)
    bounds = [total * number // num_shards for number in range(num_shards + 1)]
    position = 0
    for file in records:
        number = bisect_right(bounds, position) - 1
        while number < num_shards and bounds[number] < position + file.size:
            start, stop = max(bounds[number] - position, 0), min(bounds[number + 1] - position, file.size)
            shares[number].append(file._replace(start=start, stop=stop))
            number += 1
        position += file.size
    texts = sorted(
        (file for file in files if not holds_records(file.name)), key=lambda file: (-file.size, _drawn(file))
    )
    lightest = [(0, number) for number in range(num_shards)]
    for file in texts:
        size, number = lightest[0]
        shares[number].append(file)
        heapq.heapreplace(lightest, (size + file.size, number))
    if not all(shares.values()):
        raise UserError(f"{len(files)} files are too few for --shards {num_shards}; ask for at most {len(files)}")
    return shares


def _drawn(file: FilePart) -> float:
    return hash_fraction(file.name, "order of files")


def _total_bytes(tasks: Mapping[int, Parts]) -> int:
    return sum(part.stop - part.start for parts in tasks.values() for part in parts)


def _fingerprint(tasks: Mapping[int, Parts]) -> str:
    """Hash of names, sizes and times of the files, by which an interrupted run recognises its corpus."""
    files = []
    for part in (part for parts in tasks.values() for part in parts):
        with reading(part.path):
            files.append((part.name, part.size, part.path.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]


@contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """Keep other processes out of the folder of unfinished work: two that write one shard spoil it.

    The system lets the lock go when this process dies, and no child inherits it. Where the file system has no locks,
    nothing is kept out.

    Raises:
        UserError: one is at work there.
    """
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK_FILE).open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{partial} is being written by another process that prepares the same output; wait for its end, or "
                f"choose another output"
            ) from None
        except OSError:
            pass
        yield


def _start_or_continue(partial: Path, job: dict[str, Any]) -> None:
    """Make the folder of unfinished work, or check that the one there belongs to the same job."""
    if (partial / _JOB_FILE).exists():
        try:
            there = json.loads((partial / _JOB_FILE).read_bytes())
            there = {what: there[what] for what in job}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{partial / _JOB_FILE} is damaged; remove {partial} and start anew") from None
        _require_same(f"{partial} holds unfinished work made with", there, job)
        return
    for split in (TRAIN, VALIDATION):
        (partial / split).mkdir(parents=True, exist_ok=True)
    write_whole(partial / _JOB_FILE, json.dumps(job, indent=1) + "\n")


def _require_same(there_is: str, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for what, value in asked.items():
        if there[what] != value:
            raise UserError(f"{there_is} {what} {there[what]}, not {value}; remove it or choose another output")


def _existing(
    output: Path, corpus: Corpus, tasks: Mapping[int, Parts], asked: Mapping[str, Any], workers: int | None
) -> dict[str, Dataset]:
    """The data sets in `output`, if this call would make the same."""
    datasets = find_datasets(output)
    manifest = datasets[TRAIN].manifest
    there: dict[str, Any] = {
        "tokenizer": manifest.tokenizer_sha256[:12],
        "number of shards": len(manifest.shards),
        "validation share": manifest.validation_share,
    }
    there_is = f"{output} holds a data set made with"
    _require_same(there_is, there, asked)
    digests = run_tasks(_Digest(corpus), tasks, total_bytes=_total_bytes(tasks), workers=workers)
    _require_same(there_is, {"corpus": manifest.corpus_sha256[:12]}, {"corpus": _combined(digests)[:12]})
    return datasets


@dataclass(frozen=True)
class _Digest:
    """Task: hash what a shard is made from."""

    corpus: Corpus

    def __call__(self, _: int, parts: Parts, advance: Advance) -> str:
        digest = hashlib.sha256()
        for part in parts:
            for item in self.corpus.read(part, advance):
                if isinstance(item, Document):
                    _add_document(digest, item)
        return digest.hexdigest()


def _add_document(digest: Any, document: Document) -> None:
    for text in document:
        data = text.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)


def _combined(digests: Mapping[int, str]) -> str:
    """Hash of the corpus from those of its shards."""
    return hashlib.sha256("".join(digests[number] for number in sorted(digests)).encode()).hexdigest()


class _EmptyShardError(UserError):
    """No document is left for a training shard."""


@dataclass(frozen=True)
class _Making:
    """Task: make a training shard and the held-out documents beside it."""

    corpus: Corpus
    tokenizer_model: bytes
    folder: Path
    validation_share: float

    def __call__(self, number: int, parts: Parts, advance: Advance) -> None:
        tokenizer = tokenizer_from_bytes(self.tokenizer_model)
        eos_id = tokenizer.eos_id
        file = f"shard-{number:05d}.tar"
        digest, left_out = hashlib.sha256(), Counter[str]()
        with ExitStack() as stack:
            train, held_out = (
                stack.enter_context(ShardWriter(self.folder / split / file, tokenizer)) for split in (TRAIN, VALIDATION)
            )
            # Names of files need not be UTF-8: they are written as they are.
            complaints = stack.enter_context(
                _left_out_file(self.folder, number).open("w", encoding="utf-8", errors="surrogateescape")
            )
            for part in parts:
                for item in self.corpus.read(part, advance):
                    if not isinstance(item, Document):
                        left_out[item.reason] += 1
                        complaints.write(f"{item.sentence}\n")
                        continue
                    _add_document(digest, item)
                    is_held_out = hash_fraction(item.text, "validation") < self.validation_share
                    tokens = tokenizer.encode(item.text)
                    tokens.append(eos_id)
                    (held_out if is_held_out else train).write(item.id, tokens, len(item.text.encode()))
            if train.is_empty:
                raise _EmptyShardError(
                    f"training shard {number} would hold no document; ask for fewer --shards or a smaller "
                    f"--validation-share"
                )
            if not held_out.is_empty:
                held_out.publish()
            train.publish()
        done = {"corpus_sha256": digest.hexdigest(), "left_out": left_out}
        write_whole(_done_file(self.folder, number), json.dumps(done) + "\n")


def _done_file(folder: Path, number: int) -> Path:
    return folder / f"done-{number:05d}.json"


def _left_out_file(folder: Path, number: int) -> Path:
    return folder / f"left-out-{number:05d}.txt"


def _write_manifests(partial: Path, tokenizer: Tokenizer, validation_share: float) -> None:
    """Make data sets of the finished shards, the training set last."""
    try:
        done = {n: json.loads(file.read_bytes()) for n, file in enumerate(sorted(partial.glob("done-*.json")))}
        left_out = sum((Counter(facts["left_out"]) for facts in done.values()), Counter[str]())
        corpus_sha256 = _combined({number: facts["corpus_sha256"] for number, facts in done.items()})
    except (ValueError, KeyError, TypeError):
        raise UserError(f"a file {partial}/done-*.json is damaged; remove {partial} and start anew") from None
    with (partial / LEFT_OUT_FILE).open("wb") as file:
        for number in done:
            file.write(_left_out_file(partial, number).read_bytes())
    for split in (VALIDATION, TRAIN) if validation_share else (TRAIN,):
        if not any((partial / split).glob("shard-*.json")):
            raise UserError(
                f"no document falls into --validation-share {validation_share}; remove {partial} and hold out more"
            )
        write_manifest(
            partial / split,
            tokenizer,
            corpus_sha256=corpus_sha256,
            validation_share=validation_share,
            left_out=left_out,
        )

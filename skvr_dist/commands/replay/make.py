"""Make a trace: questions to a support desk, or files for a code assistant, with the seconds at which they arrive.

    skvr-replay make --kind support --requests 200 --rate 2 --seed 0 --output support.jsonl
    skvr-replay make --kind code --input src --requests 200 --rate 2 --output code.jsonl

`support` asks about functions and classes of Python's standard library, whose documentation stands in the prompt;
`code` gives a source file up to a line. Arrivals are those of independent users (Poisson). The same options give the
same trace with the same Python. Traces are jsonl, and any others of the format will do:

    {"arrival": 0.35, "prompt": "def main(", "max_tokens": 64}
    {"arrival": 1.2, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "name": "greeting"}

A model should have been trained on text like that which it will serve. With --to-train the questions are about the
other documents, those that are not held out, and are written as chats with answers: a data source of `format: chat`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from skvr_dist.command import a_path, at_least, positive, share
from skvr_dist.errors import UserError
from skvr_dist.files import as_json, prove_writable, write_whole

SUPPORT, CODE = "support", "code"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--kind", required=True, choices=(SUPPORT, CODE))
    parser.add_argument("--output", required=True, type=a_path, metavar="FILE", help="jsonl of requests, or of chats")
    parser.add_argument("--requests", type=at_least(1), default=200, metavar="N", help="(default: 200)")
    parser.add_argument("--rate", type=positive, default=1.0, metavar="R", help="requests a second (default: 1)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="of what is drawn (default: 0)")
    parser.add_argument("--input", default="stdlib", metavar="CORPUS", help="Python files (default: stdlib)")
    parser.add_argument(
        "--characters", type=at_least(100), default=3000, metavar="N", help="of a prompt, at most (default: 3000)"
    )
    parser.add_argument("--max-tokens", type=at_least(1), default=96, metavar="N", help="wanted, at most (96)")
    parser.add_argument("--chat", action="store_true", help="support: messages, for models with a chat template")
    parser.add_argument(
        "--to-train",
        action="store_true",
        help="support: chats with answers, not a trace (without --rate, --max-tokens)",
    )
    parser.add_argument(
        "--validation-share", type=share, default=0.05, metavar="X", help="of the documents (default: 0.05)"
    )


def run(options: Namespace) -> None:
    """Make the trace and write it."""
    from skvr_dist.data.prepare.corpus import open_corpus
    from skvr_dist.evaluate.replay.trace import as_lines
    from skvr_dist.evaluate.replay.workloads import Workload, code_assistant, support_desk, support_desk_chats

    for option, name in ((options.chat, "--chat"), (options.to_train, "--to-train")):
        if option and options.kind == CODE:
            raise UserError(f"{name} makes messages of questions, but --kind code has files to continue; leave it out")
    if options.chat and options.to_train:
        raise UserError("--chat is of a trace, but --to-train writes chats in any case; leave it out")
    file = prove_writable(options.output, make_folder=True)
    workload = Workload(options.requests, options.rate, options.characters, options.max_tokens, options.seed)
    documents, held_out = open_corpus(options.input), options.validation_share
    file.parent.mkdir(parents=True, exist_ok=True)
    if options.to_train:
        chats = support_desk_chats(documents, workload, validation_share=held_out)
        write_whole(file, "".join(f"{as_json({'messages': chat})}\n" for chat in chats))
        print(f"written: {file}, {len(chats)} chats")
        return
    if options.kind == SUPPORT:
        requests = support_desk(documents, workload, validation_share=held_out, as_chat=options.chat)
    else:
        requests = code_assistant(documents, workload, validation_share=held_out)
    write_whole(file, as_lines(requests))
    print(f"written: {file}, {len(requests)} requests in {requests[-1].arrival:,.0f} seconds")

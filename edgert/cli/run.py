"""edgert run: continue a prompt or answer it, streaming."""

import argparse
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edgert.cli.controlled import add_control, control_bounds, controlled
from edgert.cli.conversation import converse
from edgert.cli.options import (
    Subparsers,
    add_adapter,
    add_backend,
    add_json,
    add_knobs,
    add_model,
    add_sampling,
    find_model,
    knob_flags,
    load_adapters,
    sampling_flags,
)
from edgert.cli.terminal import note, print_json, say
from edgert.errors import InvalidArgumentError
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.generation import Generation, Stream
    from edgert.model import Model
    from edgert.session import Session

_MAX_PROMPT_BYTES = 16 << 20
_MAX_FORM_BYTES = 1 << 20


def register(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="answer or continue a prompt",
        description="Answer a prompt (the model's chat template) or continue it. What is piped in goes before the prompt: "
        "cat report.txt | edgert run MODEL -p 'Summarise this.'",
    )
    add_model(parser)
    parser.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="the prompt, after what files and a pipe give; - is stdin. Without any, on a terminal, a conversation begins",
    )
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        action="append",
        default=[],
        help="text to put before the prompt; - is stdin; may be repeated",
    )
    parser.add_argument(
        "--session",
        metavar="FILE",
        type=Path,
        help="go on from the session in FILE, where there is one, and save it there at the end",
    )
    add_json(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema",
        metavar="FILE",
        type=Path,
        help="answer in JSON that follows the schema in FILE (extra serve)",
    )
    form.add_argument(
        "--grammar",
        metavar="FILE",
        type=Path,
        help="answer in a form that the grammar in FILE (Lark's notation) gives (extra serve)",
    )
    add_generation(parser)
    return parser


def add_generation(parser: argparse.ArgumentParser) -> None:
    """What answering takes, of a prompt and in a conversation."""
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message in front")
    add_adapter(parser)
    add_backend(parser)
    add_sampling(parser)
    add_knobs(parser)
    add_control(parser)


def run(args: argparse.Namespace) -> int:
    if args.raw and args.system:
        raise InvalidArgumentError("--system: has no place in a raw prompt")
    if args.prompt is None and not args.file and not args.json and sys.stdin.isatty():
        for option in ("session", "json_schema", "grammar"):
            if getattr(args, option) is not None:
                flag = option.replace("_", "-")
                raise InvalidArgumentError(f"--{flag}: needs a prompt (-p, -f or standard input)")
        return converse(args)
    sampling = {**sampling_flags(args), **_form(args)}
    prompt = _prompt(args)
    with opened(args) as model:
        session = None if args.session is None else open_session(model, args.session)
        stream = _start(model, prompt, args, sampling, session)
        with cancelled_by_ctrl_c(stream):
            for piece in stream:
                if not args.json:
                    say(piece.text, end="")
        result = stream.result
        if session is not None:
            keep_session(model, session, result, args.session)
        if args.json:
            print_json(_object(model, result))
        else:
            say("")
            note(summary(result))
    return 130 if result.finish_reason == "cancelled" else 0


@contextmanager
def opened(args: argparse.Namespace) -> "Iterator[Model]":
    """The model that add_model() and add_generation() have read, with its adapters; what it is, is said."""
    import edgert

    control_bounds(args)  # refused before anything is loaded
    path = find_model(args.model, args.backend)
    with edgert.load(path, backend=args.backend, **knob_flags(args)) as model, controlled(model, args):
        note(describe(model))
        note_lossy(model)
        load_adapters(model, args.adapter)
        warn_if_slow(model)
        yield model


def describe(model: "Model") -> str:
    """One line on what was loaded."""
    stats = model.stats()
    experts = "all experts in memory" if model.resident else "experts read as they are needed"
    return (
        f"{model.name}: context {model.context} tokens, budget {format_bytes(stats['budget_bytes'])}, {experts}, "
        f"{stats['threads']} threads ({stats['isa']})"
    )


def note_lossy(model: "Model") -> None:
    """One line where lossy modes are on: which, and what they cost."""
    from edgert import lossy
    from edgert.bundle import Bundle

    if modes := model.lossy_modes:
        bundle_id = Bundle.open(model.path).manifest["bundle_id"]
        note(lossy.describe(modes, lossy.kept(bundle_id, modes, model.stats()["budget_bytes"]), model.name))


def warn_if_slow(model: "Model") -> None:
    """One line where few tokens a second are to be expected of edgert's own engine."""
    if model.backend != "edgert":
        return
    from edgert import plan
    from edgert.bundle import Bundle
    from edgert.footprint import sizes_of_bundle

    stats = model.stats()
    speeds = plan.speeds_here(threads=stats["threads"])
    sizes = sizes_of_bundle(Bundle.open(model.path))
    expected = plan.expect_of_plan(sizes, speeds, stats["budget_bytes"], model.native.plan())
    if expected.decode_tokens_per_s >= plan.SLOW_TOKENS_PER_S:
        return
    reason = "the weights are read from memory for every token"
    if expected.limit == "storage":
        reason = f"a token waits for about {format_bytes(expected.bytes_read_per_token)} from storage"
    note(
        f"this will be slow: about {expected.decode_tokens_per_s:.1f} tok/s, because {reason} ({speeds.source}); "
        f"`edgert plan {model.path}` shows what more memory would change"
    )


def summary(result: "Generation") -> str:
    """Two lines of statistics."""
    s = result.statistics
    speeds = (
        f"prompt {s['prompt_tokens']} tokens at {s['prefill_tokens_per_s']:.1f} tok/s, "
        f"generated {s['generated_tokens']} at {s['decode_tokens_per_s']:.1f} tok/s ({result.finish_reason})\n"
        f"peak {format_bytes(s['peak_bytes'])} of {format_bytes(s['budget_bytes'])}"
    )
    if "expert_hits" not in s:  # another engine
        return speeds
    lookups = s["expert_hits"] + s["expert_prefetch_hits"] + s["expert_misses"]
    experts = f"hits {s['hit_rate']:.1%} of {lookups} expert look-ups" if lookups else "no routed experts"
    if s["expert_prefetch_hits"]:
        experts += f" and {s['expert_prefetch_hits'] / lookups:.1%} read ahead"
    words = {"replaced": "replaced", "skipped": "skipped", "low_precision": "in low precision"}
    counts = {word: s[f"experts_{name}"] for name, word in words.items()}
    if given_up := [f"{count} {word}" for word, count in counts.items() if count]:
        experts += f", uses of experts: {', '.join(given_up)}"
    return (
        f"{speeds}, {experts}, read {format_bytes(s['bytes_read'])}, waited {s['stall_s']:.2f} s for storage"
    )


@contextmanager
def cancelled_by_ctrl_c(stream: "Stream") -> Iterator[None]:
    """The first Ctrl-C ends the stream in order; a second one interrupts."""

    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def open_session(model: "Model", path: Path) -> "Session":
    return model.restore_session(path) if path.exists() else model.session()


def keep_session(model: "Model", session: "Session", result: "Generation", path: Path) -> None:
    """Save it with the answer that it now ends with."""
    if messages := session.note.get("messages"):
        messages.append({"role": "assistant", "content": result.text})
    model.save_session(session, path)


def _start(
    model: "Model", prompt: str, args: argparse.Namespace, sampling: dict[str, Any], session: "Session | None"
) -> "Stream":
    tokenizer = model.prompts().tokenizer
    if args.raw or tokenizer.chat_template is None:
        if args.system:
            raise InvalidArgumentError(f"--system: {model.name} has no chat template")
        if session is None or not session.tokens:
            return model.stream(prompt, session=session, **sampling)
        more = tokenizer.encode(prompt, add_special_tokens=False)
        return model.stream([*session.tokens, *more], session=session, **sampling)
    messages = [] if session is None else _messages(session)
    if args.system and not messages:
        messages.append({"role": "system", "content": args.system})
    messages.append({"role": "user", "content": prompt})
    if session is not None:
        session.note["messages"] = messages
    return model.chat(messages, stream=True, session=session, **sampling)


def _messages(session: "Session") -> list[dict[str, Any]]:
    """The conversation that a session holds."""
    messages = session.note.get("messages", [])
    known = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not known or (session.tokens and not messages):
        raise InvalidArgumentError("--session: the session holds no conversation; go on with --raw")
    return list(messages)


def _form(args: argparse.Namespace) -> dict[str, Any]:
    """What --json-schema and --grammar ask for, as options of Model.chat()."""
    if args.grammar is not None:
        return {"grammar": read_text(args.grammar, _MAX_FORM_BYTES)}
    if args.json_schema is None:
        return {}
    try:
        schema = json.loads(read_text(args.json_schema, _MAX_FORM_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"{args.json_schema}: not JSON: {error}") from None
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def _prompt(args: argparse.Namespace) -> str:
    """What a pipe gives, the files and the prompt, in this order, with an empty line between; a "-" puts stdin elsewhere."""
    alone = args.prompt is None and not args.file
    placed = args.prompt == "-" or "-" in args.file
    texts = [_stdin()] if alone or (_is_piped() and not placed) else []
    texts += [_stdin() if name == "-" else read_text(Path(name)) for name in args.file]
    if args.prompt is not None:
        texts.append(_stdin() if args.prompt == "-" else args.prompt)
    texts = [text for text in texts if text]
    return "\n\n".join([*(text.rstrip("\n") for text in texts[:-1]), *texts[-1:]])


def _is_piped() -> bool:
    """Whether somebody gives stdin something: it is a pipe, a file or a connection; no terminal and no /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # something without a file behind it stands in for stdin, or it is closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _stdin() -> str:
    return decode(sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1), "stdin", _MAX_PROMPT_BYTES)


def read_text(path: Path, limit: int = _MAX_PROMPT_BYTES) -> str:
    """The UTF-8 text of a file of at most `limit` bytes."""
    with path.open("rb") as file:
        return decode(file.read(limit + 1), str(path), limit)


def decode(content: bytes, where: str, limit: int) -> str:
    """`content` as UTF-8 text. Raises InvalidArgumentError naming `where` beyond `limit` bytes."""
    if len(content) > limit:
        raise InvalidArgumentError(f"{where}: more than {limit} bytes of text")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{where}: byte {error.start} is not UTF-8") from None


def _object(model: "Model", result: "Generation") -> dict[str, Any]:
    value: dict[str, Any] = {
        "model": model.name,
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "statistics": result.statistics,
    }
    if result.logprobs is not None:
        value["logprobs"] = [{"logprob": own, "top": best} for own, best in result.logprobs]
    return value

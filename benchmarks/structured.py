"""Constrained decoding: do replies keep to their schemas, and what does it cost?

    python benchmarks/structured.py validity [--part 1/8]    # 500 schemas x 5 prompts with docs-moe, temperature 1
    python benchmarks/structured.py cost                     # microseconds a token, also of a vocabulary of 150,000
    python benchmarks/structured.py decode docs-moe …        # held replies beside free ones of as many tokens, by the engine

validity checks with another validator than the one that makes the grammars (jsonschema_rs, formats included).
A reply that max_tokens cuts counts for itself: "length", neither valid nor invalid. Prints one JSON object.
"""

import argparse
import array
import json
import random
import statistics
import sys
import time
from collections import Counter
from typing import Any

import jsonschema_rs
from large_vocabulary import large_vocabulary
from machine import describe
from structured_schemas import schemas

import edgert
from edgert import _native
from edgert.engine import Engine
from edgert.sampling import Sampling
from edgert.structured import Constraint, constraint_of
from edgert.structured.grammar import Vocabulary, vocabulary_of
from edgert.structured.request import form_of_response
from edgert.tokenizer import Tokenizer

PROMPTS = (
    "Write one.",
    "Describe a file on a disk as JSON.",
    "Who was it, when, and how many?",
    "Explain the os.path module of Python.",
    "git rebase --onto",
)
_MAX_TOKENS = 450


class Timed:
    """A constraint and the seconds that it takes."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self.masks: list[float] = []
        self.accepts: list[float] = []

    def mask(self) -> Any:
        start = time.perf_counter()
        mask = self._constraint.mask()
        self.masks.append(time.perf_counter() - start)
        return mask

    def accept(self, token: int) -> bool:
        start = time.perf_counter()
        more = self._constraint.accept(token)
        self.accepts.append(time.perf_counter() - start)
        return more


def response_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}


def validity(args: argparse.Namespace) -> dict[str, Any]:
    """Every schema with every prompt, each with a seed of its own."""
    part, parts = (int(number) for number in args.part.split("/"))
    counts: Counter[str] = Counter()
    failures, cut, tokens = [], [], 0
    with edgert.load("docs-moe", memory="64MiB", context=512) as model:
        chosen = [*enumerate(schemas(args.schemas))][part - 1 :: parts]
        for index, schema in chosen:
            validator = jsonschema_rs.validator_for(schema, validate_formats=True)
            for number, prompt in enumerate(PROMPTS):
                reply = model.chat(
                    prompt,
                    response_format=response_format(schema),
                    temperature=1.0,
                    top_p=1.0,
                    seed=index * len(PROMPTS) + number,
                    max_tokens=_MAX_TOKENS,
                )
                tokens += len(reply.tokens)
                outcome = "length" if reply.finish_reason == "length" else _judge(validator, reply.text)
                counts[outcome] += 1
                if outcome == "length":
                    cut.append(index)
                elif outcome != "valid":
                    failures.append({"schema": index, "prompt": number, "why": outcome, "text": reply.text})
    return {
        "schemas": len(chosen),
        "replies": counts.total(),
        **counts,
        "tokens": tokens,
        "cut": cut,
        "failures": failures,
    }


def _judge(validator: Any, text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return "not JSON"
    return "valid" if validator.is_valid(value) else "against the schema"


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Replies in a form beside free ones, token by token; and masks alone, of a large vocabulary."""
    with edgert.load("docs-moe", memory="64MiB", context=512) as model:
        start = time.perf_counter()
        vocabulary_of(model)
        small = {"vocabulary_s": time.perf_counter() - start, **_in_decoding(model)}
        texts = _replies(model)
    large_tokenizer = Tokenizer(large_vocabulary())
    start = time.perf_counter()
    vocabulary = Vocabulary(large_tokenizer, large_tokenizer.vocab_size, frozenset([0]))
    large: dict[str, Any] = {
        "tokens": large_tokenizer.vocab_size,
        "vocabulary_s": time.perf_counter() - start,
    }
    large.update(_of_masks(vocabulary, large_tokenizer, texts))
    large["draw_us"] = _draws(vocabulary, large_tokenizer.vocab_size)
    return {"docs-moe": small, "large vocabulary": large, "machine": describe()}


_TIMED_SCHEMAS = 60


def _in_decoding(model: edgert.Model) -> dict[str, Any]:
    """Microseconds a token of whole replies, free ones and held to some schemas in turn, and what forms take of them."""
    timed: list[Timed] = []
    begin_s: list[float] = []
    seconds, tokens = {"free": 0.0, "held": 0.0}, {"free": 0, "held": 0}
    for index, schema in enumerate(schemas(_TIMED_SCHEMAS)):
        for kind, form in (("free", None), ("held", response_format(schema))):
            start = time.perf_counter()
            stream = model.chat(
                "Write one.", stream=True, response_format=form, temperature=1.0, seed=index, max_tokens=100
            )
            if kind == "held":
                begin_s.append(time.perf_counter() - start)
                assert stream._constraint is not None
                timed.append(Timed(stream._constraint))
                stream._constraint = timed[-1]
            next(stream)  # the prompt, and a token
            start = time.perf_counter()
            tokens[kind] += sum(1 for _ in stream)
            seconds[kind] += time.perf_counter() - start
    whole = {kind: round(seconds[kind] / tokens[kind] * 1e6, 2) for kind in seconds}
    return {"begin_ms": _summary(begin_s, 1e3), "us_a_token_of_a_reply": whole, **_of(timed)}


def _replies(model: edgert.Model) -> list[tuple[Any, str]]:
    some = []
    for index, schema in enumerate(schemas(_TIMED_SCHEMAS)):
        reply = model.chat(
            "Write one.", response_format=response_format(schema), temperature=1.0, seed=index, max_tokens=200
        )
        some.append((schema, reply.text))
    return some


def _of_masks(vocabulary: Vocabulary, tokenizer: Tokenizer, texts: list[tuple[Any, str]]) -> dict[str, Any]:
    """The same replies again, in the large vocabulary's tokens."""
    timed, begin_s = [], []
    for schema, text in texts:
        start = time.perf_counter()
        constraint = vocabulary.constraint(f"start: {form_of_response(response_format(schema))}", "schema")
        begin_s.append(time.perf_counter() - start)
        timed.append(Timed(constraint))
        for token in tokenizer.encode(text):
            mask = timed[-1].mask()
            if not mask[token // 8] >> token % 8 & 1 or not timed[-1].accept(token):
                break
    return {"begin_ms": _summary(begin_s, 1e3), **_of(timed)}


def _draws(vocabulary: Vocabulary, size: int) -> dict[str, float]:
    """Microseconds of a draw at temperature 1, and of setting a mask and drawing in it."""
    rng = random.Random(1)
    logits = array.array("f", [rng.gauss(0, 3) for _ in range(size)])
    options = _native.SamplerOptions()
    options.temperature = 1.0
    sampler = _native.Sampler(options)
    constraint = vocabulary.constraint('start: %json {"type": "object"}', "schema")
    free, held = [], []
    for position in range(200):
        start = time.perf_counter()
        sampler.allow(None)
        sampler.sample(logits, position)
        free.append(time.perf_counter() - start)
        mask = constraint.mask()
        start = time.perf_counter()
        sampler.allow(mask)
        sampler.sample(logits, position)
        held.append(time.perf_counter() - start)
    return {"free": statistics.median(free) * 1e6, "held": statistics.median(held) * 1e6}


def _of(timed: list[Timed]) -> dict[str, Any]:
    both = [mask + accept for one in timed for mask, accept in zip(one.masks, one.accepts, strict=False)]
    return {"us_a_token": _summary(both, 1e6)}


def _summary(seconds: list[float], scale: float) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "mean": round(statistics.fmean(ordered) * scale, 2),
        "p50": round(ordered[len(ordered) // 2] * scale, 2),
        "p99": round(ordered[len(ordered) * 99 // 100] * scale, 2),
        "max": round(ordered[-1] * scale, 2),
    }


_DECODED = 200  # tokens of a reply
_BOOK = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5, "maxLength": 30},
        "year": {"type": "integer", "minimum": 0, "maximum": 3000},
        "kind": {"enum": ["book", "film", "song"]},
    },
    "required": ["name", "year", "kind"],
    "additionalProperties": False,
}
_LASTING: dict[str, dict[str, Any] | None] = {  # forms that end no reply before its time
    "free": None,
    "list of objects": {"type": "array", "minItems": 400, "items": _BOOK},
    "long text": {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 2000}},
        "required": ["text"],
        "additionalProperties": False,
    },
}


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds between tokens, greedily, of one request on an Engine: median of some replies, in turn; and how much
    more than the free one of its round, median too. A model without a tokenizer gets one that is made up."""
    found: dict[str, Any] = {"machine": describe()}
    for name in args.models:
        with edgert.load(name, memory=args.memory, context=512) as model:
            if model._tokenizer is None:
                model._tokenizer = Tokenizer(large_vocabulary(model.vocab_size))
                model.eos_token_ids = frozenset([0])
            engine = Engine(model)
            prompt = model.tokenizer.encode("Write a list of them.")
            seconds: dict[str, list[float]] = {form: [] for form in _LASTING}
            for _ in range(args.rounds + 1):
                for form, schema in _LASTING.items():
                    seconds[form].append(_seconds_a_token(engine, model, prompt, schema))
            engine.close()
        found[name] = {form: _beside(taken[1:], seconds["free"][1:]) for form, taken in seconds.items()}
    return found


def _beside(taken: list[float], free: list[float]) -> dict[str, float]:
    more = statistics.median(held / alone for held, alone in zip(taken, free, strict=True)) - 1
    return {"us_a_token": round(statistics.median(taken) * 1e6, 1), "more_percent": round(100 * more, 1)}


def _seconds_a_token(engine: Engine, model: edgert.Model, prompt: list[int], schema: Any) -> float:
    constraint = None if schema is None else constraint_of(model, response_format=response_format(schema))
    options = {"temperature": 0, "max_tokens": _DECODED, "ignore_eos": True}
    times: list[float] = []
    job = engine.submit(
        prompt,
        Sampling.of(options, {}, model.vocab_size),
        lambda _: times.append(time.perf_counter()),
        constraint=constraint,
    )
    job.done.wait()
    assert len(times) >= _DECODED
    return (times[_DECODED - 1] - times[0]) / (_DECODED - 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    of_validity = commands.add_parser("validity")
    of_validity.add_argument("--schemas", type=int, default=500)
    of_validity.add_argument("--part", default="1/1", help="of the schemas, for several processes")
    of_validity.set_defaults(run=validity)
    commands.add_parser("cost").set_defaults(run=cost)
    of_decode = commands.add_parser("decode")
    of_decode.add_argument("models", nargs="+")
    of_decode.add_argument("--memory", default="auto")
    of_decode.add_argument("--rounds", type=int, default=8)
    of_decode.set_defaults(run=decode)
    args = parser.parse_args()
    result = args.run(args)
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 1 if result.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())

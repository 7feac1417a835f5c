"""lm-evaluation-harness through the daemon's /v1/completions, beside what `edgert eval` measures itself.

    pip install 'lm-eval[api]==0.4.13'
    python benchmarks/harness.py docs-moe README.md docs/*.md --json harness.json

Every file is cut into documents. Task `rolling` is the perplexity of each document; task `choices` asks which of four
continuations belongs to a beginning. Both are a local data set: nothing is downloaded. The same documents are then scored with
edgert.evaluate and edgert.scoring on the model, loaded here: both ways are to give the same numbers.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import edgert
from edgert.evaluate import evaluate
from edgert.scoring import score

_DOCUMENT_CHARACTERS = 700
_CHOICES = 4
_ROLLING = """
task: edgert_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
_MULTIPLE = """
task: edgert_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def documents(model: edgert.Model, paths: Sequence[Path], most: int) -> list[str]:
    """Those that fit into one window: of longer ones the harness and `edgert eval` place the windows differently."""
    texts: list[str] = []
    for path in paths:
        text = path.read_text()
        while len(text) > _DOCUMENT_CHARACTERS and len(texts) < most:
            end = text.rfind("\n", 0, _DOCUMENT_CHARACTERS) + 1 or _DOCUMENT_CHARACTERS
            if len(model.tokenizer.encode(text[:end])) < model.context - 1:
                texts.append(text[:end])
            text = text[end:]
    return texts


def questions(texts: Sequence[str]) -> list[dict[str, Any]]:
    """The beginnings of documents, each with what follows it and what follows three others. They part where a word does: a
    token across the parting would be one way's own."""
    places = [text.rfind(" ", 0, 200) for text in texts]
    halves = [(text[:place], text[place : place + 60]) for text, place in zip(texts, places, strict=True)]
    dice = random.Random(0)
    rows = []
    for index, (begin, end) in enumerate(halves):
        others = dice.sample([half for place, (_, half) in enumerate(halves) if place != index], _CHOICES - 1)
        label = dice.randrange(_CHOICES)
        rows.append({"begin": begin, "choices": [*others[:label], end, *others[label:]], "label": label})
    return rows


@contextlib.contextmanager
def daemon(model: str) -> Iterator[str]:
    """The address of `edgert serve MODEL`, which ends with the context."""
    command = [sys.executable, "-m", "edgert", "serve", model, "--port", "0", "--threads", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "listening" in line:
                    yield line.split()[-1].rstrip("/")
                    break
            else:
                raise SystemExit("the daemon did not start")
        finally:
            process.terminate()
            process.communicate()


def through_the_daemon(
    model: str, name: str, tokenizer: Path, directory: Path, context: int
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with daemon(model) as address:
        arguments = {
            "model": name,
            "base_url": f"{address}/v1/completions",
            "tokenizer": str(tokenizer),
            "tokenizer_backend": "huggingface",
            "max_length": context - 1,
            "num_concurrent": 1,
            "batch_size": 4,
        }
        result: dict[str, Any] = simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=["edgert_rolling", "edgert_choices"],
            task_manager=TaskManager(include_path=str(directory), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="as edgert.load takes it; the one that comes with edgert")
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary, edgert.load(arguments.model) as model:
        texts = documents(model, arguments.text, arguments.documents)
        rows = questions(texts)
        directory = Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(directory / "cache")
        for task, form, content in (
            ("rolling", _ROLLING, [{"text": text} for text in texts]),
            ("choices", _MULTIPLE, rows),
        ):
            path = directory / f"{task}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
            (directory / f"{task}.yaml").write_text(form.format(path=path))
        result = through_the_daemon(arguments.model, model.name, model.path, directory, model.context)
        figures = compare(model, result, texts, rows)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["largest_difference_nats"] > 1e-3 or figures["same_choices"] < len(rows):
        raise SystemExit("the two ways differ")


def compare(
    model: edgert.Model, result: dict[str, Any], texts: Sequence[str], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    first = model.tokenizer.bos_token_id
    prefix = model.tokenizer.eos_token_id if first is None else first
    assert prefix is not None
    theirs, ours, tokens = [], [], 0
    samples = sorted(result["samples"]["edgert_rolling"], key=lambda sample: sample["doc_id"])
    for sample, text in zip(samples, texts, strict=True):
        known = model.tokenizer.encode(text, add_special_tokens=False)
        measured = evaluate(model, [prefix, *known])
        theirs.append(_logprob(sample["resps"]))
        ours.append(-math.log(measured.perplexity) * measured.tokens)
        tokens += measured.tokens
    same = right = 0
    for sample in result["samples"]["edgert_choices"]:
        row = rows[sample["doc_id"]]
        found = [_logprob(one) for one in sample["filtered_resps"]]
        own = [_continuation(model, row["begin"], choice) for choice in row["choices"]]
        same += found.index(max(found)) == own.index(max(own))
        right += own.index(max(own)) == row["label"]
    words = sum(len(re.split(r"\s+", text)) for text in texts)  # as the harness counts them
    return {
        "model": model.name,
        "documents": len(texts),
        "tokens": tokens,
        "word_perplexity_harness": result["results"]["edgert_rolling"]["word_perplexity,none"],
        "word_perplexity_eval": math.exp(-sum(ours) / words),
        "token_perplexity_harness": math.exp(-sum(theirs) / tokens),
        "token_perplexity_eval": math.exp(-sum(ours) / tokens),
        "largest_difference_nats": max(abs(a - b) for a, b in zip(theirs, ours, strict=True)),
        "accuracy_harness": result["results"]["edgert_choices"]["acc,none"],
        "accuracy_eval": right / len(rows),
        "same_choices": same,
    }


def _logprob(response: Any) -> float:
    """The number in the harness's nested lists."""
    while not isinstance(response, int | float):
        response = response[0]
    return float(response)


def _continuation(model: edgert.Model, begin: str, choice: str) -> float:
    """As the harness has it: spaces at the end of the beginning go with the choice."""
    stripped = begin.rstrip()
    choice = begin[len(stripped) :] + choice
    whole = model.tokenizer.encode(stripped + choice, add_special_tokens=False)
    count = len(model.tokenizer.encode(stripped, add_special_tokens=False))
    return sum(one[0] for one in score(model, whole)[count:] if one is not None)


if __name__ == "__main__":
    main()

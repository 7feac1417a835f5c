"""docs/docs-moe, from documentation to a bundle, at toy size: its scripts run as its README runs them."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import runpy
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import F32, convert, open_model
from reference import Reference, assert_close

RECIPE = Path(__file__).parents[1] / "docs/docs-moe"
CONTEXT = 32
SIZES = (
    *("--hidden-size", 32, "--num-hidden-layers", 2, "--num-attention-heads", 4, "--num-key-value-heads", 2),
    *(
        "--head-dim",
        8,
        "--num-experts",
        4,
        "--moe-intermediate-size",
        32,
        "--max-position-embeddings",
        CONTEXT,
    ),
)
TRAINING = ("--batch-size", 4, "--warmup-steps", 1)

WORDS = ("the", "a", "spline", "of", "folds", "reads", "into", "every", "file", "sorted", "table", "module")


def prose(rng: random.Random) -> str:
    """Three paragraphs; enough for a document to be kept."""
    return "\n\n".join(" ".join(rng.choices(WORDS, k=50)).capitalize() + "." for _ in range(3))


def man_page(name: str, text: str) -> str:
    return (
        f'.\\" A comment.\n.TH {name} 1\n.SH NAME\n{name} \\- fold a spline into a widget\n'
        f".SH DESCRIPTION\n.B {name}\n{text}\n"
    )


def html_page(name: str, text: str) -> str:
    return (
        f"<html><head><title>Title</title></head><body><nav>Next page</nav>"
        f"<main><h1>{name}</h1><p>{text}</p></main></body></html>"
    )


# domain: folder and extension of its files, and how a document is written. CPython's are reStructuredText.
FORMS: dict[str, tuple[str, str, Any]] = {
    "python": (
        "doc/python3.11/html/_sources/library",
        ".rst.txt",
        lambda name, text: f":mod:`{name}`\n\n{text}",
    ),
    "sql": ("doc/sqlite3", ".html", html_page),
    "git": (
        "doc/git-doc",
        ".txt",
        lambda name, text: f"NAME\n----\ngit-{name} - Sort every branch\n\n{text}",
    ),
    "rust": ("doc/rust-doc/html/book", ".html", html_page),
    "perl": ("perl/5.36.0/pod", ".pod", lambda name, text: f"=head1 NAME\n\n{name} - read a table\n\n{text}"),
    "man": ("man/man1", ".1.gz", man_page),
}


def write_packages(root: Path, split_of: Any) -> None:
    """For each domain two documents whose names put them into the training split, and one into the other."""
    rng = random.Random(0)
    for domain, (folder, extension, form) in FORMS.items():
        path = root / "usr/share" / folder
        path.mkdir(parents=True)
        for split, wanted in (("train", 2), ("valid", 1)):
            candidates = (f"{domain}{i}" for i in count())
            names = (name for name in candidates if split_of(name + extension) == split)
            for name in islice(names, wanted):
                document = form(name, prose(rng)).encode()
                (path / f"{name}{extension}").write_bytes(
                    gzip.compress(document) if extension.endswith(".gz") else document
                )


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """Imports the recipe's modules, which are forgotten again: their names are as short as scripts' names are."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPE)
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(RECIPE)):
            del sys.modules[name]


def run(script: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(RECIPE / script), run_name="__main__")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, scripts: Any) -> Path:
    """The folder with everything that the recipe's commands make."""
    made = tmp_path_factory.mktemp("recipe")
    write_packages(made / "packages", scripts("corpus").split_of)
    run("corpus.py", made / "packages", made / "corpus.jsonl")
    run("tokenizer.py", made / "corpus.jsonl", made / "data", "--vocab-size", 320)
    run("questions.py", made / "corpus.jsonl", made / "questions.jsonl")
    run("train.py", made / "base", "--data", made / "data", "--steps", 3, *TRAINING, *SIZES)
    tuning = ("--start", made / "base/checkpoint.pt", "--questions", made / "questions.jsonl", "--decay", 1)
    run("train.py", made / "chat", "--data", made / "data", "--steps", 3, *TRAINING, *tuning)
    run("export.py", made / "chat/checkpoint.pt", made / "data/tokenizer.json", made / "docs-moe")
    return made


def test_corpus_holds_text_of_every_domain_and_split(made: Path) -> None:
    documents = [json.loads(line) for line in (made / "corpus.jsonl").read_text().splitlines()]
    found = sorted((document["domain"], document["split"]) for document in documents)
    assert found == sorted((domain, split) for domain in FORMS for split in ("train", "train", "valid"))
    for document in documents:
        for markup in ("<", ".SH", "\\-", "A comment", "Next page", "Title"):
            assert markup not in document["text"]


def test_questions_come_from_descriptions(made: Path) -> None:
    lines = (made / "questions.jsonl").read_text().splitlines()
    pairs = {(pair["question"], pair["answer"]) for pair in map(json.loads, lines)}
    pages = [path.name.split(".")[0] for path in (made / "packages/usr/share/man/man1").iterdir()]
    assert len(pages) == 3
    for name in pages:
        forms = ("How do I fold a spline into a widget?", "What can I use to fold a spline into a widget?")
        assert any((form, f"Use {name}.") in pairs for form in forms)
    assert "Sort every branch." in {answer for _, answer in pairs}


def test_exported_checkpoint_is_the_model_that_was_trained(made: Path, scripts: Any) -> None:
    """transformers finds the same loss as the recipe's model with its weights rounded as they are stored."""
    import torch

    model = scripts("train").load_model(made / "chat/checkpoint.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        tokens = scripts("data").load_split(made / "data", "valid")["man"][: CONTEXT + 1].astype(np.int64)
        ours = model(torch.from_numpy(tokens)[None]).cross_entropy
    logits, _, _ = Reference.load(made / "docs-moe").forward(tokens[:-1].tolist())
    theirs = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(tokens[1:]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_exported_checkpoint_converts(made: Path) -> None:
    bundle = convert(made / "docs-moe", made / "docs-moe.edgert", **F32)
    model = open_model(bundle)
    tokens = list(range(CONTEXT))
    expected, _, _ = Reference.load(made / "docs-moe").forward(tokens)
    assert_close(model.logits(model.sequence(), tokens), expected, list(range(CONTEXT)))


def test_questions_are_trained_in_the_form_of_the_chat_template(made: Path, scripts: Any) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "docs-moe")
    pair = json.loads((made / "questions.jsonl").read_text().splitlines()[0])
    messages = [
        {"role": "user", "content": pair["question"]},
        {"role": "assistant", "content": pair["answer"]},
    ]
    library = scripts("tokenizers").Tokenizer.from_file(str(made / "data/tokenizer.json"))
    trained = scripts("data").load_questions(made / "questions.jsonl", library)[0]
    assert trained == tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.eos_token_id in trained


def test_interrupted_training_goes_on_as_if_it_had_not_been(made: Path, scripts: Any, tmp_path: Path) -> None:
    import torch

    train, data = scripts("train"), scripts("data")
    tokens = np.concatenate(list(data.load_split(made / "data", "train").values()))

    def trainer() -> Any:
        model = train.load_model(made / "base/checkpoint.pt")
        batches = data.Batches(tokens, [], batch_size=2, context=CONTEXT, share=0.0, seed=0)
        return train.Trainer(model, batches, train.TrainConfig(steps=4, batch_size=2))

    uninterrupted, first, second = trainer(), trainer(), trainer()
    for _ in range(4):
        uninterrupted.train_step()
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "checkpoint.pt")
    second.restore(tmp_path / "checkpoint.pt")
    for _ in range(2):
        second.train_step()
    assert second.step == uninterrupted.step
    for ours, theirs in zip(second.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_goes_on_with_its_own_options_only(made: Path) -> None:
    with pytest.raises(SystemExit, match="made with other options"):
        run("train.py", made / "base", "--data", made / "data", "--steps", 5, *TRAINING, *SIZES)

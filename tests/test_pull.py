"""edgert pull, against a stand-in for the hub on the loopback."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import convert
from hub import COMMIT, Hub, running
from onnx_models import text_encoder
from test_llama_cpp import write_gguf

import edgert
from edgert import pull as pull_module
from edgert.bundle import Bundle, models_dir
from edgert.cli.main import main
from edgert.converters import shards as shards_module
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, StorageError, UnsupportedError
from edgert.hub import RemoteFile, Spec, choose, parse_spec
from edgert.pull import pull


@pytest.fixture(scope="session")
def sharded(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in four shards that cut through its experts."""
    from safetensors.numpy import load_file, save_file

    directory = tmp_path_factory.mktemp("sharded") / "checkpoint"
    shutil.copytree(tiny_source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    try:
        tensors = load_file(tiny_source / "model.safetensors")
    except TypeError:  # bf16, which numpy lacks
        import torch
        from safetensors.torch import load_file as load_torch
        from safetensors.torch import save_file as save_torch

        loaded = load_torch(tiny_source / "model.safetensors")
        assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())
        _write_shards(directory, loaded, save_torch)
        return directory
    _write_shards(directory, tensors, save_file)
    return directory


def _write_shards(directory: Path, tensors: dict[str, Any], save: Any) -> None:
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(4):
        shard = f"model-{number + 1:05}-of-00004.safetensors"
        mine = names[number * len(names) // 4 : (number + 1) * len(names) // 4]
        save({name: tensors[name] for name in mine}, directory / shard)
        weight_map |= dict.fromkeys(mine, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "edgert"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    with running(Hub.of(sharded)) as hub:
        hub.files["original/consolidated.00.pth"] = b"pickle" * 300
        hub.files["pytorch_model.bin"] = b"pickle" * 300
        hub.files["onnx/model.onnx"] = b"onnx" * 300
        hub.files["README.md"] = b"text"
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_model_is_fetched_converted_and_run_by_name(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    report = pull("hf:org/name")
    assert report.path == models_dir() / "name.edgert"
    assert files_of(report.path) == files_of(convert(sharded, tmp_path / "direct.edgert"))
    with edgert.load("name") as model:
        assert model.generate([1, 2, 3], max_tokens=2).tokens
    assert hub.fetched().isdisjoint(
        {"original/consolidated.00.pth", "pytorch_model.bin", "onnx/model.onnx", "README.md"}
    )
    assert not list((tmp_path / "edgert" / "cache" / "pull").iterdir())
    assert not (tmp_path / "huggingface" / "hub").exists()


def test_one_shard_is_on_disk_at_a_time(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[int] = []
    bring = shards_module.Shards._bring

    def counted(self: shards_module.Shards, path: Path) -> None:
        bring(self, path)
        whole.append(len(self._here))

    monkeypatch.setattr(shards_module.Shards, "_bring", counted)
    pull("hf:org/name")
    # An expert whose matrices lie in two shards needs both.
    assert max(whole) <= 2
    for path, content in hub.files.items():
        if path.endswith(".safetensors"):
            assert len(content) <= hub.served[path] < 1.5 * len(content) + 20_000


def test_a_second_pull_of_the_same_model_leaves_the_first_alone(
    hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would put beginnings of shards, with zeros behind them, where the first has whole ones."""
    bring = shards_module.Shards._bring

    def meanwhile(self: shards_module.Shards, path: Path) -> None:
        bring(self, path)
        with pytest.raises(StorageError, match="another pull is fetching this model"):
            pull("hf:org/name", name="second")

    monkeypatch.setattr(shards_module.Shards, "_bring", meanwhile)
    report = pull("hf:org/name")
    assert files_of(report.path) == files_of(convert(sharded, tmp_path / "direct.edgert"))
    assert not (models_dir() / "second.edgert").exists()


def test_a_directory_that_went_with_the_pull_before_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its opening and its locking the first pull ends and removes it."""
    directory, flock = tmp_path / "pull", fcntl.flock

    def lock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(directory)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    with pull_module._held(directory):
        assert directory.is_dir()
        with pytest.raises(StorageError, match="another pull"), pull_module._held(directory):
            pass


def test_kept_in_the_cache_and_found_there_offline(hub: Hub, tmp_path: Path) -> None:
    first = files_of(pull("hf:org/name", keep=True).path)
    assert (tmp_path / "huggingface/hub/models--org--name/snapshots" / COMMIT).is_dir()
    hub.requests.clear()
    assert files_of(pull(f"hf:org/name@{COMMIT}", name="again", offline=True).path) == first
    assert hub.requests == []


def test_offline_without_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="not in the cache"):
        pull("hf:org/name")
    assert hub.requests == []


def test_a_cut_connection_is_gone_on_with(hub: Hub) -> None:
    path = "model-00002-of-00004.safetensors"
    hub.cut_after[path] = 5000
    pull("hf:org/name")
    resumed = [r for m, p, r in hub.requests if p == f"/cdn/{path}" and r and not r.startswith("bytes=0-")]
    assert resumed == ["bytes=5000-"]


def test_the_next_pull_goes_on_where_one_ended(hub: Hub) -> None:
    path = "model-00001-of-00004.safetensors"
    hub.cut_after[path], hub.gone_after_cut = 7000, True
    with pytest.raises(StorageError):
        pull("hf:org/name")
    hub.status = None
    hub.requests.clear()
    pull("hf:org/name")
    wanted = [r for m, p, r in hub.requests if p == f"/cdn/{path}" and m == "GET"]
    assert wanted[-1] == "bytes=7000-"


@pytest.mark.parametrize("path", ["config.json", "model-00003-of-00004.safetensors"])
def test_a_file_shorter_than_stated_is_refused(path: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.short.add(path)
    size = len(hub.files[path])
    with pytest.raises(StorageError, match=f"{path}: found {size - 1} bytes, the hub says {size}"):
        pull("hf:org/name")


@pytest.mark.parametrize("path", ["model-00003-of-00004.safetensors"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_wrong_checksum_is_refused(path: str, keep: bool, hub: Hub) -> None:
    hub.false_checksums.add(path)
    with pytest.raises(CorruptError, match=rf"{path}: sha256 is [0-9a-f]+, the hub says"):
        pull("hf:org/name", keep=keep)
    assert not (models_dir() / "name.edgert").exists()
    hub.false_checksums.clear()
    pull("hf:org/name", keep=keep)


@pytest.mark.parametrize(
    ("status", "gated", "kind", "message"),
    [
        (401, False, NotFoundError, "no such model, or a private one"),
        (404, False, NotFoundError, "no such model, or a private one"),
        (403, True, NotFoundError, "access has to be asked for"),
        (418, False, StorageError, "the hub answered 418"),
    ],
)
def test_what_the_hub_refuses(
    status: int, gated: bool, kind: type[Exception], message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.status, hub.gated = status, gated
    with pytest.raises(kind, match=message) as caught:
        pull("hf:org/name")
    assert "hf_secret" not in str(caught.value) and hub.tokens == {"Bearer hf_secret"}


def test_a_revision_that_does_not_exist(hub: Hub) -> None:
    with pytest.raises(NotFoundError, match="no such revision"):
        pull("hf:org/name@v2")


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be reached"):
        pull("hf:org/name")


def test_too_little_room_is_said_before_fetching(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(StorageError, match="but only 1000 are free"):
        pull("hf:org/name")
    assert not any(path.endswith(".safetensors") for path in hub.fetched())


def test_paths_of_the_hub_stay_in_their_place(hub: Hub) -> None:
    hub.files["../../evil.safetensors"] = b"x" * 2000
    hub.files["/etc/evil.safetensors"] = b"x" * 2000
    pull("hf:org/name")
    assert not any("evil" in path for path in hub.fetched())


@pytest.mark.parametrize(
    "text",
    [
        "name", "hf:name", "hf:../name", "hf:org/..", "hf:org/na..me", "hf:org/name/x", "hf:org/name@../x", "hf:org/name:../x",
        "hf:org/name:/etc/passwd", "hf:org/name:a/../../b", "hf:org/name:", "hf:/name", "hf:org/name:a\\b", "hf:org/name@a:b:c",
    ],
)  # fmt: skip
def test_names_that_leave_their_place_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_spec(text)


def test_the_name_of_the_bundle_stays_in_its_folder(hub: Hub) -> None:
    for name in ("../x", "a/b", "", ".x"):
        if name:
            with pytest.raises(InvalidArgumentError, match="name: found"):
                pull("hf:org/name", name=name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:a/b", Spec("a/b")),
        ("hf:a/b@v1.0", Spec("a/b", "v1.0")),
        ("hf:a/b@refs/pr/1:q.gguf", Spec("a/b", "refs/pr/1", "q.gguf")),
        ("hf:a/b:dir/q-Q4_K_M.gguf", Spec("a/b", None, "dir/q-Q4_K_M.gguf")),
    ],
)
def test_what_a_name_says(text: str, expected: Spec) -> None:
    assert parse_spec(text) == expected


def chosen(paths: list[str], file: str | None = None) -> list[str]:
    return [row.path for row in choose([RemoteFile(path, 1) for path in paths], Spec("a/b", None, file))]


def test_what_is_chosen() -> None:
    gguf = [
        "m-Q4_K_M.gguf",
        "m-Q8_0.gguf",
        "big/m-BF16-00001-of-00002.gguf",
        "big/m-BF16-00002-of-00002.gguf",
        "README.md",
    ]
    assert (
        chosen(gguf, "Q4_K_M") == chosen(gguf, "q4_k_m") == chosen(gguf, "m-Q4_K_M.gguf") == ["m-Q4_K_M.gguf"]
    )
    assert chosen(gguf, "BF16") == gguf[2:4] == chosen(gguf, "big/m-BF16-00001-of-00002.gguf")
    with pytest.raises(NotFoundError, match="no file or quantisation 'Q4_K_S'; there is"):
        chosen(gguf, "Q4_K_S")
    with pytest.raises(InvalidArgumentError, match="3 GGUF models"):
        chosen(gguf)
    with pytest.raises(InvalidArgumentError, match="fits"):
        chosen(["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0")
    assert chosen(["model.gguf", "README.md"]) == ["model.gguf"]
    both = [
        "config.json",
        "model.safetensors",
        "consolidated.safetensors",
        "metal/model.bin",
        "original/model.safetensors",
    ]
    assert chosen(both) == ["config.json", "model.safetensors"]
    encoder = ["config.json", "modules.json", "1_Pooling/config.json", "model.safetensors", "tokenizer.json"]
    encoder += ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_O4.onnx"]
    assert chosen(encoder) == sorted({*encoder} - {"model.safetensors", "onnx/model_O4.onnx"})
    assert "onnx/model_O4.onnx" in chosen(encoder, "onnx/model_O4.onnx")
    with pytest.raises(UnsupportedError, match="pickled weights"):
        chosen(["pytorch_model.bin", "config.json"])
    with pytest.raises(NotFoundError, match="neither safetensors nor GGUF"):
        chosen(["README.md"])


def test_the_command(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "hf:org/name@v1", "--name", "mine", "--dense-format", "f32"]) == 0
    captured = capsys.readouterr()
    assert "mine.edgert" in captured.out and "`edgert run mine` runs it" in captured.err
    assert main(["pull", "hf:org/other"]) == 1
    assert "no such model" in capsys.readouterr().err


def test_a_gguf_of_the_wanted_quantisation(hub: Hub, tmp_path: Path) -> None:
    hub.files["m-Q8_0.gguf"] = hub.files["m-Q4_0.gguf"] = write_gguf(tmp_path / "m.gguf").read_bytes()
    for keep in (False, True):
        report = pull("hf:org/name:q4_0", backend="llama.cpp", keep=keep)
        assert report.path == models_dir() / "name-q4_0.edgert"
        component = Bundle.open(report.path).component
        assert component is not None
        assert (report.path / component["file"]).read_bytes() == hub.files["m-Q4_0.gguf"]
    assert "m-Q8_0.gguf" not in hub.fetched()


def test_an_encoder_with_its_pooling(hub: Hub, tmp_path: Path) -> None:
    hub.files = Hub.of(text_encoder(tmp_path / "source")).files
    hub.files["onnx/model.onnx"] = hub.files.pop("model.onnx")
    for keep in (False, True):
        report = pull("hf:org/name", keep=keep)
        component = Bundle.open(report.path).component
        assert component is not None and (component["pooling"], component["normalize"]) == ("mean", True)
        with edgert.load("name", memory="256MiB") as model:
            assert model.embed("w1").shape == (1, component["dimensions"])

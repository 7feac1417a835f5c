"""From a directory with an ONNX encoder to a bundle: the model as it is, its tokenizer, and how its output is pooled."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.component import FILE_NAME
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError, UnsupportedError
from edgert.tokenizer import Tokenizer

from .assets import compact, kept_settings
from .checkpoint import resolve
from .component import ComponentReport, Progress, write_component
from .files import read_small_file
from .onnx_file import OnnxFile, Port, read_onnx
from .strict_json import parse_json, read_json_object

_MAX_CONFIG_BYTES = 1 << 20
_MAX_SETTINGS_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 64 << 20
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# Outputs in the order in which they are taken for the embedding: pooled by the model, or one row a token.
_POOLED = ("sentence_embedding", "pooler_output", "text_embeds", "embeddings")
_ROWS = ("last_hidden_state", "token_embeddings", "hidden_states")


@dataclass(frozen=True)
class _Text:
    """How texts become embeddings."""

    output: str
    pooling: str | None
    normalize: bool
    max_length: int | None
    dimensions: int | None
    prompts: Mapping[str, str]
    default_prompt: str | None


def find_onnx(directory: Path) -> Path | None:
    """The ONNX model of a directory: model.onnx there or in onnx/, else the only one. None without any.

    Raises InvalidArgumentError where there are several to choose from.
    """
    for place in (directory, directory / "onnx"):
        if os.path.lexists(place / "model.onnx"):
            return place / "model.onnx"
        found = sorted(name for name in os.listdir(place) if name.endswith(".onnx")) if place.is_dir() else []
        if len(found) > 1:
            raise InvalidArgumentError(
                f"{place}: {len(found)} ONNX models ({', '.join(found[:4])}…); give the path of one of them"
            )
        if found:
            return place / found[0]
    return None


def convert_encoder(
    source: Path, output: str | os.PathLike[str], *, progress: Progress | None = None
) -> ComponentReport:
    """Make the bundle `output` of the ONNX file `source`; tokenizer and settings come from its directory, or the one
    above where that is called onnx/.

    Raises CorruptError, UnsupportedError, NotFoundError naming file and field; InvalidArgumentError for a place that
    must not be written.
    """
    directory = source.parent.parent if source.parent.name == "onnx" else source.parent
    model_path = _real(source.parent, source.name, directory)
    model = read_onnx(model_path)
    files = {source.name: model_path}
    for name in sorted(model.external):
        if not FILE_NAME.fullmatch(name):
            raise UnsupportedError(
                f"{source}: external data in {name[:80]!r}; a name of letters, digits, '.', '_' and '-' is allowed"
            )
        if not os.path.lexists(source.parent / name):
            raise NotFoundError(f"{source.parent / name}: missing, but {source.name} keeps weights there")
        files[name] = _real(source.parent, name, directory)
    config = _object(directory, "config.json")
    component: dict[str, Any] = {
        "kind": "onnx",
        "file": source.name,
        "architecture": str(config.get("model_type") or "onnx")[:80],
        "inputs": [port.as_json() for port in model.inputs],
        "outputs": [port.as_json() for port in model.outputs],
        "output": None, "pooling": None, "normalize": False, "max_length": None, "dimensions": None, "prompts": {},
        "default_prompt": None,
    }  # fmt: skip
    assets, notes = {}, []
    if "input_ids" in {port.name for port in model.inputs}:
        assets = _tokenizer(directory)
        if assets:
            text = _text(model, directory, config)
            component |= vars(text)
            if text.pooling is not None and not _pooling(directory)[1]:
                notes.append(
                    f"{_pooling(directory)[0]}: none; the mean of the tokens is taken, which the model may not be made for"
                )
        else:
            notes.append("tokenizer.json: none; the bundle encodes arrays and embeds no text")
    return write_component(directory, output, component, files, assets, notes=notes, progress=progress)


def _text(model: OnnxFile, directory: Path, config: Mapping[str, Any]) -> _Text:
    unknown = [port.name for port in model.inputs if port.name not in TEXT_INPUTS]
    if unknown:
        raise UnsupportedError(f"{model.path}: input {unknown[0]!r}; texts give {', '.join(TEXT_INPUTS)}")
    port = _chosen(model)
    modules = _modules(directory)
    pooling, (where, kind) = None, _pooling(directory)
    if len(port.shape) == 3:
        stated = [name for key, name in _POOLINGS.items() if kind.get(key) is True]
        if len(stated) > 1 or (kind and not stated):
            raise UnsupportedError(
                f"{directory / where}: {', '.join(stated) or 'this pooling'} is not done; one of {', '.join(_POOLINGS)} is"
            )
        pooling = stated[0] if stated else "mean"
    for name in modules.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise UnsupportedError(
            f"{directory / 'modules.json'}: a module {name!r}, which is not in the ONNX model"
        )
    limits = [_object(directory, "sentence_bert_config.json").get("max_seq_length")]
    limits += [config.get("max_position_embeddings")]
    lengths = [value for value in limits if type(value) is int and value > 0]
    stated_prompts = _object(directory, "config_sentence_transformers.json")
    prompts, default = stated_prompts.get("prompts"), stated_prompts.get("default_prompt_name")
    kept = {
        str(name): text
        for name, text in (prompts.items() if isinstance(prompts, dict) else ())
        if isinstance(text, str) and len(text) <= 4096
    }
    if default is not None and default not in kept:
        raise UnsupportedError(
            f"{directory / 'config_sentence_transformers.json'}: default_prompt_name {str(default)[:60]!r} is none of its prompts"
        )
    width = port.shape[-1] if port.shape[-1] else config.get("hidden_size")
    return _Text(
        output=port.name,
        pooling=pooling,
        normalize="Normalize" in modules,
        max_length=min(lengths) if lengths else None,
        dimensions=width if type(width) is int else None,
        prompts=kept,
        default_prompt=default,
    )


def _chosen(model: OnnxFile) -> Port:
    """The output that is the embedding."""
    for name, rank in [*((name, 2) for name in _POOLED[:1]), *((name, 3) for name in _ROWS)]:
        port = model.port(name)
        if port is not None and len(port.shape) == rank:
            return port
    for port in model.outputs:
        if port.name in _POOLED or len(port.shape) in (2, 3):
            return port
    raise UnsupportedError(
        f"{model.path}: outputs {', '.join(port.name for port in model.outputs)}; one of rank 2 or 3 is needed to embed texts"
    )


def _pooling(directory: Path) -> tuple[str, dict[str, Any]]:
    """The file that states the pooling, and what it states: nothing where it is missing."""
    name = f"{_modules(directory).get('Pooling', '1_Pooling')}/config.json"
    return name, _object(directory, name)


def _modules(directory: Path) -> dict[str, str]:
    """Folder by kind of module, as sentence-transformers lists them; empty where it does not."""
    path = directory / "modules.json"
    if not os.path.lexists(path):
        return {}
    rows = parse_json(bytes(read_small_file(resolve(directory, path.name), _MAX_CONFIG_BYTES)), str(path))
    result = {}
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, dict) or not isinstance(row.get("type"), str):
            raise CorruptError(
                f"{path}: found {str(row)[:80]}, allowed is a list of objects of type and path"
            )
        folder = row.get("path", "")
        if not isinstance(folder, str) or "/" in folder or folder.startswith("."):
            raise CorruptError(f"{path}: path: found {str(folder)[:80]!r}, allowed is the name of a folder")
        result[row["type"].rpartition(".")[2]] = folder
    return result


def _tokenizer(directory: Path) -> dict[str, bytes]:
    if not os.path.lexists(directory / "tokenizer.json"):
        return {}
    content = bytes(read_small_file(resolve(directory, "tokenizer.json"), _MAX_TOKENIZER_BYTES))
    settings = kept_settings(_object(directory, "tokenizer_config.json", _MAX_SETTINGS_BYTES))
    Tokenizer(content, decodes=False)  # what cannot be run is better refused now
    return {"tokenizer.json": content, "tokenizer_config.json": compact(settings)}


def _object(directory: Path, name: str, max_bytes: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON file of the directory; empty where it is missing."""
    if not os.path.lexists(directory / name):
        return {}
    return read_json_object(resolve(directory, name), max_bytes=max_bytes, max_values=1 << 20)


def _real(folder: Path, name: str, directory: Path) -> Path:
    """The file itself; a link may lead where those of a checkpoint may."""
    path = folder / name
    return resolve(directory, str(path.relative_to(directory))) if path.is_symlink() else path

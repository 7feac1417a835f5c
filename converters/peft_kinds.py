"""PEFT's kinds that add sparse values, gains, shifts, rows or soft prompts, and what any kind may bring along."""

from typing import TYPE_CHECKING

from edgert.errors import CorruptError, UnsupportedError

from .peft_reader import Delta, Reader, ends, name_of

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]

_MAX_SOFT_PROMPT = 4096
_MAX_SAVED = 256
_COPIES = (".modules_to_save", ".original_module")
_TIED = ("embed_tokens", "lm_head")
_BASE_WEIGHT = ".base_layer.weight"


def shira(reader: Reader) -> None:
    """`shira_weight` [n] at `shira_indices` [2, n]: rows (outputs), then columns; no scale of its own."""
    import numpy as np

    for module in reader.modules(".shira_weight"):
        values = reader.take(f"{module}.shira_weight", 1)
        places = reader.take(f"{module}.shira_indices", 2)
        if places.shape != (2, values.shape[0]):
            raise CorruptError(
                f"{reader.file}: tensor {module}.shira_indices: shape {list(places.shape)}, needed is [2, {values.shape[0]}]"
            )
        _check_indices(reader, f"{module}.shira_indices", places)
        rows, cols = (np.ascontiguousarray(row, dtype=np.int32) for row in places)
        if reader.config.get("fan_in_fan_out"):
            rows, cols = cols, rows
        reader.add(Delta(name_of(module), rows=rows, cols=cols, values=values))


def supertuning(reader: Reader) -> None:
    """`supertuning_values` [n] at flat `supertuning_indices` [n]; beside them LoRA, where there is any."""
    for module in reader.modules(".supertuning_values"):
        if f"{module}.supertuning_indices" not in reader.tensors:
            raise UnsupportedError(
                f"{reader.where}: save_precomputed_indices: the places are not saved, but found in the base's weights; save "
                "them with it on"
            )
        values = reader.take(f"{module}.supertuning_values", 1)
        places = reader.take(f"{module}.supertuning_indices", 1)
        if places.shape != values.shape:
            raise CorruptError(
                f"{reader.file}: tensor {module}.supertuning_indices: shape {list(places.shape)}, needed is {list(values.shape)}"
            )
        _check_indices(reader, f"{module}.supertuning_indices", places)
        delta = Delta(name_of(module), flat=places.astype("int64"), values=values)
        if reader.config.get("r"):
            reader.check_size(f"{module}.supertuning_lora_A.weight")
            delta.a = reader.take(f"{module}.supertuning_lora_A.weight", 2)
            delta.b = reader.take(f"{module}.supertuning_lora_B.weight", 2)
            reader.check_rank(module, delta.a, delta.b)
            delta.scale = reader.alpha(delta.module) / delta.a.shape[0]
        reader.add(delta)


def _check_indices(reader: Reader, name: str, places: "Array") -> None:
    import numpy as np

    odd = (places != np.floor(places)) | (places < 0) | (places >= 2**31)
    if odd.any():
        raise CorruptError(f"{reader.file}: tensor {name}: holds {places[odd][0]}, which is no index")


def ia3(reader: Reader) -> None:
    """`ia3_l` scales a module's output, or the input of those that feedforward_modules name or match."""
    pattern = reader.text("feedforward_modules")
    targets = frozenset(() if pattern is not None else reader.names("feedforward_modules"))
    for module in reader.modules(".ia3_l"):
        gain = reader.take(f"{module}.ia3_l", 2)
        name = name_of(module)
        feedforward = any(end in targets for end in ends(name))
        if pattern is not None:
            feedforward = reader.pattern(pattern, "feedforward_modules").matches(name)
        if gain.shape[0 if feedforward else 1] != 1:
            raise CorruptError(f"{reader.file}: tensor {module}.ia3_l: shape {list(gain.shape)}")
        vector = gain.reshape(-1) - 1
        reader.add(Delta(name, input_gain=vector) if feedforward else Delta(name, gain=vector))


def beft(reader: Reader) -> None:
    """`beft_bias` is added."""
    for module in reader.modules(".beft_bias"):
        reader.add(Delta(name_of(module), shift=reader.take(f"{module}.beft_bias", 2).reshape(-1)))


def trainable_tokens(reader: Reader) -> None:
    """Rows of the embedding, as they are after training."""
    tokens(reader, reader.config.get("token_indices"), ".trainable_tokens_delta")


def ln_tuning(reader: Reader) -> None:
    """Weights of norms, as they are after training."""
    for module in reader.modules(".ln_tuning_layers.weight"):
        weights = reader.take(f"{module}.ln_tuning_layers.weight", 1, stored=True)
        reader.add(Delta(name_of(module), weights=weights))


def prompt(reader: Reader) -> None:
    """Embeddings of tokens before the first; P-tuning saves what its encoder makes of them."""
    reader.adapter.soft_prompt = _prompt(reader)


def prefix(reader: Reader) -> None:
    """Keys and values of tokens before the first, layer by layer."""
    reader.adapter.prefix = _prompt(reader)


def _prompt(reader: Reader) -> "Array":
    name = "prompt_embeddings"
    if name in reader.tensors and (reader.tensors[name].shape or (0,))[0] > _MAX_SOFT_PROMPT:
        raise CorruptError(
            f"{reader.file}: tensor {name!r}: shape {list(reader.tensors[name].shape)}; at most {_MAX_SOFT_PROMPT} tokens are allowed"
        )
    found: Array = reader.take(name, 2)
    return found


# --- beside any kind --------------------------------------------------------------------------------


def tokens(reader: Reader, stated: object, ending: str) -> None:
    """Trained tokens: those of a list, or of a list for each module."""
    import numpy as np

    if not stated:
        return
    for module in reader.modules(ending):
        name = name_of(module)
        listed = stated
        if isinstance(stated, dict):
            listed = next((stated[end] for end in ends(name) if end in stated), None)
        weights = reader.take(f"{module}{ending}", 2, stored=True)
        good = isinstance(listed, list) and all(type(token) is int and 0 <= token < 2**31 for token in listed)
        ids: list[int] = listed if good else []  # type: ignore[assignment]
        if len(ids) != weights.shape[0] or len(set(ids)) != len(ids):
            raise CorruptError(
                f"{reader.where}: {ending.rpartition('.')[2]} of {name} needs {weights.shape[0]} different token ids, found {listed!r:.60}"
            )
        rows = np.array(ids, np.int32)
        order = np.argsort(rows)
        reader.add(Delta(name, weights=weights[order], weight_rows=rows[order]))


def saved_modules(reader: Reader) -> None:
    """What modules_to_save names is saved as it is after training; so is what ensure_weight_tying keeps equal to it."""
    wanted = reader.names("modules_to_save")
    if len(wanted) > _MAX_SAVED:
        raise CorruptError(
            f"{reader.where}: modules_to_save: {len(wanted)} names; at most {_MAX_SAVED} are allowed"
        )
    if reader.config.get("ensure_weight_tying") and any(name in _TIED for name in wanted):
        wanted = [*wanted, *_TIED]
    for name in sorted(reader.left):
        stem, _, ending = name.rpartition(".")
        module = name_of(stem)
        if stem.endswith(_COPIES):  # beside it, where save_embedding_layers has been asked for
            module = module.rpartition(".")[0]
        if not _is_of(module, wanted):
            continue
        if stem.endswith(_COPIES) and f"{stem.rpartition('.')[0]}.{ending}" in reader.tensors:
            reader.left.discard(name)
            continue
        if ending == "weight":
            weights = reader.take(name, len(reader.tensors[name].shape), stored=True)
            reader.add(Delta(module, weights=weights))
        elif ending == "bias":
            reader.add(Delta(module, bias=reader.take(name, 1)))
        else:  # a buffer, which is not trained
            found = reader.take(name, len(reader.tensors[name].shape))
            reader.adapter.base_vectors[f"{module}.{ending}"] = found.reshape(-1)


def _is_of(module: str, wanted: list[str]) -> bool:
    """Whether it is, or is part of, a module whose name ends like that: in the middle of a word too, as PEFT has it."""
    parts = module.split(".")
    modules = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return "base_layer" not in parts and any(one.endswith(tuple(wanted)) for one in modules)


def biases(reader: Reader) -> None:
    """Of `bias` other than "none", as they are after training."""
    if reader.config.get("bias", "none") == "none":
        return
    for name in sorted(reader.left):
        if name.endswith(".bias"):
            module = name_of(name.removesuffix(".bias").removesuffix(".base_layer"))
            reader.add(Delta(module, bias=reader.take(name, 1)))


def gates(reader: Reader) -> None:
    """`gate_vector` [inputs], beside whatever changes a module; PEFT has none, those who train gates add them."""
    by_module = {delta.module: delta for delta in reversed(reader.adapter.deltas) if delta.bias is None}
    for module in reader.modules(".gate_vector"):
        delta = by_module.get(name_of(module))
        if delta is not None:
            delta.gate = reader.take(f"{module}.gate_vector", 1)


def base_weights(reader: Reader) -> None:
    """PEFT saves the weights below an adapter of embeddings or of the output head with it, and those of all embeddings
    where it takes them for changed. Of anything else they have no place here."""
    adapted = {delta.module for delta in reader.adapter.deltas}
    for name in sorted(reader.left):
        module = name_of(name.removesuffix(".bias").removesuffix(".base_layer"))
        if name.endswith(".base_layer.bias") and module in adapted:
            reader.adapter.base_vectors[f"{module}.bias"] = reader.take(name, 1)
            continue
        module = name_of(
            name.removesuffix(".weight").removesuffix(".base_layer").removesuffix(".token_adapter")
        )
        below = name.endswith(_BASE_WEIGHT) and module in adapted
        if below or (name.endswith(".weight") and module.endswith(_TIED)):
            reader.adapter.base_weights[module] = reader.tensors[name]
            reader.left.discard(name)

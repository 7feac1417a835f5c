"""PEFT's kinds that add B A: LoRA and those that come down to it."""

from typing import TYPE_CHECKING, Any

from edgert.errors import CorruptError, UnsupportedError

from .peft_reader import MAX_RANK, Delta, FusedDelta, Reader, ends, name_of
from .stored_values import same_type

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array = NDArray[numpy.float32]

_VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Values of init_lora_weights that change the weights of the base as training begins.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
WHAT_ELSE = (
    "make LoRA of it (peft.save_as_lora), or merge it (merge_and_unload) and convert the model that comes out"
)
_OF_EXPERTS = ("gate_up_proj", "down_proj")  # the first is wrapped by the second where both are targets


def lora(reader: Reader) -> None:
    """`lora_A` [rank, in], `lora_B` [out, rank], times alpha / rank; rsLoRA alpha / sqrt(rank); DoRA has a magnitude."""
    for option in _VARIANTS:
        reader.refuse(option, f"this variant of LoRA; {WHAT_ELSE}")
    start = reader.text("init_lora_weights") or ""
    if start.lower().startswith(_CHANGE_THE_BASE):
        raise UnsupportedError(
            f"{reader.where}: init_lora_weights: found {start[:40]!r}, which changes the base's weights; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    if any(reader.modules(".lora_embedding_A")):
        raise UnsupportedError(
            f"{reader.where}: target_modules: LoRA of the embedding is not run by this version; train its tokens "
            "(trainable_token_indices) or all of it (modules_to_save)"
        )
    targets: dict[str, set[str]] = {}  # of modules; of experts alone where none is named
    for target in reader.adapter.target_parameters:
        parent, _, parameter = target.rpartition(".")
        targets.setdefault(parent or "experts", set()).add(parameter)
    for module in reader.modules(".lora_A.weight"):
        name = name_of(module)
        plain = name.removesuffix(".base_layer")
        parameters = sorted({parameter for end in ends(plain) for parameter in targets.get(end, ())})
        fused = bool(parameters) and parameters != ["weight"]
        if not fused:
            reader.check_size(f"{module}.lora_A.weight")
        a, b = same_type(
            reader.take(f"{module}.lora_A.weight", 2, stored=True),
            reader.take(f"{module}.lora_B.weight", 2, stored=True),
        )
        if fused:
            _fused(reader, name, plain, parameters, a, b)
        else:
            _plain(reader, module, ".".join([name, *parameters]), a, b)


def _plain(reader: Reader, module: str, key: str, a: "Array", b: "Array") -> None:
    reader.check_rank(module, a, b)
    delta = Delta(name_of(module), a, b, scale=reader.scale(key, a.shape[0]))
    if reader.config.get("lora_bias"):
        delta.shift = reader.take(f"{module}.lora_B.bias", 1) * delta.scale
    if reader.config.get("use_dora"):
        if delta.shift is not None:
            raise UnsupportedError(
                f"{reader.where}: lora_bias: with use_dora it cannot be run by this version"
            )
        delta.magnitude = reader.take(f"{module}.lora_magnitude_vector", 1)
    reader.add(delta)


def _fused(
    reader: Reader, name: str, module: str, parameters: list[str], a: "NDArray[Any]", b: "NDArray[Any]"
) -> None:
    order = [part for part in _OF_EXPERTS if part in parameters]
    if len(order) != len(parameters) or a.shape[0] != b.shape[1]:
        raise UnsupportedError(
            f"{reader.where}: target_parameters: found {parameters}; read are experts' gate_up_proj and down_proj, and weight"
        )
    inner = name != module
    if inner and len(order) != 2:
        raise CorruptError(f"{reader.file}: tensor {name!r}: target_parameters name no second parameter")
    parameter = order[0] if inner or len(order) == 1 else order[1]
    alpha = reader.alpha(f"{module}.{parameter}")
    root = bool(reader.config.get("use_rslora"))
    reader.adapter.fused.append(FusedDelta(module, parameter, a, b, alpha, root))


def adalora(reader: Reader) -> None:
    """B (E A), times alpha / rank: the rank that training began with counts, whatever is left of it in the end."""
    first = reader.config.get("init_r")
    if first is not None and (type(first) is not int or not 0 < first <= MAX_RANK):
        raise CorruptError(f"{reader.where}: init_r: found {first!r:.40}, allowed are 1 to {MAX_RANK}")
    for module in reader.modules(".lora_E"):
        names = [f"{module}.lora_{part}" for part in "ABE"]
        shapes = [reader.tensors[name].shape for name in names if name in reader.tensors]
        if all(len(shape) == 2 and 0 in shape for shape in shapes):  # nothing is left of its rank
            reader.left -= set(names)
            continue
        a, b = reader.take(f"{module}.lora_A", 2), reader.take(f"{module}.lora_B", 2)
        e = reader.take(f"{module}.lora_E", 2)
        reader.check_rank(module, a, b)
        if e.shape != (a.shape[0], 1):
            raise CorruptError(f"{reader.file}: tensor {module}.lora_E: shape {list(e.shape)}")
        name, rank = name_of(module), a.shape[0]
        alpha = reader.alpha(None)
        reader.add(Delta(name, a * e, b, scale=(alpha if alpha > 0 else rank) / ((first or rank) + 1e-5)))


def vera(reader: Reader) -> None:
    """All modules share A and B, cut to size; each has its diagonals."""
    _shared(reader, "vera")


def pvera(reader: Reader) -> None:
    """VeRA whose first half is the mean of what training drew; the other half is its variance."""
    reader.refuse("sample_at_inference", "sampling")
    _shared(reader, "pvera")


def _shared(reader: Reader, kind: str) -> None:
    import numpy as np

    if f"base_model.{kind}_A" not in reader.tensors:
        raise UnsupportedError(
            f"{reader.where}: save_projection: the projections are not saved, but made by a random generator of PyTorch; "
            "save them with it on"
        )
    shared_a, shared_b = (reader.take(f"base_model.{kind}_{side}", 2) for side in "AB")
    for module in reader.modules(f".{kind}_lambda_b"):
        rows = reader.take(f"{module}.{kind}_lambda_b", 1)
        rank = reader.take(f"{module}.{kind}_lambda_d", 1)
        if rows.shape[0] > shared_b.shape[0] or rank.shape[0] != shared_a.shape[0]:
            raise CorruptError(
                f"{reader.file}: tensor {module}.{kind}_lambda_b: does not fit {kind}_A and {kind}_B"
            )
        b = rows[:, np.newaxis] * shared_b[: rows.shape[0]]
        a = (rank[:, np.newaxis] * shared_a)[: b.shape[1]]  # as wide as the widest module
        reader.add(Delta(name_of(module), b=b, a_of=lambda columns, a=a: a[:, :columns]))  # type: ignore[misc]


def loha(reader: Reader) -> None:
    """The product, element by element, of two products of low rank, whose rank is that of both multiplied."""
    for module in reader.modules(".hada_w1_a"):
        names = [f"{module}.hada_w{n}_{side}" for side in "ba" for n in "12"]
        for name in names[:2]:
            if name in reader.tensors:
                reader.check_size(name)
        a1, a2, b1, b2 = (reader.take(name, 2) for name in names)
        for a, b in ((a1, b1), (a2, b2)):
            reader.check_rank(module, a, b)
        rank = a1.shape[0]
        if a1.shape != a2.shape or b1.shape != b2.shape or rank > 64:
            raise CorruptError(
                f"{reader.file}: {module}: hada_w1 and hada_w2 need one shape, of rank 64 at most"
            )
        a = (a1[:, None] * a2[None]).reshape(rank * rank, -1)
        b = (b1[:, :, None] * b2[:, None]).reshape(-1, rank * rank)
        name = name_of(module)
        reader.add(Delta(name, a, b, scale=reader.scale(name, rank, "alpha")))


def miss(reader: Reader) -> None:
    """Inputs are summed at every rank-th place; `miss_block` [rank, out], or its first columns, says what of the sums is added."""
    import numpy as np

    start = reader.config.get("init_weights")
    if start == "bat":
        raise UnsupportedError(
            f"{reader.where}: init_weights: found 'bat', whose difference depends on the base's weights; {WHAT_ELSE}"
        )
    for module in reader.modules(".miss_block"):
        reader.check_size(f"{module}.miss_block")
        block = reader.take(f"{module}.miss_block", 2)
        eye = np.eye(block.shape[0], dtype=np.float32)

        def a_of(columns: int, eye: "Array" = eye) -> "Array":
            return np.tile(eye, -(-columns // len(eye)))[:, :columns]

        reader.add(Delta(name_of(module), b=block.T, a_of=a_of, repeats_b=start == "mini"))

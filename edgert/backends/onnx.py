"""ONNX Runtime (extra `onnx`): encoders of text, images and sound, on the CPU.

The session's memory is outside edgert's arenas: what the files take is held against the budget before loading, what
loading took is measured after it, and batches are kept to what the budget leaves.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from edgert.adapters import AdapterChoice
from edgert.backends import library
from edgert.backends.memory import Meter
from edgert.bundle import Bundle
from edgert.component import check_files
from edgert.errors import BudgetError, CorruptError, InvalidArgumentError, UnsupportedError
from edgert.model import Model
from edgert.tokenizer import tokenizer_of

if TYPE_CHECKING:
    import numpy
    import numpy.typing


_SPARE_BYTES = 16 << 20  # of the library itself
_RUN_TOKENS = 1024  # of one run: enough to keep the cores busy, and its activations stay near the caches
_MAX_BATCH = 4096
_CUT_TOKENS = 16  # at the end of a text that is cut, which may differ from the whole text's
_MAX_TEXTS = 1 << 20


class Encoder(Model):
    """A Model that embeds texts or encodes arrays; what generates text is refused."""

    backend = "onnx"

    def __init__(self, bundle: Bundle, knob_values: Mapping[str, Any]) -> None:
        component = bundle.component
        assert component is not None
        self._component = component
        self._ort = library("onnxruntime", str(bundle.path))
        tokenizer = tokenizer_of(bundle)
        held = 0 if tokenizer is None else tokenizer.memory_bytes
        self._meter = Meter(bundle.name, knob_values)
        file_bytes = sum(row["bytes"] for row in bundle.manifest["files"])
        # The library reads the model whole and then makes tensors of it; weights in files beside it are read once.
        model_bytes = sum(r["bytes"] for r in bundle.manifest["files"] if r["name"] == component["file"])
        minimum = file_bytes + model_bytes + held + _SPARE_BYTES
        self._meter.require(minimum, "the model's files, its tokenizer and the library")
        _check_files(bundle)
        with self._meter.loading(held):
            self._session: Any = self._open(bundle)
        super().__init__(
            bundle.name,
            bundle.path,
            tokenizer,
            {},
            context=component["max_length"] or 0,
            vocab_size=0 if tokenizer is None else tokenizer.vocab_size,
            minimum_bytes=minimum,
        )
        self._inputs = {port.name: port for port in self._session.get_inputs()}
        # What a run takes for each position of a text: more for longer ones, so the longest so far speaks for all.
        self._row_bytes, self._row_length = 0.0, 0
        self._last_growth = 0
        self._counts = {"texts": 0, "tokens": 0, "runs": 0, "encode_s": 0.0}

    # --- encoding -----------------------------------------------------------------------------------

    @property
    def dimensions(self) -> int | None:
        """Of an embedding; None where the model does not say."""
        stated: int | None = self._component["dimensions"]
        return stated

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        batch_size: int = 32,
        prompt: str | None = None,
    ) -> "numpy.typing.NDArray[numpy.float32]":
        import numpy

        if self._component["output"] is None:
            raise self._unable("it takes arrays, not text (see encode)")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not 1 <= batch_size <= _MAX_BATCH:
            raise InvalidArgumentError(f"batch_size: found {batch_size}, allowed are 1 to {_MAX_BATCH}")
        if len(texts) > _MAX_TEXTS:
            raise InvalidArgumentError(f"texts: found {len(texts)}, allowed are {_MAX_TEXTS} at once")
        self._check_dimensions(dimensions, self.dimensions)
        prefix = self._prompt(prompt)
        rows = [self._tokens(prefix + text if isinstance(text, str) else text) for text in texts]
        result: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        done = 0
        while done < len(order):
            count = self._batch(batch_size, [len(rows[index]) for index in order[done : done + batch_size]])
            batch = order[done : done + count]
            for index, vector in zip(batch, self._embed([rows[index] for index in batch]), strict=True):
                result[index] = vector
            done += count
        width = self.dimensions or 0
        vectors = numpy.stack(result) if result else numpy.zeros((0, width), numpy.float32)
        self._check_dimensions(dimensions, vectors.shape[1])
        normalize = self._component["normalize"] if normalize is None else normalize
        vectors = vectors[:, :dimensions]
        if normalize:
            lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / numpy.maximum(lengths, numpy.float32(1e-12))
        return numpy.ascontiguousarray(vectors, numpy.float32)

    def encode(self, **arrays: "numpy.typing.ArrayLike") -> "dict[str, numpy.typing.NDArray[Any]]":
        import numpy

        for name in arrays:
            if name not in self._inputs:
                raise InvalidArgumentError(
                    f"unknown input {name!r:.80}; the inputs are {', '.join(self._inputs)}"
                )
        feed = {}
        for name, port in self._inputs.items():
            if name not in arrays:
                raise InvalidArgumentError(
                    f"input {name!r} is missing; the inputs are {', '.join(self._inputs)}"
                )
            array = numpy.asarray(arrays[name])
            _check_array(name, array, port)
            feed[name] = numpy.ascontiguousarray(array)
        return self._run(feed)

    def _embed(self, rows: Sequence[Sequence[int]]) -> "numpy.typing.NDArray[numpy.float32]":
        """Pooled rows [len(rows), width]."""
        import numpy

        length = max(map(len, rows))
        ids = numpy.zeros((len(rows), length), numpy.int64)
        mask = numpy.zeros((len(rows), length), numpy.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": numpy.zeros_like(ids),
            "position_ids": numpy.broadcast_to(numpy.arange(length), ids.shape),
        }
        feed = {
            name: given[name].astype(_dtype(port.type), copy=False) for name, port in self._inputs.items()
        }
        output = self._run(feed, self._component["output"])[self._component["output"]].astype(numpy.float32)
        self._row_bytes = max(self._row_bytes, self._last_growth / ids.size)
        self._row_length = max(self._row_length, length)
        self._counts["texts"] += len(rows)
        self._counts["tokens"] += int(mask.sum())
        if output.ndim == 2 and self._component["pooling"] is None:
            return output
        if output.ndim != 3 or output.shape[:2] != ids.shape:
            raise UnsupportedError(
                f"{self.path}: output {self._component['output']!r} has shape {list(output.shape)}; one row a token is needed"
            )
        return _pooled(output, mask, self._component["pooling"] or "mean")

    def _run(self, feed: Mapping[str, Any], *outputs: str) -> "dict[str, numpy.typing.NDArray[Any]]":
        names = list(outputs) or [port.name for port in self._session_now().get_outputs()]
        start = time.perf_counter()
        with self._lock, self._meter.running() as growth:
            session = self._session_now()
            try:
                values = session.run(names, dict(feed))
            except Exception as error:  # noqa: BLE001 - the library has classes of its own, without a common base
                raise UnsupportedError(f"{self.path}: onnxruntime: {str(error)[:400]}") from None
        self._last_growth = growth[0]
        self._counts["runs"] += 1
        self._counts["encode_s"] += time.perf_counter() - start
        return dict(zip(names, values, strict=True))

    def _batch(self, wanted: int, lengths: Sequence[int]) -> int:
        """How many of the texts, longest first, fit into what the budget leaves. One that is longer than all before runs
        alone, which measures it."""
        if lengths[0] > self._row_length:
            return 1
        count = min(wanted, len(lengths), max(1, _RUN_TOKENS // lengths[0]))
        while count > 1 and count * lengths[0] * self._row_bytes > self._meter.left_bytes:
            count -= 1
        if lengths[0] * self._row_bytes > self._meter.left_bytes:
            needed = self._meter.used_bytes + int(lengths[0] * self._row_bytes)
            raise BudgetError(
                f"{self.name}: a text of {lengths[0]} tokens needs a budget of {needed} bytes, found {self._meter.budget_bytes}"
            )
        return count

    def _tokens(self, text: object) -> list[int]:
        """The tokens of a text with those that the tokenizer puts around it, cut to what the model takes."""
        if not isinstance(text, str):
            raise InvalidArgumentError(f"texts: found {type(text).__name__}, allowed are strings")
        limit = self.context
        size = 64 * limit if limit else len(text)  # enough, but for words and spaces without end
        tokens = self.tokenizer.encode(text[:size])
        while size < len(text) and len(tokens) <= limit + _CUT_TOKENS:
            size *= 4
            tokens = self.tokenizer.encode(text[:size])
        if not limit or len(tokens) <= limit:
            return tokens or [0]
        text = text[:size]
        plain = self.tokenizer.encode(text, add_special_tokens=False)
        around = len(tokens) - len(plain)
        first = next((i for i in range(around + 1) if tokens[i : i + len(plain)] == plain), 0)
        tail = tokens[first + len(plain) :]
        return [*tokens[: limit - len(tail)], *tail]

    def _prompt(self, name: str | None) -> str:
        prompts: Mapping[str, str] = self._component["prompts"]
        if name is None:
            name = self._component.get("default_prompt")
        if name is None:
            return ""
        if name not in prompts:
            allowed = ", ".join(sorted(prompts)) or "none: the model states no prompts"
            raise InvalidArgumentError(f"prompt: found {name!r:.60}, allowed are {allowed}")
        return prompts[name]

    def _check_dimensions(self, wanted: int | None, there: int | None) -> None:
        if wanted is None:
            return
        if type(wanted) is not int or wanted < 1 or (there is not None and wanted > there):
            raise InvalidArgumentError(
                f"dimensions: found {wanted!r:.40}, allowed are 1 to {there or 'those of the model'}"
            )

    # --- the session --------------------------------------------------------------------------------

    def _open(self, bundle: Bundle) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._meter.threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.enable_cpu_mem_arena = False  # an arena keeps the largest batch's memory for good
        options.enable_mem_pattern = False
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = str(bundle.path / self._component["file"])
        try:
            return self._ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - the library has classes of its own, without a common base
            raise UnsupportedError(f"{path}: onnxruntime cannot load it: {str(error)[:400]}") from None

    def _session_now(self) -> Any:
        if self._session is None:
            raise InvalidArgumentError(f"the model {self.name} is closed")
        return self._session

    @property
    def closed(self) -> bool:
        return self._session is None

    def _stats(self) -> dict[str, Any]:
        self._session_now()
        return {
            **self._counts,
            "budget_bytes": self._meter.budget_bytes,
            "used_bytes": self._meter.used_bytes,
            "peak_bytes": self._meter.peak_bytes,
            "threads": self._meter.threads,
            "isa": f"onnxruntime {self._ort.__version__}",
            "context": self.context,
            "resident": True,
            "minimum_bytes": self.minimum_bytes,
        }

    def _free(self) -> None:
        self._session = None

    # --- what an encoder does not do ----------------------------------------------------------------

    def _no_text(self) -> NoReturn:
        raise self._unable("it is an encoder and generates no text (see embed and encode)")

    def prompt_tokens(self, prompt: object) -> list[int]:
        self._no_text()

    def chat(self, messages: object, **options: Any) -> Any:
        self._no_text()

    def sequence(self, adapter: AdapterChoice = None, prompt: Sequence[int] = ()) -> Any:
        self._no_text()

    def step(self, stream: object, sequence: Any, tokens: list[int], sampler: Any) -> Any:
        self._no_text()

    def interrupt(self, stream: object) -> None:
        self._no_text()

    def logits(self, token_ids: Sequence[int], *, adapter: AdapterChoice = None) -> Any:
        self._no_text()

    def logits_by_parts(
        self, token_ids: Sequence[int], *, first: int = 0, adapter: AdapterChoice = None
    ) -> Any:
        self._no_text()

    def _logits(self, tokens: list[int], adapter: AdapterChoice) -> Any:
        self._no_text()


def _check_files(bundle: Bundle) -> None:
    """Checksums hold, and the model reads no file but the bundle's. Raises CorruptError."""
    from edgert.converters.onnx_file import read_onnx

    assert bundle.component is not None
    check_files(bundle.path, bundle.manifest)
    path = bundle.path / bundle.component["file"]
    strangers = read_onnx(path).external - {row["name"] for row in bundle.manifest["files"]}
    if strangers:
        raise CorruptError(f"{path}: external data in {min(strangers)!r}, which is not a file of the bundle")


def _pooled(
    output: "numpy.typing.NDArray[numpy.float32]", mask: "numpy.typing.NDArray[numpy.int64]", pooling: str
) -> "numpy.typing.NDArray[numpy.float32]":
    """[texts, tokens, width] to [texts, width]; `mask` is 1 where there is a token, and those come first."""
    import numpy

    counts = mask.sum(axis=1)
    weights = mask[:, :, None].astype(numpy.float32)
    result: numpy.typing.NDArray[numpy.float32]
    if pooling == "cls":
        result = output[:, 0]
    elif pooling == "last":
        result = output[numpy.arange(len(output)), counts - 1]
    elif pooling == "max":
        result = numpy.where(weights == 1, output, numpy.float32(-numpy.inf)).max(axis=1)
    else:
        result = (output * weights).sum(axis=1) / counts[:, None].astype(numpy.float32)
    return result


_DTYPES = {"float": "float32", "double": "float64"}


def _dtype(type_name: str) -> str:
    """numpy's name of "tensor(float)"."""
    inner = type_name.removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(inner, inner)


def _check_array(name: str, array: "numpy.typing.NDArray[Any]", port: Any) -> None:
    wanted = _dtype(port.type)
    if wanted not in ("string", str(array.dtype)):
        raise InvalidArgumentError(f"input {name!r}: found {array.dtype}, allowed is {wanted}")
    fits = len(port.shape) == array.ndim and all(
        not isinstance(allowed, int) or allowed == found
        for allowed, found in zip(port.shape, array.shape, strict=True)
    )
    if not fits:
        raise InvalidArgumentError(
            f"input {name!r}: found shape {list(array.shape)}, allowed is "
            f"[{', '.join(str(size) if isinstance(size, int) else 'any' for size in port.shape)}]"
        )

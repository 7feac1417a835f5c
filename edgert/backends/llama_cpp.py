"""llama.cpp through llama-cpp-python (extra `gguf`): GGUF files that edgert's own decoder has no place for.

Prompts, sampling, stop strings and statistics are edgert's; llama.cpp turns tokens into logits. The whole model is in
memory (no mmap), so the budget has to hold it. One sequence is in its context at a time: a stream that takes its turn
after another has its tokens run again. Its logits may differ in the last bits with what a batch holds.
"""

import ctypes
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgert import _native
from edgert.adapters import AdapterChoice
from edgert.backends import library
from edgert.backends.memory import Meter
from edgert.bundle import Bundle
from edgert.component import check_files
from edgert.converters.gguf import GgufFile, part_paths
from edgert.errors import CancelledError, EdgertError, InvalidArgumentError, UnsupportedError
from edgert.model import Model
from edgert.tokenizer import Tokenizer
from edgert.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy
    import numpy.typing

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_BATCH = 128  # tokens; more is little faster on a CPU and takes a row of logits each
_DEFAULT_CONTEXT, _MIN_CONTEXT = 4096, 256
_SPARE_BYTES = 32 << 20  # of the library itself and its graphs
_CACHE_BYTES = 2  # f16, of an element of a key or value


@dataclass
class _Sequence:
    """The tokens that a stream has run."""

    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def close(self) -> None:
        self.tokens.clear()


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file as llama.cpp is to run it: its first part, and the text side as the assets of a bundle."""

    name: str
    path: Path  # for messages: the file or the bundle
    files: tuple[Path, ...]
    assets: Mapping[str, bytes]
    notes: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Raises NotFoundError for a missing part, and CorruptError or UnsupportedError for metadata."""
        from edgert.converters.gguf_tokenizer import assets

        files = tuple(part_paths(path))
        metadata = GgufFile(files[0], metadata_only=True)
        name = _PART.sub(r"\g<1>.gguf", path.name).removesuffix(".gguf")
        try:
            return cls(name, path, files, assets(metadata))
        except UnsupportedError as error:
            return cls(name, path, files, {}, (f"{error}; it takes and gives token ids only",))

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Self:
        """Checks the files. Raises CorruptError."""
        assert bundle.component is not None
        check_files(bundle.path, bundle.manifest)
        files = tuple(part_paths(bundle.path / bundle.component["file"]))
        assets = {row["name"]: bundle.asset(row["name"]) or b"" for row in bundle.manifest["assets"]}
        return cls(bundle.name, bundle.path, files, assets)


class LlamaCppModel(Model):
    backend = "llama.cpp"

    def __init__(self, source: GgufModel, knob_values: Mapping[str, Any]) -> None:
        self._library = library("llama_cpp", str(source.path))
        tokenizer = _tokenizer(source)
        held = 0 if tokenizer is None else tokenizer.memory_bytes
        self._meter = Meter(source.name, knob_values)
        size = _Size(source, held)
        context = size.context(knob_values.get("context"), self._meter)
        self._stepping: object | None = None
        self._abort = False
        self._current: _Sequence | None = None
        with self._meter.loading(held):
            self._llama: Any = self._open(source, context)
        generation = json.loads(source.assets.get("generation_config.json", b"{}"))
        super().__init__(
            source.name,
            source.path,
            tokenizer,
            generation,
            context=context,
            vocab_size=self._llama.n_vocab(),
            minimum_bytes=size.needed(_MIN_CONTEXT),
        )

    def _open(self, source: GgufModel, context: int) -> Any:
        threads = self._meter.threads
        try:
            llama = self._library.Llama(
                model_path=str(source.files[0]),
                n_ctx=context,
                n_batch=min(_BATCH, context),
                n_ubatch=min(_BATCH, context),
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=0,
                use_mmap=False,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise UnsupportedError(f"{source.path}: llama.cpp cannot load it: {str(error)[:300]}") from None
        # Kept with the model: llama.cpp calls it for as long as the context is there.
        self._callback = self._library.ggml_abort_callback(lambda data: self._abort)
        self._library.llama_set_abort_callback(llama.ctx, self._callback, ctypes.c_void_p(0))
        return llama

    @property
    def closed(self) -> bool:
        return self._llama is None

    def sequence(self, adapter: AdapterChoice = None, prompt: Sequence[int] = ()) -> _Sequence:
        self._now()
        return _Sequence()

    def step(
        self, stream: object, sequence: _Sequence, tokens: list[int], sampler: _native.Sampler
    ) -> _native.Sample:
        with self._lock, self._interruptible(stream):
            logits = self._run(sequence, tokens)
            return sampler.sample(logits, len(sequence.tokens))

    def interrupt(self, stream: object) -> None:
        if self._stepping is stream:
            self._abort = True

    @contextmanager
    def _interruptible(self, stream: object) -> "Iterator[None]":
        self._stepping = stream
        try:
            yield
        finally:
            self._stepping, self._abort = None, False

    def _run(self, sequence: _Sequence, tokens: list[int]) -> Any:
        """Run `tokens` after the sequence's own; the logits of the last, which the next run overwrites."""
        llama = self._now()
        todo = tokens
        if self._current is not sequence:
            llama.reset()
            todo = [*sequence.tokens, *tokens]
        self._current = None  # until it stands
        try:
            with self._meter.running():
                llama.eval(todo)
        except RuntimeError as error:
            if self._abort:
                raise CancelledError(f"{self.name}: the step was cancelled") from None
            raise UnsupportedError(f"{self.path}: llama.cpp: {str(error)[:300]}") from None
        self._current = sequence
        sequence.tokens.extend(tokens)
        row = self._library.llama_get_logits_ith(llama.ctx, -1)
        return (ctypes.c_float * self.vocab_size).from_address(ctypes.addressof(row.contents))

    def _logits(self, tokens: list[int], adapter: AdapterChoice) -> "numpy.typing.NDArray[numpy.float32]":
        import numpy

        result = numpy.empty((len(tokens), self.vocab_size), numpy.float32)
        sequence = _Sequence()
        with self._lock:
            for index, token in enumerate(tokens):  # the library gives the last row of a run alone
                result[index] = self._run(sequence, [token])
            self._current = None
        return result

    def _now(self) -> Any:
        if self._llama is None:
            raise InvalidArgumentError(f"the model {self.name} is closed")
        return self._llama

    def _stats(self) -> dict[str, Any]:
        self._now()
        return {
            "budget_bytes": self._meter.budget_bytes,
            "used_bytes": self._meter.used_bytes,
            "peak_bytes": self._meter.peak_bytes,
            "threads": self._meter.threads,
            "isa": f"llama-cpp-python {self._library.__version__}",
            "context": self.context,
            "resident": True,
            "minimum_bytes": self.minimum_bytes,
        }

    def _free(self) -> None:
        if self._llama is not None:
            self._llama.close()
            self._llama = None


class _Size:
    """What a model takes: its files, its keys and values, and the rows of logits of a batch."""

    def __init__(self, source: GgufModel, held_bytes: int) -> None:
        file = GgufFile(source.files[0], metadata_only=True)
        self._path = source.path
        architecture = file.text("general.architecture", 80) or "unknown"
        self._file_bytes = sum(path.stat().st_size for path in source.files)

        def largest(key: str, default: int) -> int:
            field = file.fields.get(f"{architecture}.{key}")
            values = file.numbers(f"{architecture}.{key}") if field is not None else None
            return max((int(value) for value in values or ()), default=default)

        heads = largest("attention.head_count", 1)
        width = largest("embedding_length", 0)
        kv_heads = largest("attention.head_count_kv", heads)
        head = width // max(1, heads)
        elements = kv_heads * (
            largest("attention.key_length", head) + largest("attention.value_length", head)
        )
        self._token_bytes = largest("block_count", 1) * elements * _CACHE_BYTES
        tokens = file.fields.get("tokenizer.ggml.tokens")
        rows = _BATCH * (largest("vocab_size", 0 if tokens is None else tokens.count) + 16 * width)
        self._fixed_bytes = self._file_bytes + 2 * 4 * rows + held_bytes + _SPARE_BYTES
        self._length = largest("context_length", _DEFAULT_CONTEXT)

    def needed(self, context: int) -> int:
        return self._fixed_bytes + context * self._token_bytes

    def context(self, stated: Any, meter: Meter) -> int:
        """Tokens: as stated, else what the model and the budget allow. Raises BudgetError, InvalidArgumentError."""
        if stated not in (None, "auto", 0):
            if stated > self._length:
                raise InvalidArgumentError(f"context: found {stated}, the model allows {self._length}")
            meter.require(self.needed(stated), f"the model in memory, with a context of {stated} tokens")
            return int(stated)
        minimum = min(_MIN_CONTEXT, self._length)
        meter.require(
            self.needed(minimum),
            f"the model in memory ({format_bytes(self._file_bytes)}), which llama.cpp needs whole",
        )
        fits = (meter.budget_bytes - self._fixed_bytes) // max(1, self._token_bytes)
        return max(minimum, min(self._length, _DEFAULT_CONTEXT, fits))


def _tokenizer(source: GgufModel) -> Tokenizer | None:
    content = source.assets.get("tokenizer.json")
    if content is None:
        return None
    template = source.assets.get("chat_template.jinja")
    try:
        return Tokenizer(
            content,
            json.loads(source.assets.get("tokenizer_config.json", b"{}")),
            None if template is None else template.decode(),
        )
    except EdgertError as error:
        raise type(error)(f"{source.path}: {error}") from None

"""Trying allocations: bundles that live as long as a conversion, loaded and held against the unquantised model on a text."""

import json
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgert.errors import InvalidArgumentError

from .bundle import MAGIC, write_bundle
from .decoder import Decoder
from .formats import Chosen, Formats, Triple
from .layout import MAX_EXPERT_FILE_BYTES, BundleFile, Extent, Layout
from .manifest import FORMAT_VERSION, build_manifest, seal
from .pack import Packed, pack_extent
from .tensor import TensorInfo, TransposedTensor

if TYPE_CHECKING:
    from edgert.model import Model

Planned = Callable[[Formats], Layout]
MIN_TOKENS = 256  # fewer tell no losses apart
_FLOAT_FORMATS = {"BF16": "bf16", "F16": "f16"}


@dataclass(frozen=True)
class ModelLoss:
    """Of a bundle against the unquantised model (weights as the checkpoint holds them), over `tokens` of a text: the
    windows of `edgert eval`. `loss` is perplexity / reference_perplexity - 1; KL in nats a token."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float

    @property
    def loss(self) -> float:
        return self.perplexity / self.reference_perplexity - 1


def tokens_of(text: str, assets: Mapping[str, bytes]) -> Sequence[int]:
    """`text` in tokens of the bundle that will have these assets. Raises InvalidArgumentError for too little of it."""
    from edgert.evaluate import encode
    from edgert.tokenizer import Tokenizer

    if "tokenizer.json" not in assets:
        raise InvalidArgumentError(
            "text: the checkpoint has no tokenizer.json, so nothing can be measured on a text"
        )
    config = json.loads(assets.get("tokenizer_config.json", b"{}"))
    tokens = encode(Tokenizer(assets["tokenizer.json"], config), text)
    if len(tokens) < MIN_TOKENS:
        raise InvalidArgumentError(
            f"text: found {len(tokens)} tokens; at least {MIN_TOKENS} are needed to measure a loss"
        )
    return tokens


class Trials:
    """A context manager over `directory`, which is empty and the caller's to remove. `planned` lays bundles out. One thread."""

    def __init__(
        self,
        directory: Path,
        decoder: Decoder,
        assets: Mapping[str, bytes],
        formats: Formats,
        tokens: Sequence[int],
        planned: Planned,
        threads: int,
    ) -> None:
        self._directory = directory
        self._decoder = decoder
        self._assets = assets
        self._tokens = tokens
        self._threads = threads
        self._planned = planned
        self._trial = _TrialBundle(directory / "trial.edgert", decoder, assets, formats, planned, threads)
        self._reference: Path | None = None
        self._reference_perplexity: float | None = None

    def __enter__(self) -> Self:
        self._trial.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._trial.__exit__(*exception)

    def loss(self, chosen: Chosen) -> float:
        """Perplexity over the unquantised model's, less 1."""
        if self._reference_perplexity is None:
            self._reference_perplexity = self._perplexity(self.unquantised())
        return self._perplexity(self.bundle(chosen)) / self._reference_perplexity - 1

    def bundle(self, chosen: Chosen) -> Path:
        """A whole bundle with these formats, until the next is asked for."""
        return self._trial.write(chosen)

    def compare(self, bundle: Path) -> ModelLoss:
        """A whole bundle against the unquantised model."""
        from edgert.evaluate import evaluate

        with (
            _load(bundle) as model,
            _load(self.unquantised(), model.context) as reference,
        ):
            base = evaluate(reference, self._tokens)
            result = evaluate(model, self._tokens, reference=reference)
        assert result.kl_mean is not None and result.top1_agreement is not None
        return ModelLoss(
            result.tokens, result.perplexity, base.perplexity, result.kl_mean, result.top1_agreement
        )

    def _perplexity(self, bundle: Path) -> float:
        from edgert.evaluate import evaluate

        with _load(bundle) as model:
            return evaluate(model, self._tokens).perplexity

    def unquantised(self) -> Path:
        """A bundle of the checkpoint's own weights."""
        if self._reference is None:
            self._reference = self._directory / "reference.edgert"
            self._reference.mkdir()
            name = _exact_format(self._decoder)
            kinds = frozenset(("dense", "embedding", "output", "expert"))
            formats = Formats(name, name, name, (name, name, name), stored=kinds)
            layout = self._planned(formats)
            write_bundle(
                self._reference,
                self._decoder,
                layout,
                self._assets,
                {"provenance": {}, "device": None, "defaults": {}},
                {},
                threads=self._threads,
                progress=None,
            )
        return self._reference


class _TrialBundle:
    """One bundle, written again for every allocation: what an earlier one has packed stays in its files."""

    def __init__(
        self,
        path: Path,
        decoder: Decoder,
        assets: Mapping[str, bytes],
        formats: Formats,
        planned: Planned,
        threads: int,
    ) -> None:
        self._path = path
        self._decoder = decoder
        self._assets = assets
        self._formats = formats
        self._planned = planned
        self._threads = threads
        self._stack = ExitStack()
        self._files: list[BundleFile] = []
        self._descriptors: list[int] = []
        self._dense: list[Packed] = []
        self._packed: dict[tuple[int, int, Triple], tuple[Extent, Packed]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def write(self, chosen: Chosen) -> Path:
        formats = replace(self._formats, chosen=chosen)
        layout = self._planned(formats)
        if not self._files:
            self._path.mkdir()
            for name, content in self._assets.items():
                (self._path / name).write_bytes(content)
            self._add_file(layout.files[0].bytes)
            self._dense = self._pack(layout.dense)
        keys = [_key(extent) for extent in layout.experts]
        new = [
            self._place(extent, layout.alignment)
            for key, extent in zip(keys, layout.experts, strict=True)
            if key not in self._packed
        ]
        for extent, packed in zip(new, self._pack(new), strict=True):
            self._packed[_key(extent)] = extent, packed
        self._seal(layout, [self._packed[key] for key in keys])
        return self._path

    def _add_file(self, size: int) -> None:
        name = f"experts-{len(self._files) - 1:05}.bin" if self._files else "dense.bin"
        descriptor = os.open(self._path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._stack.callback(os.close, descriptor)
        self._files.append(BundleFile(name, size))
        self._descriptors.append(descriptor)

    def _place(self, extent: Extent, alignment: int) -> Extent:
        """The same extent where there is room for it."""
        if len(self._files) == 1 or self._files[-1].bytes + extent.bytes > MAX_EXPERT_FILE_BYTES:
            self._add_file(alignment)
        file = self._files[-1]
        placed = replace(extent, file=len(self._files) - 1, offset=file.bytes)
        file.bytes += -(-extent.bytes // alignment) * alignment
        return placed

    def _pack(self, extents: list[Extent]) -> list[Packed]:
        stop = threading.Event()

        def pack(extent: Extent) -> Packed:
            return pack_extent(
                extent.parts, self._descriptors[extent.file], extent.offset, None, _nothing, stop
            )

        with ThreadPoolExecutor(self._threads, thread_name_prefix="edgert-pack") as pool:
            try:
                return list(pool.map(pack, extents))
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _seal(self, planned: Layout, experts: list[tuple[Extent, Packed]]) -> None:
        extents = [extent for extent, _ in experts]
        layout = replace(planned, files=self._files, experts=extents, remainder_file=None)
        about: dict[str, Any] = {"provenance": {}, "device": None, "defaults": {}, "quantization": {}}
        packed = [*self._dense, *(result for _, result in experts)]
        manifest = build_manifest(self._decoder, layout, packed, self._assets, about)
        for index, (file, descriptor) in enumerate(zip(self._files, self._descriptors, strict=True)):
            os.ftruncate(descriptor, file.bytes)
            header = MAGIC + struct.pack("<II", FORMAT_VERSION, index) + bytes.fromhex(manifest["bundle_id"])
            os.pwrite(descriptor, header, 0)
        (self._path / "manifest.json").write_bytes(seal(manifest))


def _load(bundle: Path, context: int | None = None) -> "Model":
    """Exact, whatever lossy modes the environment asks for."""
    import edgert

    return edgert.load(bundle, context=context, exact=True)


def _key(extent: Extent) -> tuple[int, int, Triple]:
    assert extent.expert is not None
    gate, up, down = (part.format for part in extent.parts[:3])
    return *extent.expert, (gate, up, down)


def _exact_format(decoder: Decoder) -> str:
    """A float format that holds every plain weight of the checkpoint."""
    tensors = [row.source.tensor for row in decoder.dense if row.kind != "exact"]
    tensors += [source.tensor for expert in decoder.experts for source in expert.sources]
    plain = [t.stored if isinstance(t, TransposedTensor) else t for t in tensors if t.stored_format is None]
    dtypes = {t.dtype if isinstance(t, TensorInfo) else "F32" for t in plain}
    return _FLOAT_FORMATS.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def _nothing(amount: int) -> None:
    """Progress of a trial is not told."""

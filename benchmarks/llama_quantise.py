"""Quantises a GGUF with llama.cpp's own quantiser and an importance matrix, and compares logits with given ones.

    python llama_quantise.py JOB.json

Runs in an interpreter that has llama-cpp-python and numpy; quantisation.py writes the job: `gguf` (f32), `imatrix` (npz by
tensor), `reference` (npy of f32 logits, one row a position), `windows` (lists of token ids), `types`, `directory`,
`experts_only` (all else stays f32). Prints a line of JSON a type: bytes of the file, KL divergence, perplexity, top-1.
"""

import ctypes
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_KEPT: list[Any] = []  # what the library holds pointers to


def library() -> Any:
    from llama_cpp import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    _KEPT.append(silent)
    llama_cpp.llama_log_set(silent, None)
    return llama_cpp


def importance(llama: Any, path: Path) -> Any:
    """The array that the quantiser wants: names and mean squares of inputs, closed by an empty name."""
    with np.load(path) as arrays:
        rows = {name: np.ascontiguousarray(arrays[name], np.float32).ravel() for name in arrays.files}
    entries = (llama.llama_model_imatrix_data * (len(rows) + 1))()
    for entry, (name, values) in zip(entries, rows.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    _KEPT.extend((rows, entries))
    return entries


def leave_dense(llama: Any, options: Any) -> None:
    """All but the experts stay f32."""
    overrides = (llama.llama_model_tensor_override * 2)()
    overrides[0].pattern, overrides[0].type = rb"attn_(q|k|v|output)\.weight", 0
    options.tt_overrides = ctypes.cast(overrides, type(options.tt_overrides))
    options.token_embedding_type = options.output_tensor_type = 0
    _KEPT.append(overrides)


def quantise(llama: Any, source: Path, target: Path, kind: str, entries: Any, *, experts_only: bool) -> None:
    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread = 1
    if experts_only:
        leave_dense(llama, options)
    options.imatrix = ctypes.cast(entries, type(options.imatrix))
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")


def logits(llama: Any, path: Path, windows: list[list[int]]) -> Any:
    """Yield f32 [tokens, vocabulary] a window, with keys and values in f32 and plain attention."""
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    length = max(map(len, windows))
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = options.flash_attn_type = 0
    context = llama.llama_init_from_model(model, options)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(length, 0, 1)
    for window in windows:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for position, token in enumerate(window):
            batch.token[position], batch.pos[position], batch.n_seq_id[position] = token, position, 1
            batch.seq_id[position][0], batch.logits[position] = 0, 1
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit(f"llama.cpp cannot run {path}")
        whole = llama.llama_get_logits(context)
        yield np.ctypeslib.as_array(whole, (len(window) * vocabulary,)).reshape(len(window), vocabulary)
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)


def log_softmax(values: Array) -> Array:
    shifted = values.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def compare(found: Any, reference: Array, windows: list[list[int]]) -> dict[str, float]:
    """Of all positions: mean KL divergence (nats, reference to found), perplexity, share of equal first tokens."""
    divergence = loss = 0.0
    agreed = scored = first = 0
    for window, values in zip(windows, found, strict=True):
        expected = log_softmax(reference[first : first + len(window)])
        ours = log_softmax(values)
        divergence += float((np.exp(expected) * (expected - ours)).sum())
        agreed += int((expected.argmax(axis=1) == ours.argmax(axis=1)).sum())
        loss -= float(ours[np.arange(len(window) - 1), window[1:]].sum())
        scored += len(window) - 1
        first += len(window)
    return {
        "kl": max(0.0, divergence / first),
        "perplexity": math.exp(loss / scored),
        "top1": agreed / first,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llama = library()
    entries = importance(llama, Path(job["imatrix"]))
    reference = np.load(job["reference"], mmap_mode="r")
    for kind in job["types"]:
        path = Path(job["directory"]) / f"{kind}.gguf"
        quantise(llama, Path(job["gguf"]), path, kind, entries, experts_only=job["experts_only"])
        row = compare(logits(llama, path, job["windows"]), reference, job["windows"])
        print(
            json.dumps({"engine": "llama.cpp", "name": kind, "bytes": path.stat().st_size, **row}), flush=True
        )
        path.unlink()


if __name__ == "__main__":
    main()

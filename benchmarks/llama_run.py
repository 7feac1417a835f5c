"""One measurement of llama.cpp through llama-cpp-python: prefill and decode of random tokens, after one warm-up.

    python llama_run.py '{"model": "X.gguf", "prompt_tokens": 512, "decode_tokens": 64, "threads": 2, "mmap": false}'

Prints one line of JSON. Without mmap, weights are repacked for the processor as llama.cpp does by default; with it they
stay in the file, for repacked ones would be a second copy of them in memory. With "cold": true, it is the time from
before loading to the first token after the prompt, and nothing warms up.
"""

import ctypes
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp


def load(settings: dict[str, Any]) -> tuple[Any, int]:
    """Context and size of the vocabulary."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = not settings["mmap"]
    fields = {field[0] for field in params._fields_}
    if "load_mode" in fields:
        params.load_mode = (
            llama_cpp.LLAMA_LOAD_MODE_MMAP if settings["mmap"] else llama_cpp.LLAMA_LOAD_MODE_NONE
        )
    else:  # before ggml 0.25
        params.use_mmap = settings["mmap"]
    model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), params)
    if not model:
        raise SystemExit(f"{settings['model']}: llama.cpp cannot load it")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = settings["prompt_tokens"] + settings["decode_tokens"] + 1
    options.n_batch = options.n_ubatch = settings["prompt_tokens"]  # each expert is read once a prompt
    options.n_threads = options.n_threads_batch = settings["threads"]
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"{settings['model']}: llama.cpp cannot make a context")
    return context, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


def step(context: Any, tokens: list[int]) -> None:
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
        raise SystemExit("llama_decode failed")
    llama_cpp.llama_synchronize(context)


def bytes_read() -> int:
    """From storage, by this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def measure(context: Any, vocabulary: int, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Seconds and bytes read of one prompt and its decode; random tokens take the place of its answers."""
    prompt = draw(vocabulary, settings["prompt_tokens"], seed)
    answer = draw(vocabulary, settings["decode_tokens"], seed + 1)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    result: dict[str, Any] = {}
    for phase, batches in (("prefill", [prompt]), ("decode", [[token] for token in answer])):
        count = sum(len(batch) for batch in batches)
        read, times = bytes_read(), [time.perf_counter()]
        for batch in batches:
            step(context, batch)
            times.append(time.perf_counter())
        result[phase] = {
            "tokens_per_s": count / (times[-1] - times[0]),
            "bytes_read_per_token": (bytes_read() - read) / count,
        }
    result["decode"]["token_ms"] = [round(1000 * (end - start), 3) for start, end in pairwise(times)]
    return result


def draw(vocabulary: int, count: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(vocabulary) for _ in range(count)]


def warm(settings: dict[str, Any]) -> dict[str, Any]:
    context, vocabulary = load(settings)
    measure(context, vocabulary, settings, 0)
    return measure(context, vocabulary, settings, 2)


def cold(settings: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    context, vocabulary = load(settings)
    loaded = time.perf_counter()
    step(context, draw(vocabulary, settings["prompt_tokens"], 0))
    logits = llama_cpp.llama_get_logits(context)
    max(range(vocabulary), key=logits.__getitem__)
    end = time.perf_counter()
    return {"load_s": loaded - start, "first_token_s": end - start, "bytes_read": bytes_read()}


def main() -> None:
    settings = json.loads(sys.argv[1])
    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    result = cold(settings) if settings.get("cold") else warm(settings)
    features = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({**result, "version": llama_cpp.__version__, "features": features}))


if __name__ == "__main__":
    main()

"""One measurement of llama.cpp through llama-cpp-python: prefill and decode of random tokens, after one warm-up.

    python llama_run.py '{"model": "X.gguf", "prompt_tokens": 512, "decode_tokens": 64, "threads": 2, "mmap": false}'

Prints one line of JSON. Without mmap, weights are repacked for the processor as llama.cpp does by default; with it they
stay in the file, for repacked ones would be a second copy of them in memory.
"""

import ctypes
import json
import random
import sys
import time
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
    draw = random.Random(seed)
    prompt = [draw.randrange(vocabulary) for _ in range(settings["prompt_tokens"])]
    answer = [draw.randrange(vocabulary) for _ in range(settings["decode_tokens"])]
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    result = {}
    for phase, batches in (("prefill", [prompt]), ("decode", [[token] for token in answer])):
        count = sum(len(batch) for batch in batches)
        read, start = bytes_read(), time.perf_counter()
        for batch in batches:
            step(context, batch)
        seconds = time.perf_counter() - start
        result[phase] = {
            "tokens_per_s": count / seconds,
            "bytes_read_per_token": (bytes_read() - read) / count,
        }
    return result


def main() -> None:
    settings = json.loads(sys.argv[1])
    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    context, vocabulary = load(settings)
    measure(context, vocabulary, settings, 0)
    result = measure(context, vocabulary, settings, 1)
    features = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({**result, "version": llama_cpp.__version__, "features": features}))


if __name__ == "__main__":
    main()

"""What LoRA beside the weights costs llama.cpp: decoding with and without one of attention's projections, by turns.

    python llama_lora.py '{"model": "X.gguf", "rank": 16, "decode_tokens": 64, "threads": 2, "rounds": 5}'

Prints one line of JSON: tokens a second and the seconds that a switch takes. The adapter is random, in f32.
"""

import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import llama_run
import numpy as np

PROMPT_TOKENS = 8


def write_lora(path: Path, model: str, rank: int) -> None:
    rng = np.random.default_rng(0)
    reader = gguf.GGUFReader(model)
    architecture: Any = reader.get_field("general.architecture")
    writer = gguf.GGUFWriter(path, architecture.contents())
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", rank)
    for tensor in reader.tensors:
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k", "attn_v", "attn_output"):
            inputs, outputs = (int(size) for size in tensor.shape)
            for side, shape in (("a", (rank, inputs)), ("b", (outputs, rank))):
                factor = rng.standard_normal(shape, np.float32) * np.float32(0.01)
                writer.add_tensor(f"{tensor.name}.lora_{side}", factor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(context: Any, adapter: Any, vocabulary: int, settings: dict[str, Any]) -> dict[str, float]:
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(1.0)
    switches: list[float] = []
    speeds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(settings["rounds"] + 1):  # the first one warms up
        for count, of_count in speeds.items():
            start = time.perf_counter()
            if llama_cpp.llama_set_adapters_lora(context, adapters, count, scales) != 0:
                raise SystemExit("llama_set_adapters_lora failed")
            switches.append(time.perf_counter() - start)
            tokens = llama_run.measure(context, vocabulary, settings, seed=2)["decode"]["token_ms"]
            of_count.append(1000 / statistics.median(tokens))
    without, with_lora = (statistics.median(one[1:]) for one in speeds.values())
    return {"without": without, "with": with_lora, "switch_s": statistics.median(switches)}


def main() -> None:
    settings = {"prompt_tokens": PROMPT_TOKENS, "mmap": False, **json.loads(sys.argv[1])}
    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "lora.gguf"
        write_lora(path, settings["model"], settings["rank"])
        context, vocabulary = llama_run.load(settings)
        model = llama_cpp.llama_get_model(context)
        adapter = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
        if not adapter:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
    print(json.dumps(measure(context, adapter, vocabulary, settings)))


if __name__ == "__main__":
    main()

"""Switching adapters by PEFT in the fused mode: SHiRA by scatter, LoRA by matrix products, on the matrices of some layers of a shape.

    python peft_run.py '{"config": {...}, "layers": 2, "dtype": "float32", "rank": 7, "threads": 2, "rounds": 5}'

Prints one line of JSON: seconds. A switch unmerges one adapter, and merges the other. PEFT's random SHiRA of `rank` has as many
values as a LoRA of it. A token is the products of a step with one token: attention's projections and as many experts as are used.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira.mask_functions import random_mask
from torch import nn

NAMES = ("one", "two")


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"]

        def linear(inputs: int, outputs: int) -> nn.Linear:
            made = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
            nn.init.normal_(made.weight[:1], std=0.02)
            made.weight.data[1:] = made.weight.data[0]
            return made

        self.attention = nn.ModuleDict({name: linear(hidden, hidden) for name in ("q", "k", "v", "o")})
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {"gate": linear(hidden, width), "up": linear(hidden, width), "down": linear(width, hidden)}
            )
            for _ in range(config["num_experts"])
        )

    def forward(self, x: torch.Tensor, experts: list[int]) -> torch.Tensor:
        q, k, v = (self.attention[name](x) for name in ("q", "k", "v"))
        x = x + self.attention["o"](q + k + v)
        outputs = x
        for index in experts:
            expert: Any = self.experts[index]
            outputs = outputs + expert["down"](nn.functional.silu(expert["gate"](x)) * expert["up"](x))
        return outputs


class Layers(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        dtype = getattr(torch, settings["dtype"])
        config = settings["config"]
        self.experts, self.used = config["num_experts"], config["num_experts_per_tok"]
        self.layers = nn.ModuleList(Layer(settings["config"], dtype) for _ in range(settings["layers"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, torch.randperm(self.experts)[: self.used].tolist())
        return x


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    rank, kinds = settings["rank"], ["q", "k", "v", "o", "gate", "up", "down"]
    shira = ShiraConfig(r=rank, target_modules=kinds, init_weights=False, random_seed=1)
    shira.mask_fn = mask  # type: ignore[assignment]
    configs = {
        "shira": shira,
        "lora": LoraConfig(r=rank, lora_alpha=rank, target_modules=kinds, init_lora_weights=False),
    }
    result: dict[str, Any] = {}
    base: Any = Layers(settings)
    with torch.inference_mode():
        for kind, config in configs.items():
            model = get_peft_model(base, config, adapter_name=NAMES[0])
            model.add_adapter(NAMES[1], config)
            result[kind] = measure(model, settings)
            base = model.unload()
        result["scatter_s"] = scatter(base.layers[0].attention["q"].weight, rank, settings["rounds"])
    print(json.dumps(result))


@functools.cache
def random_mask_of(outputs: int, inputs: int, rank: int) -> torch.Tensor:
    return random_mask(nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu"), rank, random_seed=1)


def mask(layer: nn.Linear, rank: int, **_: object) -> torch.Tensor:
    """The same for all matrices of a shape, for they take long to draw."""
    return random_mask_of(layer.out_features, layer.in_features, rank)


def measure(model: Any, settings: dict[str, Any]) -> dict[str, float]:
    x = torch.randn(1, settings["config"]["hidden_size"], dtype=getattr(torch, settings["dtype"]))
    one = model.base_model.model.layers[0].attention["q"]
    model.set_adapter(NAMES[0])
    unfused = median(lambda: model(x), settings["rounds"])
    model.merge_adapter([NAMES[0]])
    switches, firsts, after = [], [], []
    for turn in range(settings["rounds"] + 1):
        name = NAMES[(turn + 1) % 2]
        switches.append(seconds(functools.partial(switch, model, name)))
        firsts.append(seconds(lambda: model(x)))
        after.append(median(lambda: model(x), 16))
    model.unmerge_adapter()
    ones = []
    for _ in range(10 * settings["rounds"]):
        ones.append(seconds(one.merge))
        one.unmerge()
    return {
        "switch_s": statistics.median(switches[1:]),
        "first_s": statistics.median(firsts[1:]),
        "token_s": statistics.median(after[1:]),
        "unfused_token_s": unfused,
        "matrix_s": statistics.median(ones),
        "values": sum(p.numel() for name, p in model.named_parameters() if f".{NAMES[0]}" in name),
    }


def switch(model: PeftModel, name: str) -> None:
    model.unmerge_adapter()
    model.set_adapter(name)
    model.merge_adapter()


def scatter(weight: torch.Tensor, rank: int, rounds: int) -> float:
    """Seconds in which the values of one matrix are overwritten, with sorted indices at hand."""
    count = rank * sum(weight.shape)
    places = torch.randperm(weight.numel())[:count].sort().values
    values, flat = weight.flatten()[places], weight.detach().view(-1)
    return median(lambda: flat.scatter_(0, places, values), 10 * rounds)


def median(call: Callable[[], object], rounds: int) -> float:
    return statistics.median(seconds(call) for _ in range(rounds + 1))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

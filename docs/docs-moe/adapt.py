"""Train an adapter of docs-moe for one domain of its corpus, on the CPU, and write it as PEFT would.

usage: adapt.py BASE corpus.jsonl OUTPUT --domain sql [--method shira --mask snip] [--grid BUNDLE] [options]

BASE is the Hugging Face directory that export.py wrote. Attention and experts are adapted, each expert's matrices apart.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Batches, Rows, Tokens, consecutive_rows
from export import read_model
from grid import Grid, read_grids
from model import LanguageModel
from safetensors.torch import save_file
from tokenizer import END_OF_TEXT_ID
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize

METHODS = ("shira", "lora")
MASKS = ("snip", "weight", "random")
MASK_BATCHES = 8  # whose gradients choose a snip mask
VALIDATION_ROWS = 160
CHOICE_ROWS = 40  # of the end of the training split, never trained on: they choose between rates


@dataclass(frozen=True)
class TuneConfig:
    """How to train."""

    density: float = 0.01  # shira: the share of each matrix's weights that change
    rank: int = 2  # lora
    steps: int = 200
    batch_size: int = 8
    lr: float = 0.01
    scale: float = 0.6  # times what was trained is what is written
    warmup_steps: int = 10
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) * (1 - step / self.steps)


@dataclass(frozen=True)
class Target:
    """A parameter [..., rows, columns] that is adapted."""

    module: nn.Module
    name: str
    paths: tuple[str, ...]  # of its matrices, as transformers names the modules that hold them

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.module, self.name)
        return weight


def targets(model: LanguageModel) -> Iterator[Target]:
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Target(layer.get_submodule("self_attn"), name, (f"{prefix}self_attn.{name}",))
        for name in ("gate_proj", "up_proj", "down_proj"):
            experts = range(model.config.num_experts)
            paths = tuple(f"{prefix}mlp.experts.{expert}.{name}" for expert in experts)
            yield Target(layer.get_submodule("mlp"), name, paths)


# ---- what is trained


class SparseDelta(nn.Module):
    """W + S, where S has `values` at the places of a mask that stays (SHiRA, arXiv 2406.13175).

    With a grid S takes whole steps of it, so that W + S has codes of its own; the gradient goes through the rounding.
    """

    def __init__(self, weight: Tensor, importance: Tensor, density: float, grid: Grid | None) -> None:
        super().__init__()
        matrices = importance.reshape(-1, importance.shape[-2] * importance.shape[-1])
        count = max(1, round(density * matrices.shape[1]))
        chosen = matrices.topk(count, dim=1).indices.sort(dim=1).values
        first = torch.arange(len(matrices)).unsqueeze(1) * matrices.shape[1]
        self.places: Tensor
        self.register_buffer("places", (first + chosen).flatten())  # in the flattened weight
        self.values = nn.Parameter(torch.zeros(len(self.places)))
        self.grid = None if grid is None else grid.at(self.places)

    def delta(self) -> Tensor:
        if self.grid is None:
            return self.values
        return self.values + (self.grid.snapped(self.values) - self.values).detach()

    def forward(self, weight: Tensor) -> Tensor:
        sparse = torch.zeros(weight.numel(), dtype=weight.dtype).index_put((self.places,), self.delta())
        return weight + sparse.view_as(weight)


class LowRankDelta(nn.Module):
    """W + B A."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        *stack, rows, cols = weight.shape
        self.a = nn.Parameter(torch.randn(*stack, rank, cols) * cols**-0.5)
        self.b = nn.Parameter(torch.zeros(*stack, rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_gradients(model: LanguageModel, rows: Rows) -> float:
    """Of the loss, which is returned, in nats a token."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.from_numpy(rows)).cross_entropy
    loss.backward()
    return float(loss.detach())


def importances(model: LanguageModel, mask: str, batches: Iterable[Rows]) -> dict[str, Tensor]:
    """What a mask is chosen by, for every parameter that is adapted, by the path of its first matrix."""
    chosen = list(targets(model))
    if mask == "weight":
        return {target.paths[0]: target.weight.detach().abs() for target in chosen}
    if mask == "random":
        return {target.paths[0]: torch.rand_like(target.weight) for target in chosen}
    for rows in batches:
        add_gradients(model, rows)
    found = {}
    for target in chosen:
        assert target.weight.grad is not None
        found[target.paths[0]] = (target.weight * target.weight.grad).detach().abs()
    model.zero_grad()
    return found


# ---- what is written


def shira_tensors(target: Target, delta: SparseDelta, original: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What changed, as the difference to the `original` weights, which training on a grid did not start from."""
    matrices = len(target.paths)
    cols, size = target.weight.shape[-1], target.weight.numel() // matrices
    steps = delta.delta().detach()
    values = (target.weight.detach() - original).flatten()[delta.places]
    parts = (part.view(matrices, -1) for part in (delta.places, values, steps != 0))
    for path, places, value, changed in zip(target.paths, *parts, strict=True):
        inside = (places % size)[changed]
        yield f"base_model.model.{path}.shira_weight", value[changed].clone()
        yield (
            f"base_model.model.{path}.shira_indices",
            torch.stack((inside // cols, inside % cols)).to(torch.int32),
        )


def lora_tensors(target: Target, delta: LowRankDelta) -> Iterator[tuple[str, Tensor]]:
    matrices = len(target.paths)
    a = delta.a.detach().view(matrices, *delta.a.shape[-2:])
    b = delta.b.detach().view(matrices, *delta.b.shape[-2:])
    for index, path in enumerate(target.paths):
        yield f"base_model.model.{path}.lora_A.weight", a[index].clone()
        yield f"base_model.model.{path}.lora_B.weight", b[index].clone()


def adapter_config(method: str, config: TuneConfig, base: Path) -> dict[str, Any]:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    own = {"lora_alpha": config.rank, "lora_dropout": 0.0, "bias": "none"} if method == "lora" else {}
    return {
        "peft_type": method.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": config.rank,
        "target_modules": names,
        "fan_in_fan_out": False,
        **own,
    }


# ---- training


def texts(corpus: Path, tokenizer: Tokenizer) -> dict[tuple[str, str], Tokens]:
    """The token ids of each (domain, split)."""
    parts: dict[tuple[str, str], list[Tokens]] = {}
    with corpus.open(encoding="utf8") as lines:
        for document in map(json.loads, lines):
            ids = [END_OF_TEXT_ID, *tokenizer.encode(document["text"], add_special_tokens=False).ids]
            parts.setdefault((document["domain"], document["split"]), []).append(np.array(ids, np.uint16))
    return {key: np.concatenate(found) for key, found in parts.items()}


@torch.no_grad()
def nats(model: LanguageModel, tokens: Tokens, batch_size: int) -> float:
    """The loss a token, of the first rows."""
    rows = consecutive_rows(tokens, model.config.max_position_embeddings, VALIDATION_ROWS)
    losses = [
        len(part) * model(torch.from_numpy(part)).cross_entropy.item()
        for part in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    ]
    return sum(losses) / len(rows) if len(rows) else float("nan")


def report(model: LanguageModel, held_out: dict[str, Tokens], batch_size: int) -> None:
    for name, tokens in held_out.items():
        print(f"{name}: {nats(model, tokens, batch_size):.4f} nats a token", flush=True)


def train(model: LanguageModel, parameters: list[nn.Parameter], batches: Batches, config: TuneConfig) -> None:
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.monotonic()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        loss = add_gradients(model, batches(step))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"step {step + 1}/{config.steps}, {minutes:.1f} min: loss {loss:.3f}", flush=True)


def adapt(
    model: LanguageModel,
    method: str,
    mask: str,
    grids: dict[str, Grid] | None,
    batches: Batches,
    config: TuneConfig,
) -> list[tuple[Target, SparseDelta | LowRankDelta]]:
    """Train an adapter of `model`, which is left as adapted."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen = list(targets(model))
    deltas: list[SparseDelta | LowRankDelta] = []
    if method == "shira":
        for target in chosen:
            target.weight.requires_grad_(True)
        importance = importances(model, mask, (batches(config.steps + i) for i in range(MASK_BATCHES)))
        for target in chosen:
            target.weight.requires_grad_(False)
            grid = None if grids is None else Grid.stacked([grids[path] for path in target.paths])
            deltas.append(SparseDelta(target.weight, importance[target.paths[0]], config.density, grid))
    else:
        deltas = [LowRankDelta(target.weight, config.rank) for target in chosen]
    for target, delta in zip(chosen, deltas, strict=True):
        parametrize.register_parametrization(target.module, target.name, delta)
    trained = [parameter for delta in deltas for parameter in delta.parameters()]
    print(f"{sum(p.numel() for p in trained)} values are trained", flush=True)
    train(model, trained, batches, config)
    for delta in deltas:
        (delta.values if isinstance(delta, SparseDelta) else delta.b).data *= config.scale
    return list(zip(chosen, deltas, strict=True))


def run(
    options: argparse.Namespace, config: TuneConfig, tokens: dict[tuple[str, str], Tokens]
) -> tuple[float, dict[str, Tensor]]:
    """Train one adapter: its loss on text that was held back from training, and its tensors."""
    own = f"{options.domain} {config.seed}"  # else a random mask would be the same in every domain
    torch.manual_seed(zlib.crc32(own.encode()))
    model = read_model(options.base)
    originals = {target.paths[0]: target.weight.detach().clone() for target in targets(model)}
    grids = None
    if options.grid:
        grids = read_grids(options.grid)
        for target in targets(model):
            target.weight.data = Grid.stacked([grids[path] for path in target.paths]).value
    context = model.config.max_position_embeddings
    training = tokens[options.domain, "train"]
    kept_back = CHOICE_ROWS * context + 1
    held_out = {f"validation {domain}": ids for (domain, split), ids in tokens.items() if split == "valid"}
    held_out["held back"] = training[-kept_back:]
    report(model, held_out, config.batch_size)
    batches = Batches(
        training[:-kept_back], [], batch_size=config.batch_size, context=context, share=0, seed=config.seed
    )
    tensors: dict[str, Tensor] = {}
    for target, delta in adapt(model, options.method, options.mask, grids, batches, config):
        if isinstance(delta, SparseDelta):
            tensors.update(shira_tensors(target, delta, originals[target.paths[0]]))
        else:
            tensors.update(lora_tensors(target, delta))
    print(f"rate {config.lr}:", flush=True)
    report(model, held_out, config.batch_size)
    return nats(model, held_out["held back"], config.batch_size), tensors


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter of docs-moe for one domain.")
    parser.add_argument("base", type=Path, help="the Hugging Face directory that export.py wrote")
    parser.add_argument("corpus", type=Path, help="the file that corpus.py wrote")
    parser.add_argument("output", type=Path, help="folder to write into")
    parser.add_argument("--domain", required=True, help="such as sql")
    parser.add_argument("--method", choices=METHODS, default="shira")
    parser.add_argument(
        "--mask", choices=MASKS, default="snip", help="which weights change: |W grad|, |W| or any"
    )
    parser.add_argument(
        "--grid",
        type=Path,
        help="a bundle of BASE: train its quantised weights, in whole steps of their codes",
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[TuneConfig().lr],
        help="the best of several is taken, on text of the training split that is held back (default: %(default)s)",
    )
    for name, default in vars(TuneConfig()).items():
        if name != "lr":
            option = "--" + name.replace("_", "-")
            parser.add_argument(option, type=type(default), default=default, help="(default: %(default)s)")
    options = parser.parse_args()
    if options.grid and options.method != "shira":
        parser.error("--grid goes with shira")
    named = {name: getattr(options, name) for name in vars(TuneConfig())}
    config = TuneConfig(**(named | {"lr": options.lr[0]}))
    tokens = texts(options.corpus, Tokenizer.from_file(str(options.base / "tokenizer.json")))
    found = [run(options, replace(config, lr=lr), tokens) for lr in options.lr]
    tensors = min(found, key=lambda one: one[0])[1]
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.output / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.dumps(adapter_config(options.method, config, options.base), indent=2)
    (options.output / "adapter_config.json").write_text(settings + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

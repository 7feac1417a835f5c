"""Train the model, on the CPU or one GPU.

usage: train.py RUN --data DATA [--start CHECKPOINT --questions questions.jsonl] [options]

Writes RUN/checkpoint.pt. The same command run again goes on from there; on a CPU, with the same number of threads, to
the same weights that an uninterrupted run would have given.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Batches, Tokens, consecutive_rows, load_questions, load_split
from model import LanguageModel, Losses, ModelConfig
from muon import Muon
from tokenizers import Tokenizer
from torch import nn

PROGRESS_EVERY = 20  # steps
VALIDATION_ROWS = 24  # a domain, at every checkpoint
FINAL_VALIDATION_ROWS = 160


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are those of docs-moe's pretraining."""

    steps: int = 1540
    batch_size: int = 16
    muon_lr: float = 0.02
    adamw_lr: float = 0.003
    warmup_steps: int = 50
    decay: float = 0.4  # the share of the steps, at the end, over which the learning rates fall to 0
    load_balance: float = 0.01
    router_z: float = 0.0001
    question_share: float = 0.6
    checkpoint_every: int = 200
    seed: int = 0

    def learning_rate_factor(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        left = 1 - step / self.steps
        return warmup * min(1.0, left / self.decay)


class Trainer:
    """A model with its optimizers: Muon for the hidden matrices, AdamW for embeddings, routers and norms."""

    def __init__(self, model: LanguageModel, batches: Batches, config: TrainConfig) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        self.device = model.embed_tokens.device
        self.step = 0  # steps done
        hidden = [p for name, p in model.layers.named_parameters() if p.dim() > 1 and "router" not in name]
        self.others: list[nn.Parameter] = [p for p in model.parameters() if all(p is not h for h in hidden)]
        self.muon = Muon(hidden, lr=config.muon_lr)
        self.adamw = torch.optim.AdamW(self.others, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def losses(self, rows: np.ndarray) -> Losses:
        with torch.autocast(self.device.type, torch.bfloat16):
            losses: Losses = self.model(torch.from_numpy(rows).to(self.device))
        return losses

    def train_step(self) -> Losses:
        config = self.config
        factor = config.learning_rate_factor(self.step)
        for optimizer, lr in ((self.muon, config.muon_lr), (self.adamw, config.adamw_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        losses = self.losses(self.batches(self.step))
        total = (
            losses.cross_entropy
            + config.load_balance * losses.load_balance
            + config.router_z * losses.router_z
        )
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step()
        self.adamw.step()
        self.model.zero_grad()
        self.step += 1
        return losses

    @torch.no_grad()
    def validate(self, texts: Mapping[str, Tokens], limit: int) -> dict[str, float]:
        """Nats a token in each domain that has a whole row of validation text."""
        context = self.model.config.max_position_embeddings
        results = {}
        for domain, tokens in texts.items():
            rows = consecutive_rows(tokens, context, limit)
            batches = [
                rows[i : i + self.config.batch_size] for i in range(0, len(rows), self.config.batch_size)
            ]
            total = sum(len(batch) * self.losses(batch).cross_entropy.item() for batch in batches)
            if len(rows):
                results[domain] = total / len(rows)
        return results

    def save(self, path: Path) -> None:
        """Swapped in when complete, so that there always is a whole checkpoint."""
        state = {
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
        }
        unfinished = path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        for ours, theirs in ((self.model.config, "model_config"), (self.config, "train_config")):
            if asdict(ours) != state[theirs]:
                raise SystemExit(f"{path}: made with other options: {state[theirs]}. Choose another folder.")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def load_model(path: Path) -> LanguageModel:
    """The model in a checkpoint, on the CPU."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = LanguageModel(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model


def run(trainer: Trainer, validation: Mapping[str, Tokens], checkpoint: Path) -> None:
    """Train to the end, with progress and checkpoints."""

    def report(limit: int) -> None:
        results = trainer.validate(validation, limit)
        print("validation", *(f"{domain} {loss:.4f}" for domain, loss in results.items()), flush=True)

    config = trainer.config
    first, began, average = trainer.step, time.monotonic(), None
    while trainer.step < config.steps:
        losses = trainer.train_step()
        loss = losses.cross_entropy.item()
        average = loss if average is None else 0.97 * average + 0.03 * loss
        if trainer.step % PROGRESS_EVERY == 0 or trainer.step == config.steps:
            seconds = time.monotonic() - began
            row_tokens = config.batch_size * trainer.batches.context
            print(
                f"step {trainer.step}/{config.steps}, {seconds / 60:.1f} min,"
                f" {(trainer.step - first) * row_tokens / seconds:.0f} tokens/s: loss {average:.3f},"
                f" load balance {losses.load_balance.item():.3f}, router z {losses.router_z.item():.2f}",
                flush=True,
            )
        if trainer.step % config.checkpoint_every == 0 and trainer.step < config.steps:
            trainer.save(checkpoint)
            report(VALIDATION_ROWS)
    trainer.save(checkpoint)
    report(FINAL_VALIDATION_ROWS)


def add_options(parser: argparse.ArgumentParser, config: Any, *, without: tuple[str, ...] = ()) -> None:
    """One option for each field of the dataclass `config`; absent from the result unless given."""
    for field in fields(config):
        if field.name not in without:
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                type=type(field.default),
                default=argparse.SUPPRESS,
                metavar="N",
                help=f"(default: {field.default})",
            )


def given(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in fields(config) if hasattr(options, f.name)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model, on the CPU or one GPU.")
    parser.add_argument("run", type=Path, help="folder for the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="the folder that tokenizer.py wrote")
    parser.add_argument("--start", type=Path, help="begin with the weights and sizes of this checkpoint")
    parser.add_argument("--questions", type=Path, help="the file that questions.py wrote")
    add_options(parser, TrainConfig)
    add_options(parser, ModelConfig, without=("vocab_size",))
    options = parser.parse_args()
    sizes, config = given(options, ModelConfig), TrainConfig(**given(options, TrainConfig))
    if options.start and sizes:
        parser.error(f"--start has its own sizes: {', '.join(sizes)}")

    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.from_file(str(options.data / "tokenizer.json"))
    if options.start:
        model = load_model(options.start)
    else:
        model = LanguageModel(ModelConfig(vocab_size=tokenizer.get_vocab_size(), **sizes))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    batches = Batches(
        np.concatenate(list(load_split(options.data, "train").values())),
        load_questions(options.questions, tokenizer) if options.questions else [],
        batch_size=config.batch_size,
        context=model.config.max_position_embeddings,
        share=config.question_share,
        seed=config.seed,
    )
    trainer = Trainer(model, batches, config)
    options.run.mkdir(parents=True, exist_ok=True)
    checkpoint = options.run / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters on {trainer.device}, {trainer.step} steps done", flush=True)
    run(trainer, load_split(options.data, "valid"), checkpoint)


if __name__ == "__main__":
    main()

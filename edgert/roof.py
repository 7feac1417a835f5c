"""How fast a model could be at most on a machine: what its tokens must move, over how fast that moves.

A token's weights and KV come from memory once, and the experts that are not there come from storage, at the same time at
best: the roof is the slower of the two. Misses are those of a store of the same size and policy, simulated without storage (_native.StoreSimulation).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_READ_ALIGNMENT = 4096  # what the engine rounds a read and a slot up to


@dataclass(frozen=True)
class Bandwidths:
    """What a machine does at most; a multiplication and an addition are two operations. Zero operations: not known."""

    memory_bytes_per_s: float
    storage_bytes_per_s: float
    int8_operations_per_s: float = 0.0


@dataclass(frozen=True)
class Work:
    """What one token costs, on average."""

    memory_bytes: float
    storage_bytes: float = 0.0
    operations: float = 0.0


def roof(work: Work, bandwidths: Bandwidths) -> float:
    """Tokens a second when nothing waits but for memory, storage or arithmetic, whichever is slowest."""
    seconds = [
        work.memory_bytes / bandwidths.memory_bytes_per_s,
        work.storage_bytes / bandwidths.storage_bytes_per_s,
    ]
    if bandwidths.int8_operations_per_s:
        seconds.append(work.operations / bandwidths.int8_operations_per_s)
    return 1 / max(seconds)


def sequence_bytes(plan: Mapping[str, int], position: float) -> float:
    """What a token at `position` moves of its own sequence: keys and values of every one before it, and both copies of the
    states of fixed size, of which it reads the one and writes the other. `plan` is that of a single sequence."""
    return plan["kv_bytes"] / plan["context"] * position + plan["state_bytes"]


@dataclass(frozen=True)
class Footprint:
    """What a model's weights weigh where it matters for speed: bytes, and weights (a multiplication and an addition
    each). `experts` holds the bytes of each expert by MoE layer; `dense` is what every token uses but the output head."""

    dense_bytes: int
    dense_weights: int
    output_bytes: int
    output_weights: int
    experts: list[list[int]]
    expert_weights: list[int]  # of one, by MoE layer
    per_token: list[int]  # experts, by MoE layer

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Footprint":
        recipe = manifest["recipe"]
        output = "embedding" if recipe["output"]["tied"] else "output"
        bytes_of, weights_of = {}, {}
        for row in manifest["tensors"]:
            bytes_of[row["name"]] = row["bytes"]
            weights_of[row["name"]] = row["shape"][0] * row["shape"][1] if len(row["shape"]) == 2 else 0
        dense = [name for name in bytes_of if name not in ("embedding", "output")]
        ffns = [recipe["blocks"][recipe["layers"][row["layer"]]]["ffn"] for row in manifest["experts"]]
        return cls(
            dense_bytes=sum(bytes_of[name] for name in dense),
            dense_weights=sum(weights_of[name] for name in dense),
            output_bytes=bytes_of[output],
            output_weights=weights_of[output],
            experts=[[_rounded(extent[2]) for extent in row["extents"]] for row in manifest["experts"]],
            expert_weights=[3 * ffn["moe_intermediate_size"] * recipe["hidden_size"] for ffn in ffns],
            per_token=[ffn["num_experts_per_tok"] for ffn in ffns],
        )

    @property
    def routed_bytes(self) -> float:
        """Of the experts that one token uses."""
        return sum(
            top * sum(sizes) / len(sizes) for top, sizes in zip(self.per_token, self.experts, strict=True)
        )

    @property
    def mean_expert_bytes(self) -> float:
        """1 where there are no experts."""
        sizes = [size for layer in self.experts for size in layer]
        return sum(sizes) / len(sizes) if sizes else 1.0

    @property
    def routed_weights(self) -> int:
        return sum(top * weights for top, weights in zip(self.per_token, self.expert_weights, strict=True))

    @property
    def bits_per_weight(self) -> float:
        """Averaged over all weights that one token of a decode reads."""
        weights = self.dense_weights + self.output_weights + self.routed_weights
        return 8 * (self.dense_bytes + self.output_bytes + self.routed_bytes) / weights

    def decode(self, kv_bytes: float, missed_bytes: float) -> Work:
        """Of one token that moves `kv_bytes` of its sequence; see sequence_bytes()."""
        return Work(
            self.dense_bytes + self.output_bytes + self.routed_bytes + kv_bytes,
            missed_bytes,
            2 * (self.dense_weights + self.output_weights + self.routed_weights),
        )

    def prefill(self, tokens: int, chunks: Sequence["Step"], missed_bytes: float) -> Work:
        """Of one token of a prompt that ran in `chunks`; `missed_bytes` of the whole prompt. Attention over the prompt
        is left out, so the roof is a little high."""
        read = len(chunks) * self.dense_bytes + self.output_bytes
        for chunk in chunks:
            for sizes, ids in zip(self.experts, chunk, strict=True):
                read += sum(sizes[id] for id in ids)
        operations = 2 * (tokens * (self.dense_weights + self.routed_weights) + self.output_weights)
        return Work(read / tokens, missed_bytes / tokens, operations / tokens)


Step = Sequence[Sequence[int]]  # the experts that a step uses, by MoE layer


def chunks(positions: Sequence[Step], size: int) -> list[Step]:
    """A prompt's steps: `size` positions at a time, each layer's experts once."""
    return [
        [sorted(set().union(*ids)) for ids in zip(*positions[first : first + size], strict=True)]
        for first in range(0, len(positions), size)
    ]


def _rounded(size: int) -> int:
    return -(-size // _READ_ALIGNMENT) * _READ_ALIGNMENT

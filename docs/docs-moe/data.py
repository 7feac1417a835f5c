"""What the model is trained and validated on: rows of token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizer import IM_END_ID, IM_START_ID
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int64]  # [rows, context + 1]: inputs and, one on, their targets


def load_split(data: Path, split: str) -> dict[str, Tokens]:
    """The token ids of each domain, as tokenizer.py wrote them."""
    return {path.name.split(".")[0]: np.load(path) for path in sorted(data.glob(f"*.{split}.npy"))}


def load_questions(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Questions with their answers, in the form that the chat template gives them."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def message(role: str, content: str) -> list[int]:
        return [IM_START_ID, *ids(f"{role}\n{content}"), IM_END_ID, *ids("\n")]

    with path.open(encoding="utf8") as lines:
        pairs = [json.loads(line) for line in lines]
    return [message("user", pair["question"]) + message("assistant", pair["answer"]) for pair in pairs]


class Batches:
    """Rows of text from anywhere in the training split, and a share of rows of questions if there are any.

    A batch depends on the seed and the step alone, so that a resumed run goes on as if it had never stopped.
    """

    def __init__(
        self,
        tokens: Tokens,
        questions: list[list[int]],
        *,
        batch_size: int,
        context: int,
        share: float,
        seed: int,
    ) -> None:
        if len(tokens) <= context + 1:
            raise ValueError(f"{len(tokens)} training tokens: more than {context + 1} are needed")
        self.tokens = tokens
        self.questions = questions
        self.context = context
        self.question_rows = int(batch_size * share) if questions else 0
        self.text_rows = batch_size - self.question_rows
        self.seed = seed

    def __call__(self, step: int) -> Rows:
        rng = np.random.default_rng([self.seed, step])
        length = self.context + 1
        starts = rng.integers(0, len(self.tokens) - length, self.text_rows)
        rows: list[npt.ArrayLike] = [self.tokens[start : start + length] for start in starts]
        rows += [self.question_row(rng) for _ in range(self.question_rows)]
        return np.array(rows, np.int64)

    def question_row(self, rng: np.random.Generator) -> list[int]:
        row: list[int] = []
        while len(row) <= self.context:
            row += self.questions[rng.integers(len(self.questions))]
        return row[: self.context + 1]


def consecutive_rows(tokens: Tokens, context: int, limit: int) -> Rows:
    """The first rows of `tokens`, at most `limit` of them; none if there is less text than fills one."""
    count = min(limit, (len(tokens) - 1) // context)
    rows = [tokens[row * context : (row + 1) * context + 1] for row in range(count)]
    return np.array(rows, np.int64).reshape(count, context + 1)

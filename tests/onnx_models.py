"""Small ONNX models, made as they are needed."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{number}" for number in range(40)]
WIDTH = 8


def table() -> np.ndarray:
    """The embedding of each token: float32 [vocabulary, WIDTH]."""
    return np.random.default_rng(3).standard_normal((len(WORDS) + 3, WIDTH)).astype(np.float32)


def text_model(path: Path, *, external: str | None = None, domain: str = "") -> Path:
    """Looks tokens up in a table: rows of a token alone, so that pooling can be told apart."""
    weight = numpy_helper.from_array(table(), "table")
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0"), ("length", str(table().nbytes))):
            weight.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    if domain:
        nodes.append(helper.make_node("Anything", ["rows"], ["last_hidden_state"], domain=domain))
    else:
        nodes.append(helper.make_node("Identity", ["rows"], ["last_hidden_state"]))
    tokens = ["batch", "tokens"]
    graph = helper.make_graph(
        nodes,
        "text",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, tokens)
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*tokens, WIDTH])],
        [weight],
    )
    return _save(graph, path)


def image_model(path: Path) -> Path:
    """Means over the picture: pixel_values [n, 3, 4, 4] to image_embeds [n, 3]."""
    node = helper.make_node("ReduceMean", ["pixel_values"], ["image_embeds"], axes=[2, 3], keepdims=0)
    graph = helper.make_graph(
        [node],
        "image",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["n", 3])],
    )
    return _save(graph, path)


def text_encoder(
    directory: Path, *, pooling: str = "mean_tokens", normalize: bool = True, max_length: int = 16
) -> Path:
    """A directory as sentence-transformers writes it, with a word tokenizer that puts [CLS] and [SEP] around."""
    directory.mkdir(parents=True)
    text_model(directory / "model.onnx")
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (directory / "1_Pooling").mkdir()
    settings: dict[str, object] = {
        "modules.json": modules,
        "config.json": {"model_type": "bert", "hidden_size": WIDTH},
        "sentence_bert_config.json": {"max_seq_length": max_length},
        "config_sentence_transformers.json": {"prompts": {"query": "w1 "}},
        "1_Pooling/config.json": {f"pooling_mode_{pooling}": True},
    }
    for name, value in settings.items():
        (directory / name).write_text(json.dumps(value))
    return directory


def _save(graph: onnx.GraphProto, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path

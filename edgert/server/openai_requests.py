"""What the routes take. Fields that OpenAI has and edgert does not are declared with the reason; all else is unknown."""

from edgert.sampling import SAMPLING
from edgert.server.openai_fields import (
    AnyOf,
    Anything,
    Choice,
    Flag,
    Kind,
    ListOf,
    MapOf,
    Number,
    Object,
    Tagged,
    Text,
    TokenKey,
    Unsupported,
    of_setting,
    whole,
)
from edgert.server.state import Limits

MAX_TOP_LOGPROBS = 20
_MAX_MESSAGES = 4096
_MAX_TOOLS = 128
_MAX_TEXTS = 2048
_SETTINGS = {setting.name: setting for setting in SAMPLING}
MAX_SCALE = 1e4  # of an adapter
_LIMITS = Limits()

_MODEL = Text(1, 256)
_TOKEN = whole(0, 2**31 - 1)
_NAME = Text(1, 64, r"^[a-zA-Z0-9_.-]{1,64}$")
_ONLY_TEXT = "edgert takes text, and fetches nothing"
_EFFORT = Choice("none", "minimal", "low", "medium", "high", "xhigh", "max")

# Accepted and without effect: they name the caller, or a service that edgert is not.
_HARMLESS: dict[str, Kind] = {
    "user": Text(),
    "metadata": MapOf(Text(0, 512), 16),
    "store": Flag(),
    "service_tier": Text(),
    "safety_identifier": Text(),
    "prompt_cache_key": Text(),
    "prompt_cache_retention": Text(),
    "cache_prompt": Flag(),
}

SAMPLING_FIELDS: dict[str, Kind] = {
    **{
        name: of_setting(_SETTINGS[name])
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "ignore_eos",
        )
    },
    "top_k": whole(-1, 2**31 - 1),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": AnyOf(Text(1, 1024), ListOf(Text(1, 1024), 0, 64)),
    "logit_bias": MapOf(Number(-1e4, 1e4), 1024, TokenKey()),
}

_GENERATION: dict[str, Kind] = {
    **SAMPLING_FIELDS,
    "model": _MODEL,
    "max_tokens": whole(0, _LIMITS.max_tokens),
    "n": whole(1, _LIMITS.choices),
    "stream": Flag(),
    "stream_options": Object({"include_usage": Flag(), "include_obfuscation": Flag()}),
    "lora": ListOf(
        Object(
            {"id": AnyOf(whole(0, 4096), Text(1, 256)), "scale": Number(-MAX_SCALE, MAX_SCALE)},
            ["id", "scale"],
        ),
        0,
        16,
    ),
    "grammar": AnyOf(
        Text(1),
        Object(
            {"type": Choice("lark", "regex", "choice", "json_schema"), "value": Anything(False)}, ["type"]
        ),
    ),
    **_HARMLESS,
}

# --- chat -------------------------------------------------------------------------------------------

_PART = Tagged(
    "type",
    {"text": Object({"text": Text()}, ["text"], extra=Anything(False))},
    dict.fromkeys(("image_url", "input_audio", "file", "video_url", "audio_url", "image"), _ONLY_TEXT),
)
_CONTENT = AnyOf(Text(), ListOf(_PART, 1, 1024))
_CALL = Object(
    {
        "id": Text(),
        "type": Choice("function"),
        "index": whole(0),
        "function": Object({"name": _NAME, "arguments": Text()}, ["name", "arguments"]),
    },
    ["function"],
)
_SPEAKER = {"content": _CONTENT, "name": Text()}
_MESSAGE = Tagged(
    "role",
    {
        "system": Object(_SPEAKER, ["content"]),
        "developer": Object(_SPEAKER, ["content"]),
        "user": Object(_SPEAKER, ["content"]),
        "assistant": Object(
            {
                **_SPEAKER,
                "tool_calls": ListOf(_CALL, 0, _MAX_TOOLS),
                "reasoning_content": Text(),
                "refusal": Text(),
                "annotations": ListOf(Anything()),
                "audio": Unsupported(_ONLY_TEXT),
                "function_call": Unsupported("it is of the past: send tool_calls"),
            }
        ),
        "tool": Object({**_SPEAKER, "tool_call_id": Text()}, ["content"]),
    },
    {"function": "it is of the past: send a message of role 'tool'"},
)
_FUNCTION = Object(
    {"name": _NAME, "description": Text(), "parameters": Anything(), "strict": Flag()}, ["name"]
)
_TOOL = Tagged(
    "type",
    {"function": Object({"function": _FUNCTION}, ["function"])},
    {"custom": "tools are functions with a JSON Schema of their parameters"},
)
_TOOL_CHOICE = AnyOf(
    Choice("none", "auto", "required"),
    Tagged("type", {"function": Object({"function": Object({"name": _NAME}, ["name"])}, ["function"])}),
)
_JSON_SCHEMA = Object(
    {"name": Text(0, 64), "description": Text(), "schema": Anything(), "strict": Flag()}, ["schema"]
)
_RESPONSE_FORMAT = Tagged(
    "type",
    {
        "text": Object({}),
        "json_object": Object({}),
        "json_schema": Object({"json_schema": _JSON_SCHEMA}, ["json_schema"]),
    },
)

CHAT = Object(
    {
        "messages": ListOf(_MESSAGE, 1, _MAX_MESSAGES),
        **_GENERATION,
        "max_tokens": whole(1, _LIMITS.max_tokens),
        "max_completion_tokens": whole(1, _LIMITS.max_tokens),
        "logprobs": Flag(),
        "top_logprobs": whole(0, MAX_TOP_LOGPROBS),
        "response_format": _RESPONSE_FORMAT,
        "tools": ListOf(_TOOL, 0, _MAX_TOOLS),
        "tool_choice": _TOOL_CHOICE,
        "parallel_tool_calls": Flag(),
        "reasoning_effort": _EFFORT,
        "chat_template_kwargs": MapOf(AnyOf(Flag(), Number(), Text(0, 1024)), 16, Text(1, 64)),
        "modalities": ListOf(Choice("text"), 0, 1),
        "verbosity": Unsupported("say in the messages how long the answer is to be", "medium"),
        "prediction": Unsupported("answers are not predicted"),
        "audio": Unsupported(_ONLY_TEXT),
        "web_search_options": Unsupported("edgert fetches nothing"),
        "functions": Unsupported("it is of the past: send tools"),
        "function_call": Unsupported("it is of the past: send tool_choice", "none"),
        "chat_template": Unsupported(
            "the template is the model's own; chat_template_kwargs are its variables"
        ),
    },
    ["messages"],
    "ChatCompletionRequest",
)

# --- completions ------------------------------------------------------------------------------------

_TOKENS = ListOf(_TOKEN, 1)
COMPLETION = Object(
    {
        "prompt": AnyOf(
            Text(), ListOf(Text(), 1, _LIMITS.prompts), _TOKENS, ListOf(_TOKENS, 1, _LIMITS.prompts)
        ),
        **_GENERATION,
        "echo": Flag(),
        "logprobs": whole(0, MAX_TOP_LOGPROBS),
        "response_format": _RESPONSE_FORMAT,
        "best_of": Unsupported("ask for n choices", 1),
        "suffix": Unsupported("edgert continues a prompt, and fills no gap", ""),
    },
    ["prompt"],
    "CompletionRequest",
)

# --- embeddings -------------------------------------------------------------------------------------

EMBEDDING = Object(
    {
        "input": AnyOf(Text(1), ListOf(Text(1), 1, _MAX_TEXTS)),
        "model": _MODEL,
        "dimensions": whole(1, 1 << 16),
        "encoding_format": Choice("float", "base64"),
        "user": Text(),
    },
    ["input"],
    "EmbeddingRequest",
)

# --- responses --------------------------------------------------------------------------------------

_INPUT_PART_REFUSED = dict.fromkeys(("input_image", "input_file", "input_audio"), _ONLY_TEXT)
_TEXT_PART = Object({"text": Text()}, ["text"], extra=Anything(False))
_INPUT_CONTENT = AnyOf(
    Text(),
    ListOf(
        Tagged("type", dict.fromkeys(("input_text", "output_text", "text"), _TEXT_PART), _INPUT_PART_REFUSED),
        0,
        1024,
    ),
)
_ITEM_FIELDS: dict[str, Kind] = {"id": Text(), "status": Text()}
_REASONING_TEXTS = ListOf(Object({"type": Text(), "text": Text()}, ["text"]), 0, 64)
_ITEM = Tagged(
    "type",
    {
        "message": Object(
            {
                **_ITEM_FIELDS,
                "role": Choice("system", "developer", "user", "assistant"),
                "content": _INPUT_CONTENT,
                "phase": Text(),
            },
            ["role", "content"],
        ),
        "function_call": Object(
            {**_ITEM_FIELDS, "call_id": Text(), "name": _NAME, "arguments": Text()},
            ["call_id", "name", "arguments"],
        ),
        "function_call_output": Object(
            {**_ITEM_FIELDS, "call_id": Text(), "output": _INPUT_CONTENT}, ["call_id", "output"]
        ),
        "reasoning": Object(
            {
                **_ITEM_FIELDS,
                "summary": _REASONING_TEXTS,
                "content": _REASONING_TEXTS,
                "encrypted_content": Unsupported("send the reasoning's content"),
            }
        ),
    },
    {"item_reference": "edgert keeps no responses: send the items themselves"},
    default="message",
)
_FORMAT = Tagged(
    "type",
    {"text": Object({}), "json_object": Object({}), "json_schema": _JSON_SCHEMA},
)
_HOSTED = "only functions can be called; edgert has no tools of its own and fetches nothing"
_RESPONSES_TOOL = Tagged(
    "type",
    {"function": _FUNCTION},
    dict.fromkeys(
        (
            "web_search",
            "web_search_preview",
            "file_search",
            "code_interpreter",
            "computer_use_preview",
            "mcp",
            "image_generation",
            "local_shell",
            "custom",
        ),
        _HOSTED,
    ),
)
RESPONSE = Object(
    {
        "input": AnyOf(Text(), ListOf(_ITEM, 1, _MAX_MESSAGES)),
        "instructions": Text(),
        **{name: kind for name, kind in SAMPLING_FIELDS.items() if name != "stop"},
        "model": _MODEL,
        "max_output_tokens": whole(1, _LIMITS.max_tokens),
        "stream": Flag(),
        "stream_options": Object({"include_obfuscation": Flag()}),
        "text": Object(
            {
                "format": _FORMAT,
                "verbosity": Unsupported("say in the input how long the answer is to be", "medium"),
            }
        ),
        "tools": ListOf(_RESPONSES_TOOL, 0, _MAX_TOOLS),
        "tool_choice": AnyOf(
            Choice("none", "auto", "required"),
            Tagged("type", {"function": Object({"name": _NAME}, ["name"])}),
        ),
        "parallel_tool_calls": Flag(),
        "reasoning": Object({"effort": _EFFORT, "summary": Text(), "generate_summary": Text()}),
        "chat_template_kwargs": CHAT.fields["chat_template_kwargs"],
        "top_logprobs": whole(0, MAX_TOP_LOGPROBS),
        "include": ListOf(Choice("message.output_text.logprobs", "reasoning.encrypted_content"), 0, 8),
        "lora": _GENERATION["lora"],
        **_HARMLESS,
        "truncation": Unsupported("what does not fit into the context is refused", "disabled"),
        "background": Unsupported("an answer is given at once", False),
        "previous_response_id": Unsupported(
            "edgert keeps no responses: send the whole conversation as input"
        ),
        "conversation": Unsupported("edgert keeps no conversations: send the whole of it as input"),
        "prompt": Unsupported("edgert keeps no prompts: send instructions and input"),
        "max_tool_calls": Unsupported("edgert calls no tools of its own"),
    },
    ["input"],
    "ResponseRequest",
)

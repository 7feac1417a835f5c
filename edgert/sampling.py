"""How the next token is chosen: declared once, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from edgert.errors import CorruptError, InvalidArgumentError
from edgert.settings import Setting

if TYPE_CHECKING:
    from edgert._native import SamplerOptions

_MAX_STOPS = 64
_MAX_STOP_CHARACTERS = 1024

# The scalar options; each is a flag, a variable and a configuration key too.
SAMPLING = (
    Setting(
        "max_tokens",
        "int",
        "stop after so many tokens (default: what the context leaves)",
        None,
        1,
        2**31 - 1,
    ),
    Setting(
        "temperature",
        "float",
        "0 takes the likeliest token; above, sharper below 1 and flatter beyond",
        0.0,
        0,
        100,
    ),
    Setting("top_k", "int", "sample among the k likeliest tokens; 0: all", 0, 0, 2**31 - 1),
    Setting(
        "top_p", "float", "sample among the likeliest tokens that hold this probability", 1.0, 0, 1, True
    ),
    Setting("min_p", "float", "drop tokens less likely than this share of the likeliest", 0.0, 0, 1),
    Setting(
        "repetition_penalty", "float", "divide the logits of tokens already seen; 1: off", 1.0, 0, 100, True
    ),
    Setting("presence_penalty", "float", "subtract from the logits of tokens already seen", 0.0, -100, 100),
    Setting("frequency_penalty", "float", "subtract, for each time that a token was seen", 0.0, -100, 100),
    Setting("seed", "int", "the same seed repeats the same text", 0, 0, 2**64 - 1),
    Setting("stop", "texts", "end at this string, which is cut off; may be repeated", ()),
    Setting("logprobs", "int", "report log-probabilities, with the n likeliest alternatives", None, 0, 100),
    Setting("ignore_eos", "bool", "go on past the end-of-sequence token", False),
)


@dataclass(frozen=True)
class Sampling:
    """Checked sampling options. Greedy by default; the same seed repeats the same text."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Mapping[str, Any], vocab_size: int) -> "Sampling":
        """Combine the options of a call with a bundle's defaults; None means not given.

        Raises InvalidArgumentError naming the option, what was found and what is allowed.
        """
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise InvalidArgumentError(
                    f"unknown option {name!r}; the options are {', '.join(sorted(known))}"
                )
        values: dict[str, Any] = dict(defaults)
        for setting in SAMPLING:
            if options.get(setting.name) is not None:
                values[setting.name] = setting.check(options[setting.name])
        if options.get("logit_bias") is not None:
            values["logit_bias"] = _checked_bias(options["logit_bias"], vocab_size)
        _check_stops(values.get("stop", ()))
        return cls(**values)

    def native(self) -> "SamplerOptions":
        from edgert._native import SamplerOptions

        options = SamplerOptions()
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            setattr(options, name, getattr(self, name))
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            setattr(options, name, getattr(self, name))
        options.logit_bias = dict(self.logit_bias or {})
        options.logprobs = -1 if self.logprobs is None else self.logprobs
        return options


def defaults_from(generation_config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sampling that the generation_config.json at `where` asks for; do_sample false or missing is greedy.

    Raises CorruptError for a value outside its range.
    """
    settings = {setting.name: setting for setting in SAMPLING}
    try:
        values = {
            name: settings[name].check(generation_config[name], f"{where}: {name}")
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if generation_config.get(name) is not None
        }
    except InvalidArgumentError as error:
        raise CorruptError(str(error)) from None
    if not generation_config.get("do_sample"):
        values["temperature"] = 0.0
    else:
        values.setdefault("temperature", 1.0)
    return values


def _checked_bias(bias: object, vocab_size: int) -> dict[int, float]:
    one = Setting("logit_bias", "float", "", None, -1e4, 1e4)
    if not isinstance(bias, Mapping):
        raise InvalidArgumentError("logit_bias: allowed is a mapping from token id to number")
    checked = {}
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidArgumentError(
                f"logit_bias: found token {token!r}, allowed are 0 to {vocab_size - 1}"
            )
        checked[token] = one.check(value, f"logit_bias[{token}]")
    return checked


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > _MAX_STOPS:
        raise InvalidArgumentError(f"stop: found {len(stops)} strings, allowed are {_MAX_STOPS}")
    for stop in stops:
        if not 1 <= len(stop) <= _MAX_STOP_CHARACTERS:
            raise InvalidArgumentError(
                f"stop: found a string of {len(stop)} characters, allowed are 1 to {_MAX_STOP_CHARACTERS}"
            )

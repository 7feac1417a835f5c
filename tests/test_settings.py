"""flag > EDGERT_ variable > configuration file, for every setting alike."""

from pathlib import Path
from typing import Any

import pytest

from edgert import settings
from edgert.errors import CorruptError, InvalidArgumentError, NotFoundError
from edgert.sampling import Sampling, defaults_from
from edgert.settings import Layers, Setting, every_setting, knobs

THREADS = Setting("threads", "int", "", "auto", 1, 1024, choices=("auto",))
MEMORY = Setting("memory", "bytes", "", "auto", 1, 2**62, choices=("auto",))
TOP_P = Setting("top_p", "float", "", 1.0, 0, 1, above_minimum=True)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration file, and a system-wide one beside it."""
    monkeypatch.setattr(settings, "SYSTEM_FILE", tmp_path / "system.toml")
    monkeypatch.setenv("EDGERT_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "config.toml"


def test_the_nearest_layer_wins(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("threads = 2\n")
    config.with_name("system.toml").write_text('threads = 1\nmemory = "1GiB"\n')
    assert Layers.read().value(THREADS) == 2
    assert Layers.read().value(MEMORY) == 1 << 30
    monkeypatch.setenv("EDGERT_THREADS", "3")
    assert Layers.read().value(THREADS) == 3
    assert Layers.read().value(THREADS, 4) == 4


def test_nothing_said_is_none(config: Path) -> None:
    config.write_text("")
    assert Layers.read().value(THREADS) is None


def test_auto_is_a_word_and_zero_is_not(config: Path) -> None:
    assert THREADS.check("auto") == 0
    with pytest.raises(
        InvalidArgumentError, match="threads: found 0, allowed is a whole number from 1 up to 1024 or auto"
    ):
        THREADS.check(0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        (THREADS, 9999),
        (THREADS, "many"),
        (THREADS, 1.5),
        (THREADS, True),
        (THREADS, "1" * 5000),
        (MEMORY, "4GBx"),
        (MEMORY, 2.0),
        (TOP_P, 0),
        (TOP_P, "nan"),
        (TOP_P, float("inf")),
        (TOP_P, [1]),
        (Setting("direct_io", "choice", "", choices=("on", "off")), "maybe"),
        (Setting("ignore_eos", "bool", ""), "perhaps"),
        (Setting("stop", "texts", ""), [1]),
    ],
)
def test_a_value_out_of_range_names_setting_and_range(setting: Setting, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{setting.name}: found .*, allowed is "):
        setting.check(value)


def test_a_bad_variable_is_named_as_such(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("")
    monkeypatch.setenv("EDGERT_THREADS", "lots")
    with pytest.raises(InvalidArgumentError, match="EDGERT_THREADS: found 'lots'"):
        Layers.read().value(THREADS)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("thread = 1", "unknown key 'thread'; the keys are .*threads"),
        ("threads = ", "not valid TOML"),
        ("threads = 0", r"config.toml: threads: found 0"),
        ("[" * 2000, "not valid TOML"),
        ("#" * (2 << 20), "more than"),
    ],
)
def test_a_bad_file_is_named(config: Path, content: str, complaint: str) -> None:
    config.write_text(content)
    with pytest.raises(InvalidArgumentError, match=complaint):
        Layers.read().value(THREADS)


def test_a_file_that_was_asked_for_must_exist(config: Path) -> None:
    with pytest.raises(NotFoundError, match="EDGERT_CONFIG"):
        Layers.read()
    config.mkdir()
    with pytest.raises(NotFoundError, match="EDGERT_CONFIG"):
        Layers.read()


def test_every_setting_is_declared_once_and_explained() -> None:
    names = [setting.name for setting in every_setting()]
    assert len(names) == len(set(names))
    assert all(setting.help for setting in every_setting())
    assert {"memory", "threads", "context"} <= {setting.name for setting in knobs()}


# --- sampling ---------------------------------------------------------------------------------------


def sampling(defaults: dict[str, Any] | None = None, **options: Any) -> Sampling:
    return Sampling.of(options, defaults or {}, vocab_size=100)


def test_decoding_is_greedy_and_repeatable_unless_said_otherwise() -> None:
    assert sampling() == Sampling(temperature=0.0, seed=0)


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
    ],
)
def test_the_checkpoint_decides_what_is_not_given(config: dict[str, Any], temperature: float) -> None:
    assert sampling(defaults_from(config, "x")).temperature == temperature
    assert sampling(defaults_from(config, "x"), temperature=0.2).temperature == 0.2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("frequency_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("logprobs", 10**6),
        ("stop", ""),
        ("stop", ["a"] * 1000),
        ("stop", "x" * 10**6),
        ("stop", 7),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", [1]),
    ],
)
def test_absurd_sampling_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{option}.*(found|allowed)"):
        sampling(**{option: value})


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(
        InvalidArgumentError, match="unknown option 'temprature'; the options are .*temperature"
    ):
        sampling(temprature=1)


def test_a_checkpoint_with_absurd_sampling_is_named() -> None:
    with pytest.raises(CorruptError, match="x/generation_config.json: top_p: found -3, allowed is"):
        defaults_from({"do_sample": True, "top_p": -3}, "x/generation_config.json")

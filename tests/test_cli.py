"""The command line as people and scripts meet it: output, status, one line an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shell import Shell, assert_fails

PROMPT = "The module reads the file"


# --- the way from a checkpoint to text --------------------------------------------------------------


def test_convert_verify_show_list_run(edgert: Shell, tiny_source: Path) -> None:
    bundle = edgert.home / "data/models/tiny.edgert"
    bundle.parent.mkdir(parents=True)
    report = edgert.json("convert", tiny_source, bundle, "--dense-format", "f32", "--expert-format", "int8")
    assert report["path"] == str(bundle) and report["num_experts"] == 24
    assert edgert.json("verify", bundle)["ok"] is True
    shown = edgert.json("show", "tiny")
    assert shown["formats"]["experts"].keys() == {"int8"} and shown["formats"]["dense"].keys() == {"f32"}
    assert 0 < shown["minimum_bytes"] < shown["resident_bytes"]
    assert shown["recipe"]["architecture"] == "qwen3_moe"
    assert {"name": "tiny", "path": str(bundle)}.items() <= edgert.json("list")["models"][0].items()
    assert (
        edgert("run", "tiny", "-p", PROMPT, "--memory", shown["minimum_bytes"], "--max-tokens", 3).returncode
        == 0
    )


@pytest.mark.parametrize("command", [("show",), ("list",), ("devices",), ("verify",)])
def test_for_people_there_is_plain_text(edgert: Shell, tiny_bundle: Path, command: tuple[str, ...]) -> None:
    model = (tiny_bundle,) if command[0] in ("show", "verify") else ()
    done = edgert(*command, *model)
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr
    assert not done.stdout.startswith("{") and "\x1b" not in done.stdout


def test_convert_reports_what_the_formats_cost(edgert: Shell, tiny_source: Path) -> None:
    done = edgert("convert", tiny_source, edgert.home / "out.edgert")
    costs = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:-2]}
    assert {"embedding": "int8", "attention.q": "int8", "experts.gate": "int4"}.items() <= costs.items()
    assert "final_norm" not in costs


def test_list_shows_what_cannot_be_read(edgert: Shell) -> None:
    broken = edgert.home / "data/models/broken.edgert"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{}")
    (row,) = [row for row in edgert.json("list")["models"] if row["name"] == "broken"]
    assert "manifest" in row["error"]


def test_devices_marks_one_as_like_this_machine(edgert: Shell) -> None:
    report = edgert.json("devices")
    assert report["this_machine"]["resembles"] in {device["name"] for device in report["devices"]}


# --- run --------------------------------------------------------------------------------------------


def test_run_streams_text_to_stdout_and_the_rest_to_stderr(edgert: Shell, tiny_bundle: Path) -> None:
    done = edgert("run", tiny_bundle, "-p", PROMPT, "--raw", "--max-tokens", 8, "--ignore-eos")
    spoken = edgert.json("run", tiny_bundle, "-p", PROMPT, "--raw", "--max-tokens", 8, "--ignore-eos")
    assert done.stdout == spoken["text"] + "\n"
    loaded, counts, memory = done.stderr.splitlines()
    assert "context 512 tokens" in loaded
    assert "generated 8 at" in counts and "(length)" in counts
    assert "expert look-ups" in memory


def test_the_object_of_run(edgert: Shell, tiny_bundle: Path) -> None:
    value = edgert.json(
        "run",
        tiny_bundle,
        "-p",
        PROMPT,
        "--max-tokens",
        4,
        "--ignore-eos",
        "--logprobs",
        2,
        "--memory",
        "2MiB",
    )
    assert len(value["tokens"]) == len(value["logprobs"]) == 4
    assert value["finish_reason"] == "length"
    assert value["statistics"]["budget_bytes"] == 2 << 20
    keys = "prompt_tokens generated_tokens prefill_tokens_per_s decode_tokens_per_s budget_bytes peak_bytes"
    assert set(f"{keys} expert_hits expert_misses bytes_read stall_s".split()) <= value["statistics"].keys()


def test_the_prompt_comes_from_flag_file_or_stdin(edgert: Shell, tiny_bundle: Path) -> None:
    file = edgert.home / "prompt.txt"
    file.write_text(PROMPT)
    options = (tiny_bundle, "--max-tokens", 6, "--json")
    texts = [
        json.loads(done.stdout)["tokens"]
        for done in (
            edgert("run", *options, "-p", PROMPT),
            edgert("run", *options, "-f", file),
            edgert("run", *options, stdin=PROMPT.encode()),
        )
    ]
    assert texts[0] == texts[1] == texts[2]


def test_what_is_piped_goes_before_the_prompt(edgert: Shell, tiny_bundle: Path) -> None:
    def tokens(*flags: object, stdin: bytes = b"") -> tuple[int, list[int]]:
        done = edgert("run", tiny_bundle, "--max-tokens", 4, "--ignore-eos", "--json", *flags, stdin=stdin)
        assert done.returncode == 0, done.stderr
        value = json.loads(done.stdout)
        return value["statistics"]["prompt_tokens"], value["tokens"]

    first, second = edgert.home / "first.txt", edgert.home / "second.txt"
    first.write_text("The module\n")
    second.write_text("reads the file\n")
    whole = tokens("-p", "The module\n\nreads the file\n\nand returns")
    assert tokens("-f", first, "-f", second, "-p", "and returns") == whole
    assert tokens("-f", second, "-p", "and returns", stdin=b"The module\n") == whole
    assert tokens("-f", first, "-f", "-", "-p", "and returns", stdin=b"reads the file\n") == whole
    assert tokens("-f", first, "-f", second, "-p", "-", stdin=b"and returns") == whole
    assert tokens("-p", "and returns", stdin=b"") < whole


def test_what_nobody_gives_is_not_waited_for(edgert: Shell, tiny_bundle: Path) -> None:
    command = edgert.command("run", tiny_bundle, "-p", PROMPT, "--max-tokens", 1)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=edgert.environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_template_applies_unless_raw(edgert: Shell, tiny_bundle: Path) -> None:
    def prompt_tokens(*flags: str) -> int:
        count: int = edgert.json("run", tiny_bundle, "-p", PROMPT, "--max-tokens", 1, *flags)["statistics"][
            "prompt_tokens"
        ]
        return count

    assert prompt_tokens("--raw") < prompt_tokens() < prompt_tokens("--system", "Be brief.")
    assert_fails(edgert("run", tiny_bundle, "-p", "x", "--raw", "--system", "y"), "--system")


def test_flag_before_variable_before_file(edgert: Shell, tiny_bundle: Path) -> None:
    def generated(*flags: object) -> int:
        count: int = edgert.json("run", tiny_bundle, "-p", PROMPT, "--ignore-eos", *flags)["statistics"][
            "generated_tokens"
        ]
        return count

    config = edgert.home / ".config/edgert/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("max_tokens = 2\ncontext = 64\n")
    assert generated() == 2
    edgert.variables["EDGERT_MAX_TOKENS"] = "3"
    assert generated() == 3
    assert generated("--max-tokens", 4) == 4
    assert edgert.json("run", tiny_bundle, "-p", PROMPT)["statistics"]["context"] == 64


def test_sampling_flags_reach_the_sampler(edgert: Shell, tiny_bundle: Path) -> None:
    def tokens(*flags: object) -> list[int]:
        drawn: list[int] = edgert.json(
            "run", tiny_bundle, "-p", PROMPT, "--max-tokens", 12, "--ignore-eos", *flags
        )["tokens"]
        return drawn

    assert tokens("--logit-bias", "7=10000") == [7] * 12
    assert tokens("--temperature", 1, "--seed", 1) == tokens("--temperature", 1, "--seed", 1)
    assert tokens("--temperature", 1, "--seed", 1) != tokens("--temperature", 1, "--seed", 2)


# --- measuring --------------------------------------------------------------------------------------


def test_eval_prints_perplexity_and_distance(edgert: Shell, tiny_bundle: Path, tiny_f32_bundle: Path) -> None:
    text = edgert.home / "text.txt"
    text.write_text("The module reads the file and returns the number of bytes. " * 8)
    value = edgert.json(
        "eval", tiny_bundle, "--text", text, "--reference", tiny_f32_bundle, "--context", 64, "--stride", 32
    )
    assert value["perplexity"] > 1 and value["kl_mean"] > 0 and 0 < value["top1_agreement"] <= 1
    assert (value["context"], value["stride"]) == (64, 32)
    first = edgert.json("eval", tiny_bundle, "--text", text, "--tokens", 20)
    assert (first["tokens"], first["kl_mean"]) == (19, None)
    assert edgert("eval", tiny_bundle, "--text", text).stdout.startswith("perplexity ")


def test_bench_prints_a_row_a_phase(edgert: Shell, tiny_bundle: Path) -> None:
    flags = ("--prompt-tokens", 16, "--decode-tokens", 4, "--repetitions", 2, "--drop-caches", "--threads", 1)
    report = edgert.json("bench", tiny_bundle, *flags)
    assert report["model"] == "tiny" and report["threads"] == 1 and report["budget_bytes"] > 0
    assert [row["phase"] for row in report["results"]] == ["prefill", "decode"]
    assert all(
        {"tokens_per_s", "spread", "hit_rate", "bytes_read_per_token"} <= row.keys()
        for row in report["results"]
    )
    assert len(report["results"][1]["token_ms"]) == 2 * 4
    head = edgert("bench", tiny_bundle, *flags).stdout.splitlines()[0]
    assert "READ A TOKEN  SIMULATED" in head and head.endswith("P50  P99/P50")
    assert report["prefetch"] == "none" and report["results"][1]["prefetch_gain"] is None


def test_bench_shows_what_reading_ahead_gains(edgert: Shell) -> None:
    flags = (
        "--shape",
        "tiny",
        "--prompt-tokens",
        8,
        "--decode-tokens",
        8,
        "--repetitions",
        2,
        "--threads",
        1,
    )
    lowest = edgert.json("plan", "tiny", "--context", 17)["minimum_bytes"]
    report = edgert.json("bench", *flags, "--prefetch-gain", "--memory", lowest + (1 << 20))
    gain = report["results"][1]["prefetch_gain"]
    assert report["prefetch"] == "router"
    assert gain["gain"] == pytest.approx(gain["on_tokens_per_s"] / gain["off_tokens_per_s"] - 1)
    table = edgert("bench", *flags, "--prefetch-gain", "--memory", lowest + (1 << 20)).stdout
    assert table.splitlines()[0].endswith("GAIN")
    assert "prefetch: router; recall" in table


def test_bench_measures_a_cold_start(edgert: Shell) -> None:
    flags = ("bench", "--shape", "tiny", "--cold", "--repetitions", 2, "--threads", 1)
    report = edgert.json(*flags)
    (row,) = report["results"]
    assert (report["shape"], report["context"], row["phase"]) == ("tiny", 17, "cold start")
    assert row["bytes_read"] >= row["needed_bytes"] and row["first_token_s"] > row["load_s"]
    assert edgert(*flags, "--markdown").stdout.startswith("| PHASE | TOKENS | FIRST TOKEN |")
    assert_fails(edgert(*flags, "--routing", "uniform"), "--cold: ends with the first token")


def test_bench_measures_a_shape_under_a_routing(edgert: Shell) -> None:
    flags = ("--prompt-tokens", 16, "--decode-tokens", 4, "--repetitions", 1, "--threads", 1)
    report = edgert.json("bench", "--shape", "tiny", "--expert-format", "int2", *flags)
    assert report["shape"] == "tiny" and report["routing"] == "model" and report["context"] == 21
    assert (edgert.home / "data/cache/shapes/tiny-int4-int4-int4-int2.edgert").is_dir()
    done = edgert("bench", "--shape", "tiny", "--routing", "uniform", "--markdown", *flags)
    assert done.stdout.startswith("| PHASE | TOKENS |") and "routing: uniform" in done.stdout
    assert_fails(edgert("bench", "tiny", "--shape", "tiny"), "--shape: found the model tiny too")
    assert_fails(edgert("bench", "--dense-format", "int8"), "no shape was named")
    edgert.variables["EDGERT_CONTEXT"] = "64"
    assert edgert.json("bench", "--shape", "tiny", *flags)["context"] == 64
    done = edgert("bench", "--shape", "tiny", "--routing", "best", *flags)
    assert done.returncode == 1 and "allowed are uniform and trace:FILE" in done.stderr


def test_bench_refuses_before_it_writes_a_shape(edgert: Shell) -> None:
    bench = ("bench", "--shape", "tiny", "--repetitions", 1)
    assert_fails(edgert(*bench, "--routing", "best"), "allowed are uniform and trace:FILE")
    assert_fails(edgert(*bench, "--routing", "trace:none.jsonl"), "none.jsonl")
    assert_fails(edgert(*bench, "--prompt-tokens", 2000), "the context holds 1024")
    assert_fails(edgert(*bench, "--prompt-tokens", 60, "--context", 32), "the context holds 32")
    assert_fails(edgert(*bench, "--cold", "--prompt-tokens", 2000), "the context holds 1024")
    assert_fails(edgert("bench", "--shape", "none"), "allowed are olmoe-1b-7b")
    assert not (edgert.home / "data/cache/shapes").exists()


def test_demo_finds_the_same_tokens_resident_and_paged(edgert: Shell, tiny_bundle: Path) -> None:
    done = edgert("demo", tiny_bundle, "--max-tokens", 16)
    assert done.returncode == 0
    assert "identical: 16/16 tokens" in done.stdout and "edgert convert" in done.stdout
    assert "\x1b" not in done.stdout
    value = edgert.json("demo", tiny_bundle, "--max-tokens", 16)
    resident, paged = (run["statistics"] for run in value["runs"])
    assert value["identical"] and resident["resident"] and not paged["resident"]
    assert paged["budget_bytes"] < resident["budget_bytes"]


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--memory", "0"), "memory: found '0'"),
        (("--memory", "-1"), "memory: found '-1'"),
        (("--memory", "1e30"), "memory: found '1e30'"),
        (("--memory", "4GBx"), "memory: found '4GBx'"),
        (("--memory", "10KiB"), "the smallest that works is"),
        (("--threads", "0"), "threads: found '0', allowed is a whole number from 1"),
        (("--threads", "9999"), "threads: found '9999'"),
        (("--context", "100000"), "context: found 100000"),
        (("--isa", "mmx"), "isa: found 'mmx', allowed is one of auto"),
        (("--temperature", "nan"), "temperature: found 'nan'"),
        (("--max-tokens", "1e9"), "max_tokens: found '1e9'"),
        (("--seed", "-1"), "from 0 up to 18446744073709551615"),
        (("--logit-bias", "999999=1"), "logit_bias: found token 999999"),
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_it(
    edgert: Shell, tiny_bundle: Path, flags: tuple[str, str], complaint: str
) -> None:
    done = edgert("run", tiny_bundle, "-p", "x", *flags)
    assert done.returncode == 1 and done.stdout == ""
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_line(edgert: Shell, tiny_source: Path, tmp_path: Path) -> None:
    assert_fails(
        edgert("run", "nosuchmodel", "-p", "x"), "nosuchmodel: no such path, and no bundle of this name"
    )
    assert_fails(edgert("run", tiny_source, "-p", "x"), "edgert convert")
    assert_fails(edgert("show", tmp_path), "no manifest.json")
    (tmp_path / "notes.txt").write_text("no model")
    assert_fails(edgert("run", tmp_path / "notes.txt", "-p", "x"), "notes.txt: neither a bundle")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.gguf").write_bytes(b"GGUF")
    assert_fails(edgert("run", tmp_path / "folder", "-p", "x"), "such as ")
    assert_fails(edgert("run", "x", "-f", tmp_path / "absent.txt"), "absent.txt: No such file or directory")
    assert_fails(edgert("run", "x", stdin=b"a\xff"), "stdin: byte 1 is not UTF-8")
    assert_fails(edgert("convert", tmp_path / "absent", tmp_path / "out.edgert"), "absent")
    assert_fails(edgert("convert", tiny_source, tiny_source), str(tiny_source))
    assert_fails(edgert("convert", tiny_source, tmp_path / "out.edgert", "--expert-format", "int5"), "int5")
    assert_fails(edgert("convert", tiny_source, tmp_path / "out.edgert", "--alignment", "13"), "alignment")
    assert_fails(edgert("convert", tiny_source, tmp_path / "out.edgert", "--device", "toaster"), "toaster")
    assert not (tmp_path / "out.edgert").exists()


def test_a_bad_configuration_is_named(edgert: Shell, tiny_bundle: Path) -> None:
    edgert.variables["EDGERT_CONFIG"] = str(edgert.home / "config.toml")
    assert_fails(edgert("run", tiny_bundle, "-p", "x"), "EDGERT_CONFIG")
    (edgert.home / "config.toml").write_text("memroy = 1")
    assert_fails(edgert("run", tiny_bundle, "-p", "x"), "unknown key 'memroy'")


def test_a_path_that_is_not_utf_8_is_one_line(edgert: Shell) -> None:
    assert_fails(edgert("show", os.fsdecode(b"\xff")), "allowed is a path in UTF-8")


def test_output_that_the_encoding_lacks_is_no_error(edgert: Shell, tiny_bundle: Path) -> None:
    edgert.variables["PYTHONIOENCODING"] = "ascii"
    prompt = ("demo", tiny_bundle, "--max-tokens", 1, "-p", "für")
    assert "f?r" in edgert(*prompt).stdout
    assert edgert.json(*prompt)["identical"]


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("run", "--nonsense"), ("run", "--top-k"), ("eval", "x")]
)
def test_wrong_usage_is_status_2(edgert: Shell, arguments: tuple[str, ...]) -> None:
    done = edgert(*arguments)
    assert done.returncode == 2 and "usage: edgert" in done.stderr


def test_a_package_that_is_not_installed_is_named(edgert: Shell, tiny_bundle: Path) -> None:
    script = "import sys; sys.modules['numpy'] = None; from edgert.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "eval", str(tiny_bundle), "--text", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=edgert.environment, check=False)
    assert_fails(done, "this needs the package numpy: pip install 'edgert[convert]'")


def test_verbose_shows_where(edgert: Shell) -> None:
    assert "Traceback" in edgert("run", "nosuchmodel", "-p", "x", "--verbose").stderr


def test_every_command_explains_itself(edgert: Shell) -> None:
    overview = edgert("--help").stdout
    for command in ("demo", "plan", "convert", "run", "show", "verify", "list", "devices", "eval", "bench"):
        assert command in overview
        assert edgert(command, "--help").stdout.startswith(f"usage: edgert {command}")
    assert edgert("--version").stdout.startswith("edgert ")

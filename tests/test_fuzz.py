"""Whatever a user gives a command: it works, or says in one line what is wrong. Status 0, 1 or 2, never a traceback.

Each case is a valid call of a command with its input files, damaged: bytes, lines, JSON values, options. What would
train or serve after its input was found good ends there: the run's folder holds a foreign file, nobody waits for the
server. GRIT_FUZZ_INPUTS sets how many cases; nightly 5,000.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeOllama
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grit_impl import cli
from grit_impl.files import FIXTURES

INPUTS = int(os.environ.get("GRIT_FUZZ_INPUTS", "300"))
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
JUNK = (
    "",
    "0",
    "-1",
    "nan",
    "1e999",
    "x",
    "a=b",
    "=",
    "\u2028",
    "\U0001f642",
    "x" * 300,
    "../x",
    "no/such",
    "[1]",
    "None",
)
SPLINTERS = (
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\0",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b'"',
        b",",
        b";",
        b"\n",
        b"\r",
        b"{",
        b"[" * 2000,
    ),
    *(b"NaN", b"1e999", b"null", b"<|end_of_text|>", b"\\ud800", b"'", b"\t", b"9" * 5000, b"x" * 140_000),
)
VALUES = (None, True, -1, 0, 3.5, float("nan"), 10**30, "", "x", [], ["a"], {}, {"a": None}, "\ud800", "\u2028")


class Case:
    """One call: arguments with the files that they name, in a folder of its own."""

    def __init__(self, chance: random.Random, folder: Path, server: str) -> None:
        self.chance, self.folder, self.server = chance, folder, server

    def put(self, name: str, content: bytes | str) -> str:
        """A file, mostly damaged."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        path.write_bytes(self.damaged(data, path.suffix) if self.chance.random() < 0.8 else data)
        return str(path)

    def damaged(self, data: bytes, suffix: str) -> bytes:
        if suffix in (".json", ".jsonl") and self.chance.random() < 0.5:
            return self.other_values(data, lines=suffix == ".jsonl")
        for _ in range(self.chance.choice((1, 1, 2, 5))):
            at = self.chance.randrange(len(data) + 1)
            end = min(len(data), at + self.chance.choice((1, 3, 40)))
            how = self.chance.randrange(5)
            if how == 0:
                data = data[:at]
            elif how == 1:
                data = data[:at] + data[end:]
            elif how == 2:
                data = data[:at] + data[at:end] * 2 + data[end:]
            else:
                data = data[:at] + self.chance.choice(SPLINTERS) + data[at if how == 3 else end :]
        return data

    def other_values(self, data: bytes, *, lines: bool) -> bytes:
        texts = data.decode().split("\n") if lines else [data.decode()]
        at = self.chance.randrange(len(texts))
        try:
            value = json.loads(texts[at])
        except ValueError:
            return data
        for _ in range(self.chance.choice((1, 1, 3))):
            place: Any = value
            while isinstance(place, dict | list) and place:
                key = self.chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if not isinstance(place[key], dict | list) or not place[key] or self.chance.random() < 0.3:
                    if self.chance.random() < 0.3:
                        del place[key]
                    else:
                        place[key] = copy.deepcopy(self.chance.choice(VALUES))
                    break
                place = place[key]
        texts[at] = json.dumps(value)
        return "\n".join(texts).encode()

    def some(self, *options: str, junk: float = 0.15) -> list[str]:
        """Some of the options with values that make no sense."""
        chosen = [name for name in options if self.chance.random() < junk]
        return [part for name in chosen for part in (name, self.chance.choice(JUNK))]


def rows(case: Case) -> str:
    """A training file of one of the layouts and formats."""
    layouts = (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"question": "is ice cold", "passage": "Ice.", "answer": True},
        {"features": "CO 8.4 ppm", "aqi_value": 90, "category": "Moderate"},
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": [{"role": "user", "content": "Sky?"}], "completion": [{"role": "assistant", "content": "Blue."}]},
        {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]},
        {"text": "The sky is blue."},
    )
    row = case.chance.choice(layouts)
    ending = case.chance.choice((".jsonl", ".json", ".csv", ".tsv", ".parquet"))
    if ending == ".jsonl":
        return case.put("rows.jsonl", "".join(json.dumps(row) + "\n" for _ in range(4)))
    if ending == ".json":
        return case.put("rows.json", json.dumps([row] * 4))
    if ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist([row] * 4), sink)
        return case.put("rows.parquet", sink.getvalue())
    separator = case.chance.choice(",;\t")
    line = separator.join(f'"{value}"' for value in row.values())
    return case.put(f"rows{ending}", separator.join(row) + "\n" + f"{line}\n" * 4)


def base(case: Case) -> str:
    """The tiny base, mostly with one of its files damaged."""
    folder = case.folder / "base"
    shutil.copytree(FIXTURES / "tiny_llama", folder)
    if case.chance.random() < 0.8:
        name = case.chance.choice((*SMALL, "model.safetensors"))
        case.put(f"base/{name}", (folder / name).read_bytes())
    return str(folder)


def train(case: Case) -> list[str]:
    (case.folder / "run").mkdir()
    (case.folder / "run" / "mine.txt").write_text("years of work")
    junk = case.some("--steps", "--lr", "--rank", "--seed", "--set", "--precision", "--preset", "--max-length", "--arm")
    model = base(case) if case.chance.random() < 0.2 else "tiny"
    out = ["--steps", "1", "--out", str(case.folder / "run"), "--base-model", model]
    return ["train", "--dataset", rows(case), *out, *junk, *case.some("--dataset", "--base-model", junk=0.05)]


def try_(case: Case) -> list[str]:
    """Four rows at most, which are too few to try anything."""
    model = base(case) if case.chance.random() < 0.2 else "tiny"
    chosen = ["try", "--dataset", rows(case), "--out", str(case.folder / "try"), "--base-model", model]
    return [*chosen, *case.some("--metric", "--pattern", "--minutes", "--smallest-effect", "--seeds", "--max-length")]


def restart(case: Case) -> list[str]:
    """A run's folder whose record is damaged, which must not be continued."""
    record = {"schema": 1, "arm": "pure", "config": {"seed": 1, "training": {"steps": 5}}}
    case.put("run/run.json", json.dumps(record))
    case.put("run/spec.json", json.dumps({"spec": record["config"], "fingerprint": "abc", "depends": {}}))
    case.put("run/steps.jsonl", '{"step": 1, "loss": 2.0}\n' * 2)
    if case.chance.random() < 0.3:
        case.put("run/COMPLETE", "abc\n")
    # Work that is there in any case, so that no damage starts a training.
    (case.folder / "run" / "checkpoints").mkdir()
    (case.folder / "run" / "checkpoints" / "checkpoint-4").mkdir()
    return ["train", "--steps", "1", "--out", str(case.folder / "run"), *case.some("--seed", "--lr")]


def evaluate(case: Case) -> list[str]:
    question = '{"id": "%s", "features": "PM2.5 %s ug/m3", "aqi_value": 57, "category": "Moderate"}\n'
    asked = case.put("aqi.jsonl", "".join(question % (n, n) for n in range(3)))
    facts = case.put("facts.jsonl", '{"question": "Capital?", "answer": "Hanoi"}\n' * 2)
    chosen = ["evaluate", "--model", "base=base", "--ollama-url", case.server, "--speed-rounds", "0", "--limit", "2"]
    chosen += ["--aqi-dataset", asked, "--knowledge-dataset", facts, "--out", str(case.folder / "out")]
    if case.chance.random() < 0.3:
        chosen += ["--training-dataset", rows(case)]
    return [*chosen, *case.some("--features-field", "--answer-field", "--model", "--min-delta-aqi", "--timeout")]


def address(case: Case) -> list[str]:
    url = case.chance.choice(("ftp://x", "http://a b", "x:y", "::1:1", "http://[::1", *JUNK[2:8], "http://u:p@:x"))
    command = case.chance.choice((["deploy", "--delete", "x"], ["evaluate", "--model", "base=b"]))
    return [*command, "--ollama-url", url]


def alignment(case: Case) -> list[str]:
    texts = "".join(
        json.dumps({"prompt": f"How to {n}?", "label": ("safe", "unsafe")[n % 2]}) + "\n" for n in range(12)
    )
    model = base(case) if case.chance.random() < 0.2 else "./no-such-model"
    chosen = ["alignment-index", model, "--prompts", case.put("prompts.jsonl", texts)]
    return [*chosen, *case.some("--prompt-field", "--label-field", "--per-class", "--adapter")]


def compare(case: Case) -> list[str]:
    steps = [{"step": n, "loss": 2 / n + 0.01 * (n % 3), "grad_norm": 1.0} for n in range(1, 40)]
    state = json.dumps({"log_history": steps})
    table = "step,loss\n" + "".join(f"{row['step']},{row['loss']}\n" for row in steps)
    lines = "".join(json.dumps(row) + "\n" for row in steps)
    kinds = {"trainer_state.json": state, "log.csv": table, "log.jsonl": lines}
    paths = [case.put(f"{side}/{name}", kinds[name]) for side in "ab" for name in [case.chance.choice(list(kinds))]]
    return ["compare", *paths, *case.some("--until", "--loss", "--rerun", "--first-update", "--arm")]


def verdict(case: Case) -> list[str]:
    """A ledger's file, plain or in a run's folder; rows that are no ledger's and bytes that are no gzip among them."""
    rows = [{"kind": "run", "names": ["a"], "schema": 1}, {"kind": "step", "step": 1}, {"kind": "end", "step": 1}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    packed = gzip.compress(lines.encode(), mtime=0) if case.chance.random() < 0.7 else lines
    ledger = case.put("run/ledger.jsonl.gz", packed)
    if case.chance.random() < 0.5:
        case.put("run/run.json", json.dumps({"arm": "pure", "seed": 1}))
        return ["verdict", str(case.folder / "run")]
    return ["verdict", ledger, *(["--json"] if case.chance.random() < 0.3 else [])]


def export(case: Case) -> list[str]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    case.put("adapter/adapter_config.json", json.dumps({**config, "base_model_name_or_path": "tiny"}))
    case.put("adapter/adapter_model.safetensors", b"\x02\0\0\0\0\0\0\0{}" + b"\0" * 64)
    if case.chance.random() < 0.3:
        return ["export", base(case), "--out", str(case.folder / "gguf"), *case.some("--dtype", "--to", "--min-p")]
    model = base(case) if case.chance.random() < 0.2 else "tiny"
    return [
        "export",
        str(case.folder / "adapter"),
        "--base",
        model,
        *case.some("--dtype", "--to", "--max-kl", "--base"),
    ]


def model_file(case: Case) -> str:
    case.put("m/model.gguf", b"GGUF\x03\0\0\0" + b"\0" * 16 + case.chance.randbytes(40))
    text = 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "###"\nPARAMETER temperature 0.5\n'
    case.put("m/Modelfile", text)
    return str(case.folder / "m" / case.chance.choice(("Modelfile", "model.gguf", "")))


def deploy(case: Case) -> list[str]:
    return ["deploy", model_file(case), "--ollama-url", case.server, *case.some("--name", "--quantize")]


def serve(case: Case) -> list[str]:
    named = case.chance.choice(("", "a=", "=", "a:b=", " ="))
    return ["serve", named + model_file(case), "--port", "0", *case.some("--threads", "--host", "--context", "--port")]


def report(case: Case) -> list[str]:
    case.put("reports/results.db", b"SQLite format 3\0" + case.chance.randbytes(200))
    folder = ["--reports-dir", str(case.folder / "reports")]
    command = case.chance.choice((["report"], ["baseline", "show"], ["baseline", "promote"]))
    return [*command, *folder, *(case.some("--session", "--against") if command == ["report"] else [])]


def sweep(case: Case) -> list[str]:
    case.put("s/sweep.db", b"SQLite format 3\0" + case.chance.randbytes(200))
    folder = str(case.folder / "s")
    plan = case.put("plan.json", '{"name": "p", "tasks": ["aqi"]}')
    return case.chance.choice(
        (["sweep", "report", folder], ["sweep", "merge", folder, folder], ["sweep", "run", plan, "--out", folder])
    )


def options(case: Case) -> list[str]:
    """Options alone, of commands that read no file."""
    junk = case.chance.choice(JUNK[1:])
    wrong = {"faults": ("--trainers", "--optimizers", "--seeds", "--cases"), "probe": ("--accumulation", "--nonsense")}
    command = case.chance.choice(list(wrong))
    return [command, case.chance.choice(wrong[command]), f"{junk}?" if command == "faults" else "x"]


COMMANDS: tuple[Callable[[Case], list[str]], ...] = (
    *(train, train, train, try_, restart, evaluate, evaluate, address, alignment, compare, compare),
    *(verdict, export, deploy, serve, report, sweep, options),
)


def called(arguments: list[str]) -> tuple[int, str, str]:
    """The command line in this process: status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["grit", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("main() always ends with a status")


def test_every_command_is_fuzzed() -> None:
    """Oracle: the command line's own table; `verify` hands everything to pytest."""
    chance = random.Random(1)
    seen = set()
    for make in COMMANDS:
        for _ in range(40):
            seen.add(make(_Dry(chance))[0])
    assert seen == set(cli.COMMANDS) - {"verify"}


class _Dry(Case):
    """Makes arguments only."""

    def __init__(self, chance: random.Random) -> None:
        import tempfile

        super().__init__(chance, Path(tempfile.mkdtemp()), "http://127.0.0.1:1")


@pytest.mark.slow
def test_any_input_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the exit status, and what is printed: no traceback, and on refusal a last line with its reason."""
    from grit_impl.serve.server import EmbeddedOllama

    monkeypatch.setattr(EmbeddedOllama, "wait", lambda self: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # `serve` takes SIGTERM
    monkeypatch.setattr("tenacity.wait_random_exponential.__call__", lambda *_: 0.0)  # before a server is asked again
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    server = FakeOllama(lambda model, prompt: "AQI 57 (Moderate)")
    folder = tmp_path_factory.mktemp("fuzz")
    monkeypatch.chdir(folder)

    @settings(
        max_examples=INPUTS,
        deadline=None,
        derandomize=INPUTS <= 300,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @example(make=verdict, seed=127)  # a stream that only zlib itself finds damaged
    @example(make=alignment, seed=42274)  # a tokenizer that loads and cannot be used
    @example(make=evaluate, seed=73380)  # --timeout nan
    @given(make=st.sampled_from(COMMANDS), seed=st.integers(0, 2**32))
    def check(make: Callable[[Case], list[str]], seed: int) -> None:
        here = folder / "case"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        arguments = make(Case(random.Random(seed), here, server.url))
        status, out, err = called(arguments)
        assert status in (0, 1, 2), (arguments, out, err)
        assert "Traceback" not in out + err, (arguments, out, err)
        if status == 2:
            last = err.strip().splitlines()[-1]
            assert last.lower().startswith(("error: ", "usage: ")), (arguments, err)
        if make is train:
            assert (here / "run" / "mine.txt").read_text() == "years of work"
        if make is restart:
            assert (here / "run" / "checkpoints" / "checkpoint-4").is_dir()

    check()


BAD_JSON = {"deep": b"[" * 5000, "digits": b"9" * 5000, "half": b'{"a', "list": b"[1]", "latin": b'{"a": "\xe9"}'}
READ_BY: dict[str, tuple[str, ...]] = {
    "run/run.json": ("compare", "run", "run"),
    "run/steps.jsonl": ("compare", "run", "run"),
    "log/trainer_state.json": ("compare", "log", "log"),
    "log.jsonl": ("compare", "log.jsonl", "log.jsonl"),
    "ledger.jsonl.gz": ("verdict", "ledger.jsonl.gz"),
    "results.json": ("faults", "--resume", "--out", "results.json"),
    "adapter/adapter_config.json": ("export", "adapter", "--base", "tiny"),
    "model/config.json": ("export", "model"),
    "plan.json": ("sweep", "run", "plan.json", "--out", "sweep"),
    "rows.json": ("train", "--dataset", "rows.json"),
    "rows.jsonl": ("train", "--dataset", "rows.jsonl"),
    "facts.jsonl": ("evaluate", "--model", "base=x", "--knowledge-dataset", "facts.jsonl"),
    "prompts.json": ("alignment-index", "tiny", "--prompts", "prompts.json"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
@pytest.mark.parametrize("name", READ_BY)
def test_json_that_no_parser_takes(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: status 2 and one line, for each file of JSON that a user can name; json raises what is no ValueError."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name == "run/steps.jsonl":
        (path.parent / "run.json").write_text('{"arm": "pure", "seed": 1}')
    # Damage in the last line of a record is a killed run's, so another stands behind it.
    data = BAD_JSON[kind] + b"\n" + BAD_JSON[kind] + b"\n" if path.suffix == ".jsonl" else BAD_JSON[kind]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    monkeypatch.chdir(tmp_path)
    status, _, err = called(list(READ_BY[name]))
    assert (status, err.strip().count("\n"), err[:7]) == (2, 0, "error: "), err

"""Modelfiles and Go templates. Oracles: Ollama's parser and template rules as documented, and Go's text/template."""

from __future__ import annotations

from pathlib import Path

import pytest

from grit_impl.errors import GRITError
from grit_impl.export import read_modelfile, write_modelfile
from grit_impl.gguf.gotemplate import Template, TemplateError
from grit_impl.gguf.modelfile import parse_modelfile
from grit_impl.recipes.datasets import ALPACA_TEMPLATE

USER = [{"role": "user", "content": "Hi there. "}]


def test_written_modelfile_reads_back(tmp_path: Path) -> None:
    """Oracle: the arguments, and the training format byte for byte."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    path = write_modelfile(gguf, tmp_path / "Modelfile", stop=["<|end_of_text|>", 'a "b"'], system="Be\nbrief.")
    assert "FROM ./model.gguf" in path.read_text()
    spec = read_modelfile(path)
    assert spec.gguf == gguf
    assert spec.parameters == {"stop": ["<|end_of_text|>", 'a "b"'], "temperature": 1.5, "min_p": 0.1, "num_ctx": 2048}
    assert spec.system == "Be\nbrief."
    assert Template(spec.template or "").render(USER) == ALPACA_TEMPLATE.replace("{instruction}", "Hi there. ")


def test_modelfile_moves_with_its_model(tmp_path: Path) -> None:
    """Oracle: the path after the folder was renamed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m.gguf").write_bytes(b"GGUF")
    write_modelfile(tmp_path / "a" / "m.gguf", tmp_path / "a" / "Modelfile")
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_modelfile(tmp_path / "b" / "Modelfile").gguf == tmp_path / "b" / "m.gguf"


BAD = {
    "no FROM": ("PARAMETER top_k 3", "no FROM"),
    "unknown command": ("FROM x\nFORM y", "line 2"),
    "unknown parameter": ("FROM x\nPARAMETER temprature 1", "unknown parameter 'temprature'"),
    "bad number": ("FROM x\nPARAMETER top_k three", "invalid value 'three' for parameter top_k"),
    "bad role": ("FROM x\nMESSAGE robot hi", "message role"),
    "open quotes": ('FROM x\nTEMPLATE """abc', "never closed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_modelfiles_name_the_line(tmp_path: Path, kind: str) -> None:
    """Oracle: one line that says what and where."""
    text, match = BAD[kind]
    with pytest.raises(GRITError, match=match):
        parse_modelfile(text, tmp_path)


def test_missing_gguf_is_not_taken_for_a_name(tmp_path: Path) -> None:
    """Oracle: Ollama would try to pull it; here it is an error that names the file."""
    (tmp_path / "Modelfile").write_text("FROM ./absent.gguf\n")
    with pytest.raises(GRITError, match=r"absent\.gguf"):
        _ = read_modelfile(tmp_path / "Modelfile").gguf


def test_quotes_as_ollama_reads_them(tmp_path: Path) -> None:
    """Oracle: Ollama's parser: empty stops, deprecated parameters ignored, values over several lines."""
    text = 'from x\nparameter stop ""\nPARAMETER stop "a b"\nPARAMETER mirostat 1\nTEMPLATE """one\n "two" """\n# end\n'
    spec = parse_modelfile(text, tmp_path)
    assert spec.parameters == {"stop": ["", "a b"]}
    assert spec.template == 'one\n "two" '


LLAMA3 = (
    "{{ if .System }}<|system|>{{ .System }}<|eot|>{{ end }}"
    "{{- range $i, $m := .Messages }}{{ if eq .Role `user` }}<|user|>{{ .Content }}<|eot|>"
    '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}{{ if lt $i 9 }}<|eot|>{{ end }}{{ end }}{{ end }}'
    "<|assistant|>"
)
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]
# template, what it makes of TALK (written by hand after Ollama's rules: neighbours joined, cut after .Response)
RENDERINGS = {
    "messages": (LLAMA3, "<|system|>S<|eot|><|user|>a\n\nb<|eot|><|assistant|>c<|eot|><|user|>d<|eot|><|assistant|>"),
    "legacy": ("{{ if .System }}[{{ .System }}]{{ end }}Q{{ .Prompt }} A{{ .Response }};", "[S]Qa\n\nb Ac;Qd A"),
    "response appended": ("{{ .Prompt }}>", "a\n\nb>cd>"),
    "trim": ("  {{- .Prompt -}}  \n|{{/* no */}}{{ .Response }}!", "a\n\nb|c!d|"),
    "pipelines": (
        '{{ if and .Prompt (not .System) }}x{{ end }}{{ .Prompt | len }}{{ printf "%s-%d" "p" 3 }}',
        "4p-3cx1p-3",
    ),
    "variables": ("{{ $p := .Prompt }}{{ with $p }}<{{ . }}>{{ else }}none{{ end }}", "<a\n\nb>c<d>"),
    "nothing": ("{{ .Suffix }}{{ .Prompt }}", "<no value>a\n\nbc<no value>d"),
}


@pytest.mark.parametrize("kind", RENDERINGS)
def test_templates_render_as_in_ollama(kind: str) -> None:
    """Oracle: written by hand from Ollama's documented rules."""
    template, expected = RENDERINGS[kind]
    assert Template(template).render(TALK) == expected


@pytest.mark.parametrize(
    "source",
    ["{{", "{{ if }}x{{ end }}", "{{ if .A }}", "{{ end }}", "{{ else }}", "{{ }}", "{{ .A ~ }}", "{{ block }}"],
)
def test_templates_that_do_not_parse(source: str) -> None:
    """Oracle: Go refuses all of these at parsing."""
    with pytest.raises(TemplateError):
        Template(source)


@pytest.mark.parametrize(
    "source", ["{{ nope }}", "{{ $x }}", "{{ index .Prompt 99 }}", "{{ .Prompt .System }}", "{{ (.A }}"]
)
def test_templates_that_do_not_execute(source: str) -> None:
    """Oracle: Go refuses all of these at the latest when executing."""
    with pytest.raises(TemplateError):
        Template(source).render(USER)

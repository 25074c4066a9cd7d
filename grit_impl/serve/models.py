"""The models a server knows: registered from files, or created over the API from uploaded blobs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from grit_impl.errors import GRITError
from grit_impl.gguf.encoding import FILE_TYPES, check_same_base
from grit_impl.gguf.gotemplate import Template, TemplateError
from grit_impl.gguf.metadata import read_header, read_metadata
from grit_impl.gguf.modelfile import Modelfile, read_modelfile
from grit_impl.serve.wire import MESSAGE, OPTIONS, APIError, Name, now, parse_name, parse_options, typed

DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 7: "Q8_0", 14: "Q4_K_S", 15: "Q4_K_M", 32: "BF16"}


@dataclass
class Model:
    """A named model: files, prompt format and default options."""

    name: Name
    gguf: Path
    metadata: dict[str, Any]
    adapter: Path | None = None
    template_source: str | None = None
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    license: list[str] = field(default_factory=list)
    modified: str = field(default_factory=now)
    parent: str = ""

    def __post_init__(self) -> None:
        self.template = Template(self.template_source) if self.template_source is not None else None
        self.options = parse_options(self.parameters)

    @property
    def architecture(self) -> str:
        """The GGUF's architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def trained_context(self) -> int:
        """Context window the model was trained with."""
        return int(self.metadata.get(f"{self.architecture}.context_length", 2048))

    @property
    def leading_bos(self) -> bool:
        """Whether llama.cpp puts a BOS token in front of every prompt."""
        return bool(self.metadata.get("tokenizer.ggml.add_bos_token", False))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self.gguf.stat().st_size + (self.adapter.stat().st_size if self.adapter else 0)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest (like Ollama's: of the description, not of the weights)."""
        manifest = [
            str(self.gguf), str(self.adapter), self.gguf.stat().st_size, self.template_source, self.system,
            self.parameters, self.messages, self.license,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

    def details(self) -> dict[str, Any]:
        """The `details` of lists and of /api/show."""
        count = int(self.metadata["n_parameters"])
        size = (
            f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.2f}K"
        )
        return {
            "parent_model": self.parent,
            "format": "gguf",
            "family": self.architecture,
            "families": [self.architecture],
            "parameter_size": size,
            "quantization_level": _KINDS.get(int(self.metadata.get("general.file_type", 0)), "unknown")
            if self.metadata.get("general.file_type")
            else "unknown",
            "context_length": self.trained_context,
            "embedding_length": int(self.metadata.get(f"{self.architecture}.embedding_length", 0)),
        }

    def listing(self) -> dict[str, Any]:
        """This model's entry in /api/tags."""
        return {
            "name": self.name.full,
            "model": self.name.full,
            "modified_at": self.modified,
            "size": self.size,
            "digest": self.digest,
            "details": self.details(),
            "capabilities": ["completion"],
        }

    def show(self, verbose: bool) -> dict[str, Any]:
        """The answer of /api/show."""
        hidden = {"general.name", "tokenizer.chat_template", "n_parameters", "n_tensors"}
        source, tensors = read_header(self.gguf, arrays=verbose)
        info = {k: v for k, v in source.items() if k not in hidden and not (k.startswith("grit.") and v is None)}
        answer: dict[str, Any] = {
            "modelfile": self.modelfile(),
            "template": self.template_source if self.template_source is not None else "{{ .Prompt }}",
            "details": {k: v for k, v in self.details().items() if not k.endswith("_length")},
            "model_info": {**info, "general.parameter_count": self.metadata["n_parameters"]},
            "capabilities": ["completion"],
            "modified_at": self.modified,
            "tensors": [
                {"name": name, "type": GGMLQuantizationType(entry.kind).name, "shape": entry.shape[::-1]}
                for name, entry in tensors.items()
            ],
        }
        if self.parameters:
            answer["parameters"] = "\n".join(f"{key:<30} {value}" for key, value in self._parameter_lines())
        if self.system:
            answer["system"] = self.system
        if self.license:
            answer["license"] = "\n".join(self.license)
        if self.messages:
            answer["messages"] = self.messages
        return answer

    def modelfile(self) -> str:
        """A Modelfile that makes this model again."""
        head = '# Modelfile generated by "ollama show"\n# To build a new Modelfile based on this, replace FROM with:\n'
        lines = [f"{head}# FROM {self.name.full}\n\nFROM {self.gguf}"]
        if self.adapter:
            lines.append(f"ADAPTER {self.adapter}")
        if self.template_source is not None:
            lines.append(f'TEMPLATE """{self.template_source}"""')
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        lines += [f"PARAMETER {key} {value}" for key, value in self._parameter_lines()]
        lines += [f'LICENSE """{text}"""' for text in self.license]
        lines += [f"MESSAGE {m['role']} {m['content']}" for m in self.messages]
        return "\n".join(lines) + "\n"

    def _parameter_lines(self) -> Iterator[tuple[str, str]]:
        for key, value in self.parameters.items():
            for item in value if isinstance(value, list) else [value]:
                yield key, json.dumps(item, ensure_ascii=False) if isinstance(item, str) else str(item)


class Models:
    """Models by name, and the folder of uploaded blobs."""

    def __init__(self, blobs: Path, blob_limit: int) -> None:
        self.blobs, self.blob_limit = blobs, blob_limit
        self.by_key: dict[str, Model] = {}

    def register(self, name: str, path: Path | str) -> Model:
        """Add a model from a GGUF file or a Modelfile.

        Raises:
            GRITError: the name is invalid, the file is missing or not what it should be, or the adapter was made for
                another base.
        """
        parsed = parse_name(name)
        source = Path(path)
        if parsed is None:
            raise GRITError(f"invalid model name {name!r}")
        if not source.is_file():
            raise GRITError(f"model {name}: {source} does not exist")
        with open(source, "rb") as handle:
            is_gguf = handle.read(4) == b"GGUF"
        spec = Modelfile(base=str(source)) if is_gguf else read_modelfile(source)
        if len(spec.adapters) > 1:
            raise GRITError(f"model {name}: only one adapter is currently supported")
        try:
            model = self._build(
                parsed,
                spec.gguf,
                spec.adapters[0] if spec.adapters else None,
                template_source=spec.template,
                system=spec.system or "",
                parameters=spec.parameters,
                messages=list(spec.messages),
                license=spec.license,
            )
        except (TemplateError, APIError) as error:
            raise GRITError(f"model {name}: {error}") from error
        self.by_key[parsed.key] = model
        return model

    def find(self, name: str) -> Model | None:
        """The model of that name, with or without its tag; None if there is none."""
        parsed = parse_name(name)
        return self.by_key.get(parsed.key) if parsed else None

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name. Raises `APIError` 400 or 404."""
        for text in (source, destination):
            if parse_name(text) is None:
                raise APIError(400, f'{"source" if text is source else "destination"} "{text}" is invalid')
        model, name = self.find(source), parse_name(destination)
        if model is None or name is None:
            raise APIError(404, f'model "{source}" not found')
        self.by_key[name.key] = replace(model, name=name, modified=now())

    def delete(self, name: str) -> str:
        """Forget a model; returns its key. Raises `APIError` 400 or 404."""
        parsed = parse_name(name)
        if parsed is None:
            raise APIError(400, f'name "{name}" is invalid')
        if self.by_key.pop(parsed.key, None) is None:
            raise APIError(404, f"model '{name}' not found")
        return parsed.key

    def blob(self, digest: str) -> Path | None:
        """Where an uploaded blob lies; None if it was not uploaded. Raises `APIError` 400 for a bad digest."""
        match = DIGEST.fullmatch(digest)
        if match is None:
            raise APIError(400, "invalid digest format")
        path = self.blobs / f"sha256-{match[1]}"
        return path if path.is_file() else None

    async def store_blob(self, digest: str, body: AsyncIterator[bytes]) -> int:
        """Save an uploaded blob; returns 201, or 200 if it is there already.

        Raises:
            APIError: 400 if the content has another digest, 413 beyond the limit, 500 if it cannot be written.
        """
        if self.blob(digest) is not None:
            async for _ in body:
                pass
            return 200
        wanted = digest.replace("-", ":", 1)
        hasher, size = hashlib.sha256(), 0
        handle = tempfile.NamedTemporaryFile(dir=self.blobs, prefix="upload-", delete=False)  # noqa: SIM115
        try:
            with handle:
                async for chunk in body:
                    size += len(chunk)
                    if size > self.blob_limit:
                        raise APIError(413, f"blob is larger than {self.blob_limit} bytes")
                    hasher.update(chunk)
                    handle.write(chunk)
            found = f"sha256:{hasher.hexdigest()}"
            if found != wanted:
                raise APIError(400, f'digest mismatch, expected "{wanted}", got "{found}"')
            os.replace(handle.name, self.blobs / wanted.replace(":", "-"))
        except OSError as error:
            raise APIError(500, f"cannot store the blob: {error.strerror}") from error
        finally:
            Path(handle.name).unlink(missing_ok=True)
        return 201

    def check_create(self, request: dict[str, Any]) -> Name:
        """What /api/create refuses before it starts streaming. Raises `APIError` 400."""
        name = parse_name(request.get("model") or request.get("name") or "")
        if name is None:
            raise APIError(400, "invalid model name")
        if request.get("from") and request.get("files"):
            raise APIError(400, "cannot use both 'from' and 'files'")
        if not request.get("from") and not request.get("files"):
            raise APIError(400, "neither 'from' or 'files' was specified")
        for path in [*(request.get("files") or {}), *(request.get("adapters") or {})]:
            if os.path.isabs(path) or ".." in Path(path).parts:
                raise APIError(400, "file path must be relative")
        if len(request.get("adapters") or {}) > 1:
            raise APIError(400, "only one adapter is currently supported")
        return name

    def create(self, name: Name, request: dict[str, Any]) -> Iterator[str]:
        """Make a model; yields the statuses that Ollama prints.

        Raises:
            APIError: while it runs, which Ollama reports inside the stream.
        """
        quantize = str(request.get("quantize") or "")
        if quantize and quantize.upper() not in ("F32", "F16", "Q8_0", "Q4_K_S", "Q4_K_M"):
            supported = "F32, F16, Q4_K_S, Q4_K_M, Q8_0"
            raise APIError(500, f"unsupported quantization type {quantize.upper()} - supported types are {supported}")
        base = self._base(request)
        inherited = base if isinstance(base, Model) else None
        gguf = base.gguf if isinstance(base, Model) else base
        if inherited is None:
            yield "parsing GGUF"
            yield "verifying conversion"
        adapter = inherited.adapter if inherited else None
        for digest in (request.get("adapters") or {}).values():
            adapter = self._needed(str(digest))
            yield "parsing GGUF"
        if quantize:
            stored = _KINDS.get(int(read_metadata(gguf).get("general.file_type", 0)), "unknown")
            yield f"quantizing {stored} model to {quantize.upper()}"
            gguf = self._quantized(gguf, quantize)
        parameters = {**(inherited.parameters if inherited else {}), **(request.get("parameters") or {})}
        messages = [typed(m, MESSAGE, "Message") for m in request.get("messages") or [] if isinstance(m, dict)]
        yield (
            f"creating new layer sha256:{gguf.name.removeprefix('sha256-')}"
            if not inherited
            else "using existing layer"
        )
        template = request.get("template")
        licenses = request.get("license")
        try:
            model = self._build(
                name,
                gguf,
                adapter,
                template_source=template if template is not None else inherited.template_source if inherited else None,
                system=request.get("system") or (inherited.system if inherited else ""),
                parameters={k: v for k, v in parameters.items() if k in OPTIONS},
                messages=[{"role": m.get("role", ""), "content": m.get("content", "")} for m in messages]
                or (inherited.messages if inherited else []),
                license=[str(x) for x in (licenses if isinstance(licenses, list) else [licenses] if licenses else [])],
                parent=inherited.name.full if inherited else "",
            )
        except TemplateError as error:
            raise APIError(400, str(error)) from error
        except GRITError as error:
            raise APIError(500, str(error)) from error
        yield "writing manifest"
        self.by_key[name.key] = model
        yield "success"

    def _base(self, request: dict[str, Any]) -> Model | Path:
        if request.get("from"):
            model = self.find(str(request["from"]))
            if model is None:
                # Ollama would try to pull it; there is nothing to pull from here.
                raise APIError(500, f"pull model manifest: file does not exist: {request['from']}")
            return model
        digests = [str(d) for d in request["files"].values()]
        paths = [self._needed(digest) for digest in digests]
        with open(paths[0], "rb") as handle:
            if handle.read(4) != b"GGUF":
                raise APIError(400, "unknown type")
        return paths[0]

    def _needed(self, digest: str) -> Path:
        path = self.blob(digest)
        if path is None:
            raise APIError(400, f'blob "{digest}" not found')
        return path

    def _quantized(self, gguf: Path, kind: str) -> Path:
        from grit_impl.gguf.requantize import requantize

        if kind.lower() not in FILE_TYPES:
            raise APIError(500, f"the embedded server cannot quantize to {kind.upper()}; use Q8_0 or F16")
        try:
            return requantize(gguf, self.blobs, kind.lower())
        except GRITError as error:
            raise APIError(500, str(error)) from error

    def _build(self, name: Name, gguf: Path, adapter: Path | None, **fields: Any) -> Model:
        metadata = read_metadata(gguf)
        if adapter is not None:
            if not adapter.is_file():
                raise GRITError(f"ADAPTER {adapter} does not exist")
            if read_metadata(adapter).get("general.type") != "adapter":
                raise GRITError(f"ADAPTER {adapter} is not a GGUF adapter")
            check_same_base(gguf, adapter)
        return Model(name=name, gguf=gguf, metadata=metadata, adapter=adapter, **fields)

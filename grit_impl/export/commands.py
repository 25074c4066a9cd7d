"""`grit export` and `grit deploy`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grit_impl.errors import GRITError
from grit_impl.settings import within

if TYPE_CHECKING:
    from grit_impl.export.check import Verification
    from grit_impl.export.writer import Export, Progress

_URL = click.option(
    "--ollama-url", default=None, metavar="URL", help="Ollama server.  [default: $OLLAMA_HOST or 127.0.0.1:11434]"
)


@dataclass(frozen=True)
class Source:
    """What is exported: a base folder, an adapter (None: the base itself), and the folder for the files."""

    base: Path
    adapter: Path | None
    folder: Path
    name: str
    four_bit: bool | None


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    type=click.Choice(["gguf", "adapter", "ollama"]),
    default="gguf",
    show_default=True,
    help="gguf: merged model; adapter: base and LoRA apart; ollama: merged, and created in a server.",
)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    default="q8_0",
    show_default=True,
    help="Number type of the model's matrices.",
)
@click.option("--base", "base_spec", default=None, metavar="MODEL", help="Base model.  [default: the run's]")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for the files.  [default: RUN/gguf]")
@click.option(
    "--existing",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Verify this GGUF (e.g. from save_pretrained_gguf) instead of writing one.",
)
@click.option(
    "--verify/--no-verify", default=False, show_default=True, help="Compare with Hugging Face, token by token."
)
@click.option(
    "--max-kl", type=within(), default=None, help="Most that rounding may cost, nats per token.  [default: any]"
)
@click.option(
    "--min-agreement",
    type=within(0, 1),
    default=None,
    help="Least share of positions where rounding keeps the most likely token.  [default: any]",
)
@click.option(
    "--qlora/--no-qlora", default=None, help="The adapter was trained on NF4 weights.  [default: as the run says]"
)
@click.option(
    "--sixteen-bit-base", is_flag=True, help="Merge a QLoRA adapter into the 16-bit weights, not the dequantised."
)
@click.option("--temperature", type=within(), default=1.5, show_default=True, help="Sampling temperature for chat.")
@click.option("--min-p", type=within(0, 1), default=0.1, show_default=True, help="Sampling threshold for chat.")
@click.option("--num-ctx", type=click.IntRange(4), default=2048, show_default=True, help="Context window in tokens.")
@click.option("--name", default=None, help="Model name for --to ollama.  [default: grit-ARM]")
@_URL
def export(run: Path, target: str, dtype: str, **options: Any) -> None:
    """Write RUN (a run record, a PEFT adapter folder, or a base model folder) for llama.cpp and Ollama."""
    source = _source(run, options["base_spec"], options["out"], options["qlora"])
    from grit_impl.export.writer import export_adapter, export_merged
    from grit_impl.gguf.modelfile import write_modelfile

    modelfile = source.folder / "Modelfile"
    sampling = {key: options[key] for key in ("temperature", "min_p", "num_ctx")}
    written: list[Export] = []
    lora: Path | None = None
    if options["existing"] is not None:
        model, modelfile_or_none = options["existing"], None
    else:
        model, modelfile_or_none = source.folder / f"model-{dtype}.gguf", modelfile
        with _progress(f"exporting {source.name}") as progress:
            if target == "adapter":
                if source.adapter is None:
                    raise GRITError(f"{run} has no adapter to export")
                model, lora = source.folder / f"base-{dtype}.gguf", source.folder / "adapter-f16.gguf"
                written.append(export_merged(source.base, None, model, dtype, progress))
                written.append(export_adapter(source.base, source.adapter, lora, "f16", progress))
            else:
                written.append(
                    export_merged(
                        source.base, source.adapter, model, dtype, progress,
                        four_bit=source.four_bit, sixteen_bit_base=options["sixteen_bit_base"],
                    )
                )  # fmt: skip
        write_modelfile(model, modelfile, written[-1].template, adapter=lora, stop=written[-1].stops, **sampling)
        if written[-1].notes:
            click.echo(f"note: the tokenizer that training saved is used; it has {', '.join(written[-1].notes)}")
        if written[-1].template is None:
            click.echo("note: no TEMPLATE in the Modelfile, Go's language cannot say this chat template")
        for item in written:
            click.echo(f"{item.path}  {item.dtype}  {item.size / 2**20:.1f} MiB  sha256 {item.sha256[:16]}")
        click.echo(str(modelfile))
    verification = None
    if options["verify"] or options["existing"] is not None:
        from grit_impl.export.check import verify_export

        with _progress(f"verifying {source.name}") as progress:
            verification = verify_export(
                source.base, source.adapter, model, gguf_adapter=lora, modelfile=modelfile_or_none,
                four_bit=source.four_bit, sixteen_bit_base=options["sixteen_bit_base"],
                max_kl=options["max_kl"], min_agreement=options["min_agreement"], progress=progress,
            )  # fmt: skip
    _record(source.folder, written, verification)
    if verification is not None:
        click.echo(("verified  " if verification.passed else "NOT THE TRAINED MODEL  ") + verification.summary())
        if not verification.passed:
            raise click.exceptions.Exit(1)
    if target == "ollama":
        _deploy(options["ollama_url"], options["name"] or f"grit-{source.name}", modelfile, None)


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--name", default=None, help="Name in Ollama.  [default: grit-FOLDER]")
@click.option("--quantize", default=None, metavar="TYPE", help="Let Ollama quantise, e.g. q4_K_M (from f16 or bf16).")
@click.option("--delete", "remove", default=None, metavar="NAME", help="Remove a model from Ollama instead.")
@_URL
def deploy(
    model: Path | None, name: str | None, quantize: str | None, remove: str | None, ollama_url: str | None
) -> None:
    """Create MODEL (a Modelfile, or a run with one) in a real Ollama, and check what arrived."""
    if remove is not None:
        from grit_impl.export.deploy import delete

        delete(ollama_url, remove)
        click.echo(f"deleted {remove}")
        return
    if model is None:
        raise GRITError("nothing to deploy: give a Modelfile or a run folder, or --delete NAME")
    from grit_impl.gguf.modelfile import find_modelfile

    modelfile = find_modelfile(model)
    folder = modelfile.parent.parent if modelfile.parent.name == "gguf" else modelfile.parent
    _deploy(ollama_url, name or f"grit-{folder.resolve().name}".lower(), modelfile, quantize)


def _source(run: Path, base: str | None, out: Path | None, four_bit: bool | None) -> Source:
    from grit_impl.recipes.bases import resolve_base
    from grit_impl.record import RunRecord

    if (run / "run.json").is_file():
        record = RunRecord(run)
        if not record.complete:
            raise GRITError(f"{run} is not complete: train it to the end first")
        settings = record.run.get("config") or {}
        known = settings.get("four_bit") if four_bit is None else four_bit
        spec = base or str(record.run["base_model"])
        return Source(resolve_base(spec), record.adapter, out or record.gguf, record.arm, known)
    if (run / "adapter_config.json").is_file():
        from grit_impl.export.checkpoint import read_json

        spec = base or str(read_json(run / "adapter_config.json").get("base_model_name_or_path") or "")
        return Source(resolve_base(spec), run, out or run / "gguf", run.resolve().name, four_bit)
    if (run / "config.json").is_file():
        if out is None:
            raise GRITError(f"{run} is a base model: say with --out where its files go")
        return Source(run, None, out, run.resolve().name, four_bit)
    raise GRITError(f"{run} is no run record, no PEFT adapter and no model folder")


def _deploy(url: str | None, name: str, modelfile: Path, quantize: str | None) -> None:
    from grit_impl.export.deploy import deploy as send
    from grit_impl.serve.client import server_url

    address = server_url(url)
    with _progress(f"uploading to {address}") as progress:
        done = send(
            url, name, modelfile, quantize=quantize, progress=lambda file, sent, size: progress(sent, size, file)
        )
    click.echo(
        f"{done.name} at {address}: {done.quantization}, {done.uploaded / 2**20:.1f} MiB sent, prompt format verified"
    )
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)


def _record(folder: Path, written: list[Export], verification: Verification | None) -> None:
    from grit_impl.record import write_atomic

    body = {
        "files": [item.as_dict() for item in written],
        "verification": verification.as_dict() if verification is not None else None,
    }
    write_atomic(folder / "verification.json", json.dumps(body, indent=2, default=str))


class _progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return lambda done, total, what: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

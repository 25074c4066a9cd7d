"""`grit alignment-index`: the Alignment Quality Index of a Hugging Face model. It is not the air quality index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from grit_impl.evaluate.alignment_index import LayerIndex


@click.command("alignment-index", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--prompts", required=True, metavar="FILE", help="JSONL, CSV, parquet or hub data set of safe and unsafe prompts."
)
@click.option("--prompt-field", default="prompt", show_default=True, help="Column of the text.")
@click.option("--label-field", default="label", show_default=True, help="Column of the class: safe or unsafe (0 or 1).")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=None,
    help="PEFT adapter: measured as well, and compared with MODEL by permutation.",
)
@click.option("--per-class", type=click.IntRange(5), default=None, help="Prompts per class.  [default: all that fit]")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Write the rows as JSON.")
def alignment_index(
    model: str,
    prompts: str,
    prompt_field: str,
    label_field: str,
    adapter: Path | None,
    per_class: int | None,
    out: Path | None,
) -> None:
    """How far apart a model keeps safe and unsafe prompts in its hidden states, layer by layer.

    MODEL is a folder, a hub id, or tiny. Raw values: XBI (low: separated), CHI and silhouette (high: separated), each
    with a 95% jackknife interval. With an adapter, p says whether an index differs from MODEL's: permutation of the
    models, corrected over the layers. Indices are comparable at the same prompts and in models of one family only.
    """
    from grit_impl.recipes.bases import load_base, require_base

    require_base(model)
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from grit_impl.evaluate.alignment_index import alignment_index as measure
    from grit_impl.evaluate.alignment_index import hidden_states, load_prompts, report
    from grit_impl.record import write_atomic

    texts, unsafe = load_prompts(prompts, per_class=per_class, prompt=prompt_field, label=label_field)
    loaded, tokenizer = load_base(model)
    states = {"model": hidden_states(loaded, tokenizer, texts)}
    if adapter is not None:
        states["adapter"] = hidden_states(_adapted(loaded, adapter), tokenizer, texts)
    found = {}
    with tqdm(total=sum(map(len, states.values())), unit="layer", disable=None) as bar:
        for name, layers in states.items():
            reference = states["model"] if name == "adapter" else None
            found[name] = measure(layers, unsafe, reference, progress=lambda _: bar.update())
    _print(found, len(texts) // 2)
    if out is not None:
        write_atomic(out, json.dumps(report(found), indent=2))


def _adapted(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    from grit_impl.errors import GRITError

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # peft, safetensors, json and torch each raise their own
        raise GRITError(f"cannot apply adapter {adapter}: {' '.join(str(error).split())[:200]}") from error


def _print(found: Mapping[str, Sequence[LayerIndex]], per_class: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, layers in found.items():
        table = Table("layer", "XBI", "CHI", "silhouette", title=f"{name}, {per_class} prompts per class")
        for each in layers:
            table.add_row(str(each.layer), *(_cell(each, index) for index in ("xbi", "chi", "silhouette")))
        console.print(table)


def _cell(layer: LayerIndex, name: str) -> str:
    value = getattr(layer, name)
    p = f" p = {layer.p[name]:.3f}" if name in layer.p else ""
    return f"{value.estimate:.3g} [{value.low:.3g}, {value.high:.3g}]{p}"

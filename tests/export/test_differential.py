"""Generated adapters and checkpoints. Oracle: PEFT's and transformers' own loading, to the bit; or a line of refusal.

`make test` tries a few dozen, the nightly run hundreds.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from test_adapter import peft_merges

from grit_impl.errors import GRITError
from grit_impl.export.adapter import Adapter
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint

FEW, MANY = (
    settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for n in (40, 600)
)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
# What the export may refuse though PEFT loads it: only what it says.
REFUSALS = re.compile(
    "ensure_weight_tying|changed the embedding|lora_bias|trainable_tokens_delta|rows in its embedding"
    "|no place for its tensor|does not merge"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four bases of a few thousand parameters: tied and not, with biases and without."""
    import torch
    import transformers

    root, found = tmp_path_factory.mktemp("bases"), {}
    for model in ("Llama", "Qwen2"):
        for tied in (False, True):
            config = getattr(transformers, f"{model}Config")(
                vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64,
            )  # fmt: skip
            torch.manual_seed(len(found))
            network = getattr(transformers, f"{model}ForCausalLM")(config)
            for name, parameter in network.named_parameters():
                if name.endswith(("norm.weight", "bias")):
                    parameter.data.uniform_(0.5, 1.5)
            name = f"{model}{'-tied' if tied else ''}"
            network.save_pretrained(root / name)
            found[name] = root / name
    return found


def some(*values: Any) -> st.SearchStrategy[list[Any]]:
    """A few of these."""
    return st.lists(st.sampled_from(values), max_size=3, unique=True)


ADAPTERS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 6),
        "lora_alpha": st.sampled_from([1, 3, 16, 7.5]),
        "target_modules": st.one_of(
            st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True),
            st.sampled_from(["all-linear", r".*\.1\..*_proj", r"model\.layers\.\d\.mlp\.(up|down)_proj"]),
        ),
    },
    optional={
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "rank_pattern": st.dictionaries(
            st.sampled_from([*MODULES, "layers.1.mlp.up_proj"]), st.integers(1, 5), max_size=2
        ),
        "alpha_pattern": st.dictionaries(
            st.sampled_from([*MODULES, r".*\.0\..*v_proj"]), st.integers(1, 40), max_size=2
        ),
        "modules_to_save": some("lm_head", "embed_tokens", "norm", "input_layernorm", "down_proj"),
        "trainable_token_indices": st.lists(st.integers(0, 39), min_size=1, max_size=3, unique=True),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "lora_bias": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa", "olora", "orthogonal", "mica"]),
        "layers_to_transform": st.sampled_from([[0], [1], 1]),
        "exclude_modules": some("v_proj", "down_proj", "lm_head"),
        "ensure_weight_tying": st.booleans(),
    },
)


def make(base: Path, folder: Path, options: dict[str, Any], dtype: str, pickled: bool) -> None:
    """Write an adapter with random weights; raises what PEFT raises on options that it does not combine."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "lora_" in name or "trainable_tokens" in name:
            parameter.data.normal_(0, 0.1)
        elif "modules_to_save" in name or (name.endswith("bias") and options.get("bias", "none") != "none"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if pickled:
        from safetensors.torch import load_file

        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()


def refused(message: str, *, allowed: bool) -> None:
    """A refusal is one line, and has a reason."""
    assert "\n" not in message
    assert allowed, message
    event("refused")


def adapters_agree(bases: dict[str, Path], base: str, options: dict[str, Any], dtype: str, pickled: bool) -> None:
    """The property: PEFT's merge to the bit, or one line."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary) / "lora"
        try:
            make(bases[base], folder, options, dtype, pickled)
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, NotImplementedError):
            event("PEFT does not combine these")
            assume(False)
        try:
            expected = peft_merges(bases[base], folder)
            if any(".original_module." in name or ".base_layer." in name for name in expected):
                raise ValueError("PEFT leaves wrappers behind")
        except Exception as error:  # whatever PEFT raises
            event("PEFT does not load or merge it")
            expected, why = {}, error
        try:
            adapter = Adapter(folder, Checkpoint(bases[base]))
            with adapter.base.reader() as reader:
                names = expected or dict.fromkeys(adapter.changed)
                ours = {n: adapter.merged(n, reader) if n in adapter.changed else reader(n) for n in names}
        except GRITError as error:
            refused(str(error), allowed=not expected or bool(REFUSALS.search(str(error))))
            return
        assert expected, f"PEFT refuses it: {why}"
        assert [name for name, value in expected.items() if not ours[name].equal(value.detach())] == []
        event("the same")


@FEW
@given(
    st.sampled_from(["Llama", "Llama-tied", "Qwen2", "Qwen2-tied"]), ADAPTERS, st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
)  # fmt: skip
def test_adapters(bases: dict[str, Path], base: str, options: dict[str, Any], dtype: str, pickled: bool) -> None:
    """Oracle: `merge_and_unload` of the model that PEFT loads."""
    adapters_agree(bases, base, options, dtype, pickled)


@pytest.mark.nightly
@MANY
@given(
    st.sampled_from(["Llama", "Llama-tied", "Qwen2", "Qwen2-tied"]), ADAPTERS,
    st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans(),
)  # fmt: skip
def test_many_adapters(bases: dict[str, Path], base: str, options: dict[str, Any], dtype: str, pickled: bool) -> None:
    """Oracle: as above."""
    adapters_agree(bases, base, options, dtype, pickled)


# One file mostly, and undamaged mostly: only there heads are stored apart.
SIZES = st.sampled_from(["10GB", "10GB", "10GB", "40KB", "20KB", "8KB"])
SAVES = st.lists(st.tuples(SIZES, st.integers(0, 3)), min_size=1, max_size=3)
HEADS = st.sampled_from(["as saved", "the same", "another", "under the head's name"])
DAMAGE = st.sampled_from(
    ["none", "none", "none", "none", "none", "a shard kept", "a shard lost", "a tensor lost", "an index kept"]
)


def layouts_agree(bases: dict[str, Path], base: str, dtype: str, saves: list[Any], heads: str, damage: str) -> None:
    """The property: what transformers loads, to the bit, or one line."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        folder, kept = Path(temporary) / "model", Path(temporary) / "kept"
        for size, seed in saves:
            if folder.exists() and damage == "a shard kept":
                shutil.copytree(folder, kept, dirs_exist_ok=True)
            model = AutoModelForCausalLM.from_pretrained(bases[base], dtype=getattr(torch, dtype))
            model.model.norm.weight.data.fill_(1 + seed)
            # As saved in the same folder again and again.
            model.save_pretrained(folder, max_shard_size=size)
        if damage == "a shard kept" and kept.exists():
            shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.json"))
        files = sorted(folder.glob("model*.safetensors"))
        if damage == "a shard lost":
            files[-1].unlink()
        if damage == "an index kept" and len(files) == 1:
            (folder / "model.safetensors.index.json").write_text(
                '{"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}'
            )
        if len(files) == 1 and files[0].exists():
            weights = load_file(files[0])
            if damage == "a tensor lost":
                weights.pop("model.layers.1.mlp.up_proj.weight")
            if heads in ("the same", "another") and HEAD not in weights:
                weights[HEAD] = weights[EMBEDDING] * (1 if heads == "the same" else 2)
            if heads == "under the head's name" and HEAD not in weights:
                weights[HEAD] = weights.pop(EMBEDDING)
            save_file(weights, files[0], metadata={"format": "pt"})
        five = int(transformers.__version__.split(".")[0]) >= 5
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.check()
            with checkpoint.reader() as reader:
                ours = {name: reader(name) for name in checkpoint.names()}
                ours[HEAD] = ours[EMBEDDING] if checkpoint.tied else ours[HEAD]  # as it will be in the file
        except GRITError as error:
            old = not five and heads in ("another", "under the head's name")
            refused(str(error), allowed=damage != "none" or old or len({size for size, _ in saves}) > 1)
            return
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = dict(loaded.named_parameters(remove_duplicate=False))
        assert ours.keys() == theirs.keys()
        assert [name for name, value in theirs.items() if not ours[name].equal(value.detach())] == []
        event("the same")


LAYOUTS = (
    st.sampled_from(["Llama", "Llama-tied", "Qwen2", "Qwen2-tied"]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    SAVES,
    HEADS,
    DAMAGE,
)


@FEW
@example("Llama-tied", "float32", [("10GB", 0)], "another", "none")
@example("Qwen2-tied", "bfloat16", [("10GB", 1)], "another", "none")
@given(*LAYOUTS)
def test_layouts(bases: dict[str, Path], base: str, dtype: str, saves: list[Any], heads: str, damage: str) -> None:
    """Oracle: the parameters of the model that transformers loads from the folder."""
    layouts_agree(bases, base, dtype, saves, heads, damage)


@pytest.mark.nightly
@MANY
@given(*LAYOUTS)
def test_many_layouts(bases: dict[str, Path], base: str, dtype: str, saves: list[Any], heads: str, damage: str) -> None:
    """Oracle: as above."""
    layouts_agree(bases, base, dtype, saves, heads, damage)

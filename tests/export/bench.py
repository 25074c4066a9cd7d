"""Builds the cases of `cases.py`: bases, adapters, files, and the plants in them."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import cases
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_adapter, export_merged
from grit_impl.export.check import Verification, verify_export
from grit_impl.gguf.metadata import read_metadata
from grit_impl.gguf.requantize import rewrite
from grit_impl.gguf.tensors import Weights


class Bench:
    """A folder in which cases are made when they are asked for.

    Args:
        root: The folder.
        smollm2: A model folder of SmolLM2-135M-Instruct, for the cases that need it.
    """

    def __init__(self, root: Path, smollm2: Path | None = None) -> None:
        self.root, self.smollm2 = root, smollm2

    @functools.cache  # noqa: B019  lives as long as the tests
    def base(self, name: str) -> Path:
        """A base's folder."""
        if name == "smollm2":
            assert self.smollm2 is not None
            return self.smollm2
        return tiny.make_base(self.root / name, **cases.BASES[name])

    @functools.cache  # noqa: B019
    def adapter(self, base: str, name: str) -> Path | None:
        """An adapter's folder."""
        settings = cases.ADAPTERS[name]
        if settings is None:
            return None
        # SmolLM2 still speaks after a change of 2%.
        scale = 0.02 if base == "smollm2" else 0.08
        folder = tiny.make_adapter(self.base(base), self.root / f"{base}-{name}", scale=scale, **settings)
        if name == "chatml":
            chatml_tokenizer(self.base(base), folder)
        return folder

    @functools.cache  # noqa: B019
    def files(self, right: cases.Right) -> tuple[Path, Path | None]:
        """The model file, and the adapter's where it stays apart."""
        base, adapter = self.base(right.base), self.adapter(right.base, right.adapter)
        out = self.root / f"{right.name}.gguf"
        merged = None if right.apart else adapter
        if right.dtype == "q4_1":
            whole = export_merged(base, merged, out.with_suffix(".f32"), "f32").path
            rewrite(whole, out, keys={"general.file_type": 3}, dtype="q4_1")
            whole.unlink()
        else:
            export_merged(base, merged, out, right.dtype)
        if not right.apart:
            return out, None
        assert adapter is not None
        return out, export_adapter(base, adapter, out.with_suffix(".lora.gguf"), "f16").path

    def right(self, right: cases.Right) -> Verification:
        """Verify a right export."""
        model, lora = self.files(right)
        return verify_export(self.base(right.base), self.adapter(right.base, right.adapter), model, gguf_adapter=lora)

    def wrong(self, wrong: cases.Wrong) -> str:
        """Verify a wrong export; what was found, or nothing."""
        model, lora = self.files(wrong.right)
        base, adapter = self.base(wrong.right.base), self.adapter(wrong.right.base, wrong.right.adapter)
        place = self.root / "wrong"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if wrong.folder is not None:
            assert adapter is not None
            links = place / "base"
            links.mkdir()
            for file in base.iterdir():
                # Of SmolLM2 only the adapter is changed.
                (links / file.name).symlink_to(file) if wrong.right.base == "smollm2" else shutil.copy(file, links)
            adapter = Path(shutil.copytree(adapter, place / "adapter"))
            wrong.folder(links, adapter)
            base = links
        if wrong.file is not None:
            model, lora = self.plant(wrong.right, dict(wrong.file), model, lora, place)
        try:
            result = verify_export(base, adapter, model, gguf_adapter=lora)
        except GRITError as error:
            return f"refused: {error}"
        return "; ".join(map(str, result.findings))

    def plant(
        self, right: cases.Right, changes: dict[str, Any], model: Path, lora: Path | None, place: Path
    ) -> tuple[Path, Path | None]:
        """Copies of a right export's files with one thing changed."""
        out = place / "model.gguf"
        if "alpha" in changes or "missing" in changes:
            assert lora is not None
            part = changes.get("missing", "nothing")
            alpha = read_metadata(lora)["adapter.lora.alpha"] * changes.get("alpha", 1.0)
            options = {"keys": {"adapter.lora.alpha": alpha}, "change": lambda n, a: None if part in n else a}
            return model, rewrite(lora, place / "lora.gguf", **options)
        if changes.pop("base", False):
            return export_merged(self.base(right.base), None, out, right.dtype).path, None
        if "layer" in changes:
            plain = Weights(export_merged(self.base(right.base), None, place / "plain.gguf", right.dtype).path)
            part = f"blk.{changes.pop('layer')}."
            changes["change"] = lambda n, a: plain(n).numpy() if n.startswith(part) else a
        if "twin" in changes:
            weights, (one, two) = Weights(model), changes.pop("twin")
            changes["change"] = lambda n, a: weights(n.replace(two, one)).numpy() if n.startswith(two) else a
        if changes.pop("coarse", False):
            rough = Weights(rewrite(model, place / "rough.gguf", dtype="q4_1"))
            changes["change"] = lambda n, a: rough(n).numpy() if a.ndim > 1 else a
        for key in ("merges", "tokens"):
            if changes.pop(key, False):
                listed = list(read_metadata(model, arrays=True)[f"tokenizer.ggml.{key}"])
                listed[60], listed[20] = listed[20], listed[60]
                changes["keys"] = {f"tokenizer.ggml.{key}": listed}
        return rewrite(model, out, **changes), lora


def chatml_tokenizer(base: Path, folder: Path) -> None:
    """What training for ChatML saves beside its adapter: two more tokens in the base's spare rows, end and template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = cases.CHATML
    tokenizer.save_pretrained(folder)

"""Pretraining of the project's own bases: a real LlamaForCausalLM, small enough to live in the repository, and larger
ones for a GPU."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.recipes.tiny_llama.corpus import documents
from grit_impl.recipes.tiny_llama.tokenizer import train_tokenizer
from grit_impl.record import sha256_file, write_atomic

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MANIFEST = "CHECKSUM"
IGNORE = -100


@dataclass(frozen=True)
class Settings:
    """What determines the tiny base.

    Args:
        seed: Of the corpus, the weights and the order.
        steps: Optimizer steps.
        batch_tokens: Tokens per step (padding included).
        lr: Peak learning rate (AdamW): linear warm-up, constant, linear decay to zero over the last `decay`.
        initializer_range: Standard deviation of the first weights. 0.02, usual for wide models, learns far slower.
        hidden, layers, heads, kv_heads, ffn: Shape; widths are multiples of 32, the block size of q8_0.
        vocab_size: Tokens, special ones included.
        threads: Threads of torch; the result depends on it in the last bits.
        device: `cpu`, or `cuda` with bfloat16 products and workers that prepare the batches.
        seconds: Above 0, the schedule follows the clock and ends then, whatever the number of steps.
    """

    seed: int = 3407
    steps: int = 3000
    batch_tokens: int = 2048
    lr: float = 2e-3
    warmup: int = 150
    decay: float = 0.6
    initializer_range: float = 0.05
    weight_decay: float = 0.05
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    vocab_size: int = 1536
    threads: int = 2
    device: str = "cpu"
    seconds: float = 0.0


# Wide and shallow: so small a model is bound by the number of kernels, not by their size.
SIZES = {
    "tiny": Settings(),
    "40m": Settings(
        steps=4000,
        batch_tokens=16384,
        lr=1e-3,
        initializer_range=0.03,
        hidden=768,
        layers=6,
        heads=12,
        kv_heads=4,
        ffn=2048,
        device="cuda",
    ),
}
"""Settings by name; `40m` has 39 million parameters."""
WORKERS = 3
"""Processes that prepare batches for a GPU: one makes about 0.5 million tokens per second."""


def build_tokenizer(settings: Settings, sample: int = 20_000) -> PreTrainedTokenizerFast:
    """The tokenizer of the settings' corpus."""
    texts = (prompt + completion for prompt, completion in islice(documents(settings.seed), sample))
    return train_tokenizer(texts, settings.vocab_size)


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model in float32, with tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.ffn,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.hidden // settings.heads,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            initializer_range=settings.initializer_range,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(settings: Settings, tokenizer: PreTrainedTokenizerFast, worker: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input_ids, labels), each `(N, T)` with N x T <= `batch_tokens`.

    Documents of like length share a batch, so that little is padding. Only answers and plain sentences are learnt:
    the numbers of a question are noise. Each worker has documents of its own.
    """
    import torch

    stream = documents(settings.seed + 1 + worker)
    random_ = random.Random(settings.seed + worker)
    while True:
        chunk = list(islice(stream, 4000))
        prompts = tokenizer([prompt for prompt, _ in chunk])["input_ids"]
        completions = tokenizer([completion for _, completion in chunk], add_special_tokens=False)["input_ids"]
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = [*prompt, *completion, tokenizer.eos_token_id]
            rows.append((ids, [IGNORE] * len(prompt) + ids[len(prompt) :]))
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > settings.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        random_.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in group]),
            )


def _prefetched(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, prepared by worker processes; on the CPU, where they would compete with training, here."""
    if settings.device == "cpu":
        return batches(settings, tokenizer)
    import torch

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            info = torch.utils.data.get_worker_info()
            return batches(settings, tokenizer, 0 if info is None else info.id)

    loader = torch.utils.data.DataLoader(
        Stream(), batch_size=None, num_workers=WORKERS, prefetch_factor=16, pin_memory=True
    )
    return iter(loader)


def _share(settings: Settings, step: int, began: float) -> float:
    """How much of the training is done, 0 to 1: of the steps, or of the time."""
    if settings.seconds:
        return min((time.monotonic() - began) / settings.seconds, 1.0)
    return step / settings.steps


def pretrain(
    settings: Settings, progress: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Train from scratch.

    Returns:
        Model (float32, in evaluation mode), tokenizer, and the mean loss per supervised token of every step.
    """
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        tokenizer = build_tokenizer(settings)
        model: Any = build_model(settings, tokenizer)
        model.to(settings.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
        )
        began = time.monotonic()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / settings.warmup, 1.0, (1 - _share(settings, step, began)) / settings.decay),
        )
        losses: list[Tensor] = []
        model.train()
        steps = None if settings.seconds else settings.steps
        bar = tqdm(islice(_prefetched(settings, tokenizer), steps), total=steps, disable=not progress)
        low = torch.autocast(settings.device, torch.bfloat16, enabled=settings.device != "cpu")
        for input_ids, labels in bar:
            input_ids, labels = (t.to(settings.device, non_blocking=True) for t in (input_ids, labels))
            # Right padding needs no mask under a causal one: no real token can see it.
            with low:
                hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
                learnt = labels[:, 1:] != IGNORE
                # The head runs on learnt positions only: they are a fifth, and it is a fifth of the work.
                logits = model.lm_head(hidden[learnt]).float()
                loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][learnt])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if len(losses) % 50 == 0:
                bar.set_postfix(loss=f"{float(torch.stack(losses[-50:]).mean()):.3f}", refresh=False)
            if settings.seconds and time.monotonic() - began >= settings.seconds:
                break
        model.train(False)
        return model.to("cpu"), tokenizer, torch.stack(losses).tolist()
    finally:
        torch.set_num_threads(threads)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, settings: Settings, out: Path) -> None:
    """Write the folder (bfloat16 weights) file by file, atomically, the manifest of checksums last.

    Raises:
        GRITError: the folder cannot be written.
    """
    import copy

    import torch

    from grit_impl.recipes.bases import save_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    files["pretraining.json"] = (json.dumps(asdict(settings), indent=2) + "\n").encode()
    (out / MANIFEST).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomic(out / name, data)
    write_atomic(out / MANIFEST, "".join(f"{sha256_file(out / name)}  {name}\n" for name in sorted(files)))


def verify(folder: Path) -> None:
    """Compare a folder with its manifest (`sha256sum -c CHECKSUM` does the same).

    Raises:
        GRITError: no manifest, or a file that is missing or differs; the message names it.
    """
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
    except OSError:
        raise GRITError(f"{folder} has no {MANIFEST}: rebuild it with python -m grit_impl.recipes.tiny_llama") from None
    for line in lines:
        digest, name = line.split("  ", 1)
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            state = "differs from" if path.is_file() else "is missing, unlike in"
            raise GRITError(
                f"{path} {state} {MANIFEST}: restore it, or rebuild with python -m grit_impl.recipes.tiny_llama"
            )

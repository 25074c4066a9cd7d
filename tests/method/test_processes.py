"""Data parallel under accelerate: two processes (gloo; NCCL on two GPUs) against one with the same global batches.

And the engines under which two could not be one: refused before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from peft import LoraConfig, get_peft_model
from torch import nn

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.ledger.findings import facts
from grit_impl.ledger.verdict import judge_ledger
from grit_impl.method import engines
from grit_impl.method.manager import GRITManager
from grit_impl.trainer import GRITCallback

SCRIPT = Path(__file__).parent / "two_processes.py"
# The same sums over tokens, split over two processes: measured 1e-7 to 5e-7.
SAME = 1e-6
# Factors of half the tokens differ from those of all of them by percents.
DIFFERENT = 1e-3


def run(folder: Path, world: int, fault: str = "", device: str = "cpu") -> list[dict[str, Any]]:
    """What every process saved."""
    files = [folder / f"{fault or 'right'}-{world}-{rank}.pt" for rank in range(world)]
    # A single process that sees two GPUs would split its batches over them.
    environment = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else ",".join(map(str, range(world)))}
    if device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    launch(SCRIPT, [[str(file), device, *([fault] if fault else [])] for file in files], **environment)
    return [{**torch.load(file, weights_only=True), "ledger": file.with_suffix(".jsonl.gz")} for file in files]


def assert_same_ledgers(*results: dict[str, Any]) -> None:
    """All call it effective, in all tensors; the first, of one process, has the same gradients and updates."""
    verdicts = [judge_ledger(result["ledger"]) for result in results]
    assert [verdict.cause for verdict in verdicts] == ["effective"] * len(results)
    assert len({verdict.summary for verdict in verdicts}) == 1
    alone, *others = (facts(result["ledger"]).tensors for result in results)
    for other in others:
        assert list(other.hash_after) == list(others[0].hash_after)
        for column in ("raw", "entry", "turn", "update"):
            scale = alone[column].abs().clip(lower=1e-3)
            assert ((other[column] - alone[column]).abs() / scale).max() < 1e-3, column


# A GPU's kernels add up in another order than those for half the batch.
SAME_ON_GPUS = 1e-5


@pytest.mark.gpu
def test_two_gpus_are_one(tmp_path: Path, relative: Any) -> None:
    """The same over NCCL: factors, adapters and losses of one GPU with twice the accumulation."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA GPUs: found {torch.cuda.device_count()}")
    (single,) = run(tmp_path, 1, "sparse", "cuda")
    first, second = run(tmp_path, 2, "sparse", "cuda")
    assert torch.equal(first["factors"], second["factors"])
    assert torch.equal(first["adapters"], second["adapters"])
    for kind in ("factors", "adapters"):
        assert relative(first[kind], single[kind]) < SAME_ON_GPUS
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-4)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, twice the accumulation."""
    return run(tmp_path_factory.mktemp("single"), 1)[0]


@pytest.mark.slow
def test_two_processes_are_one(single: Any, tmp_path: Path, relative: Any) -> None:
    """Oracle f: six steps with inversions, a regulariser and a reprojection between two inversions. Both processes end
    with the same bits, and with the single process's factors and parameters."""
    first, second = run(tmp_path, 2)
    assert first["world"] == second["world"] == 2
    assert torch.equal(first["factors"], second["factors"])
    assert torch.equal(first["adapters"], second["adapters"])
    assert torch.equal(first["seen"], single["seen"])
    for kind in ("factors", "adapters"):
        assert relative(first[kind], single[kind]) < SAME
    # Every process's tokens are in the check that the statistics add up to the (averaged) gradients.
    assert first["completeness"] < 1e-3
    assert_same_ledgers(single, first, second)


@pytest.mark.slow
def test_two_sharded_processes_are_one(single: Any, tmp_path: Path, relative: Any) -> None:
    """Oracle f under FSDP2: the base is sharded, adapters are whole, and their gradients are averaged once per step,
    whatever the accumulation. A run that continues from a checkpoint ends with the same bits."""
    first, second = run(tmp_path, 2, "fsdp2")
    assert len(first["sharded"]) == 12
    assert not any("lora_" in name for name in first["sharded"])
    # 2 layers' adapters of rank 4, and a note per tensor that there is a gradient.
    assert first["sent"].count(4 * (32 + 32 + 48 + 32) + 4) == 6
    for kind in ("factors", "adapters"):
        assert torch.equal(first[kind], second[kind])
        assert relative(first[kind], single[kind]) < SAME
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert torch.equal(first["resumed"], first["adapters"])
    assert_same_ledgers(single, first, second)


@pytest.mark.slow
def test_one_all_reduce_per_inversion(tmp_path: Path, relative: Any) -> None:
    """Oracle: torch's profiler. With factors that are read at inversions (steps 3 and 6), and before the checkpoint of
    step 4, L = 2 layers of rank 4 send 2 L r^2 + 3 L floats each time, and the completeness check L (r^2 + 2) once.
    Losses, factors and adapters are the single process's."""
    (alone,) = run(tmp_path, 1, "sparse")
    both = run(tmp_path, 2, "sparse")
    for process in both:
        # Everything else is the averaged gradients of DDP, in one bucket per step, and the loop's own single numbers.
        assert [n for n in process["sent"] if n == 2 * 2 * 4**2 + 3 * 2] == [70] * 3
        assert process["sent"].count(2 * (4**2 + 2)) == 1
        for kind in ("factors", "adapters"):
            assert relative(process[kind], alone[kind]) < SAME
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-3)


@pytest.mark.slow
def test_unreduced_statistics_would_be_seen(single: Any, tmp_path: Path, relative: Any) -> None:
    """Released fault 7, planted: without the all-reduce every process goes its own way, and none the right one."""
    first, second = run(tmp_path, 2, "no-all-reduce")
    assert relative(first["factors"], second["factors"]) > DIFFERENT
    assert relative(first["adapters"], second["adapters"]) > DIFFERENT
    assert relative(first["adapters"], single["adapters"]) > DIFFERENT


REFUSED = {
    "DeepSpeed": {"distributed_type": SimpleNamespace(value="DEEPSPEED")},
    "Megatron-LM": {"distributed_type": SimpleNamespace(value="MEGATRON_LM")},
    "FSDP1": {"fsdp_plugin": SimpleNamespace(fsdp_version=1)},
    "TP": {"parallelism_config": SimpleNamespace(tp_enabled=True)},
    "cpu_ram_efficient_loading": {"fsdp_plugin": SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True)},
}


def test_what_is_trained_is_left_out_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback among the trainer's tells accelerate so before the model is prepared; what was left out stays so."""
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False, ignored_modules=r".*\.base_layer")
    monkeypatch.setattr(engines, "_accelerate", {"fsdp_plugin": plugin}.get)
    model, args = tiny(), SimpleNamespace(n_gpu=1, device="cpu")
    GRITCallback().on_init_end(args, None, None, model=model)  # type: ignore[arg-type]
    names = {id(module): name.removeprefix("base_model.model.") for name, module in model.named_modules()}
    left = [names[id(module)] for module in plugin.ignored_modules]
    assert left[:2] == ["0.base_layer", "1.base_layer"]
    assert left[2:] == [f"{i}.lora_{side}.default" for i in "01" for side in "AB"]


@pytest.mark.parametrize("named", REFUSED)
def test_engine_is_refused_by_name(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what accelerate says that it was set up with."""
    monkeypatch.setattr(engines, "_accelerate", REFUSED[named].get)
    with pytest.raises(GRITError, match=f"{named}.*(use DDP|set it to false)") as refused:
        engines.keep_whole(tiny(), SimpleNamespace(n_gpu=1))
    assert "\n" not in str(refused.value)


def test_several_gpus_in_one_process_are_refused() -> None:
    """A model that `torch.nn.DataParallel` would copy, or that `device_map` has spread."""
    with pytest.raises(GRITError, match=r"DataParallel .* sees 2 GPUs"):
        engines.keep_whole(tiny(), SimpleNamespace(n_gpu=2))
    spread = tiny()
    spread.base_model.model[1].to("meta")
    with pytest.raises(GRITError, match="one device; found cpu, meta"):
        GRITManager(spread)


def tiny() -> Any:
    """Two linear layers with adapters."""
    return get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0", "1"]))


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def _flatten(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def _split(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(model.base_model.model[0].base_layer, init_device_mesh("cpu", (1,)), ColwiseParallel())
    return model


@pytest.mark.parametrize("first", ["engine", "GRIT"])
@pytest.mark.parametrize(
    ("how", "named"), [(_shard, r"sharded.*ignored_params"), (_flatten, "FSDP1"), (_split, "tensor parallel")]
)
def test_what_no_process_has_whole_is_refused(how: Any, named: str, first: str, group: None) -> None:
    """Oracle: torch's own engines, in a loop without accelerate, before anything has moved."""
    model = tiny()
    manager = GRITManager(model, GRITConfig())
    manager.loss_tokens = 1
    if first == "GRIT":
        manager.attach()
    engine = how(model)
    before = [p.detach().clone() for p in model.parameters()]

    def step() -> None:
        manager.attach()
        engine(torch.ones(1, 8)).sum().backward()
        manager.before_step(model.parameters(), None)

    with pytest.raises(GRITError, match=named):
        step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_parts_of_deepspeed_are_refused(mark: str) -> None:
    """In a loop around DeepSpeed's own engine, by what it writes on parameters: stage 3, and stages 1 and 2."""
    named = r"DeepSpeed ZeRO, which has 1 in parts: use DDP"
    manager = GRITManager(tiny()).attach()
    setattr(manager.layers[1].b, mark, object())
    with pytest.raises(GRITError, match=named):
        manager.before_step(manager.model.parameters(), None)
    manager.detach()
    with pytest.raises(GRITError, match=named):
        manager.attach()


def _stage(rank: int, folder: Path, layers: list[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        engines.require_same_layers(layers)
        found = "the same"
    except GRITError as error:
        found = str(error)
    (folder / str(rank)).write_text(found)


@pytest.mark.parametrize("same", [True, False])
def test_stages_of_a_pipeline_are_refused(same: bool, tmp_path: Path) -> None:
    """Sums of different layers must not be added; both processes say so, and neither waits for the other."""
    fork, processes = get_context("fork"), []
    for rank in range(2):
        layers = [SimpleNamespace(path=f"layers.{rank * (not same)}", adapter="a", rank=4, a=torch.zeros(1))]
        processes.append(fork.Process(target=_stage, args=(rank, tmp_path, layers)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        found = (tmp_path / str(rank)).read_text()
        assert (found == "the same") is same
        assert same or "same LoRA layers" in found

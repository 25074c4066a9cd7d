"""Mutation check of the code that decides: what share of small errors planted in it do its tests notice?

    python tests/mutants.py --sample 300 --seed 1        (or: make mutants)

cosmic-ray lists the mutants of each module (in a copy: the working tree is never touched), a seeded random sample of
them is run against the module's own fast tests, and survivors are printed as diffs. Mutants of annotations are left
out: under `from __future__ import annotations` no annotation is ever evaluated, so none of them can be noticed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

from grit_impl.statistics.intervals import wilson

ROOT = Path(__file__).parents[1]
IMPL, TESTS = Path("grit_impl"), Path("tests")
STATISTICS = [TESTS / "statistics/test_statistics.py", TESTS / "statistics/test_statistics_exact.py"]
# What decides, and the tests that are answerable for it.
MODULES = {
    **dict.fromkeys((IMPL / f"statistics/{name}.py" for name in ("intervals", "paired", "series")), STATISTICS),
    IMPL / "statistics/decision.py": [TESTS / "verify/test_claims.py"],
    IMPL / "curves/noise.py": [TESTS / "curves/test_curves.py", TESTS / "curves/test_curves_exact.py"],
    IMPL / "ledger/verdict.py": [TESTS / "ledger/test_chain.py"],
    IMPL / "ledger/chain/arrival.py": [TESTS / "ledger/test_chain.py"],
    IMPL / "ledger/chain/change.py": [TESTS / "ledger/test_chain.py"],
    IMPL / "ledger/chain/effect.py": [TESTS / "ledger/test_chain.py"],
    IMPL / "ledger/findings.py": [TESTS / "ledger/test_chain.py"],
    IMPL / "verify/claims/base.py": [TESTS / "verify/test_claims.py"],
}
COPIED = ("grit_impl", "tests", "fixtures", "conftest.py", "pyproject.toml")
SECONDS = 20.0
"""A mutant that takes longer loops forever: noticed."""


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations stand: (line, column) of beginning and end."""
    places = []
    for node in ast.walk(ast.parse(source)):
        found = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if found is not None:
            places.append(((found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)))
    return places


def mutants(module: Path, folder: Path) -> Iterator[tuple[str, MutationSpec]]:
    """All mutants of a module outside annotations, by an id that does not change from run to run."""
    config = folder / f"{module.stem}.toml"
    tests = " ".join(map(str, MODULES[module]))
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -p grit_impl.verify.plugin {tests}"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {SECONDS}\nexcluded-modules = []\n'
        f'test-command = "{command}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    _cosmic_ray(folder, "init", config.name, f"{module.stem}.sqlite")
    skipped = annotations((folder / module).read_text())
    with use_db(str(folder / f"{module.stem}.sqlite"), WorkDB.Mode.open) as database:
        for item in database.work_items:
            (spec,) = item.mutations
            if not any(begin <= spec.start_pos < end for begin, end in skipped):
                yield item.job_id, spec


def _cosmic_ray(folder: Path, *arguments: str) -> None:
    # Byte code is recognised by second and size, both of which a mutant shares with the file before it.
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    program = Path(sys.executable).with_name("cosmic-ray")
    subprocess.run([program, *arguments], cwd=folder, env=environment, check=True)


def run(module: Path, chosen: set[str], folder: Path) -> list[str]:
    """Run the chosen mutants of a module; returns the survivors as diffs."""
    session = f"{module.stem}.sqlite"
    with use_db(str(folder / session), WorkDB.Mode.open) as database:
        for item in list(database.work_items):
            if item.job_id not in chosen:
                database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    _cosmic_ray(folder, "baseline", f"{module.stem}.toml")
    _cosmic_ray(folder, "exec", f"{module.stem}.toml", session)
    with use_db(str(folder / session), WorkDB.Mode.open) as database:
        results = [result for _, result in database.results if result.worker_outcome is not WorkerOutcome.SKIPPED]
    if len(results) != len(chosen):
        raise RuntimeError(f"{module}: {len(results)} of {len(chosen)} mutants were run")
    return [result.diff or "" for result in results if result.test_outcome is TestOutcome.SURVIVED]


def main() -> int:
    """Print the share per module and in all; status 1 if it is below the asked one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300, help="mutants to run (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--least", type=float, default=85.0, help="percent that must be noticed (default: 85)")
    parser.add_argument("--only", default="", help="modules whose path contains this")
    parser.add_argument("--out", type=Path, help="JSON file of the counts and survivors")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in COPIED:
            copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
            ignore = {"ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / each).is_dir() else {}
            copy(ROOT / each, folder / each, **ignore)
        modules = [module for module in MODULES if options.only in str(module)]
        everything = [(module, job, spec) for module in modules for job, spec in mutants(module, folder)]
        order = sorted(everything, key=lambda row: (str(row[0]), row[2].operator_name, row[2].occurrence, str(row[2])))
        sample = random.Random(options.seed).sample(order, min(options.sample, len(order)))
        survivors: list[str] = []
        counts = {}
        for module in modules:
            chosen = {job for place, job, _ in sample if place == module}
            found = run(module, chosen, folder) if chosen else []
            survivors += found
            total = sum(place == module for place, _, _ in order)
            counts[str(module)] = {"mutants": total, "run": len(chosen), "noticed": len(chosen) - len(found)}
            print(f"{module}: {len(chosen) - len(found)} of {len(chosen)} noticed (of {total})", flush=True)
    share = wilson(len(sample) - len(survivors), len(sample)).scaled(100)
    print(*survivors, sep="\n")
    text = f"{len(sample) - len(survivors)} of {len(sample)} mutants noticed: {share.estimate:.1f}%"
    print(f"{text} [{share.low:.1f}, {share.high:.1f}] (seed {options.seed}, of {len(order)})")
    if options.out:
        result = {"seed": options.seed, "modules": counts, "percent": share.to_dict(), "survivors": survivors}
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return int(share.estimate < options.least)


if __name__ == "__main__":
    sys.exit(main())

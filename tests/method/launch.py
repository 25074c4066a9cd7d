"""One script in several processes that find each other, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import grit_impl

PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(script: Path, arguments: list[list[str]], **environment: str) -> None:
    """Run the script once per list of arguments, all at the same time; a single process is told of no others.

    Raises:
        AssertionError: a process ended with another status than 0; with what all of them printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world, processes = len(arguments), []
    common = {
        **{key: value for key, value in os.environ.items() if key not in PLACES},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(grit_impl.__file__).parents[1]), *sys.path]),
        **environment,
    }
    for rank, given in enumerate(arguments):
        places = dict(zip(PLACES, (str(rank), str(rank), str(world), "127.0.0.1", port), strict=True))
        own = {**common, **(places if world > 1 else {})}
        command = [sys.executable, str(script), *given]
        processes.append(
            subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, outputs

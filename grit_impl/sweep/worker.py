"""Loaded once by the server that a sweep's processes are forked from: the imports that all of them need.

Nothing here may start a thread or touch the GPU: neither survives a fork.
"""

import importlib
import sys
import warnings

# bitsandbytes asks the GPU what it can do when it is imported, and peft imports it where it is installed.
sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
# peft still uses names that transformers 5 renamed: once per run would bury what matters.
warnings.filterwarnings("ignore", category=FutureWarning)
for _name in (
    "peft.optimizers",
    "transformers.models.llama.modeling_llama",
    "grit_impl.method.manager",
    "grit_impl.method.optimizer",
    "grit_impl.sweep.run",
):
    importlib.import_module(_name)

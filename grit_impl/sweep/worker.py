"""Loaded once by the server that a sweep's processes are forked from: the imports that all of them need.

Nothing here may start a thread or touch the GPU: neither survives a fork.
"""

import warnings

import peft.optimizers  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import grit_impl.manager
import grit_impl.optim
import grit_impl.sweep.run  # noqa: F401

# peft still uses names that transformers 5 renamed: once per run would bury what matters.
warnings.filterwarnings("ignore", category=FutureWarning)

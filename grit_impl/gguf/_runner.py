"""Child process that runs llama.cpp's server: settings as JSON on the first line of stdin, its address on stdout.

A process of its own, as in Ollama: an assertion inside llama.cpp then ends one model, not the test session. It ends
when stdin closes, so that it cannot outlive its parent, however the parent dies.
"""

import contextlib
import json
import os
import signal
import sys
import time


def main() -> None:
    """Load the model, report the address, wait for the end of stdin."""
    # ctrl-C reaches the whole process group; ending this process is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp  # type: ignore[import-untyped]

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context"] * settings["parallel"]
    params.n_batch = settings["batch"]
    params.n_ubatch = min(settings["batch"], 512)
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = settings["threads"]
        # Spinning at ggml's barriers starves everything else on a small machine.
        cpu.poll = 0
    params.n_gpu_layers = settings["gpu_layers"]
    params.api_keys = [settings["key"]]
    params.ctx_shift = True
    params.cache_ram_mib = 0
    params.warmup = params.ui = params.fit_params = False
    params.verbosity = 1
    # A connection occupies a thread for as long as it is kept.
    params.n_threads_http = settings["parallel"] + 5
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type[f"GGML_TYPE_{settings['cache'].upper()}"]
    if settings["flash"] is not None:
        word = "ENABLED" if settings["flash"] else "DISABLED"
        params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{word}"]
    if settings["adapter"]:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = settings["adapter"], 1.0
        params.lora_adapters = [lora]
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        reply.write(json.dumps({"error": str(error)}) + "\n")
        reply.flush()
        # llama.cpp writes its log, and with it the reason, from a thread of its own.
        time.sleep(0.3)
        os._exit(1)
    reply.write(json.dumps({"url": server.listening_address}) + "\n")
    reply.flush()
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    # The operating system frees everything; llama.cpp's own shutdown waits for running requests.
    os._exit(0)


if __name__ == "__main__":
    main()

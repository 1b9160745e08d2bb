"""One engine in a process of its own, driven by peers.py: requests as JSON lines on stdin, answers as JSON lines on stdout.

    python peer_worker.py pyengine  MODEL.safetensors [n_threads]
    python peer_worker.py llama.cpp MODEL.gguf        [n_threads]
    python peer_worker.py ik_llama.cpp MODEL.gguf     [n_threads]
    python peer_worker.py openvino  MODEL_DIRECTORY   [n_threads]
    python peer_worker.py float32   MODEL.gguf        [n_threads]      (or a Hugging Face directory)

    {"do": "prefill", "n": 512}                                   -> {"value": tokens per second}
    {"do": "decode", "n": 64, "depth": 8, "batch": 1}             -> {"value": tokens per second of all sequences}
    {"do": "read"} and {"do": "int8"}, pyengine only              -> {"value": decode and prefill tokens/s at the machine's limit}
    {"do": "tokenize", "text": ..., "n": 512}, pyengine only      -> {"value": the first n token ids}
    {"do": "logits", "ids": [...], "path": "x.npy"}               -> {"value": seconds}; the file is (n, vocab_size) float32
    {"do": "info"}                                                -> {"version": ..., ...}

Prompts are token ids without meaning: only speed is looked at. Prefill is n tokens in one call, logits of the last; decode is
n tokens one after the other, logits of each, after `depth` tokens that are not measured. Neither samples, except in OpenVINO
GenAI, whose pipelines are its only interface (it takes the most probable token). The float32 peer is transformers; it only
gives logits.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

MAX_CONTEXT = 8448  # 8,192 and some
STRIDE = 7919  # a prime: tokens that walk all over the vocabulary


def tokens(n: int, vocab_size: int = 40_000) -> list[int]:
    return [10 + STRIDE * i % (vocab_size - 10) for i in range(n)]


class Peer(Protocol):
    """Those whose speed is measured have, besides, prefill(n) and decode(n, depth, batch): tokens per second."""

    def info(self) -> dict[str, Any]: ...
    def logits(self, ids: list[int], path: str) -> float: ...


class PyEngine:
    """Through its context: the same calls that generation makes."""

    def __init__(self, path: str, n_threads: int | None) -> None:
        import pyengine
        from pyengine.cli.roofline import Roofline

        self.engine = pyengine.Engine(path, n_threads=n_threads)
        self.version = pyengine.__version__
        self.roofline = Roofline(self.engine)
        self.context = self.engine.context
        self.tokens = tokens(MAX_CONTEXT, self.engine.vocab_size)
        self.filled: list[int] = []  # sequences that decode goes on from
        self.filled_depth = 0

    def info(self) -> dict[str, Any]:
        from pyengine import _core

        return {
            "version": self.version,
            "isa": self.engine.isa,
            "n_threads": self.engine.n_threads,
            "weight_bytes": self.roofline.weights.nbytes,
            "cpu_features": _core.cpu_features(),
            "thread_info": _core.thread_info(),
            "n_ctx": self.engine.n_ctx,
        }

    def prefill(self, n: int) -> float:
        sequence = self.context.sequence_new()
        started = time.perf_counter()
        self.context.forward(self.tokens[:n], [sequence] * n, bytes(n - 1) + b"\1")
        elapsed = time.perf_counter() - started
        return n / elapsed

    def _fill(self, depth: int, batch: int) -> None:
        """`batch` sequences of `depth` tokens; kept from one repetition to the next."""
        if (len(self.filled), self.filled_depth) == (batch, depth):
            for sequence in self.filled:
                sequence.truncate(depth)
            return
        self.filled, self.filled_depth = [self.context.sequence_new() for _ in range(batch)], depth
        for sequence in self.filled:
            self.context.forward(self.tokens[:depth], [sequence] * depth, bytes(depth))

    def decode(self, n: int, depth: int, batch: int) -> float:
        self._fill(depth, batch)
        want = b"\1" * batch
        started = time.perf_counter()
        for token in self.tokens[depth : depth + n]:
            self.context.forward([token] * batch, self.filled, want)
        return n * batch / (time.perf_counter() - started)

    def tokenize(self, text: str, n: int) -> list[int]:
        return [int(token) for token in self.engine.tokenize(text, add_bos=False)[:n]]

    def logits(self, ids: list[int], path: str) -> float:
        import numpy as np

        started = time.perf_counter()
        np.save(path, np.asarray(self.engine.logits(ids)))
        return time.perf_counter() - started

    def read(self) -> float:
        """Tokens per second of a decode that did nothing but read its weights."""
        return self.roofline.read_bandwidth() / self.roofline.weights.nbytes

    def int8(self) -> float:
        """Tokens per second of a prefill whose products ran at the int8 peak."""
        from pyengine.cli.roofline import Work

        bound = self.roofline.bound(Work(512, 1), "int8")
        if bound.limit != "int8":
            raise ValueError(f"no int8 probe of {self.engine.isa}")
        return bound.tokens_per_second


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C functions."""

    def __init__(self, path: str, n_threads: int | None) -> None:
        import llama_cpp

        self.lib = lib = llama_cpp
        lib.llama_log_set(SILENT := lib.llama_log_callback(lambda *_: None), None)
        self.silent = SILENT  # C holds a pointer to it
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise FileNotFoundError(path)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = MAX_CONTEXT, 512, 512, 32
        params.kv_unified = True
        if n_threads:
            params.n_threads = params.n_threads_batch = n_threads
        self.n_threads = n_threads
        self.context = lib.llama_init_from_model(self.model, params)
        self.batch = lib.llama_batch_init(512, 0, 1)
        self.tokens = tokens(MAX_CONTEXT)
        self.filled = (0, 0)

    def info(self) -> dict[str, Any]:
        system = self.lib.llama_print_system_info().decode()
        return {"version": self.lib.__version__, "n_threads": self.n_threads, "system_info": system}

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _truncate(self, sequence: int, depth: int) -> None:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), sequence, depth, -1)

    def _synchronize(self) -> None:
        self.lib.llama_synchronize(self.context)

    def _forward(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: token, position, sequence, whether its logits are wanted; at most 512."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if (code := self.lib.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode: {code}")
        self._synchronize()

    def _prompt(self, n: int, sequence: int, last_wanted: bool) -> None:
        for begin in range(0, n, 512):
            end = min(begin + 512, n)
            self._forward([(self.tokens[i], i, sequence, last_wanted and i == n - 1) for i in range(begin, end)])

    def logits(self, ids: list[int], path: str) -> float:
        import numpy as np

        self._clear()
        self.filled = (0, 0)
        n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        out = np.empty((len(ids), n_vocab), np.float32)
        started = time.perf_counter()
        for begin in range(0, len(ids), 512):
            end = min(begin + 512, len(ids))
            self._forward([(ids[i], i, 0, True) for i in range(begin, end)])
            for i in range(begin, end):
                row = self.lib.llama_get_logits_ith(self.context, i - begin)
                out[i] = np.ctypeslib.as_array(row, (n_vocab,))
        elapsed = time.perf_counter() - started
        np.save(path, out)
        return elapsed

    def prefill(self, n: int) -> float:
        self._clear()
        self.filled = (0, 0)
        started = time.perf_counter()
        self._prompt(n, 0, True)
        return n / (time.perf_counter() - started)

    def decode(self, n: int, depth: int, batch: int) -> float:
        if self.filled == (depth, batch):
            for sequence in range(batch):
                self._truncate(sequence, depth)
        else:
            self._clear()
            for sequence in range(batch):
                self._prompt(depth, sequence, False)
            self.filled = (depth, batch)
        started = time.perf_counter()
        for i in range(depth, depth + n):
            self._forward([(self.tokens[i], i, sequence, True) for sequence in range(batch)])
        return n * batch / (time.perf_counter() - started)


class IkContext(LlamaCpp):
    """One context of ik_llama.cpp, through the ctypes bindings of ik-llama-cpp-python."""

    def __init__(self, lib: Any, model: Any, n_threads: int | None, flash_attention: bool) -> None:
        self.lib, self.model, self.n_threads = lib, model, n_threads
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = MAX_CONTEXT, 512, 512, 32
        params.flash_attn = flash_attention
        if n_threads:
            params.n_threads = params.n_threads_batch = n_threads
        self.context = lib.llama_init_from_model(model, params)
        self.batch = lib.llama_batch_init(512, 0, 1)
        self.tokens = tokens(MAX_CONTEXT)
        self.filled = (0, 0)

    def _clear(self) -> None:
        self.lib.llama_kv_cache_clear(self.context)

    def _truncate(self, sequence: int, depth: int) -> None:
        import ctypes

        remove = self.lib._lib.llama_kv_cache_seq_rm  # which the bindings do not declare
        remove.argtypes, remove.restype = [ctypes.c_void_p, *[ctypes.c_int32] * 3], ctypes.c_bool
        remove(self.context, sequence, depth, -1)

    def _synchronize(self) -> None:
        self.lib.llama_get_logits_ith(self.context, -1)


class IkLlamaCpp:
    """ik_llama.cpp with its weights repacked; each speed is the better of those with flash attention and without."""

    def __init__(self, path: str, n_threads: int | None) -> None:
        from importlib.metadata import version

        from ik_llama_cpp import _ctypes_api as lib

        self.version = version("ik-llama-cpp-python")
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.use_mmap, params.repack_tensors = False, True
        model = lib.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise FileNotFoundError(path)
        self.contexts = [IkContext(lib, model, n_threads, flash_attention) for flash_attention in (False, True)]

    def info(self) -> dict[str, Any]:
        return {"version": self.version, "n_threads": self.contexts[0].n_threads}

    def prefill(self, n: int) -> float:
        return max(context.prefill(n) for context in self.contexts)

    def decode(self, n: int, depth: int, batch: int) -> float:
        return max(context.decode(n, depth, batch) for context in self.contexts)

    def logits(self, ids: list[int], path: str) -> float:
        return self.contexts[0].logits(ids, path)


class Float32:
    """The source's weights in transformers: what the others' logits are compared with."""

    def __init__(self, path: str, n_threads: int | None) -> None:
        from pathlib import Path

        import torch
        import transformers
        from quality import float32_logits, load_float32

        if n_threads:
            torch.set_num_threads(n_threads)
        self.version = transformers.__version__
        self.compute = float32_logits(load_float32(Path(path)))

    def info(self) -> dict[str, Any]:
        return {"version": self.version}

    def logits(self, ids: list[int], path: str) -> float:
        import numpy as np

        started = time.perf_counter()
        np.save(path, self.compute(np.array(ids)))
        return time.perf_counter() - started


class OpenVINO:
    """OpenVINO GenAI: its plain pipeline for one sequence, its continuous batching for several."""

    def __init__(self, path: str, n_threads: int | None) -> None:
        import openvino
        import openvino_genai

        self.openvino, self.genai, self.path = openvino, openvino_genai, path
        self.properties = {"INFERENCE_NUM_THREADS": n_threads} if n_threads else {}
        self.batched: bool | None = None
        self.n_calls = 0  # every prompt begins differently: the pipelines remember beginnings

    def info(self) -> dict[str, Any]:
        return {"version": self.genai.__version__, "n_threads": self.properties.get("INFERENCE_NUM_THREADS")}

    def _pipeline(self, batched: bool) -> Any:
        if self.batched != batched:
            self.pipeline: Any = None  # the one before goes first: there is memory for one
            properties = dict(self.properties)
            if batched:
                scheduler = self.genai.SchedulerConfig()
                scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 2, 64, 2048
                properties["scheduler_config"] = scheduler
            self.pipeline = self.genai.LLMPipeline(self.path, "CPU", **properties)
            self.batched = batched
        return self.pipeline

    def _config(self, n: int) -> Any:
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = n
        config.do_sample, config.ignore_eos = False, True
        return config

    def _metrics(self, n_prompt: int, n: int) -> Any:
        import numpy as np

        self.n_calls += 1
        ids = self.openvino.Tensor(np.array([tokens(n_prompt + self.n_calls)[self.n_calls :]], dtype=np.int64))
        return self._pipeline(False).generate(ids, self._config(n)).perf_metrics

    def prefill(self, n: int) -> float:
        return n * 1e3 / float(self._metrics(n, 2).get_ttft().mean)

    def decode(self, n: int, depth: int, batch: int) -> float:
        if batch == 1:
            return 1e3 / float(self._metrics(depth, n + 1).get_tpot().mean)
        pipeline = self._pipeline(True)
        self.n_calls += 1
        prompts = [f"{self.n_calls}, {i}: the story is about" for i in range(batch)]
        started = time.perf_counter()
        pipeline.generate(prompts, self._config(n))
        return n * batch / (time.perf_counter() - started)

    def logits(self, ids: list[int], path: str) -> float:
        """Of the model itself: the pipelines give none."""
        import numpy as np

        self.pipeline, self.batched = None, None
        compiled = self.openvino.Core().compile_model(f"{self.path}/openvino_model.xml", "CPU", self.properties)
        n = len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, n), np.int64),
            "position_ids": np.arange(n, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        wanted = {name for port in compiled.inputs for name in port.names}
        request = compiled.create_infer_request()
        started = time.perf_counter()
        request.infer({name: values for name, values in inputs.items() if name in wanted})
        elapsed = time.perf_counter() - started
        np.save(path, request.get_tensor("logits").data[0])
        return elapsed


PEERS = {
    "pyengine": PyEngine,
    "llama.cpp": LlamaCpp,
    "ik_llama.cpp": IkLlamaCpp,
    "openvino": OpenVINO,
    "float32": Float32,
}


def main() -> int:
    name, path = sys.argv[1:3]
    n_threads = int(sys.argv[3]) if len(sys.argv) > 3 else None
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not come between the answers
    os.dup2(2, 1)
    peer: Peer = PEERS[name](path, n_threads)
    print(json.dumps(peer.info()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer: dict[str, Any] = {"value": getattr(peer, do)(**request)}
        except Exception as error:  # one case that a peer cannot do must not end the run
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

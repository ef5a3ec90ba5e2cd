"""What every result of a speed script says about itself, and the clock, the memory and the random vectors that the scripts share. Running it does nothing."""

import argparse
import ctypes
import json
import multiprocessing
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np


INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # that decide how fast products of matrices are


def machine() -> dict:
    "The processor and what it can do: its name alone is often no more than a brand."
    import torch

    from hybrid_ir.encoders import has_fast_bf16
    from hybrid_ir.experiment import processor_name

    found = torch.cpu.get_capabilities()
    return {
        "processor": processor_name(), "instructions": [name for name in INSTRUCTIONS if found.get(name)], "bf16 in hardware": has_fast_bf16(torch.device("cpu")),
        "threads": torch.get_num_threads(), "system": platform.system(),
    }  # fmt: skip


def fast_precisions() -> list[str]:
    "The precisions of encoding that this processor multiplies in hardware, the highest first."
    import torch

    from hybrid_ir.encoders import has_fast_bf16, has_fast_int8

    return ["fp32", *(name for name, has in (("bf16", has_fast_bf16), ("int8", has_fast_int8)) if has(torch.device("cpu")))]


def option_words(name: str, value) -> str:
    "An option as it is written in a command; nothing for one that is not set."
    if value in (False, "", None):
        return ""
    return f"--{name.replace('_', '-')} {'' if value is True else ' '.join(map(str, value)) if isinstance(value, list) else value}".strip()


def entries(script: str, packages: list[str], options: argparse.Namespace, leave_out: tuple[str, ...] = ("folder", "keep", "into")) -> dict:
    "Machine, versions and command of a measurement; places on this machine are left out of the command."
    words = [option_words(name, value) for name, value in vars(options).items() if name not in leave_out]
    return {"machine": machine(), "versions": {name: version(name) for name in [*packages, "hybrid_ir"]}, "command": " ".join([f"python speed/{Path(script).name}", *filter(None, words)])}


def compared(work: str, unit: str, ours: float, name: str, peer: float) -> dict:
    "A measurement beside that of a peer. The ratio says how many times as good ours is: of what comes per second the more is better, of time and memory the less."
    ratio = ours / peer if unit.endswith("per second") else peer / ours
    return {"work": work, "unit": unit, "ours": float(f"{ours:.4g}"), "peer": float(f"{peer:.4g}"), "name of the peer": name, "ratio": round(ratio, 2)}


def write_result(script: str, result: dict, name: str = "", by_precision: bool = False):
    "Write speed/results/<name, or that of the script>.json and print it. `by_precision`: processors without bf16, and those that multiply blocks of it (AMX), have files of their own."
    from hybrid_ir.sources import write_json

    assert result.keys() >= {"comparisons", "machine", "versions", "command"}
    blocks, half = "amx_bf16" in result["machine"]["instructions"], result["machine"]["bf16 in hardware"]
    other = ("_with_amx" if blocks else "" if half else "_without_bf16") * by_precision
    target = Path(script).resolve().parent / "results" / f"{name or Path(script).stem}{other}.json"
    target.parent.mkdir(exist_ok=True)
    write_json(target, result)
    print(json.dumps(result, indent=1, ensure_ascii=False))


def unit_vectors(n: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    "Random float32 [n, dim] of length 1."
    vectors = rng.standard_normal((n, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def memory(name: str = "VmHWM") -> float:
    "GiB of resident memory of this process: VmRSS now, VmHWM the most so far, RssAnon now without mapped files."
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def forget_peak():
    "Give free memory back, and let VmHWM start again from what is resident now (Linux)."
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def watched(function, arguments: tuple) -> dict:
    "Call a function; its seconds, those of the processor, and the memory of the process at its highest. What it returns, if anything, is added."
    import hybrid_ir.index  # noqa: F401  the libraries are loaded before the clock starts

    started, cpu_started = time.perf_counter(), time.process_time()
    found = function(*arguments)
    return {"seconds": round(time.perf_counter() - started, 2), "cpu seconds": round(time.process_time() - cpu_started, 2), "peak_memory_gib": round(memory(), 2)} | (found or {})


def measure(function, *arguments, start: str = "spawn") -> dict:
    "The same in a process of its own, so that its memory is its own; `fork`: with everything that is loaded here."
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
        found = pool.submit(watched, function, arguments).result()
    print(f"{function.__name__}{arguments[1:] if len(str(arguments[1:])) < 60 else ''}: {found}", flush=True)
    return found

"""The main job as this code does it, beside an earlier commit of it: processor time, memory and results.

    python speed/earlier.py [--commit f90f514]

Both train `me5-small-q4` with hybrid batches on the sample and evaluate it, as `make run` does, each in a process with an empty cache, one thread, alternating; the fastest round counts.
The precision is that of the hardware, bf16 or fp32. The earlier code is checked out into a temporary folder. Writes speed/results/earlier.json, or, on a processor with AMX or without bf16, a file with that in its name.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _entries import compared, entries, write_result

from hybrid_ir.encoders import choose_precision

ROOT = Path(__file__).resolve().parent.parent
JOB = """
import json, resource, sys, time
from hybrid_ir.experiment import RunConfig, run
config = RunConfig(sampler="hybrid", languages=tuple("ar de en es hi ru th tr zh".split()), batch_size=32, steps=int(sys.argv[2]), learning_rate=3e-5, temperature=0.02,
                   query_length=32, passage_length=64, dropout=0.0, validate_every=20, checkpoint_every=20, precision=sys.argv[1])
started = time.process_time()
result = run(config, "reports", progress=False)
spent, scores = time.process_time() - started, result.after["sample"].summary()["map"]
print(json.dumps({"seconds": spent, "peak memory, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "pairs per second": result.metrics["training"]["pairs_per_second"],
                  "loss at the end": result.metrics["training"]["best_validation_loss"], **{f"mAP, {task}": float(value) for task, value in scores.items()}}))
"""


def main_job(source: Path, precision: str, steps: int) -> dict:
    "What the main job of the code in a folder takes and gives."
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(source), "HYBRID_IR_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", JOB, precision, str(steps)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="f90f514", help="the earlier code: the first commit of the main job")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    precision, runs = choose_precision("auto"), {}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(earlier), options.commit], cwd=ROOT, check=True)
        try:
            for _ in range(options.rounds):
                for name, source in (("earlier", earlier), ("now", ROOT)):
                    runs.setdefault(name, []).append(main_job(source, precision, options.steps))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(earlier)], cwd=ROOT, check=True)
    best = {name: min(found, key=lambda job: job["seconds"]) for name, found in runs.items()}
    results = {
        "unit": "seconds of one processor",
        "comparisons": [compared(f"the main job in {precision}", "seconds", best["now"]["seconds"], f"commit {options.commit}", best["earlier"]["seconds"])],
        "runs": [{"code": name, "precision": precision, **{what: round(value, 4) for what, value in job.items()}} for name, job in best.items()],
    }  # fmt: skip
    write_result(__file__, results | entries(__file__, ["torch", "transformers"], options), by_precision=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

"""What the continuation protocol costs on a CPU: sampling, choosing, scoring, by how many continuations are decoded together.

    python benchmarks/continuations.py

The embedded model continues prompts of the examples, 25 samples each at top-p 0.9. Times are CPU seconds of one thread, so
that a busy machine changes them little. Figures go to `benchmarks/results/continuations.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import registry
from models.lm.choose import choose
from models.protocols import GenerationRequest, Sampling

HERE = Path(__file__).resolve().parent
SAMPLES = 25


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new-tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = (HERE.parent / "examples" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    model: Any = registry.load("lm", "smollm2", threads=1, device="cpu")
    judge = registry.load("scorer", "jigsaw-bilstm", threads=1)

    def sample(count: int, tokens: int) -> list[list[str]]:
        sampling = Sampling(
            (1.0,), SAMPLES, top_p=0.9, top_k=0, repetition_penalty=1.0, max_new_tokens=tokens
        )
        requests = [GenerationRequest((), 100 + i, prefill=p) for i, p in enumerate(prompts[:count])]
        return [[c.text for c in g.candidates] for g in model.generate(requests, sampling)]

    sampling: dict[str, float] = {}
    for count in (1, 2, 3, 5):
        model.batch_rows = count * SAMPLES
        model._rows_by_length = False
        sample(count, 2)  # kernels for this number of rows are made once
        seconds = best(lambda n=count: sample(n, given.new_tokens), given.repeats)  # type: ignore[misc]
        sampling[str(count * SAMPLES)] = round(count * SAMPLES * given.new_tokens / seconds, 1)
        print(f"{count * SAMPLES} rows: {sampling[str(count * SAMPLES)]} tokens a CPU second", flush=True)
    texts = sample(1, given.new_tokens)[0]
    scores = model.next_token_logits(prompts[:5]).repeat(SAMPLES, axis=0)
    rows, draws = torch.from_numpy(scores), torch.rand(len(scores), dtype=torch.float64)
    ones, total = torch.ones(len(scores)), torch.logsumexp(rows, -1)
    figures = {
        "model": model.info.tag,
        "dtype": model.info.extra["dtype"],
        "processor": platform.machine(),
        "new_tokens": given.new_tokens,
        "tokens_per_cpu_second_by_rows": sampling,
        "choose_125_rows_ms": ms(lambda: choose(rows, ones, draws, 0, 0.9, total), given.repeats),
        "full_sort_125_rows_ms": ms(lambda: rows.sort(dim=-1, descending=True, stable=True), given.repeats),
        "step_125_rows_ms": round(125_000 / sampling["125"], 1),
        "fluency_25_together_ms": ms(lambda: model.score_continuations(prompts[0], texts), given.repeats),
        "fluency_25_one_by_one_ms": ms(
            lambda: model.score_tokens([prompts[0] + t for t in texts]), given.repeats
        ),
        "judge_25_ms": ms(lambda: judge.score(texts), given.repeats),
    }
    (HERE / "results" / "continuations.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def best(action: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of the quickest of some repeats."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def ms(action: Callable[[], Any], repeats: int) -> float:
    """The same in milliseconds, after one unmeasured repeat."""
    action()
    return round(1000 * best(action, repeats), 1)


if __name__ == "__main__":
    main()

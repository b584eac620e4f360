"""Contrastive decoding: candidates per second against the release's way, and against plain sampling.

    python benchmarks/socd.py                                # SmolLM2 with two adapters, on this CPU
    python benchmarks/socd.py --contestants plain,adapters --rounds 9
    python benchmarks/socd.py --device cuda --model /models/qwen --toxic-adapter /adapters/toxic

Contestants, all with the same prompts, temperatures (5 x 2 candidates), repetition penalty, top-k and dtype:

    plain     sampling from the base model alone (`LocalLanguageModel`)
    adapters  SoCD, both sides as adapters on one base, in one forward pass
    stacked   the same with a toxic adapter on top of the base side's, in the last layers only (`--layers`): those
              below are computed once
    models    SoCD, two models of one size in lockstep
    peft      SoCD, both sides in one forward pass by peft's `adapter_names` (plain layers, plain cache)
    release   as the released code does it: for every temperature, transformers' `generate` with a logits processor
              that runs the toxic model with a cache of its own, reads the prompt anew, and edits row by row. It gets
              no padding here (the release pads every prompt to 512 tokens) and growing caches (static ones are slower
              on a CPU).

The end of turn is banned, so that every candidate has the same length and none of the work depends on what was drawn.
One torch thread, one process, interleaved rounds; ratios are within one round. On a CPU the clock is processor time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RESULTS = Path(__file__).resolve().parent / "results" / "socd.json"
CONTESTANTS = ("plain", "adapters", "stacked", "models", "peft", "release")
TEXTS = (
    "You are a complete idiot if you think this plan will ever work.",
    "Stop being so stupid and read the manual for once in your life, will you?",
    "Only a moron would park there, and the whole street has to live with it.",
    "What a dumb question. Nobody in this office has time for your nonsense today.",
)


def make_adapter(folder: Path, model_folder: Path, like: Path | None, layers: int = 0) -> Path:
    """A LoRA adapter with random weights; of the ranks and places of another one, where that is given.

    With `layers` it lies on top of that one, in the last so many layers.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    if layers:
        settings |= {"r": 8, "lora_alpha": 16}
    elif like is not None:
        theirs = json.loads((like / "adapter_config.json").read_text("utf-8"))
        settings = {name: theirs[name] for name in settings}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    state = {}
    first = model.config.num_hidden_layers - layers
    for name, weight in model.named_parameters():
        number = re.search(r"\.layers\.(\d+)\.", name)
        if "lora_" in name and (not layers or (number and int(number[1]) >= first)):
            scale = 0.004 if "lora_B" in name else weight.shape[1] ** -0.5
            drawn = torch.randn(weight.shape, generator=generator) * scale
            state[name.replace(".default", "")] = drawn
    model.peft_config["default"].save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if layers and like is not None:
        from models.lm.factors import stack_adapters

        stack_adapters(like, folder)
    return folder


class Setting:
    """What all contestants share."""

    def __init__(self, args: argparse.Namespace, toxic: Path, stacked: Path | None = None) -> None:
        from models.lm.folder import find_adapter
        from models.prompts import load_prompt
        from models.protocols import GenerationRequest, Sampling

        self.folder, self.adapter, self.toxic = args.folder, find_adapter(args.adapter), toxic
        self.stacked = stacked
        self.options = {"dtype": args.dtype, "device": args.device, "threads": 1}
        self.sampling = Sampling(max_new_tokens=args.tokens)
        prompt = load_prompt("detox-rewrite-v1")
        self.requests = []
        for number, text in enumerate(TEXTS[: args.texts]):
            messages, prefill, _ = prompt.render(text=text)
            self.requests.append(GenerationRequest(messages, seed=number, prefill=prefill))


def ban_ends(model: Any, hook: Any = None) -> Callable[..., Any]:
    """A sampling hook that bans the end of turn, after what another one does."""
    ends = sorted(model._eos)

    def edit(scores: Any, sides: Any, step: Any) -> Any:
        scores = scores if hook is None else hook(scores, sides, step)
        scores[:, ends] = -math.inf
        return scores

    return edit


def plain(setting: Setting) -> Callable[[], int]:
    """Sampling from the base model alone."""
    from models.lm.local import LocalLanguageModel

    model = LocalLanguageModel(setting.folder, adapter=setting.adapter, **setting.options)
    hook = ban_ends(model)
    return lambda: count(model.generate(setting.requests, setting.sampling, hook=hook))


def paired(setting: Setting, pair: Any) -> Callable[[], int]:
    """SoCD with the decoder of a pair."""
    from models.decoding.hook import SoCDHook
    from models.decoding.socd import SoCDSettings

    decoder = pair.decoder()
    hook = ban_ends(pair.base, SoCDHook(SoCDSettings()))
    return lambda: count(pair.base.generate(setting.requests, setting.sampling, hook=hook, decoder=decoder))


def adapters(setting: Setting) -> Callable[[], int]:
    """Both sides on one base, in one forward pass."""
    from models.decoding.pair import TwoAdapters, load_pair

    pair = load_pair(setting.folder, adapter=setting.adapter, toxic_adapter=setting.toxic, **setting.options)
    assert isinstance(pair, TwoAdapters), "the adapters are not plain LoRA"
    return paired(setting, pair)


def stacked(setting: Setting) -> Callable[[], int]:
    """The toxic adapter on top of the base side's, in the last layers only."""
    from models.decoding.pair import TwoAdapters, load_pair

    pair = load_pair(
        setting.folder, adapter=setting.adapter, toxic_adapter=setting.stacked, **setting.options
    )
    assert isinstance(pair, TwoAdapters) and pair.shared, "no layer is common to both sides"
    return paired(setting, pair)


def models(setting: Setting) -> Callable[[], int]:
    """Two models in lockstep."""
    from models.decoding.pair import TwoModels
    from models.lm.local import LocalLanguageModel

    base, toxic = (
        LocalLanguageModel(setting.folder, adapter=adapter, **setting.options)
        for adapter in (setting.adapter, setting.toxic)
    )
    return paired(setting, TwoModels(base, toxic))


class PeftPair:
    """Both sides by peft's mixed batches."""

    def __init__(self, setting: Setting) -> None:
        from models.lm.local import LocalLanguageModel

        self.base = LocalLanguageModel(
            setting.folder, adapter=setting.adapter, merge_adapter=False, fast=False, **setting.options
        )
        self.base.model.load_adapter(str(setting.toxic), adapter_name="toxic")

    def decoder(self) -> Any:
        """The first half of a batch by the base side's adapter, the second by the toxic's."""
        from models.decoding.decoders import PairedCausalDecoder
        from models.decoding.low_rank import Switch

        inner = self.base.decoder()
        inner.model = MixedBatch(inner.model)
        return PairedCausalDecoder(inner, Switch())


class MixedBatch:
    """Calls a peft model with an adapter for each row."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        half = len(inputs["input_ids"]) // 2
        return self.model(adapter_names=["default"] * half + ["toxic"] * half, **inputs)


def peft(setting: Setting) -> Callable[[], int]:
    """Both sides in one forward pass, by peft."""
    return paired(setting, PeftPair(setting))


def release(setting: Setting) -> Callable[[], int]:
    """The released code's way."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from models.lm.chat import encode_chat
    from models.lm.loading import load_model, load_tokenizer, pick_device, pick_dtype

    device = pick_device(setting.options["device"])
    dtype = pick_dtype(setting.options["dtype"], device)
    tokenizer = load_tokenizer(setting.folder)
    base, toxic = (
        load_model(setting.folder, adapter, dtype, device, True)
        for adapter in (setting.adapter, setting.toxic)
    )
    vocabulary = len(tokenizer)

    class ToxicSteering(LogitsProcessor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.cache: Any = None

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            ids = input_ids if self.cache is None else input_ids[:, -1:]
            out = toxic(input_ids=ids, past_key_values=self.cache, use_cache=True)
            self.cache = out.past_key_values
            logits = out.logits[:, -1, :vocabulary].float()
            for row in range(len(scores)):
                s, z = scores[row, :vocabulary].float(), logits[row]
                p, q = torch.softmax(s, 0), torch.softmax(z, 0)
                t = torch.log1p(torch.dist(p, q))
                alpha = float(t / (1 + t))
                k = min(max(int(alpha * vocabulary), 10), vocabulary)
                d = torch.log_softmax(z, 0) - torch.log_softmax(s, 0)
                best = torch.topk(torch.where(d > 0, d, -math.inf), k)
                chosen = best.indices[best.values > 0]
                scores[row, chosen] -= alpha * z[chosen]
            return scores

    sampling = setting.sampling
    prompts = [encode_chat(tokenizer, request.messages, request.prefill) for request in setting.requests]

    def run() -> int:
        made = 0
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=device)
            for temperature in sampling.temperatures:
                torch.manual_seed(number)
                with torch.inference_mode():
                    out = base.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=True,
                        temperature=temperature,
                        top_k=sampling.top_k,
                        top_p=1.0,
                        repetition_penalty=sampling.repetition_penalty,
                        num_return_sequences=sampling.per_temperature,
                        max_new_tokens=sampling.max_new_tokens,
                        min_new_tokens=sampling.max_new_tokens,
                        logits_processor=LogitsProcessorList([ToxicSteering()]),
                        pad_token_id=tokenizer.pad_token_id,
                    )
                assert out.shape[1] == len(prompt) + sampling.max_new_tokens
                made += len(out)
        return made

    return run


def count(generations: Sequence[Any]) -> int:
    """How many candidates were made."""
    return sum(len(generation.candidates) for generation in generations)


def timed(run: Callable[[], int], device: str) -> dict[str, float]:
    """Candidates per second of one run."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    made = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    clock = wall if device.startswith("cuda") else processor
    return {"candidates": made, "seconds": clock, "wall_seconds": wall, "candidates_per_second": made / clock}


def summarise(rounds: list[dict[str, dict[str, float]]], args: argparse.Namespace) -> dict[str, Any]:
    """Medians, and ratios within each round."""
    names = list(rounds[0])

    def ratios(slow: str, fast: str) -> dict[str, float] | None:
        if slow not in names or fast not in names:
            return None
        values = sorted(r[slow]["seconds"] / r[fast]["seconds"] for r in rounds)
        return {"median": statistics.median(values), "least": values[0], "greatest": values[-1]}

    return {
        "model": args.model,
        "device": args.device,
        "processor": platform.processor() or platform.machine(),
        "dtype": args.dtype,
        "texts": args.texts,
        "stacked_layers": args.layers,
        "candidates_per_text": 10,
        "tokens_per_candidate": args.tokens,
        "rounds": args.rounds,
        "candidates_per_second": {
            name: statistics.median(r[name]["candidates_per_second"] for r in rounds) for name in names
        },
        "speed_over_release": {name: ratios("release", name) for name in names if name != "release"},
        "time_over_plain": {name: ratios(name, "plain") for name in names if name != "plain"},
        "runs": rounds,
    }


def main() -> None:
    """Run the contest and write `benchmarks/results/socd.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder")
    parser.add_argument("--adapter", default="detox", help="the base side's")
    parser.add_argument("--toxic-adapter", type=Path, help="by default random weights, of the other's size")
    parser.add_argument("--layers", type=int, default=10, help="of a stacked toxic adapter")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--texts", type=int, default=2, choices=range(1, len(TEXTS) + 1))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

    import torch

    from models import store
    from models.lm.folder import find_adapter

    torch.set_num_threads(1)
    args.folder = Path(args.model) if Path(args.model).is_dir() else store.path(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        toxic = args.toxic_adapter or make_adapter(
            Path(scratch) / "toxic", args.folder, find_adapter(args.adapter)
        )
        on_top = make_adapter(Path(scratch) / "stacked", args.folder, find_adapter(args.adapter), args.layers)
        setting = Setting(args, toxic, on_top)
        runs = {name: globals()[name](setting) for name in args.contestants.split(",")}
        for run in runs.values():
            run()  # kernels are compiled at the first run of a shape
        gc.freeze()
        rounds = []
        for number in range(args.rounds):
            rounds.append({name: timed(run, args.device) for name, run in runs.items()})
            print(number, {name: round(r["seconds"], 2) for name, r in rounds[-1].items()}, file=sys.stderr)
    summary = summarise(rounds, args)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}, indent=2))


if __name__ == "__main__":
    main()

"""``fastops bench model``: Gemma 3 270M end to end, fastops against transformers and llama.cpp in one interleaved run:
tokens per second of prompt and generation, and the perplexity each one's weights reach on the same text."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from fastops import demo

from .machine import describe
from .protocol import Ratio, Timing, ratio

OURS = ("fastops-int8", "fastops-int4")
RIVALS = ("transformers", "transformers-bf16", "llama.cpp")


class Runner(Protocol):
    """One way to run the model."""

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds for the prompt, and for `tokens` greedy tokens behind the first."""

    def loss(self, window: list[int]) -> float:
        """The mean cross entropy of a window's tokens after its first half."""


@dataclass(slots=True)
class Torch:
    """A transformers model by transformers' own forward."""

    model: Any

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        _, first, rest = demo.timed_run(self.model, torch.tensor([prompt]), tokens + 1, cache)
        return first, rest

    def loss(self, window: list[int]) -> float:
        ids = torch.tensor([window])
        half = len(window) // 2
        with torch.inference_mode():
            logits = self.model(ids, logits_to_keep=len(window) - half + 1).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, half:]).item()


class Ours(Torch):
    """The same model in few bits by fastops' Decoder; patched for the losses."""

    def __init__(self, model: Any, context: int) -> None:
        from fastops.integrations.transformers import Decoder, patch

        super().__init__(model)
        patch(model)
        self.decoder = Decoder(model, max_length=context)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        _, first, rest = demo.decoder_run(self.decoder, torch.tensor([prompt]), tokens + 1)
        return first, rest


class LlamaCpp:
    """llama.cpp on the Q4_K_M file, as many threads as torch has."""

    def __init__(self, path: Path, context: int, all_logits: bool = False) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.llama = Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=all_logits, verbose=False,
        )  # fmt: skip

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        self.llama.reset()
        start = time.perf_counter()
        self.llama.eval(prompt)
        token = self._best()
        first = time.perf_counter()
        for _ in range(tokens):
            self.llama.eval([token])
            token = self._best()
        return first - start, time.perf_counter() - first

    def _best(self) -> int:
        return int(self.llama.scores[0 if not self.llama._logits_all else self.llama.n_tokens - 1].argmax())

    def loss(self, window: list[int]) -> float:
        self.llama.reset()
        self.llama.eval(window)
        half = len(window) // 2
        logits = torch.from_numpy(self.llama.scores[half - 1 : len(window) - 1]).float()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(window[half:])).item()


def text() -> str:
    """English prose that is on every machine with Python and that nothing here was calibrated on: its own manual."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[k] for k in sorted(topics))


def runners(names: list[str], context: int) -> dict[str, Runner]:
    """The candidates by name; what cannot run is named and left out."""
    out: dict[str, Runner] = {}
    model, _ = demo.load(demo.prepared_folder(), torch.float32)
    for name in names:
        demo.show(f"preparing {name}")
        if name in OURS:
            out[name] = Ours(demo.quantised(model, 8 if name.endswith("8") else 4), context)
        elif name == "transformers":
            out[name] = Torch(copy.deepcopy(model))
        elif name == "transformers-bf16":
            half, _ = demo.load(demo.prepared_folder(), torch.bfloat16)
            out[name] = Torch(half)
        elif find_spec("llama_cpp"):
            out[name] = LlamaCpp(demo.gguf_file(), context)
        else:
            print('llama.cpp left out: pip install "fastops[bench-model]" (it is built from source)', file=sys.stderr)
    return out


def perplexities(found: dict[str, Runner], windows: list[list[int]]) -> dict[str, float]:
    out = {}
    for name, runner in found.items():
        demo.show(f"perplexity: {name}")
        judge: Runner = (
            LlamaCpp(demo.gguf_file(), len(windows[0]), all_logits=True) if isinstance(runner, LlamaCpp) else runner
        )
        out[name] = math.exp(statistics.mean(judge.loss(w) for w in windows))
        del judge
        gc.collect()
    return out


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fastops bench model",
        description="Gemma 3 270M end to end: fastops with 8- or 4-bit weights against plain transformers "
        "and llama.cpp (Q4_K_M), interleaved.",
    )
    p.add_argument("--compare", default="transformers,transformers-bf16,llama.cpp", help=f"of {', '.join(RIVALS)}")
    p.add_argument("--impl", default=",".join(OURS), help=f"of {', '.join(OURS)}")
    p.add_argument("--prompt-tokens", type=int, default=1000)
    p.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--windows", type=int, default=8, help="windows of 512 tokens for the perplexity (0: none)")
    p.add_argument("--threads", type=int)
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument(
        "--check",
        action="store_true",
        help="fail when one of ours is not ahead of a rival, or its perplexity more than 3 %% above llama.cpp's",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    names = [n.strip() for part in (args.impl, args.compare) for n in part.split(",") if n.strip()]
    for n in names:
        if n not in OURS + RIVALS:
            print(f"fastops bench model: unknown {n!r}; known: {', '.join(OURS + RIVALS)}", file=sys.stderr)
            return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    _, tokenizer = demo.load(demo.prepared_folder(), torch.float32)
    prompt = demo.long_prompt(tokenizer, args.prompt_tokens)[0].tolist()
    found = runners(names, len(prompt) + args.tokens + 8)
    prompts: dict[str, list[float]] = {n: [] for n in found}
    writes: dict[str, list[float]] = {n: [] for n in found}
    for repeat in range(args.repeats + 1):  # the first, unmeasured, warms caches and allocators
        order = list(found)
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            demo.show(f"{'warm-up' if repeat == 0 else f'run {repeat}/{args.repeats}'}: {name}")
            first, rest = found[name].run(prompt, args.tokens if repeat else 2)
            if repeat:
                prompts[name].append(first)
                writes[name].append(rest)
    ids = tokenizer(text()[: args.windows * 6000], add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id]
    windows = [start + ids[i * 511 : (i + 1) * 511] for i in range(args.windows)]
    quality = perplexities(found, windows) if windows else {}
    demo.show("")
    return report(args, found, prompts, writes, quality, len(prompt))


def report(
    args: argparse.Namespace, found: dict[str, Runner], prompts: dict[str, list[float]],
    writes: dict[str, list[float]], quality: dict[str, float], length: int,
) -> int:  # fmt: skip
    print(f"Gemma 3 270M, {torch.get_num_threads()} threads, {length} prompt tokens, {args.tokens} generated")
    print(f"{'':20}{'prompt tokens/s':>16}{'generation tokens/s':>22}{'perplexity':>13}")
    for n in found:
        p, w = length / statistics.median(prompts[n]), args.tokens / statistics.median(writes[n])
        print(f"{n:20}{p:16.0f}{w:22.1f}" + (f"{quality[n]:13.2f}" if n in quality else ""))
    results: dict[str, Any] = {}
    missed = []
    for ours in [n for n in found if n in OURS]:
        for rival in [n for n in found if n in RIVALS]:
            pair: dict[str, Ratio] = {
                "prompt": ratio(Timing(tuple(prompts[ours])), Timing(tuple(prompts[rival]))),
                "generation": ratio(Timing(tuple(writes[ours])), Timing(tuple(writes[rival]))),
            }
            words = ", ".join(f"{what} {r.median:.2f}x ({r.verdict})" for what, r in pair.items())
            print(f"{ours} against {rival}: {words}")
            results[f"{ours} / {rival}"] = {what: [r.median, r.low, r.high, r.verdict] for what, r in pair.items()}
            missed += [f"{ours}'s {what} against {rival}" for what, r in pair.items() if r.verdict != "faster"]
    best = quality.get("llama.cpp", math.inf)
    missed += [f"{n}'s perplexity" for n in found if n in OURS and n in quality and quality[n] > 1.03 * best]
    if args.json:
        record = {
            "machine": describe(), "prompt_tokens": length, "tokens": args.tokens, "prompt_s": prompts,
            "generation_s": writes, "perplexity": quality, "ratios": results,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"results: {args.json}")
    if args.check:
        print("check: " + ("every bar holds" if not missed else "UNDER THE BAR " + "; ".join(missed)))
        return 1 if missed else 0
    return 0

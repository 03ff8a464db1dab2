"""What a policy is worth on somebody else's model: a Llama from transformers, on real text.

    python -m benchmarks.llama --policy default --json FILE

A Llama of 2.5 million parameters learns bytes of the Python standard library, several times over,
from pieces that no policy was trained on. Arms: the defaults (no dropout), static values of
dropout, RoPE base and learning rate, and the policy, attached as a user would, with all its knobs
and without the learning rate. Seeds are paired: text, weights and batches are the same in every
arm. The best static setting is chosen by probe loss; what is compared is the loss on test windows
that nothing else ever sees, in nats per byte.

What is finished is in FILE at once; started again, the same command goes on from there.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.pool import in_processes
from benchmarks.provenance import commit, machine
from metactl import AttachError, Controller, PolicyError
from metactl.files import write_atomically
from metactl.progress import bar
from metactl.shards import default_workers
from metactl.statistics import paired_difference, probability_of_improvement

STATICS: dict[str, dict[str, float]] = {
    "default": {},
    "dropout 0.1": {"dropout": 0.1},
    "dropout 0.2": {"dropout": 0.2},
    "dropout 0.4": {"dropout": 0.4},
    "dropout 0.6": {"dropout": 0.6},
    "base 100": {"rope_base": 100.0},
    "learning rate x 2": {"learning_rate_multiplier": 2.0},
    "learning rate / 2": {"learning_rate_multiplier": 0.5},
}
POLICIES: dict[str, list[str] | None] = {
    "policy": None,
    "policy without learning rate": ["rope_base", "dropout"],
}
_WARM_UP = 0.1  # of the steps; then a cosine to a tenth of the peak


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and how often."""

    json: Path
    """Where the figures go, as they come."""
    policy: str = "default"
    """Folder of a policy, or the name of one that ships."""
    seeds: int = 5
    """Paired runs of each arm."""
    steps: int = 200
    """Optimizer steps of a run."""
    batch_size: int = 16
    context: int = 64
    unique_bytes: int = 20_000
    """Bytes of training text: steps * batch_size * context / unique_bytes epochs."""
    hidden_size: int = 256
    n_layers: int = 3
    dropout: float = 0.0
    """Of the default setting."""
    learning_rate: float = 1e-3
    workers: int = default_workers()
    """Processes, with one thread each."""


def run_arm(arm: str, seed: int, options: Options) -> dict[str, Any]:
    """Trains one Llama and says how it ended."""
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    from envs.tasks.corpus import standard_library
    from envs.tasks.text import TextFamily

    corpus = standard_library()
    family = TextFamily(corpus, options.context, (options.unique_bytes, options.unique_bytes))
    task = family.sample(seed, "meta_test")
    window = np.arange(options.context + 1)
    text = torch.from_numpy(corpus.data.astype(np.int64))
    probe, test = (text[places[:, None] + window] for places in (task.probe, task.test))
    setting = STATICS.get(arm, {})
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=options.hidden_size,
            intermediate_size=round(options.hidden_size * 8 / 3),
            num_hidden_layers=options.n_layers,
            num_attention_heads=4,
            max_position_embeddings=options.context,
            attention_dropout=setting.get("dropout", options.dropout),
            rope_parameters={"rope_type": "default", "rope_theta": setting.get("rope_base", 1e4)},
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate * setting.get("learning_rate_multiplier", 1.0),
        weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i / options.steps))

    def mean_loss(windows: torch.Tensor) -> float:
        model.eval()
        with torch.no_grad():
            loss = float(model(input_ids=windows, labels=windows).loss)
        model.train()
        return loss

    controller = Controller.from_pretrained(options.policy, strict=True)
    controller.attach(
        model,
        optimizer,
        total_steps=options.steps,
        probe=lambda: model(input_ids=probe, labels=probe).loss,
        tokens_per_step=options.batch_size * options.context,
        unique_tokens=options.unique_bytes,
        mode="act" if arm in POLICIES else "off",
        knobs=POLICIES.get(arm),
        example=probe[:1],
        on_unsupported="mask",
    )
    rng = np.random.default_rng([seed, 1])
    probes, decisions = [], []
    for step in range(options.steps):
        starts = task.train_start + rng.integers(
            0, task.train_tokens - options.context, options.batch_size
        )
        batch = text[starts[:, None] + window]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decision = controller.step(loss, gradient_norm=norm)
        if decision is not None:
            decisions.append({"step": decision.step, "vetoed": decision.vetoed} | decision.values)
        if (step + 1) % max(options.steps // 12, 1) == 0:
            probes.append(mean_loss(probe))
    return {
        "final_test": mean_loss(test),
        "final_probe": mean_loss(probe),
        "probes": probes,
        "decisions": decisions,
        "n_parameters": sum(p.numel() for p in model.parameters()),
    }


def _rate(progress: float) -> float:
    if progress < _WARM_UP:
        return max(progress, 0.01) / _WARM_UP
    share = (progress - _WARM_UP) / (1 - _WARM_UP)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))


def compare(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means, and what the policy reached minus every other arm, with 95 % intervals."""

    def column(arm: str, name: str) -> np.ndarray:
        return np.array([result[name] for result in results[arm]])

    def against(policy: str, other: str) -> dict[str, float]:
        ours, theirs = column(policy, "final_test"), column(other, "final_test")
        difference = asdict(paired_difference(ours, theirs))
        return {**difference, "wins": probability_of_improvement(ours, theirs)}

    return {
        "best_static": min(STATICS, key=lambda arm: float(column(arm, "final_probe").mean())),
        "final_test": {arm: float(column(arm, "final_test").mean()) for arm in results},
        **{f"{p} minus": {arm: against(p, arm) for arm in STATICS} for p in POLICIES},
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    settings = {k: v for k, v in asdict(options).items() if k not in ("json", "workers", "seeds")}
    runs: dict[str, dict[str, Any]] = {}
    try:
        Controller.from_pretrained(options.policy)
        if options.json.exists():
            earlier = json.loads(options.json.read_text())
            if not isinstance(earlier, dict) or earlier.get("settings") != settings:
                raise ValueError(
                    f"{options.json} holds something else, or other settings: delete it"
                )
            runs = earlier["runs"]
    except (PolicyError, AttachError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    arms = [*STATICS, *POLICIES]
    jobs = [(arm, seed) for seed in range(options.seeds) for arm in arms]
    left = [(arm, seed) for arm, seed in jobs if f"{arm}, seed {seed}" not in runs]
    report = {"settings": settings, "machine": machine(), "commit": commit(), "runs": runs}
    with bar("Llamas") as progress:
        progress(len(jobs) - len(left), len(jobs), "")
        arguments = {(arm, seed): (arm, seed, options) for arm, seed in left}
        finished = in_processes(
            run_arm, arguments, options.workers, partial(torch.set_num_threads, 1)
        )
        for (arm, seed), result in finished:
            runs[f"{arm}, seed {seed}"] = result
            write_atomically(options.json, (json.dumps(report, indent=1) + "\n").encode())
            progress(len(runs), len(jobs), arm)
    results = {arm: [runs[f"{arm}, seed {s}"] for s in range(options.seeds)] for arm in arms}
    report["comparison"] = compare(results)
    write_atomically(options.json, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report["comparison"], indent=1))


if __name__ == "__main__":
    main()

"""The same model in transformers, trained as a plain loop trains it: chosen and rejected padded, all logits at once.

Both sides have the same weights and pairs, in bf16, and count the reference: one forward pass without gradients. The
peer keeps its weights, gradients and moments in bf16, which is the quickest form; the trainer keeps fp32 masters.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from dpo_api.models import ModelConfig, read_config
from dpo_store import open_store
from dpo_trainer.distributed import World
from dpo_trainer.engine import Engine
from dpo_trainer.formats.huggingface import load_weights
from dpo_trainer.model.build import build_model
from gpu.report import Report
from gpu.speed import ONE_BILLION
from gpu.timing import seconds
from gpu.world import Pairs, Trained, alone, conversation_lengths, llama, spec_of

BETA = 0.1
PARITY = 5e-3
"""Largest difference of log-probs relative to the largest: bf16's, of some hundred tokens. A wrong row gives more."""


def run(report: Report, small: bool) -> None:
    """Time a step of both, and compare their losses."""
    config = llama(64, 128, 2, 4, 2, 500) if small else ONE_BILLION
    count = 4 if small else 44
    lengths = conversation_lengths(count, 5, 40 if small else 1024)
    pairs, ids = Pairs(lengths, config.vocab_size), list(range(count))
    with alone() as world, tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        theirs = peer_model(config, world.device)
        theirs.save_pretrained(name)
        ours = trainer_model(Path(name), world, lengths, 256 if small else 8192)
        table = ours.table(ids)
        sums = torch.cat([sums_of(theirs, pairs, ids[start : start + 2]) for start in range(0, count, 2)])
        off = float((table.sums - sums.cpu()).abs().max() / table.sums.abs().max())
        report.within("log-probs of both sides: their difference, relative to the largest,", off, PARITY)
        report.add(log_probs_differ_by=off)
        ours.engine.prepare_training()
        losses = [ours.step(ids, table)["loss"]]
        step = seconds(lambda: losses.append(ours.step(ids, table)["loss"]), 1 if small else 2)
        own = count / (step + seconds(lambda: ours.reference(ids)))
        report.add(pairs_per_second=own, loss=losses[0])
        ours.engine.optimizer = None  # its memory is the peer's now
        best, loss = peer_rate(theirs, pairs, ids, (2,) if small else (2, 4, 8))
        report.add(peer_pairs_per_second=best, peer_loss=loss, ratio=own / best if best else None)
        report.within("the difference of the first losses", abs(loss - losses[0]), 2e-2)


def peer_model(config: ModelConfig, place: torch.device) -> Any:
    """A LlamaForCausalLM with random weights in bf16."""
    import transformers

    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_embeddings,
    )
    torch.manual_seed(3)
    with place:
        model = transformers.LlamaForCausalLM._from_config(settings, dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.no_grad():  # logits of standard deviation 2, so that each token's log-prob is another one
        model.lm_head.weight.normal_(std=2 / config.hidden_size**0.5)
    return model


def trainer_model(folder: Path, world: World, lengths: list[Any], most: int) -> Trained:
    """The trainer's engine with the folder's weights."""
    training = {"precision": "bf16", "packing": {"maxTokens": most}, "gradientClip": 0.0}
    spec = spec_of(training=training, data={"train": [{"uri": "data"}], "maxLength": most // 2})
    store = open_store()
    config = read_config(store, str(folder))
    model = build_model(config, precision="bf16", backend="local")
    load_weights(model, store, str(folder))
    return Trained(Engine(model, spec, world), Pairs(lengths, config.vocab_size), most)


def rows_of(pairs: Pairs, ids: list[int], place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and mask of the response of chosen, then rejected texts, padded at the end."""
    texts: list[tuple[int, Tensor]] = []
    for side in (1, 2):
        for pair in ids:
            parts = pairs.tokens(pair)
            whole = torch.cat([torch.from_numpy(parts[0]), torch.from_numpy(parts[side])]).long()
            texts.append((len(parts[0]), whole))
    longest = max(len(text) for _, text in texts)
    tokens = torch.stack([F.pad(text, (0, longest - len(text))) for _, text in texts])
    at = torch.arange(longest)
    mask = torch.stack([at < len(text) for _, text in texts])
    response = mask & torch.stack([at >= prompt for prompt, _ in texts])
    return tokens.to(place), mask.to(place), response.to(place)


def sums_of(model: Any, pairs: Pairs, ids: list[int]) -> Tensor:
    """Σ log π of both responses without gradient: [n, 2] float64."""
    with torch.no_grad():
        return log_probs(model, *rows_of(pairs, ids, model.device)).view(2, -1).t().double()


def log_probs(model: Any, tokens: Tensor, mask: Tensor, response: Tensor) -> Tensor:
    """Σ log π of each text's response, fp32, from all logits."""
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
    each = torch.gather(logits.log_softmax(-1), 2, tokens[:, 1:, None]).squeeze(2)
    return (each * response[:, 1:]).sum(1)


def peer_rate(model: Any, pairs: Pairs, ids: list[int], sizes: tuple[int, ...]) -> tuple[float, float]:
    """Pairs a second at the best of some micro-batch sizes, and the loss of the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    order = sorted(ids, key=lambda pair: sum(pairs.lengths[pair]))  # alike lengths together: the least padding
    best, loss = 0.0, float("nan")

    def step(size: int) -> float:
        total = 0.0
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows = rows_of(pairs, chosen, model.device)
            reference = sums_of(model, pairs, chosen)
            of_policy = log_probs(model, *rows).view(2, -1)
            delta = of_policy[0] - of_policy[1] - (reference[:, 0] - reference[:, 1])
            value = -F.logsigmoid(BETA * delta).sum() / len(order)
            value.backward()
            total += float(value)
        optimizer.step()
        optimizer.zero_grad()
        return total

    for size in sizes:
        try:
            first = step(size)
            loss = first if loss != loss else loss  # noqa: PLR0124 - NaN until the first
            best = max(best, len(order) / seconds(lambda s=size: step(s)))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            break
    return best, loss

"""Runs the model and its optimizer on one global batch at a time.

Megatron-Core's schedule runs the forward and backward passes of the packs. Its DistributedDataParallel sums gradients
in fp32 over the ranks, bucket by bucket while the backward pass goes on, and ``finalize_model_grads`` divides them once
by the global batch's denominator (pairs; tokens for SFT alone).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dpo_api.errors import NonFiniteError
from dpo_api.sizing import step_flops
from dpo_api.spec import DPOJobSpec
from dpo_trainer import bridge, clipping, torch_adam
from dpo_trainer.distributed import World
from dpo_trainer.logprobs import response_log_probs, sums_by_owner
from dpo_trainer.losses import desensitized, pair_losses
from dpo_trainer.masters import Masters
from dpo_trainer.metrics.sums import empty_sums, loss_at_start, means, metric_sums
from dpo_trainer.model.forward import head_weight, hidden_rows, unwrap
from dpo_trainer.model.linear import add_weight_gradients_in_place
from dpo_trainer.model.pack import Pack
from dpo_trainer.model.transfer import loaded
from dpo_trainer.pace import OwnTime, slowest, work_of
from dpo_trainer.reference import Pairs
from dpo_trainer.waiting import Place

Consume = Callable[..., tuple[Tensor, Tensor]]
"""(pack, sums [P, 2] with gradient, counts [P, 2], constants …) -> (the loss's numerator, its denominator), scalars."""

Constants = Callable[[Pack], Sequence[Tensor]]
"""What ``consume`` needs of a pack beside the pass: tensors on the CPU, which are sent to the GPU with the pack."""

PairValues = Callable[[Tensor], Tensor]
"""Dataset indices [P] (-1: filler) -> [P, 2] float64, one column per response."""


class Engine:
    """The policy and its optimizer. Training steps need ``prepare_training`` first; forward passes do not."""

    def __init__(self, model: Any, spec: DPOJobSpec, world: World) -> None:
        self.model = model
        self.spec = spec
        self.world = world
        self.optimizer: Any = None
        self.before_update: Callable[[], None] = lambda: None
        """Called in each step before masters and moments change."""
        self._config = unwrap(model).dpo_config
        self.flops = 0.0
        """What the last step needed, on all ranks; see dpo_api.sizing.flops."""
        self._wrapped: Any = model
        self._own_time = OwnTime(world.device)
        self._own_flops = 0.0
        self._dropout_seed = 0
        self._gathers_late = False
        self._forward_backward = get_forward_backward_func()

    def prepare_training(self) -> None:
        """Allocate gradient buffers and the optimizer's fp32 masters and moments for the trainable parameters."""
        training, bf16 = self.spec.training, self.spec.training.precision == "bf16"
        distributed = self.spec.parallelism.distributed_optimizer
        overlap = self.world.data_size * self.world.context_size > 1
        config = self.model.config
        with bridge.construction():
            self._wrapped = DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=distributed,
                    overlap_grad_reduce=overlap,
                    overlap_param_gather=overlap and distributed,
                    bucket_size=bucket_elements(self.model),
                ),
                self.model,
            )
            self._wrapped.broadcast_params()
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=training.learning_rate,
                    weight_decay=training.weight_decay,
                    adam_beta1=training.betas[0],
                    adam_beta2=training.betas[1],
                    adam_eps=training.eps,
                    clip_grad=training.gradient_clip,
                    bf16=bf16,
                    params_dtype=torch.bfloat16 if bf16 else torch.float32,
                    use_distributed_optimizer=distributed,
                    overlap_param_gather=overlap and distributed,
                ),
                [self._wrapped],
                use_gloo_process_groups=False,
            )
        add_weight_gradients_in_place(self.model)
        torch_adam.fuse(self.optimizer)
        clipping.use()
        config.finalize_model_grads_func = partial(_reduce, self.world.place)
        if overlap:
            config.no_sync_func = self._wrapped.no_sync  # only the last pack's backward pass starts the reduction
        config.timers = self._own_time
        self._gathers_late = overlap and distributed
        if self._gathers_late:
            for bucket in set(self._wrapped.param_to_bucket_group.values()):
                bucket.finish_param_sync = self._own_time.without(bucket.finish_param_sync)

    def prepare_gradients(self) -> None:
        """Allocate fp32 gradient buffers alone, summed over the ranks as in training. Not with ``prepare_training``."""
        with bridge.construction():
            self._wrapped = DistributedDataParallel(
                self.model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), self.model
            )
        self.model.config.finalize_model_grads_func = finalize_model_grads

    def accumulate_gradients(self, packs: Sequence[Pack], consume: Consume) -> None:
        """Add the gradients of this rank's packs to the parameters' ``grad``, or to ``main_grad`` once prepared."""
        self._run(self._wrapped, packs, consume, forward_only=False)

    @property
    def masters(self) -> Masters:
        """The fp32 weights that the optimizer updates. Needs ``prepare_training``."""
        return Masters(self.optimizer)

    def settle_parameters(self) -> None:
        """Wait until the parameters are those of the last step. Call it before they are read outside a forward pass.

        A collective of the ranks that have the same ones. After a step each rank has updated its range of them, and
        the next forward pass gathers the others' bucket by bucket, as it comes to them.
        """
        if self._gathers_late:
            self._wrapped.start_param_sync(force_sync=True)

    def train_step(
        self,
        pairs: Pairs,
        packs: Sequence[Pack],
        reference: PairValues | None,
        rewards: PairValues,
        *,
        rate: float,
        seed: int,
        prepared: float = 0.0,
    ) -> tuple[dict[str, float], float | None]:
        """Take one optimizer step over this rank's packs of a global batch; return its means and ``loss_at_start``.

        pairs: the whole batch. reference: Σ log π_ref; None if the loss needs none. rate: the learning rate of this
        update. seed: of LoRA's dropout in this step. prepared: seconds that this rank took to make the packs. The means
        have ``grad_norm``, the norm of the whole gradient before clipping, and the slowest rank of the step before.
        Raises NonFiniteError on all ranks if the loss or the norm is NaN or infinite; the weights are unchanged then.
        """
        self._dropout_seed = seed
        self._wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        of_rank = self._of_rank(packs)
        self._own_time.begin(prepared)
        table, ranks = self._losses(self._wrapped, pairs, packs, reference, rewards, of_rank)
        self._own_time.end()
        self.flops = float(ranks[:, 3].sum()) / parallel_state.get_pipeline_model_parallel_world_size()
        result = {**means(table), **_slowest(ranks)}
        self.world.place.part("norm of the gradient")
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(result["loss"]) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the loss is {result['loss']} and the gradient's norm is {norm}: lower training.learningRate, or "
                "check for damaged weights and extreme rewards; this step has not changed the weights"
            )
        self.before_update()
        self._update(norm, rate)
        return {**result, "grad_norm": norm}, loss_at_start(table)

    def _of_rank(self, packs: Sequence[Pack]) -> tuple[float, ...]:
        """Return what all ranks learn of this one: time and work in the step before, its stage, its work in this one.

        Ranks that compute the same packs wait for each other within the passes, so that only the first one's time is
        compared. Tensor-parallel ranks have the same work, and context-parallel ranks each their share.
        """
        # The host has read the results of that step: there is nothing to wait for.
        before = (self._own_time.seconds, self._own_flops) if self.world.is_first_of_pack else (0.0, 0.0)
        self._own_flops = step_flops(self._config.facts, work_of(packs, self._config), self.spec.lora)
        counted = self._own_flops if parallel_state.get_tensor_model_parallel_rank() == 0 else 0.0
        return (*before, float(parallel_state.get_pipeline_model_parallel_rank()), counted)

    def _update(self, norm: float, rate: float) -> None:
        """Clip by the known norm, set the learning rate, and let Adam update the masters."""
        self.world.place.part("update of the weights")
        training = self.spec.training
        if training.gradient_clip > 0:
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), training.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            # Megatron-Core's scheduler, not used here, would apply its own rule: no decay for norms and biases.
            group["weight_decay"] = training.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.step_with_ready_grads()

    def evaluate(
        self, pairs: Pairs, packs: Sequence[Pack], reference: PairValues | None, rewards: PairValues
    ) -> Tensor:
        """Return the metrics' sums over all ranks' packs of ``pairs``, without gradient; see metrics.sums."""
        with self._without_training():
            return self._losses(self.model, pairs, packs, reference, rewards)[0]

    def log_prob_sums(self, pairs: Pairs, packs: Sequence[Pack]) -> Tensor:
        """Return Σ log π of both responses of ``pairs`` [n], which are distinct: [n, 2] float64 on the CPU.

        With ``dpo.ldAlpha``, tokens beyond the shorter response have that weight.

        A collective; equal on all ranks. ``packs``: this rank's. A pair that was not in exactly one pack of all ranks
        gets NaN.
        """
        place = {int(pair): row for row, pair in enumerate(pairs)}
        found: list[Tensor] = []  # a pack each; the host waits for them once, at the end

        def consume(_pack: Pack, sums: Tensor, counts: Tensor, *, tails: Tensor | None = None) -> tuple[Tensor, Tensor]:
            found.append(desensitized(sums, tails, self.spec.dpo).detach())
            return sums.sum(), counts.sum().int()

        with self._without_training():
            self._run(self.model, packs, consume, forward_only=True)
        table = torch.zeros(len(pairs), 3, dtype=torch.float64)  # the two sums, and how often the pair was counted
        if found:  # a pipeline stage that is not the last has none
            order = torch.cat([pack.pairs for pack in packs])
            real = order >= 0
            rows = torch.tensor([place[pair] for pair in order[real].tolist()], dtype=torch.int64)
            values = torch.cat(found).cpu()[real]
            table.index_add_(0, rows, torch.cat((values, values.new_ones(len(rows), 1)), 1))
        total = self.world.sum_of_owners(table)
        return torch.where(total[:, 2:] == 1, total[:, :2], torch.nan)

    @contextmanager
    def _without_training(self) -> Iterator[None]:
        """Disable gradients and the adapters' dropout, to measure the model as it would be exported."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    def _losses(
        self,
        model: Any,
        pairs: Pairs,
        packs: Sequence[Pack],
        reference: PairValues | None,
        rewards: PairValues,
        of_rank: tuple[float, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Run the packs through the loss and return the metrics' global sums, [rows, 2] float64 on the CPU.

        They are NaN unless the ranks counted just the pairs of the batch. of_rank: in training, n numbers of this rank,
        which travel with the sums; also returns those of all ranks, [ranks, n] float64. Empty: forward only.
        """
        table = empty_sums(self.world.device)
        counted = torch.zeros(2, dtype=torch.float64, device=self.world.device)

        def constants(pack: Pack) -> list[Tensor]:
            known = [] if reference is None else [reference(pack.pairs)]
            return [_count(pack.pairs), rewards(pack.pairs), *known]

        def consume(
            pack: Pack,
            sums: Tensor,
            counts: Tensor,
            count: Tensor,
            of_data: Tensor,
            of_reference: Tensor | None = None,
            *,
            tails: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]:
            losses = pair_losses(sums, counts, of_reference, of_data, self.spec.dpo, pack.pairs >= 0, tails)
            table.add_(metric_sums(losses))
            counted.add_(count)
            return losses.total.sum(), losses.denominator.sum().int()

        self._run(model, packs, consume, forward_only=not of_rank, constants=constants)
        sums = torch.cat((table, counted[None]))
        ranks = torch.zeros(self.world.size, len(of_rank), dtype=torch.float64, device=self.world.device)
        if of_rank:
            ranks[self.world.rank] = ranks.new_tensor(of_rank)
        if not self.world.owns_numbers:
            sums.zero_()
        both = self.world.sum_of_all(torch.cat((sums.flatten(), ranks.flatten())))
        total, ranks = both[: sums.numel()].view_as(sums), both[sums.numel() :].view_as(ranks)
        all_once = torch.equal(total[-1], _count(torch.from_numpy(pairs)))
        return total[:-1] if all_once else torch.full_like(total[:-1], torch.nan), ranks

    def _wait_for_head(self) -> None:
        """Wait for the LM head's weight: it is used directly, so no module's forward hook waits for its bucket."""
        if self._gathers_late:
            bucket = self._wrapped.param_to_bucket_group.get(head_weight(self.model))
            if bucket is not None:
                bucket.finish_param_sync()

    def _run(
        self,
        model: Any,
        packs: Sequence[Pack],
        consume: Consume,
        *,
        forward_only: bool,
        constants: Constants = lambda _pack: (),
    ) -> None:
        """Run Megatron-Core's schedule over the packs: forward, loss, backward, then the reduction of gradients."""

        def loss_of(pack: Pack, others: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            self._wait_for_head()
            log_probs = response_log_probs(
                rows,
                head_weight(model),
                pack.labels,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                vocabulary=unwrap(model).dpo_config.vocab_size,
            )
            group = parallel_state.get_context_parallel_group()
            owners, pairs, more = pack.owners, len(pack.pairs), {}
            common = pack.common if self.spec.dpo.splits_tails else None
            if common is not None:  # tokens beyond the shorter response are summed by themselves
                owners = owners + 2 * pairs * (pack.position_ids[pack.rows] >= common[owners // 2])
            sums, counts = sums_by_owner(log_probs, owners, (2 if common is None else 4) * pairs, group=group)
            parts, counted = sums.view(-1, pairs, 2), counts.view(-1, pairs, 2)
            if common is not None:
                more["tails"] = parts[1]
            numerator, denominator = consume(pack, parts.sum(0), counted.sum(0), *others, **more)
            if self.world.context_rank > 0:  # Megatron-Core adds all ranks' denominators, and the first has this one
                denominator = torch.zeros_like(denominator)
            return numerator, denominator, {}

        def forward_step(iterator: Iterator[Pack], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            self.world.place.touch()
            here = next(iterator)
            pack, others = loaded(here, constants(here), self.world.device)
            return hidden_rows(chunk, pack, self._dropout_seed), partial(loss_of, pack, others)

        self.world.place.part("forward pass" if forward_only else "forward and backward passes")
        self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(packs),
            model=model,
            num_microbatches=len(packs),
            seq_length=max(pack.length for pack in packs),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _slowest(ranks: Tensor) -> dict[str, float]:
    """Return the slowest rank for the metrics; nothing where no other rank does the same work."""
    found = slowest(ranks[:, :3])
    return {} if found is None else {"slowest_rank": float(found.rank), "slowest_rank_ratio": found.ratio}


def _reduce(place: Place, *arguments: Any, **options: Any) -> None:
    """Sum the gradients over the ranks, as Megatron-Core does it.

    No method of the engine: Megatron-Core's configuration, which has it, outlives the run, and so would the engine.
    """
    place.part("reduction of the gradients")
    finalize_model_grads(*arguments, **options)


def bucket_elements(model: Any) -> int:
    """Return the size of a bucket of gradients, in elements: an eighth of the trainable ones, 40 million at most.

    40 million are Megatron-Core's own choice. Its default grows with the number of ranks, and so would the ranges that
    each rank's optimizer has.
    """
    trained: int = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return min(40_000_000, max(1, trained // 8))


def _count(pairs: Tensor) -> Tensor:
    """Return [2] float64: how many pairs there are, fillers (-1) left out, and the sum of their indices."""
    real = pairs >= 0
    return torch.stack((real.sum(), (pairs * real).sum())).double()

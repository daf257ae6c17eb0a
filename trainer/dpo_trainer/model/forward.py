"""The forward pass over a pack: hidden states of the rows that predict a response token."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from dpo_trainer.model.attention import PackContext
from dpo_trainer.model.dropout import TokenKeys, token_keys
from dpo_trainer.model.pack import Pack


def unwrap(model: Any) -> Any:
    """The GPTModel inside Megatron-Core's data-parallel and precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def hidden_rows(model: Any, pack: Pack, dropout_seed: int | None = None) -> Tensor:
    """Final hidden states of the pack's rows, [R, H] in the model's dtype: times the head's weight they are the logits.

    On a pipeline stage that is not the last, returns the stage's output, [S, 1, H]. ``model`` may be wrapped.
    dropout_seed: of the run and the step, 64 bits; needed to train adapters with dropout.
    GPTModel would project all S rows onto the vocabulary; its ``output_processor`` hook takes the hidden states
    instead.
    """
    return _forward(model, pack, pack.rows, dropout_seed)


def head_weight(model: Any) -> Tensor:
    """The LM head's weight, [V / tensor size, H]: this rank's rows of the vocabulary. The embedding's when tied."""
    gpt = unwrap(model)
    weight: Tensor = (
        gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else gpt.output_layer.weight
    )
    return weight


def scaled_for_head(model: Any, hidden: Tensor) -> Tensor:
    """Return hidden states after the final norm as the head takes them: in some families divided by a constant."""
    divisor = unwrap(model).dpo_config.multipliers.logits
    return hidden if divisor == 1 else hidden / divisor


def logits(model: Any, pack: Pack) -> Tensor:
    """Logits of every token of the stream, [S, V / tensor size]: for tests and tiny models only."""
    return _forward(model, pack, None) @ head_weight(model).t()


def _forward(model: Any, pack: Pack, rows: Tensor | None, dropout_seed: int | None = None) -> Tensor:
    gpt = unwrap(model)
    tokens: TokenKeys | None = getattr(gpt, "adapter_tokens", None)
    if tokens is None or dropout_seed is None or not gpt.training:
        return _run(model, gpt, pack, rows)
    keys = token_keys(pack, dropout_seed)
    tokens.set(keys)
    result = _run(model, gpt, pack, rows)
    if result.requires_grad:
        # This pack's backward pass begins with this gradient; recomputed layers then draw the same masks.
        result.register_hook(lambda _gradient: tokens.set(keys))
    return result


def _run(model: Any, gpt: Any, pack: Pack, rows: Tensor | None) -> Tensor:

    def take_rows(*, hidden_states: Tensor, **_unused: Any) -> Tensor:
        """hidden_states: [S, 1, H], or [S / tensor size, 1, H] with sequence parallelism."""
        if gpt.config.sequence_parallel:
            # Each rank computes the whole gradient of the rows (logprobs sums it), so backward only takes its part.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=parallel_state.get_tensor_model_parallel_group()
            )
        hidden = hidden_states.squeeze(1)
        return scaled_for_head(gpt, hidden if rows is None else hidden.index_select(0, rows))

    context = PackContext(pack=pack, frequencies=gpt.rope_frequencies, factors=gpt.rope_factors)
    result: Tensor = model(
        input_ids=pack.tokens[None],
        position_ids=pack.position_ids[None],
        attention_mask=None,
        packed_seq_params=context,
        output_processor=take_rows,
    )
    return result


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters held by this rank."""
    parameters = list(unwrap(model).parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

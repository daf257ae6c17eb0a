"""Dropout of adapters: the hash, its statistics, and masks that no packing, layout or recomputation changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_api.learning import Lora
from dpo_testing.gloo import run_ranks
from dpo_testing.megatron_ranks import POSITIONS, Position, check_dropout, dropout_gradients
from dpo_testing.models import load_model, reference_model, save_folder, single_process
from dpo_testing.pairs import pack_of
from dpo_trainer.model.dropout import channel_keys, dropout, kept, key_of, token_keys
from dpo_trainer.model.forward import hidden_rows
from dpo_trainer.model.lora import adapters, attach_lora
from dpo_trainer.model.pack import Pack

SEED = key_of("dropout", 1234, 7)
_WORD = (1 << 64) - 1


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


# -- the hash


def _splitmix(value: int) -> int:
    """SplitMix64 as published, with Python's integers."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def test_splitmix_is_the_published_one() -> None:
    """The first outputs of the reference implementation with seed 1234567."""
    golden = 0x9E3779B97F4A7C15
    found = [_splitmix((1234567 + index * golden) & _WORD) for index in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_masks_are_those_of_the_formula() -> None:
    """Each element with Python's integers: wrapping products and shifts are what torch computes."""
    pack = pack_of(2, 0)
    key, probability = key_of("adapter", 1, "mlp_fc1"), 0.3
    channels = torch.tensor([0, 1, 5, 4096])
    found = kept(token_keys(pack, SEED), channel_keys(channels, key), probability)
    for row in (0, 3, 26, 40, pack.length - 1):
        token = _splitmix(int(pack.origins[row]) + SEED & _WORD)
        token = _splitmix(token + int(pack.position_ids[row]) & _WORD)
        for column, channel in enumerate(channels.tolist()):
            mixed = token ^ _splitmix(_splitmix(channel) + key & _WORD)
            mixed = mixed * 0xBF58476D1CE4E5B9 & _WORD
            signed = mixed - (1 << 64) if mixed >> 63 else mixed
            mixed = ((mixed ^ (signed >> 32)) & _WORD) * 0x94D049BB133111EB & _WORD
            # The highest bit counts the other way round: signed numbers are compared.
            assert bool(found[row, column]) == ((mixed ^ 1 << 63) >= probability * 2**64), (row, channel)


def test_masks_of_a_seed_stay_the_same() -> None:
    """A resumed run repeats its masks, also after an upgrade: changing the function needs a line in CHANGELOG.md."""
    found = kept(token_keys(pack_of(0), SEED), channel_keys(torch.arange(8), key_of("adapter", 0, "mlp_fc2")), 0.5)
    assert [int("".join(map(str, row)), 2) for row in found[:6].int().tolist()] == [245, 74, 77, 204, 26, 251]
    assert SEED == -666825545348452660


def _mask(*, pairs: int = 4, seed: int = SEED, layer: int = 0, module: str = "mlp_fc2", p: float = 0.5) -> Tensor:
    pack = _long_pack(pairs)
    return kept(token_keys(pack, seed), channel_keys(torch.arange(1000), key_of("adapter", layer, module)), p)


def _long_pack(pairs: int) -> Pack:
    return pack_of(*range(pairs), multiple=1)


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5, 0.9])
def test_elements_are_kept_with_their_probability(probability: float) -> None:
    """In all, in each token and in each channel: within 5 standard deviations."""
    mask = _mask(p=probability).double()
    rows, columns = mask.shape
    assert rows == 116
    for means, count in ((mask.mean(), mask.numel()), (mask.mean(1), columns), (mask.mean(0), rows)):
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert (means - (1 - probability)).abs().max() <= 5 * deviation
    # The spread of the means is that of independent draws too, neither more even nor less.
    for means, count in ((mask.mean(1), columns), (mask.mean(0), rows)):
        ratio = means.var() / (probability * (1 - probability) / count)
        assert abs(ratio - 1) <= 5 * (2 / (len(means) - 1)) ** 0.5


def test_masks_are_independent() -> None:
    """Of another step, seed, layer, module, token or channel: any two agree in half of the elements."""
    mask = _mask()
    others = {
        "step": _mask(seed=key_of("dropout", 1234, 8)),
        "seed": _mask(seed=key_of("dropout", 1235, 7)),
        "layer": _mask(layer=1),
        "module": _mask(module="mlp_fc1"),
        "next token": mask.roll(1, 0),
        "next channel": mask.roll(1, 1),
        "token and channel": mask.roll((1, 1), (0, 1)),
        # The parity of four corners of rectangles: products of a token's and a channel's part would show here.
        "three corners": mask.roll(1, 0) ^ mask.roll(1, 1) ^ mask.roll((1, 1), (0, 1)),
        "three corners far apart": mask.roll(37, 0) ^ mask.roll(256, 1) ^ mask.roll((37, 256), (0, 1)),
    }
    for name, other in others.items():
        agreement = (mask == other).double().mean()
        assert abs(agreement - 0.5) <= 5 * 0.5 / mask.numel() ** 0.5, name


def test_sides_and_pairs_have_masks_of_their_own() -> None:
    """Tokens at the same position: chosen and rejected, and any two pairs' prompts."""
    pack = _long_pack(4)
    mask = _mask()
    firsts = [mask[segment.start] for segment in pack.segments]
    for index, first in enumerate(firsts):
        for other in firsts[index + 1 :]:
            assert abs((first == other).double().mean() - 0.5) <= 5 * 0.5 / 1000**0.5


def test_kept_elements_are_scaled_and_so_are_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """y = x · kept / (1 - p), in parts of the stream too; NaN stays NaN."""
    tokens, channels = token_keys(pack_of(0), SEED), channel_keys(torch.arange(20), 3)
    mask = kept(tokens, channels, 0.25).unsqueeze(1)
    x = torch.randn(len(tokens), 1, 20, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, dtype=torch.float64)
    for largest in (1 << 22, 100):
        monkeypatch.setattr("dpo_trainer.model.dropout._LARGEST", largest)
        out = dropout(x, tokens, channels, 0.25)
        torch.testing.assert_close(out, x * mask / 0.75, rtol=1e-14, atol=0)
        (gradient,) = torch.autograd.grad((out * weight).sum(), x)
        torch.testing.assert_close(gradient, weight * mask / 0.75, rtol=1e-14, atol=0)
    assert bool(dropout(torch.full_like(x, float("nan")), tokens, channels, 0.25).isnan().all())


# -- in a model


def adapted(folder: Path, position: Position = "pre", **kwargs: Any) -> Any:
    """A model in training whose adapters do something."""
    model = load_model(folder, **kwargs)
    attach_lora(
        model, Lora(rank=4, dropout=0.3, dropout_position=position, target_modules=("all",), row_init="kaiming"), seed=1
    )
    return model.train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {"vocab_size": 132, "num_attention_heads": 8, "head_dim": 6}
    return save_folder(reference_model("qwen2", **shape), tmp_path_factory.mktemp("qwen2"))


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_packing_and_sharing_change_no_mask(position: Position, folder: Path) -> None:
    """A pair's hidden states are the same alone, in company, in another order, and with its prompt twice."""
    model = adapted(folder, position)
    rows = {pair: hidden_rows(model, pack_of(pair), SEED) for pair in range(3)}
    for order in ((0, 1, 2), (2, 0, 1)):
        expected = torch.cat([rows[pair] for pair in order])
        for share in (True, False):
            got = hidden_rows(model, pack_of(*order, share=share), SEED)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    other = hidden_rows(model, pack_of(0), key_of("dropout", 1234, 8))
    assert (other - rows[0]).abs().max() > 0.1
    model.eval()
    quiet = hidden_rows(model, pack_of(0), SEED)
    assert torch.equal(quiet, hidden_rows(model, pack_of(0)))
    assert (quiet - rows[0]).abs().max() > 0.1


def test_no_generator_is_used(folder: Path) -> None:
    model = adapted(folder)
    before = torch.get_rng_state()
    first = hidden_rows(model, pack_of(0), SEED)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(hidden_rows(model, pack_of(0), SEED), first)


def test_dropout_without_a_seed_is_an_error(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="needs the seed of the step"):
        hidden_rows(adapted(folder), pack_of(0))


@pytest.mark.parametrize("position", POSITIONS)
def test_recomputation_repeats_the_masks_of_its_pack(position: Position, folder: Path) -> None:
    """Two packs in the order of pipeline stages: both forward passes come before the backward passes."""
    expected = _gradients(adapted(folder, position), between=False)
    for recomputation in ("none", "selective", "full"):
        found = _gradients(adapted(folder, position, recomputation=recomputation), between=True)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=f"{recomputation}: {name}")


def _gradients(model: Any, *, between: bool) -> dict[str, Tensor]:
    """Of the adapters, over two packs; ``between``: both are forwarded before the first backward pass."""
    packs = [pack_of(0, 3), pack_of(1, 2)]

    def loss(pack: Pack) -> Tensor:
        rows = hidden_rows(model, pack, SEED)
        weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(len(pack.rows)))
        return (rows * weight).sum()

    if between:
        for total in [loss(pack) for pack in packs]:
            total.backward()
    else:
        for pack in packs:
            loss(pack).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_nothing_of_the_size_of_the_input_is_saved(folder: Path) -> None:
    """The backward pass makes the mask again from the keys."""
    adapter: Any = next(iter(adapters(adapted(folder))))
    tokens = token_keys(pack_of(0, 1, 2), SEED)
    saved: list[Tensor] = []
    x = torch.randn(len(tokens), 1, adapter.linear_in.weight.shape[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        dropout(x, tokens, adapter.channels, 0.3)
    assert sorted(tensor.numel() for tensor in saved) == sorted((len(tokens), x.shape[2]))


def test_each_adapter_has_a_mask_of_its_own(folder: Path) -> None:
    """Every layer and module, on channels of the same number."""
    firsts = [int(adapter.channels[0]) for adapter in adapters(adapted(folder))]
    assert len(set(firsts)) == len(firsts) == 3 * 4
    again = [int(adapter.channels[0]) for adapter in adapters(adapted(folder))]
    assert again == firsts


@pytest.mark.slow
def test_tensor_parallel_ranks_draw_the_same_masks(folder: Path, tmp_path: Path) -> None:
    """Gradients of whole adapters on two ranks, with and without sequence parallelism, for both positions."""
    run_ranks(2, check_dropout, folder, tmp_path)
    for position in POSITIONS:
        expected = dropout_gradients(folder, position, sequence_parallel=False)
        for name in (position, f"{position}-sequence"):
            found = load_file(tmp_path / f"{name}.safetensors")
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                assert (found[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), f"{name}: {key}"

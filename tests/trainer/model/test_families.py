"""Every family: adapters that PEFT loads, merged folders that transformers loads, and parameters that are counted."""

import dpo_trainer.startup  # noqa: F401 - before any module that imports Megatron-Core

# isort: split
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_api.models import FAMILIES, read_config
from dpo_api.sizing import parameters
from dpo_testing.families import (
    HOLDS,
    LABELS,
    LOGITS,
    LOGITS_WITH_LORA,
    PAGE,
    adapter_differences,
    assert_like_the_page,
    rows_of,
    with_rows,
)
from dpo_testing.models import VARIANTS, local_store, reference_model, save_folder, single_process


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with single_process():
        yield


def test_every_family_is_checked() -> None:
    """What runs for each variant, in this folder and in tests/distributed, runs for each family."""
    import transformers

    checked = {getattr(transformers, name).model_type for name, _ in VARIANTS.values()}
    assert checked == FAMILIES.keys()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_peft_and_merged_folders_answer_as_we_do(variant: str, tmp_path: Path) -> None:
    found = adapter_differences(variant, tmp_path)
    assert list(found) == ["PEFT", "transformers, merged", "the trainer, merged"]
    for reader, difference in found.items():
        assert difference <= LOGITS_WITH_LORA, reader
    assert_like_the_page(variant, "lora", max(found.values()))


def test_the_page_has_a_row_of_figures_for_each_variant() -> None:
    """docs/models.md: figures within their bounds, and nothing that fails. `hack/families.py --write` measures them."""
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert set(LABELS) == set(VARIANTS)
    assert [row.label for row in rows] == list(LABELS.values())
    for row in rows:
        assert 0 < float(row.logits) <= LOGITS, row
        assert 0 < float(row.lora) <= LOGITS_WITH_LORA, row
        assert row.there_and_back == row.run == row.run_with_lora == HOLDS, row


def test_rows_are_written_where_they_were() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = rows_of(page)
    assert with_rows(page, rows) == page
    other = replace(rows[3], logits="9.9e-6")
    written = with_rows(page, [other])
    assert rows_of(written) == [*rows[:3], other, *rows[4:]]
    assert written.replace(str(other), str(rows[3])) == page


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_parameters_are_all_counted(variant: str, tmp_path: Path) -> None:
    """The memory model's count is the sum over transformers' parameters, each once."""
    reference = reference_model(variant)
    facts = read_config(local_store(), str(save_folder(reference, tmp_path))).facts
    assert parameters(facts) == sum(parameter.numel() for parameter in reference.parameters())

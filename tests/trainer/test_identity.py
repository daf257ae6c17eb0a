"""Which fields of the spec a checkpoint belongs to."""

import pytest

from dpo_api.errors import IncompatibleCheckpointError
from dpo_api.spec import DPOJobSpec
from dpo_testing.manifests import MINIMAL
from dpo_testing.manifests import spec as spec_with
from dpo_trainer.checkpoint.identity import check_identity, identity_of

MAY_CHANGE = {
    "microBatchSize",
    "packing",
    "prefixSharing",
    "epochs",
    "maxSteps",
    "validationInterval",
    "validateAtStart",
    "limitValidationBatches",
    "earlyStopping",
    "activationRecomputation",
    "maxRunSeconds",
    "deterministic",
}
"""Fields of `training` that a resumed run may change without another trajectory."""


def test_every_field_of_training_is_part_of_the_identity_or_may_change() -> None:
    """A new field must be decided on: forgotten, a checkpoint would resume under another value without an error."""
    spec = DPOJobSpec.model_validate(MINIMAL["spec"])
    identity = {name.split(".")[1] for name in identity_of(spec, model="", data="") if name.startswith("training.")}
    fields = {field.alias or name for name, field in type(spec.training).model_fields.items()}
    assert identity | MAY_CHANGE == fields
    assert not identity & MAY_CHANGE


def test_a_field_that_an_earlier_version_did_not_have_had_its_default() -> None:
    old = identity_of(spec_with({"lora": {}}), model="", data="")
    del old["dpo.labelSmoothing"], old["lora.dropout"]
    check_identity(old, identity_of(spec_with({"lora": {}}), model="", data=""), "x")
    with pytest.raises(IncompatibleCheckpointError, match=r"spec\.dpo\.labelSmoothing was 0\.0, now 0\.1\. Undo"):
        check_identity(old, identity_of(spec_with({"lora": {}, "dpo.labelSmoothing": 0.1}), model="", data=""), "x")
    with pytest.raises(IncompatibleCheckpointError, match=r"spec\.lora\.dropout was 0\.0, now 0\.5\. Undo"):
        check_identity(old, identity_of(spec_with({"lora.dropout": 0.5}), model="", data=""), "x")
    without = identity_of(spec_with({}), model="", data="")
    with pytest.raises(IncompatibleCheckpointError, match=r"spec\.lora was absent, now given\. Undo"):
        check_identity(without, identity_of(spec_with({"lora.rank": 4}), model="", data=""), "x")

"""Which fields of the spec a checkpoint belongs to."""

from dpo_api.spec import DPOJobSpec
from dpo_testing.manifests import MINIMAL
from dpo_trainer.checkpoint.identity import identity_of

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

"""`--set`: paths that exist are set, others get the nearest name; nothing is guessed."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_api.errors import UsageError
from dpo_api.manifest import Document
from dpo_cli.overrides import apply, parse_override
from dpo_testing.cli import Dpo, World


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("training.maxSteps=10", ("spec", "training", "maxSteps"), 10),
        ("spec.training.maxSteps=10", ("spec", "training", "maxSteps"), 10),
        ("training.learningRate=9e-7", ("spec", "training", "learningRate"), 9e-7),
        ("training.maxSteps=null", ("spec", "training", "maxSteps"), None),
        ("data.train[0].uri=s3://a/b?c=d", ("spec", "data", "train", 0, "uri"), "s3://a/b?c=d"),
        ("training.betas[1]=0.95", ("spec", "training", "betas", 1), 0.95),
        ("training.validationInterval=10%", ("spec", "training", "validationInterval"), "10%"),
        ("lora.targetModules=[attention, mlp]", ("spec", "lora", "targetModules"), ["attention", "mlp"]),
        ("reference.cacheURI=/tmp/x", ("spec", "reference", "cacheURI"), "/tmp/x"),
        ("podTemplate.nodeSelector.zone=a", ("spec", "podTemplate", "nodeSelector", "zone"), "a"),
    ],
)
def test_paths_and_values(text: str, path: tuple[Any, ...], value: Any) -> None:
    override = parse_override(text)
    assert (override.path, override.value) == (path, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.maxSteps", "write path=value, such as --set training.maxSteps=10"),
        ("=3", "'' is not a path"),
        ("trainig.maxSteps=3", "there is no spec.trainig; did you mean spec.training?"),
        ("training.max_steps=3", "there is no spec.training.max_steps; did you mean spec.training.maxSteps?"),
        ("training.batch_size=3", "there is no spec.training.batch_size; did you mean spec.training.globalBatchSize?"),
        ("training.foo=3", "there is no spec.training.foo; spec.training has globalBatchSize, "),
        ("data.train.uri=x", "spec.data.train is a list; write spec.data.train[0].uri for its first item"),
        ("dpo[0]=1", "spec.dpo is not a list"),
        ("dpo.beta.x=1", "spec.dpo.beta is a single value and has no field x"),
        ("dpo.beta=[1", "the value is not YAML"),
        ("dpo..beta=1", "is not a path"),
    ],
)
def test_mistakes_name_the_setting_and_the_fix(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_override(text)
    assert str(caught.value).startswith(f"--set {text}: ")
    assert message in str(caught.value)


def laid_over(spec: dict[str, Any], *settings: str) -> dict[str, Any]:
    document = Document({"spec": spec}, "job.yaml")
    result = apply(document, [parse_override(text) for text in settings]).value["spec"]
    assert document.value == {"spec": spec}, "the given document must stay as it is"
    return dict(result)


def test_values_are_set_in_the_document() -> None:
    spec = {"data": {"train": [{"uri": "a"}]}, "dpo": {"beta": 0.1}}
    result = laid_over(spec, "data.train[0].uri=b", "data.train[1].uri=c", "training.maxSteps=5", "dpo.loss=ipo")
    assert result == {
        "data": {"train": [{"uri": "b"}, {"uri": "c"}]},
        "dpo": {"beta": 0.1, "loss": "ipo"},
        "training": {"maxSteps": 5},
    }


def test_the_last_of_two_settings_counts() -> None:
    assert laid_over({}, "dpo.beta=1", "dpo.beta=2") == {"dpo": {"beta": 2}}


def test_an_item_beyond_the_list_is_refused() -> None:
    with pytest.raises(UsageError, match=r"spec.data.train has 1 items, counted from 0"):
        laid_over({"data": {"train": [{"uri": "a"}]}}, "data.train[2].uri=c")


def test_a_bad_value_is_blamed_on_the_command_line_not_on_the_file(world: World, dpo: Dpo) -> None:
    said = dpo("validate", world.write(), "--set", "dpo.beta=high", "--set", "training.epochs=0")
    assert said.code == 2
    assert '  error    spec.dpo.beta: "high" is not a number (from --set)' in said.out
    assert "spec.training.epochs: 0" in said.out


def test_an_unknown_path_ends_the_command(world: World, dpo: Dpo) -> None:
    said = dpo("validate", world.write(), "--set", "dpo.betta=0.2")
    assert (said.code, said.out) == (64, "")
    assert said.err == "error  --set dpo.betta=0.2: there is no spec.dpo.betta; did you mean spec.dpo.beta?\n"

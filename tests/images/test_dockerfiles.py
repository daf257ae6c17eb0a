"""Properties of the two Dockerfiles that hold on every machine, and of the small program that they start with."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dpo_api.version import VERSION
from dpo_operator.backend.launch import PREFIX

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile.operator", "Dockerfile.trainer")
FINAL = {"Dockerfile.operator": ("operator",), "Dockerfile.trainer": ("cpu", "gpu")}
SCRIPT = ROOT / "hack/image/requirements.py"


def instructions(name: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions with their words, comments gone and lines joined."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages(name: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions(name):
        if word == "FROM":
            current = found.setdefault(rest.split(" AS ")[1], [])
        if found:
            current.append((word, rest))
    return found


FINAL_STAGES = [(name, stage) for name in FILES for stage in FINAL[name]]


@pytest.mark.parametrize("name", FILES)
def test_nothing_comes_from_a_shell_piped_from_the_network(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"\b(curl|wget|ADD\s+http)", text)
    assert "# syntax=" not in text, "the frontend of the builder is enough; this line would pull an image"


@pytest.mark.parametrize("name", FILES)
def test_every_base_is_an_argument(name: str) -> None:
    defaults = {rest.partition("=")[0] for word, rest in instructions(name) if word == "ARG"}
    for word, rest in instructions(name):
        if word == "FROM":
            base = rest.split()[0]
            assert base.startswith("${"), f"{base} cannot be replaced where there is no such registry"
            assert base[2:-1] in defaults


@pytest.mark.parametrize("name", FILES)
def test_every_install_from_an_index_is_complete_and_checked_by_hashes(name: str) -> None:
    """pip resolves nothing: what is installed is what the file lists, at its version and with its hash."""
    for stage, steps in stages(name).items():
        installs = [rest for word, rest in steps if word == "RUN" and " install" in rest]
        for rest in installs:
            if "--no-deps --no-index" not in rest:
                assert re.search(r"\$\{HASHES\} --no-deps -r /[a-z-]*requirements[a-z-]*/requirements\.txt", rest), rest
        if any("${HASHES}" in rest for rest in installs) or any("requirements.py" in rest for _, rest in steps):
            arguments = " ".join(rest for word, rest in steps if word == "ARG")
            assert "HASHES=--require-hashes" in arguments.split(), f"{stage} would check nothing"


def test_every_package_of_an_image_has_hashes_and_the_pinned_version() -> None:
    text = (ROOT / "hack/image/hashes.txt").read_text()
    assert "://" not in text, "an address"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    build = {"hatchling", "pathspec", "pluggy", "packaging", "trove-classifiers"}
    found = requirements_module().read_pins(text.splitlines())
    assert len(found) > 100
    for name, pin in found.items():
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in pin.hashes), name
        assert pin.hashes, name
        version = pin.version.partition("==")[2].partition(" ")[0]
        assert version == pins.get(name, version if name in build else None), name


@pytest.mark.parametrize("image", ["operator", "trainer", "trainer-cpu"])
def test_the_lists_hold_everything_that_an_image_s_packages_need(image: str, tmp_path: Path) -> None:
    """Compared with what this environment's packages say of each other."""
    sbom = module("hack/sbom.py")
    wanted = sbom.requirements_of(sbom.IMAGES[image])
    extras = sbom.IMAGES[image].extras
    words = ["--without", *sbom.IMAGES[image].words("--without")] if image == "operator" else []
    listed = {line.partition("==")[0] for line in requirements(tmp_path, "--extra", *extras, *words)}
    assert {str(name) for name in sbom.closure(wanted)} <= listed


def test_hashes_can_be_left_out_for_an_index_with_its_own_builds(tmp_path: Path) -> None:
    lines = requirements(tmp_path, "--extra", "operator", hashes="")
    assert lines
    assert all("==" in line and "--hash" not in line for line in lines)


def module(path: str) -> Any:
    """Import a script of hack."""
    found = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert found is not None
    assert found.loader is not None
    made = importlib.util.module_from_spec(found)
    sys.modules[Path(path).stem] = made
    found.loader.exec_module(made)
    return made


def requirements_module() -> Any:
    return module("hack/image/requirements.py")


@pytest.mark.parametrize(("name", "stage"), FINAL_STAGES)
def test_it_runs_as_a_number_that_is_not_root(name: str, stage: str) -> None:
    users = [rest for word, rest in stages(name)[stage] if word == "USER"]
    assert users, "the base's user would be root"
    user, _, group = users[-1].partition(":")
    assert int(user) > 0, "runAsNonRoot checks a number; a name would be refused by the kubelet"
    assert group == "0", "an arbitrary UID has group 0, so this one is like it"


@pytest.mark.parametrize(("name", "stage"), FINAL_STAGES)
def test_a_change_of_code_or_version_leaves_the_dependencies_alone(name: str, stage: str) -> None:
    steps = stages(name)[stage]
    heavy = next(i for i, (w, r) in enumerate(steps) if w == "RUN" and "-r /requirements" in r)
    code = next(i for i, (w, r) in enumerate(steps) if w == "RUN" and "--no-deps --no-index" in r)
    version = next(i for i, (w, r) in enumerate(steps) if w == "ARG" and r.startswith("VERSION"))
    assert heavy < code < version
    before = [rest for word, rest in steps[:heavy] if word == "COPY"]
    assert all(rest.startswith("--from=requirements") for rest in before), before


@pytest.mark.parametrize(("name", "stage"), FINAL_STAGES)
def test_labels_say_what_it_is(name: str, stage: str) -> None:
    label = next(rest for word, rest in stages(name)[stage] if word == "LABEL")
    for key in ("title", "description", "source", "licenses"):
        assert f"org.opencontainers.image.{key}=" in label
    for key, argument in (("version", "VERSION"), ("revision", "REVISION"), ("created", "CREATED")):
        assert f'org.opencontainers.image.{key}="${{{argument}}}"' in label


@pytest.mark.parametrize("stage", FINAL["Dockerfile.trainer"])
def test_the_trainers_entry_is_what_the_operator_runs(stage: str) -> None:
    entry = next(rest for word, rest in stages("Dockerfile.trainer")[stage] if word == "ENTRYPOINT")
    assert [*json.loads(entry), "launch"] == list(PREFIX)


@pytest.mark.parametrize(("name", "stage"), FINAL_STAGES)
def test_a_read_only_root_is_enough(name: str, stage: str) -> None:
    steps = stages(name)[stage]
    environment = " ".join(rest for word, rest in steps if word == "ENV")
    assert " HOME=/tmp " in f" {environment} ", "an arbitrary UID has no home of its own"
    assert " PYTHONSAFEPATH=1" in environment, "the working directory is writable: nothing is imported from there"
    assert not any(word == "VOLUME" for word, _ in steps)


def test_the_context_is_only_what_is_built() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    copied = {
        source
        for name in FILES
        for word, rest in instructions(name)
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    allowed = {line[1:] for line in lines if line.startswith("!")}
    for source in copied:
        assert any(source.startswith(a) or a.startswith(source) for a in allowed), f"{source} is not in the context"
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(packages["packages"]) <= allowed, "a package of the wheel is not in the context"


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    chart = ROOT / "charts/dpo-operator/Chart.yaml"
    if chart.exists():
        found = re.search(r'^appVersion: "?([^"\s]+)"?$', chart.read_text(), re.MULTILINE)
        assert found is not None
        assert found.group(1) == VERSION


def requirements(tmp_path: Path, *words: str, hashes: str = "--require-hashes") -> list[str]:
    """Return the lines of requirements.txt, each joined with its hashes."""
    run = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *words]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "HASHES": hashes})
    return (tmp_path / "requirements.txt").read_text().replace("\\\n", " ").splitlines()


def test_the_operators_list_holds_no_torch(tmp_path: Path) -> None:
    lines = requirements(tmp_path, "--extra", "operator", "--without", "boto3", "typer")
    names = {re.split(r"[<>=]", line)[0] for line in lines}
    assert {"kopf", "kubernetes", "pydantic", "pydantic-core"} <= names
    assert not names & {"torch", "megatron-core", "boto3", "botocore", "typer"}
    assert all("==" in line and "--hash=sha256:" in line for line in lines)


def test_what_the_base_brings_is_not_touched(tmp_path: Path) -> None:
    """It is not in the list, and pip installs what is listed only; what needs it is still there."""
    lines = requirements(tmp_path, "--extra", "trainer", "--keep", "numpy", "absent-*")
    assert not any(line.startswith("numpy") for line in lines)
    assert any(line.startswith("torch==") for line in lines)
    every = requirements(tmp_path, "--extra", "trainer")
    assert set(every) - set(lines) == {line for line in every if line.startswith("numpy==")} != set()


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_every_writer_of_metrics_is_in_the_trainers_image(stage: str) -> None:
    text = (ROOT / "Dockerfile.trainer").read_text()
    assert (
        '"--extra", "wandb", "mlflow"' in text.partition(f" AS requirements-{stage}")[2].partition(f" AS {stage}\n")[0]
    )


def test_what_is_carried_over_for_a_build_inside_is_what_the_images_install() -> None:
    page = (ROOT / "docs" / "air-gapped.md").read_text()
    found = re.search(r"`pip download -c constraints\.txt '\.\[([a-z,]+)\]' (\S+) ", page)
    assert found is not None
    lists = [
        text for name in FILES for text in re.findall(r'"--extra", ("\w+"(?:, "\w+")*)', (ROOT / name).read_text())
    ]
    installed = {extra for text in lists for extra in re.findall(r"\w+", text)}
    assert installed >= {"operator", "trainer", "mlflow"}
    assert set(found[1].split(",")) >= installed
    assert [found[2]] == tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--extra", "gpus"], "has no 'gpus'"), (["--extra", "operator", "--without", "flask"], "does not ask for flask")],
)
def test_a_wrong_name_stops_the_build(tmp_path: Path, words: list[str], part: str) -> None:
    run = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *words]
    done = subprocess.run(run, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert part in done.stderr


def test_without_a_builder_it_says_what_to_start() -> None:
    environment = {**os.environ, "DOCKER_HOST": "unix:///nonexistent.sock", "BUILDKIT_HOST": "unix:///nonexistent.sock"}
    done = subprocess.run(
        [ROOT / "hack/build-images.sh", "operator"], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "no builder answers" in done.stderr


@pytest.mark.slow
def test_the_operators_modules_need_only_what_its_image_has() -> None:
    """Imports everything of the operator where what the image leaves out cannot be found."""
    text = (
        "import sys\n"
        "for name in 'boto3 botocore zstandard typer rich kubernetes torch'.split(): sys.modules[name] = None\n"
        "import pkgutil, importlib, dpo_operator\n"
        "for module in pkgutil.walk_packages(dpo_operator.__path__, 'dpo_operator.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "import dpo_operator.__main__\n"
    )
    subprocess.run(
        [sys.executable, "-c", text], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "crds:operator"}
    )


@pytest.mark.slow
def test_a_kubeconfig_with_a_program_is_refused_in_one_sentence_where_its_package_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "config"
    user = {"name": "u", "user": {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "true"}}}
    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    kind = {"apiVersion": "v1", "kind": "Config", "current-context": "x"}
    config.write_text(json.dumps({**kind, "users": [user], "clusters": [cluster], "contexts": [context]}))
    packages = tmp_path / "packages"  # this environment without the package, as in the image
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("kubernetes") and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": f"crds:operator:{packages}", "KUBECONFIG": str(config)}
    run = [sys.executable, "-S", "-m", "dpo_operator"]
    done = subprocess.run(run, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dpo-operator: the kubeconfig uses a credential plugin (exec)")
    assert "Traceback" not in done.stderr

"""The real cluster of this machine, with our chart, the quickstart's data and a namespace that trusts nobody."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_testing.jobs import Jobs
from dpo_testing.realcluster import cluster as real
from dpo_testing.realcluster import (
    machine,
    monitoring,
    objectstore,
    release,
    smallworld,
    story,
    trainingoperator,
    watching,
)
from dpo_testing.realcluster.layout import Layout
from dpo_testing.realcluster.steps import Steps

LEFT_OUT = "left out of the short form"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e/" in item.path.as_posix():
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(900))
            item.add_marker(pytest.mark.xdist_group("e2e"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip an optional test in the short form: always with E2E_SHORT, else from the time E2E_FULL_UNTIL on."""
    late = time.time() > float(os.environ.get("E2E_FULL_UNTIL") or "inf")
    if item.get_closest_marker("optional") and (late or os.environ.get("E2E_SHORT")):
        pytest.skip(LEFT_OUT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what the short form left out, as the last thing that is said."""
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [each.nodeid.rpartition("::")[2] for each in skipped if LEFT_OUT in str(each.longrepr)]
    if left_out:
        terminalreporter.write_line(
            f"e2e: short form, for lack of time or with E2E_SHORT; left out: {', '.join(left_out)}"
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail if every test was skipped: that shows nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.option.markexpr == "e2e" and exitstatus == 0 and reporter and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(scope="session")
def cluster() -> Iterator[real.Cluster]:
    given = os.environ.get("E2E_KUBECONFIG")
    if given:
        if lacking := story.lacking():
            pytest.exit(f"E2E_KUBECONFIG needs {', '.join(lacking)} to be set as well; docs/e2e.md", returncode=1)
        with real.existing(Path(given)) as found:
            yield found
        return
    layout = Layout.default()
    up = real.attached(layout)
    if up is None and (why := machine.unsuitable(layout)) is not None:
        pytest.skip(f"no real cluster here: {why}")
    yield up or real.up(layout)


@pytest.fixture(scope="session")
def steps(cluster: real.Cluster) -> Iterator[Steps]:
    yield cluster.steps
    print("\n" + cluster.steps.table())


@pytest.fixture(scope="session")
def nothing_else(cluster: real.Cluster, steps: Steps) -> Iterator[None]:
    """Takes away what an earlier story left in a cluster that stayed up, and leaves nothing in somebody else's."""
    if why := story.refusal(cluster):
        pytest.exit(why, returncode=1)
    story.take_away(cluster)
    yield
    if cluster.given is not None and not os.environ.get("E2E_KEEP"):
        story.take_away(cluster)


@pytest.fixture(scope="session")
def jobs(cluster: real.Cluster, nothing_else: None, steps: Steps) -> Jobs:
    """The namespace of the jobs; model and data lie in the bucket."""
    with steps.step("base model and data into the bucket"):
        smallworld.upload(smallworld.make(cluster.layout), objectstore.server(cluster.layout), objectstore.BUCKET)
    return watching.namespace(cluster, story.JOBS)


@pytest.fixture(scope="session")
def stock(cluster: real.Cluster, nothing_else: None, steps: Steps) -> None:
    """The chart, without its template: training-operator has the init container that it comes with."""
    if cluster.given is None:
        monitoring.install_kinds(cluster)
    with steps.step("chart installed by Helm"):
        release.install(cluster, release.values(init_container=False))


@pytest.fixture(scope="session")
def installed(cluster: real.Cluster, stock: None, steps: Steps) -> None:
    """The chart, and an init container that restricted namespaces admit; a given cluster has that already."""
    if cluster.given is None:
        with steps.step("the chart's template of the init container"):
            release.install(cluster, release.values())
            trainingoperator.restart(cluster)

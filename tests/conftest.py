"""What all tests share: the size of the fault tests, the counts they report, and no deadlines."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

# A test of properties does not fail because the machine is busy with other work.
settings.register_profile("sonde", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sonde")

_COUNTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run the fault tests at the size of a release"
    )
    parser.addoption(
        "--write-golden", action="store_true", help="write the files that pin the log format"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_COUNTS] = Counter()


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Tell whether the fault tests run at the size of a release, and not of every day."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Counter[str]:
    """Count what was tried, such as `counts["kills of the writer"] += 1`; printed at the end."""
    return request.config.stash[_COUNTS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    counts = config.stash[_COUNTS]
    if counts:
        terminalreporter.section("faults survived")
        for what, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:>8,} {what}")

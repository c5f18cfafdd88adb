"""The process that started a training is gone: the same call goes on from the newest checkpoint."""

import os
import signal
from pathlib import Path

import pytest

from tests.faults.counting import Training, expected

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_second_call_goes_on_where_the_first_was_lost(name: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    options = {"cluster": {"num_workers": 2}, "environment": environment, "steps": 300, "pace_s": 0.2}
    first = Training(tmp_path, **options)
    first.wait_for_checkpoint(10)
    first.process.send_signal(getattr(signal, name))
    first.process.wait(60)
    second = Training(tmp_path, **options)
    try:
        result = second.finish()
    finally:
        second.end()
    assert result["total"] == expected(300)
    assert 10 <= result["start"] < 300 and result["start"] % 5 == 0
    assert result["restarts"] == 1

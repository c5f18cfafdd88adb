"""The runner on toy steps: what is skipped, what runs side by side, what a failure leaves."""

import threading
from dataclasses import dataclass

import pytest

from cluster import storage
from pipelines.runner import record
from pipelines.runner.plan import make_plan
from pipelines.runner.scheduler import StepFailed, run_plan
from pipelines.runner.step import Step


@dataclass(frozen=True)
class Toy:
    value: int = 1


def steps(value: int = 1, version: int = 1) -> list[Step]:
    return [
        Step("left", None, Toy(value), code_version=version),
        Step("right", None, Toy()),
        Step("both", None, Toy(), needs=("left", "right")),
    ]


class Executor:
    """Runs steps by name and remembers which."""

    def __init__(self, **behaviour) -> None:
        self.behaviour, self.ran, self.lock = behaviour, [], threading.Lock()

    def __call__(self, planned, inputs):
        with self.lock:
            self.ran.append(planned.step.name)
        storage.write_atomic(storage.join(planned.uri, "output"), b"half")
        self.behaviour.get(planned.step.name, lambda: None)()
        return {"saw": sorted(inputs)}, "tracking-id"


def run(root, executor, **kw):
    return run_plan(make_plan(steps(**kw), str(root)), executor, {"python": "3"})


def test_second_run_does_nothing_and_says_why(tmp_path):
    first = Executor()
    artifacts = run(tmp_path, first)
    assert sorted(first.ran) == ["both", "left", "right"] and artifacts["both"].result == {"saw": ["left", "right"]}
    second = Executor()
    assert run(tmp_path, second) == artifacts and second.ran == []
    assert all(p.why.startswith("unchanged since") for p in make_plan(steps(), str(tmp_path)))


def test_a_changed_setting_runs_its_step_and_what_follows_and_is_named(tmp_path):
    run(tmp_path, Executor())
    plan = {p.step.name: p for p in make_plan(steps(value=2), str(tmp_path))}
    assert plan["right"].done and not plan["left"].done and not plan["both"].done
    assert plan["left"].why == "value: 1 -> 2" and plan["both"].why == "left changed"
    again = Executor()
    run(tmp_path, again, value=2)
    assert sorted(again.ran) == ["both", "left"]
    assert "new code (version 2)" in make_plan(steps(value=2, version=2), str(tmp_path))[0].why


def test_a_step_that_came_or_went_is_named(tmp_path):
    left, right, both = steps()
    run_plan(make_plan([left, right, both], str(tmp_path)), Executor(), {})
    alone = Step("both", None, Toy(), needs=("left",))
    (_, planned) = make_plan([left, alone], str(tmp_path))
    assert not planned.done and planned.why == "without right"
    three = [*steps(value=2), Step("third", None, Toy())]
    three[2] = Step("both", None, Toy(), needs=("left", "right", "third"))
    assert make_plan(three, str(tmp_path))[2].why == "left changed; with third"


def test_independent_steps_run_side_by_side(tmp_path):
    meet = threading.Barrier(2, timeout=10)  # breaks unless both are inside at the same time
    run(tmp_path, Executor(left=meet.wait, right=meet.wait))


def test_a_failure_keeps_what_is_done_and_leaves_no_record_of_its_own(tmp_path):
    def fail():
        raise ValueError("broken corpus")

    with pytest.raises(StepFailed, match="left") as caught:
        run(tmp_path, Executor(left=fail))
    assert "broken corpus" in str(caught.value.__cause__)
    plan = {p.step.name: p for p in make_plan(steps(), str(tmp_path))}
    assert plan["right"].done and not plan["left"].done
    mended = Executor()
    run(tmp_path, mended)
    assert sorted(mended.ran) == ["both", "left"]


def test_half_of_an_interrupted_attempt_is_cleared_unless_the_step_can_resume(tmp_path):
    for resumable in (False, True):
        step = Step("only", None, Toy(), resumable=resumable)
        (planned,) = make_plan([step], str(tmp_path / str(resumable)))
        storage.write_atomic(storage.join(planned.uri, "leftover"), b"x")
        run_plan([planned], Executor(), {})
        assert storage.exists(storage.join(planned.uri, "leftover")) == resumable


def test_what_a_step_goes_on_from_is_kept_until_its_record_stands(tmp_path):
    def interrupt():
        raise OSError("the last upload failed")

    def plan():
        return make_plan([Step("only", None, Toy(), resumable=True, leftovers=("checkpoints", "never"))], str(tmp_path))

    (planned,) = plan()
    storage.write_atomic(storage.join(planned.uri, "checkpoints", "weights"), b"x")
    with pytest.raises(StepFailed):
        run_plan(plan(), Executor(only=interrupt), {})
    assert storage.exists(storage.join(planned.uri, "checkpoints", "weights"))
    run_plan(plan(), Executor(), {})
    assert not storage.exists(storage.join(planned.uri, "checkpoints"))
    assert plan()[0].done


def test_until_takes_a_step_and_what_it_needs(tmp_path):
    assert [p.step.name for p in make_plan(steps(), str(tmp_path), until="left")] == ["left"]
    assert len(make_plan(steps(), str(tmp_path), until="both")) == 3
    with pytest.raises(ValueError, match="unknown step 'middle'; the steps are left, right, both"):
        make_plan(steps(), str(tmp_path), until="middle")


def test_a_record_holds_what_the_fingerprint_was_made_of(tmp_path):
    run(tmp_path, Executor())
    (planned, *_) = make_plan(steps(), str(tmp_path))
    kept = record.read(planned.uri)
    assert (
        kept.payload == planned.payload and kept.tracking_run == "tracking-id" and kept.environment == {"python": "3"}
    )

"""The command: from raw documents and pairs to a working embedding model.

    python pipelines/full.py --recipe demo
    python pipelines/full.py --recipe my.yaml --set pretrain.mlm_ratio=0.3 --until pretrain --root s3://bucket/runs

Steps whose inputs and settings did not change are not run again. Run `--dry-run` to see what would run, and why.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

from cluster import storage, tracking
from pipelines.dag import build, left_out
from pipelines.preflight.run import NoRoom, needs
from pipelines.recipe import RECIPES, load_recipe, named_recipe, origin
from pipelines.report import write_report
from pipelines.runner.fingerprint import differences
from pipelines.runner.outcome import Outcome, attempts
from pipelines.runner.plan import Planned, make_plan
from pipelines.runner.record import Artifact, read
from pipelines.runner.scheduler import StepFailed
from pipelines.tracked import CLOCK, canonical_settings, cause_of, run_tracked


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        root = resolve_root(options.root, options.recipe)
        absent = left_out(recipe)
        if options.until in absent:
            raise ValueError(f"--until {options.until}: {absent[options.until]} leaves {', '.join(absent)} out")
        plan = make_plan(build(recipe), root, options.until)
        tracking_uri = tracking.tracking_uri(root, recipe.tracking.uri)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_plan(plan, absent, root)
    if options.dry_run:
        needs(recipe, plan, lambda line: print(f"  {'needs':<9}{line}"))
        return 0
    try:
        tracker = tracking.open_tracker(
            tracking_uri, recipe.tracking.experiment, storage.join(root, "mlflow-artifacts")
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = origin(options.recipe)
    outcome = Outcome(
        root=root,
        recipe=options.recipe,
        origin=start,
        changes=differences(canonical_settings(named_recipe(start)), canonical_settings(recipe)),
        left_out=absent,
        tracking_uri=tracking_uri,
        steps=attempts(plan),
    )
    try:
        artifacts = run_tracked(recipe, plan, outcome, tracker, insist=options.insist)
    except NoRoom as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StepFailed as failure:
        cause = cause_of(failure)
        if not isinstance(cause, (ValueError, FileNotFoundError, FloatingPointError)):
            traceback.print_exception(cause)
        print(f"error: {failure}: {cause}", file=sys.stderr)
        link_latest(plan, root)
        print("what is finished is kept: the same command goes on from there", file=sys.stderr)
        print(f"look:  {write_report(root)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\ninterrupted; what is finished is kept: the same command goes on from there", file=sys.stderr, flush=True
        )
        os._exit(130)  # threads of running steps wait for the cluster, which ends with this process
    link_latest(plan, root)
    print_outcome(artifacts, tracking_uri)
    print(f"look:  {write_report(root)}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python pipelines/full.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo", help=f"{', '.join(RECIPES)}, or a .yaml file (default: demo)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="override one setting; may be repeated"
    )
    parser.add_argument("--until", metavar="STEP", help="run this step and what it needs, and nothing after it")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, why, and what it needs, and run nothing"
    )
    parser.add_argument(
        "--insist",
        action="store_true",
        help="run although the cluster has too little room by the preflight's arithmetic",
    )
    parser.add_argument(
        "--root", help="folder or s3:// URI for everything that comes out (default: $MOCA_ROOT, or runs/RECIPE)"
    )
    return parser.parse_args(arguments)


def resolve_root(given: str | None, recipe: str) -> str:
    """The root as an absolute path or URI. A Ray job runs in a folder that is removed with it, so its default lies in the home folder."""
    if root := given or os.environ.get("MOCA_ROOT"):
        return storage.absolute(root)
    name = Path(recipe).stem
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return str(Path.home() / "moca-runs" / name)
    return str(Path("runs", name).absolute())


def print_plan(plan: list[Planned], absent: dict[str, str], root: str) -> None:
    print(f"plan for {root}")
    for planned in plan:
        print(f"  {'skip' if planned.done else 'run ':<5}{planned.step.name:<10}{planned.fingerprint}  {planned.why}")
    for name, setting in absent.items():
        print(f"  {'off':<5}{name:<10}{setting}")
    sys.stdout.flush()


def link_latest(plan: list[Planned], root: str) -> None:
    """What is finished also below a path that does not change from run to run; locally."""
    if not storage.is_local(root):
        return
    for planned in plan:
        if read(planned.uri):
            link = Path(root, "latest", planned.step.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(planned.uri, link.parent))


def print_outcome(artifacts: dict[str, Artifact], tracking_uri: str) -> None:
    print(f"\nfinished in {time.perf_counter() - CLOCK:.0f} s")
    if "evaluate" in artifacts:
        print("\n" + storage.read_bytes(artifacts["evaluate"].path("scores.md")).decode())
    for name, artifact in artifacts.items():
        print(f"{name:<10}{artifact.uri}")
    print(f"\nlook:  {tracking.how_to_look(tracking_uri)}")
    if "export" in artifacts:
        print(f'use:   python pipelines/embed.py --model {artifacts["export"].path("model")} "some text" image.png')


if __name__ == "__main__":
    sys.exit(main())

"""A study: a family of recipes, several seeds of each, and what their scores say.

    python pipelines/study.py ablation --recipe demo --seeds 3 --dry-run
    python pipelines/study.py scaling --recipe my.yaml --seeds 3 --root s3://bucket/runs

ablation takes one part of the method away at a time; scaling varies steps, documents, width and batches. All runs share one root, so
a step that several have in common is made once, and the same command goes on where a killed one was. docs/studies.md says more.
"""

import argparse
import os
import sys
from pathlib import Path

from cluster import storage, tracking
from pipelines.evaluation.scoring import METRICS
from pipelines.full import resolve_root
from pipelines.preflight.run import NoRoom
from pipelines.recipe import RECIPES, Recipe, load_recipe
from pipelines.studies.family import FAMILIES, REFERENCE, Run, Variant, runs_of, without_pairs
from pipelines.studies.report import write_report
from pipelines.studies.running import run_all
from pipelines.studies.sharing import plan_of, sharing


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        root = resolve_root(options.root, options.recipe)
        recipe = load_recipe(options.recipe, options.set)
        variants = chosen([*FAMILIES[options.family](recipe), *given(options.without, recipe)], options.only)
        runs = runs_of(options.recipe, options.set, variants, options.seeds)
        print_family(runs, root)
        if options.dry_run:
            return 0
        uri = tracking.tracking_uri(root, recipe.tracking.uri)
        experiment = f"{recipe.tracking.experiment} {options.family}"
        tracker = tracking.open_tracker(uri, experiment, storage.join(root, "mlflow-artifacts"))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    study = tracker.start_run(f"{options.family} of {Path(options.recipe).stem}", tags={"root": root})
    folder = storage.join("studies", options.family)
    status = "FAILED"
    try:
        failures = run_all(
            [] if options.report else runs,
            recipe=options.recipe,
            root=root,
            folder=folder,
            tracking_uri=uri,
            tracker=tracker,
            study=study,
            at_once=options.at_once,
            insist=options.insist,
        )
        folder = storage.join(root, folder)
        print("\n" + write_report(runs, failures, root, folder, study, options.metric))
        print(f"table, pictures and every score: {folder}\nlook:  {tracking.how_to_look(uri)}")
        status = "FAILED" if failures else "FINISHED"
    except NoRoom as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        status = "KILLED"
        tracker.kill_below(study.run_id)
    finally:
        study.finish(status)
    if status == "KILLED":
        print(
            "\ninterrupted; what is finished is kept: the same command goes on from there", file=sys.stderr, flush=True
        )
        os._exit(130)  # threads of running steps wait for the cluster, which ends with this process
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python pipelines/study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("family", choices=FAMILIES)
    add("--recipe", default="demo", help=f"{', '.join(RECIPES)}, or a .yaml file (default: demo)")
    add("--seeds", type=int, default=3, help="runs of every variant, of different seeds (default: 3)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="a setting of all variants; may be repeated",
    )
    add("--at-once", type=int, default=1, help="runs side by side; the cluster must have room for as many (default: 1)")
    add("--only", nargs="+", default=[], metavar="VARIANT", help=f"some of the variants, and {REFERENCE}")
    add(
        "--without",
        action="append",
        default=[],
        metavar="NAME=PATTERN,...",
        help="one more variant, whose fine-tuning leaves out the tasks that match; may be repeated",
    )
    add("--metric", choices=METRICS, help="report by this one (default: the main metric of each task)")
    add("--dry-run", action="store_true", help="print the variants and what would run, and run nothing")
    add("--report", action="store_true", help="run nothing, and report what is finished")
    add(
        "--insist",
        action="store_true",
        help="run although the cluster has too little room by the preflight's arithmetic",
    )
    add("--root", help="folder or s3:// URI for everything that comes out (default: $MOCA_ROOT, or runs/RECIPE)")
    options = parser.parse_args(arguments)
    for name in ("seeds", "at_once"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    return options


def given(pairs: list[str], recipe: Recipe) -> list[Variant]:
    """The variants that --without asks for."""
    variants = []
    for asked in pairs:
        name, separator, patterns = asked.partition("=")
        if not name or not separator or not all(patterns.split(",")):
            raise ValueError(
                f"--without {asked!r}: NAME=PATTERN,... is expected, such as documents=visrag_*,tevatron_colpali"
            )
        variants.append(without_pairs(recipe, name, *patterns.split(",")))
    return variants


def chosen(variants: list[Variant], names: list[str]) -> list[Variant]:
    known = [variant.name for variant in variants]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only {' '.join(unknown)}: no such variant; there are {', '.join(known)}")
    return [variant for variant in variants if not names or variant.name in (REFERENCE, *names)]


def print_family(runs: list[Run], root: str) -> None:
    """Every variant with what it asks and what of it nobody else makes, and the count of it all."""
    plans = {run.name: plan_of(run, root) for run in runs}
    print(f"study below {root}")
    met: set[str] = set()
    for run in runs:
        if run.seed == 0:
            plan = plans[run.name]
            new = [planned.step.name for planned in plan if planned.fingerprint not in met]
            print(
                f"  {run.variant.name:<22}{run.variant.asks}\n{'':<24}{' '.join(run.variant.changes) or 'as the recipe is'}"
            )
            print(f"{'':<24}of its own: {', '.join(new)}; {len(plan) - len(new)} shared with those above")
            met |= {planned.fingerprint for planned in plan}
    seeds = 1 + max(run.seed for run in runs)
    print(
        f"{len(runs)} runs, {seeds} seed(s) of {len(runs) // seeds} variants: {sharing(list(plans.values()))}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

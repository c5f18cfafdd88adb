"""What makes a result the same result, and what must not."""

import shutil

import pytest

from cluster.workers import ClusterConfig
from pipelines.dag import build
from pipelines.recipe import load_recipe, merge
from pipelines.runner.fingerprint import canonical, differences, fingerprint
from pipelines.runner.plan import make_plan
from pipelines.sources import Source, digest


def marks(recipe, root) -> dict[str, str]:
    return {planned.step.name: planned.fingerprint for planned in make_plan(build(recipe), str(root))}


def test_canonical_refuses_what_has_no_canonical_form():
    with pytest.raises(TypeError, match="no canonical form"):
        canonical({"function": len})
    with pytest.raises(TypeError, match="no canonical form"):
        canonical(object())


def test_fingerprint_ignores_the_order_of_keys_and_sees_every_value():
    assert fingerprint(canonical({"a": 1, "b": [2]})) == fingerprint(canonical({"b": [2], "a": 1}))
    assert fingerprint(canonical({"a": 1})) != fingerprint(canonical({"a": 2}))
    assert fingerprint(canonical({"a": 1})) != fingerprint(canonical({"a": 1.5}))


def test_where_a_run_happens_is_no_part_of_it(tmp_path):
    recipe = load_recipe("demo", [])
    elsewhere = merge(recipe, {"cluster": {"num_workers": 1, "zero_stage": 3}, "tracking": {"log_every_steps": 1}}, "")
    assert elsewhere.cluster != ClusterConfig()
    assert marks(recipe, tmp_path / "a") == marks(elsewhere, tmp_path / "b")


def test_a_mask_ratio_changes_pretraining_and_what_follows_and_nothing_before(tmp_path):
    before = marks(load_recipe("demo", []), tmp_path)
    after = marks(load_recipe("demo", ["pretrain.mlm_ratio=0.3"]), tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"pretrain", "finetune", "evaluate", "export"}


def test_data_is_what_it_holds_not_where_it_lies(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "a.parquet").write_bytes(b"one")
    shutil.copytree(here, there)
    assert Source("obelics", str(here)).identity() == Source("obelics", str(there)).identity()
    (there / "a.parquet").write_bytes(b"two")
    digest.cache_clear()
    assert Source("obelics", str(here)).identity() != Source("obelics", str(there)).identity()
    with pytest.raises(ValueError, match="nowhere"):
        Source("obelics", str(tmp_path / "nowhere")).identity()


def test_differences_name_the_field_and_both_values():
    old, new = {"mlm_ratio": 0.4, "deep": {"x": [1, 2]}}, {"mlm_ratio": 0.3, "deep": {"x": [1, 3]}}
    assert differences(old, new) == ["deep.x[1]: 2 -> 3", "mlm_ratio: 0.4 -> 0.3"]
    assert differences({}, {"lora": None}) == [
        'lora: "absent" -> null'
    ]  # a new setting changes the fingerprint, so it is a reason

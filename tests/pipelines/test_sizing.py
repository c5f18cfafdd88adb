"""The closed forms of pipelines/sizing.py against what was counted otherwise: docs/log.md, other arithmetic, the plan itself."""

from dataclasses import fields, replace

import numpy as np
import pytest

from moca_core.spec import BackboneSpec
from pipelines import sizing
from pipelines.recipe import load_recipe
from pipelines.sizing import H100, H200, Constants, Job, Rows, Settings
from pipelines.training.plan import row_plan

SPEC_3B = BackboneSpec(
    model_type="qwen2_5_vl", image_token_id=3, vision_start_token_id=1, vision_end_token_id=2, mask_token_id=4, special_token_ids=(),
    vocab_size=151_936, patch_size_px=14, merge_size=2, temporal_patch_size=2, channels=3, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
    min_image_px=256 * 784, max_image_px=1024 * 784, text_hidden=2048, text_layers=36, text_width=2048, text_kv_width=256,
    text_intermediate=11_008, vision_hidden=1280, vision_layers=32, vision_params_per_layer=4 * 1280**2 + 3 * 1280 * 3420,
    merger_params=5120 * 5120 + 5120 * 2048, vision_full_layers=4, vision_window_px=112, vision_position_side=0,
)  # fmt: skip
SPEC_7B = replace(
    SPEC_3B, vocab_size=152_064, text_hidden=3584, text_layers=28, text_width=3584, text_kv_width=512, text_intermediate=18_944,
    merger_params=5120 * 5120 + 5120 * 3584,
)  # fmt: skip
EVEN = Rows(tokens=8192, image_tokens=4096, flops=216e12, costs=(1.0,) * 4096)
IDEAL = Constants(link_share=1.0, hop_s=0.0)


def job(gpus: int = 8, rows_per_step: int = 64, **changes) -> Job:
    given = {"spec": SPEC_3B, "weights": 3_750_000_000, "rows": EVEN, "gpu": H200}
    return Job(gpus=gpus, rows_per_step=rows_per_step, **(given | changes))


def test_weights_are_those_of_the_published_models():
    assert sizing.weight_count(SPEC_3B, tied=True, decoder_layers=0) == pytest.approx(3.75e9, rel=0.003)
    assert sizing.weight_count(SPEC_7B, tied=False, decoder_layers=0) == pytest.approx(8.29e9, rel=0.003)
    decoder = sizing.weight_count(SPEC_3B, tied=True, decoder_layers=2) - sizing.weight_count(SPEC_3B, tied=True)
    assert decoder == SPEC_3B.text_params_per_layer


def test_traffic_of_a_step():
    """Bytes a weight over a link, less the share that a rank has itself."""
    of = job(gpus=8, rows_per_step=32)  # four micro-batches
    ring = 7 / 8
    expected = {
        (0, "step"): 8,
        (1, "step"): 10,
        (2, "step"): 10,
        (2, "micro_batch"): 34,
        (3, "step"): 20,
        (3, "micro_batch"): 32,
    }
    for (stage, exchange), passed in expected.items():
        link_bytes, _ = sizing.exchanged(of, Settings(stage, exchange, "none"))
        assert link_bytes == pytest.approx(ring * passed * of.weights)
    assert sizing.exchanged(of, Settings(3, "step", "none"))[1] == (36 + 32) * (4 * 2 + 1)
    assert sizing.exchanged(job(gpus=1), Settings(2, "step", "none"))[0] == 0


def test_links_are_as_quick_as_they_are_said_to_be():
    """Two bytes of gradient and two of weights, 15 GB: 33 ms over NVLink, 300 ms over one card of 400 Gb/s."""
    assert sizing.transfer_s(15e9, H200, 8, IDEAL) == pytest.approx(0.033, rel=0.02)
    assert sizing.transfer_s(15e9, H200, 16, IDEAL) == pytest.approx(0.300)
    assert sizing.transfer_s(22.5e9, H100, 8, IDEAL) == pytest.approx(0.050)


def test_latency_grows_with_hops_within_a_node_and_over_nodes():
    constants = Constants(hop_s=1.0)
    assert [sizing.latency_s(gpus, constants) for gpus in (1, 2, 8, 16, 512)] == [0, 1, 7, 8, 70]


def test_compute_and_optimizer_by_hand():
    constants = Constants(achieved=0.65 * 790 / 989, full_work=4 / 3)
    row_s = sizing.row_s(job(), "none", constants)
    assert row_s == pytest.approx(216e12 / (0.65 * 790e12))
    assert 8192 / row_s == pytest.approx(19_400, rel=0.01)  # tokens/s of a GPU at 65 % of 790 TFLOP/s, half of images
    assert sizing.row_s(job(), "full", constants) == pytest.approx(4 / 3 * row_s)
    slow = replace(H200, memory_bytes_per_s=4.3e12)
    assert sizing.optimizer_s(job(gpu=slow), 0, constants) == pytest.approx(0.026, rel=0.02)
    assert sizing.optimizer_s(job(gpu=slow), 2, constants) == pytest.approx(0.026 / 8, rel=0.02)


def test_a_step_is_the_sum_of_its_parts_and_data_waits_only_where_it_is_slower():
    quick = sizing.predict(job(), Settings(2, "step", "none"))
    assert quick.parts["data"] == 0 and quick.step_s == pytest.approx(sum(quick.parts.values()))
    assert quick.tokens_per_s == pytest.approx(64 * 8192 / quick.step_s)
    assert quick.mfu == pytest.approx(64 * 216e12 / quick.step_s / 8 / 989e12)
    starved = sizing.predict(job(), Settings(2, "step", "none"), Constants(data_tokens_per_s=100.0, data_cores=1.0))
    assert starved.parts["data"] + starved.parts["compute"] == pytest.approx(8 * 8192 / 100)


def test_stragglers_are_those_of_the_plan():
    costs = tuple(np.random.default_rng(0).gamma(30, size=640).tolist())
    found = {each: sizing.straggler(costs, 16, 4, each_micro_batch=each) for each in (False, True)}
    slowest, mean = {False: 0.0, True: 0.0}, 0.0
    for step in range(sizing.PLANNED_STEPS):
        dealt = [
            [costs[a["row"]] for a in row_plan(np.array(costs), 16, range(step, step + 1), r, 4, 0)] for r in range(4)
        ]
        slowest[False] += max(map(sum, dealt))
        slowest[True] += sum(max(micro) for micro in zip(*dealt, strict=True))
        mean += sum(map(sum, dealt)) / 4
    assert found == pytest.approx({each: total / mean for each, total in slowest.items()})
    assert 1 < found[False] < found[True]
    assert sizing.straggler(EVEN.costs, 64, 8, each_micro_batch=True) == 1


def test_ranks_without_a_row_make_nothing_faster():
    settings = Settings(2, "step", "none")
    idle, busy = sizing.predict(job(128), settings), sizing.predict(job(64), settings)
    assert idle.parts["compute"] == busy.parts["compute"] and idle.mfu < 0.6 * busy.mfu
    more = sizing.predict(job(128, 128), settings)
    assert more.tokens_per_s == pytest.approx(2 * idle.tokens_per_s, rel=0.01)


def test_what_is_chosen_fits_and_nothing_that_fits_is_faster():
    for of in (job(8), job(64), job(8, gpu=H100), job(8, spec=SPEC_7B, weights=8_500_000_000, gpu=H100)):
        best = sizing.fastest(of)
        assert best.memory_bytes <= of.gpu.memory_bytes
        fitting = [
            p for p in (sizing.predict(of, s) for s in sizing.choices(of)) if p.memory_bytes <= of.gpu.memory_bytes
        ]
        assert best.step_s == min(p.step_s for p in fitting)
    assert sizing.fastest(job(gpu=replace(H100, memory_bytes=10e9))) is None


@pytest.mark.parametrize(("name", "spec", "tied"), [("moca_3b", SPEC_3B, True), ("moca_7b", SPEC_7B, False)])
def test_the_papers_recipes_fit_eight_gpus_of_80_gb(name, spec, tied):
    recipe = load_recipe(name, [])
    given, rows = recipe.cluster, recipe.pretrain.rows_per_step
    of = job(given.num_workers, rows, spec=spec, weights=sizing.weight_count(spec, tied=tied), gpu=H100)
    held_bytes = sizing.predict(of, given).memory_bytes
    assert 0.8 * H100.memory_bytes < held_bytes <= H100.memory_bytes and given.num_workers == 8
    with_more = replace(
        given, activation_checkpointing={"full": "selective", "selective": "none"}[given.activation_checkpointing]
    )
    assert sizing.predict(of, with_more).memory_bytes > H100.memory_bytes


def test_a_slower_network_makes_more_of_what_it_carries():
    slow = replace(H200, network_bytes_per_s=5e9)
    for settings in sizing.choices(job(16)):
        assert sizing.predict(job(16, gpu=slow), settings).step_s > sizing.predict(job(16), settings).step_s
        assert sizing.predict(job(8, gpu=slow), settings).step_s == sizing.predict(job(8), settings).step_s


def test_every_constant_says_where_it_is_from():
    kinds = {f.name: f.metadata["source"].split(":")[0] for f in fields(Constants)}
    assert set(kinds.values()) == {"measured", "published", "assumed", "counted"}

"""The closed forms of pipelines/memory.py against other arithmetic, and against what processes really take."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import memory
from pipelines.memory import MicroBatch, Sharing, Weights
from tests.pipelines.test_sizing import SPEC_3B

ROW = MicroBatch(8192, 4096)


@pytest.mark.parametrize(
    ("checkpointing", "row_gb", "token_kb", "patch_kb"),
    [("none", 71, 134, 61), ("selective", 36, 66, 32), ("full", 3, 4, 3)],
)
def test_layers_keep_what_was_counted_on_a_cpu(checkpointing, row_gb, token_kb, patch_kb):
    """docs/log.md: of a row of 8,192 tokens, half of images, of a token and text layer, of a patch and vision layer."""
    parts = memory.activation_bytes(SPEC_3B, ROW, checkpointing)
    assert round((parts["text layers"] + parts["vision layers"]) / 1e9) == row_gb
    token = parts["text layers"] / 8192 / SPEC_3B.text_layers
    patch = parts["vision layers"] / 4096 / SPEC_3B.group_size / SPEC_3B.vision_layers
    assert token / 1e3 == pytest.approx(token_kb, abs=1) and patch / 1e3 == pytest.approx(patch_kb, abs=1)


def test_what_is_computed_again_is_there_for_one_layer():
    kept, again, whole = (memory.activation_bytes(SPEC_3B, ROW, c) for c in ("none", "full", "full"))
    layer = kept["text layers"] / SPEC_3B.text_layers - whole["text layers"] / SPEC_3B.text_layers
    seen = (kept["vision layers"] - whole["vision layers"]) / SPEC_3B.vision_layers
    assert again["one layer again"] == pytest.approx(max(layer, seen)) and "one layer again" not in kept


def held(stage: int, ranks: int, adds_up: bool = False, precision: str = "bf16") -> float:
    """Bytes a weight, without buffers."""
    state = memory.state_bytes(Weights(10**9, 10**9, 10**8), precision, Sharing(stage, ranks, adds_up))
    return sum(state[name] for name in ("weights", "optimizer", "gradients")) / 1e9


def test_state_is_eighteen_bytes_a_weight_shared_by_stage():
    assert held(0, 1) == held(0, 64) == 18
    assert held(1, 4) == 2 + 12 / 4 + 2
    assert held(2, 4) == 2 + 12 / 4 + 4 / 4
    assert held(3, 4) == 18 / 4
    for stage in (1, 2, 3):  # gradients that add up over micro-batches are whole, and fp32
        assert held(stage, 4, adds_up=True) - held(stage, 4) == pytest.approx(4 - (2 if stage == 1 else 1))
    assert held(0, 1, precision="fp32") == 16 and held(2, 2, precision="fp32") == 4 + 12 / 2 + 4 / 2


def test_frozen_weights_have_neither_gradient_nor_optimizer():
    whole, some = Weights(10**9, 10**9, 10**8), Weights(10**9, 10**8, 10**8)
    parts = memory.state_bytes(some, "bf16", Sharing(0, 1, True))
    assert parts == {"weights": 2e9, "optimizer": 1.2e9, "gradients": 0.4e9}
    assert memory.state_bytes(whole, "bf16", Sharing(2, 4, True, offload_optimizer=True))["optimizer"] == 0
    assert memory.state_bytes(whole, "bf16", Sharing(3, 4, True, True, offload_parameters=True))["weights"] == 0


def test_the_fullest_moment_of_a_step():
    weights, sharing = Weights(1000, 1000, 100), Sharing(2, 2, True)
    state = {"weights": 10.0, "gradients": 100.0, "buckets": 50.0}
    at_the_loss = memory.step_bytes(state, {"text layers": 1000.0}, weights, sharing, 2)
    assert at_the_loss == 10 + 1000 + 100  # what earlier micro-batches left stands beside the last one's activations
    assert memory.step_bytes(state, {"text layers": 1000.0}, weights, sharing, 1) == 10 + 1000
    third = replace(sharing, zero_stage=3)  # has its buckets from the start
    assert memory.step_bytes(state, {"text layers": 1000.0}, weights, third, 2) == 10 + 1000 + 100 + 50
    assert (
        memory.step_bytes(state, {"text layers": 1.0}, weights, sharing, 2) == 10 + 100 + 4 * 100
    )  # the optimizer's turn


def test_logits_and_decoder_take_turns():
    few, many = (
        memory.activation_bytes(SPEC_3B, replace(ROW, masked_words=words, masked_image_tokens=2048), "none")
        for words in (1, 1638)
    )
    assert "logits" not in few and few["decoder"] > 0
    assert many["logits"] == 8 * 1638 * SPEC_3B.vocab_size and many["decoder"] == 0
    gradient = 4 * SPEC_3B.vocab_size * SPEC_3B.text_hidden
    assert many["language head"] == pytest.approx(gradient, rel=0.01)


@pytest.mark.slow
def test_processes_take_what_is_calculated():
    """Exits with 1 where a case is more than a tenth off: pre-training and fine-tuning in one process, ZeRO 2 on two ranks."""
    script = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    done = subprocess.run(
        [sys.executable, str(script), "--only", "0", "2", "4", "7"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr

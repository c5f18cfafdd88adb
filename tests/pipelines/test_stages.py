"""What the workers of a training stage make of its settings, without a cluster and without training."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from cluster import storage
from cluster.workers import ClusterConfig
from moca_core.attention import attention_of
from moca_core.data.codec import from_bytes
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import pack_contents
from moca_core.data.schema import PACKED, PAIRS, pairs_to_table
from moca_core.parity import ParityError, check_attention
from moca_core.spec import BackboneSpec
from moca_core.types import Pair, Segment
from pipelines.runner.record import Artifact
from pipelines.steps import finetune, pretrain
from pipelines.tables import table_writer
from pipelines.training import row_streams
from pipelines.training.pair_streams import make_batch
from pipelines.training.stage import flops_of, write_model
from tests.pipelines.conftest import words

STAGES = {
    "pretrain": (pretrain.worker_main, pretrain.PretrainConfig),
    "finetune": (finetune.worker_main, finetune.FinetuneConfig),
}


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_and_writes_a_model_of_its_attention(
    base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, attention: str
) -> None:
    """Whatever the folder that it starts from declares: here nothing."""
    worker_main, config = STAGES[stage]
    monkeypatch.setattr("pipelines.training.job.run_training", lambda worker, job, config, training: training.objective)
    monkeypatch.setattr("pipelines.training.row_streams.read_table", lambda uri: {"cost_flops": pa.array([1.0, 1.0])})
    job = {
        "config": config(attention=attention),
        "spec": base.result["spec"],
        "model": base.uri,
        "cluster": ClusterConfig(),
        "index": "",
        "files": [],
        "rows_per_group": 1,
        "tokenizer": "",
        "weights": {},
    }
    rows = {"rows_per_file": [2] if stage == "pretrain" else {}}
    objective = worker_main(SimpleNamespace(rank=0, world_size=1), job | rows)
    assert attention_of(objective.encoder.backbone) == attention

    monkeypatch.setattr("cluster.checkpoint.consolidate", lambda folder: objective.state_dict())
    paths = write_model(str(tmp_path), base.uri, attention, None, str(tmp_path / "step"))
    folder = str(tmp_path / "step" / paths["model"])
    check_attention(folder, attention)
    with pytest.raises(ParityError):
        check_attention(folder, "causal" if attention == "bidirectional" else "bidirectional")


def test_a_batch_is_read_from_the_places_of_its_pairs_in_their_order(base: Artifact, tmp_path: Path) -> None:
    """Of several tasks, each in several files."""
    given, files, rows_per_file = {}, {}, {}
    for source in ("a", "b"):
        given[source] = [
            Pair(source, (Segment(text=words(5, n + ord(source))),), ((Segment(text=words(7, n)),),)) for n in range(5)
        ]
        files[source] = [storage.join(str(tmp_path), f"{source}{part}.parquet") for part in (0, 1)]
        for file, part in zip(files[source], (given[source][:2], given[source][2:]), strict=True):
            with table_writer(file, PAIRS, 2) as writer:
                writer.write(pairs_to_table(part))
        rows_per_file[source] = [2, 3]
    order = [("b", 4), ("a", 0), ("a", 3), ("b", 1), ("b", 2)]
    config = finetune.FinetuneConfig(max_tokens=64, task_batches=False)
    spec = BackboneSpec.from_dict(base.result["spec"])
    tokenizer = base.path(base.result["tokenizer"])
    batch = from_bytes(
        make_batch(
            {"step": 7, "pairs": order},
            config=config,
            spec=spec,
            tokenizer=tokenizer,
            files=files,
            rows_per_file=rows_per_file,
            rows_per_group=2,
        )
    )
    expected = collate_pairs(
        [given[source][row] for source, row in order],
        Renderer(load_tokenizer(tokenizer), spec, 64),
        num_negatives=config.num_negatives,
        sources=sorted(files),
        key=(config.seed, 7),
    )
    assert batch.num_queries == 5
    assert batch.stream.input_ids.tolist() == expected.stream.input_ids.tolist()
    assert batch.source.tolist() == expected.source.tolist()
    assert batch.candidate_query.tolist() == expected.candidate_query.tolist()


def packed_rows(base: Artifact, folder: Path) -> tuple[BackboneSpec, dict]:
    """Six packed rows of text, and where `row_streams.make_batch` finds them."""
    spec = BackboneSpec.from_dict(base.result["spec"])
    renderer = Renderer(load_tokenizer(base.path(base.result["tokenizer"])), spec, 64)
    pieces = [p for n in range(6) for p in renderer.pieces((Segment(text=words(40, n)),))]
    rows = [row for _, row in pack_contents(pieces, spec, 64)]
    file = storage.join(str(folder), "rows.parquet")
    with table_writer(file, PACKED, 1) as writer:
        writer.write(pa.Table.from_pylist(rows, schema=PACKED))
    return spec, {"files": [file], "rows_per_file": [len(rows)], "rows_per_group": 1}


def test_the_control_predicts_every_word_of_rows_in_which_nothing_is_masked(base: Artifact, tmp_path: Path) -> None:
    spec, place = packed_rows(base, tmp_path)
    address = {"row": 1, "epoch": 0}
    control = pretrain.PretrainConfig(objective="next_token", attention="causal", mae_ratio=0, mae_weight=0)
    plain, masked = (
        from_bytes(row_streams.make_batch(address, config=config, spec=spec, **place))
        for config in (control, pretrain.PretrainConfig())
    )
    ids = plain.stream.input_ids
    assert spec.mask_token_id not in ids and spec.mask_token_id in masked.stream.input_ids
    text = ~np.isin(ids, spec.special_token_ids)
    text[plain.stream.cu_seqlens[:-1]] = False
    assert np.array_equal(plain.labels, np.where(text, ids, -100)) and text.sum() > 20
    assert (masked.labels >= 0).sum() < text.sum() and control.predicted_share == 1


@pytest.mark.parametrize(
    "change", [{"attention": "bidirectional"}, {"shift": False}, {"mae_ratio": 0.5, "mae_weight": 0.5}]
)
def test_a_control_that_could_see_what_it_predicts_is_refused(change: dict) -> None:
    right = {"objective": "next_token", "attention": "causal", "mae_ratio": 0, "mae_weight": 0}
    with pytest.raises(ValueError, match="set attention=causal, shift=true, mae_ratio=0, mae_weight=0"):
        pretrain.PretrainConfig(**right | change)


def test_less_data_is_some_of_more_data_and_holds_out_the_same() -> None:
    by_share = {
        share: row_streams.rows_of(
            200, pretrain.PretrainConfig(data_fraction=share, validation_fraction=0.1, validate_every_steps=5, seed=3)
        )
        for share in (0.125, 0.5, 1.0)
    }
    kept = {share: set(rows.tolist()) for share, (rows, _) in by_share.items()}
    assert [len(kept[share]) for share in (0.125, 0.5, 1.0)] == [22, 90, 180]
    assert kept[0.125] < kept[0.5] < kept[1.0]
    assert len({tuple(held.tolist()) for _, held in by_share.values()}) == 1
    other = row_streams.rows_of(200, pretrain.PretrainConfig(data_fraction=0.5, seed=4))[0]
    assert set(other.tolist()) != kept[0.5]
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"data_fraction={wrong} must be above 0"):
            pretrain.PretrainConfig(data_fraction=wrong)


def test_flops_are_summed_over_steps_that_rows_are_means_of() -> None:
    """Steps of 1, 2, ... FLOPs, logged at the first, at every fourth and at the last."""
    flops = np.arange(1.0, 11.0)
    ends = [0, 3, 7, 9]
    history = [
        {"step": end, "flops": flops[start : end + 1].mean()} for start, end in zip([0, 1, 4, 8], ends, strict=True)
    ]
    assert flops_of(history) == pytest.approx(flops.sum())

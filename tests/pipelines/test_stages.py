"""What the workers of a training stage make of its settings, without a cluster and without training."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from cluster import storage
from cluster.workers import ClusterConfig
from moca_core.attention import attention_of
from moca_core.data.codec import from_bytes
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.schema import PAIRS, pairs_to_table
from moca_core.parity import ParityError, check_attention
from moca_core.spec import BackboneSpec
from moca_core.types import Pair, Segment
from pipelines.runner.record import Artifact
from pipelines.steps import finetune, pretrain
from pipelines.tables import table_writer
from pipelines.training.pair_streams import make_batch
from pipelines.training.stage import write_model
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

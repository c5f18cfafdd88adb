"""study_gpu: a study on one GPU. A model of 110 M parameters, made from nothing; a run reads tens of millions of tokens.

    python pipelines/study.py ablation --recipe study_gpu --seeds 3 --only no_pretraining mlm_only mae_only next_token

Calculated, never run on a GPU: at a quarter of an H200's peak pre-training takes three minutes and fine-tuning one; with a minute for
starting, writing and scoring, the fifteen runs above take about an hour. The built-in corpus has half a million tokens, which
pre-training then reads a hundred times, with other masks each time: name documents of your own in corpus.sources for a study worth more.
"""

from dataclasses import replace

from cluster.workers import ClusterConfig
from moca_core.bootstrap import TinyConfig
from pipelines.recipe import Recipe, TrackingConfig
from pipelines.recipes import study_cpu
from pipelines.steps.base import BaseConfig
from pipelines.steps.export import ExportConfig
from pipelines.steps.pack import PackConfig


def recipe() -> Recipe:
    small = study_cpu.recipe()
    return replace(
        small,
        pack=PackConfig(max_tokens=2048, row_tokens=16384),
        base=BaseConfig(
            tiny=TinyConfig(
                vocab_size=16384,
                text_hidden=768,
                text_layers=14,
                text_heads=12,
                text_kv_heads=4,
                text_intermediate=2048,
                vision_hidden=384,
                vision_layers=8,
                vision_heads=6,
                vision_intermediate=1536,
                min_image_px=112 * 112,
                max_image_px=280 * 280,
            ),
            max_tokens=16384,
            steps=1500,
            learning_rate=6e-4,
            precision="bf16",
        ),
        pretrain=replace(
            small.pretrain, steps=800, rows_per_step=4, learning_rate=3e-4, precision="bf16", validate_every_steps=100
        ),
        finetune=replace(
            small.finetune, steps=300, batch_size=256, learning_rate=3e-4, precision="bf16", validate_every_steps=50
        ),
        export=ExportConfig(name="moca-study-gpu", max_tokens=2048),
        cluster=ClusterConfig(num_workers=1, gpus_per_worker=1, cpus_per_worker=2, data_tasks_per_worker=4),
        tracking=TrackingConfig(log_every_steps=10, checkpoint_every_steps=200),
    )

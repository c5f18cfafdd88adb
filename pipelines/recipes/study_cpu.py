"""study_cpu: the demo, changed so that a study on two CPU cores can tell its variants apart. A run takes minutes.

    python pipelines/study.py ablation --recipe study_cpu --seeds 3 --only no_pretraining mlm_only mae_only

Why each setting differs from the demo's is in docs/studies.md. All were chosen on what is held out of training, none on the scores.
"""

from dataclasses import replace

from moca_core.bootstrap import TinyConfig
from pipelines.recipe import Recipe, TrackingConfig
from pipelines.recipes import demo
from pipelines.steps.export import ExportConfig


def recipe() -> Recipe:
    quick = demo.recipe()
    return replace(
        quick,
        base=replace(quick.base, steps=1000, tiny=TinyConfig(min_image_px=112 * 112, max_image_px=112 * 112)),
        pretrain=replace(quick.pretrain, steps=300, validate_every_steps=150, reconstructions=2),
        finetune=replace(quick.finetune, steps=120, learning_rate=5e-4, validate_every_steps=40),
        export=ExportConfig(name="moca-study", max_tokens=1024),
        tracking=TrackingConfig(log_every_steps=10, checkpoint_every_steps=200),
    )

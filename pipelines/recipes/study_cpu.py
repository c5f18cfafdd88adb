"""study_cpu: the demo, for studies on two CPU cores. A run takes minutes.

    python pipelines/study.py ablation --recipe study_cpu --seeds 3 --only no_pretraining mlm_only mae_only

Other than in the demo all images have 16 tokens, of which masked patches can be learned in minutes; pre-training is longer than the
base's own training (with a quarter of it no gain is to be seen); fine-tuning is short and gentle enough to keep what came before. Rates
are chosen on what is held out of training, not on scores (docs/log.md); what came of it is in docs/studies.md.
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
        pretrain=replace(quick.pretrain, steps=1200, learning_rate=2e-3, validate_every_steps=150, reconstructions=2),
        finetune=replace(quick.finetune, steps=120, learning_rate=5e-4, validate_every_steps=40),
        export=ExportConfig(name="moca-study", max_tokens=1024),
        tracking=TrackingConfig(log_every_steps=10, checkpoint_every_steps=200),
    )

"""demo: the whole system in minutes on two CPU cores, offline.

Command: make run. A model of 2 M parameters trained from nothing on the documentation, plots and digits that the installation holds.
"""

from cluster.workers import ClusterConfig
from moca_core.objective.contrastive_config import ContrastiveConfig
from pipelines.recipe import Recipe, TrackingConfig
from pipelines.sources import Source
from pipelines.steps.base import BaseConfig
from pipelines.steps.corpus import CorpusConfig
from pipelines.steps.evaluate import EvaluateConfig
from pipelines.steps.export import ExportConfig
from pipelines.steps.finetune import FinetuneConfig
from pipelines.steps.pack import PackConfig
from pipelines.steps.pairs import PairsConfig
from pipelines.steps.pretrain import PretrainConfig


def recipe() -> Recipe:
    builtin = (Source("builtin"),)
    return Recipe(
        corpus=CorpusConfig(sources=builtin),
        pack=PackConfig(max_tokens=1024),
        base=BaseConfig(steps=120, learning_rate=2e-3, seed=0),
        pretrain=PretrainConfig(
            steps=200, learning_rate=1e-3, rows_per_step=2, validation_fraction=0.05, validate_every_steps=50
        ),
        pairs=PairsConfig(train=builtin, evaluate=builtin),
        finetune=FinetuneConfig(
            steps=380,
            learning_rate=2e-3,
            batch_size=32,
            num_negatives=1,
            loss=ContrastiveConfig(
                temperature=0.06
            ),  # at the paper's 0.03 a model this young learns at half the pace (docs/log.md)
            max_tokens=256,
            validation_fraction=0.05,
            validate_every_steps=95,
        ),
        evaluate=EvaluateConfig(max_tokens=256),
        export=ExportConfig(name="moca-demo", max_tokens=1024),
        cluster=ClusterConfig(num_workers=2),
        tracking=TrackingConfig(log_every_steps=10, checkpoint_every_steps=50),
    )

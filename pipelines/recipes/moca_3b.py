"""moca_3b: the paper's recipe for Qwen2.5-VL-3B (arXiv 2506.23115).

    python pipelines/full.py --recipe moca_3b --root s3://YOUR-BUCKET/runs/moca-3b

Numbers marked PAPER are the paper's, CODE are those of the authors' repository where the paper is silent, OURS have
neither source.

Data. Nothing is downloaded: copy the public sets to a bucket and put its name where YOUR-BUCKET stands, here or in a
YAML file of your own (docs/your_own_corpus.md). What the sources hold is part of what identifies a step, so even
--dry-run reads them, and with the placeholder it can only fail.

Hardware. Pre-training: 8 GPUs of 80 GB; more with --set cluster.num_workers=16. Activations of a row of 8,192 tokens,
half of images, are 71 GB, 36 GB with selective and 3 GB with full activation checkpointing (layers of this shape, counted
on a CPU in bf16); weights, gradients and optimizer about 29 GB at stage 2 [calculated]. GPUs of 141 GB do without:
--set cluster.activation_checkpointing=none. docs/clusters.md has settings for other numbers of GPUs. Every worker reads
the base model as fp32 before it converts it: 15 GB of host memory a GPU.

Fine-tuning. 2048 pairs on 8 GPUs are 256 pairs, or 1,024 queries, positives and negatives of about 400 tokens, a GPU: at 4.4 MB of
activations a token (half of images, selective) they would need 1.8 TB at once. GradCache embeds 8,192 tokens at a time
(cluster.tokens_per_forward), which is 36 GB, for the price of a second forward pass [calculated]. GPUs of 141 GB take 16,384.

Time. Pre-training is 3,311 steps of 64 rows of 8,192 tokens, 1.7 billion tokens. docs/clusters.md calculates
hours; none were measured, and the paper states none.
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

BUCKET = "s3://YOUR-BUCKET"  # the placeholder

# CODE: ten sets of the authors, at most 500,000 rows of each, drawn by the seed rather than the first ones.
CPT_ROWS = 500_000
CPT_SETS = (
    "dclm_20b",
    "pixelprose_commonpool",
    "pixelprose_cc12m_sub_005",
    "pixelprose_redcaps_sub_010",
    "MAmmoTH-VL-Instruct-12M",
    "MMEB-train",
    "docmatix",
    "visrag_ind",
    "visrag_syn",
    "tevatron_colpali",
)

# CODE: 27 sets of MoCa-CL-Pairs and three of mmE5-synthetic, at most 50,000 rows of each.
CL_ROWS = 50_000
CL_SETS = (
    *("visrag_ind", "visrag_syn", "tevatron_colpali", "TAT-DQA", "ArxivQA", "InfoSeek_it2t", "InfoSeek_it2it"),
    *("ImageNet_1K", "N24News", "HatefulMemes", "SUN397", "VOC2007", "InfographicsVQA", "ChartQA", "A-OKVQA", "DocVQA"),
    *("OK-VQA", "Visual7W", "VisDial", "CIRR", "NIGHTS", "WebQA", "VisualNews_i2t", "VisualNews_t2i"),
    *("MSCOCO_i2t", "MSCOCO_t2i", "MSCOCO", "Classification", "Retrieval", "VQA"),
)


def recipe() -> Recipe:
    return Recipe(
        corpus=CorpusConfig(
            sources=tuple(Source("moca", f"{BUCKET}/pretrain/{name}", limit=CPT_ROWS) for name in CPT_SETS)
        ),
        # PAPER: maximum length of continual pre-training. OURS: rows of 8,192, as two pages of 1,024 tokens do not fit 2,048.
        pack=PackConfig(max_tokens=2048, row_tokens=8192),
        base=BaseConfig(
            model="Qwen/Qwen2.5-VL-3B-Instruct",  # PAPER
            min_image_px=256 * 28 * 28,  # CODE: 256 to 1,024 tokens an image
            max_image_px=1024 * 28 * 28,
        ),
        pretrain=PretrainConfig(
            steps=3311,  # PAPER
            learning_rate=2e-6,  # PAPER
            warmup_fraction=0.1,  # CODE
            decay="linear",  # CODE
            max_grad_norm=5.0,  # CODE
            precision="bf16",  # CODE
            # OURS: the paper's batch is a cost, 32 GPUs x 4 x 12,800, where an image token counts 4 and a text token 1.
            # Were 70 % of the tokens image tokens, that would be 528,516 tokens a step: 64 rows.
            rows_per_step=64,
            mlm_ratio=0.4,  # PAPER
            mae_ratio=0.5,  # PAPER
            mae_weight=0.5,  # PAPER (CODE: 0.1)
            shift=True,  # PAPER, Eq. 1 (CODE: no shift)
        ),
        pairs=PairsConfig(
            # A folder per set; image paths are relative to the folder that holds the archives, unpacked.
            train=tuple(
                Source("mmeb", f"{BUCKET}/finetune/{name}", images=f"{BUCKET}/finetune/images", limit=CL_ROWS)
                for name in CL_SETS
            ),
            # PAPER: MMEB and ViDoRe v2. Folders called as they are published; without one of them drop it here.
            evaluate=(Source("mmeb", f"{BUCKET}/evaluate/mmeb"), Source("beir", f"{BUCKET}/evaluate/vidore_v2")),
        ),
        finetune=FinetuneConfig(
            steps=977,  # OURS: one pass over about 2 million pairs (PAPER) in batches of 2048
            learning_rate=1e-5,  # PAPER (CODE: 2e-5)
            warmup_fraction=0.05,  # CODE
            decay="linear",  # OURS
            max_grad_norm=5.0,  # CODE
            precision="bf16",  # CODE
            batch_size=2048,  # PAPER
            num_negatives=2,  # PAPER
            loss=ContrastiveConfig(temperature=0.03),  # PAPER
            max_tokens=1280,  # CODE
        ),
        evaluate=EvaluateConfig(max_tokens=1280, prompts="moca-trained"),  # CODE, as layout mmeb reads it
        export=ExportConfig(name="moca-3b", max_tokens=2048),
        cluster=ClusterConfig(
            num_workers=8,
            cpus_per_worker=2,  # the other CPUs of a node mask, decode and render for its GPUs
            gpus_per_worker=1,
            data_tasks_per_worker=4,
            zero_stage=2,
            activation_checkpointing="selective",
            tokens_per_forward=8192,
            worker_start_timeout_s=1800,  # nodes with GPUs take their time to come
        ),
        # OURS: a checkpoint is about 52 GB (weights, masters, moments), at every 15 minutes or so.
        tracking=TrackingConfig(log_every_steps=10, checkpoint_every_steps=200),
    )

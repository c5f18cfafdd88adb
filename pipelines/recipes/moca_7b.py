"""moca_7b: the paper's recipe for Qwen2.5-VL-7B: moca_3b, with the numbers that the paper gives for the larger model.

    python pipelines/full.py --recipe moca_7b --root s3://YOUR-BUCKET/runs/moca-7b

What moca_3b says of the data, of GradCache and of times holds here too. A text token costs 2.3
times as much and an image token 1.7 times, so pre-training takes about twice as long. On each of 8 GPUs weights,
gradients and optimizer take about 64 GB at ZeRO stage 2, activations of a row 3 GB with full checkpointing: 80 GB hold
that, and not the 43 GB of selective (pipelines/sizing.py). 33 GB of host memory are taken while the base model is read.
All of that is calculated, nothing was timed.
"""

from dataclasses import replace

from pipelines.recipe import Recipe
from pipelines.recipes import moca_3b


def recipe() -> Recipe:
    small = moca_3b.recipe()
    return replace(
        small,
        base=replace(small.base, model="Qwen/Qwen2.5-VL-7B-Instruct"),  # PAPER
        pretrain=replace(small.pretrain, mlm_ratio=0.6, mae_ratio=0.6),  # PAPER
        export=replace(small.export, name="moca-7b"),
        cluster=replace(small.cluster, activation_checkpointing="full"),
    )

"""Packed sequences against padded batches: the same documents, the same weights, the same embeddings.

    python benchmarks/packed_forward.py [--model DIR] [--documents 256]

Baseline: transformers' own forward (sdpa) over padded batches of 8 documents in corpus order, the vision tower included. Ours: the packed
encoder over rows of one token budget. Real documents of the built-in corpus; without --model a tiny model of random weights.
Printed: tokens per second of both, their ratio, the share of padding that packing avoids, the largest difference of an embedding.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from transformers import AutoModel

from moca_core import bootstrap
from moca_core.attention import set_attention
from moca_core.data.masking import packed_stream
from moca_core.data.render import Rendered
from moca_core.data.rows import pack_contents, packed_row, sequence_row
from moca_core.embedder import Embedder
from moca_core.model.inputs import to_device
from moca_core.sources.builtin import documents as builtin
from moca_core.types import Content

PADDED_BATCH = 8
REPEATS = 3


def real_contents(count: int) -> list[Content]:
    """Documents of all four kinds, interleaved, so that lengths are as uneven as they really are."""
    by_unit = [[d.content for d in builtin.read_unit(None, unit)] for unit in builtin.list_units()[::4]]
    return [content for row in zip(*by_unit, strict=False) for content in row][:count]


@torch.inference_mode()
def packed(embedder: Embedder, rendered: list[Rendered]) -> np.ndarray:
    vectors = np.empty((len(rendered), embedder.dimension), np.float32)
    for members, row in pack_contents(rendered, embedder.spec, embedder.pack_tokens):
        stream = to_device(packed_stream(row, embedder.spec), embedder.spec, embedder.device)
        vectors[members] = embedder.encoder.embed(stream).float().cpu().numpy()
    return vectors


@torch.inference_mode()
def padded(model, embedder: Embedder, rendered: list[Rendered]) -> tuple[np.ndarray, int]:
    """(embeddings, tokens with padding) by transformers alone; only patches come from this project."""
    vectors, padded_tokens = [], 0
    for start in range(0, len(rendered), PADDED_BATCH):
        batch = rendered[start : start + PADDED_BATCH]
        longest = max(map(len, batch))
        padded_tokens += longest * len(batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, item in enumerate(batch):
            ids[i, : len(item)], mask[i, : len(item)] = torch.tensor(item.input_ids), 1
        row = packed_row([sequence_row(str(i), item) for i, item in enumerate(batch)], embedder.spec)
        stream = to_device(packed_stream(row, embedder.spec), embedder.spec, embedder.device)
        images = (
            {"pixel_values": stream.pixel_values, "image_grid_thw": stream.grid_thw} if len(stream.grid_thw) else {}
        )
        types = (ids == embedder.spec.image_token_id).int()
        ids, mask, types = (x.to(embedder.device) for x in (ids, mask, types))
        states = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **images).last_hidden_state
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors.append(torch.nn.functional.normalize(means.float(), dim=-1).cpu().numpy())
    return np.concatenate(vectors), padded_tokens


def best_time_s(run) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder (default: a tiny one of random weights)")
    parser.add_argument("--documents", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    contents = real_contents(options.documents)
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:
            texts = (segment.text for content in contents for segment in content if segment.text)
            bootstrap.create(folder, texts, bootstrap.TinyConfig(), seed=0)
        embedder = Embedder(options.model or folder, max_tokens=1024, pack_tokens=4096)
        model = (
            AutoModel.from_pretrained(options.model or folder, attn_implementation="sdpa").eval().to(embedder.device)
        )
        for network in (model, embedder.encoder.backbone):
            set_attention(network, "bidirectional")
    rendered = [embedder.renderer.first(content) for content in contents]
    tokens = sum(map(len, rendered))
    ours, (theirs, padded_tokens) = packed(embedder, rendered), padded(model, embedder, rendered)
    packed_s = best_time_s(lambda: packed(embedder, rendered))
    padded_s = best_time_s(lambda: padded(model, embedder, rendered))
    print(f"{len(rendered)} documents, {tokens} tokens, {1 - tokens / padded_tokens:.0%} of a padded batch is padding")
    print(
        f"padded {tokens / padded_s:.0f} tokens/s, packed {tokens / packed_s:.0f} tokens/s, ratio {padded_s / packed_s:.2f}"
    )
    print(f"largest difference of an embedding {np.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    main()

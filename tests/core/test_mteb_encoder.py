"""mteb as the judge: one nDCG by our runner, by mteb with our encoder, and by mteb with sentence-transformers on the export."""

import os

import numpy as np
import pytest
import torch
from samples import image, text, words

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.benchmarks import Prompts
from moca_core.embedder import Embedder
from moca_core.export import export_model
from moca_core.folder import copy_processor
from moca_core.metrics import ranking
from moca_core.mteb_encoder import MtebEncoder
from moca_core.spec import read_spec
from moca_core.types import EvalTask, Query

os.environ.setdefault("HF_HUB_OFFLINE", "1")
NONE = Prompts()
MTEB_ROUNDS = 5.1e-6  # its means, to five digits


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """An exported bidirectional model."""
    trained, out = str(tmp_path_factory.mktemp("trained")), str(tmp_path_factory.mktemp("exported"))
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    save_backbone(model, trained)
    copy_processor(folder, trained)
    export_model(trained, out, read_spec(trained), max_tokens=512, dtype=torch.float32)
    return out


@pytest.fixture(scope="module")
def embedder(exported):
    return Embedder(exported, device="cpu")


def made_up(kind):
    """Queries that choose among pages or texts, some with several right answers of several grades, some from a pool of their own."""
    rng = np.random.default_rng(0)
    texts = tuple((text(f"{n} {words(6, n)}"),) for n in range(24))
    pages = tuple((image(56 + 14 * (n % 3), 84, n),) for n in range(24))
    queries, candidates = {
        "text_to_text": (texts[:9], tuple((text(f"answer {n} {words(9, n + 50)}"),) for n in range(24))),
        "text_to_page": (texts[:9], pages),
        "page_to_text": (pages[:9], texts),
        "page_and_text_to_page": (
            tuple((*page, *words_) for page, words_ in zip(pages, texts[:9], strict=False)),
            pages,
        ),
        "graded": (texts[:9], pages),
        "pools": (texts[:9], pages),
    }[kind]
    made = []
    for n, content in enumerate(queries):
        positives = tuple(sorted(rng.choice(24, 3, replace=False).tolist())) if kind == "graded" else (2 * n,)
        pool = tuple(rng.permutation([2 * n, *range(1, 24, 2)]).tolist()) if kind == "pools" else None
        made.append(Query(content, positives, pool, (1.0, 2.0, 3.0) if kind == "graded" else None))
    return EvalTask(kind, tuple(made), candidates)


def our_ndcg(embedder, task, prompts=NONE, k=5):
    queries = embedder.encode([prompts.put(query.content, query=True) for query in task.queries])
    candidates = embedder.encode([prompts.put(content, query=False) for content in task.candidates])
    scores = []
    for query, vector in zip(task.queries, queries, strict=True):
        pool = list(query.candidates or range(len(candidates)))
        found = ranking(candidates[pool] @ vector, [pool.index(place) for place in query.positives])
        scores.append(found.ndcg(k, query.grades))
    return float(np.mean(scores))


def judged(model, task):
    import mteb

    from tests.mteb_tasks import as_mteb_task

    given = as_mteb_task(task)
    found = mteb.evaluate(model, given, cache=None, encode_kwargs={"batch_size": 4, "show_progress_bar": False})
    return found.task_results[0].get_score()


KINDS = ("text_to_text", "text_to_page", "page_to_text", "page_and_text_to_page", "graded", "pools")


@pytest.mark.parametrize("kind", KINDS)
def test_mteb_finds_our_score_with_our_encoder(embedder, kind):
    task = made_up(kind)
    ours = our_ndcg(embedder, task)
    assert 0 < ours < 1
    assert judged(MtebEncoder(embedder, "moca/test", "1", NONE), task) == pytest.approx(ours, abs=MTEB_ROUNDS)


@pytest.mark.parametrize("kind", KINDS)
def test_mteb_finds_our_score_with_sentence_transformers(embedder, exported, kind):
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformerEncoderWrapper(SentenceTransformer(exported, device="cpu"))
    theirs.mteb_model_meta.modalities = ["text", "image"]
    task = made_up(kind)
    assert judged(theirs, task) == pytest.approx(our_ndcg(embedder, task), abs=MTEB_ROUNDS)


def test_prompts_stand_where_they_do_with_us(embedder):
    task, prompts = made_up("text_to_page"), Prompts(query="Find: ", image="\nRead it.")
    ours = our_ndcg(embedder, task, prompts)
    assert ours != pytest.approx(our_ndcg(embedder, task), abs=1e-3)
    assert judged(MtebEncoder(embedder, "moca/test", "1", prompts), task) == pytest.approx(ours, abs=MTEB_ROUNDS)


def test_a_row_with_nothing_to_read_is_an_error(embedder):
    encoder = MtebEncoder(embedder, "moca/test", "1", NONE)
    with pytest.raises(ValueError, match="neither text nor image"):
        encoder.encode([{"text": ["a", ""]}])

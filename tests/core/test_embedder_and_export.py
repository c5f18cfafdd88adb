"""Vectors do not depend on company, and the exported folder computes the same ones, with the same attention, in other libraries."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import CONTENTS, image, picture, plain_inputs, plain_model, text, words
from transformers import AutoModel, AutoTokenizer

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.embedder import Embedder
from moca_core.export import export_model
from moca_core.folder import copy_processor
from moca_core.parity import LEAST_COSINE, ParityError, check_attention, check_export, comparable
from moca_core.readers import as_message, fits_mteb, with_mteb, with_sentence_transformers, with_transformers
from moca_core.spec import read_spec
from moca_core.types import Segment

BOTH_ORDERS = (
    (text("a red board"),),
    (image(100, 80, 1),),
    (image(100, 80, 2, "RGBA"),),
    (image(60, 60, 3), text("what is this?")),
    (text("before"), image(60, 90, 4, "RGBA"), text("after")),
    (text(words(40)),),
)


def write_trained(start, out, attention):
    """A model folder as a training stage leaves it: everything of `start`, and an attention of its own."""
    model = load_backbone(start)
    set_attention(model, attention)
    save_backbone(model, out)
    copy_processor(start, out)
    return str(out)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    return write_trained(folder, tmp_path_factory.mktemp("trained"), "bidirectional")


@pytest.fixture(scope="module")
def embedder(trained):
    return Embedder(trained, device="cpu")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("exported"))
    export_model(trained, out, read_spec(trained), max_tokens=512, dtype=torch.float32)
    return out


@pytest.fixture
def exported_copy(exported, tmp_path):
    import shutil

    return shutil.copytree(exported, tmp_path / "copy")


def lowest_cosine(a, b):
    return float((a * b).sum(1).min())


@pytest.mark.parametrize("attention", ["bidirectional", "causal", None])
@torch.no_grad()
def test_vectors_are_the_mean_of_a_plain_forward_with_the_folder_s_attention(any_folder, attention, tmp_path):
    """None is a checkpoint that declares nothing, as every base model: it is causal, and is read as that."""
    given = write_trained(any_folder, tmp_path, attention) if attention else any_folder
    embedder = Embedder(given, device="cpu")
    assert embedder.attention == (attention or "causal")
    vectors = embedder.encode(CONTENTS)
    model = plain_model(any_folder, attention != "bidirectional")
    for vector, content in zip(vectors, CONTENTS, strict=True):
        inputs = plain_inputs(embedder.renderer.first(content), any_folder, embedder.spec)
        mean = model(**inputs, use_cache=False).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert vectors.shape == (5, embedder.dimension) and vectors.dtype == np.float32


def test_company_and_order_never_change_a_vector(trained, embedder, monkeypatch):
    contents = [*CONTENTS, *BOTH_ORDERS] * 2
    alone = np.concatenate([embedder.encode([c]) for c in contents])
    together = embedder.encode(contents)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(contents[::-1])[::-1], alone, atol=1e-5)
    small = Embedder(trained, device="cpu", max_tokens=300, pack_tokens=1)
    np.testing.assert_allclose(small.encode(contents), alone, atol=1e-5)
    monkeypatch.setattr("moca_core.embedder.WINDOW", 3)
    np.testing.assert_allclose(embedder.encode(contents), alone, atol=1e-5)
    distinct = alone[: len(contents) // 2]
    assert np.max(distinct @ distinct.T - np.eye(len(distinct))) < 0.9999  # the comparison could have failed


@pytest.mark.parametrize(("pack_tokens", "expected"), [(None, 1024), (60, 60), (5, 20)])
def test_a_pass_has_as_many_tokens_as_wished_whatever_the_longest_input_could_be(
    trained, monkeypatch, pack_tokens, expected
):
    """Contents of up to 20 tokens, where inputs may have 4096."""
    passes = []
    embedder = Embedder(trained, device="cpu", max_tokens=4096, pack_tokens=pack_tokens)
    monkeypatch.setattr(embedder, "_embed", lambda stream: passes.append(len(stream.input_ids)) or 0)
    ids = embedder.renderer.tokenizer.encode(words(400), add_special_tokens=False).ids
    contents = [(text(embedder.renderer.tokenizer.decode(ids[: 1 + n % 20])),) for n in range(150)]
    longest = max(len(embedder.renderer.first(content)) for content in contents)
    embedder.encode(contents)
    assert longest == 20 and 0.9 * expected < max(passes) <= expected


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("beside_a_gpu", [False, True])
def test_threads_side_by_side_change_nothing(trained, embedder, three_threads, beside_a_gpu):
    """Beside a GPU they prepare what one thread embeds, otherwise each embeds packs of its own."""
    contents = [*CONTENTS, *BOTH_ORDERS] * 6
    alone = np.concatenate([embedder.encode([c]) for c in contents])
    many = Embedder(trained, device="cpu", max_tokens=300, pack_tokens=300)
    many.on_gpu = beside_a_gpu
    np.testing.assert_allclose(many.encode(contents), alone, atol=1e-5)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3
    with pytest.raises(ValueError, match=f"content {len(contents)}: empty"):
        many.encode([*contents, ()])
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


@pytest.mark.parametrize("empty", [(), (text(""),)])
def test_empty_content_is_refused_by_its_place(embedder, empty):
    with pytest.raises(ValueError, match="content 2: empty"):
        embedder.encode([CONTENTS[0], CONTENTS[1], empty])


def test_nothing_to_embed(embedder):
    assert embedder.encode([]).shape == (0, 32)


def test_long_content_is_read_up_to_the_budget(folder):
    paragraphs = [words(60, n) for n in range(8)]
    embedder = Embedder(folder, device="cpu", max_tokens=200)
    piece = embedder.renderer.first((text("\n\n".join(paragraphs)),))
    read = embedder.renderer.tokenizer.decode(piece.input_ids)
    assert 0 < len(piece) <= 200 and "\n\n".join(paragraphs).startswith(read)
    vectors = embedder.encode([(text("\n\n".join(paragraphs)),), (text(read),)])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_export_is_equal_in_transformers(exported, embedder):
    model, info = AutoModel.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model.eval()
    expected = embedder.encode(CONTENTS)
    for vector, content in zip(expected, CONTENTS, strict=True):
        inputs = plain_inputs(embedder.renderer.first(content), exported, embedder.spec)
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        assert float(mean @ torch.from_numpy(vector) / mean.norm()) >= 0.9999


def test_export_is_equal_in_sentence_transformers(exported, embedder):
    contents = [*CONTENTS, *BOTH_ORDERS]
    vectors = with_sentence_transformers(exported, contents)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert lowest_cosine(vectors, embedder.encode(contents)) >= 0.9999


def test_plain_inputs_of_sentence_transformers(exported, embedder):
    """A string, an image, a dict: the ways in which people call it, without this project's messages."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(exported, device="cpu")
    assert model.get_embedding_dimension() == 32 and model.max_seq_length == 512
    opened = {m: Image.open(io.BytesIO(image(100, 80, 5, m).image)) for m in ("RGB", "RGBA")}
    given = [
        "a red board",
        " " + words(30) + "\n",
        opened["RGB"],
        opened["RGBA"],
        {"image": opened["RGB"], "text": "what?"},
    ]
    expected = [
        (text("a red board"),),
        (text(" " + words(30) + "\n"),),
        (image(100, 80, 5),),
        (image(100, 80, 5, "RGBA"),),
        (image(100, 80, 5), text("what?")),
    ]
    vectors = np.stack([model.encode(g) for g in given])
    cosines = (vectors * embedder.encode(expected)).sum(1)
    orders = embedder.encode([expected[4], expected[4][::-1]]) @ vectors[4]
    assert min(cosines[:4]) >= 0.9999
    assert max(orders) >= 0.9999  # a dict has no order of its own


def test_the_exported_template_renders_what_was_trained(exported, embedder):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for content in (*CONTENTS, *BOTH_ORDERS):
        said = tokenizer.apply_chat_template(as_message(content), tokenize=False)
        rendered = embedder.renderer.first(content)
        counts = [embedder.spec.image_tokens(g) for g in rendered.grids]
        for count in counts:
            said = said.replace("<|image_pad|>", "\0" * count, 1)
        said = said.replace("\0", "<|image_pad|>")
        assert tokenizer(said, add_special_tokens=False).input_ids == rendered.input_ids


def test_check_export_passes_what_is_equal(any_folder, tmp_path):
    trained, out = write_trained(any_folder, tmp_path / "trained", "bidirectional"), str(tmp_path / "out")
    export_model(trained, out, read_spec(trained), max_tokens=512, dtype=torch.float32)
    lowest = check_export(out, Embedder(trained, device="cpu"), list(BOTH_ORDERS))
    assert set(lowest) == {"packed", "transformers", "sentence_transformers", "mteb"} and min(lowest.values()) >= 0.9999


def disturb(folder, part):
    path = f"{folder}/model.safetensors"
    weights = load_file(path)
    key = next(k for k in weights if part in k)
    weights[key] = weights[key] + torch.randn(weights[key].shape) * weights[key].std() * 2
    save_file(weights, path, metadata={"format": "pt"})


def declare_causal(folder, *levels):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for level in levels:
        (config["text_config"] if level == "text_config" else config)["is_causal"] = True
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("part", ["layers.2.mlp.down_proj", "visual.merger.mlp.2.weight", "embed_tokens"])
def test_check_export_holds_back_disturbed_weights(exported_copy, embedder, part):
    disturb(exported_copy, part)
    with pytest.raises(ParityError, match="cosine to the trained model"):
        check_export(str(exported_copy), embedder, list(BOTH_ORDERS))


def test_check_export_holds_back_another_attention(exported_copy, embedder):
    check_attention(str(exported_copy), "bidirectional")
    with pytest.raises(ParityError, match="declares bidirectional attention, the trained model's is causal"):
        check_attention(str(exported_copy), "causal")
    declare_causal(exported_copy, "config", "text_config")
    with pytest.raises(ParityError, match="cosine to the trained model"):
        check_export(str(exported_copy), embedder, list(BOTH_ORDERS))
    with pytest.raises(ParityError, match="declares causal attention, the trained model's is bidirectional"):
        check_export(str(exported_copy), embedder, [(text("a"),)])  # contents of one token look alike both ways


@pytest.mark.parametrize("level", ["config", "text_config"])
def test_check_export_holds_back_a_folder_whose_levels_disagree(exported_copy, embedder, level):
    """Serving engines read the top level, transformers the other."""
    declare_causal(exported_copy, level)
    with pytest.raises(ParityError, match="declares causal attention, the trained model's is bidirectional"):
        check_export(str(exported_copy), embedder, [(text("a"),)])


def test_check_attention_believes_behaviour_alone(exported, monkeypatch):
    """A transformers that no longer obeys what the folder says."""
    from transformers import AutoModel

    load = AutoModel.from_pretrained

    def disobedient(folder):
        model = load(folder)
        forward = model.forward

        def causal_forward(**inputs):
            model.config.get_text_config().is_causal = True
            return forward(**inputs)

        model.forward = causal_forward
        return model

    monkeypatch.setattr(AutoModel, "from_pretrained", disobedient)
    with pytest.raises(ParityError, match="attention is causal in transformers, the trained model's is bidirectional"):
        check_attention(exported, "bidirectional")


@pytest.mark.parametrize("declared", [True, False])
def test_a_causal_model_is_exported_as_one(folder, tmp_path, declared):
    """Also where the folder says nothing: the exported one says it at both levels."""
    given = write_trained(folder, tmp_path / "given", "causal") if declared else folder
    causal, out = Embedder(given, device="cpu"), str(tmp_path / "out")
    export_model(given, out, read_spec(given), max_tokens=512, dtype=torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["is_causal"] is True and config["text_config"]["is_causal"] is True
    assert min(check_export(out, causal, list(BOTH_ORDERS)).values()) >= 0.9999
    with pytest.raises(ParityError, match="declares causal attention, the trained model's is bidirectional"):
        check_attention(out, "bidirectional")


def test_check_export_holds_back_another_template_or_pooling(exported_copy, embedder):
    pooling = exported_copy / "1_Pooling" / "config.json"
    said = pooling.read_text()
    pooling.write_text(said.replace('"mean"', '"cls"'))
    with pytest.raises(ParityError, match="sentence_transformers"):
        check_export(str(exported_copy), embedder, list(BOTH_ORDERS))
    pooling.write_text(said)
    template = exported_copy / "chat_template.jinja"
    template.write_text("system: be kind\n" + template.read_text())
    with pytest.raises(ParityError, match="sentence_transformers"):
        check_export(str(exported_copy), embedder, list(BOTH_ORDERS))


def test_qwen2_vl_exports_too(qwen2_folder, tmp_path):
    given, out = write_trained(qwen2_folder, tmp_path / "given", "bidirectional"), str(tmp_path / "out")
    export_model(given, out, read_spec(given), max_tokens=512, dtype=torch.float32)
    lowest = check_export(out, Embedder(given, device="cpu"), list(BOTH_ORDERS))
    assert min(lowest.values()) >= 0.9999


def test_a_tokenizer_without_a_mask_token_gets_one(folder_copy, tmp_path):
    """In a folder with a free row, as real checkpoints have."""
    from transformers import AutoModelForImageTextToText

    path = folder_copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|mask|>"]
    path.write_text(json.dumps(tokenizer))
    settings = folder_copy / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    settings.write_text(json.dumps({k: v for k, v in kept.items() if "<|mask|>" not in json.dumps(v)}))
    spec = read_spec(str(folder_copy))
    export_model(str(folder_copy), str(tmp_path / "out"), spec, max_tokens=512, dtype=torch.bfloat16)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.convert_tokens_to_ids("<|mask|>") == spec.mask_token_id
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_every_reader_pads_and_agrees(exported, embedder):
    """One batch of long and short, with and without images, through each library."""
    contents = [*CONTENTS, *BOTH_ORDERS, (text("one"), text("two"))]
    expected = embedder.encode(contents)
    assert lowest_cosine(with_transformers(exported, contents), expected) >= 0.9999
    assert lowest_cosine(with_sentence_transformers(exported, contents), expected) >= 0.9999
    rows = [content for content in contents if fits_mteb(content)]
    assert {len(content) for content in rows} == {1, 2} and len(rows) < len(contents)
    assert lowest_cosine(with_mteb(exported, rows), embedder.encode(rows)) >= 0.9999


def test_what_others_would_cut_or_read_as_special_is_not_compared(exported, trained):
    short = Embedder(trained, device="cpu", max_tokens=160)
    long, marked = (text(words(400)),), (text("a <|image_pad|> in a text"),)
    assert min(check_export(exported, short, [long, marked, (text("a red board"),)]).values()) >= 0.9999
    with pytest.raises(ParityError, match="no content to compare by; each is longer than 160 tokens"):
        check_export(exported, short, [long, marked])


def saved(opened, kind="PNG", **options):
    buffer = io.BytesIO()
    opened.save(buffer, kind, **options)
    return Segment(image=buffer.getvalue())


def test_images_that_others_see_otherwise_are_not_compared(exported, embedder):
    deep = np.linspace(0, 65535, 80 * 80).reshape(80, 80)
    palette = picture(80, 80, 1, "P")
    otherwise = (
        saved(Image.fromarray(deep.astype(np.uint16))),
        saved(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        saved(Image.fromarray(deep.astype(np.float32) / 65535), "TIFF"),
        saved(palette, transparency=3),
        saved(palette, "GIF", transparency=3),
        saved(picture(80, 80, 2), transparency=(0, 0, 0)),
    )
    alike = [(image(80, 80, 3, mode),) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")]
    assert min(check_export(exported, embedder, [*((segment,) for segment in otherwise), *alike]).values()) >= 0.9999
    with pytest.raises(ParityError, match=r"no content to compare by; .* an image that others see otherwise"):
        check_export(exported, embedder, [(text("a"), segment) for segment in otherwise])
    assert all(comparable(content, embedder) for content in alike)


def test_the_gate_of_16_bits_is_wider(trained, embedder, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    export_model(trained, out, read_spec(trained), max_tokens=512, dtype=torch.bfloat16)
    lowest = check_export(out, embedder, list(BOTH_ORDERS))
    assert 0.999 <= min(lowest.values()) < 0.999999
    monkeypatch.setitem(LEAST_COSINE, "bfloat16", 0.999999)
    with pytest.raises(ParityError, match=r"at least 0\.999999 is needed"):
        check_export(out, embedder, list(BOTH_ORDERS))


def test_matryoshka_dimensions_are_where_serving_engines_read_them(trained, tmp_path):
    export_model(
        trained, str(tmp_path), read_spec(trained), max_tokens=512, dtype=torch.float32, matryoshka_dims=(16, 8)
    )
    assert json.loads((tmp_path / "config.json").read_text())["matryoshka_dimensions"] == [8, 16]
    assert AutoModel.from_pretrained(tmp_path).config.matryoshka_dimensions == [8, 16]

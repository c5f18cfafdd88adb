"""Training on documents one by one with stock transformers: the definition that packed training is held against.

Of moca_core only the data side is used here, for token ids and for what is masked. Pixels come from the images themselves by the
processor of transformers, positions from its models, and the losses are the paper's equations, written out.
"""

import copy
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from moca_core.data.masking import mask
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import packed_row, sequence_row
from moca_core.spec import read_spec
from moca_core.types import Pair
from tests.core.samples import image, text, words


class Documents:
    """Documents of all kinds for a model, rendered; the images need no resizing, so that their pixels are nobody's choice."""

    NAMES = ("text", "image", "between", "images", "word")

    def __init__(self, folder):
        self.spec = read_spec(folder)

        def tokens(width, height, seed):
            return image(width * self.spec.factor_px, height * self.spec.factor_px, seed)

        contents = (
            (text(words(30, 1)),),
            (tokens(2, 3, 1),),
            (text(words(5, 2)), tokens(3, 4, 2), text(words(9, 3))),
            (tokens(2, 6, 3), text(words(3, 4)), tokens(6, 5, 4), tokens(2, 2, 5), text(words(12, 5)), tokens(3, 3, 6)),
            (text(words(1, 6)),),
        )
        renderer = Renderer(load_tokenizer(f"{folder}/tokenizer.json"), self.spec, 256)
        self.rows = {n: sequence_row(n, renderer.first(c)) for n, c in zip(self.NAMES, contents, strict=True)}

    def batch(self, *names, mlm_ratio=0.4, mae_ratio=0.5):
        """These documents as one pack, masked."""
        row = packed_row([self.rows[name] for name in names], self.spec)
        return mask(row, self.spec, seed=3, epoch=0, mlm_ratio=mlm_ratio, mae_ratio=mae_ratio)


class Pairs:
    """Pairs of texts and images for a model, with answers that come twice and places without a negative."""

    def __init__(self, folder):
        self.spec = read_spec(folder)
        self.renderer = Renderer(load_tokenizer(f"{folder}/tokenizer.json"), self.spec, 256)

        def seen(seed):
            return text(words(6, seed)), image(2 * self.spec.factor_px, 3 * self.spec.factor_px, seed)

        def read(seed):
            return (text(words(6, seed)),)

        self.pairs = (
            Pair("t", seen(1), (read(2),), (read(3), seen(4))),
            Pair("t", read(5), (seen(6),)),
            Pair("t", read(7), (read(2),), (read(8),)),  # the answer of the first
            Pair("t", read(9), (seen(10),), (read(2), read(11))),  # a negative that is the answer of the first
        )

    def batch(self, numbers=slice(None)):
        return collate_pairs(self.pairs[numbers], self.renderer, num_negatives=2, sources=["t"], key=(0,))


class Stock(torch.nn.Module):
    """The model of transformers, and a decoder of copies of its middle layers; parameters named as those of MaskedModelling."""

    def __init__(self, folder, *, causal=False, depth=1, implementation="sdpa"):
        super().__init__()
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=implementation)
        model.config.text_config.is_causal = causal
        self.encoder, self.lm_head = torch.nn.ModuleDict({"backbone": model.model}), model.lm_head
        layers = model.model.language_model.layers
        decoder = copy.deepcopy(layers[len(layers) // 2 : len(layers) // 2 + depth])
        for layer in decoder:  # eager attention without a mask sees everything
            layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
            layer.self_attn.config._attn_implementation = "eager"
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.patch = 3 * self.processor.patch_size**2
        projection = torch.nn.Linear(model.config.text_config.hidden_size, 4 * self.patch)
        self.mae_decoder = torch.nn.ModuleDict({"layers": decoder, "projection": projection})
        self.image_token_id = model.config.image_token_id

    def inputs(self, ids, images):
        """What the model's forward wants for one document: its token ids and the files of its images."""
        ids = torch.as_tensor(ids, dtype=torch.long)[None]
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == self.image_token_id).int()}
        if images:
            inputs |= self.processor([Image.open(io.BytesIO(file)) for file in images], return_tensors="pt")
        return inputs

    def states(self, inputs):
        """[T, D], after the final norm."""
        return self.encoder["backbone"](**inputs, use_cache=False).last_hidden_state[0]

    def losses(self, document, images, *, shift=True, normalise=False):
        """Sums over one document, a MaskedBatch of its own: Eq. 1 from all logits, Eq. 2 from all tokens painted."""
        inputs = self.inputs(document.stream.input_ids, images)
        masked = torch.from_numpy(document.masked_groups)
        if images:
            patches, original = masked.repeat_interleave(4), inputs["pixel_values"].clone()
            inputs["pixel_values"][patches] = noise(document.noise_seeds[0], original[patches].shape)
        states = self.states(inputs)
        logits, labels = self.lm_head(states), torch.from_numpy(document.labels)
        if shift:
            logits, labels = logits[:-1], labels[1:]
        mlm = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        if not masked.any():
            return {"mlm": mlm, "mae": 0 * mlm}
        target = original[patches].view(-1, 3, 2, self.patch // 3)[:, :, 0].flatten(1)
        if normalise:
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        painted = self.paint(states, inputs)[inputs["input_ids"][0] == self.image_token_id][masked]
        return {"mlm": mlm, "mae": (painted.view(-1, self.patch) - target).pow(2).sum() / self.patch}

    def paint(self, states, inputs):
        """[T, 4 patches]: the decoder over the whole document."""
        backbone = self.encoder["backbone"]
        kinds = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
        states, (positions, _) = states[None], backbone.get_rope_index(**kinds)
        cos_sin = backbone.language_model.rotary_emb(states, positions)
        for layer in self.mae_decoder["layers"]:
            states = layer(states, attention_mask=None, position_embeddings=cos_sin)
        return self.mae_decoder["projection"](states)[0]


def noise(seed, shape):
    """Of the masked patches of a document, from its own seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))


def one_by_one(folder, module, names, *, causal=False, decoder_layers=1, shift=True, normalise_patches=False, **_):
    """(mean losses, gradients by name) of these documents: their sums over the counts of all, weighted as in `module`.

    Of the module only the projection is used, which is new and thus nobody's choice, and of which decoder there is.
    """
    stock, documents = Stock(folder, causal=causal, depth=decoder_layers), Documents(folder)
    if module.mae_decoder is not None:
        stock.mae_decoder["projection"].load_state_dict(module.mae_decoder.projection.state_dict())
    alone = [documents.batch(name) for name in names]
    counts = {
        "mlm": sum((document.labels != -100).sum() for document in alone),
        "mae": 4 * sum(document.masked_groups.sum() for document in alone),
    }
    means = dict.fromkeys(module.weights, 0.0)
    for name, document in zip(names, alone, strict=True):
        images = documents.rows[name]["images"]
        sums = stock.losses(document, images, shift=shift, normalise=normalise_patches)
        terms = {n: sums[n] / max(1, counts[n]) for n in means}
        sum(module.weights[n] * terms[n] for n in means).backward()
        means = {n: means[n] + terms[n].item() for n in means}
    if module.mae_decoder is None:
        del stock.mae_decoder
    return means, gradients(stock)


def pairs_one_by_one(folder, *, temperature, causal=False):
    """The same for pairs: Eq. 3, a query's own answer against the positives and negatives of all, but for the same answer again."""
    stock, given = Stock(folder, causal=causal, implementation="eager"), Pairs(folder)

    def embed(content):
        rendered = given.renderer.first(content)
        mean = stock.states(stock.inputs(rendered.input_ids, rendered.images)).mean(0)
        return mean / mean.norm()

    loss, hits = 0.0, 0
    candidates = [(c, embed(c)) for pair in given.pairs for c in (pair.positives[0], *pair.negatives)]
    for pair in given.pairs:
        query, own = embed(pair.query), embed(pair.positives[0])
        right = (query @ own / temperature).exp()
        wrong = [(query @ vector / temperature).exp() for c, vector in candidates if c != pair.positives[0]]
        loss = loss - (right / (right + sum(wrong))).log() / len(given.pairs)
        hits += bool(right > max(wrong))
    loss.backward()
    means = {"contrastive": loss.item(), "accuracy": hits / len(given.pairs)}
    return means, {n: g for n, g in gradients(stock).items() if n.startswith("encoder")}


def gradients(module):
    """By name, zeros where none came."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}


@dataclass(frozen=True)
class Asked:
    """A query of a contrastive batch: which question it is, of which temperature (a tensor of no dimension)."""

    name: int
    temperature: torch.Tensor
    vector: torch.Tensor


@dataclass(frozen=True)
class Offered:
    """A candidate, listed for the query at `owner` as right or wrong."""

    owner: int
    right: bool
    group: int
    content: int
    vector: torch.Tensor


def is_right(queries, candidates, q, candidate):
    """Whether a candidate is known to answer query q: of the group or the content of one of its own, or an answer to an equal query."""
    own = [c for c in candidates if c.owner == q and c.right]
    same = any(candidate.group == c.group or candidate.content == c.content for c in own)
    return same or (candidate.right and queries[candidate.owner].name == queries[q].name)


def cosine(a, b, width=None):
    a, b = a[:width], b[:width]
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def contrastive_written_out(queries, candidates, *, margin=None, symmetric=False, widths=()):
    """The summed loss of a whole batch, two vectors at a time: Eq. 3 with every option in plain words."""

    def term(near, others, temperature):
        """Minus the log of the share that `near` has among itself and `others`."""
        if margin is not None:
            others = [other for other in others if other <= near + margin]
        return -((near / temperature).exp() / sum((s / temperature).exp() for s in (near, *others))).log()

    total = 0.0
    for width in (None, *widths):
        for q, query in enumerate(queries):
            answers = [c for c in candidates if c.owner == q and c.right]
            wrong = [c for c in candidates if not is_right(queries, candidates, q, c)]
            for answer in answers:
                near = cosine(query.vector, answer.vector, width)
                found = term(near, [cosine(query.vector, c.vector, width) for c in wrong], query.temperature)
                if symmetric:
                    strangers = [b for n, b in enumerate(queries) if not is_right(queries, candidates, n, answer)]
                    back = term(near, [cosine(answer.vector, b.vector, width) for b in strangers], query.temperature)
                    found = (found + back) / 2
                total = total + found / len(answers) / (1 + len(widths))
    return total

"""Position ids are transformers' own, document by document."""

import numpy as np
import pytest
import torch
from samples import CONTENTS, plain_inputs, plain_model, stream_of

from moca_core.data.positions import position_ids


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def model(request, folder, qwen2_folder):
    return plain_model({"qwen2_5_vl": folder, "qwen2_vl": qwen2_folder}[request.param], True)


def test_positions_are_those_of_get_rope_index(model, folder, renderer, spec):
    stream = stream_of(CONTENTS, renderer)
    bounds = list(zip(stream.cu_seqlens[:-1], stream.cu_seqlens[1:], strict=True))
    for content, (start, end) in zip(CONTENTS, bounds, strict=True):
        inputs = plain_inputs(renderer.first(content), folder, spec)
        inputs.pop("pixel_values", None)
        mrope, _ = model.get_rope_index(**inputs)
        np.testing.assert_array_equal(stream.position_ids[1:, start:end], mrope[:, 0].numpy())
        np.testing.assert_array_equal(stream.position_ids[0, start:end], np.arange(end - start))


def test_neighbouring_images_without_text_between_them(model, spec):
    """Not what rendering makes (vision tokens stand between images), but what a row may hold."""
    grids = np.array([[1, 2, 6], [1, 4, 2]])
    ids = np.array([5, 6] + [spec.image_token_id] * 3 + [7] + [spec.image_token_id] * 2 + [8])
    expected, _ = model.get_rope_index(
        torch.tensor(ids)[None],
        mm_token_type_ids=torch.tensor(ids == spec.image_token_id).int()[None],
        image_grid_thw=torch.tensor(grids),
    )
    np.testing.assert_array_equal(position_ids(ids, [len(ids)], grids, spec)[1:], expected[:, 0].numpy())

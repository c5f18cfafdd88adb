"""Position ids of a packed stream: one text row and three rows of mRoPE, starting anew at every sequence."""

import numpy as np

from moca_core.spec import BackboneSpec


def position_ids(input_ids: np.ndarray, lengths: list[int], grids: np.ndarray, spec: BackboneSpec) -> np.ndarray:
    """[4, T] for sequences of `lengths` laid end to end, with `grids` [N, 3] (patches) in order of appearance.

    Text advances all three mRoPE rows by one; an image spans its merged grid and then advances them by its longer side
    (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    is_image = input_ids == spec.image_token_id
    rows, next_image, start = [], 0, 0
    for length in lengths:
        end, position, here = start + length, 0, start
        text_row = np.arange(length)
        mrope = []
        while here < end:
            if is_image[here]:
                time, height, width = (int(n) for n in grids[next_image])
                height, width = height // spec.merge_size, width // spec.merge_size
                grid = np.indices((time, height, width)).reshape(3, -1)
                mrope.append(grid + position)
                position += max(height, width)
                here += grid.shape[1]
                next_image += 1
            else:
                images_ahead = np.flatnonzero(is_image[here:end])
                run = int(images_ahead[0]) if len(images_ahead) else end - here
                mrope.append(np.broadcast_to(np.arange(position, position + run), (3, run)))
                position += run
                here += run
        rows.append(np.concatenate([text_row[None], np.concatenate(mrope, axis=1)]))
        start = end
    return np.concatenate(rows, axis=1).astype(np.int64)

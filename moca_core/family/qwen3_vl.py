"""Qwen3-VL: learned positions for patches, and features of three vision layers added to the first language layers (DeepStack)."""

from moca_core.family import qwen2_vl


def vision_sizes(config) -> dict[str, int]:
    hidden, merged = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
    mergers = 1 + len(config.deepstack_visual_indexes)
    return {
        "vision_hidden": hidden,
        "vision_layers": config.depth,
        "vision_params_per_layer": 4 * hidden**2 + 2 * hidden * config.intermediate_size,
        "merger_params": mergers * (merged * merged + merged * config.out_hidden_size),
        "vision_full_layers": config.depth,
        "vision_window_px": 0,
        "vision_position_side": int(config.num_position_embeddings**0.5),
    }


def tiny_vision(sizes) -> dict:
    """DeepStack from every vision layer but the last, as far as there are language layers to add to; at most three."""
    return {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_heads": sizes.vision_heads,
        "out_hidden_size": sizes.text_hidden,
        "deepstack_visual_indexes": list(range(min(3, sizes.vision_layers - 1, sizes.text_layers))),
    }


def vision_inputs(grids, spec) -> dict:
    """As Qwen2-VL, and from which learned positions, with which weights, the position of a patch is interpolated."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    indices, weights = get_vision_interpolation_indices_and_weights(
        grids, spec.vision_position_side, align_corners=True, spatial_merge_size=spec.merge_size
    )
    return qwen2_vl.vision_inputs(grids, spec) | {"interp_indices": indices, "interp_weights": weights}

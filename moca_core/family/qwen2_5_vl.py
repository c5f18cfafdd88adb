"""Qwen2.5-VL: most vision layers see windows of the image, a few see all of it (arXiv 2502.13923)."""

from moca_core.family import qwen2_vl


def vision_sizes(config) -> dict[str, int]:
    hidden, merged = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
    return {
        "vision_hidden": hidden,
        "vision_layers": config.depth,
        "vision_params_per_layer": 4 * hidden**2 + 3 * hidden * config.intermediate_size,
        "merger_params": merged * merged + merged * config.out_hidden_size,
        "vision_full_layers": len(config.fullatt_block_indexes),
        "vision_window_px": config.window_size,
        "vision_position_side": 0,
    }


def tiny_vision(sizes) -> dict:
    """Every second layer sees the whole image."""
    return {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_heads": sizes.vision_heads,
        "out_hidden_size": sizes.text_hidden,
        "fullatt_block_indexes": list(range(1, sizes.vision_layers, 2)),
    }


def vision_inputs(grids, spec) -> dict:
    """As Qwen2-VL, and the order of patches by windows with where these begin and end."""
    from transformers.vision_utils import get_vision_window_index

    window_index, cu_window_seqlens = get_vision_window_index(
        grids, spec.merge_size, spec.vision_window_px, spec.patch_size_px
    )
    return qwen2_vl.vision_inputs(grids, spec) | {
        "window_index": window_index,
        "cu_window_seqlens": cu_window_seqlens,
        "max_window_seqlen": int((cu_window_seqlens[1:] - cu_window_seqlens[:-1]).max()),
    }

"""Qwen2-VL: every vision layer sees the whole image (arXiv 2409.12191)."""


def vision_sizes(config) -> dict[str, int]:
    hidden, merged = config.embed_dim, config.embed_dim * config.spatial_merge_size**2
    return {
        "vision_hidden": hidden,
        "vision_layers": config.depth,
        "vision_params_per_layer": 4 * hidden**2 + 2 * hidden * int(hidden * config.mlp_ratio),
        "merger_params": merged * merged + merged * config.hidden_size,
        "vision_full_layers": config.depth,
        "vision_window_px": 0,
        "vision_position_side": 0,
    }


def tiny_vision(sizes) -> dict:
    """Raises ValueError where the inner size of a layer is not a whole number of times the hidden size, as its config says it."""
    ratio, rest = divmod(sizes.vision_intermediate, sizes.vision_hidden)
    if rest or not ratio:
        multiples = [sizes.vision_hidden * times for times in (ratio, ratio + 1) if times]
        raise ValueError(
            f"vision_intermediate={sizes.vision_intermediate} must be a multiple of vision_hidden={sizes.vision_hidden} in qwen2_vl, "
            f"such as {' or '.join(map(str, multiples))}"
        )
    return {
        "depth": sizes.vision_layers,
        "embed_dim": sizes.vision_hidden,
        "hidden_size": sizes.text_hidden,
        "mlp_ratio": ratio,
        "num_heads": sizes.vision_heads,
    }


def vision_inputs(grids, spec) -> dict:
    """Positions of patches, and where images begin and end."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    return {
        "position_ids": get_vision_position_ids(grids, spec.merge_size),
        "cu_seqlens": get_vision_cu_seqlens(grids),
        "max_seqlen": int((grids[:, 1] * grids[:, 2]).max()),
    }

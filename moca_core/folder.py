"""The files of a model folder that training never changes: tokenizer and image processor."""

import shutil
from pathlib import Path

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def copy_processor(source: str, target: str) -> None:
    """Copies whichever of these files the source folder has."""
    for name in PROCESSOR_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(target) / name)

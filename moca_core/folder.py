"""The files of a model folder: those that training never changes, and what makes the model this one."""

import hashlib
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


def model_digest(folder: str) -> str:
    """64 hex digits that stand for a model: of the bytes of its weights, configs and tokenizer, wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt"):
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()

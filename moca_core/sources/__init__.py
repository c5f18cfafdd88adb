"""One small adapter per public layout of documents or pairs.

A document adapter is a module with two functions:

    list_units(fs, path) -> list[dict]            what can be read apart from each other (a file, a row group): cheap, no data read
    read_unit(fs, unit) -> Iterator[Document | Rejected]

A pair adapter is a module with

    list_units(fs, path) -> list[dict]
    read_pairs(fs, unit) -> Iterator[Pair | Rejected]
    read_tasks(fs, path) -> Iterator[EvalTask]    (for layouts that hold evaluation data)

`fs` is a pyarrow FileSystem and `path` a path on it; a unit is a dict of literals, so that it can travel to another process.
Adapters turn a layout into documents or pairs and nothing more: checking images and bounds is `data/validate.py`.
"""

"""The stream in front of training: Ray Data over the addresses of a plan."""

from collections.abc import Callable, Iterator

from cluster.placement import on_cpus
from moca_core.data.codec import from_bytes
from moca_core.types import MaskedBatch, PairBatch

ADDRESSES_PER_TASK = 4  # batches that one Ray Data task makes: small enough to start at once
PREFETCH_BYTES = 256 * 2**20  # of batches that wait for a rank: without a bound, half of the cluster's object store


def open_stream(
    addresses: list[dict], make_batch: Callable[[dict], bytes], *, tasks: int
) -> Iterator[tuple[int, list[MaskedBatch | PairBatch]]]:
    """(global step, its micro-batches) in the order of `addresses`, made by Ray Data ahead of the training step, `tasks` at a time.

    The tasks want CPUs alone, so they run on machines that do not train first, where a cluster has such.
    """
    import ray.data
    from ray.data import ExecutionResources, TaskPoolStrategy

    if not addresses:
        return
    blocks = -(-len(addresses) // ADDRESSES_PER_TASK)
    items = [{"address": number} for number in range(len(addresses))]
    dataset = ray.data.from_items(items, override_num_blocks=blocks)
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=PREFETCH_BYTES)
    pool = TaskPoolStrategy(size=tasks)
    dataset = dataset.map(_MakeRow(addresses, make_batch), num_cpus=0.25, compute=pool, **on_cpus())
    step, batches = addresses[0]["step"], []
    for row in dataset.iter_rows():
        if row["step"] != step:
            yield step, batches
            step, batches = row["step"], []
        batches.append(from_bytes(row["batch"]))
    yield step, batches


class _MakeRow:
    """One address to one row. Addresses travel by number: their nested lists would come back from Arrow in other shapes."""

    def __init__(self, addresses: list[dict], make_batch: Callable[[dict], bytes]) -> None:
        self.addresses, self.make_batch = addresses, make_batch

    def __call__(self, item: dict) -> dict:
        address = self.addresses[item["address"]]
        return {"step": address["step"], "batch": self.make_batch(address)}

"""Sorting vectors into the cells of a FAISS structure on several machines: trained once, filled in parts, merged.

Each part goes into an empty copy of the trained structure, on some node, and the parts are merged in their order. Their
quantisers are the same, so the result is what one process makes by adding all vectors itself.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from index.ann import Fill, add_vectors, installed_faiss
from index.cluster import nodes_of

FEWEST = 65_536  # vectors of a part
PARTS_AHEAD = 2  # for each node: one that is filled and one that is merged
log = logging.getLogger("cots")


def fill_part(empty: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Add vectors to an empty structure.

    Args:
        empty: the trained structure, as FAISS serialises it, uint8.
        vectors: (N, D) float16 or float32.

    Returns:
        the filled structure, serialised.
    """
    faiss = installed_faiss()
    structure = faiss.deserialize_index(empty)
    add_vectors(structure, vectors)
    return faiss.serialize_index(structure)


def cluster_fill(ray: Any) -> Fill:
    """Fills structures on all nodes of the cluster that Ray's module is connected to.

    A part that is lost with its node is done again by another. If the nodes cannot, this machine does it alone.
    """

    def fill(structure: Any, vectors: np.ndarray) -> None:
        cpus = [node.cpus for node in nodes_of(ray)]
        task = ray.remote(fill_part).options(num_cpus=min(cpus), scheduling_strategy="SPREAD")
        empty = ray.put(installed_faiss().serialize_index(structure))
        size = max(FEWEST, -(-len(vectors) // (4 * len(cpus))))
        ahead = PARTS_AHEAD * len(cpus)
        try:
            merge_parts(structure, vectors, size, lambda part: task.remote(empty, part), ray.get, ahead)
        except ray.exceptions.RayError as error:
            log.warning("The cluster cannot fill the search structure (%s); this machine does it.", error)
            structure.reset()
            add_vectors(structure, vectors)

    return fill


def merge_parts(
    structure: Any,
    vectors: np.ndarray,
    size: int,
    submit: Callable[[np.ndarray], Any],
    result: Callable[[Any], np.ndarray],
    ahead: int,
) -> None:
    """Have parts of vectors filled, and merge them in their order, so that each row has the number of its vector.

    Args:
        structure: trained and empty.
        vectors: (N, D).
        size: vectors of a part.
        submit: begins `fill_part` somewhere.
        result: waits for what it gives.
        ahead: parts that are begun and not merged.
    """
    running: deque[Any] = deque()

    def merge_first() -> None:
        part = installed_faiss().deserialize_index(result(running.popleft()))
        structure.merge_from(part, structure.ntotal)

    for start in range(0, len(vectors), size):
        if len(running) == ahead:
            merge_first()
        running.append(submit(vectors[start : start + size]))
    while running:
        merge_first()

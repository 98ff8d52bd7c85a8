"""Ray clusters of several nodes on this machine; each node is processes of its own."""

from contextlib import contextmanager

import psutil
from ray.cluster_utils import Cluster

STORE = 100 * 2**20


def tree(node):
    """Return the processes of a node with their children."""
    owned = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    return [each for own in owned for each in (own, *own.children(recursive=True))]


class Nodes:
    """A head without processors, and nodes with one each."""

    def __init__(self, count):
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE},
        )
        self.address = self.cluster.address
        self.head = self.cluster.head_node
        self.nodes = [self.add() for _ in range(count)]

    def add(self):
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False)

    def kill(self, node):
        """Kill every process of a node at once, as a power failure does."""
        for process in tree(node):
            process.kill()
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def nodes(count):
    running = Nodes(count)
    try:
        yield running
    finally:
        running.cluster.shutdown()

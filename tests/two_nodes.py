"""A Ray cluster of two nodes on one machine, the second with an empty disk of its own in place of a folder.

    python -m tests.two_nodes FOLDER JOB_WORDS...

runs a job there as `python -m pipelines JOB_WORDS...` does, and ends with its exit code. Both nodes end with this
process. A mount namespace gives the second node its own disk, which takes root; without FOLDER ("") it sees all.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

START_TIMEOUT_S = 90


def main(folder: str, words: list[str]) -> int:
    import ray
    from ray.cluster_utils import Cluster

    from pipelines.__main__ import main as command

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 200 * 2**20})
    start = [str(Path(sys.executable).parent / "ray"), "start", f"--address={cluster.address}", "--block"]
    start += ["--num-cpus=4", f"--object-store-memory={200 * 2**20}"]
    if folder:
        start = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', folder, *start]
    node = subprocess.Popen(start, stdout=subprocess.DEVNULL)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        ray.init(logging_level="warning")
        until = time.monotonic() + START_TIMEOUT_S
        while len([one for one in ray.nodes() if one["Alive"]]) < 2:
            assert node.poll() is None and time.monotonic() < until, "the second node did not come up"
            time.sleep(0.2)
        return command(words)
    finally:
        ray.shutdown()
        node.terminate()
        node.wait(20)
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

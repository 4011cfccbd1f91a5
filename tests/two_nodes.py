"""A job on a Ray cluster of two nodes on one machine, the second with an empty disk of its own in place of a folder.

    python -m tests.two_nodes FOLDER JOB_WORDS...

runs a job there as `python -m pipelines JOB_WORDS...` does, and ends with its exit code. Both nodes end with this
process. A mount namespace gives the second node its own disk, which takes root; without FOLDER ("") it sees all.
"""

import os
import sys

from tests.cluster import Nodes


def main(folder: str, words: list[str]) -> int:
    import ray

    from pipelines.__main__ import main as command

    with Nodes(folder, head_cpus=4) as nodes:
        nodes.add(4)
        os.environ["RAY_ADDRESS"] = nodes.address
        try:
            ray.init(logging_level="warning")
            return command(words)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

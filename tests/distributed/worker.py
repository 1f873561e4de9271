"""One rank of tests/distributed/ranks.py."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import lattice


class Collectives(TorchDispatchMode):
    """Counts what the ranks do together."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def main():
    plan = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    said = {}
    for name, recipe in json.loads(plan.read_text()).items():
        counted = Collectives()
        try:
            with counted:
                said[name] = {"summary": lattice.train(recipe, out=plan.parent / name)}
        except (ValueError, OSError) as error:
            said[name] = {"error": type(error).__name__, "message": str(error)}
        said[name]["collectives"] = counted.counts
    (plan.parent / f"rank{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

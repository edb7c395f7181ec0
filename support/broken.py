"""The broken samples that a run meets: counted, the first ones named, and the run stopped if there
are too many."""
from collections import Counter

import torch.distributed as dist
from tqdm import tqdm

from support.weights import InputError

NAMED = 5  # broken samples that are named on the screen after each start
FEW = 1000  # their share is taken of so many samples at least: 10 are no alarm at the start


class Broken:
    """Counts by kind, over all processes and since the run began: a resumed run goes on with what
    log.jsonl holds. A sample counts each time it is drawn."""

    def __init__(self, rows, max_share, line, world=1):
        """rows: samples a step, those of all processes; line: the last line of log.jsonl, or {}."""
        self.rows, self.max_share, self.world = rows, max_share, world
        self.counts = Counter(line.get("broken", {}))
        self.new, self.named = [], 0

    def add(self, found):
        """found: (place, kind, reason) of samples that this process met."""
        self.new += found

    def gather(self):
        """Add what all processes met since the last call. Every process calls it.
        -> what log.jsonl shows: {"broken": {kind: count}}, or {} if there are none"""
        parts = [self.new]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, self.new)
        self.new = []
        for place, kind, reason in sum(parts, []):
            self.counts[kind] += 1
            self.named += 1
            first_process = self.world == 1 or dist.get_rank() == 0
            if first_process and self.named <= NAMED:
                tqdm.write(f"broken, another takes its place: {place}: {kind} ({reason})")
        return {"broken": dict(self.counts)} if self.counts else {}

    def check(self, step):
        """Stop the run if too much was broken of what was read up to this step."""
        bad = self.counts.total()
        read = step * self.rows + bad
        if bad > self.max_share * max(read, FEW):
            raise InputError(
                f"step {step}: {self}, more than --max-bad {self.max_share:g} allows; look at the "
                f"shards named above, or give a higher --max-bad: the same command goes on from "
                f"the last checkpoint")

    def __str__(self):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return f"{self.counts.total()} samples were broken ({kinds})"

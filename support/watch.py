"""Over-optimisation, seen while it happens: every so many steps the EMA student draws a few prompts
that are held out, and the reward that is maximised and a judge that no training sees score them."""
import contextlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from support import cli, metrics
from support.weights import read_json, write_whole

PROMPTS = 64  # that are drawn


class Watch:
    """reward: None for a run without. file: keeps every look's scores, so that a run that goes on
    compares with those before."""

    def __init__(self, file, prompts, reward, judge, start):
        self.file, self.prompts, self.looks = Path(file), list(prompts)[:PROMPTS], {}
        self.rewards = {"judge": judge} if reward is None else {"reward": reward, "judge": judge}
        kept = read_json(self.file) if start > 0 and self.file.is_file() else {}
        if kept.get("prompts") == self.prompts:
            self.looks = {int(step): scores for step, scores in kept["looks"].items()
                          if int(step) <= start}

    @torch.no_grad()
    def __call__(self, step, model, student, w, writes=True):
        """Draw and score -> {"reward", "judge": means}; what no process but the first needs is
        left to it (writes). Nothing of the run's randomness is used, nothing is compiled."""
        with torch.compiler.set_stance("force_eager"):
            images = model.draw(student, self.prompts, range(len(self.prompts)), 2, w)
            if not writes:
                return {}
            scores = {name: self.score(name, reward, images, model)
                      for name, reward in self.rewards.items()}
        warning = over_optimised(self.looks, scores)
        if warning:
            tqdm.write(f"step {step}: {warning}")
        self.looks[step] = scores
        kept = {"prompts": self.prompts, "looks": self.looks}
        write_whole(self.file, json.dumps(kept) + "\n")
        return {name: sum(values) / len(values) for name, values in scores.items()}

    def score(self, name, reward, images, model):
        # the run's reward has weights in the run's precision, the judge in float32
        precise = name == "judge"
        with contextlib.nullcontext() if precise else cli.autocast(model.device, model.dtype):
            parts = [reward(part, self.prompts[i * 16:i * 16 + 16])
                     for i, part in enumerate(images.split(16))]
        return torch.cat(parts).tolist()


def over_optimised(looks, now):
    """{step: {"reward", "judge": scores of the same prompts}} of the looks before, and of now -> a
    warning, or None: since the look that the judge liked best, the reward's mean has risen and
    the judge's has fallen, its 95% interval paired by prompts below 0."""
    if not looks or "reward" not in now:
        return None
    best = max(looks, key=lambda step: sum(looks[step]["judge"]))
    change = {}
    for name in ("reward", "judge"):
        before = looks[best].get(name)
        if before is None or len(before) != len(now[name]):
            return None
        pairs = zip(now[name], before)
        change[name] = metrics.interval([after - was for after, was in pairs])
    (gain, _, _), (loss, _, high) = change["reward"], change["judge"]
    if high is None or gain <= 0 or high >= 0:
        return None
    return (f"the reward has risen by {gain:.4f} since step {best}, and the judge fallen by "
            f"{-loss:.4f}, beyond its noise, on {len(now['judge'])} held-out prompts: the student "
            "may be learning to please the reward alone; a lower --reward-scale or fewer steps "
            "may serve better")

"""The rows of an evaluation's table, as evaluate.py's --rows names them."""
import os
from dataclasses import dataclass
from pathlib import Path

from support.cli import require

EXPECTED = ("expected teacher@STEPS, student@STEPS, PATH@STEPS, NAME=PATH+PATH@STEPS, folder:PATH, "
            "real or round-trip")
REAL = {"real": "real pictures", "round-trip": "real, through the VAE"}


@dataclass
class Row:
    """A row that is to be measured. kind: teacher, student, folder, real, round-trip, recorded.

    paths: of its UNets, one a training seed, whose configs are `configs`, or of its folder. n:
    pictures a prompt, None for what all rows have. record: what a recorded row shows."""
    name: str
    kind: str
    paths: tuple = (None,)
    steps: int | None = None
    n: int | None = None
    configs: tuple = ()
    record: dict | None = None

    def calls(self):
        """Network calls a picture: the teacher's are conditional and unconditional."""
        return 2 * self.steps if self.kind == "teacher" else self.steps


def parse_row(text, own, config_of, n=None):
    """One of --rows -> Row. own: {"teacher": path, "student": path}; config_of: path of a UNet ->
    its config."""
    name, sign, spec = text.partition("=")
    if not sign or os.path.exists(text.rpartition("@")[0]):  # a path with = in it
        name, spec = None, text
    if spec in REAL:
        return Row(name or REAL[spec], spec, n=1)
    if spec.startswith("folder:"):
        return Row(name or spec, "folder", (spec.removeprefix("folder:"),), n=n)
    path, _, steps = spec.rpartition("@")
    require(path and steps.isdecimal() and int(steps) > 0, f"--rows {text}: {EXPECTED}")
    paths = [path] if os.path.exists(path) else path.split("+")
    return unet_row([own.get(path, path) for path in paths], int(steps), config_of, n, name)


def unet_row(paths, steps, config_of, n=None, name=None, kind=None):
    """A Row of UNets; their configs say whether they are teachers or students, unless kind does."""
    configs = tuple(map(config_of, paths))
    kinds = {"student" if config.distilled else "teacher" for config in configs}
    require(len(kinds) == 1, f"--rows {'+'.join(paths)}@{steps}: teachers and students in one row")
    kind = kind or kinds.pop()
    if name is None:
        where = f"{Path(paths[0]).parent.name}/{Path(paths[0]).name}"
        name = f"teacher, {steps}-step DDIM" if kind == "teacher" \
            else f"student, {steps}-step ({where})"
    return Row(name, kind, tuple(paths), steps, n, configs)

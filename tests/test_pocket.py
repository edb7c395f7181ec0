"""What ships in pocket/, and build.py, which made it."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

import sample
from conftest import ROOT
from support.pictures import decode

sys.path.insert(0, str(ROOT / "pocket"))
import build
import emoji

POCKET = ROOT / "pocket"


def read(split):
    """-> [(hash of a picture's pixels, its caption)] of a shipped shard, in the file's order"""
    hashes, captions = [], []
    with tarfile.open(POCKET / f"data/{split}-000.tar") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".txt"):
                captions.append(data.decode())
            else:
                hashes.append(hashlib.sha256(decode(data).tobytes()).hexdigest())
    return list(zip(hashes, captions))


def test_nothing_held_out_is_in_training_neither_its_picture_nor_its_caption():
    train = read("train")
    assert len(train) > 10_000
    seen = {split: read(split) for split in emoji.SPLITS}
    assert {split: len(pairs) for split, pairs in seen.items()} == emoji.SPLITS
    for column in (0, 1):
        facts = [pair[column] for split in seen.values() for pair in split]
        assert len(set(facts)) == len(facts)
        assert not set(facts) & {pair[column] for pair in train}
    labels = {caption.split(", ")[0] for _, caption in train}
    assert not labels & {caption.split(", ")[0] for _, caption in seen["unseen"]}


def test_the_label_of_a_held_out_pair_is_in_training_in_two_other_styles():
    styles = {}
    for _, caption in read("train"):
        parts = caption.split(", ")
        styles.setdefault(parts[0], set()).add(parts[-1])
    for _, caption in read("heldout") + read("validation"):
        parts = caption.split(", ")
        assert len(styles[parts[0]] - {parts[-1]}) >= 2


def test_sample_py_draws_in_the_styles_that_the_pocket_knows():
    assert tuple(emoji.STYLES) == sample.STYLES


def test_only_the_judge_is_trained_on_what_is_held_out(monkeypatch, tmp_path):
    """The stages ask `read_split` for their pictures; what the stage of the reward and the ones of
    the generator ask for before they are trained is `train` alone."""
    asked = []

    class Enough(Exception):
        pass

    def spy(pocket, split):
        asked.append(split)
        return pictures[split]
    pictures = {split: build.read_split(POCKET, split) for split in ("train", *emoji.SPLITS)}
    monkeypatch.setattr(build, "read_split", spy)
    monkeypatch.setattr(build, "encode_split", lambda images, args: images[:, :4, :16, :16].float())

    def trained(*args, **options):
        raise Enough
    monkeypatch.setattr(build, "fit", trained)
    args = type("Args", (), dict(out=POCKET, work=tmp_path, device=build.torch.device("cpu"),
                                 rank=0, world=1, precision=build.torch.float32))
    for stage in ("vae", "judge", "reward", "teacher"):
        asked.clear()
        with pytest.raises(Enough):
            build.STAGES[stage](args)
        expected = {"train", *emoji.SPLITS} if stage == "judge" else {"train"}
        assert set(asked) == expected, stage


@pytest.mark.slow  # minutes
def test_all_stages_run_at_a_two_hundredth_of_their_length(tmp_path):
    """But the first, which takes the npm packages (test_emoji.py has its parts)."""
    shutil.copytree(POCKET / "data", tmp_path / "new/data")
    stages = [stage for stage in build.STAGES if stage != "data"]
    command = [sys.executable, POCKET / "build.py", "--out", tmp_path / "new", "--work",
               tmp_path / "state", "--scale", "0.005"]
    done = subprocess.run([*command, "--stages", ",".join(stages)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert all(f"{stage}: done in" in done.stdout for stage in stages)
    results = json.loads((tmp_path / "new/results.json").read_text())
    assert results["plain"]["scores"]["judge"] and len(results["shipped"]) == 4
    for name in ("words.png", "heldout.png", "student/config.json", "unet/config.json"):
        assert (tmp_path / "new" / name).is_file()


@pytest.mark.slow
def test_two_processes_train_the_teacher_as_one_does(tmp_path):
    finals = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        shutil.copytree(POCKET / "data", out / "data")
        for part in ("tokenizer", "vae"):
            shutil.copytree(POCKET / part, out / part)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={world}", POCKET / "build.py", "--out", out, "--work",
                   out / "state", "--scale", "0.0005", "--stages", "teacher"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        finals[world] = build.torch.load(out / "state/teacher.pt")["modules"]["unet"]
    for key, value in finals[1].items():
        gap = (value - finals[2][key]).abs().max()
        assert gap <= 1e-2 * value.abs().max() + 1e-4, key  # bf16 on some machines

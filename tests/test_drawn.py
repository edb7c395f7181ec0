import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import rand
from support import drawn
from support.drawn import Drawn, fingerprint, read


class Draw:
    """Draws a shade by the seed; with `size` of the batch in it, as rounding has it."""

    def __init__(self):
        self.batches = []

    def __call__(self, prompts, seeds):
        self.batches.append(list(seeds))
        shades = torch.tensor([(seed + len(seeds)) / 255 for seed in seeds])
        return shades.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def store(folder, draw, network, **facts):
    return Drawn(folder, draw, (network,), facts, "a/unet")


def shade(file):
    return np.array(read(file)[0])[0, 0, 0]


def test_pictures_are_written_once_by_prompt_and_seed_with_what_they_took(tmp_path, network):
    draw = Draw()
    pictures = store(tmp_path, draw, network, steps=2)
    files = pictures(["a", "b"], [0, 1])
    assert pictures(["a", "b"], [0, 1]) == files == store(tmp_path, draw, network, steps=2)(
        ["a", "b"], [0, 1])
    assert draw.batches == [[0, 1]] and pictures.drawn == 2
    assert len({*files, *pictures(["a", "a"], [1, 2])}) == 4
    assert [shade(file) for file in files] == [2, 3]
    picture, seconds = read(files[0])
    assert picture.mode == "RGB" and seconds > 0
    text = Image.open(files[1]).text
    assert text["prompt"] == "b" and text["seed"] == "1"
    made = json.loads((files[0].parent.parent / "made.json").read_text())
    assert made == {"unet": "a/unet", "steps": 2}


def test_a_batch_that_was_cut_off_is_drawn_whole_and_what_is_there_stays(tmp_path, network):
    draw = Draw()
    files = store(tmp_path, draw, network)(list("abcd"), [0, 1, 2, 3])
    kept = files[0].stat().st_mtime_ns
    for file in files[2:]:
        file.unlink()
    assert store(tmp_path, draw, network)(list("abcd"), [0, 1, 2, 3]) == files
    assert draw.batches[1] == [0, 1, 2, 3] and files[0].stat().st_mtime_ns == kept
    assert [shade(file) for file in files] == [4, 5, 6, 7]  # as if it had never been cut off


def test_the_key_hangs_on_weights_settings_and_sources_and_on_nothing_else(
        network, tmp_path, monkeypatch):
    first = fingerprint((network,), {"steps": 2, "w": 3.0})
    assert fingerprint((network,), {"w": 3.0, "steps": 2}) == first
    assert fingerprint((network,), {"steps": 3, "w": 3.0}) != first
    assert fingerprint((network.bfloat16(),), {"steps": 2, "w": 3.0}) != first
    other = torch.nn.Linear(3, 2)
    assert fingerprint((other,), {"steps": 2, "w": 3.0}) != first
    same = fingerprint((other,), {})
    for name in drawn.SOURCES:
        (tmp_path / name).write_bytes((drawn.ROOT / name).read_bytes())
    monkeypatch.setattr(drawn, "ROOT", tmp_path)
    assert fingerprint((other,), {}) == same
    with open(tmp_path / "lcm_solver.py", "a") as file:
        file.write("# another sampler\n")
    assert fingerprint((other,), {}) != same


def test_a_picture_is_the_eight_bits_of_what_was_drawn(tmp_path, network):
    images = rand(3, 3, 8, 8).sigmoid()
    files = store(tmp_path, lambda prompts, seeds: images, network)(list("abc"), range(3))
    for file, image in zip(files, images):
        found = torch.from_numpy(np.array(read(file)[0])).permute(2, 0, 1)
        assert torch.equal(found, (image * 255).round().byte())


def test_draw_all_draws_rounds_of_one_picture_a_prompt_by_seeds_in_order():
    calls = []

    class Model:
        def draw(self, unet, prompts, seeds, steps, w, solver, size):
            calls.append((prompts, list(seeds), steps, w, solver, size))
            return torch.zeros(len(prompts), 3, 4, 4)

    images = drawn.draw_all(Model(), torch.nn.Identity(), ["a", "b", "c"], 2, 3.0, "lcm", 4, 2)
    assert images.shape == (6, 3, 4, 4)
    assert [(prompts, seeds) for prompts, seeds, *_ in calls] == [
        (["a", "b", "c", "a"], [0, 1, 2, 3]), (["b", "c"], [4, 5])]

"""SD2.1 at its true size, with random weights. `pytest -m slow tests/test_full_size.py`: some
minutes, 10 GB of memory, 3 GB of disk."""
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from conftest import ROOT, memory_of_loading
from support.tokenizer import built_in, write_tokenizer
from support.weights import WEIGHTS
from text_encoder import TextEncoder, TextTower
from unet import UNet, UNetConfig
from vae import VAE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A 2-step student in the SD2.1 layout, float16, random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd21")
    UNet(UNetConfig(time_cond_proj_dim=256)).save_pretrained(folder / "unet", dtype=torch.float16)
    VAE().save_pretrained(folder / "vae", dtype=torch.float16)
    text_encoder = TextEncoder(TextTower(), built_in("sd2"))
    text_encoder.save_pretrained(folder, dtype=torch.float16)
    write_tokenizer(folder / "tokenizer", "sd2")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "LCMScheduler", "prediction_type": "epsilon"}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_two_steps_at_512_in_bf16_on_the_cpu_stay_under_10_gib(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--model", folder, "--steps", "2",
         "--size", "512x512", "--device", "cpu", "--precision", "bf16",
         "--prompt", "a red apple", "--out", tmp_path],
        capture_output=True, text=True, check=True)
    print(done.stdout)
    assert float(re.search(r"peak memory (\S+) GiB", done.stdout)[1]) < 10
    assert Image.open(tmp_path / "00000.png").size == (512, 512)


@pytest.mark.parametrize("dtype, most", [("float16", 1.15), ("bfloat16", 1.15)])
def test_loading_the_fp16_unet_adds_one_copy_of_its_file_to_peak_memory(dtype, most, folder):
    added = memory_of_loading(folder, dtype)
    size = (folder / "unet" / WEIGHTS).stat().st_size
    print(f"{dtype}: {added / size:.3f} of {size / 1e9:.2f} GB")
    assert size > 1.7e9 and added <= most * size

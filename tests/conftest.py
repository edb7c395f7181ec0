"""What the tests share: a tiny random model folder in the SD layout, a shard of random pictures,
and a few helpers."""
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from support import cli

UNET = {
    "sample_size": 8, "block_out_channels": (16, 32, 32), "layers_per_block": 1,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4, 4), "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "sample_size": 32,
}
TEXT = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 4096, "width": 32, "heads": 2, "layers": 1},
}
LATENT_RM = {
    "latent_size": 8, "patch_size": 2, "width": 32, "layers": 3, "heads": 2, "embed_dim": 16,
    "text_width": 32, "text_layers": 4, "text_heads": 2, "context_length": 32, "vocab_size": 4096,
}
CAPTIONS = [
    "a red apple", "a smiling cat", "rocket", "a green heart",
    "house, home", "snow, cold", "moon", "a fish",
]


def pytest_addoption(parser, pluginmanager):
    """Without xdist the options in pyproject.toml that are its own do nothing."""
    if not pluginmanager.hasplugin("xdist"):
        group = parser.getgroup("xdist, which is not there")
        group._addoption("-n", default=None)  # pytest keeps short options for itself
        group.addoption("--dist", default=None)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def agree(ours, theirs, tolerance=1e-4, floor=0.0):
    """Parity: the largest difference is at most `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    scale = max(theirs.abs().max().item(), floor)
    assert (ours - theirs).abs().max().item() <= tolerance * scale


def agree_by_name(ours, theirs):
    """Parity of gradients, {name: gradient}."""
    assert ours.keys() == theirs.keys() and ours
    # some gradients are zero but for rounding
    floor = 1e-3 * max(g.abs().max().item() for g in theirs.values())
    for name in theirs:
        agree(ours[name], theirs[name], floor=floor)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def shapes(module):
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def norm_eps(module):
    """{name: eps} of the norms in a module: what no weights and no random weights' outputs show."""
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    return {name: norm.eps for name, norm in module.named_modules() if isinstance(norm, norms)}


def cut(file, size):
    """Keep the first `size` bytes of a file."""
    file.write_bytes(file.read_bytes()[:size])


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def randomize(module, seed=0):
    """Move every parameter, norms and zero-initialised ones included, so that none of them can be
    forgotten unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p += 0.05 * torch.randn(p.shape, generator=generator)
    return module


def call(main, *argv):
    """Run a script's main() with these arguments, as the script does -> exit code. Any other
    exception fails the test."""
    before, sys.argv = sys.argv, ["script.py", *map(str, argv)]
    try:
        cli.run(main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


LOAD = """
import re, sys, torch
from unet import UNet
def rss(key):
    status = open("/proc/self/status").read()
    return int(re.search(key + r":\\s+(\\d+)", status)[1]) * 1024
torch.ones(10).sum(), torch.ones(10).to(torch.bfloat16).to(torch.float16).sum()
before = rss("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of importing
unet = UNet.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(rss("VmHWM") - before)
"""


def memory_of_loading(folder, dtype):
    """Bytes that loading the UNet of `folder` adds to the peak memory of a fresh process."""
    done = subprocess.run([sys.executable, "-c", LOAD, folder, dtype], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    return int(done.stdout)


def make_text_encoder(folder, **changes):
    from support.tokenizer import Tokenizer
    from text_encoder import TextConfig, TextEncoder, TextTower
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    tower = randomize(TextTower(TextConfig(**TEXT | changes)))
    TextEncoder(tower, tokenizer).save_pretrained(folder)


def teacher_pipeline(folder, **scheduler):
    """diffusers' StableDiffusionPipeline with the DDIMScheduler on the parts of a model folder."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    pipe = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(folder / "vae"),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        DDIMScheduler.from_config(config, clip_sample=False, **scheduler),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def leave_matmul_precision():
    """Scripts set it for their whole process, which here is that of other tests too."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """vae/, text_encoder/, tokenizer/, unet/ (a teacher), student/, scheduler/, reward/ and
    latent_rm/. Read only: copy it to change it."""
    from latent_rm import LatentRM, LatentRMConfig
    from reward import PocketReward
    from support.tokenizer import Tokenizer
    from unet import UNet as Net, UNetConfig
    from vae import VAE as AutoEncoder, VAEConfig
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(ROOT / "pocket" / "tokenizer", folder / "tokenizer")
    make_text_encoder(folder)
    randomize(AutoEncoder(VAEConfig(**VAE))).save_pretrained(folder / "vae")
    randomize(Net(UNetConfig(**UNET))).save_pretrained(folder / "unet")
    student = Net(UNetConfig(**UNET, time_cond_proj_dim=256))
    randomize(student, seed=1).save_pretrained(folder / "student")
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    reward = PocketReward(CLIP, tokenizer)
    randomize(reward).save_pretrained(folder / "reward")
    latent_rm = LatentRM(LatentRMConfig(**LATENT_RM), tokenizer)
    randomize(latent_rm).save_pretrained(folder / "latent_rm")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "set_alpha_to_one": False, "steps_offset": 1}))
    return folder


@pytest.fixture
def model_copy(model_folder, tmp_path):
    """A model folder of the test's own, to break."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def write_shard(file, members):
    """members: pairs of name and bytes."""
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def random_png(seed, size=(40, 48)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def shard(tmp_path_factory):
    """One tar of eight random pictures, 40x48, with captions."""
    members = []
    for i, caption in enumerate(CAPTIONS):
        members += [(f"{i:04d}.png", random_png(i)), (f"{i:04d}.txt", caption.encode())]
    return write_shard(tmp_path_factory.mktemp("shards") / "train-000.tar", members)


@pytest.fixture
def options(model_folder, shard):
    """options(out, steps=4, ...) -> the arguments of train.py for a small run."""
    def make(out, **changes):
        values = dict(
            teacher=model_folder, data=shard, out=out, resolution=32, batch_size=2, steps=4,
            lr=1e-3, reward="none", reward_scale=1.0, log_every=1, checkpoint_every=2,
            sample_every=100, device="cpu", precision="fp32", compile=False) | changes
        argv = []
        for key, value in values.items():
            name = key.replace("_", "-")
            if isinstance(value, bool):
                argv += [f"--{name}" if value else f"--no-{name}"]
            else:
                argv += [f"--{name}", str(value)]
        return argv
    return make


@pytest.fixture
def fit(options):
    """fit(out, ...): train.py in this process -> exit code."""
    import train
    return lambda out, **changes: call(train.main, *options(out, **changes))


# Processes of training scripts are forked from one that has imported them already.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train", "latent_rm", "conftest"])


def run_forked(name, argv, environment, output):
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of data loading processes, as for users
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.exit(call(sys.modules[name].main, *argv))


class launch:
    """Run train.py, or another script by its name, as `world` processes; they begin at once."""

    def __init__(self, argv, world=1, name="train"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.output = Path(tempfile.mkdtemp()) / "output"
        self.output.touch()
        self.processes = []
        for rank in range(world):
            environment = {} if world == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work = name, list(map(str, argv)), environment, str(self.output)
            self.processes.append(forks.Process(target=run_forked, args=work))
            self.processes[-1].start()

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def send(self, number, workers=False):
        """A signal to each process, and before that to its data loading processes."""
        for process in self.processes:
            if workers:
                subprocess.run(["pkill", f"-{number}", "-P", str(process.pid)], check=True)
            os.kill(process.pid, number)

    def wait(self, timeout=150):
        """-> the exit code of each process, and what all of them printed"""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                raise TimeoutError(self.output.read_text())
        return [process.exitcode for process in self.processes], self.output.read_text()

    def succeed(self):
        codes, output = self.wait()
        assert not any(codes), output
        return output


def lines_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def log(out, *keys):
    return [tuple(line[key] for key in keys) for line in lines_of(out)]


@pytest.fixture
def proxied(scene, model_folder):
    """A module's scene for distillation_loss with a latent proxy whose top trains; 2 rows are
    compared."""
    scene["args"].rm_batch, scene["args"].rm_tau, scene["args"].rm_tau_lrm = 2, 0.3, 0.2
    from latent_rm import LatentRM
    latent_rm = LatentRM.from_pretrained(model_folder / "latent_rm").train()
    latent_rm.train_top(2, 3)
    return scene | {"latent_rm": latent_rm}

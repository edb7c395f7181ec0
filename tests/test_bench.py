import json
import subprocess
from pathlib import Path

import pytest
import torch

import bench
from conftest import agree, call, rand
from pipeline import Pipeline
from support import peers
from train import Config
from unet import UNet
from vae import VAE


def run(capsys, *argv):
    fixed = ["--repeats", 1, "--warmup", 1, "--device", "cpu", "--precision", "fp32"]
    assert call(bench.main, *fixed, *argv) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_last_line_is_one_json_document_with_every_part_and_the_peers_beside_it(capsys):
    document = run(capsys, "--against", "diffusers,published")
    rows, peak = document["rows"], document["peak_tflop_per_s"]
    assert list(rows) == list(bench.ROWS)
    for name, row in rows.items():
        assert 0 < row["min"] <= row["median"] <= row["max"] and row["first"] > 0
        for peer in {"diffusers", "published"} & row.keys():
            ratio = row[peer]["median"] / row["median"]
            assert row[peer]["ratio"] == pytest.approx(ratio)
        if name != "optimizer":
            assert row["tflop"] / max(peak.values()) <= row["limit"] * 1.001
            assert row["tflop"] > 0 and "diffusers" in row
    assert {name for name, row in rows.items() if "published" in row} == {
        "training_step", "reward_direct", "optimizer"}
    assert rows["picture"]["tflop"] > 2 * rows["unet"]["tflop"] + rows["vae_decode"]["tflop"]
    # student 3 (forward and backward), teacher 2 (guidance), target 1
    assert rows["training_step"]["tflop"] > 5.5 * rows["unet"]["tflop"]


def test_diffusers_is_given_the_same_work(model_folder):
    device = torch.device("cpu")
    args = bench.Config(batch=2)
    args.rows = bench.ROWS
    model = Pipeline.from_pretrained(model_folder, device, torch.float32)
    unet = UNet.from_pretrained(model_folder / "student").requires_grad_(False)
    pair = (UNet.from_pretrained(model_folder / "student").train(),
            UNet.from_pretrained(model_folder / "student"))
    torch.manual_seed(0)
    ours = bench.work(args, model, unet, lambda: pair)
    torch.manual_seed(0)
    theirs, _ = bench.diffusers_work(args, model, unet, lambda: pair)
    for name in ("unet", "vae_decode", "text_encode"):
        agree(ours[name](), theirs[name]())


def test_the_published_order_of_work_gives_the_same_loss(model_folder):
    """Two passes of the teacher are the same numbers as one of both."""
    unet = UNet.from_pretrained(model_folder / "unet").requires_grad_(False)
    inputs = rand(4, 4, 8, 8), torch.tensor([999, 19, 5, 7]), rand(4, 7, 32)
    agree(peers.DiffusersUNet(unet, passes=2)(*inputs), unet(*inputs))


@pytest.mark.slow
def test_openvino_is_given_the_same_work(model_folder):
    pytest.importorskip("openvino")
    args = bench.Config(batch=2, rows=())
    model = Pipeline.from_pretrained(model_folder, torch.device("cpu"), torch.float32)
    unet = UNet.from_pretrained(model_folder / "student").requires_grad_(False)
    torch.manual_seed(0)
    ours = bench.work(args, model, unet, None)
    torch.manual_seed(0)
    theirs = bench.openvino_work(args, model, unet)
    agree(ours["picture"](), theirs["picture"]())  # its noise comes from its seeds


def test_a_sweep_fits_how_time_grows(capsys, monkeypatch):
    def fake(command, **_):
        value = int(command[-1].rpartition("=")[2])
        assert command[2:-1] == ["--rows=unet", "--precision=fp32"] and "--batch=" in command[-1]
        row = {"median": 0.1 * value ** 0.9}
        document = json.dumps({"rows": {"unet": row}, "peak_gib": 2.0 * value ** 0.5})
        return subprocess.CompletedProcess(command, 0, "noise\n" + document + "\n", "")

    monkeypatch.setattr(bench.subprocess, "run", fake)
    assert call(bench.main, "--rows", "unet", "--precision", "fp32", "--batch", 4,
                "--sweep", "batch") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]["unet"]
    assert found["exponents"]["median"] == pytest.approx(0.9)
    assert found["exponents"]["peak_gib"] == pytest.approx(0.5)
    assert list(found) == ["1", "2", "4", "8", "exponents"]


def test_a_sweep_of_processes_trains_the_pocket_on_as_many_as_there_are_cores(capsys, monkeypatch):
    def fake(command, env, **_):
        processes = int(next(part for part in command if "nproc" in part).rpartition("=")[2])
        assert command[5].endswith("train.py") and "--batch-size=8" in command
        assert env["OMP_NUM_THREADS"] == str(4 // processes)
        folder = Path(next(part for part in command if part.startswith("--out="))[6:])
        folder.mkdir()
        seconds = [9.0, 9.0, 9.0] + [0.5 * processes ** 0.25] * 7  # three of warm-up
        folder.joinpath("log.jsonl").write_text(
            "".join(json.dumps({"seconds_per_step": one}) + "\n" for one in seconds))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bench.subprocess, "run", fake)
    monkeypatch.setattr(bench.cli, "cores", lambda: 4)
    sweep = ("--sweep", "processes", "--device", "cpu", "--batch", 8)
    assert call(bench.main, *sweep, "--rows", "unet") == 2
    assert "no --rows" in capsys.readouterr().err
    assert call(bench.main, *sweep) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]["training"]
    assert list(found) == ["1", "2", "4", "exponents"]
    assert found["1"] == {"median": 0.5, "pictures_per_second": 16}
    assert found["exponents"] == {"median": pytest.approx(0.25),
                                  "pictures_per_second": pytest.approx(0.75)}


def test_some_rows_can_be_chosen_and_unknown_ones_are_refused(capsys):
    assert list(run(capsys, "--rows", "unet,text_encode")["rows"]) == ["unet", "text_encode"]
    assert call(bench.main, "--rows", "unet,warp") == 2 and "warp" in capsys.readouterr().err


def test_what_runs_without_gradient_is_counted_in_full():
    tower = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        without = bench.count_tflop(lambda: tower(x))
    assert without == bench.count_tflop(lambda: tower(x)) and without["product"] > 0
    assert without["convolution"] == 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_counts_among_the_products_whatever_kernel_it_takes(dtype):
    """Two products of 2 * 3 * 64 * 48 * 16 multiplications and additions each."""
    q, k, v = (torch.randn(2, 3, length, 16, dtype=dtype) for length in (64, 48, 48))
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            found = bench.count_tflop(
                lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
        assert found["product"] == pytest.approx(2 * 2 * 2 * 3 * 64 * 48 * 16 / 1e12)


def test_at_sd21_size_the_student_pays_2_percent_for_the_proxy_and_the_expert_three_decodes():
    """TFLOP per row, on the meta device. The fitting of the proxy is not free: at equal rows the
    whole path costs more than direct reward; with the default rows, and with those of README's
    commands, less."""
    meta = torch.device("meta")
    with meta:
        vae = VAE().requires_grad_(False)
    model = Pipeline(vae, None, None, meta, torch.float32)
    z = torch.empty(1, 4, 64, 64, device=meta)

    def count(grad_checkpoint):
        reward, latent_rm = bench.rewards("sd21", meta, torch.float32, 64, grad_checkpoint)
        reward.looked = True  # no numbers there
        args = Config(grad_checkpoint=grad_checkpoint)
        calls = bench.reward_work(model, reward, latent_rm, z, ["x"], args)
        return {name: sum(bench.count_tflop(call).values()) for name, call in calls.items()}

    tflop, recomputed = count(False), count(True)["reward_direct"]
    direct, latent, student = (tflop[f"reward_{name}"] for name in ("direct", "latent", "student"))
    assert direct == pytest.approx(5.79, rel=0.02) and recomputed == pytest.approx(8.53, rel=0.01)
    assert latent == pytest.approx(8.88, rel=0.02) and student < 0.02 * direct
    rows = Config()
    fitted = rows.reward_batch * student + rows.rm_batch * (latent - student)
    assert fitted < 0.8 * rows.reward_batch * direct
    assert 16 * student + 2 * (latent - student) < 0.6 * 4 * recomputed

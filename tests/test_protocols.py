import io
import json
import os
import re
import types

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

import evaluate
import reward
from conftest import call, random_png
from reward import ClipReward, PocketReward
from support import protocols
from support.protocols import PROTOCOLS, STYLES
from unet import UNet


def picture(seed, size=(48, 48)):
    return Image.open(io.BytesIO(random_png(seed, size)))


@pytest.fixture
def judged(model_folder, capsys):
    """judged(out, ...): evaluate.py with tiny models -> results.json, what it printed."""
    def run(out, *more, **changes):
        values = dict(model=model_folder, unet=model_folder / "student", device="cpu",
                      precision="fp32", out=out, batch=64) | changes
        argv = [word for key, value in values.items() for word in (f"--{key}", value)]
        assert call(evaluate.main, *argv, *more) == 0, capsys.readouterr().err
        return json.loads((out / "results.json").read_text()), capsys.readouterr().out
    return run


# ------------------------------------------------------------------------------------------ HPSv2

@pytest.fixture
def benchmark(tmp_path):
    """The four files of the benchmark, each with 800 prompts."""
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for style in STYLES:
        prompts = [f"{style}, number {i}" for i in range(800)]
        (folder / f"{style}.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def scorer(model_folder, monkeypatch):
    """A tiny CLIP in the place of HPSv2.1."""
    found = PocketReward.from_pretrained(model_folder / "reward")

    def load(name, option, path, dtype, device):
        return ClipReward(found.clip, found.tokenize, "longest")

    monkeypatch.setitem(reward.REWARDS, "hpsv2.1", load)
    return load(None, None, None, None, None).eval()


@torch.no_grad()
def by_the_benchmarks_steps(root, benchmark, model):
    """hpsv2/evaluation.py's evaluate_benchmark, written again: -> {style: (mean, deviation)},
    average"""
    everything, styles = [], {}
    for style in os.listdir(root):
        prompts, scores = json.loads((benchmark / f"{style}.json").read_text()), []
        for i, prompt in enumerate(prompts):
            file = root / style / f"{i:05d}.jpg"
            if not file.exists():
                continue
            image = TF.to_tensor(Image.open(file).convert("RGB"))
            scale = 32 / max(image.shape[1:])
            new = [round(side * scale) for side in image.shape[1:]]
            image = TF.resize(image, new, TF.InterpolationMode.BICUBIC)
            image = TF.normalize(image, reward.MEAN, reward.STD)
            features = model.clip.encode_image(image[None], normalize=True)
            words = model.clip.encode_text(model.tokenize([prompt]), normalize=True)
            scores.append((features @ words.T * 100).item())
        groups = [np.mean(scores[i:i + 80]) for i in range(0, len(scores), 80)]
        styles[style] = (np.mean(groups), np.std(groups))
        everything.extend(scores)
    return styles, np.mean(everything)


def test_hpsv2_equals_a_second_writing_of_the_benchmarks_own_steps(
        judged, benchmark, scorer, model_folder, tmp_path):
    student = UNet.from_pretrained(model_folder / "student", sample_size=12)  # 48 pixels
    student.save_pretrained(tmp_path / "unet")
    rows = ["--rows", f"{tmp_path / 'unet'}@1"]
    found, said = judged(tmp_path / "out", *rows, protocol="hpsv2", prompts=benchmark, limit=400)
    ((row,), columns) = found["rows"], found["columns"]
    assert row["n"] == 1 and len(found["prompts"]) == 400
    (root,) = (tmp_path / "out/hpsv2").iterdir()
    styles, average = by_the_benchmarks_steps(root, benchmark, scorer)
    assert set(styles) == set(STYLES)
    for style, (mean, deviation) in styles.items():
        one = row["summary"][f"hpsv2.1/{style}"]
        assert one["mean"] == pytest.approx(mean, abs=2e-3), style
        assert one["high"] - one["mean"] == pytest.approx(deviation, abs=2e-3)
        assert deviation > 0 and one["of"] == "groups of 80"  # of 80 and 20
    assert row["summary"]["hpsv2.1/average"]["mean"] == pytest.approx(average, abs=2e-3)
    assert columns["hpsv2.1"]["per_picture"] and not columns["hpsv2.1/photo"]["per_picture"]
    assert "hpsv2, on 400 of its 3,200 prompts" in said and "not comparable" in said

    # without JPEG the scores are others; pictures that lie in the benchmark's folders have it
    stored = [tmp_path / "out" / files[0] for files in row["pictures"]]
    with torch.no_grad():
        plain = scorer(reward.read_picture(stored[0]), found["prompts"][:1]).item()
    assert abs(plain - row["scores"]["hpsv2.1"][0][0]) > 1e-5
    again, _ = judged(tmp_path / "again", "--rows", f"folder:{root}", protocol="hpsv2",
                      prompts=benchmark, limit=400)
    assert again["rows"][0]["scores"]["hpsv2.1"] == row["scores"]["hpsv2.1"]
    assert "judge" not in again["columns"]  # the pocket's


def test_hpsv2_has_3200_prompts_and_its_mean_of_a_style_is_that_of_groups_of_80(benchmark):
    task = PROTOCOLS["hpsv2"](benchmark)
    assert len(task.prompts) == 3200 and task.n == 1 and task.name() == "hpsv2"
    assert task.prompts[800] == "concept-art, number 0"
    scores = np.arange(3200) / 3200
    found = task.summary(scores)
    groups = 100 * scores[800:1600].reshape(10, 80).mean(axis=1)
    mean, low, high, of = found["concept-art"]
    assert (mean, high - mean, mean - low) == pytest.approx(
        (groups.mean(), groups.std(), groups.std()))
    assert found["average"][0] == pytest.approx(100 * scores.mean())


# ---------------------------------------------------------------------------------- COCO, CLIPScore

def test_coco_pictures_are_cut_to_the_square_and_resized_by_lanczos():
    for size in ((300, 451), (500, 333), (256, 256), (511, 512)):
        one = picture(1, size)
        square = TF.center_crop(one, min(one.size))
        expected = square.resize((256, 256), Image.Resampling.LANCZOS)
        assert np.array_equal(np.array(protocols.square_256(one)), np.array(expected))


def coco_json(file, count):
    images = [{"id": 10 * i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(count)]
    annotations = [{"id": 5 * count - 2 * i - k, "image_id": 10 * i, "caption": f"{i}, word {k}. "}
                   for i in range(count) for k in range(2)]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def test_coco_captions_are_one_of_each_picture_and_its_picture_is_known(tmp_path):
    pairs = protocols.read_coco(coco_json(tmp_path / "captions.json", 50))
    assert pairs[7] == ("7, word 1.", "COCO_val2014_000000000007.jpg") and len(pairs) == 50
    some = protocols.read_coco(tmp_path / "captions.json", 20)
    assert len(set(some)) == 20 and set(some) < set(pairs) and some != pairs[:20]
    assert some == protocols.read_coco(tmp_path / "captions.json", 20)
    assert protocols.read_prompts(tmp_path / "captions.json") == [pair[0] for pair in pairs]


def test_coco2014_is_30000_captions_against_all_real_pictures(tmp_path):
    coco_json(tmp_path / "captions.json", 30_010)
    for i in range(30_010):
        folder = tmp_path / "val2014"
        folder.mkdir(exist_ok=True)
        (folder / f"COCO_val2014_{i:012d}.jpg").touch()
    task = PROTOCOLS["coco2014-30k-256"](tmp_path / "captions.json", 100, folder)
    assert len(task.prompts) == 100 and len(task.reference) == 30_010 and task.n == 1
    assert task.name() == ("coco2014-30k-256, on 100 of its 30,000 prompts, against 30,010 of its "
                           "40,504 real pictures")
    number = int(task.prompts[3].split(",")[0])
    (folder / f"COCO_val2014_{number:012d}.jpg").write_bytes(random_png(5))
    (found,) = task.real([3])
    assert np.array_equal(np.array(found), np.array(picture(5, (40, 48))))
    assert PROTOCOLS["clipscore-g14"](tmp_path / "captions.json").rewards == ("clipscore",)


def test_clipscore_puts_its_words_before_the_caption_as_the_published_code_joins_tokens(
        monkeypatch):
    import open_clip
    tokenize = open_clip.get_tokenizer("ViT-g-14")
    given = []
    stub = types.SimpleNamespace(text_features=lambda prompts: given.extend(prompts))
    loaded = []
    monkeypatch.setattr(evaluate, "load_reward", lambda spec, device: loaded.append(spec) or stub)
    captions = ["a cat on a mat", "word " * 90]
    evaluate.load_scorer("clipscore=/a/file", "cpu").encode(captions)
    assert loaded == ["clip:ViT-g-14:laion2b_s12b_b42k=/a/file"]
    ours = tokenize(given)
    # GigaGAN's compute_clip_score: the caption's tokens, with those of the prefix put in
    tokens, prefix = tokenize(captions), tokenize(["A photo depicts "])[:, 1:4]
    theirs = torch.cat([tokens[:, :1], prefix.expand(2, -1), tokens[:, 1:]], dim=1)[:, :77]
    theirs[:, -1][theirs[:, -1] > 0] = 49407
    assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------ other prompts and layouts

def test_coco2014_and_clipscore_run_on_pictures_of_256_pixels(
        judged, model_folder, monkeypatch, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(f"caption {i}" for i in range(30_000)))
    (tmp_path / "val2014").mkdir()
    for i in range(6):
        picture(i, (60, 40 + i)).save(tmp_path / f"val2014/COCO_val2014_{i}.jpg")
    asked, features = [], lambda images: sizes.append(images.shape[2:]) or images.mean(dim=(2, 3))
    sizes, load = [], evaluate.load_reward

    def load_reward(spec, device):
        asked.append(spec)
        return load(f"pocket={model_folder / 'reward'}", device)

    monkeypatch.setattr(evaluate, "load_reward", load_reward)
    monkeypatch.setattr(protocols, "inception", lambda file, device: features)
    common = {"prompts": tmp_path / "captions.txt", "limit": 5}
    found, said = judged(tmp_path / "fid", "--rows", "student@1", "--n", 3,
                         protocol="coco2014-30k-256", reference=tmp_path / "val2014", **common)
    (row,) = found["rows"]
    assert set(sizes) == {(256, 256)} and not asked
    assert row["summary"]["frechet"]["of"] == "sets of seeds" and row["n"] == 3
    assert found["protocol"].startswith("coco2014-30k-256, on 5 of its 30,000 prompts")
    found, _ = judged(tmp_path / "clip", "--rows", "student@1", protocol="clipscore-g14", **common)
    assert asked == [protocols.CLIPSCORE] and list(found["columns"]) == ["clipscore"]
    # the mean over what a second writing gives
    reward, scores = load(f"pocket={model_folder / 'reward'}", "cpu"), []
    for prompt, (file,) in zip(found["prompts"], found["rows"][0]["pictures"]):
        image = protocols.square_256(Image.open(tmp_path / "clip" / file).convert("RGB"))
        scores.append(reward(TF.to_tensor(image)[None], ["A photo depicts " + prompt]).item())
    assert found["rows"][0]["summary"]["clipscore"]["mean"] == pytest.approx(
        np.mean(scores), abs=1e-4)


def test_partiprompts_keeps_quotation_marks_and_wants_all_1632(tmp_path):
    file = tmp_path / "PartiPrompts.tsv"
    lines = ['"G I G G L E" painted\tIllustrations\tWriting & Symbols\t',
             *(f"prompt {i}\tAnimals\tBasic\tnote \"{i}\"" for i in range(1631))]
    file.write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *lines]) + "\n")
    task = PROTOCOLS["partiprompts"](file)
    assert task.prompts[:2] == ['"G I G G L E" painted', "prompt 0"] and len(task.prompts) == 1632


def test_genevals_folders_are_those_that_its_scorer_reads(judged, tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    lines = [{"tag": "counting", "include": [{"class": "cow", "count": i}], "prompt": f"{i} cows"}
             for i in range(553)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, said = judged(tmp_path / "out", "--rows", "student@1", protocol="geneval", prompts=file,
                         limit=3)
    (row,) = found["rows"]
    (root,) = (tmp_path / "out/geneval").iterdir()
    assert str(root) in said and row["n"] == 4 and not row["scores"]
    seen = 0
    for name in os.listdir(root):  # as evaluation/evaluate_images.py does
        assert name.isdigit()
        metadata = json.loads((root / name / "metadata.jsonl").read_text())
        assert metadata == lines[int(name)]
        for image in sorted(os.listdir(root / name / "samples")):
            assert re.match(r"\d+\.png", image)
            stored = Image.open(tmp_path / "out" / row["pictures"][int(name)][int(image[:4])])
            again = Image.open(root / name / "samples" / image)
            assert np.array_equal(np.array(again), np.array(stored.convert("RGB")))
            seen += 1
    assert seen == 12


def test_dpg_benchs_sheets_are_cut_by_its_scorer_into_the_pictures(judged, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for i in range(1065):
        (folder / f"whoops{i}.txt").write_text(f"scene {i}\n")
    found, _ = judged(tmp_path / "out", "--rows", "student@1", protocol="dpg-bench",
                      prompts=folder, limit=11)
    assert found["prompts"][2] == "scene 2" and found["prompts"][10] == "scene 10"
    (root,) = (tmp_path / "out/dpg-bench").iterdir()
    assert sorted(os.listdir(root)) == sorted(f"whoops{i}.png" for i in range(11))
    side, sheet = 32, Image.open(root / "whoops7.png")
    boxes = [(0, 0), (side, 0), (0, side), (side, side)]  # compute_dpg_bench.py's
    for (left, top), file in zip(boxes, found["rows"][0]["pictures"][7]):
        part = np.array(sheet.crop((left, top, left + side, top + side)))
        assert np.array_equal(part, np.array(Image.open(tmp_path / "out" / file).convert("RGB")))


def test_prompts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \n", encoding="utf-8-sig")
    (tmp_path / "a.json").write_text('["one", "two"]')
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "a.tsv").write_text("Category\tPrompt\nx\tone\ny\ttwo\n")
    for name in ("a.txt", "a.json", "a.jsonl", "a.tsv"):
        assert protocols.read_prompts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("protocol, name, text, words", [
    ("hpsv2", "folder", None, "no anime.json"),
    ("partiprompts", "a.tsv", "Prompt\nonly one\n", "1 prompts; PartiPrompts has 1,632"),
    ("partiprompts", "a.tsv", "Words\nonly one\n", "line of titles with Prompt"),
    ("partiprompts", "none.tsv", None, "not readable"),
    ("geneval", "a.jsonl", '{"prompt": "x"}\n', "1 prompts; GenEval has 553"),
    ("geneval", "a.jsonl", '{"text": "x"}\n', "one object with"),
    ("geneval", "a.jsonl", "{", "not readable as JSON"),
    ("dpg-bench", "folder", None, "no prompts there"),
    ("clipscore-g14", "a.txt", "x\n", "1 prompts; clipscore-g14 has 30,000"),
    ("clipscore-g14", "a.json", '{"images": []}', "COCO's images and annotations"),
    ("coco2014-30k-256", "a.txt", "x\n", "needs --reference"),
    (None, "a.txt", "\n", "one prompt a line"),
    (None, "a.json", "[1]", "a JSON list of prompts"),
    (None, "a.png", "", "expected prompts as .txt"),
])
def test_wrong_prompt_files_are_one_line(
        protocol, name, text, words, model_folder, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    if text is not None:
        (tmp_path / name).write_text(text)
    more = ["--protocol", protocol] if protocol else []
    assert call(evaluate.main, "--model", model_folder, "--unet", model_folder / "student",
                "--prompts", tmp_path / name, "--device", "cpu", "--out", tmp_path / "out",
                *more) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert words in message and (str(tmp_path / name) in message or "--reference" in words)


# -------------------------------------------------------------------------------------- Inception

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """torch-fidelity's Inception with random weights, in its file."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        torch.manual_seed(0)
        network = kind("random", ["2048"])
    for module in network.modules():  # by PyTorch's own, what enters would be all but lost
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture
def fid(judged, inception_file, tmp_path):
    """evaluate.py's, of 5 pictures in the folder drawn and 6 in the folder real."""
    for name, count, first in (("drawn", 5, 0), ("real", 6, 50)):
        (tmp_path / name).mkdir()
        for i in range(count):
            one = picture(first + i, (64, 64)).resize((16, 16)).resize((64, 64))
            one.save(tmp_path / name / f"{i:02d}.png")
    (tmp_path / "prompts.txt").write_text("\n".join("abcde"))
    found, _ = judged(tmp_path / "out", "--rows", f"folder:{tmp_path / 'drawn'}", "--features",
                      f"inception={inception_file}", prompts=tmp_path / "prompts.txt",
                      reference=tmp_path / "real", reward="none", judge="none")
    assert found["columns"]["frechet"]["title"] == "Frechet, inception"
    return found["rows"][0]["summary"]["frechet"]["mean"]


@pytest.mark.slow  # the square root of a product of 2048 x 2048, as torch-fidelity takes it
def test_fid_of_folders_equals_torch_fidelitys_own(fid, inception_file, tmp_path):
    import torch_fidelity
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "drawn"), input2=str(tmp_path / "real"), fid=True,
        cuda=False, verbose=False, cache=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(inception_file))
    assert fid > 1e-2
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)


def test_fid_is_of_the_features_that_torch_fidelitys_network_has_of_the_files(
        fid, inception_file, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    network = FeatureExtractorInceptionV3("a", ["2048"], str(inception_file))

    def features(name):
        files = sorted((tmp_path / name).iterdir())
        images = torch.stack([TF.pil_to_tensor(Image.open(file)) for file in files])
        return network(images)[0].double()

    drawn, real = features("drawn"), features("real")
    # the eigenvalues' roots of AB are the singular values of X Y^T, of few pictures a small matrix
    x, y = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (drawn, real))
    expected = (drawn.mean(0) - real.mean(0)).square().sum() + x.square().sum() \
        + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    assert fid > 1e-2 and fid == pytest.approx(expected.item(), rel=1e-4)


def test_inception_weights_that_run_code_or_are_others_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("evil.pth", "other.pth", "none.pth"):
        with pytest.raises(protocols.InputError, match=name if name != "other.pth" else "weights"):
            protocols.inception(str(tmp_path / name), "cpu")
    assert not (tmp_path / "ran").exists()

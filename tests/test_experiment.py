import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from conftest import ROOT, call
from data import Shards
from support.checkpoints import lock
from support.cli import parse
from support.weights import InputError

sys.path.insert(0, str(ROOT / "pocket"))
import experiment


def test_measures_of_several_rounds_are_the_means_over_rounds():
    class Brightness(torch.nn.Module):
        def forward(self, images, prompts):
            return images.mean(dim=(1, 2, 3))

    measures = experiment.Measures(
        experiment.Config(limit=6), {"expert": Brightness()}, torch.device("cpu"), torch.float32)
    rounds = [measures.round_trip, measures.round_trip.flip(0)]
    one, other = map(measures, rounds)
    both = measures(torch.cat(rounds))
    for key in ("expert", "judge", "distance", "recall"):
        assert both[key] == pytest.approx((one[key] + other[key]) / 2, rel=1e-4)
    assert both["diversity"] > 0 and "diversity" not in one
    assert measures(torch.cat(rounds[:1] * 2))["diversity"] == pytest.approx(0, abs=1e-4)


def run_of(path, scale, *seeds):
    """seeds: {step: judge's score}; the expert likes each twice as much."""
    return {"path": path, "scale": scale, "seeds": [
        {step: {"judge": judge, "expert": 2 * judge} for step, judge in seed.items()}
        for seed in seeds]}


RESULTS = {
    "plain": run_of("plain", 0, {10: 0.5, 20: 0.4}, {10: 0.6, 20: 0.5}),
    "direct 1x": run_of("direct", 1, {10: 0.5, 20: 0.7}, {10: 0.6, 20: 0.7}),
    "direct 2x": run_of("direct", 2, {10: 0.9, 20: 0.6}, {10: 0.9, 20: 0.8}),
    "direct 4x": run_of("direct", 4, {10: 0.9, 20: 0.5}, {10: 0.9, 20: 0.4}),
    "proxy 1x": run_of("proxy", 1, {10: 0.5, 20: 0.6}, {10: 0.5, 20: 0.6}),
}


def test_a_curve_is_less_plain_as_long_and_has_every_look():
    points = experiment.curve(RESULTS, "direct")
    assert [(point.amount, point.step) for point in points] == [
        (10, 10), (20, 10), (20, 20), (40, 10), (40, 20), (80, 20)]
    assert [row["judge"] for row in points[2].rows] == pytest.approx([0.3, 0.2])
    assert [row["expert"] for row in points[2].rows] == pytest.approx([0.6, 0.4])
    plain = experiment.curve(RESULTS, "plain")
    assert [(point.step, point.rows[0]["judge"]) for point in plain] == [(10, 0.5), (20, 0.4)]


def test_a_seeds_best_is_chosen_by_the_other_seeds_and_then_pushed_on_for_as_many_steps():
    """By the second seed 2x is the best, 0.3 over plain after 10 and 20 steps; by the first 2x
    after 10."""
    results = RESULTS | {"direct 8x": run_of("direct", 8, {10: 0.4, 20: 0.1}, {10: 0.3, 20: 0.1})}
    first, second = experiment.at_best(experiment.curve(results, "direct"))
    assert (first[0].scale, first[0].step) == (second[0].scale, second[0].step) == (2, 10)
    assert [first[1]["judge"], second[1]["judge"]] == pytest.approx([0.4, 0.3])
    assert [first[2], second[2]] == pytest.approx([-0.5, -0.6])  # at 8x after 10, not at 4x or 20
    assert experiment.at_best(experiment.curve(RESULTS, "direct"))[0][2] is None


@pytest.mark.parametrize("values, text", [
    ([], ""), ([0.5], "+0.500"), ([0.5, 0.5], "+0.500 ± 0.000*"), ([0.1, 0.2], "+0.150 ± 0.071"),
    ([1.0, 1.5, 2.0], "+1.500 ± 0.500*"), ([0.7, 1.3, 1.9], "+1.300 ± 0.600"),
    ([-1.0, -1.1] * 8, "-1.050 ± 0.052*")])
def test_a_difference_has_a_star_where_its_95_percent_interval_leaves_0_out(values, text):
    """Three values leave it out from 4.303 / sqrt(3) = 2.48 deviations on."""
    assert experiment.cell(values, "+") == text
    assert "*" not in experiment.cell(values)


def test_the_report_has_every_point_and_what_each_path_reaches():
    lines = experiment.report({"teacher": {"judge": 0.9, "expert": 1.0}}, RESULTS).splitlines()
    assert "| teacher | 1.000 | 0.900 |" in lines
    assert "| plain, 10 steps | 1.100 ± 0.141 | 0.550 ± 0.071 |" in lines
    assert "| direct | 20 | 20 | +0.500 ± 0.141 | +0.250 ± 0.071 |" in lines
    assert "| direct | 20 | 10 | +0.700 ± 0.141 | +0.350 ± 0.071 |" in lines
    (best,) = [line for line in lines if line.startswith("| direct | 20 20 |")]
    assert best == "| direct | 20 20 | +0.700 ± 0.141 | +0.350 ± 0.071 |  (0) |"
    assert [line for line in lines if line.startswith("| proxy | 20 20 |")][0].endswith("|  (0) |")


def test_the_figure_is_drawn_of_whatever_was_measured(tmp_path):
    experiment.draw_curves(RESULTS, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 200


def test_warped_pictures_keep_their_captions_labels_and_are_made_once(tmp_path, monkeypatch):
    images, calls = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8), []
    for i, colour in enumerate(([250, 0, 0], [0, 250, 0], [0, 0, 250])):
        images[i, :, 8:56, 8:56] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]

    def read_split(pocket, name):
        assert pocket == experiment.POCKET and name == "train"
        return images, ["red, a, b", "green, c", "blue"]

    def python(script, *options):
        calls.append(options)
        (tmp_path / "encoded").mkdir()
        (tmp_path / "encoded/warped.tar").touch()

    monkeypatch.setattr(experiment, "read_split", read_split)
    monkeypatch.setattr(experiment, "python", python)
    for _ in range(2):
        assert experiment.warped_latents(tmp_path, 4) == tmp_path / "encoded"
    assert len(calls) == 1
    pairs = list(Shards(str(tmp_path / "warped.tar"), 64))
    assert len(pairs) == 12 and len({picture.numpy().tobytes() for picture, _ in pairs}) == 12
    for picture, caption in pairs:
        colour = ("red", "green", "blue")[picture[:, 24:40, 24:40].mean(dim=(1, 2)).argmax()]
        assert caption.removeprefix("a ").split(", ")[0] == colour


def test_a_path_is_a_line_of_options_at_each_scale_and_plain_has_no_reward():
    args = experiment.Config(paths="never-fitted,direct,features", scales="16,1,.5", rm_lr=0.5)
    runs = experiment.settings(args)
    names = [f"{path} {times}x" for path in args.paths.split(",") for times in ("0.5", "1", "16")]
    assert list(runs) == ["plain", *names]
    value = lambda name, option: runs[name][2][runs[name][2].index(option) + 1]
    assert runs["plain"][2] == ["--reward", "none"]
    assert runs["direct 16x"] == ("direct", 8, ["--reward", "pocket", "--reward-scale", 8.0])
    assert "--latent-rm" not in runs["direct 16x"][2]
    assert value("never-fitted 16x", "--rm-image-layers") == 0
    assert value("never-fitted 16x", "--latent-rm") == "LATENT_RM"
    assert value("features 1x", "--latent-rm") == "TEACHER_RM"
    assert value("features 1x", "--rm-lr") == 0.5


def test_every_paths_options_are_options_of_train():
    args = experiment.Config(paths=",".join(experiment.PATHS), scales="1")
    for _, _, options in experiment.settings(args).values():
        config = parse(train.Config(), "", list(map(str, options)), presets=train.PRESETS,
                       published=train.PUBLISHED)
        train.check(config)


@pytest.mark.parametrize("scales", ["0,1", "1..2", "1,,4", "much", "1,4,"])
def test_scales_that_are_no_numbers_are_one_line_and_exit_code_2(scales, tmp_path, capsys):
    assert call(experiment.main, "--scales", scales, "--out", tmp_path) == 2
    message = capsys.readouterr().err
    assert f"--scales {scales}" in message and message.count("\n") == 1


@pytest.mark.parametrize("options, word", [
    (("--rm-lr", 0), "--rm-lr 0"),
    (("--rm-batch", 0), "--rm-batch 0"),
    (("--expert", "none"), "--expert none"),
    (("--paths", "direct,sideways"), "sideways unknown"),
    (("--looks", "0,2"), "--looks 0,2"),
    (("--looks", "100,250,401"), "--looks 100,250,401"),
    (("--expert", "jpeg"), "--paths direct follow it"),
    (("--judge", "jpeg"), "--judge jpeg"),
    (("--judge", "pocket=/no/where"), "/no/where"),
])
def test_what_no_run_could_use_is_refused_before_the_first_one_and_leaves_no_record(
        options, word, tmp_path, capsys):
    assert call(experiment.main, "--device", "cpu", "--limit", 5, "--out", tmp_path, *options) == 2
    message = capsys.readouterr().err
    assert word in message and message.count("\n") == 1 and not (tmp_path / "config.json").exists()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Stand-ins for the trainings, of which each is listed, and for the measures."""
    trained = []

    def python(script, *options):
        options = list(map(str, options))
        out = Path(options[options.index("--out") + 1])
        trained.append(out.name)
        if script == "train.py" and "--latent-rm" in options:
            assert Path(options[options.index("--latent-rm") + 1], "latent_rm").is_dir()
        (out / "log.jsonl").touch()
        for step in (1, 2):
            (out / f"checkpoints/step-{step:06d}/unet_target").mkdir(parents=True)
        (out / "latent_rm").mkdir()

    class Brightness(SimpleNamespace):
        def draw(self, folder, steps, solver, n):
            return torch.zeros(2 * n, 3, 8, 8)

        def references(self):
            return {"white": torch.ones(2, 3, 8, 8)}

        def __call__(self, images):
            return {"judge": images.mean().item()}

    monkeypatch.setattr(experiment, "python", python)
    monkeypatch.setattr(experiment, "warped_latents", lambda *options: "latents")
    monkeypatch.setattr(experiment, "fingerprint", lambda: "0123456789abcdef")
    args = experiment.Config(paths="direct,proxy", scales="1,4", seeds=2, looks="1,2", n=1)
    measures = Brightness(args=args, key=["one judge"])
    return SimpleNamespace(
        args=args, measures=measures, trained=trained, out=tmp_path,
        all=lambda: experiment.all_runs(args, tmp_path, measures, []),
        one=lambda name, *options: experiment.measured(tmp_path / name, options, {}, measures))


def test_runs_are_made_once_and_other_judges_need_no_other_training(runs):
    references, results = runs.all()
    assert references == {"white": {"judge": 1.0}}
    assert results["proxy 4x"] == {
        "path": "proxy", "scale": 2.0, "seeds": [{1: {"judge": 0.0}, 2: {"judge": 0.0}}] * 2}
    count = 2 * (1 + 2 + 1 + 2)  # a proxy is trained once a seed
    assert len(runs.trained) == len(set(runs.trained)) == count
    assert not [*runs.out.glob("*/checkpoints")]
    torch.save(torch.ones(2, 3, 8, 8), runs.out / "plain-1/pictures-000002.pt")
    assert runs.all()[1] == results
    runs.measures.key = ["another judge"]
    assert runs.all()[1]["plain"]["seeds"][1] == {1: {"judge": 0.0}, 2: {"judge": 1.0}}
    assert len(runs.trained) == count


def test_pictures_appear_whole_or_not_at_all(runs, monkeypatch):
    def killed(images, file):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.one("run")
    monkeypatch.undo()
    assert not [*runs.out.glob("run/pictures*")]


def test_more_looks_are_measured_anew(runs):
    runs.args.looks = "1"
    assert list(runs.one("run")) == [1]
    shutil.rmtree(runs.out / "run/latent_rm")
    runs.args.looks = "1,2"
    assert list(runs.one("run")) == [1, 2]


def test_what_another_shell_is_at_comes_later(runs, monkeypatch):
    others = contextlib.ExitStack()
    for name in ("plain-0", "latent_rm-1", "references"):
        others.enter_context(experiment.alone(runs.out / name))
    busy = ["plain-0", "latent_rm-1", "proxy-1x-1", "proxy-4x-1"]

    def sleep(seconds):
        assert len(runs.trained) == 12 - len(busy) and not set(runs.trained) & set(busy)
        others.close()  # the other shell has given up

    monkeypatch.setattr(experiment.time, "sleep", sleep)
    references, results = runs.all()
    assert references and len(results["plain"]["seeds"]) == 2 and runs.trained[-4:] == busy


def test_a_training_that_outlived_its_shell_is_left_alone(runs):
    (runs.out / "run").mkdir()
    with lock(runs.out / "run"), pytest.raises(experiment.Busy):
        runs.one("run")
    assert not runs.trained


def test_a_run_that_was_made_with_other_options_is_not_taken_for_this_one(runs, monkeypatch):
    runs.one("run", "--reward-jitter", 0.05)
    with pytest.raises(InputError, match="--reward-jitter 0.1"):
        runs.one("run", "--reward-jitter", 0.1)
    runs.args.n = 2
    with pytest.raises(InputError, match=r"now it would be with .* \(2 x 256 pictures"):
        runs.one("run", "--reward-jitter", 0.05)
    runs.args.n = 1
    monkeypatch.setattr(experiment, "fingerprint", lambda: "fedcba9876543210")
    with pytest.raises(InputError, match="pocket fedcba987654"):
        runs.one("run", "--reward-jitter", 0.05)


def test_the_tables_have_the_runs_of_earlier_commands_too(tmp_path):
    file, key = tmp_path / "results.json", ["judge", [10, 20]]
    some = {name: RESULTS[name] for name in ("plain", "direct 1x")}
    experiment.with_earlier(file, {}, RESULTS | {"proxy 1x": None}, ["another judge", [10, 20]])
    assert experiment.with_earlier(file, {}, some, key) == some
    others = {name: RESULTS[name] for name in RESULTS if name != "direct 1x"}
    both = experiment.with_earlier(file, {"real": {"judge": 1.0}}, others, key)
    assert both == RESULTS and json.loads(file.read_text())["references"]
    assert "| direct | 20 | 20 |" in experiment.report({}, both)


def test_the_precision_that_auto_chose_is_kept(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, "pick_precision", lambda name, device: (
        asked.append(name) or torch.bfloat16))
    chosen = lambda name: experiment.chosen_precision(
        experiment.Config(precision=name), tmp_path, None)
    assert chosen("auto") == "bf16"
    (tmp_path / "config.json").write_text('{"precision": "fp32"}')
    assert chosen("auto") == "fp32" and asked == ["auto"]


def test_record_refuses_other_runs_and_lets_the_choice_of_runs_change(tmp_path):
    own = torch.nn.Linear(1, 1)
    record = lambda config, out, expert=own: experiment.record(config, out, expert)
    record(experiment.Config(), tmp_path)
    free = experiment.Config(seeds=5, scales="1", paths="direct", device="cuda:1", out="elsewhere",
                             third="jpeg", judge="pocket")
    record(free, tmp_path)
    for change, word in (
        ({"rm_lr": 1.0}, "rm_lr 0.0001 (now 1.0);"),
        ({"looks": "1", "expert": "jpeg"}, "expert pocket (now jpeg), looks 100,200,300 (now 1);"),
        ({"precision": "bf16"}, "precision auto (now bf16);"),
        ({"n": 1}, "n 2 (now 1);"),  # the measures of earlier runs are kept
    ):
        with pytest.raises(InputError, match=re.escape(word)):
            record(experiment.Config(**change), tmp_path)
    with pytest.raises(InputError, match="pocket"):  # another expert's weights
        record(experiment.Config(), tmp_path, torch.nn.Linear(2, 2))


def test_follows_is_the_agreement_since_the_last_look(tmp_path):
    lines = [{"step": i, "rm_accuracy": share, "expert/prefers_generated": 1 - share}
             for i, share in enumerate((0.1, 0.2, 0.5, 0.7))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert experiment.follows(tmp_path, 1, 3) == {
        "follows": pytest.approx(0.6), "generated": pytest.approx(0.4)}
    assert experiment.follows(tmp_path, 3, 9) == {}


@pytest.mark.slow
def test_experiment_runs_reports_and_resumes(tmp_path, capsys):
    options = [
        "--expert", "jpeg", "--paths", "proxy,features", "--seeds", 1, "--looks", "1,2",
        "--batch-size", 2, "--scales", "1,4", "--rm-steps", 2, "--copies", 1, "--limit", 12,
        "--n", 1, "--device", "cpu", "--out", tmp_path]
    times = lambda: {p: p.stat().st_mtime for p in tmp_path.rglob("*.safetensors")}
    assert call(experiment.main, *options) == 0
    first, written = capsys.readouterr().out, times()
    assert "| features | 4 | 2 |" in first and "| real pictures |" in first
    assert (tmp_path / "curves.png").is_file() and not [*tmp_path.glob("*/checkpoints")]
    assert call(experiment.main, *options) == 0
    assert capsys.readouterr().out == first and times() == written
    assert call(experiment.main, *options, "--looks", "3") == 2
    assert "looks 1,2 (now 3)" in capsys.readouterr().err

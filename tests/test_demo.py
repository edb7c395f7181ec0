"""demo.py in headless Chromium: one server, one browser, the tiny model. Timings, with the pocket:

    python -m pytest -n0 -m slow -s tests/test_demo.py
"""
import base64
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, call, random_png

gr = pytest.importorskip("gradio")
selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

import demo  # noqa: E402
import sample  # noqa: E402
from support import page as pages  # noqa: E402
from support.weights import InputError  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
browsers = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver")
WORDS, SIZE = "a red apple", "32x32"

# demo.py in a process that tells whom it reaches for
WATCHED = """
import socket, sys
def watch(name, where):
    told = getattr(where, name)
    def call(*args, **more):
        address = args[-1] if name == "connect" else args
        host = address[0] if isinstance(address, tuple) else None
        if host not in (None, "127.0.0.1", "::1", "localhost"):
            print("reached for", host, flush=True)
        return told(*args, **more)
    setattr(where, name, call)
watch("connect", socket.socket), watch("getaddrinfo", socket)
sys.path.insert(0, sys.argv.pop(1))
import demo
from support.cli import run
"""


# ----------------------------------------------------------------------------------------- fixtures

@pytest.fixture(scope="module")
def run_folder(model_folder, tmp_path_factory):
    """A run with checkpoints at the steps 10 and 20."""
    run = tmp_path_factory.mktemp("run")
    for step, unet in ((10, "student"), (20, "second")):
        target = run / "checkpoints" / f"step-{step:06d}" / "unet_target"
        shutil.copytree(model_folder / "student", target)
        if unet == "second":
            change(target)
    lines = [{"step": step, "reward": step / 100} for step in (10, 20)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def change(folder):
    """Other weights for a UNet."""
    from unet import UNet
    unet = UNet.from_pretrained(folder)
    unet.conv_out.weight.data *= 0.5
    shutil.rmtree(folder)
    unet.save_pretrained(folder)


@pytest.fixture(scope="module")
def config(model_folder, run_folder):
    second = str(run_folder / "checkpoints/step-000020/unet_target")
    return demo.Config(
        model=str(model_folder), second=second, run=str(run_folder), device="cpu",
        precision="fp32", reward=f"pocket={model_folder / 'reward'}",
        judge=f"pocket={ROOT / 'pocket/judge'}")


@pytest.fixture(scope="module")
def studio(config):
    return demo.Studio(config)


class Server:
    def __init__(self, folder, variables=None, changes="", **options):
        """changes: to demo.py, as Python."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.output = f"http://127.0.0.1:{self.port}", folder / "output"
        argv = [f"--{name}={value}" for name, value in ({"port": self.port} | options).items()]
        script = WATCHED + changes + "run(demo.main)"
        command = [sys.executable, "-c", script, str(ROOT), *argv]
        environment = os.environ | {"TMPDIR": str(folder), "GRADIO_SHARE": "True"}
        environment |= variables or {}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            until(self.answers, 180)
        except BaseException:
            self.close()
            raise

    def answers(self):
        assert self.process.poll() is None, self.output.read_text()
        try:
            return urllib.request.urlopen(self.url, timeout=20).status == 200
        except OSError:
            return False

    def memory(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # MiB

    def close(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(config, tmp_path_factory):
    names = ("model", "second", "run", "device", "precision", "reward", "judge")
    server = Server(tmp_path_factory.mktemp("server"), {"OMP_NUM_THREADS": "1"},
                    **{name: getattr(config, name) for name in names})
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1280,900",
                     f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    browser.set_script_timeout(60)
    yield browser
    browser.quit()


@pytest.fixture
def page(server, browser):
    """A page that has drawn its first picture."""
    page = Page(browser, server.url)
    yield page
    assert server.process.poll() is None, server.output.read_text()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "this did not come about"
        time.sleep(0.05)
    return found


class Page:
    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        until(lambda: self.pngs("#drawn"))

    def one(self, css):
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def run(self, script, *args):
        return self.browser.execute_script(script, *args)

    def pngs(self, css):
        """The bytes of the pictures shown under `css`."""
        found = self.run("return [...document.querySelectorAll(arguments[0])].map(i => i.src)",
                         f"{css} img")
        return [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in found]

    def text(self, css):
        return self.run("return document.querySelector(arguments[0]).innerText.trim()", css)

    def tab(self, name):
        self.one(f"button[role=tab][data-tab-id]:nth-of-type({1 + TABS.index(name)})").click()

    def fill(self, css, words):
        field = self.one(f"{css} :is(textarea, input)")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(words or Keys.DELETE)
        return field

    def shows(self, words, css="#drawn"):
        """Wait for pictures of these words -> their bytes."""
        return until(lambda: [png for png in self.pngs(css) if facts(png)["prompt"] == words])

    def drop(self, css, name, data):
        """Drop a file on an element."""
        self.run("""
            const bytes = Uint8Array.from(atob(arguments[2]), c => c.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes], arguments[1], {type: "image/png"}));
            document.querySelector(arguments[0]).dispatchEvent(new DragEvent(
                "drop", {dataTransfer: files, bubbles: true, cancelable: true}))""",
                 css, name, base64.b64encode(data).decode())


TABS = ["Draw", "Compare", "Reward"]


def facts(png):
    return Image.open(io.BytesIO(png)).text


def pngs_in(html):
    return [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)', html)]


def drawn(studio, *asked):
    """The pictures of Draw, as PNG."""
    return pngs_in([*studio.draw(*asked)][-1])


def scores_in(text):
    return re.findall(r"(?:reward|judge) -?\d+\.\d+", text)


# -------------------------------------------------------------------------------- without a browser

@pytest.mark.parametrize("solver", ["lcm", "ddim"])
def test_the_pages_png_is_the_file_of_sample_py(solver, studio, config, tmp_path):
    if solver == "lcm":
        [png] = drawn(studio, WORDS, 3, 4.5, 7, "24x40")
        options = ["--steps", 3]
    else:
        png, options = pngs_in([*studio.compare(WORDS, 4.5, 7, "24x40")][-1])[0], ["--steps", 50]
    assert call(sample.main, "--model", config.model, "--device", "cpu", "--precision", "fp32",
                "--prompt", WORDS, "--guidance", 4.5, "--seed", 7, "--size", "24x40", "--solver",
                solver, *options, "--out", tmp_path) == 0
    assert png == (tmp_path / "00000.png").read_bytes()


@pytest.fixture(scope="module")
def lora_run(model_folder, tmp_path_factory):
    """A run of low-rank updates with a checkpoint at step 10."""
    from lora import LoRA, sharing
    from unet import UNet
    run = tmp_path_factory.mktemp("lora")
    student = sharing(UNet.from_pretrained(model_folder), time_cond_proj_dim=256, lcm_grid=50)
    lora = LoRA.new(student, rank=2)
    for p in lora.parameters():
        p.data += 0.1
    lora.save_pretrained(run / "checkpoints/step-000010/lora_target")
    (run / "log.jsonl").write_text('{"step": 10}\n')
    return run


def test_a_lora_draws_what_sample_py_draws_with_it_and_its_run_is_gone_through(
        config, lora_run, tmp_path):
    file = str(lora_run / "checkpoints/step-000010/lora_target")
    changes = {"second": None, "lora": [file], "lora_scale": ["0.5"], "run": str(lora_run)}
    studio = demo.Studio(dataclasses.replace(config, **changes))
    [png] = drawn(studio, WORDS, 2, 3.0, 0, SIZE)
    for scale in (0.5, 1):
        assert call(sample.main, "--model", config.model, "--device", "cpu", "--precision", "fp32",
                    "--prompt", WORDS, "--size", SIZE, "--lora", file, "--lora-scale", scale,
                    "--out", tmp_path / str(scale)) == 0
    assert png == (tmp_path / "0.5/00000.png").read_bytes()
    pixels = lambda data: np.asarray(Image.open(io.BytesIO(data)))
    whole = pixels((tmp_path / "1/00000.png").read_bytes())
    first = pngs_in(studio.checkpoint(1, WORDS, 2, 3.0, 0, SIZE))[0]
    assert (pixels(first) == whole).all() and (pixels(png) != whole).any()


def test_each_unet_is_loaded_once(config, monkeypatch):
    loaded, load = [], demo.Pipeline.load_unet
    monkeypatch.setattr(demo.Pipeline, "load_unet",
                        lambda self, where, *more: loaded.append(where) or load(self, where, *more))
    studio = demo.Studio(config)
    for _ in range(2):
        list(studio.draw("a red apple", 2, 3.0, 0, "32x32"))
        list(studio.compare("a red apple", 3.0, 0, "32x32"))
    assert loaded == [studio.student, config.second, config.model]


def test_compare_draws_each_student_in_the_steps_that_it_allows(config, tmp_path):
    """The grid of the second has 2 points, so 1 and 2 steps; the first's has more."""
    from unet import UNet
    UNet.from_pretrained(config.second, lcm_grid=2).save_pretrained(tmp_path / "two")
    studio = demo.Studio(dataclasses.replace(config, second=str(tmp_path / "two")))
    *_, last = studio.compare("a red apple", 3.0, 0, "32x32")
    shown = [last.count(f"<b>{calls},") for calls in ("1 call", "2 calls", "4 calls", "8 calls")]
    assert shown == [2, 2, 1, 1] and "100 calls," in last


def test_four_seeds_are_four_pictures_each_as_if_drawn_alone(studio):
    four = drawn(studio, WORDS, 2, 3.0, 5, SIZE, 4)
    assert four == [drawn(studio, WORDS, 2, 3.0, seed, SIZE)[0] for seed in range(5, 9)]
    assert len(set(four)) == 4


def test_the_strip_shows_each_steps_prediction_and_ends_in_the_picture(studio):
    html = [*studio.compare(WORDS, 3.0, 1, SIZE)][-1]
    strip = pngs_in(html[html.index('"sheet strip"'):])
    pixels = [np.array(Image.open(io.BytesIO(png))) for png in strip]
    assert len(strip) == 8 and [facts(png)["t"] for png in strip][::7] == ["999", "139"]
    alone = [np.array(Image.open(io.BytesIO(drawn(studio, WORDS, n, 3.0, 1, SIZE)[0])))
             for n in (1, 8)]
    assert np.array_equal(pixels[0], alone[0]) and np.array_equal(pixels[-1], alone[1])


def test_scores_are_those_of_the_reward(studio, config, tmp_path, capsys):
    import reward
    *_, html = studio.draw(WORDS, 2, 3.0, 0, SIZE)
    (tmp_path / "a.png").write_bytes(pngs_in(html)[0])
    for name in ("reward", "judge"):
        spec = getattr(config, name)
        assert call(reward.main, "--reward", spec, tmp_path / "a.png", "--prompt", WORDS) == 0
        said = float(capsys.readouterr().out.split()[0])
        shown = float(re.search(rf"{name} (-?\d\.\d+)", html)[1])
        assert abs(shown - said) < 0.01  # the file's pixels are rounded to 8 bits


def test_a_cut_prompt_is_told(studio):
    assert all("cut at 32" in html for html in studio.draw("house, " * 40, 1, 3.0, 0, SIZE))
    assert "cut at" not in "".join(studio.draw(WORDS, 1, 3.0, 0, SIZE))


def test_the_picture_comes_before_its_scores_and_is_encoded_once(studio, monkeypatch):
    done = []
    for where, name in ((studio, "scores"), (pages, "write_png")):
        told = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, told=told, name=name, **more: (
            done.append(name), told(*args, **more))[1])
    for count in (1, 4):
        done.clear()
        growing = studio.draw(WORDS, 2, 3.0, 0, SIZE, count)
        picture = next(growing)
        assert done == ["write_png"] * count and not scores_in(picture)
        assert picture.count("reward …") == picture.count("judge …") == count
        [whole] = growing
        assert done[count:] == ["scores"] * count and pngs_in(whole) == pngs_in(picture)
        assert len(scores_in(whole)) == 2 * count and "…" not in whole


BAD = {
    "no step": (WORDS, 0, 3.0, 0, SIZE),
    "steps beyond the bound": (WORDS, 9, 3.0, 0, SIZE),
    "steps that are nothing": (WORDS, None, 3.0, 0, SIZE),
    "a guidance without bound": (WORDS, 2, float("inf"), 0, SIZE),
    "a guidance that is no number": (WORDS, 2, float("nan"), 0, SIZE),
    "a seed below zero": (WORDS, 2, 3.0, -1, SIZE),
    "no seed": (WORDS, 2, 3.0, None, SIZE),
    "a size that does not divide": (WORDS, 2, 3.0, 0, "33x32"),
    "a size that is none": (WORDS, 2, 3.0, 0, "big"),
    "no size": (WORDS, 2, 3.0, 0, ""),
    "a size beyond the bound": (WORDS, 2, 3.0, 0, "4096x32"),
    "a prompt without end": ("a" * 1001, 2, 3.0, 0, SIZE),
    "a prompt that is no text": (["a"], 2, 3.0, 0, SIZE),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_page_asks_for_is_bounded_on_the_server(case, studio):
    with pytest.raises(InputError):
        next(studio.draw(*BAD[case]))


def test_a_reward_that_was_not_offered_is_not_loaded(studio):
    for spec in ("python:os.system", "pocket=/etc", None):
        with pytest.raises(InputError, match="offered"):
            studio.score(WORDS, spec, [], 1, 2, 3.0, 0, SIZE)


def test_too_many_pictures_and_checkpoints_that_are_not_there_are_refused(studio):
    with pytest.raises(InputError, match="17 pictures"):
        studio.score(WORDS, "jpeg", ["a.png"] * 17, 0, 2, 3.0, 0, SIZE)
    for number in (0, 3, 1.5, None):
        with pytest.raises(InputError, match="there are 2"):
            studio.checkpoint(number, WORDS, 2, 3.0, 0, SIZE)


def test_settings_of_the_page_and_of_sample_py_come_back(studio, tmp_path):
    (tmp_path / "a.png").write_bytes(drawn(studio, "lapin 🐇", 3, 6.25, 9, "24x40")[0])
    assert pages.settings_in(tmp_path / "a.png") == ("lapin 🐇", 3, 6.25, 9, "24x40")


@pytest.mark.parametrize("data", [random_png(0), b"", b"no PNG", random_png(0)[:200]])
def test_a_file_without_settings_is_told_by_its_name(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match="^a.png: .*sample.py"):
        pages.settings_in(tmp_path / "a.png")


def test_an_error_is_one_line_of_text_and_the_outputs_stay(capsys):
    def broken(*inputs):
        raise RuntimeError("<b>out\nof memory</b>")

    def growing(*inputs):
        yield "first"
        raise InputError("no")
    *kept, said = pages.told(broken, 2)()
    assert said == '<p role="alert">&lt;b&gt;out of memory&lt;/b&gt;</p>'
    assert kept == [gr.skip(), gr.skip()] and "Traceback" in capsys.readouterr().err
    first, last = pages.told(growing)()
    assert first == ("first", "") and last == (gr.skip(), '<p role="alert">no</p>')


def test_a_newer_key_ends_the_older_picture_and_only_that_pages(studio):
    blocks = pages.page(studio)
    key, draw = (next(f.fn for f in blocks.fns.values() if f.name == name)
                 for name in ("key", "draw"))
    mine, other = (types.SimpleNamespace(session_hash=name) for name in "ab")
    key(5, mine)
    asked = WORDS, 2, 3.0, 0, SIZE, False
    assert [*draw(*asked, 4, mine)] == [(gr.skip(), gr.skip())]
    for number, request in ((5, mine), (6, mine), (0, other)):
        assert [len(pngs_in(html)) for html, _ in draw(*asked, number, request)] == [1, 1]


def test_a_newer_key_ends_the_scoring_of_a_picture_that_is_shown(studio, monkeypatch):
    blocks = pages.page(studio)
    key, draw = (next(f.fn for f in blocks.fns.values() if f.name == name)
                 for name in ("key", "draw"))
    mine, began = types.SimpleNamespace(session_hash="a"), []
    load = studio.load_reward
    monkeypatch.setattr(studio, "load_reward", lambda spec: (
        began.append(spec), key(len(began), mine), load(spec))[2])  # a key during the first score
    growing = draw(WORDS, 2, 3.0, 0, SIZE, False, 0, mine)
    assert len(pngs_in(next(growing)[0])) == 1 and not began
    assert [*growing] == [(gr.skip(), gr.skip())] and began == [studio.scorers["reward"]]


def test_one_worker_a_bounded_queue_and_no_open_api(studio):
    blocks = pages.page(studio)
    assert blocks._queue.max_size == 16 and not blocks.api_open and not blocks.analytics_enabled
    for function in blocks.fns.values():
        assert function.api_visibility == "private" or function.name == "forget"
        if function.fn and function.name not in ("key", "forget"):
            assert (function.queue, function.concurrency_id, function.concurrency_limit) == (
                True, "one", 1), function.name


@pytest.mark.parametrize("host, warned", [("127.0.0.1", False), ("0.0.0.0", True)])
def test_another_host_is_warned_of_and_there_is_never_a_tunnel(
        host, warned, studio, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: given.update(options))
    pages.serve(studio, host, 7860)
    assert given["server_name"] == host and given["share"] is False
    assert ("warning" in capsys.readouterr().out) == warned
    assert demo.Config().host == "127.0.0.1"


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert call(demo.main) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


WRONG = {
    "a run without checkpoints": (["--run", "MODEL"], "no checkpoints"),
    "no such run": (["--run", "MODEL/none"], "MODEL/none"),
    "no such student": (["--unet", "MODEL/none"], "none"),
    "a teacher": (["--unet", "MODEL/unet"], "a teacher"),
    "no such reward": (["--reward", "hpsv3"], "hpsv3"),
    "a port that is none": (["--port", "70000"], "70000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_one_line_and_exit_code_2(case, model_folder, capsys):
    argv, named = WRONG[case]
    argv = [word.replace("MODEL", str(model_folder)) for word in argv]
    assert call(demo.main, "--model", model_folder, "--device", "cpu", *argv) == 2
    message = capsys.readouterr().err
    assert named.replace("MODEL", str(model_folder)) in message and message.count("\n") == 1


def test_a_port_that_is_taken_is_told(studio, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"{port}: cannot listen"):
            pages.serve(studio, "127.0.0.1", port)


def test_gradio_is_imported_in_one_file_and_late():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("pocket/*.py")]
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()
             if re.match(r"\s*(import|from) gradio", line)]
    assert {name for name, _ in lines} == {"page.py"}
    assert all(line.startswith("    ") for _, line in lines)


# ------------------------------------------------------------------------------------- in a browser

@browsers
def test_the_picture_follows_the_words(page, studio):
    page.fill("#prompt", "rocket")
    [png] = page.shows("rocket")
    assert png == drawn(studio, "rocket", 2, 3.0, 0, SIZE)[0]
    scored = r"seed 0, .* s\s+reward -?\d\.\d+\s+judge -?\d\.\d+"
    until(lambda: re.search(scored, page.text("#drawn")))
    field = page.one("#prompt textarea")
    for keys, words in ((["s"], "rockets"), ([Keys.BACKSPACE], "rocket"),
                        ([Keys.CONTROL, "ax"], ""), ([Keys.CONTROL, "v"], "rocket")):
        field.send_keys(*keys)
        [other] = page.shows(words)
        assert (other == png) == (words == "rocket")
    assert page.run("return getComputedStyle(document.querySelector('#drawn img'))"
                    ".imageRendering") == "pixelated"


@browsers
def test_every_field_changes_the_picture(page, studio):
    for css, value, wanted in (
            ("#w", "5.5", (2, 5.5, 0, SIZE)), ("#seed", "11", (2, 5.5, 11, SIZE)),
            ("#size", "24x40", (2, 5.5, 11, "24x40")), ("#steps", "4", (4, 5.5, 11, "24x40"))):
        page.fill(css, value).send_keys(Keys.TAB)
        wanted = drawn(studio, WORDS, *wanted)
        until(lambda wanted=wanted: page.pngs("#drawn") == wanted)
    page.one("#four input").click()
    until(lambda: len(page.pngs("#drawn")) == 4)
    assert page.pngs("#drawn")[0] == wanted[0]


@browsers
def test_two_hundred_fast_keys_leave_no_stale_picture(page, studio):
    page.fill("#steps", "8").send_keys(Keys.TAB)
    page.one("#four input").click()  # the slower, the more keys fall into one drawing
    until(lambda: len(page.pngs("#drawn")) == 4)
    words = ("a green heart, snow and a fish " * 7)[:200].strip()
    page.fill("#prompt", words)
    found = page.shows(words)
    until(lambda: "…" not in page.text("#drawn"))
    time.sleep(1)  # whatever might still come
    *_, html = studio.draw(words, 8, 3.0, 0, SIZE, 4)
    assert page.pngs("#drawn") == found == pngs_in(html)
    assert scores_in(page.text("#drawn")) == scores_in(html)


@browsers
def test_a_key_makes_two_calls_and_another_only_if_it_gives_a_drawing_up(page):
    def calls():
        found = page.run("return performance.getEntriesByType('resource').map(c => c.name)")
        return [url.partition("/gradio_api/")[2].partition("?")[0] for url in found]

    def typed(letters):
        page.run("performance.clearResourceTimings()")
        page.one("#prompt textarea").send_keys(letters)
        page.shows(page.one("#prompt textarea").get_attribute("value"))
        until(lambda: "…" not in page.text("#drawn"))
    typed(" ")
    time.sleep(0.5)  # until nothing is on its way
    typed("t")
    until(lambda: sorted(calls()) == ["queue/data", "queue/join"])
    page.fill("#steps", "8").send_keys(Keys.TAB)
    page.one("#four input").click()
    until(lambda: len(page.pngs("#drawn")) == 4)
    typed("able and a chair")
    assert "run/predict" in calls()  # of a function outside the queue
    assert calls().count("queue/join") < 15


# Every picture, with the words under it, that stands on the page from now on.
WITNESS = """
const state = () => [document.querySelector("#drawn img").src,
                     document.querySelector("#drawn figcaption").innerText];
window.states = [state()];
new MutationObserver(() => {
  if (JSON.stringify(state()) !== JSON.stringify(states.at(-1))) states.push(state());
}).observe(document.querySelector("#drawn"),
           {subtree: true, childList: true, attributes: true, characterData: true});
"""


@browsers
def test_scores_come_after_their_picture_and_never_stand_under_another(page, studio):
    until(lambda: scores_in(page.text("#drawn")))
    page.run(WITNESS)
    field = page.one("#prompt textarea")
    for i, letter in enumerate(" green heart, snow and a fish"):
        field.send_keys(letter)
        time.sleep(i % 4 * 0.15)  # keys fall into drawings, into scorings and between them
    words = field.get_attribute("value")
    page.shows(words)
    until(lambda: scores_in(page.text("#drawn")))
    states = [(pngs_in(src)[0], scores_in(text))
              for src, text in page.run("return window.states")]
    assert states[-1][1] and facts(states[-1][0])["prompt"] == words
    wanted = {}
    for (png, scores), (before, _) in zip(states[1:], states):
        prompt = facts(png)["prompt"]
        if prompt not in wanted:
            *_, html = studio.draw(prompt, 2, 3.0, 0, SIZE)
            wanted[prompt] = scores_in(html)
        assert not scores or (scores == wanted[prompt] and before == png), prompt


@browsers
def test_compare_shows_teacher_students_and_strip(page, studio):
    page.tab("Compare")
    until(lambda: page.one("#begin").is_displayed())
    page.one("#begin").click()
    until(lambda: "teacher, 100 calls" in page.text("#compared"))
    assert page.pngs("#compared") == pngs_in([*studio.compare(WORDS, 3.0, 0, SIZE)][-1])
    said = page.text("#compared")
    assert len(page.pngs("#compared")) == 1 + 4 + 4 + 8 and said.count("8 calls, ") == 2
    assert said.count("reward ") == said.count("judge ") == 9 and "t = 999" in said


@browsers
def test_a_dropped_png_brings_its_settings_back(page, studio):
    [png] = drawn(studio, "a fish", 4, 6.25, 12, "40x24")
    page.drop("body", "a.png", png)  # anywhere on the page
    until(lambda: page.pngs("#drawn") == [png])
    shown = [page.one(f"{css} :is(textarea, input)").get_attribute("value")
             for css in ("#prompt", "#steps", "#w", "#seed", "#size")]
    assert shown == ["a fish", "4", "6.25", "12", "40x24"]
    page.drop("#restore button", "b.png", random_png(0))  # on the field itself
    until(lambda: "b.png: no 'prompt' in it" in page.text("#said .prose"))
    assert page.pngs("#drawn") == [png]
    page.drop("body", "c.png", drawn(studio, "moon", 2, 3.0, 0, SIZE)[0])
    page.shows("moon")
    assert page.text("#said .prose") == ""


@browsers
def test_a_bad_size_is_one_line_of_text_and_the_page_goes_on(page):
    before = page.pngs("#drawn")
    page.fill("#size", "<i>33x32</i>")
    wrong = "--size <i>33x32</i>: expected HxW in pixels, such as 512x768"
    until(lambda: page.text("#said .prose") == wrong)
    assert page.pngs("#drawn") == before
    page.fill("#size", "16x16")
    until(lambda: facts(page.pngs("#drawn")[0]) and page.pngs("#drawn") != before)
    assert page.text("#said .prose") == ""


@browsers
def test_words_are_never_html_nor_script(page):
    words = "\"><img src=x onerror=document.title='broken'>${document.title='broken'}{{value}}"
    page.run("document.title = 'whole'")
    page.fill("#prompt", words)
    page.shows(words)
    page.drop("#restore button", "<img src=x onerror=document.title='broken'>.png", random_png(0))
    until(lambda: "no 'prompt' in it" in page.text("#said .prose"))
    assert page.run("return document.title") == "whole"
    assert len(page.pngs("#drawn")) == 1


@browsers
def test_two_pages_do_not_disturb_each_other(page, browser, studio, server):
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    other, words = Page(browser, server.url), ("a smiling cat", "snow, cold")
    try:
        other.fill("#prompt", words[1])
        browser.switch_to.window(first)
        page.fill("#prompt", words[0])
        [png] = page.shows(words[0])
        browser.switch_to.window(browser.window_handles[1])
        [second] = other.shows(words[1])
    finally:
        browser.switch_to.window(browser.window_handles[1])
        browser.close()
        browser.switch_to.window(first)
    assert [png, second] == [drawn(studio, w, 2, 3.0, 0, SIZE)[0] for w in words]


@browsers
def test_a_click_saves_the_picture(page, browser, tmp_path):
    browser.execute_cdp_cmd("Browser.setDownloadBehavior",
                            {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.one("#drawn img").click()
    file = tmp_path / f"{WORDS} 0.png"
    until(file.is_file)
    assert file.read_bytes() == page.pngs("#drawn")[0]


@browsers
def test_pictures_drawn_and_dropped_are_scored_best_first(page, studio):
    page.tab("Reward")
    until(lambda: page.one("#judge").is_displayed())
    page.drop("#files button", "noise.png", random_png(3))
    until(lambda: "noise.png" in page.text("#files").replace("\n", ""))
    page.one("#judge").click()
    until(lambda: len(page.pngs("#scored")) == 9)
    scores = [float(score) for score in re.findall(r"reward (-?\d\.\d+)", page.text("#scored"))]
    assert len(scores) == 9 and scores == sorted(scores, reverse=True)
    assert "noise.png" in page.text("#scored")


@browsers
def test_the_slider_goes_through_the_runs_checkpoints(page, studio):
    page.tab("Reward")
    until(lambda: page.one("#at").is_displayed())
    for number in (2, 1):
        page.fill("#at", str(number)).send_keys(Keys.TAB)
        until(lambda n=number: f"step {n}0, reward 0.{n}00 in training" in page.text("#reached"))
        assert page.pngs("#reached") == pngs_in(
            studio.checkpoint(number, WORDS, 2, 3.0, 0, SIZE))


def test_requests_beyond_the_bound_are_refused_and_the_server_goes_on(server):
    def join(i):
        body = {"data": [f"words {i}", 8, 3.0, 0, SIZE, True, 0], "session_hash": f"s{i}",
                "fn_index": number}
        request = urllib.request.Request(
            f"{server.url}/gradio_api/queue/join", json.dumps(body).encode(),
            {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as error:
            assert "Queue is full" in error.read().decode()
            return error.code
    config = json.load(urllib.request.urlopen(f"{server.url}/config", timeout=20))
    number = next(f["id"] for f in config["dependencies"] if f["api_name"] == "draw")
    codes = [join(i) for i in range(40)]
    assert codes[0] == 200 and codes.count(200) < 40 and set(codes) == {200, 503}
    status = f"{server.url}/gradio_api/queue/status"
    until(lambda: json.load(urllib.request.urlopen(status, timeout=20))["queue_size"] == 0)
    assert join(99) == 200


@browsers
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_a_laptop_or_a_phone(width, page, browser):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 840, "deviceScaleFactor": 1, "mobile": width < 500})
    try:
        page.one("#four input").click()
        until(lambda: len(page.pngs("#drawn")) == 4)
        for name in TABS:
            page.tab(name)
            assert page.run("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@browsers
def test_it_listens_here_only_and_nothing_is_fetched_from_elsewhere(page, browser, server):
    listens = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
               if line.split()[3] == "0A" and line.split()[1].endswith(f":{server.port:04X}")]
    assert listens == [f"0100007F:{server.port:04X}"]  # 127.0.0.1
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {message["params"]["request"]["url"] for message in sent
            if message["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith(server.url) for url in urls)
    here = (server.url, "data:", "blob:", "chrome:")  # chrome: the browser's own empty tab
    assert not [url for url in urls if not url.startswith(here)]
    assert "reached for" not in server.output.read_text()
    assert "Traceback" not in server.output.read_text()


# --------------------------------------------------------------------------------------------- slow

@browsers
@pytest.mark.slow
def test_five_hundred_pictures_do_not_add_to_memory(page, server):
    field, sizes = page.one("#prompt textarea"), []
    for i in range(500):
        full = len(field.get_attribute("value")) > 300
        field.send_keys(*[Keys.CONTROL, "ax"] if full else str(i % 10))
        page.shows(field.get_attribute("value"))
        if i in (100, 499):
            nodes = page.run("return document.querySelectorAll('*').length")
            sizes.append((server.memory(), nodes))
    (before, nodes), (after, nodes_after) = sizes
    print(f"\nserver: {before:.0f} MiB after 100 pictures, {after:.0f} after 500")
    assert after - before < 40 and nodes_after <= nodes + 10


# What the server's clock says of a drawing, on lines of its output.
CLOCKED = """
import time
from pipeline import Pipeline
from support import page
def clocked(where, name, what):
    told = getattr(where, name)
    def call(*args, **more):
        begin = time.time()
        found = told(*args, **more)
        print("clock", what, begin, time.time(), flush=True)
        return found
    setattr(where, name, call)
clocked(Pipeline, "draw", "network"), clocked(Pipeline, "decode", "decode")
clocked(page, "encoded", "png")
def draw(self, *args, told=demo.Studio.draw, **more):
    begin = time.time()
    for html, what in zip(told(self, *args, **more), ("picture", "scores")):
        print("clock", what, begin, time.time(), flush=True)
        yield html
demo.Studio.draw = draw
"""
# What the browser's clock says, in seconds since 1970, as time.time().
CLOCK = """
window.now = () => (performance.timeOrigin + performance.now()) / 1000;
addEventListener("keydown", () => { window.pressed = now(); }, true);
document.addEventListener("load", ({ target }) => {
  if (target.matches?.("#drawn img")) requestAnimationFrame(() => {
    window.shown = now();
    window.named = target.dataset.name; });
}, true);
window.requested = () => {
  const calls = performance.getEntriesByType("resource");
  performance.clearResourceTimings();
  const join = calls.filter(call => call.name.includes("queue/join")).at(-1);
  return [(performance.timeOrigin + join.startTime) / 1000, calls.length];
};
"""


def typed(page, field, letters, pause):
    """Type, and wait for the picture and its scores -> when the last key was pressed and its
    picture shown, when the browser asked for it, and how many calls of the server there were."""
    page.run("performance.clearResourceTimings()")
    for i, letter in enumerate(letters):
        time.sleep(pause if i else 0)
        field.send_keys(letter)
    name = f"{field.get_attribute('value')} 0.png"  # words of 40 letters at most
    until(lambda: page.run("return window.named") == name)
    until(lambda: "…" not in page.text("#drawn"))
    time.sleep(0.15)  # hands need longer
    return page.run("return [window.pressed, window.shown, ...window.requested()]")


def split(pressed, shown, asked, output):
    """Where the time between a key and its picture went -> {part: seconds}, in order."""
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("clock ")]
    spans = {what: (float(begin), float(end)) for what, begin, end in lines
             if float(begin) >= pressed}
    took = {what: end - begin for what, (begin, end) in spans.items()}
    begin, end = spans["picture"]
    return {"key to request": asked - pressed, "request to handler (HTTP, queue)": begin - asked,
            "text and steps": took["network"] - took["decode"], "decoding": took["decode"],
            "PNG": took["png"], "HTML": took["picture"] - took["network"] - took["png"],
            "handler to screen (gradio, browser)": shown - end}


def tell(name, seconds):
    print(f"{name}: median {1000 * statistics.median(seconds):.1f} ms, "
          f"95% {1000 * statistics.quantiles(seconds, n=20)[-1]:.1f} ms")


@browsers
@pytest.mark.slow
def test_latency_from_the_last_key_to_the_picture(browser, tmp_path):
    """Prints it. On a machine that does something else meanwhile the numbers mean nothing."""
    server = Server(tmp_path, changes=CLOCKED)
    try:
        page = Page(browser, server.url)
        page.run(CLOCK)
        field, parts, calls, last = page.one("#prompt textarea"), [], [], []
        for i in range(90):
            if i % 15 == 0:
                field.send_keys(Keys.CONTROL, "ax")
            *times, count = typed(page, field, "green heart, fish"[i % 15], 0)
            parts.append(split(*times, server.output.read_text()))
            calls.append(count)
        for word in ("smiling", "snowman", "rocket", "firefighter", "lighthouse") * 4:
            field.send_keys(Keys.CONTROL, "ax")
            pressed, shown, *_ = typed(page, field, word, 0.15)
            last.append(shown - pressed)
        parts = parts[10:]  # the first are slower
        print(f"\n{len(parts)} keys, {os.cpu_count()} cores, OMP_NUM_THREADS "
              f"{os.environ.get('OMP_NUM_THREADS', 'not set')}, load {os.getloadavg()[0]:.1f}, "
              f"{statistics.median(calls):.0f} calls of the server a key")
        ours = [sum(list(part.values())[2:6]) for part in parts]
        tell("key to picture", [sum(part.values()) for part in parts])
        tell("ours", ours)
        for name in parts[0]:
            tell(f"    {name}", [part[name] for part in parts])
        tell("last key of a word to picture, a key every 150 ms", last)
        assert all(0 < part < sum(whole.values()) for part, whole in zip(ours, parts))
    finally:
        server.close()

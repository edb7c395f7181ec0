"""report.md and report.html. The pictures of these tests are of one colour each, which names their
row, prompt and seed, so that what the page shows is read from its pixels, not from its script."""
import base64
import html
import json
import math
import re
import shutil
import sys
import time

import numpy as np
import pytest
from PIL import Image

from support import report
from support.weights import InputError

HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><img src=x onerror='window.hacked = 1'>",
    "\"quotes\" 'and' <!-- & {{table}} \\u003c", "$x^2$ | a\nline [link](http://example.org/)",
]
PROMPTS = HOSTILE + ["a red apple", "a green apple", "a fish"]
# row, its place in the colours, pictures a prompt
ROWS = [("real pictures", 0, 1), ("teacher, 50-step", 1, 2), ("student, 2-step", 2, 2),
        ("<b>mine</b>, 4-step", 3, 2)]


def colour(row, prompt, picture):
    return (40 * row + 20, 8 * prompt + 4, 100 * picture + 20)


def score(key, row, prompt, picture):
    return round(math.sin(len(key) + 5 * row + 3 * prompt + picture), 3)


def interval(mean, half=0.02, of="prompts"):
    return {"mean": mean, "low": mean - half, "high": mean + half, "of": of}


def make(folder, prompts=PROMPTS, rows=ROWS):
    """A results dict and its pictures in `folder`."""
    columns = {
        "reward": dict(title="reward", better="higher", trained=True, per_picture=True),
        "judge": dict(title="judge", better="higher", trained=False, per_picture=True),
        "frechet": dict(title="Frechet", better="lower", trained=False, per_picture=False),
        "calls2": dict(title="other", better=None, trained=False, per_picture=False)}
    made = []
    for name, r, n in rows:
        paths = [[f"pictures/{r}-{i}-{k}.png" for k in range(n)] for i in range(len(prompts))]
        for i, line in enumerate(paths):
            for k, path in enumerate(line):
                (folder / path).parent.mkdir(exist_ok=True, parents=True)
                Image.new("RGB", (16, 16), colour(r, i, k)).save(folder / path)
        scores = {key: [[score(key, r, i, k) for k in range(n)] for i in range(len(prompts))]
                  for key in ("reward", "judge")}
        made.append({
            "name": name, "kind": ["real", "teacher", "student", "student"][r],
            "steps": [None, 50, 2, 4][r], "calls": [None, 100, 2, 4][r], "n": n, "seeds": None,
            "seconds_per_image": [None, 0.4341, 0.0185, 0.037][r],
            "summary": {"reward": interval([0.662, 0.736, 0.748, 0.751][r], of="training seeds"),
                        "judge": interval([0.649, 0.705, 0.701, 0.707][r]),
                        "frechet": interval([0.0, 12.3456, 101.27, 7.5][r])},
            "win": None if r < 2 else {"against": rows[1][0] if len(rows) > 1 else name,
                                       "by": "judge", "rate": 0.482, "low": 0.451, "high": 0.513,
                                       "n": 1024},
            "votes": None, "scores": scores, "pictures": paths})
    return {"version": 2, "command": "python evaluate.py --real", "date": "2026-11-25T22:10:31",
            "versions": {"torch": "2.9"}, "protocol": None, "source": "heldout-*.tar",
            "prompts": prompts, "columns": columns, "rows": made}


def written(folder, results, **options):
    files = report.write(results, folder, **options)
    assert [file.name for file in files] == ["report.md", "report.html"]
    return [file.read_text(encoding="utf-8") for file in files]


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page,
                                re.DOTALL)[1])


def table_of(markdown):
    """-> heads, {name of the row: cells}"""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines()
             if line.startswith("|")]
    cells = [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in line] for line in lines]
    return cells[0][1:], {line[0]: line[1:] for line in cells[2:]}


def test_the_markdown_table_equals_the_numbers(tmp_path):
    results = make(tmp_path)
    results["rows"][2]["votes"] = results["rows"][2]["win"] | {"rate": 0.541}
    results["rows"][3]["summary"]["judge"] |= {"low": None, "high": None}
    markdown, _ = written(tmp_path, results)
    heads, rows = table_of(markdown)
    assert heads == [
        "preferred by people", "win rate", "Frechet (lower is better)",
        "reward (maximised in training)", "judge (higher is better)", "other",
        "network calls (a picture)", "seconds (a picture)", "pictures (a prompt)"]
    assert list(rows) == [name for name, _, _ in ROWS]
    assert rows["student, 2-step"] == [
        "54.1% (45.1% to 51.3%)", "48.2% (45.1% to 51.3%)", "101.3 (101.2 to 101.3)",
        "0.748 (0.728 to 0.768*)", "0.701 (0.681 to 0.721)", "", "2", "0.018", "2"]
    assert rows["real pictures"] == [
        "", "", "0.000 (-0.020 to 0.020)", "0.662 (0.642 to 0.682*)", "0.649 (0.629 to 0.669)", "",
        "", "", "1"]
    assert rows["<b>mine</b>, 4-step"][4] == "0.707 (n = 1)"
    spread = "mean minus and plus standard deviation over training seeds"
    assert f"over prompts; \\* {spread}" in markdown
    assert "Win rate: against teacher, 50-step, by judge" in markdown
    assert "- Command: python evaluate.py --real" in markdown


def test_the_headline_is_the_last_students_win_rate_and_distance(tmp_path):
    markdown, _ = written(tmp_path, make(tmp_path))
    lines = [line for line in markdown.splitlines() if line.startswith("- ")][:4]
    assert [line[2:].split(":")[0] for line in lines] == ["win rate", "Frechet", "judge", "reward"]
    assert "**48.2%** (45.1% to 51.3%, n = 1024; against teacher, 50-step, by judge)" in lines[0]
    assert "**7.500**" in lines[1] and "teacher, 50-step: 12.35" in lines[1]
    assert "maximised in training" in lines[3]


def test_the_size_limit_is_kept_and_the_choice_is_even(tmp_path):
    results = make(tmp_path, [f"prompt {i}" for i in range(100)], ROWS[1:3])
    for file in (tmp_path / "pictures").iterdir():
        noise = np.random.default_rng(len(file.name)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    _, page = written(tmp_path, results, limit_bytes=90_000)
    assert 89_000 < len(page.encode()) <= 90_000  # a prompt takes about 900 bytes
    shown = sorted({unit["prompt"] for unit in data_of(page)["units"]})
    gaps = np.diff([-1, *shown, 100])
    assert 10 < len(shown) < 100 and gaps.max() <= 2 * gaps[1:-1].min()
    assert {unit["picture"] for unit in data_of(page)["units"]} == {0}  # more prompts before more
    with pytest.raises(InputError, match="limit_bytes 1000: .* before any picture"):
        written(tmp_path, results, limit_bytes=1000)


def test_small_pictures_are_lossless_and_large_ones_reduced(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    for name, size in (("small", (128, 100)), ("large", (600, 300))):
        Image.fromarray(noise).crop((0, 0, *size)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.webp").write_bytes(
            base64.b64decode(report.webp(tmp_path / f"{name}.png")))
    small = Image.open(tmp_path / "small.webp").convert("RGB")
    assert np.array_equal(np.array(small), noise[:100, :128])
    assert Image.open(tmp_path / "large.webp").size == (256, 128)


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    results = make(tmp_path)
    (tmp_path / "pictures/2-4-0.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"pictures/2-4-0\.png: results\.json names this picture"):
        written(tmp_path, results)
    (tmp_path / "pictures/2-4-0.png").unlink()
    with pytest.raises(InputError, match="2-4-0.*cannot be read"):
        written(tmp_path, results)
    assert not list(tmp_path.glob("report.*"))  # whole or not at all
    results["rows"][1]["name"] = results["rows"][0]["name"]
    with pytest.raises(InputError, match="two rows are named real pictures"):
        written(tmp_path, results)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[evaluate\]'"):
        written(tmp_path, make(tmp_path))


def test_each_row_is_a_labelled_point_of_both_plots(tmp_path):
    results = make(tmp_path)
    results["rows"][1]["name"] = results["rows"][2]["win"]["against"] = "$\\alpha & co"
    results["rows"][3]["win"]["against"] = "$\\alpha & co"
    _, page = written(tmp_path, results)
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 2 and page.count("<ol>") == 0
    for plot in plots:
        texts = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot)]
        assert all(row["name"] in texts for row in results["rows"])
        assert "var(--ink)" in plot and "#0a000" not in plot
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    # where names do not fit: the numbers of the rows, and a list of these
    results["rows"] = [row | {"name": f"{row['name']} with a long name, copy {i}", "win": None}
                       for i in range(4) for row in results["rows"]]
    _, page = written(tmp_path, results)
    for plot, key in zip(re.findall(r"<svg.*?</svg>", page, re.DOTALL),
                         re.findall(r"<ol>(.*?)</ol>", page)):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", plot)
        assert all(str(i) in texts for i in range(1, 17))
        found = {int(i): html.unescape(name) for i, name in
                 re.findall(r"<li value=(\d+)>(.*?)</li>", key)}
        assert found == {i: row["name"] for i, row in enumerate(results["rows"], 1)}


def test_a_line_joins_one_model_at_several_steps(tmp_path):
    from matplotlib.figure import Figure
    rows = make(tmp_path)["rows"][1:]
    rows[2]["name"] = "student, 4-step"
    axes = Figure().subplots()
    report.draw(axes, rows, [], "calls", "judge")
    joined = [line.get_xydata().tolist() for line in axes.lines if line.get_linewidth() > 1
              and len(set(line.get_xdata())) > 1]
    assert joined == [[[2, 0.701], [4, 0.707]]]


def test_the_same_results_make_the_same_page(tmp_path):
    results = make(tmp_path)
    assert written(tmp_path, results) == written(tmp_path, results)


def test_the_file_names_no_address(tmp_path):
    _, page = written(tmp_path, make(tmp_path))
    assert page.count("http") == 2 + 1  # http-equiv, twice "http" in the hostile prompt's units
    assert "//example.org" not in re.sub(r'"text": "[^"]*"', "", page)
    for value in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert value.startswith(("#", "data:"))
    assert "default-src 'none'" in page and "@import" not in page
    assert not re.search(r"url\((?!#)", page)


# ---- in a browser


@pytest.fixture(scope="session")
def chrome(tmp_path_factory):
    """One headless browser for all tests."""
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if binary is None or shutil.which("chromedriver") is None:
        pytest.skip("no chromium with its chromedriver is installed")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """A report in the browser, and what people do with it."""

    def __init__(self, chrome, folder, results=None):
        self.chrome, self.folder = chrome, folder
        report.write(make(folder) if results is None else results, folder)
        self.rows = [name for name, _, _ in ROWS]
        chrome.execute_cdp_cmd("Browser.setDownloadBehavior", {
            "behavior": "allow", "downloadPath": str(folder / "downloads")})
        self.load()
        self.js("localStorage.clear()")
        self.load()

    def load(self):
        self.chrome.get((self.folder / "report.html").as_uri())

    def js(self, script, *arguments):
        return self.chrome.execute_script(script, *arguments)

    def get(self, expression):
        return self.js(f"return {expression}")

    def text(self, identifier):
        return self.get(f"document.getElementById('{identifier}').textContent").strip()

    def hidden(self, identifier):
        return not self.get(f"document.getElementById('{identifier}').checkVisibility()")

    def set(self, identifier, value):
        self.js("const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                "e.dispatchEvent(new Event('input', {bubbles: true}))", identifier, value)

    def choose(self, a, b, seed=0):
        rows = data_of((self.folder / "report.html").read_text())["rows"]
        for identifier, value in (("a", rows.index(a)), ("b", rows.index(b)), ("seed", seed)):
            self.set(identifier, value)

    def click(self, identifier):
        self.chrome.find_element("id", identifier).click()

    def press(self, *keys):
        from selenium.webdriver import ActionChains
        ActionChains(self.chrome).send_keys(*keys).perform()

    def seen(self):
        """-> (row, prompt, seed) of the picture on the left, and of that on the right"""
        found = []
        for side in ("left", "right"):
            red, green, blue = self.chrome.execute_async_script("""
                const [side, done] = arguments, image = document.getElementById(side);
                image.decode().then(() => {
                  const canvas = new OffscreenCanvas(16, 16).getContext("2d");
                  canvas.drawImage(image, 0, 0);
                  done([...canvas.getImageData(8, 8, 1, 1).data].slice(0, 3));
                })""", side)
            found.append(((red - 20) // 40, (green - 4) // 8, (blue - 20) // 100))
        return found

    def saved(self):
        file = self.folder / "downloads" / "votes.json"
        file.unlink(missing_ok=True)
        self.click("save")
        for _ in range(100):
            if file.exists():
                return json.loads(file.read_text())
            time.sleep(0.05)
        raise TimeoutError(file)


@pytest.fixture
def page(chrome, tmp_path):
    return Page(chrome, tmp_path)


LEFT, RIGHT, DOWN, BACK = "\ue012", "\ue014", "\ue015", "\ue003"
TEACHER, STUDENT = ROWS[1][0], ROWS[2][0]


def rate_of(text):
    """"48.2%...95%: 45.1 to 51.3%. 3 for, 2 against, 1 ties" -> its numbers"""
    return [float(x) for x in re.search(
        r"^([\d.]+)%.*95%: ([\d.]+) to ([\d.]+)%\. (\d+) for, (\d+) against, (\d+) ties", text,
        re.DOTALL).groups()]


def test_votes_are_counted_and_saved(page):
    """By the pixels: the student wins every prompt, but for two ties and one loss."""
    page.choose(STUDENT, TEACHER, seed=3)
    page.click("start")
    expected, order = [], 2 * len(PROMPTS)
    for number in range(order):
        assert page.text("count") == f"{number + 1} of {order}"
        (left, prompt, seed), right = page.seen()
        assert {left, right[0]} == {1, 2} and right[1:] == (prompt, seed)
        assert page.text("prompt") == PROMPTS[prompt].strip()
        better = "left" if left == 2 else "right"
        choice = {0: "tie", 4: "tie"}.get(number, better)
        if number == 7:
            choice = "right" if better == "left" else "left"
        key = {"left": LEFT, "right": RIGHT, "tie": " " if number else DOWN}[choice]
        assert page.hidden("result") and not page.text("result")  # until the end
        page.press(key)
        expected.append({"prompt": prompt, "picture": seed, "left": "a" if left == 2 else "b",
                         "choice": choice})
    assert page.text("count") == f"All {order} votes given"
    # the first pictures of all prompts before the second ones
    assert [vote["picture"] for vote in expected] == [0] * 7 + [1] * 7
    assert [vote["left"] for vote in expected].count("a") == order / 2
    rate, low, high, wins, losses, ties = rate_of(page.text("result"))
    assert (wins, losses, ties) == (11, 1, 2)
    assert abs(rate - 100 * 12 / 14) < 0.06
    for bound in (low / 100, high / 100):  # Wilson: where the score test is just significant
        z = abs(12 / 14 - bound) / math.sqrt(bound * (1 - bound) / 14)
        assert abs(z - 1.96) < 0.02
    assert low < rate < high
    assert page.saved() == {"version": 1, "a": STUDENT, "b": TEACHER, "votes": expected}


def test_sides_are_balanced_and_drawn_by_the_seed(page):
    orders, ballots = {}, "session.ballots.map(b => [b.unit.prompt, b.unit.picture, b.left])"
    for seed in range(4):
        page.choose(STUDENT, "real pictures", seed)  # seven pairs: an odd number
        orders[seed] = [tuple(ballot) for ballot in page.get(ballots)]
        lefts = [left for _, _, left in orders[seed]]
        assert abs(lefts.count("a") - lefts.count("b")) == 1
        assert sorted(prompt for prompt, _, _ in orders[seed]) == list(range(len(PROMPTS)))
    assert len({tuple(order) for order in orders.values()}) == 4
    page.choose(STUDENT, "real pictures", 2)
    assert [tuple(ballot) for ballot in page.get(ballots)] == orders[2]
    # over many seeds no prompt and no place in the order has a side
    drawn = page.js("""
        return [...Array(400).keys()].map(seed => drawBallots(0, 2, seed).map(
          ballot => [ballot.unit.prompt, ballot.left === "a"]));""")
    by_prompt = np.array([[left for _, left in sorted(ballots)] for ballots in drawn])
    by_place = np.array([[left for _, left in ballots] for ballots in drawn])
    for sides in (by_prompt, by_place):
        assert (abs(sides.sum(axis=0) - 200) < 4 * 10).all()  # four standard deviations
    # nor does a ballot say what the next one is: of 7 with 3 on a side, 4 / 7 of neighbours differ
    changes = (by_place[:, 1:] != by_place[:, :-1]).mean()
    assert abs(changes - 4 / 7) < 0.06


def test_undo_takes_the_last_vote_back(page):
    page.choose(STUDENT, TEACHER)
    page.click("start")
    first = page.seen()
    page.press(LEFT)
    second = page.seen()
    assert second != first
    page.press(RIGHT, BACK)
    assert page.seen() == second and page.text("count").startswith("2 of")
    page.click("undo")
    assert page.seen() == first and page.text("count").startswith("1 of")
    page.press(BACK)  # there is nothing more
    page.press(DOWN)
    assert [vote["choice"] for vote in page.saved()["votes"]] == ["tie"]


def test_space_presses_a_button_that_has_the_focus(page):
    page.choose(STUDENT, TEACHER)
    page.click("start")
    page.press(LEFT)
    page.js("document.getElementById('undo').focus()")
    page.press(" ")
    assert page.text("count").startswith("1 of")
    page.js("document.querySelector('.pair button').focus()")
    page.press(" ")
    assert page.get("session.votes.map(v => v.choice)") == ["tie"]


def test_pictures_and_buttons_can_be_pressed(page):
    from selenium.webdriver import ActionChains
    page.choose(STUDENT, TEACHER)
    page.click("start")
    for side in ("left", "right", "tie"):
        page.chrome.find_element("css selector", f"[data-choice={side}]").click()
    page.chrome.find_element("css selector", ".choices [data-choice=left]").click()
    assert page.get("session.votes.map(v => v.choice)") == ["left", "right", "tie", "left"]
    ActionChains(page.chrome).double_click(
        page.chrome.find_element("css selector", ".choices [data-choice=right]")).perform()
    assert page.get("session.votes.length") == 5  # a double click is one vote
    for kind, again in (("keyDown", False), ("keyDown", True), ("keyDown", True), ("keyUp", False)):
        page.chrome.execute_cdp_cmd("Input.dispatchKeyEvent", {
            "type": kind, "key": "ArrowLeft", "code": "ArrowLeft", "autoRepeat": again})
    assert page.get("session.votes.length") == 6  # and so is a key that is held


def test_a_reload_keeps_the_votes(page):
    page.choose(STUDENT, TEACHER, seed=5)
    page.click("start")
    page.press(LEFT, RIGHT, DOWN)
    before, votes = page.seen(), page.get("session.votes")
    page.load()
    assert "3 of 14 votes given" in page.text("state") and "kept" in page.text("state")
    assert page.text("start") == "Continue"
    page.click("start")
    assert page.seen() == before and page.get("session.votes") == votes
    page.click("close")
    page.choose(STUDENT, TEACHER, seed=6)  # another seed, other ballots
    assert "0 of 14" in page.text("state")
    page.choose(STUDENT, TEACHER, seed=5)
    assert "3 of 14" in page.text("state")


def test_other_pictures_have_other_votes(chrome, tmp_path):
    results = make(tmp_path)
    page = Page(chrome, tmp_path, results)
    page.click("start")
    page.press(LEFT)
    page.load()
    assert "1 of 14" in page.text("state")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "pictures/2-5-1.png")
    report.write(results, tmp_path)
    page.load()
    assert "0 of 14" in page.text("state")


def test_votes_work_where_the_browser_keeps_nothing(chrome, tmp_path):
    forbid = chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": """
        Object.defineProperty(window, "localStorage", {
          get() { throw new DOMException("denied", "SecurityError"); }})"""})
    try:
        report.write(make(tmp_path), tmp_path)
        page = Page.__new__(Page)
        page.chrome, page.folder = chrome, tmp_path
        chrome.execute_cdp_cmd("Browser.setDownloadBehavior", {
            "behavior": "allow", "downloadPath": str(tmp_path / "downloads")})
        page.load()
        assert "keeps nothing" in page.text("state")
        page.choose(STUDENT, TEACHER)
        page.click("start")
        assert not page.hidden("unkept")
        page.press(LEFT, LEFT)
        page.click("close")
        page.choose(STUDENT, "real pictures")
        page.choose(STUDENT, TEACHER)  # within the visit they are still there
        assert "2 of 14" in page.text("state")
        page.click("start")
        assert len(page.saved()["votes"]) == 2
    finally:
        chrome.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", forbid)


def test_the_result_is_shown_when_asked_for(page):
    page.choose(STUDENT, TEACHER)
    page.click("start")
    assert page.hidden("result")
    page.press(LEFT)
    assert page.hidden("result")
    page.click("reveal")
    assert not page.hidden("result") and sum(rate_of(page.text("result"))[3:]) == 1
    page.press(LEFT)
    assert sum(rate_of(page.text("result"))[3:]) == 2
    page.click("reveal")
    assert page.hidden("result")
    names = page.get("document.getElementById('booth').textContent")
    assert STUDENT not in names and TEACHER not in names


def test_nothing_is_fetched_and_nothing_complains(page):
    page.chrome.get_log("performance"), page.chrome.get_log("browser")
    page.load()
    page.click("start")
    page.press(LEFT)
    page.click("close")
    asked = []
    for entry in page.chrome.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    own = (page.folder / "report.html").as_uri()
    assert own in asked and all(url == own or url.startswith("data:") for url in asked)
    entries = page.get("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in entries)
    assert page.chrome.get_log("browser") == []


def test_the_page_may_fetch_nothing(page):
    """Its own policy refuses what a page could try, inserted scripts too."""
    refused = page.chrome.execute_async_script("""
        const done = arguments[0], refused = [];
        addEventListener("securitypolicyviolation", e => {
          refused.push(e.effectiveDirective);
          if (refused.length === 3) done(refused.sort());
        });
        document.body.append(Object.assign(document.createElement("img"), {src: "other.png"}));
        document.body.append(Object.assign(document.createElement("script"), {text: "hacked = 1"}));
        fetch("https://localhost:1/").catch(() => 0);""")
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert page.get("window.hacked") is None


def test_hostile_prompts_and_names_are_text(page):
    page.chrome.get_log("browser")
    assert page.get("window.hacked") is None
    assert page.get("document.scripts.length") == 2
    assert page.get("[...document.images].every(i => !i.src || i.src.startsWith('data:'))")
    shown = page.get("[...document.querySelectorAll('#gallery h3')].map(h => h.textContent)")
    assert shown == PROMPTS
    names = page.get("[...document.querySelectorAll('tbody th')].map(h => h.textContent)")
    assert names == page.rows
    assert page.get("document.querySelectorAll('main b').length") == 0
    assert page.get("document.title").endswith("<b>mine</b>, 4-step")
    alts = page.get("[...document.querySelectorAll('#gallery img')].map(i => i.alt)")
    assert set(alts) == set(PROMPTS)
    drawn = page.get("[...document.querySelectorAll('figure text')].map(t => t.textContent)")
    assert "<b>mine</b>, 4-step" in drawn
    page.click("start")
    for _ in range(len(PROMPTS)):
        page.press(LEFT)
    assert page.get("window.hacked") is None and page.chrome.get_log("browser") == []


def test_the_table_sorts_best_first_and_empty_last(page):
    first_column = "[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent)"
    heads = page.chrome.find_elements("css selector", "thead button")
    real, teacher, student, mine = page.rows
    titles = [head.text.split("\n")[0] for head in heads]
    heads[titles.index("Frechet")].click()
    assert page.get(first_column) == [real, mine, teacher, student]
    heads[titles.index("Frechet")].click()
    assert page.get(first_column) == [student, teacher, mine, real]
    heads[titles.index("Judge")].click()
    assert page.get(first_column) == [mine, teacher, student, real]
    calls = titles.index("Network calls")
    heads[calls].click()
    assert page.get(first_column) == [student, mine, teacher, real]
    heads[calls].click()
    assert page.get(first_column) == [teacher, mine, student, real]
    assert page.get("document.querySelectorAll('[aria-sort]').length") == 1
    heads[0].click()
    assert page.get(first_column) == sorted(page.rows, key=lambda name: name.strip("<b>"))


def test_pictures_sort_by_the_difference_of_two_rows_and_filter(page):
    shown = "[...document.querySelectorAll('#gallery h3')].map(h => h.textContent)"
    difference = lambda i: np.mean([score("judge", 2, i, k) - score("judge", 1, i, k)
                                    for k in range(2)])
    page.set("by", 1)
    page.set("first", page.rows.index(STUDENT))
    page.set("second", page.rows.index(TEACHER))
    expected = sorted(range(len(PROMPTS)), key=difference, reverse=True)
    assert page.get(shown) == [PROMPTS[i] for i in expected]
    notes = page.get("[...document.querySelectorAll('.prompt span')].map(h => h.textContent)")
    assert notes == [f"judge {difference(i):+.3f}" for i in expected]
    page.click("swap")
    assert page.get(shown) == [PROMPTS[i] for i in expected[::-1]]
    page.set("filter", "APPLE")
    assert sorted(page.get(shown)) == ["a green apple", "a red apple"]
    assert page.text("found") == "2 of these 7 prompts"
    page.set("filter", "")
    page.set("by", "")
    assert page.get(shown) == PROMPTS


def test_scores_are_shown_on_hover_focus_and_tap(page):
    from selenium.webdriver import ActionChains
    expected = f"reward{score('reward', 1, 4, 1):.3f}judge{score('judge', 1, 4, 1):.3f}"
    item = f"document.querySelectorAll('#gallery li')[{PROMPTS.index('a red apple')}]"
    button = page.get(f"{item}.querySelectorAll('.picture')[2]")  # real, then the teacher's two
    assert page.hidden("card")
    ActionChains(page.chrome).move_to_element(button).perform()
    assert page.text("card") == "teacher, 50-step, picture 2" + expected
    page.press("\ue00c")  # Escape
    assert page.hidden("card")
    page.js("arguments[0].focus()", button)
    assert not page.hidden("card")
    page.js("arguments[0].blur(); hideCard(); arguments[0].click()", button)
    assert not page.hidden("card")
    assert "judge" in page.get(f"{item}.querySelectorAll('.picture')[2].ariaDescription")
    # the keyboard scrolls to what is out of sight, and its scores stay
    page.js("scrollTo(0, 0); document.getElementById('by').focus()")
    pictures = page.get("document.querySelectorAll('.picture').length")
    page.press(*["\ue004"] * pictures)
    time.sleep(0.3)
    top, bottom = page.get("(r => [r.top, r.bottom])(document.getElementById('card')"
                           ".getBoundingClientRect())")
    assert page.get("scrollY") > 0 and 0 <= top < bottom <= page.get("innerHeight")
    assert page.text("card").startswith("<b>mine</b>, 4-step, picture 2")


def test_rows_without_pictures(chrome, tmp_path):
    results = make(tmp_path)
    results["rows"][1] |= {"pictures": None, "kind": "recorded", "scores": {}}
    page = Page(chrome, tmp_path, results)
    names = page.get("[...document.getElementById('a').options].map(o => o.text)")
    assert names == [name for name in page.rows if name != TEACHER]
    assert "0 of 14 votes" in page.text("state")  # the last student and the row above it
    for row in results["rows"]:
        row["pictures"] = None
    page = Page(chrome, tmp_path, results)
    assert page.hidden("start") and page.hidden("filter")
    assert "No pictures" in page.get("document.querySelector('#pictures > [data-lacks]').innerText")
    assert len(page.get("[...document.querySelectorAll('tbody tr')]")) == 4


def test_one_row_only(chrome, tmp_path):
    results = make(tmp_path, rows=[(STUDENT, 2, 1)])
    results["rows"][0]["win"] = None
    page = Page(chrome, tmp_path, results)
    page.chrome.get_log("browser")
    assert page.hidden("start") and page.hidden("by") and not page.hidden("filter")
    assert "two rows" in page.get("document.querySelector('#vote > [data-lacks]').innerText")
    assert len(page.get("[...document.querySelectorAll('#gallery img')]")) == len(PROMPTS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_readable(page, scheme):
    page.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
        width=390, height=844, deviceScaleFactor=2, mobile=True))
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        page.load()
        assert page.get("document.documentElement.scrollWidth") <= 390
        page.click("start")
        assert page.get("document.getElementById('panel').scrollWidth") <= 390
        style = "getComputedStyle(document.documentElement).getPropertyValue"
        paper = luminance(page.get(f"{style}('--paper')"))
        assert (paper > 0.5) == (scheme == "light")
        for name in ("--ink", "--quiet", "--accent"):  # WCAG's contrast of text
            other = luminance(page.get(f"{style}('{name}')"))
            assert (max(paper, other) + 0.05) / (min(paper, other) + 0.05) >= 4.5
    finally:
        page.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(text):
    """#rgb or #rrggbb -> relative luminance, WCAG 2"""
    text = text.strip()[1:]
    text = text if len(text) == 6 else "".join(2 * digit for digit in text)
    rgb = np.array([int(text[i:i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_every_control_has_a_name(page):
    unnamed = page.js("""
        return [...document.querySelectorAll("button, select, input, img, progress, svg, dialog")]
          .filter(e => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()
                         || e.alt || e.querySelector?.("img[alt]")))
          .map(e => e.outerHTML.slice(0, 80));""")
    empty = [found for found in unnamed if 'id="left"' not in found and 'id="right"' not in found]
    assert empty == []  # the two of the vote get their prompt with their picture
    assert page.get("document.documentElement.lang") == "en"

"""report.md and report.html of an evaluation: the numbers of results.json as Markdown, and one page
that needs no network, with the table, the plots, the pictures and blind voting.

The page is support/report.html with its {{marks}} filled in."""
import base64
import hashlib
import html
import io
import json
import re
from pathlib import Path

from PIL import Image

from support.cli import require
from support.pictures import decode
from support.weights import InputError, first_line, write_whole

TEMPLATE = Path(__file__).with_suffix(".html")
# colours of a plot -> the page's own, which follow dark and light
INK, QUIET, LINE, ACCENT = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
COLOURS = {INK: "--ink", QUIET: "--quiet", LINE: "--line", ACCENT: "--accent"}
RATES = {"votes": "preferred by people", "win": "win rate"}
INTERVALS = "prompts", "pairs"  # over other things the summary holds a standard deviation
MARKERS = {"student": "o", "teacher": "s", "real": "D", "round-trip": "d"}
# where a label may stand about its point, best first
PLACES = [(7, 0), (-7, 0), (0, 7), (0, -7), (6, 6), (-6, 6), (6, -6), (-6, -6), (0, 17), (0, -17)]


def number(x):
    """Three decimals, fewer for large numbers such as FID."""
    return f"{x:.{3 if abs(x) < 10 else 2 if abs(x) < 100 else 1}f}"


def score(row, key):
    """-> value (None if the row has none), its text and its interval in a column of the table"""
    form, value = number, row["summary"].get(key)
    if key in ("calls", "n", "seconds_per_image"):
        value = {"mean": row[key], "low": None, "of": None}
        form = number if key == "seconds_per_image" else str
    elif key in ("win", "votes"):
        value = row[key] and row[key] | {"mean": row[key]["rate"], "of": "pairs"}
        form = "{:.1%}".format
    if not value or value["mean"] is None:
        return None, "", ""
    if value["low"] is None:  # a spread over prompts or seeds needs two of them
        return value["mean"], form(value["mean"]), "n = 1" if value["of"] else ""
    interval = f"{form(value['low'])} to {form(value['high'])}"
    return value["mean"], form(value["mean"]), interval + "*" * (value["of"] not in INTERVALS)


def opponents(results, rows, key):
    """What "win" or "votes" of these rows is against, and by what, in words."""
    against = {}
    for row in rows:
        if row[key]:
            by = "" if key == "votes" else f", by {results['columns'][row[key]['by']]['title']}"
            against[row["name"]] = f"against {row[key]['against']}{by}"
    if len(set(against.values())) == 1:
        return next(iter(against.values()))
    return "; ".join(f"{name} {words}" for name, words in against.items())


def key_columns(results):
    """-> the columns that training maximised, that judges, and of the distance from real pictures;
    None where there is none"""
    columns = results["columns"]
    judges = [row["win"]["by"] for row in results["rows"] if row["win"]] + ["judge"]
    judges += [key for key in columns
               if columns[key]["per_picture"] and columns[key]["better"] == "higher"]
    first = lambda keys: next(iter(keys), None)
    return (first(key for key in columns if columns[key]["trained"]),
            first(key for key in judges if key in columns and not columns[key]["trained"]),
            first(key for key in columns if re.search("frechet|(^|_)fid(_|$)", key)))


def table(results):
    """-> heads [(key, title, note)], for each row its cells [(value or None, text, interval)]"""
    rows, columns, distance = results["rows"], results["columns"], key_columns(results)[2]
    heads = [(key, title, "") for key, title in RATES.items() if any(row[key] for row in rows)]
    for key in sorted(columns, key=lambda key: key != distance):  # the others keep their order
        better = f"{columns[key]['better']} is better" if columns[key]["better"] else ""
        note = "maximised in training" if columns[key]["trained"] else better
        heads.append((key, columns[key]["title"], note))
    heads += [("calls", "network calls", "a picture"),
              ("seconds_per_image", "seconds", "a picture"), ("n", "pictures", "a prompt")]
    return heads, [[score(row, key) for key, _, _ in heads] for row in rows]


def legend(results):
    of = {value["of"] for row in results["rows"] for value in row["summary"].values() if value}
    others = ", ".join(sorted(of - {None, *INTERVALS}))
    seeds = f"; * mean minus and plus standard deviation over {others}" if others else ""
    against = {title: opponents(results, results["rows"], key) for key, title in RATES.items()}
    rates = [f"{capital(title)}: {words}." for title, words in against.items() if words]
    ties = ["Ties count half, the intervals of rates are Wilson's."] if rates else []
    return " ".join([f"Intervals are 95%, over prompts{seeds}.", *rates, *ties])


def headline(results):
    """-> the row that it is about, the last student if there is one, [(label, value, [details])]"""
    rows, (reward, judge, distance) = results["rows"], key_columns(results)
    rank = lambda i: (rows[i]["kind"] == "student", bool(rows[i]["win"]), i)
    row, tiles = rows[max(range(len(rows)), key=rank)], []
    for key, title in RATES.items():
        if row[key]:
            _, text, interval = score(row, key)
            tiles.append((title, text, [f"{interval}, n = {row[key]['n']}",
                                        opponents(results, [row], key)]))
    other = [r for r in rows if row["win"] and r["name"] == row["win"]["against"]]
    notes = {distance: "from real pictures, lower is nearer", reward: "maximised in training"}
    for key in (distance, judge, reward):
        value, text, interval = score(row, key)
        if value is not None:
            beside = [f"{r['name']}: {score(r, key)[1]}" for r in other if score(r, key)[1]]
            details = [interval, notes.get(key), *beside]
            tiles.append((results["columns"][key]["title"], text, [d for d in details if d]))
    return row, tiles


def settings(results):
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    items = {"Protocol": results["protocol"], "Source": results["source"],
             "Prompts": str(len(results["prompts"])), "Date": results["date"],
             "Versions": versions, "Command": results["command"]}
    return {name: text for name, text in items.items() if text}


def markdown(results):
    plain = lambda text: re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))
    (heads, cells), (row, tiles) = table(results), headline(results)
    lines = ["# Evaluation", "", plain(row["name"]), ""]
    lines += [f"- {plain(label)}: **{value}** ({plain('; '.join(details))})"
              for label, value, details in tiles]
    titles = [plain(f"{title} ({note})" if note else title) for _, title, note in heads]
    lines += ["", f"| | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(heads)]
    for row, line in zip(results["rows"], cells):
        texts = [f"{text} ({plain(note)})" if note else text for _, text, note in line]
        lines.append(f"| {plain(row['name'])} | {' | '.join(texts)} |")
    lines += ["", plain(legend(results)), "", "## Settings", ""]
    lines += [f"- {name}: {plain(text)}" for name, text in settings(results).items()]
    return "\n".join(lines) + "\n"


def plot(results, x, y):
    """Each row a labelled point with its 95% intervals, column y against column x -> SVG, or ""
    where no row has both. x "calls": rows of one model at several steps are joined, and rows that
    no network drew are levels. Where names do not fit, numbers stand for them, with a list."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("report.html needs matplotlib: pip install -e '.[evaluate]'") from None
    rows = [row for row in results["rows"] if y and score(row, y)[0] is not None]
    points = [row for row in rows if x and score(row, x)[0] is not None]
    levels = [row for row in rows if x == "calls" and row not in points]
    if not points:
        return ""
    style = {"svg.fonttype": "none", "svg.hashsalt": x, "text.parse_math": False, "font.size": 9.5,
             "figure.facecolor": "none", "axes.facecolor": "none", "axes.edgecolor": LINE,
             "axes.spines.top": False, "axes.spines.right": False, "axes.labelcolor": QUIET,
             "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": QUIET,
             "ytick.labelcolor": QUIET, "text.color": INK}
    with rc_context(style):
        figure, svg = Figure((5.2, 3.7), dpi=72, layout="constrained"), io.StringIO()
        FigureCanvasAgg(figure)  # measures text
        axes = figure.subplots()
        columns = {"calls": {"title": "network calls a picture"}} | results["columns"]
        axes.set_xlabel(columns[x]["title"])
        axes.set_ylabel(columns[y]["title"])
        spots = draw(axes, points, levels, x, y)
        figure.draw_without_rendering()  # settles the layout, on which it depends what fits where
        names, key = {row["name"]: i for i, row in enumerate(results["rows"], 1)}, ""
        shown = [row["name"] for row in points + levels]
        if not label(axes, shown, spots):
            for text in list(axes.texts):
                text.remove()
            label(axes, [str(names[name]) for name in shown], spots)
            key = "".join(f"<li value={i}>{html.escape(name)}</li>"
                          for name, i in names.items() if name in shown)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    title = f"{axes.get_ylabel()} against {axes.get_xlabel()}"
    return for_page(svg.getvalue(), title) + (f"<ol>{key}</ol>" if key else "")


def draw(axes, points, levels, x, y):
    """-> for each point and level the spots where its label may stand: (position, its coordinates,
    step from there in points), best first"""
    spots = []
    for row in points:
        at, low, high = zip(bounds(row, x), bounds(row, y))
        colour = ACCENT if row["kind"] == "student" else QUIET
        axes.plot((low[0], high[0]), (at[1], at[1]), color=colour, linewidth=1, alpha=0.5)
        axes.plot((at[0], at[0]), (low[1], high[1]), color=colour, linewidth=1, alpha=0.5)
        axes.plot(*at, MARKERS.get(row["kind"], "^"), color=colour, markersize=6)
        spots.append([(at, "data", step) for step in PLACES])
    for row in levels:
        level = score(row, y)[0]
        axes.axhline(level, color=LINE, zorder=0)
        spots.append([((side, level), ("axes fraction", "data"), (1 - 2 * side, dy))
                      for side in (1, 0) for dy in (3, -3)])
    axes.margins(0.15)
    if x == "calls":
        models = {}  # by names that differ in nothing but the number of steps
        for row in sorted(points, key=lambda row: row["calls"]):
            name = re.sub(r"\d+(?=[- ]?steps?\b)", "", row["name"])
            models.setdefault((row["kind"], name), []).append((row["calls"], score(row, y)[0]))
        for (kind, _), model in models.items():
            axes.plot(*zip(*model), color=ACCENT if kind == "student" else QUIET)
        axes.set_xscale("log")
        calls = sorted({row["calls"] for row in points})
        axes.set_xticks(calls, [str(n) for n in calls])
        axes.minorticks_off()
    return spots


def bounds(row, key):
    """-> value and its interval, the value thrice if there is none"""
    value = row["summary"].get(key) or {"mean": row[key], "low": None}
    if value["low"] is None:
        return (value["mean"],) * 3
    return value["mean"], value["low"], value["high"]


def label(axes, names, spots):
    """Write each name at that of its spots where it covers least: labels and points, and after
    these lines. -> whether none covers another or a point"""
    canvas, fit = axes.figure.canvas.get_renderer(), True
    lines = [line.get_window_extent(canvas) for line in axes.lines]
    taken = [box for box, line in zip(lines, axes.lines) if line.get_marker() != "None"]
    side = lambda step, names: names[(step > 0) - (step < 0)]
    for name, places in zip(names, spots):
        tried = []
        for at, coordinates, (dx, dy) in places:
            text = axes.annotate(
                name, at, (dx, dy), coordinates, "offset points", in_layout=False,
                ha=side(dx, ["center", "left", "right"]), va=side(dy, ["center", "bottom", "top"]))
            box = text.get_window_extent(canvas)
            outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
            tried.append((outside + box.count_overlaps(taken), box.count_overlaps(lines),
                          len(tried), text, box))
        covered, _, _, chosen, box = min(tried)
        taken.append(box)
        for *_, text, _ in tried:
            if text is not chosen:
                text.remove()
        fit = fit and not covered
    return fit


def for_page(svg, title):
    """matplotlib's SVG -> one that stands in HTML: the page's colours and width, no addresses, no
    names that two plots could share."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r"<svg[^>]*>", f'<svg {view} role="img" aria-label="{html.escape(title)}">', svg)
    return re.sub("|".join(COLOURS), lambda match: f"var({COLOURS[match[0]]})", svg)


def webp(file):
    """A picture file as base64 WebP: lossless up to 128 pixels, else reduced to at most 256."""
    try:
        picture = decode(file.read_bytes())
    except Exception as error:
        raise InputError(f"{file}: results.json names this picture, but it cannot be read "
                         f"({first_line(error)}); draw it again or copy the folder whole") from None
    small, data = max(picture.size) <= 128, io.BytesIO()
    picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
    picture.save(data, "WEBP", lossless=small, quality=100 if small else 80, method=6)
    return base64.b64encode(data.getvalue()).decode()


def even(count):
    """The numbers below count, so ordered that the first few of them, however many, lie evenly."""
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda i: f"{i:0{digits}b}"[::-1])


def pictures(results, folder, room):
    """What of the pictures takes at most `room` bytes: the first of each prompt, of as many prompts
    as fit, then the second, ... -> [{"prompt": its number, "text", "picture": number of the seed,
    "rows": [[WebP, [score in each per-picture column]] or None]}], the rows being those with
    pictures"""
    rows, units = [row for row in results["rows"] if row["pictures"]], []
    keys = [key for key, column in results["columns"].items() if column["per_picture"]]
    for k in range(max((row["n"] for row in rows), default=0)):
        for i in even(len(results["prompts"])):
            shown = []
            for row in rows:
                files = row["pictures"][i]
                found = k < len(files) and files[k] is not None
                scores = [row["scores"][key][i][k] if found and key in row["scores"] else None
                          for key in keys]
                scores = [None if x is None or x != x else round(x, 4) for x in scores]
                shown.append([webp(folder / files[k]), scores] if found else None)
            unit = {"prompt": i, "text": results["prompts"][i], "picture": k, "rows": shown}
            room -= len(as_json(unit)) + 2
            if room < 0:
                return units
            if k == 0 or any(shown):
                units.append(unit)
    return units


def as_json(value):
    """JSON that may stand inside <script>: nothing in it ends one or opens a comment."""
    return json.dumps(value).replace("<", "\\u003c")


def html_table(results):
    text = html.escape
    heads, cells = table(results)
    lines = ["<thead><tr><th scope=col><button type=button>Row</button></th>"]
    for key, name, note in heads:
        column = results["columns"].get(key, {})
        low = key in ("calls", "seconds_per_image") or column.get("better") == "lower"
        lines.append(
            f"<th scope=col data-first={'low' if low else 'high'} "
            f"{'class=trained' if column.get('trained') else ''}><button type=button>"
            f"{text(capital(name))}<small>{text(note)}</small></button></th>")
    lines.append("</tr></thead><tbody>")
    for row, line in zip(results["rows"], cells):
        lines.append(f"<tr><th scope=row>{text(row['name'])}</th>")
        lines += [f'<td data-value="{"" if value is None else value}">{shown}'
                  f"<small>{text(note)}</small></td>" for value, shown, note in line]
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody>"])


def capital(name):
    return name[:1].upper() + name[1:]


def page(results, folder, limit_bytes):
    """-> the bytes of report.html"""
    text, template = html.escape, TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    rows, columns = results["rows"], results["columns"].values()
    (row, tiles), (reward, judge, _) = headline(results), key_columns(results)
    what = [f"{len(results['prompts'])} prompts", results["protocol"], results["date"][:10]]
    marks = {
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "headline": text(row["name"]), "what": text(", ".join(filter(None, what))),
        "tiles": "".join(
            f"<div><dt>{text(capital(label))}</dt><dd>{value}"
            + "".join(f"<small>{text(line)}</small>" for line in details) + "</dd></div>"
            for label, value, details in tiles),
        "table": html_table(results), "legend": text(legend(results)),
        "by_calls": plot(results, "calls", judge), "by_reward": plot(results, reward, judge),
        "settings": "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>"
                            for name, value in settings(results).items())}
    data = {"rows": [row["name"] for row in rows if row["pictures"]],
            "columns": [column["title"] for column in columns if column["per_picture"]],
            "prompts": len(results["prompts"]), "n": max(row["n"] for row in rows),
            "pair": [row["name"], row["win"]["against"] if row["win"] else ""], "units": []}

    def filled():
        whole = marks | {"data": as_json(data)}
        return re.sub(r"\{\{(\w+)\}\}", lambda mark: whole[mark[1]], template).encode()
    without = len(filled())
    require(without <= limit_bytes, f"limit_bytes {limit_bytes}: report.html has {without:,} bytes "
                                    "before any picture; give more than that")
    data["units"] = pictures(results, folder, limit_bytes - without - 64)
    # the browser keeps votes under this name, so that those on other pictures do not mix in
    seen = [[unit["prompt"], unit["picture"], [row and row[0] for row in unit["rows"]]]
            for unit in data["units"]]
    data["id"] = hashlib.sha256(as_json([data["rows"], seen]).encode()).hexdigest()[:16]
    return filled()


def write(results, folder, limit_bytes=2_000_000):
    """Write report.md and report.html into `folder`, to which the paths of the pictures are
    relative. results: what results.json holds (evaluate.py). report.html has at most limit_bytes
    and shows as many prompts as fit. -> the two files

    InputError: two rows of one name, a picture that cannot be read, no matplotlib, limit_bytes too
    few for a page without pictures."""
    folder, names = Path(folder), [row["name"] for row in results["rows"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"two rows are named {', '.join(twice)}: expected a name for each")
    contents = {"report.md": markdown(results).encode(),
                "report.html": page(results, folder, limit_bytes)}
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]

"""results.json of evaluate.py: what it holds, how rows are compared, and the table.

    {"version": 2, "command", "date", "versions", "protocol", "source", "prompts": [N],
     "columns": {key: {"title", "better": "higher" | "lower" | null, "trained", "per_picture"}},
     "rows": [{"name", "kind", "steps", "calls", "seconds_per_image", "n", "seeds",
               "summary": {key: {"mean", "low", "high", "of"}},
               "win", "votes": {"against", "by", "rate", "low", "high", "n"} | null,
               "scores": {key: [N][n]}, "pictures": [N][n] paths beside the file | null}]}

low and high: the ends of the 95% interval by bootstrap where "of" is "prompts"; where it is
something else, the mean minus and plus the standard deviation over that.
"""
import json
from pathlib import Path

import numpy as np

from support import metrics
from support.cli import require
from support.weights import InputError, write_whole

VERSION = 2
MEDIANS = ("high_frequency", "roughness")  # columns whose summary is a median
# titles, and which way is better, of columns that are always called so
TITLES = {"frechet": ("Frechet", "lower"), "recall": ("recall", "higher"),
          "reward": ("reward", "higher"), "judge": ("judge", "higher"),
          "top1": ("top-1", "higher"), "diversity": ("diversity", None),
          "high_frequency": ("high frequency", None), "roughness": ("roughness", "lower")}


def column(key, title=None, better="higher", trained=False, per_picture=True):
    if key in TITLES:
        known, better = TITLES[key]
        title = title or known
    per_picture = per_picture and key not in ("frechet", "recall", "diversity")
    return {"title": title or key, "better": better, "trained": trained,
            "per_picture": per_picture}


def columns_of(rows, specs, reward, features):
    """{key: column} of what any of the rows has, in the table's order. specs: {key: spec of a
    reward}; reward: that of the one that training maximised; features: those of distances."""
    keys, found = [*TITLES], {key for row in rows for key in row["summary"]}
    last = keys.index("diversity")
    parts = sorted(key for key in found if "/" in key)  # a protocol's
    keys = dict.fromkeys([*keys[:last], *specs, *parts, *keys[last:]])
    titles = {}
    if reward != "pocket":
        titles["reward"] = f"reward {reward}"
    if features != "judge":
        titles["frechet"] = f"Frechet, {features.partition('=')[0]}"
    return {key: column(key, titles.get(key), trained=key == "reward",
                        per_picture="/" not in key) for key in keys if key in found}


def entry(mean, low=None, high=None, of=None):
    return {"mean": mean, "low": low, "high": high, "of": of if low is not None else None}


def middle_of(key):
    return np.median if key in MEDIANS else np.mean


def summary_of(key, scores):
    """Scores [N][n] of a column -> its entry in the summary; None: there is no score."""
    values = metrics.by_prompt(scores)
    if not len(values):
        return None
    return entry(*metrics.interval(values, middle_of(key)), "prompts")


# ---------------------------------------------------------------------------------------- the file

def write(results, file):
    """allow_nan=False: what is no number is null, or else an error of ours."""
    write_whole(file, json.dumps(results, allow_nan=False) + "\n")


def read(file):
    """results.json -> its dict. A list of rows, as evaluate.py wrote before version 2, is read as
    one."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); expected a results.json of "
                         "evaluate.py") from None
    if isinstance(found, list):
        rows = [modern(row) for row in found]
        keys = [key for key in TITLES if any(key in row["summary"] for row in rows)]
        found = {"version": VERSION, "protocol": None, "source": None, "prompts": None,
                 "columns": {key: column(key) for key in keys}, "rows": rows}
    good = isinstance(found, dict) and found.get("version") == VERSION and "rows" in found
    require(good, f"{file}: not a results.json of this evaluate.py; expected version {VERSION}")
    return found


def modern(row):
    """A row as it was before version 2, with the judge's mean of each prompt -> a row of now."""
    if "summary" in row:
        return row
    summary = {}
    for key in ("reward", "judge"):
        if row.get(key) is not None:
            half = metrics.Z * row[f"{key}_se"]
            summary[key] = entry(row[key], row[key] - half, row[key] + half, "prompts")
    summary |= {key: entry(row[key]) for key in ("top1", "frechet") if key in row}
    return {"name": row["name"], "kind": "recorded", "steps": None, "calls": row["calls"],
            "seconds_per_image": row["seconds_per_image"], "n": 1, "seeds": None,
            "summary": summary, "win": None, "votes": None,
            "scores": {"judge": [[score] for score in row["scores"]]}, "pictures": None}


# ------------------------------------------------------------------------------------- comparisons

def scores_of(row, key):
    """[N,n], nan where there is no score."""
    return np.array([[np.nan if one is None else one for one in line]
                     for line in row["scores"][key]], dtype=np.float64)


def win(row, other, key):
    """How often the row wins against the other by a column, picture against picture of the same
    prompt and seed; prompt against prompt where one of them was not drawn from seeds (real
    pictures, or recorded means)."""
    if key not in row["scores"] or key not in other["scores"]:
        return None
    ours, theirs = scores_of(row, key), scores_of(other, key)
    if row["seeds"] is None or other["seeds"] is None:
        ours, theirs = (np.nanmean(part, axis=1, keepdims=True) for part in (ours, theirs))
    else:
        ours, theirs = pair(ours, row["seeds"], theirs, other["seeds"])
    found = metrics.win_rate(metrics.outcomes(ours, theirs))
    return found and {"against": other["name"], "by": key} | found


def add_wins(document, against, keys):
    """The field "win" of every row. against: the name of the row to compare with; None: the first
    teacher, or else the first row. keys: the columns to compare by, the first that it has."""
    rows = {row["name"]: row for row in document["rows"]}
    if against is None:
        teachers = [row for row in rows.values()
                    if row["kind"] == "teacher" or row["name"].startswith("teacher, ")]
        other = [*teachers, *rows.values()][0]
    else:
        other = rows[against]
    key = next((key for key in keys if key in other["scores"]), None)
    for row in rows.values():
        if row is not other and key:
            row["win"] = win(row, other, key)


def difference_line(row, other):
    """How far the judge's mean of a row is from another's, in words."""
    mean, low, high = difference(row, other)
    name = "student" if row["kind"] == "student" else row["name"]
    around = "(n = 1)" if low is None else f"[{low:+.4f}, {high:+.4f}]"
    return f"judge, {name} minus {other['name'].split(' (')[0]}: {mean:+.4f} {around}"


def pair(ours, seeds, theirs, their_seeds):
    """Columns of two [N,n] by seed: each of ours beside theirs of the same seed. Several networks
    in one row have the same seeds each; the k-th of ours stands beside the k-th of theirs, or
    beside their only one."""
    left, right, seen = [], [], {}
    for i, seed in enumerate(seeds):
        same = [j for j, other in enumerate(their_seeds) if other == seed]
        if same:
            seen[seed] = seen.get(seed, -1) + 1
            left.append(i)
            right.append(same[seen[seed] % len(same)])
    return ours[:, left], theirs[:, right]


def difference(row, other, key="judge"):
    """The mean of row minus other, paired by prompts, and its 95% interval."""
    ours, theirs = scores_of(row, key), scores_of(other, key)
    both = ~(np.isnan(ours).all(axis=1) | np.isnan(theirs).all(axis=1))
    apart = metrics.by_prompt(ours[both]) - metrics.by_prompt(theirs[both])
    return metrics.interval(apart, middle_of(key))


def read_votes(file):
    """votes.json of the page -> names of the rows a and b, {prompt: [1 for a, 0 for b, 1/2]}."""
    try:
        found, groups = json.loads(Path(file).read_text(encoding="utf-8")), {}
        for vote in found["votes"]:
            choice, left = vote["choice"], vote["left"]
            require(choice in ("left", "right", "tie") and left in ("a", "b"),
                    f"{file}: a vote {vote}; expected left a or b, and choice left, right or tie")
            share = 0.5 if choice == "tie" else float((choice == "left") == (left == "a"))
            groups.setdefault(int(vote["prompt"]), []).append(share)
        return (found["a"], found["b"]), groups
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not the votes of an evaluation's page "
                         f"({type(error).__name__}: {error})") from None


def add_votes(results, file):
    """The votes that the page saved -> the field "votes" of the two rows."""
    (a, b), groups = read_votes(file)
    rows = {row["name"]: row for row in results["rows"]}
    mirrored = [[1 - share for share in group] for group in groups.values()]
    for name, other, shares in ((a, b, groups.values()), (b, a, mirrored)):
        found = metrics.win_rate(shares)
        rows[name]["votes"] = found and {"against": other, "by": "people"} | found


# ---------------------------------------------------------------------------------------- the table

def number(key, value):
    if key == "top1":
        return f"{value:.1%}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def cell(key, entry, prompts):
    """"0.744 ± 0.031": half of the interval, or one standard deviation."""
    if entry is None:
        return ""
    if entry["low"] is None:
        return number(key, entry["mean"]) + (" (n = 1)" if prompts == 1 else "")
    half = number(key, (entry["high"] - entry["low"]) / 2)
    sign = "" if entry["of"] in ("prompts", None) else "*"
    return f"{number(key, entry['mean'])} ± {half}{sign}"


def won(entry):
    if entry is None:
        return ""
    return f"{entry['rate']:.1%} ({entry['low']:.1%} to {entry['high']:.1%})"


def table(results):
    """-> Markdown: the win rate and the distance first, then the reward and the judge."""
    rows, columns = results["rows"], results["columns"]
    prompts = len(results["prompts"] or ()) or None
    heads, cells = [""], [[row["name"]] for row in rows]
    for field, words in (("win", "wins by"), ("votes", "wins by")):
        if any(row[field] for row in rows):
            heads.append(f"{words} {next(row[field]['by'] for row in rows if row[field])}")
            for line, row in zip(cells, rows):
                line.append(won(row[field]))
    for key, one in columns.items():
        if any(key in row["summary"] for row in rows):
            heads.append(one["title"] + (" (trained)" if one["trained"] else ""))
            for line, row in zip(cells, rows):
                line.append(cell(key, row["summary"].get(key), prompts))
    heads += ["network calls", "s / image"]
    for line, row in zip(cells, rows):
        seconds = row["seconds_per_image"]
        line += [str(row["calls"] or ""), "" if seconds is None else f"{seconds:.3f}"]
    lines = [heads, ["---"] * len(heads), *cells]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ([text.ljust(width) for text, width in zip(line, widths)] for line in lines)
    return "\n".join(["| " + " | ".join(line) + " |" for line in padded] + notes(results))


def notes(results):
    """What the table's numbers are, in lines under it."""
    rows, lines = results["rows"], []
    against = {row["win"]["against"] for row in rows if row["win"]}
    if against:
        lines.append(f"wins: against {', '.join(sorted(against))}, same prompt and seed, "
                     "ties half; 95% Wilson interval")
    spreads = {entry["of"] for row in rows for entry in row["summary"].values()}
    if "prompts" in spreads:
        lines.append("±: half of the 95% interval over prompts")
    others = sorted(spreads - {"prompts", None})
    if others:
        lines.append(f"±...*: standard deviation over {', or over '.join(others)}")
    return ["", *lines] if lines else []


# ---------------------------------------------------------------------------------- two evaluations

def matched(ours, theirs):
    """Pairs of rows of two evaluations: of one name, or else the only ones of one kind and number
    of steps that are left on either side."""
    pairs, left, right = [], list(ours), list(theirs)
    for same in (lambda a, b: a["name"] == b["name"],
                 lambda a, b: (a["kind"], a["steps"]) == (b["kind"], b["steps"])):
        for row in list(left):
            found = [other for other in right if same(row, other)]
            alone = sum(same(one, found[0]) for one in left) == 1 if found else False
            if len(found) == 1 and alone:
                pairs.append((row, found[0]))
                left.remove(row)
                right.remove(found[0])
    return pairs


def compared(first, second):
    """Two results.json -> lines of Markdown: of each column that both have for each pair of rows,
    the second minus the first, paired by prompts, and whether it moved beyond noise."""
    a, b = read(first), read(second)
    require(a["prompts"] is None or b["prompts"] is None or a["prompts"] == b["prompts"],
            f"{second}: other prompts than in {first}; a paired comparison needs the same")
    pairs = matched(a["rows"], b["rows"])
    require(pairs, f"{first} and {second}: no rows of one name, or of one kind and number of steps")
    lines = ["| | column | first | second | difference | 95% | moved |", "| --- " * 7 + "|"]
    for row, other in pairs:
        name = row["name"] if row["name"] == other["name"] else f"{row['name']} -> {other['name']}"
        for key, one in b["columns"].items():
            was, now = row["summary"].get(key), other["summary"].get(key)
            if was and now:
                cells = [number(key, was["mean"]), number(key, now["mean"])]
                lines.append(f"| {name} | {one['title']} | " + " | ".join(
                    [*cells, *moved(row, other, key, one)]) + " |")
    return lines


def moved(row, other, key, one):
    """-> the difference of a column from row to other, its interval, and a word on it."""
    was, now = row["summary"][key], other["summary"][key]
    change, spreads = now["mean"] - was["mean"], {was["of"], now["of"]}
    pictures = [len(part["scores"].get(key, ())) for part in (row, other)]
    if "training seeds" not in spreads and pictures[0] == pictures[1] > 0:
        (change, low, high), how = difference(other, row, key), ""
    elif None in spreads:
        return f"{change:+.4f}", "", "not known"
    else:  # of sets of pictures, or beyond the spread of training seeds
        half = float(np.hypot(margin(was), margin(now)))
        low, high, how = change - half, change + half, " (unpaired)"
    if low is None:
        return f"{change:+.4f}", "n = 1", "not known"
    word = "no"
    if not low <= 0 <= high:
        good = {"higher": change > 0, "lower": change < 0}.get(one["better"])
        word = {True: "better", False: "worse", None: "up" if change > 0 else "down"}[good]
    return f"{change:+.4f}", f"{low:+.4f} to {high:+.4f}{how}", word


def margin(entry):
    """Half of the 95% interval."""
    half = (entry["high"] - entry["low"]) / 2
    return half if entry["of"] == "prompts" else metrics.Z * half

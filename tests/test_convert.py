"""A torch pickle becomes safetensors, and nothing of it runs."""
import os
import pickle
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from conftest import call, cut
from support import convert
from support.weights import InputError


@pytest.fixture
def lightning(monkeypatch):
    """A class ModelCheckpoint of a module pytorch_lightning that is there only to write files."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__, "made": 0})
    module.ModelCheckpoint = kind
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return kind


def published(file, kind, **more):
    """A .ckpt as those of Stable Diffusion: tensors in state_dict, beside objects of a trainer."""
    weight = torch.arange(6.0).reshape(2, 3)
    one = kind()
    one.best = {"score": torch.ones(1)}
    state = {"a": weight, "b": weight.half().T, "c": torch.nn.Parameter(weight), "view": weight[1]}
    torch.save({"state_dict": state | more, "global_step": 7, "callbacks": {kind: one}}, file)
    return state


def test_a_ckpt_with_a_lightning_class_that_is_not_installed_is_converted(
        lightning, tmp_path, monkeypatch, capsys):
    file = tmp_path / "v2-1_512-ema-pruned.ckpt"
    expected = published(file, lightning)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)  # what one would do without this
    assert call(convert.main, file) == 0
    new = file.with_suffix(".safetensors")
    assert capsys.readouterr().out == f"{new}\n"
    found = load_file(new)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
    assert sorted(f.name for f in tmp_path.iterdir()) == [file.name, new.name]
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


class Evil:
    """What its pickle calls when it is opened."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


EVIL = {
    "os.system": lambda f: Evil(os.system, f"touch {f}"),
    "eval": lambda f: Evil(eval, f"open({str(f)!r}, 'w')"),
    "exec": lambda f: Evil(exec, f"open({str(f)!r}, 'w')"),
    "open": lambda f: Evil(open, str(f), "w"),
    "getattr": lambda f: Evil(getattr, "a", "upper"),
    "subprocess": lambda f: Evil(subprocess.Popen, ["touch", str(f)]),
    "a pickle in a pickle": lambda f: Evil(pickle.loads, pickle.dumps(Evil(open, str(f), "w"))),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", EVIL)
def test_a_pickle_that_would_run_something_is_refused_and_does_not_run_it(
        case, legacy, tmp_path, capsys):
    ran, file = tmp_path / "ran", tmp_path / "model.ckpt"
    content = {"state_dict": {"a": torch.ones(2)}, "x": EVIL[case](ran)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    assert call(convert.main, file) == 2
    message = capsys.readouterr().err
    assert "can run programs" in message and "nothing was run" in message
    assert message.startswith(f"error: {file}: ") and message.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir()] == ["model.ckpt"]


def test_other_functions_are_neither_imported_nor_called(tmp_path):
    file = tmp_path / "model.ckpt"
    other = Evil(torch.hub.set_dir, str(tmp_path / "hub"))
    torch.save({"state_dict": {"a": torch.ones(2)}, "other": other}, file)
    before = torch.hub.get_dir()
    assert load_file(convert.convert(file))["a"].tolist() == [1, 1]
    assert torch.hub.get_dir() == before


def test_the_format_before_torch_1_6_is_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2, 3).T}, file, _use_new_zipfile_serialization=False)
    assert convert.convert(file).name == "model.safetensors"
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(3, 2))


def script(file):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), file)


def no_torch(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")


NONE = {
    "truncated": (lambda f: cut(f, f.stat().st_size // 2), "not a torch pickle"),
    "empty": (lambda f: f.write_bytes(b""), "not a torch pickle"),
    "text": (lambda f: f.write_text("<html>"), "not a torch pickle"),
    "another zip": (no_torch, "not a torch pickle"),
    "a program": (script, "a program"),
    "no tensors": (lambda f: torch.save({"state_dict": {"a": 1}}, f), "no tensors"),
    "a list": (lambda f: torch.save([torch.ones(1)], f), "no tensors"),
    "a sparse tensor": (lambda f: torch.save({"a": torch.eye(2).to_sparse()}, f), "a is made by"),
    "missing": (lambda f: f.unlink(), "no such file"),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("case", NONE)
def test_a_file_without_plain_tensors_is_one_line_and_leaves_nothing(case, tmp_path):
    spoil, said = NONE[case]
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(100)}}, file)
    spoil(file)
    with pytest.raises(InputError, match=said) as error:
        convert.convert(file)
    assert str(file) in str(error.value) and not list(tmp_path.glob("*safetensors*"))


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    file, new = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(1)}, file)
    new.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        convert.convert(file)
    assert new.read_text() == "mine"

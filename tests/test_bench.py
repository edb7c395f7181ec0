import json

import bench
from conftest import call


def test_last_line_is_one_json_document_with_every_part(capsys):
    assert call(bench.main, "--repeats", 1, "--warmup", 1, "--device", "cpu", "--precision", "fp32") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("unet", "vae decode", "2-step picture", "training step"):
        assert result["rows"][name]["median"] > 0 and result["rows"][name]["tflop"] > 0
    assert result["rows"]["2-step picture"]["tflop"] > 2 * result["rows"]["unet"]["tflop"]

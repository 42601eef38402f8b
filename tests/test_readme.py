"""What the README shows must run, and defend."""

import re
from pathlib import Path

import pytest

import fdcr_fast

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="not a checkout")


def trained(code):
    """What the loop ends with, and how often its trigger works on the test images."""
    names = {}
    exec(code, names)
    model, test = names["model"], names["test"]
    model.load_state_dict(names["layout"].unflatten(names["w"]))
    x, y = names["images"][test].float(), names["labels"][test]
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    success = (model(names["trigger"](x[y != 2])).argmax(1) == 2).float().mean().item()
    return names["result"], accuracy, success


def test_the_loop_defends(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 25
    result, accuracy, success = trained(code)
    assert result.dropped_clients == ["client-0", "client-1", "client-2"]
    assert result.rejected == {}
    assert accuracy > 0.85
    assert success < 0.05
    assert "client-0" in capsys.readouterr().out
    for rule in (fdcr_fast.FedAvg, fdcr_fast.FDCR):
        _, _, success = trained(code.replace(", CoalitionFDCR()", f", __import__('fdcr_fast').{rule.__name__}()"))
        assert success > 0.9


def test_it_is_short_and_has_the_two_commands():
    text = README.read_text()
    assert len(text.split()) <= 900
    assert re.findall(r"(?m)^    make (\w+)", text) == ["demo", "test"]


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert [target for target in targets if "://" not in target and not (README.parent / target).exists()] == []

"""What the README shows must run."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="not a checkout")
def test_the_examples_run_one_after_the_other(capsys):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(code, names)
    assert names["result"].kept.any()
    assert names["result"].rejected == {}
    assert "client-0" in capsys.readouterr().out
